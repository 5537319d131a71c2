"""Runs a scenario: each policy and repeat by itself, one after the other, in a fresh cluster.

A run: the links are made, a master starts with its state in a temporary folder, the pipeline is submitted as the
policy says; when its first message has arrived, time begins and the timeline is played; at the end the pipeline is
stopped and all that was under way settles. Then everything is removed, also when the run fails or is cancelled.

Called by the command line and by benchmarks/. What goes wrong in one run is told in its `error`; the others go on.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nomad import program
from nomad.bench import links, machine, policies, results, synthetic, timeline
from nomad.bench.policies import Chosen, Operator, Shaped
from nomad.bench.results import Happened, Moved, Results, Run, Sample
from nomad.bench.scenario import PolicyForm, Scenario, check_operators
from nomad.bench.timeline import LinkStep, MoveStep, NodeStep, RateStep, SpeedStep, Step, WorkStep
from nomad.client import Cluster, PipelineHandle, connect
from nomad.errors import NomadError, ScenarioError
from nomad.master.serve import serve
from nomad.master.views import MoveView, Phase, PipelineView
from nomad.pipeline import build
from nomad.settings import Pods, Reconcile, Rest, Settings, Windows

ID = "bench"
"""Of the pipeline, in every run."""
START_TIMEOUT = 120.0
"""Seconds until the first message must have arrived at the end: models are loaded in that time."""
SETTLE_TIMEOUT = 30.0
"""Seconds for what is under way at the end. Where a queue is longer, what is left of it isn't counted as lost."""
MOVE_TIMEOUT = 60.0
"""Seconds for one move that the scenario asked for."""
POLL = 0.25
"""Seconds between two looks at the pipeline."""
LATENCIES_EVERY = 1.0
"""Seconds between two times that a program's latencies are fetched."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run."""

    scenario: Scenario
    policies: Sequence[PolicyForm]
    repeats: int
    seeds: Sequence[int]
    duration: float
    links: str = "shaping"


async def run_all(plan: Plan, progress: Progress = lambda text: None) -> Results:
    """All runs. With several repeats, policies take turns: what the machine does meanwhile hits all of them.

    Raises `ScenarioError` when the scenario can't be run at all.
    """
    scenario = plan.scenario
    steps = timeline.steps(scenario, plan.duration)
    subject = Subject.of(scenario)
    backend = links.backend(plan.links)
    runs = []
    todo = [(repeat, seed, policy) for repeat in range(plan.repeats) for seed in plan.seeds for policy in plan.policies]
    for number, (repeat, seed, policy) in enumerate(todo, 1):
        progress(f"{number} of {len(todo)}: {policy.name}")
        runs.append(await _one(_Task(plan, subject, backend, steps, policy, repeat, seed), progress))
    return Results(
        scenario=scenario.name,
        sha256=scenario.sha256,
        about=scenario.form.about,
        links=plan.links,
        duration=plan.duration,
        phases=timeline.phases(scenario, plan.duration),
        machine=machine.describe(),
        runs=runs,
    )


