"""What is kept of a pod that the cluster's API shows, and what that means for the master. Pure.

Called by `nomad.runtime.kubernetes` for every pod that arrives, of which there may be thousands: everything
that isn't needed is dropped here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nomad.kubernetes import names
from nomad.runtime.base import ObservedPod, PodPhase, reason_of
from nomad.runtime.manifests import CONTAINER, PYTHON_ANNOTATION

Json = dict[str, Any]

_ID = re.compile(r"[^.]+\..+-e[0-9]+")
"""`<pipeline>.<operator>-e<epoch>`."""

HOPELESS = frozenset({"ErrImageNeverPull", "InvalidImageName"})
"""Why a container doesn't start, where waiting changes nothing."""

STUCK = HOPELESS | {
    "ContainerStatusUnknown",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImagePull",
    "ImageInspectError",
    "ImagePullBackOff",
    "RegistryUnavailable",
    "RunContainerError",
}
"""Why a container hasn't started, where something has failed that may still come right."""


@dataclass(frozen=True, slots=True)
class KubePod:
    """One of Nomad's operator pods."""

    name: str
    uid: str
    node: str
    """Nomad's name of its node, as a label's value."""
    host: str
    """The cluster's name of the node that it was put on; "" before that."""
    warm: bool
    """It waits for an operator."""
    pod: str
    """Nomad's id; "" for a warm one."""
    phase: PodPhase
    image: str
    python: str | None
    """The version that its image was chosen for, None for one that its operator asks for itself."""
    deleting: bool
    exit_code: int | None
    reason: str
    """Why it doesn't run yet, or how it ended; "" when there is nothing to say."""
    stuck: bool
    """Something has failed that keeps it from starting, for now."""
    hopeless: bool
    """And that will stay so."""

    @property
    def alive(self) -> bool:
        """It runs, or is about to, and nobody has ended it."""
        return self.phase is not PodPhase.EXITED and not self.deleting

    @property
    def pipeline(self) -> str:
        return self.pod.partition(".")[0]

    @property
    def operator(self) -> str:
        return self.pod.partition(".")[2].rpartition("-e")[0]

    @property
    def epoch(self) -> int:
        """0 for a warm one."""
        return int(self.pod.rpartition("-e")[2] or 0)

    def observed(self, node: str, *, leaving: bool, outdated: bool) -> ObservedPod:
        """What the master is told, with Nomad's own name of the node."""
        return ObservedPod(
            id=self.pod,
            phase=self.phase,
            node=node,
            epoch=self.epoch,
            exit_code=self.exit_code,
            reason=self.reason,
            leaving=leaving,
            outdated=outdated,
        )


def take(item: Json) -> KubePod:
    """A pod as the API shows it. Raises `ValueError` for one that says it is what no pod of Nomad's can be."""
    metadata, spec, status = item["metadata"], item.get("spec", {}), item.get("status", {})
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    container: Json = next((found for found in status.get("containerStatuses") or () if found["name"] == CONTAINER), {})
    pod = annotations.get(names.POD_ANNOTATION, "")
    if pod and not _ID.fullmatch(pod):
        raise ValueError(f"{pod!r} isn't Nomad's id of a pod")
    phase, code, reason = _phase(status, container)
    waiting = (container.get("state") or {}).get("waiting") or {}
    stuck = False
    if phase is PodPhase.STARTING:
        reason, stuck = _obstacle(status, waiting)
    containers: list[Json] = spec.get("containers") or [{}]
    return KubePod(
        name=metadata["name"],
        uid=metadata["uid"],
        node=labels.get(names.NODE_LABEL, ""),
        host=spec.get("nodeName", ""),
        warm=labels.get(names.STATE_LABEL) == names.WARM,
        pod=pod,
        phase=phase,
        image=containers[0].get("image", ""),
        python=annotations.get(PYTHON_ANNOTATION),
        deleting="deletionTimestamp" in metadata,
        exit_code=code,
        reason=reason,
        stuck=stuck,
        hopeless=waiting.get("reason") in HOPELESS,
    )


def _phase(status: Json, container: Json) -> tuple[PodPhase, int | None, str]:
    state = container.get("state") or {}
    ended = state.get("terminated")
    if ended is not None:
        code = _exit_code(ended)
        return PodPhase.EXITED, code, _how(code, ended.get("reason", ""), status)
    if status.get("phase") in ("Failed", "Succeeded"):  # its node, not its container, says so: evicted, for one
        said = ": ".join(text for text in (status.get("reason"), status.get("message")) if text)
        return PodPhase.EXITED, None, said or reason_of(None)
    return (PodPhase.RUNNING if "running" in state else PodPhase.STARTING), None, ""


def _exit_code(ended: Json) -> int:
    """Negative: the signal that it was killed by."""
    code = int(ended.get("exitCode", 0))
    if ended.get("signal"):
        return -int(ended["signal"])
    return 128 - code if 128 < code < 128 + 65 else code


def _how(code: int, reason: str, status: Json) -> str:
    if reason == "OOMKilled":
        return "was killed because it used more memory than it may (OOMKilled)"
    text = reason_of(code)
    if status.get("reason"):  # the node ended it, and says why
        return f"{text}: " + ": ".join(part for part in (status["reason"], status.get("message")) if part)
    return text


def _obstacle(status: Json, waiting: Json) -> tuple[str, bool]:
    """What keeps a pod from starting, in the cluster's own words, and whether that is a failure."""
    if waiting.get("reason") in STUCK:
        return _sentence(waiting), True
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return _sentence(condition), condition.get("reason") in ("Unschedulable", "SchedulerError")
    return "", False


def _sentence(said: Json) -> str:
    reason, message = said.get("reason", ""), said.get("message", "")
    return f"{reason}: {message}" if message else str(reason)
