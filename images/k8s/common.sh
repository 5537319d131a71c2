# What init.sh, startup.sh, cleanup.sh and credentials.sh share; they read it, it does nothing by itself.
# shellcheck shell=sh

NAMESPACE=${NAMESPACE:-nomad}
CONTEXT=${CONTEXT:-}
HOW="kubectl${CONTEXT:+ --context $CONTEXT}"
OURS=app.kubernetes.io/name=nomad

say() { echo "==> $*"; }
fail() { echo "$(basename "$0"): $*" >&2; exit 1; }
usage() { sed -n '2,/^set -eu/{/^#/s/^# \{0,1\}//p;}' "$0"; }

# --help, and nothing else but what the caller takes.
arguments() {
    case "${1:-}" in
        '') ;;
        -h | --help) usage; exit 0 ;;
        *) echo "$(basename "$0"): unknown argument $1 (try --help)" >&2; exit 2 ;;
    esac
}

# A cluster that answers, and a namespace that can be one.
check() {
    case $NAMESPACE in
        *[!a-z0-9-]* | -* | *- | kube-*) fail "NAMESPACE=$NAMESPACE isn't a name for a namespace of yours" ;;
    esac
    command -v kubectl >/dev/null || fail "kubectl isn't installed: https://kubernetes.io/docs/tasks/tools/"
    problem=$(kube get --raw /readyz --request-timeout=15s 2>&1 >/dev/null) ||
        fail "no cluster answers $HOW (see 'kubectl config get-contexts', and KUBECONFIG): $problem"
}

kube() { command kubectl ${CONTEXT:+--context "$CONTEXT"} "$@"; }

# kubectl in the namespace.
in_namespace() { kube --namespace "$NAMESPACE" "$@"; }

# What is there of it, or nothing; a cluster that doesn't say ends the script.
found() { kube get "$@" --ignore-not-found --output name || fail "the cluster doesn't say whether there is $*"; }

exists() { # kind, name
    there=$(found "$@") || exit 1
    [ -n "$there" ]
}

# A manifest as it was rendered, for this namespace. Only these lines name it; a test sees to that.
manifest() {
    sed -e "s/^\( *namespace: \)nomad\$/\1$NAMESPACE/" \
        -e "s/^  name: nomad\$/  name: $NAMESPACE/" \
        -e "s/^\( *name: \)nomad-nodes\$/\1$NAMESPACE-nodes/" "$(dirname "$0")/manifests/$1"
}

# Whether init.sh made the namespace.
ours_is_namespace() { exists namespace --selector "$OURS" --field-selector "metadata.name=$NAMESPACE"; }
