"""Every setting of the master and the local runtime, with its default and its reason.

`Settings.from_environment` is the one place that reads the environment for them; everything else gets
a group passed in. What a client needs to know (address, token, signing key) lives in `credentials`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from nomad.errors import UsageError

POD_TRANSPORTS = ("unix", "tcp", "zmq+ipc", "zmq+tcp")
"""What local pods can speak to each other."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """How soon what died is started again. Durations in seconds."""

    first: float = 0.2
    """The pause after the first failure: a single crash is hardly seen."""
    factor: float = 2.0
    limit: float = 30.0
    """No pause is longer."""
    healthy: float = 30.0
    """A pod that was ready for this long before it died counts as a first failure again."""

    def delay(self, failures: int) -> float:
        """The pause after `failures` failures in a row (1 or more)."""
        if failures < 1:
            return 0.0
        # 64 doublings are past any limit; the bound keeps the power a finite number.
        return min(self.limit, self.first * self.factor ** min(failures - 1, 64))


@dataclass(frozen=True, slots=True)
class Moving:
    """Deadlines of the states of a move, in seconds; `master.reconcile.migration` says what happens when one passes."""

    plan: float = 30.0
    """How long an order waits for its pipeline to be at work: a restart that is under way takes less."""
    start: float = 120.0
    """For the new instance to be ready, as `Reconcile.start_timeout`. Nothing waits for it meanwhile."""
    connect: float = 10.0
    """For handshakes over the slowest links; a neighbour that is being restarted comes back within it."""
    carry: float = 60.0
    """For what is set aside (256 MiB at the most) to go over the slowest network. Messages flow on meanwhile."""
    hand_over: float = 15.0
    """For two words and their answers. A function that computes on and on doesn't hold them up, but for a last
    operator's: its call under way is waited for. So is what a source has sent, until it is settled."""
    switch: float = 2.0
    """For the neighbours to turn to the new instance; those behind may have to wait for a call that takes longer."""
    count: float = 1.0
    """For both instances to say their numbers, before the old one is ended without them."""
    stop: float = 15.0
    """For the old instance to end and for the pause at the last operator to be seen."""
    settle: float = 1.0
    """The pause is looked for in what arrived until this long after the switch."""
    kept: int = 1_000
    """Past moves that are kept per pipeline."""


@dataclass(frozen=True, slots=True)
class Reconcile:
    """Deadlines of the master's loop, in seconds."""

    backoff: Backoff = field(default_factory=Backoff)
    moving: Moving = field(default_factory=Moving)
    relieve_backoff: Backoff = field(default_factory=lambda: Backoff(first=2.0, limit=60.0))
    """Until the next attempt to take the place of a pod that is to end: half a minute is all that there may be."""
    upgrade_backoff: Backoff = field(default_factory=lambda: Backoff(first=10.0, limit=600.0))
    """The same for a pod that is only out of date, which goes on working."""
    upgrades_at_once: int = 2
    """Pipelines that have an operator replaced because it is out of date: each such move takes a second pod's room."""
    start_attempts: int = 3
    """A node that couldn't start an operator's pod so often in a row isn't tried again if there is another."""
    start_timeout: float = 120.0
    """A pod that hasn't been ready after this long is replaced (large models take long to be loaded)."""
    adopt_grace: float = 10.0
    """How long a restarted master waits for a pod of its predecessor to report before it replaces it."""
    drain_grace: float = 10.0
    """How long a stopped pipeline may take to settle what its source has sent."""
    stop_grace: float = 3.0
    """How long a pod may take to end after that, before it is ended by force."""
    retry: float = 1.0
    """Pause before a call of the runtime that failed is made again."""


@dataclass(frozen=True, slots=True)
class Heartbeats:
    """How often pods are heard, and hear their master, and when either counts as silent. Durations in seconds."""

    most: float = 400.0
    """Heart-beats per second, of all pods together: where there are more than 200 pods, each sends fewer."""
    overdue: float = 5.0
    """An operator is shown as unresponsive after this, or after 2.5 of its heart-beats if that is longer; its process
    isn't ended for it.
    """
    request_timeout: float = 30.0
    """How long a pod may take to answer a request (running set-aside messages again takes its time)."""
    handshake_timeout: float = 5.0
    word: float = 2.0
    """How often the master shows pods and agents that it is at work, unless they are more than 600."""
    words: float = 300.0
    """Words per second, of all connections together: one over TLS takes 25 µs, all of them less than 1 % of a core."""
    silence: float = 10.0
    """Pods and agents that have heard nothing for so long, or for 2.5 times that pause if that is longer, dial again.
    By then another one leads, where there is one (8 s, `master.kube.election.SILENCE`), and waits for them for another
    `Reconcile.adopt_grace`; and a master that a busy machine holds up for a few seconds keeps its connections.
    """
    gather_from: int = 500
    """From so many pods on they come by way of their nodes' agents, where there are any: each connection of its own
    takes 50 KB of the master, most of it TLS's.
    """


@dataclass(frozen=True, slots=True)
class Windows:
    """Credits of each data link: what may be under way and unprocessed. They bound an actor's memory."""

    messages: int = 65_536
    bytes: int = 16 << 20


@dataclass(frozen=True, slots=True)
class Seat:
    """Where the pods of a node run, when that isn't simply this machine: in a network namespace, say."""

    prefix: tuple[str, ...] = ()
    """The command that runs a pod's command; it must become that process (exec) and not stay its parent."""
    host: str = "127.0.0.1"
    """Where pods listen for data links; reached from the seats of all other nodes."""


