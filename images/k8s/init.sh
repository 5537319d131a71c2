#!/bin/sh
# Prepares a cluster for Nomad: the namespace (Pod Security "restricted" is enforced), the custom resource
# pipelines.nomad.dev, service accounts, what they may do, and network policies. Needs an administrator's rights, once;
# may be run again. Then comes startup.sh.
#
#   images/k8s/init.sh
#
#   NAMESPACE   Default: nomad. One that isn't Nomad's and exists already keeps its labels.
#   CONTEXT     the cluster, as a context of kubectl. Default: the current one
set -eu
# shellcheck source=images/k8s/common.sh
. "$(dirname "$0")/common.sh"
arguments "$@"
check

if ! exists namespace "$NAMESPACE" || ours_is_namespace; then
    say "The namespace $NAMESPACE"
    manifest 0-namespace.yaml | kube apply --server-side --filename -
else
    echo "    The namespace $NAMESPACE exists and isn't Nomad's own: its labels stay, so Pod Security is what it was."
fi
say "The custom resource, accounts, rights and network policies"
manifest 1-init.yaml | kube apply --server-side --filename -
kube wait --for=condition=Established crd/pipelines.nomad.dev --timeout=60s >/dev/null
say "Done. Now: images/k8s/startup.sh"
