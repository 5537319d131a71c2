#!/bin/sh
# Renders the plain manifests from the chart with its default values: images/k8s/manifests/. Run it after every change of the
# chart; a test compares. Needs helm (HELM names another program).
#
#   images/k8s/render.sh [FOLDER]
set -eu
cd "$(dirname "$0")"

case "${1:-}" in
    -h | --help) sed -n '2,/^set -eu/{/^#/s/^# \{0,1\}//p;}' render.sh; exit 0 ;;
    -*) echo "render.sh: unknown argument $1 (try --help)" >&2; exit 2 ;;
esac
folder=${1:-manifests} helm=${HELM:-helm}
command -v "$helm" >/dev/null || { echo "render.sh: $helm isn't installed: https://helm.sh/docs/intro/install/" >&2; exit 1; }

render() { # templates
    for name; do
        set -- "$@" --show-only "templates/$name.yaml"
        shift
    done
    "$helm" template nomad chart --namespace nomad --kube-version 1.30.0 --set namespace.create=true "$@"
}
head() { echo "# $1 Rendered from images/k8s/chart by images/k8s/render.sh; don't edit."; }

# What an administrator of the cluster makes once; then what runs.
{
    head "The namespace."
    render namespace
} > "$folder/0-namespace.yaml"
{
    head "The custom resource, accounts and what they may do, network policies."
    render accounts rbac networkpolicies
    echo ---
    cat crd.yaml
} > "$folder/1-init.yaml"
{
    head "Masters, agents and services."
    render master services agent
} > "$folder/2-nomad.yaml"
