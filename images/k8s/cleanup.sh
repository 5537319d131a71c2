#!/bin/sh
# Removes what init.sh, startup.sh and the master have made, and nothing else: pipelines with their pods, masters, agents,
# services, Secrets, accounts and rights; the namespace, if init.sh made it and nobody else has put anything there; the custom
# resource, if no other namespace has Nomad or pipelines. May be run again.
#
#   images/k8s/cleanup.sh
#
#   NAMESPACE   Default: nomad
#   TIMEOUT     Seconds that pipelines get to end by themselves. Default: 60
#   CONTEXT     the cluster, as a context of kubectl. Default: the current one
set -eu
# shellcheck source=images/k8s/common.sh
. "$(dirname "$0")/common.sh"
arguments "$@"
TIMEOUT=${TIMEOUT:-60}
check

remove() { # kinds, with commas between
    in_namespace delete "$1" --selector "$OURS" --ignore-not-found --wait=false
}

if exists namespace "$NAMESPACE"; then
    release=$(in_namespace get serviceaccounts nomad-master --ignore-not-found \
        --output 'jsonpath={.metadata.annotations.meta\.helm\.sh/release-name}')
    [ -z "$release" ] || fail "Helm installed this: first helm uninstall $release --namespace $NAMESPACE, then this again"
    if exists crd pipelines.nomad.dev && exists pipelines.nomad.dev --namespace "$NAMESPACE"; then
        say "Pipelines: asked to end"
        in_namespace delete pipelines.nomad.dev --all --wait=false
        if ! in_namespace wait --for=delete pipelines.nomad.dev --all --timeout="${TIMEOUT}s" >/dev/null 2>&1; then
            echo "    Not all ended by themselves within $TIMEOUT s; they are ended without the master."
        fi
    fi

    say "Masters, agents and services"
    remove deployments,daemonsets,services,poddisruptionbudgets
    in_namespace wait --for=delete pods --selector "$OURS,app.kubernetes.io/component=master" --timeout=60s >/dev/null 2>&1 ||
        true
    # Nobody is left who would take the finalizers away, or make new pods.
    if exists crd pipelines.nomad.dev; then
        pipelines=$(found pipelines.nomad.dev --namespace "$NAMESPACE") || exit 1
        for pipeline in $pipelines; do
            in_namespace patch "$pipeline" --type=merge --patch '{"metadata":{"finalizers":null}}' || true
        done
    fi

    say "Pods, Secrets, accounts, rights and policies"
    # Nobody will take over from these, so that there is nothing to wait for.
    in_namespace delete pods --selector "$OURS" --ignore-not-found --wait=false --grace-period=2
    remove secrets,configmaps,persistentvolumeclaims,leases.coordination.k8s.io
    remove networkpolicies,rolebindings,roles,serviceaccounts
    in_namespace wait --for=delete pods --selector "$OURS" --timeout=60s >/dev/null 2>&1 || true
fi

# Of Nomad's alone: somebody else's may be called so. (The binding was called as its role, once.)
for name in "$NAMESPACE-nodes" "$NAMESPACE-token-review" "$NAMESPACE-token-reviews"; do
    kube delete clusterrolebindings,clusterroles --selector "$OURS" --field-selector "metadata.name=$name" --ignore-not-found
done

if exists crd pipelines.nomad.dev; then
    # With the custom resource go the pipelines of all namespaces: it stays unless the cluster says that nobody has any.
    pipelines=$(kube get pipelines.nomad.dev --all-namespaces --output 'jsonpath={.items[*].metadata.namespace}') ||
        fail "the cluster doesn't say who else has pipelines"
    roles=$(kube get roles --all-namespaces --selector "$OURS" --output 'jsonpath={.items[*].metadata.namespace}') ||
        fail "the cluster doesn't say who else has Nomad"
    elsewhere=$(echo "$pipelines $roles" | tr ' ' '\n' | sort -u | xargs)
    if [ -z "$elsewhere" ]; then
        kube delete crd pipelines.nomad.dev --ignore-not-found
    else
        echo "    The custom resource stays: Nomad or pipelines are in other namespaces, too ($elsewhere)."
    fi
fi

if exists namespace "$NAMESPACE" && ours_is_namespace; then
    # All kinds of things that somebody can have made there; events come by themselves.
    kinds=$(kube api-resources --namespaced --verbs=list,delete --output name) ||
        fail "the cluster doesn't say what there can be in a namespace"
    kinds=$(echo "$kinds" | grep -v -e '^events' -e '^pipelines.nomad.dev$' | paste -s -d , -)
    others=$(found "$kinds" --namespace "$NAMESPACE" --selector 'app.kubernetes.io/name!=nomad') || exit 1
    others=$(echo "$others" | grep -v -e '^configmap/kube-root-ca.crt$' -e '^serviceaccount/default$' || true)
    if [ -z "$others" ]; then
        say "The namespace $NAMESPACE"
        kube delete namespace "$NAMESPACE" --ignore-not-found
    else
        echo "    The namespace $NAMESPACE stays, for there is something in it that isn't Nomad's:"
        echo "$others" | sed 's/^/        /'
    fi
fi
say "Nomad is gone"