@dataclass(frozen=True, slots=True)
class Subject:
    """The pipeline, whatever it comes from."""

    shaped: Shaped
    profile: Sequence[dict[str, float]] | None
    functions: Callable[[Path, int], Any]
    """The operators, for one run with this folder and this seed."""

    @classmethod
    def of(cls, scenario: Scenario) -> Subject:
        form = scenario.form.pipeline
        return cls._synthetic(scenario) if form.program is None else cls._program(scenario)

    @classmethod
    def _synthetic(cls, scenario: Scenario) -> Subject:
        form = scenario.form.pipeline
        made = [synthetic.Made(op.name, op.output_bytes, op.memory) for op in form.operators]
        built = build(synthetic.functions(Path(), made, form.message_bytes))
        sizes = [form.message_bytes, *(op.output_bytes for op in form.operators), 0]
        work = [0.0, *(op.work for op in form.operators), 0.0]
        pins = [None, *(op.pin for op in form.operators), None]
        operators = tuple(
            Operator(op.spec.name, seconds, size, op.spec.memory_mb, op.spec.requires, pin)
            for op, seconds, size, pin in zip(built.operators, work, sizes, pins, strict=True)
        )
        profile = [{"cloud_execution_time": op.work, "output_msg_size": float(op.output_bytes)} for op in operators]
        assert form.start is not None
        assert form.end is not None
        return cls(
            Shaped(operators, form.start, form.end),
            profile if form.profiled else None,
            lambda folder, seed: synthetic.functions(
                folder, made, form.message_bytes, seed if form.arrivals == "random" else None
            ),
        )

    @classmethod
    def _program(cls, scenario: Scenario) -> Subject:
        form = scenario.form.pipeline
        with _environment(form.environment):
            found = program.load(scenario.program)
        start, end = form.start or found.start, form.end or found.end
        if start is None or end is None:
            raise ScenarioError(f"{scenario.name}: say on which nodes the pipeline starts and ends: start and end")
        profile = [{**item} for item in form.profile or found.profile or ()]
        built = build(found.operators, profile=profile or None)
        check_operators(scenario, [op.spec.name for op in built.operators])
        expected = [*profile, *([{}] * len(built.operators))]
        operators = tuple(
            Operator(
                op.spec.name,
                expected[number].get("cloud_execution_time", 0.0),
                expected[number].get("output_msg_size", 0.0),
                op.spec.memory_mb,
                op.spec.requires,
                op.spec.pin,
            )
            for number, op in enumerate(built.operators)
        )
        return cls(Shaped(operators, start, end), profile or None, lambda folder, seed: found.operators)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables while the block runs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True, slots=True)
class _Task:
    """One run."""

    plan: Plan
    subject: Subject
    backend: links.Backend
    steps: Sequence[Step]
    policy: PolicyForm
    repeat: int
    seed: int


async def _one(task: _Task, progress: Progress) -> Run:
    """One run, from nothing to nothing."""
    run = Run(task.policy.name, task.repeat, task.seed)
    try:
        chosen = policies.choose(task.policy, task.plan.scenario, task.subject.shaped, task.steps)
        run = replace(run, pins=chosen.pins)
        with tempfile.TemporaryDirectory(prefix="nomad-bench-") as name:
            folder = Path(name)
            async with _world(task, folder) as (cluster, network):
                pipeline = await _submit(task, cluster, chosen, folder)
                playing = _Playing(task, chosen, folder, cluster, network, pipeline)
                return await playing.play(run)
    except NomadError as exc:
        progress(f"{task.policy.name}: {exc}")
        return replace(run, error=str(exc))


@asynccontextmanager
async def _world(task: _Task, folder: Path) -> AsyncIterator[tuple[Cluster, links.Network]]:
    """A cluster of the scenario's topology, and its links; all of it is gone at the end."""
    topology = task.plan.scenario.topology
    form = task.plan.scenario.form.pipeline
    windows = Windows()
    async with task.backend.open(topology, folder) as network:
        settings = Settings(
            state=folder / "state",
            rest=Rest(port=0),
            reconcile=Reconcile(drain_grace=SETTLE_TIMEOUT),
            windows=Windows(form.window_messages or windows.messages, form.window_bytes or windows.bytes),
            pods=Pods(
                transport="tcp" if network.seats else "unix",
                master_timeout=5.0,  # should this process be killed outright, its pods follow soon
                shaped=network.shaped,
                seats=network.seats,
            ),
        )
        async with serve(settings, topology) as served:
            async with connect(served.url, served.token, signing_key=served.signing_key) as cluster:
                network.attach(cluster)
                yield cluster, network


