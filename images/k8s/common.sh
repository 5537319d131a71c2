# What init.sh, startup.sh, cleanup.sh and credentials.sh share; they read it, it does nothing by itself.
# shellcheck shell=sh

NAMESPACE=${NAMESPACE:-nomad}
KUBECTL=${KUBECTL:-kubectl}
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
    command -v "$KUBECTL" >/dev/null || fail "$KUBECTL isn't installed: https://kubernetes.io/docs/tasks/tools/"
    problem=$("$KUBECTL" get --raw /readyz --request-timeout=15s 2>&1 >/dev/null) ||
        fail "no cluster answers kubectl (see 'kubectl config current-context', KUBECONFIG): $problem"
}

# kubectl in the namespace.
in_namespace() { "$KUBECTL" --namespace "$NAMESPACE" "$@"; }

exists() { "$KUBECTL" get "$@" >/dev/null 2>&1; }

# A manifest as it was rendered, for this namespace. Only these lines name it; a test sees to that.
manifest() {
    sed -e "s/^\( *namespace: \)nomad\$/\1$NAMESPACE/" \
        -e "s/^  name: nomad\$/  name: $NAMESPACE/" \
        -e "s/^\( *name: \)nomad-\(nodes\|token-review\)\$/\1$NAMESPACE-\2/" "$(dirname "$0")/manifests/$1"
}

# Whether init.sh made the namespace.
ours_is_namespace() { [ -n "$("$KUBECTL" get namespace --selector "$OURS" --field-selector "metadata.name=$NAMESPACE" --output name)" ]; }