@dataclass(frozen=True, slots=True)
class Pods:
    """How local pods run."""

    transport: str = "unix"
    """Scheme of data links: one of `POD_TRANSPORTS`."""
    master_timeout: float = 3600.0
    """Seconds that a pod goes on without a master before it stops by itself."""
    log_bytes: int = 1 << 20
    """A pod's log file is rotated at this size; one older file is kept."""
    packages_bytes: int = 4 << 30
    """How much of what operators require is kept installed, beside what is in use."""
    common_folders: bool = True
    """An operator has one folder for all its pods, as all are on one machine; without, each pod has its own, as on a
    cluster of machines that share no disk."""
    keep_ended: int = 3
    """Logs of this many ended pods are kept per operator."""
    outlive_master: bool = False
    """Leave pods running when the master ends normally; the next one adopts them."""
    shaped: bool = True
    """Whether data links are slowed down as the topology declares; not where the network does that by itself."""
    seats: Mapping[str, Seat] = field(default_factory=dict)
    """Per node; nodes without one run pods as processes of this machine. They need the transport tcp."""


@dataclass(frozen=True, slots=True)
class Kubernetes:
    """How a master works on a Kubernetes cluster; what `nomad master` is told."""

    namespace: str = "nomad"
    """Everything of Nomad's is in this one."""
    identity: str = ""
    """The name of the master's own pod."""
    images: Mapping[str, str] = field(default_factory=dict)
    """Python's minor version -> the image of operators whose code was made with it."""
    control: str = "tls://master@nomad-master:30001"
    """Where pods and agents dial the master; the address that is reachable from all nodes."""
    relay: str = ""
    """Where pods dial the relay, as in `control`; needed for links between two nodes that can only dial out. `tls://`
    stands for links that are encrypted from end to end through it."""
    transport: str = "tls"
    """Scheme of data links between pods: tls, or tcp in a network that is trusted."""
    warm: int = 1
    """Operator pods per node that are started and wait for an operator; 0 starts each pod when it is needed."""
    warm_python: str = ""
    """The version whose image they have; "" is the newest of `images`."""
    lease_seconds: float = 13.0
    """A master that hasn't renewed its lease for so long leads no more; one that ended is followed at once."""
    renew_seconds: float = 10.0
    """No more often: an idle master shall ask for hardly anything."""
    node_grace: float = 10.0
    """A node is lost once neither the cluster nor any process on it has been heard for so long, or for 2.5 heart-beats
    of its pods if that is longer.
    """
    tolerations: tuple[Mapping[str, object], ...] = ()
    """Of operator pods, beside those for nodes that don't answer."""
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    """Secrets in the namespace, for registries that ask operator pods who they are."""
    storage_class: str = ""
    """Where operators' folders are kept; "" keeps them in the pod, and what is in them goes with it or is moved."""
    storage_size: str = "1Gi"
    """How large a volume is asked for there, as Kubernetes writes quantities."""


@dataclass(frozen=True, slots=True)
class Rest:
    """Where the REST interface listens."""

    host: str = "127.0.0.1"
    """Loopback unless told: whoever reaches it and holds the token runs code here."""
    port: int = 30_000
    max_body: int = 64 << 20
    """Bytes of a request's body, which bounds a bundle."""


@dataclass(frozen=True, slots=True)
class History:
    """What is kept of the past."""

    events: int = 10_000
    tail_queue: int = 1_000
    tail_bytes: int = 8 << 20
    """Outputs, and their bytes, that wait per reader of a tail; the oldest are dropped and counted."""
    failure_lines: int = 20
    """Last lines of a pod's log that are kept with its failure."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All groups together."""

    state: Path
    """The state folder: database, token, signing key, work folders, logs. One master at a time uses it."""
    rest: Rest = field(default_factory=Rest)
    reconcile: Reconcile = field(default_factory=Reconcile)
    heartbeats: Heartbeats = field(default_factory=Heartbeats)
    windows: Windows = field(default_factory=Windows)
    pods: Pods = field(default_factory=Pods)
    control: str = ""
    """Address where pods dial the master; "" is a unix socket of its own."""
    history: History = field(default_factory=History)
    kubernetes: Kubernetes = field(default_factory=Kubernetes)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None, *, state: Path | None = None) -> Self:
        """Defaults, changed by NOMAD_STATE_DIR, NOMAD_TRANSPORT and NOMAD_MASTER_TIMEOUT; `state` wins over the first.

        Raises `UsageError` that names the variable.
        """
        env = os.environ if environ is None else environ
        pods = Pods()
        if transport := env.get("NOMAD_TRANSPORT"):
            if transport not in POD_TRANSPORTS:
                raise UsageError(f"NOMAD_TRANSPORT must be one of {', '.join(POD_TRANSPORTS)}, not {transport!r}")
            pods = replace(pods, transport=transport)
        if timeout := env.get("NOMAD_MASTER_TIMEOUT"):
            pods = replace(pods, master_timeout=_seconds("NOMAD_MASTER_TIMEOUT", timeout))
        return cls(state=(state or state_dir(env)).absolute(), pods=pods)  # an operator may change its folder


def state_dir(environ: Mapping[str, str] | None = None) -> Path:
    """NOMAD_STATE_DIR, or the user's own state folder."""
    env = os.environ if environ is None else environ
    if chosen := env.get("NOMAD_STATE_DIR"):
        return Path(chosen)
    import platformdirs  # only where it is used: importing nomad stays quick

    return platformdirs.user_state_path("nomad")


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{name} must be a positive number of seconds, not {text!r}")
    return value
