"""What things are called in a Kubernetes cluster: labels, annotations, objects, ports, folders. Plain constants.

Everything that makes or looks for an object of Nomad's uses these, the Helm chart too (a test compares).
"""

from __future__ import annotations

GROUP = "nomad.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "Pipeline"
PLURAL = "pipelines"
FINALIZER = f"{GROUP}/pods"
"""On every Pipeline: it goes once nothing of it runs any more."""

FIELD_MANAGER = "nomad-master"
"""Who owns the fields that the master applies."""

# Labels, for selectors and for people.
MANAGED_BY = "app.kubernetes.io/managed-by"
COMPONENT = "app.kubernetes.io/component"
APP = "app.kubernetes.io/name"
NOMAD = "nomad"
"""The value of `APP` and of `MANAGED_BY` on everything of Nomad's."""
MASTER, OPERATOR, AGENT, RELAY = "master", "operator", "agent", "relay"
"""Values of `COMPONENT`."""
PIPELINE_LABEL = f"{GROUP}/pipeline"
OPERATOR_LABEL = f"{GROUP}/operator"
EPOCH_LABEL = f"{GROUP}/epoch"
NODE_LABEL = f"{GROUP}/node"
"""Nomad's name of the node that a pod was made for."""
STATE_LABEL = f"{GROUP}/state"
"""Of an operator pod: one of `WARM` and `TAKEN`."""
WARM, TAKEN = "warm", "taken"
LEADER_LABEL = f"{GROUP}/leader"
""""true" on the pod of the master that leads: what the Service selects."""
NODE_NAME_LABEL = f"{GROUP}/name"
"""On a node of the cluster: what Nomad's users call it, when that isn't its own name."""
TIER_LABEL = f"{GROUP}/tier"
"""On a node: edge, fog or cloud; its value counts as a label of the node for `requires`."""
REACHABLE_LABEL = f"{GROUP}/reachable"
""""false" on a node whose pods can only dial out."""
BUNDLE_LABEL = f"{GROUP}/bundle"
"""On the Secrets that hold a bundle: the first 63 hex digits of its hash."""

# Annotations.
POD_ANNOTATION = f"{GROUP}/pod"
"""Nomad's id of a pod: `<pipeline>.<operator>-e<epoch>`."""
UNUSED_ANNOTATION = f"{GROUP}/unused-since"
"""On a bundle that no pipeline has: since when, RFC 3339."""
STANDBYS_ANNOTATION = f"{GROUP}/standbys"
"""On the Lease: which masters miss its holder sooner than when it runs out."""

# Objects in the namespace.
MASTER_NAME = "nomad-master"
"""The master's Deployment, Service, service account, Role, Lease, and the Secret with its keys."""
AGENT_NAME = "nomad-agent"
RELAY_NAME = "nomad-relay"
CA_SECRET = "nomad-ca"
"""The CA's key and certificates; only masters read it."""
MASTER_TLS_SECRET = "nomad-master-tls"
POD_TLS_SECRET = "nomad-pod-tls"
"""Certificate of all operator pods and agents, and the CA's certificates."""
META_CONFIGMAP = "nomad-state"
"""Small facts that outlive masters, and the last events."""

# Ports.
REST_PORT = 30_000
CONTROL_PORT = 30_001
"""Where pods and agents dial the master."""
DATA_PORT = 30_010
"""Where an operator pod accepts data links."""
READY_PORT = 30_011
"""An operator pod accepts connections here once its actor can take messages: what the readiness probe looks at."""
AGENT_PORT = 30_020
"""Where an agent answers other agents' probes, and hands out environments on its node."""
RELAY_PORT = 30_030

# Folders in containers.
BOOT_FOLDER = "/run/nomad/boot"
"""In an operator pod: the file `boot` of its own Secret."""
TLS_FOLDER = "/run/nomad/tls"
"""`tls.crt`, `tls.key` and `ca.crt`."""
WORK_FOLDER = "/var/lib/nomad"
"""An operator's own folder."""
