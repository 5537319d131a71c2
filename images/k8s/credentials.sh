#!/bin/sh
# Prints what lets this shell's `nomad` and programs work with the master in the cluster, read from the master's Secret:
#
#   eval "$(images/k8s/credentials.sh)"
#
#   NAMESPACE   Default: nomad
#   CONTEXT     the cluster, as a context of kubectl. Default: the current one
#
# Who may read that Secret may run code in the namespace. Nothing is written to a file.
set -eu
# shellcheck source=images/k8s/common.sh
. "$(dirname "$0")/common.sh"
arguments "$@"
check

value() { # key of the Secret
    in_namespace get secret nomad-master --output "go-template={{index .data \"$1\" | base64decode}}"
}
in_namespace get secret nomad-master >/dev/null 2>&1 ||
    fail "the Secret nomad-master isn't in the namespace $NAMESPACE (or you may not read it): has images/k8s/startup.sh run?"
echo "export NOMAD_TOKEN=$(value token)"
echo "export NOMAD_SIGNING_KEY=$(value signing_key)"