async def _submit(task: _Task, cluster: Cluster, chosen: Chosen, folder: Path) -> PipelineHandle:
    scenario, subject = task.plan.scenario, task.subject
    if scenario.synthetic:
        now = timeline.conditions(scenario, task.steps, -1.0)
        synthetic.turn(folder, rate=now.rate, work=now.work)
    return await cluster.submit(
        subject.functions(folder, task.seed),
        start=subject.shaped.start,
        end=subject.shaped.end,
        id=ID,
        profile=subject.profile,
        moves=chosen.moves,
        pins=chosen.pins,
    )


@dataclass(slots=True)
class _Playing:
    """A run while its pipeline is there."""

    task: _Task
    chosen: Chosen
    folder: Path
    cluster: Cluster
    network: links.Network
    pipeline: PipelineHandle
    happened: list[Happened] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    fetched: list[tuple[float, float]] = field(default_factory=list)
    """A program's latencies: when, in seconds since the epoch, and how long."""
    began: float = 0.0
    """Seconds since the epoch."""

    async def play(self, run: Run) -> Run:
        """The whole run."""
        scenario = self.task.plan.scenario
        await self._first_message()
        first = self._placement(self.pipeline.last_status)
        others = [asyncio.create_task(self._watch(), name="watch the pipeline")]
        if not scenario.synthetic:
            others.append(asyncio.create_task(self._fetch(), name="fetch latencies"))
        players = [
            asyncio.create_task(self._play_moves(), name="play moves"),
            asyncio.create_task(self._play_steps(), name="play the timeline"),
        ]
        if not scenario.form.ends_with_moves:
            players.append(asyncio.create_task(self._sleep_until(self.task.plan.duration), name="the run's duration"))
        try:
            await _all(players, others)
        finally:
            for task in (*players, *others):
                task.cancel()
            await asyncio.gather(*players, *others, return_exceptions=True)
        after = self._placement(await self.pipeline.status())
        moves = await self.pipeline.moves()
        drained = await self._stop()
        await self._note_events()
        if scenario.synthetic:
            arrivals = synthetic.arrivals(self.folder)
            known = [(arrival.arrived, arrival.arrived - arrival.made) for arrival in arrivals]
            outcome = synthetic.outcome(self.folder, drained=drained)
        else:
            known, outcome = self.fetched, None
        times = [at - self.began for at, _ in known]
        return replace(
            run,
            placement=first,
            placement_after=after,
            times=times,
            latencies=[latency for _, latency in known],
            happened=sorted(self.happened, key=lambda item: item.at),
            moves=[self._moved(move, times if scenario.synthetic else None) for move in moves],
            samples=self.samples,
            outcome=outcome,
        )

    # The beginning and the end

    async def _first_message(self) -> None:
        """Wait for it; time begins when it is there."""
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            status = await self._status()
            if status.operators[-1].stats.processed:
                self.began = time.time()
                return
            if time.monotonic() > deadline:
                where = ", ".join(f"{op.name} {op.state}" for op in status.operators)
                raise ScenarioError(f"no message arrived within {START_TIMEOUT:g} s: {where}")
            await asyncio.sleep(0.05)

    async def _stop(self) -> bool:
        """Stop the pipeline; whether all that was under way has settled."""
        asked = time.monotonic()
        await self.pipeline.stop()
        await self.pipeline.wait()
        return time.monotonic() - asked < SETTLE_TIMEOUT

    async def _status(self) -> PipelineView:
        status = await self.pipeline.status()
        if status.phase is Phase.FAILED:
            failures = [op.last_failure for op in status.operators if op.last_failure is not None]
            raise ScenarioError("\n".join([f"the pipeline failed: {status.reason}", *(f.traceback for f in failures)]))
        return status

    # What is seen

    async def _watch(self) -> None:
        while True:
            status = await self._status()
            self.samples.append(
                Sample(
                    at=round(time.time() - self.began, 3),
                    nodes=self._placement(status),
                    queues={op.name: op.stats.queue_messages for op in status.operators},
                    paused=[op.name for op in status.operators if op.stats.paused],
                )
            )
            await asyncio.sleep(POLL)

    async def _fetch(self) -> None:
        after = self.began
        while True:
            found = await self.pipeline.latencies(after=after)
            self.fetched += [(item.time, item.latency) for item in found]
            after = max([after, *(item.time for item in found)])
            await asyncio.sleep(LATENCIES_EVERY)

    def _placement(self, status: PipelineView) -> dict[str, str]:
        return {op.name: op.node for op in status.operators}

    async def _note_events(self) -> None:
        for event in await self.cluster.events(limit=10_000):
            self.happened.append(
                Happened(round(event.time - self.began, 4), event.kind, event.message, event.operator, event.data)
            )

    def _moved(self, move: MoveView, arrivals: Sequence[float] | None) -> Moved:
        asked = move.asked - self.began
        finished = None if move.finished is None else move.finished - self.began
        return Moved(
            operator=move.operator,
            source=move.source,
            target=move.target,
            cause=move.cause,
            reason=move.reason,
            state=move.state,
            asked=asked,
            finished=finished,
            phases=[{"name": phase.name, "seconds": phase.seconds} for phase in move.phases],
            pause=move.pause,
            lost=move.lost,
            doubled=move.doubled,
            error=move.error,
            gap=None if arrivals is None or finished is None else results.gap(arrivals, asked, finished + 0.5),
        )

    # What is done

    async def _sleep_until(self, at: float) -> None:
        """Until a time of the run."""
        await asyncio.sleep(max(0.0, self.began + at - time.time()))

    async def _play_steps(self) -> None:
        for step in self.task.steps:
            if not isinstance(step, MoveStep):
                await self._sleep_until(step.at)
                await self._do(step)

    async def _do(self, step: Step) -> None:
        match step:
            case LinkStep():
                await self.network.set_link(step.source, step.target, step.shape)
            case SpeedStep():
                await self.cluster.set_node(step.node, speed=step.speed)
            case NodeStep():
                await (self.cluster.lose_node if step.lost else self.cluster.restore_node)(step.node)
            case RateStep():
                synthetic.turn(self.folder, rate=step.rate)
            case WorkStep():
                synthetic.turn(self.folder, work={step.operator: step.work})
            case MoveStep():
                raise AssertionError("moves are played by _play_moves")
        event = self.task.plan.scenario.form.events[step.event]
        at = round(time.time() - self.began, 4)
        self.happened.append(Happened(at, "step", timeline.describe(event), data={"event": step.event}))

    async def _play_moves(self) -> None:
        """One after the other; the next begins when it is due and the one before is over.

        What the policy has bound to a node stays there.
        """
        for step in self.task.steps:
            if isinstance(step, MoveStep) and step.operator not in self.chosen.pins:
                await self._sleep_until(step.at)
                if time.time() - self.began >= self.task.plan.duration:
                    return
                await self._move(step)
        if self.task.plan.scenario.form.ends_with_moves:
            await asyncio.sleep(self.task.plan.scenario.form.settle)

    async def _move(self, step: MoveStep) -> None:
        nodes = self._placement(await self._status())
        if nodes[step.operator] == step.node:
            return
        asked = time.monotonic()
        move = await self.pipeline.move(step.operator, step.node)
        while not move.state.final:
            if time.monotonic() - asked > MOVE_TIMEOUT:
                raise ScenarioError(
                    f"the move of {step.operator} to {step.node} is {move.state} after {MOVE_TIMEOUT:g} s"
                )
            await asyncio.sleep(0.05)
            move = await self.pipeline.move_status(move.id)


async def _all(wanted: Iterable[asyncio.Task[None]], others: Iterable[asyncio.Task[None]]) -> None:
    """Until all that is wanted is done; what any of them all raises is raised."""
    pending = set(wanted)
    beside = set(others)
    while pending:
        done, _ = await asyncio.wait(pending | beside, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        pending -= done
