"""Who may send to whom in the cluster's network: what a pipeline's graph says, and nothing else. Pure.

Called by `nomad.runtime.kubernetes`. Where Nomad is installed everything is denied that isn't needed by all
(the master, the cluster's names); each policy here allows something.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from nomad.kubernetes import names
from nomad.runtime.manifests import Json, common, label, object_name, selector

PREFIX = "links-"
"""How the names of a pipeline's policies begin: none of an installation's does, whatever a pipeline is called."""


def network_policies(
    pipeline: str, edges: Sequence[tuple[str, str]], *, owner: Json | None, either_way: bool = False
) -> list[Json]:
    """What the operators of a pipeline may send to each other: what its graph says. One policy for each.

    A receiver is dialled by its senders; with `either_way` also the other way round, as it is where some nodes can
    only dial out. What all operators may, and that they may nothing else, is said at Nomad's installation.
    """
    found = []
    for operator in dict.fromkeys(name for edge in edges for name in edge):
        before = {a for a, b in edges if b == operator}
        behind = {b for a, b in edges if a == operator}
        both = before | behind
        chosen = {**selector(names.OPERATOR), names.PIPELINE_LABEL: label(pipeline)}
        spec = {
            "podSelector": {"matchLabels": {**chosen, names.OPERATOR_LABEL: label(operator)}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": _edges("from", chosen, both if either_way else before),
            "egress": _edges("to", chosen, both if either_way else behind),
        }
        labels = {**common(names.OPERATOR), names.PIPELINE_LABEL: label(pipeline)}
        found.append(_policy(PREFIX + object_name(pipeline, operator), labels, spec, owner))
    return found


def _edges(direction: str, chosen: Mapping[str, str], operators: Iterable[str]) -> list[Json]:
    peers = [
        {"podSelector": {"matchLabels": {**chosen, names.OPERATOR_LABEL: label(operator)}}}
        for operator in sorted(operators)
    ]
    return [{direction: peers, "ports": [{"port": names.DATA_PORT, "protocol": "TCP"}]}] if peers else []


def _policy(name: str, labels: Mapping[str, str], spec: Json, owner: Json | None) -> Json:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "labels": dict(labels), **({"ownerReferences": [owner]} if owner else {})},
        "spec": spec,
    }
