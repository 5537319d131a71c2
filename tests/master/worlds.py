"""Values to test the master's decisions with: specs, a pipeline that is wanted, pods in every state."""

from __future__ import annotations

from nomad.master.reconcile import Decision, step
from nomad.master.state import Desired, DesiredPipeline, Observed, PodState, Requested
from nomad.master.views import PlacementView
from nomad.pipeline import Kind, OperatorSpec, PipelineSpec
from nomad.runtime.base import NodeInfo, ObservedPod, PodPhase
from nomad.settings import Backoff, Reconcile

SETTINGS = Reconcile(
    backoff=Backoff(first=1.0, factor=2.0, limit=8.0, healthy=100.0),
    start_timeout=60.0,
    adopt_grace=10.0,
    drain_grace=20.0,
    stop_grace=3.0,
    retry=1.0,
)
OVERDUE = 5.0
NAMES = ("source", "square", "sink")


def wanted(id: str = "p") -> DesiredPipeline:
    """source on edge, square and sink on cloud."""
    spec = PipelineSpec(
        id=id,
        operators=tuple(OperatorSpec(name, Kind.PERIODIC if name == "source" else Kind.FUNCTION) for name in NAMES),
        edges=tuple(zip(NAMES, NAMES[1:], strict=False)),
        start="edge",
        end="cloud",
    )
    nodes = {"source": "edge", "square": "cloud", "sink": "cloud"}
    return DesiredPipeline(
        spec=spec,
        bundle="digest",
        link_key=b"l" * 32,
        created=1.0,
        placement={name: PlacementView(node, "because") for name, node in nodes.items()},
    )


class World:
    """A master's three values and the time; `step` decides and takes the decision over."""

    def __init__(self) -> None:
        self.desired = Desired(pipelines={"p": wanted()})
        self.requested = Requested()
        self.observed = Observed(nodes={name: NodeInfo(name) for name in ("edge", "cloud")})
        self.now = 1000.0
        self.connections = 0

    def decide(self) -> Decision:
        return step(self.desired, self.requested, self.observed, self.now, SETTINGS, overdue=OVERDUE)

    def step(self) -> Decision:
        decision = self.decide()
        self.requested = decision.requested
        return decision

    # What pods do

    def pod(self, name: str) -> str:
        """Id of the operator's present pod."""
        found = self.requested.pipelines["p"].operators[name].pod
        assert found is not None
        return found

    def state(self, name: str) -> PodState:
        return self.observed.pods.setdefault(self.pod(name), PodState())

    def run(self, name: str) -> None:
        pod = self.pod(name)
        self.state(name).runtime = ObservedPod(pod, PodPhase.RUNNING, "edge", 1, pid=1)

    def connect(self, name: str, *, assigned: bool = False) -> None:
        self.connections += 1
        state = self.state(name)
        state.connection, state.assigned = self.connections, assigned

    def ready(self, name: str) -> None:
        state = self.state(name)
        state.assigned, state.pid = True, 1
        state.ready_at = state.ready_at or self.now
        state.heartbeat_at = self.now
        state.address = None if name == "source" else f"unix:/{self.pod(name)}"

    def exit(self, name: str, code: int | None = -9) -> None:
        pod = self.pod(name)
        state = self.state(name)
        state.connection = None
        state.runtime = ObservedPod(pod, PodPhase.EXITED, "edge", 1, pid=1, exit_code=code)

    def fail(self, name: str, code: int) -> None:
        """It says that starting it again wouldn't help, and ends."""
        state = self.state(name)
        state.error, state.fatal = {"type": "ZeroDivisionError", "message": "division by zero"}, True
        self.exit(name, code)

    def store(self) -> None:
        """How the pipeline ended is written down."""
        self.observed.over.add("p")

    def bury(self) -> None:
        """What the loop does after a step."""
        present = {op.pod for p in self.requested.pipelines.values() for op in p.operators.values()}
        for pod in [pod for pod, state in self.observed.pods.items() if state.ended and pod not in present]:
            del self.observed.pods[pod]

    def all_ready(self) -> None:
        """From nothing to a pipeline at work, every step taken."""
        self.step()
        for name in NAMES:
            self.run(name)
            self.connect(name)
        self.step()
        for name in NAMES:
            self.ready(name)
        self.step()
