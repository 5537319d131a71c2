"""Placement problems, made from a seed: what placement must be good at. `benchmarks.placement` uses them too."""

from __future__ import annotations

import itertools
import random
from typing import Any

Problem = dict[str, Any]
MB = 1e6


def _log(rng: random.Random, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()


def graph(rng: random.Random, kind: str, size: int) -> list[list[str]]:
    """Edges of a chain, a tree (away from one source or towards one sink), or a DAG in layers."""
    names = [f"op{i}" for i in range(size)]
    if kind == "chain":
        return [[a, b] for a, b in itertools.pairwise(names)]
    if kind == "out-tree":
        return [[names[rng.randrange(max(0, i - 3), i)], names[i]] for i in range(1, size)]
    if kind == "in-tree":
        return [[names[i], names[rng.randrange(i + 1, min(size, i + 4))]] for i in range(size - 1)]
    edges = set()
    for i in range(1, size):
        for _ in range(rng.choice([1, 1, 2, 3])):
            edges.add((rng.randrange(max(0, i - 4), i), i))
    return [[names[a], names[b]] for a, b in sorted(edges)]


def pipeline(rng: random.Random, kind: str, size: int, nodes: list[dict], *, pins: bool = True, id: str = "p") -> dict:
    """A pipeline with sources and sinks pinned to some nodes."""
    edges = graph(rng, kind, size)
    inner, outer = {a for a, _ in edges}, {b for _, b in edges}
    operators = []
    for i in range(size):
        name = f"op{i}"
        end = name not in inner or name not in outer
        operators.append(
            {
                "id": name,
                "work": _log(rng, 0.0005, 0.2),
                "output_bytes": _log(rng, 100, 3e6),
                "memory_mb": float(rng.choice([16, 32, 64, 128, 256, 512])),
                "selectivity": rng.choice([1, 1, 1, 0.5, 2, 0.1]) if kind != "dag" else 1,
                "requires": [],
                "pin": rng.choice(nodes)["id"] if pins and end and rng.random() < 0.8 else None,
            }
        )
    return {"id": id, "rate": rng.choice([0.5, 1, 2, 5]), "operators": operators, "edges": edges}


def node(id: str, speed: float, cores: float, memory: float, labels: list[str] | None = None) -> dict:
    return {
        "id": id, "speed": speed, "cores": cores, "memory_mb": memory, "labels": labels or [], "arch": "amd64",
        "used_cpu": 0.0, "used_memory_mb": 0.0,
    }  # fmt: skip


def link(source: str, target: str, latency: float, bandwidth: float) -> dict:
    return {"from": source, "to": target, "latency": latency, "bandwidth": bandwidth, "used": 0.0}


def both(a: str, b: str, latency: float, bandwidth: float) -> list[dict]:
    return [link(a, b, latency, bandwidth), link(b, a, latency, bandwidth)]


def mesh(rng: random.Random, size: int, density: float = 1.0) -> tuple[list[dict], list[dict]]:
    nodes = [node(f"n{i:02}", _log(rng, 0.2, 8), rng.choice([1, 2, 4, 8]), _log(rng, 200, 4000)) for i in range(size)]
    links = []
    for i, a in enumerate(nodes):
        for j, b in enumerate(nodes):
            if i != j and (rng.random() < density or j == (i + 1) % size):
                links.append(link(a["id"], b["id"], _log(rng, 0.0005, 0.2), _log(rng, 1e5, 1e9)))
    return nodes, links


def fog(rng: random.Random, size: int) -> tuple[list[dict], list[dict]]:
    """An edge-fog-cloud tree: slow edges behind slow links, a fast cloud far away."""
    fogs = max(1, size // 6)
    nodes = [node("cloud0", rng.uniform(4, 8), 32, 64000.0, ["cloud", "gpu"])]
    links: list[dict] = []
    for f in range(fogs):
        nodes.append(node(f"fog{f}", rng.uniform(1, 3), 4, rng.choice([1000.0, 2000.0, 4000.0]), ["fog"]))
        links += both(f"fog{f}", "cloud0", rng.uniform(0.02, 0.08), _log(rng, 1e6, 1e8))
    for e in range(size - fogs - 1):
        nodes.append(
            node(
                f"edge{e:02}", rng.uniform(0.2, 1), rng.choice([1, 2, 4]), rng.choice([256.0, 512.0, 1024.0]), ["edge"]
            )
        )
        links += both(f"edge{e:02}", f"fog{rng.randrange(fogs)}", rng.uniform(0.001, 0.02), _log(rng, 2e5, 2e7))
    return nodes, links


def problem(rng: random.Random, nodes: list[dict], links: list[dict], pipe: dict, **options: str) -> Problem:
    return {"routing": "direct", "contention": "none", **options, "nodes": nodes, "links": links, "pipeline": pipe}


KINDS = ("chain", "out-tree", "in-tree", "dag")


def small(seed: int) -> Problem:
    """Chains and trees of up to 8 operators."""
    rng = random.Random(f"small{seed}")
    nodes, links = mesh(rng, rng.randint(4, 20)) if rng.random() < 0.6 else fog(rng, rng.randint(4, 20))
    pipe = pipeline(rng, rng.choice(KINDS[:3]), rng.randint(4, 8), nodes)
    routing = "shortest" if nodes[0]["id"] == "cloud0" else rng.choice(["direct", "shortest"])
    return problem(rng, nodes, links, pipe, routing=routing, contention=rng.choice(["none", "none", "co-located"]))


def general(seed: int) -> Problem:
    """Chains and DAGs of 4 to 16 operators on 4 to 40 nodes."""
    rng = random.Random(f"general{seed}")
    nodes, links = mesh(rng, rng.randint(4, 40), rng.choice([1.0, 1.0, 0.3]))
    pipe = pipeline(rng, rng.choice(KINDS), rng.randint(4, 16), nodes)
    return problem(
        rng, nodes, links, pipe,
        routing=rng.choice(["direct", "shortest"]), contention=rng.choice(["none", "none", "co-located"]),
    )  # fmt: skip


def tree(seed: int) -> Problem:
    """Edge, fog and cloud."""
    rng = random.Random(f"tree{seed}")
    nodes, links = fog(rng, rng.randint(6, 40))
    pipe = pipeline(rng, rng.choice(KINDS), rng.randint(4, 16), [n for n in nodes if "edge" in n["labels"]])
    for operator in pipe["operators"]:
        if operator["pin"] is None and rng.random() < 0.15:
            operator["requires"] = [rng.choice(["edge", "cloud", "fog"])]
    return problem(rng, nodes, links, pipe, routing="shortest", contention=rng.choice(["none", "none", "co-located"]))


def trap(seed: int) -> Problem:
    """A fast node behind a slow link, a big message in the middle, knapsacks of memory, ways that first lead away."""
    rng = random.Random(f"trap{seed}")
    kind = rng.choice(["slow link", "big message", "knapsack", "detour"])
    size = rng.randint(4, 12)
    nodes, links = mesh(rng, rng.randint(5, 24), 1.0)
    pipe = pipeline(rng, rng.choice(["chain", "chain", "dag"]), size, nodes)
    ids = [n["id"] for n in nodes]
    if kind == "slow link":
        fast = rng.sample(ids, max(1, len(ids) // 4))
        for n in nodes:
            if n["id"] in fast:
                n["speed"] = 50.0
        for each in links:
            if each["from"] in fast or each["to"] in fast:
                each["bandwidth"] = _log(rng, 2e4, 2e6)
    elif kind == "big message":
        for operator in rng.sample(pipe["operators"], 2):
            operator["output_bytes"] = 5e7
    elif kind == "knapsack":
        for n in nodes:
            n["memory_mb"] = float(rng.choice([300, 500, 700]))
        for operator in pipe["operators"]:
            operator["memory_mb"] = float(rng.randint(90, 290))
            operator["work"] *= 3
    else:
        for each in links:
            each["latency"] = rng.uniform(0.2, 0.4)
        hub = rng.sample(ids, 2)
        for a in ids:
            for b in hub:
                if a != b:
                    for each in links:
                        if (each["from"], each["to"]) in ((a, b), (b, a)):
                            each["latency"] = rng.uniform(0.001, 0.02)
    return problem(rng, nodes, links, pipe, routing=rng.choice(["direct", "shortest"]))


def packed(seed: int) -> Problem:
    """Tightly packed: 25 to 40 nodes that are nearly full."""
    rng = random.Random(f"packed{seed}")
    if rng.random() < 0.5:
        nodes, links = mesh(rng, rng.randint(25, 40), rng.choice([1.0, 0.5]))
    else:
        nodes, links = fog(rng, rng.randint(25, 40))
    pipe = pipeline(rng, rng.choice(KINDS), rng.randint(8, 16), nodes)
    free = {n["id"]: 0.0 for n in nodes}
    cpu = dict.fromkeys(free, 0.0)
    rates = _rates(pipe)
    few = rng.sample(list(free), max(4, len(pipe["operators"]) * 2 // 3))
    for operator in pipe["operators"]:  # a hidden placement that fits, and little room beside it
        at = operator["pin"] or rng.choice(few)
        free[at] += operator["memory_mb"]
        cpu[at] += operator["work"] * rates[operator["id"]]
    for n in nodes:
        extra = rng.choice([0.0, 0.0, 16.0, 48.0])
        n["memory_mb"] = 4096.0
        n["used_memory_mb"] = 4096.0 - free[n["id"]] - extra - (rng.choice([0, 0, 128]) if not free[n["id"]] else 0)
        total = max(n["speed"] * n["cores"], cpu[n["id"]] * 1.2)
        n["cores"] = total / n["speed"]
        n["used_cpu"] = max(0.0, total - cpu[n["id"]] * rng.choice([1.02, 1.5]) - rng.choice([0.0, 0.05, 0.2]))
    for each in links:
        each["bandwidth"] = max(each["bandwidth"], 3e7)
    return problem(rng, nodes, links, pipe, routing="shortest")


def exact(seed: int) -> Problem:
    """Rooms that a hidden placement fills to the last MiB, or nearly."""
    rng = random.Random(f"bins{seed}")
    size = rng.randint(25, 40)
    nodes, links = mesh(rng, size) if seed % 2 else fog(rng, size)
    pipe = pipeline(rng, rng.choice(KINDS), rng.randint(10, 16), nodes)
    for operator in pipe["operators"]:
        operator["memory_mb"] = float(rng.randint(40, 400))
        operator["output_bytes"] = min(operator["output_bytes"], 2e5)
    bins = rng.sample([n["id"] for n in nodes], max(3, len(pipe["operators"]) // 3))
    need = {n["id"]: 0.0 for n in nodes}
    cpu = dict.fromkeys(need, 0.0)
    rates = _rates(pipe)
    for operator in pipe["operators"]:
        at = operator["pin"] or rng.choice(bins)
        need[at] += operator["memory_mb"]
        cpu[at] += operator["work"] * rates[operator["id"]]
    for n in nodes:
        n["memory_mb"] = need[n["id"]] + rng.choice([0, 0, 5, 30])
        n["cores"] = max(n["cores"], cpu[n["id"]] * 1.1 / n["speed"])
    for each in links:
        each["bandwidth"] = max(each["bandwidth"], 5e7)
    return problem(rng, nodes, links, pipe, routing="shortest")


def _rates(pipe: dict) -> dict[str, float]:
    inputs: dict[str, list[str]] = {o["id"]: [] for o in pipe["operators"]}
    for a, b in pipe["edges"]:
        inputs[b].append(a)
    by_id = {o["id"]: o for o in pipe["operators"]}
    rates: dict[str, float] = {}

    def rate(name: str) -> float:
        if name not in rates:
            rates[name] = sum(rate(b) * by_id[b]["selectivity"] for b in inputs[name]) if inputs[name] else pipe["rate"]
        return rates[name]

    for name in by_id:
        rate(name)
    return rates


def joint(seed: int) -> Problem:
    """5 to 20 pipelines on shared capacity."""
    rng = random.Random(f"joint{seed}")
    nodes, links = fog(rng, rng.randint(10, 30)) if rng.random() < 0.6 else mesh(rng, rng.randint(8, 24))
    pipes = []
    for number in range(rng.randint(5, 20)):
        pipe = pipeline(rng, rng.choice(KINDS), rng.randint(3, 6), nodes, id=f"p{number:02}")
        for operator in pipe["operators"]:
            operator["memory_mb"] = min(operator["memory_mb"], 128.0)
            operator["output_bytes"] = min(operator["output_bytes"], 1e5)
            operator["work"] = min(operator["work"], 0.05)
        pipes.append(pipe)
    need = {n["id"]: 0.0 for n in nodes}
    cpu = dict.fromkeys(need, 0.0)
    for pipe in pipes:
        rates = _rates(pipe)
        for operator in pipe["operators"]:
            at = operator["pin"] or rng.choice(nodes)["id"]
            need[at] += operator["memory_mb"]
            cpu[at] += operator["work"] * rates[operator["id"]]
    for n in nodes:
        n["memory_mb"] = need[n["id"]] + 64.0
        n["cores"] = max(1.0, cpu[n["id"]] * 1.3 / n["speed"])
    for each in links:
        each["bandwidth"] = max(each["bandwidth"], 2e7)
    return {"routing": "shortest", "contention": "none", "nodes": nodes, "links": links, "pipelines": pipes}


def large(seed: int, size: int, operators: int) -> Problem:
    """A cluster of clusters: regions, sites, edges; sparse links."""
    rng = random.Random(f"large{seed}-{size}-{operators}")
    nodes, links = [], []
    regions = max(2, size // 250)
    for r in range(regions):
        nodes.append(node(f"r{r}", rng.uniform(4, 8), 64, 256000.0, ["cloud"]))
        for other in range(r):
            if other == r - 1 or rng.random() < 0.3:
                links += both(f"r{r}", f"r{other}", rng.uniform(0.01, 0.08), 1e9)
    sites = size // 20
    for s in range(sites):
        nodes.append(node(f"s{s}", rng.uniform(1, 3), 8, 16000.0, ["fog"]))
        links += both(f"s{s}", f"r{rng.randrange(regions)}", rng.uniform(0.005, 0.03), _log(rng, 1e7, 1e9))
        links += both(f"s{s}", f"s{rng.randrange(s)}", rng.uniform(0.005, 0.03), 1e8) if s else []
    while len(nodes) < size:
        name = f"e{len(nodes)}"
        nodes.append(node(name, rng.uniform(0.2, 1.5), rng.choice([1, 2, 4]), 1024.0, ["edge"]))
        links += both(name, f"s{rng.randrange(sites)}", rng.uniform(0.001, 0.01), _log(rng, 1e6, 1e8))
    edges = [n for n in nodes if "edge" in n["labels"]]
    kind = rng.choice(KINDS)
    pipe = pipeline(rng, kind, operators, edges)
    pipe["rate"] = 0.05
    for operator in pipe["operators"]:
        operator["selectivity"] = 1 if kind not in ("dag", "in-tree") else 0.5
        operator["memory_mb"] = min(operator["memory_mb"], 128.0)
    return problem(rng, nodes, links, pipe, routing="shortest")
