"""What a placement costs and which the best is, worked out a second time: from the cost model as docs/placement.md
states it, in plain Python, sharing no code with nomad.scheduler. For tests and benchmarks alone."""

from __future__ import annotations

import heapq
import itertools
import math
from typing import Any

Problem = dict[str, Any]
SLACK = 1e-7


class Model:
    """A problem, ready to be asked what a placement costs. Operators are (pipeline, operator)."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.nodes = {node["id"]: node for node in problem["nodes"]}
        self.pipelines = problem.get("pipelines") or [problem["pipeline"]]
        self.hard = problem.get("contention", "none") == "none"
        self.links = {
            (link["from"], link["to"]): link for link in problem.get("links", []) if link["from"] != link["to"]
        }
        self.operators = {(p["id"], o["id"]): o for p in self.pipelines for o in p["operators"]}
        self.inputs: dict[tuple, list[tuple]] = {key: [] for key in self.operators}
        self.outputs: dict[tuple, list[tuple]] = {key: [] for key in self.operators}
        for p in self.pipelines:
            for a, b in p.get("edges", []):
                self.inputs[p["id"], b].append((p["id"], a))
                self.outputs[p["id"], a].append((p["id"], b))
        self.rate: dict[tuple, float] = {}
        source_rate = {p["id"]: p.get("rate", 1.0) for p in self.pipelines}
        self.order: list[tuple] = []
        waiting = dict.fromkeys(self.operators)
        while waiting:
            for key in list(waiting):
                if all(before in self.rate for before in self.inputs[key]):
                    del waiting[key]
                    self.order.append(key)
                    self.rate[key] = (
                        sum(self.rate[b] * self.operators[b].get("selectivity", 1) for b in self.inputs[key])
                        if self.inputs[key]
                        else source_rate[key[0]]
                    )
        self.routes = {}
        for node in self.nodes:
            self.routes.update(self._from(node))

    def _from(self, start: str) -> dict[tuple[str, str], tuple[float, float, list]]:
        """(from, to) -> latency, bandwidth, links."""
        out: dict[tuple[str, str], tuple[float, float, list]] = {(start, start): (0.0, math.inf, [])}
        if self.problem.get("routing", "direct") == "direct":
            for (a, b), link in self.links.items():
                if a == start:
                    out[a, b] = (link.get("latency", 0.0), self._bandwidth(link), [(a, b)])
            return out
        leaving: dict[str, list[str]] = {node: [] for node in self.nodes}
        for a, b in sorted(self.links):
            leaving[a].append(b)
        queue: list[tuple] = [(0.0, -math.inf, 0, [], start)]
        done: set[str] = set()
        while queue:
            latency, narrow, hops, path, here = heapq.heappop(queue)
            if here in done:
                continue
            done.add(here)
            out[start, here] = (latency, -narrow, path)
            for after in leaving[here]:
                link = self.links[here, after]
                width = max(narrow, -self._bandwidth(link))
                entry = (latency + link.get("latency", 0.0), width, hops + 1, [*path, (here, after)], after)
                heapq.heappush(queue, entry)
        return out

    @staticmethod
    def _bandwidth(link: dict) -> float:
        return math.inf if link.get("bandwidth") is None else link["bandwidth"]

    def transfer(self, before: tuple, a: str, b: str) -> float:
        """Seconds; infinite where there is no way."""
        if a == b:
            return 0.0
        if (a, b) not in self.routes:
            return math.inf
        latency, bandwidth, _ = self.routes[a, b]
        return latency + self.operators[before].get("output_bytes", 0.0) / bandwidth

    def may(self, key: tuple, node: str) -> bool:
        operator = self.operators[key]
        if operator.get("pin") is not None:
            return bool(operator["pin"] == node)
        return set(operator.get("requires", [])) <= set(self.nodes[node].get("labels", []))

    def flow(self, key: tuple) -> float:
        """Bytes per second to each successor."""
        o = self.operators[key]
        return float(o.get("output_bytes", 0.0) * self.rate[key] * o.get("selectivity", 1))

    def demand(self, key: tuple) -> tuple[float, float]:
        """MiB, reference-seconds per second."""
        o = self.operators[key]
        return o.get("memory_mb", 0.0), o.get("work", 0.0) * self.rate[key]

    def room(self, node: str) -> tuple[float, float]:
        n = self.nodes[node]
        memory = math.inf if n.get("memory_mb") is None else n["memory_mb"]
        return memory - n.get("used_memory_mb", 0.0), n.get("speed", 1.0) * n.get("cores", 1.0) - n.get("used_cpu", 0.0)

    def broken(self, placement: dict[tuple, str]) -> str:
        """The first constraint that a placement breaks, or ""."""
        for key, node in placement.items():
            if not self.may(key, node):
                return f"{key} may not be on {node}"
        for key, node in placement.items():
            for after in self.outputs[key]:
                if (node, placement[after]) not in self.routes:
                    return f"no way {node} -> {placement[after]}"
        if not self.hard:
            return ""
        for node in sorted(set(placement.values())):
            here = [self.demand(key) for key, at in placement.items() if at == node]
            for kind, need, room in zip(
                ("memory", "cpu"), map(sum, zip(*here, strict=True)), self.room(node), strict=True
            ):
                if need > room + SLACK * max(1.0, abs(room)):
                    return f"{kind} of {node}"
        for link, load in self.loads(placement).items():
            room = self._bandwidth(self.links[link]) - self.links[link].get("used", 0.0)
            if load > room + SLACK * max(1.0, abs(room)):
                return f"bandwidth of {link}"
        return ""

    def loads(self, placement: dict[tuple, str]) -> dict[tuple[str, str], float]:
        loads: dict[tuple[str, str], float] = {}
        for key, node in placement.items():
            for after in self.outputs[key]:
                for link in self.routes[node, placement[after]][2]:
                    loads[link] = loads.get(link, 0.0) + self.flow(key)
        return loads

    def latency(self, placement: dict[tuple, str]) -> float:
        """What is minimised."""
        finish: dict[tuple, float] = {}
        for key in self.order:
            node = placement[key]
            beside = 1 if self.hard else sum(at == node for other, at in placement.items() if other[0] == key[0])
            arrival = max((finish[b] + self.transfer(b, placement[b], node) for b in self.inputs[key]), default=0.0)
            finish[key] = arrival + self.operators[key].get("work", 0.0) * beside / self.nodes[node].get("speed", 1.0)
        latest = {p["id"]: max(finish[key] for key in finish if key[0] == p["id"]) for p in self.pipelines}
        return sum(latest.values())


def brute_force(problem: Problem) -> float | None:
    """The optimum by trying everything; None if there is no placement."""
    model = Model(problem)
    keys = list(model.operators)
    seats = [[node for node in sorted(model.nodes) if model.may(key, node)] for key in keys]
    best: float | None = None
    for nodes in itertools.product(*seats):
        placement = dict(zip(keys, nodes, strict=True))
        if not model.broken(placement):
            latency = model.latency(placement)
            best = latency if best is None else min(best, latency)
    return best


def milp(
    problem: Problem, seconds: float = 120.0, known: float | None = None
) -> tuple[str, float | None, float | None]:
    """("optimal" | "infeasible" | "unknown", the best found, the bound), by HiGHS. `known`: no worse is looked for."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.optimize import milp as solve
    from scipy.sparse import csr_array

    model = Model(problem)
    keys, nodes = model.order, sorted(model.nodes)
    x = {}
    for key in keys:
        for node in nodes:
            memory, cpu = model.demand(key)
            room = model.room(node)
            fits = memory <= room[0] + SLACK and cpu <= room[1] + SLACK * max(1, abs(room[1]))
            if model.may(key, node) and (fits or not model.hard):
                x[key, node] = len(x)
        if not any((key, node) in x for node in nodes):
            return "infeasible", None, None
    count = len(x)
    z = {}
    for key in keys:
        for after in model.outputs[key]:
            for a in nodes:
                for b in nodes:
                    if (key, a) in x and (after, b) in x and (a, b) in model.routes:
                        z[key, after, a, b] = count
                        count += 1
    finish = {key: count + i for i, key in enumerate(keys)}
    count += len(keys)
    total = {p["id"]: count + i for i, p in enumerate(model.pipelines)}
    count += len(total)
    slow = {key: count + i for i, key in enumerate(keys)}
    count += len(keys)
    rows: list[dict[int, float]] = []
    low: list[float] = []
    high: list[float] = []

    def row(terms: dict[int, float], least: float, most: float) -> None:
        rows.append(terms)
        low.append(least)
        high.append(most)

    for key in keys:
        row({x[key, n]: 1.0 for n in nodes if (key, n) in x}, 1, 1)
    out: dict[tuple, dict[int, float]] = {}
    for (key, after, a, b), column in z.items():
        out.setdefault((key, after, "a", a), {})[column] = 1.0
        out.setdefault((key, after, "b", b), {})[column] = 1.0
    for key in keys:
        for after in model.outputs[key]:
            for n in nodes:
                if (key, n) in x:
                    row({**out.get((key, after, "a", n), {}), x[key, n]: -1.0}, 0, 0)
                if (after, n) in x:
                    row({**out.get((key, after, "b", n), {}), x[after, n]: -1.0}, 0, 0)
    way: dict[tuple, dict[int, float]] = {}
    for (key, after, a, b), column in z.items():
        way.setdefault((key, after), {})[column] = -model.transfer(key, a, b)
    for key in keys:
        own = {
            x[key, n]: -model.operators[key].get("work", 0.0) / model.nodes[n].get("speed", 1.0)
            for n in nodes
            if (key, n) in x
        }
        if not model.hard:  # at least as long as with all that are on its node
            for n in nodes:
                if (key, n) in x:
                    alone = -own[x[key, n]]
                    beside = [other for other in keys if other[0] == key[0] and other != key and (other, n) in x]
                    most = alone * len(beside)
                    row({slow[key]: 1.0, **{x[o, n]: -alone for o in beside}, x[key, n]: -most}, -most, np.inf)
            own[slow[key]] = -1.0
        row({finish[key]: 1.0, **own}, 0, np.inf)
        for before in model.inputs[key]:
            row({finish[key]: 1.0, finish[before]: -1.0, **own, **way.get((before, key), {})}, 0, np.inf)
        row({total[key[0]]: 1.0, finish[key]: -1.0}, 0, np.inf)
    for n in nodes:
        for kind in (0, 1):
            terms = {x[key, n]: model.demand(key)[kind] for key in keys if (key, n) in x}
            if terms and model.hard and math.isfinite(model.room(n)[kind]):
                row(terms, -np.inf, max(model.room(n)[kind], 0.0))
    on_link: dict[tuple, dict[int, float]] = {}
    for (key, _after, a, b), column in z.items():
        for link in model.routes[a, b][2]:
            on_link.setdefault(link, {})[column] = model.flow(key)
    everything = sum(model.flow(key) * len(model.outputs[key]) for key in keys)
    for link, terms in on_link.items():
        room = model._bandwidth(model.links[link]) - model.links[link].get("used", 0.0)
        if model.hard and room < everything:
            scale = max(everything, 1e-9)
            row({column: load / scale for column, load in terms.items()}, -np.inf, max(room, 0.0) / scale)
    data = [v for terms in rows for v in terms.values()]
    where = [c for terms in rows for c in terms]
    start = np.cumsum([0] + [len(terms) for terms in rows])
    matrix = csr_array((data, where, start), shape=(len(rows), count))
    cost = np.zeros(count)
    cost[list(total.values())] = 1.0
    integer = np.zeros(count)
    integer[: len(x)] = 1
    upper = np.ones(count)
    upper[min(finish.values()) :] = np.inf if known is None else known * (1 + 1e-6)
    result = solve(
        cost,
        constraints=LinearConstraint(matrix, low, high),
        integrality=integer,
        bounds=Bounds(np.zeros(count), upper),
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    if result.status == 2:
        return ("infeasible" if known is None else "optimal"), known, None
    if result.x is None:
        return "unknown", None, result.mip_dual_bound
    return ("optimal" if result.status == 0 else "unknown"), float(result.fun), result.mip_dual_bound
