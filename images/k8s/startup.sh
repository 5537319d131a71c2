#!/bin/sh
# Starts Nomad in a namespace that init.sh has prepared: two masters, an agent on each node, and the services. Waits until a
# master leads and says how to reach it. Run it again to change images: nothing that flows is lost.
#
#   IMAGE=example.com/me/nomad-master:1 OPERATOR_IMAGES=3.11=example.com/me/nomad-operator:1-py3.11 images/k8s/startup.sh
#
#   IMAGE             the master's image. Default: nomad-master:dev, as images/build.sh names it
#   OPERATOR_IMAGES   Python version=image of operators, with commas between; agents run in the last one.
#                     Default: 3.11=nomad-operator:dev-py3.11
#   PULL_SECRETS      Secrets in the namespace for registries that ask who you are, with commas between; for all pods,
#                     operators' too. Default: none
#   WARM              started operator pods per node that wait for an operator; 0 is none. Default: 1
#   NAMESPACE         Default: nomad
#   NODE_PORT         of the REST interface on every node. Default: 30000
#   TIMEOUT           Seconds that it waits for a master to lead. Default: 180
#   CONTEXT           the cluster, as a context of kubectl. Default: the current one
#
# What else can be set is in the Helm chart, images/k8s/chart.
set -eu
# shellcheck source=images/k8s/common.sh
. "$(dirname "$0")/common.sh"
arguments "$@"
IMAGE=${IMAGE:-nomad-master:dev}
OPERATOR_IMAGES=${OPERATOR_IMAGES:-3.11=nomad-operator:dev-py3.11}
PULL_SECRETS=${PULL_SECRETS:-}
WARM=${WARM:-1}
NODE_PORT=${NODE_PORT:-30000}
TIMEOUT=${TIMEOUT:-180}
for pair in $(echo "$OPERATOR_IMAGES" | tr , ' '); do
    case $pair in
        3.[0-9]*=?*) ;;
        *) fail "OPERATOR_IMAGES is like 3.11=IMAGE,3.12=IMAGE, not $OPERATOR_IMAGES" ;;
    esac
done
case $WARM in
    *[!0-9]*) fail "WARM is a number of pods, not $WARM" ;;
esac
case $PULL_SECRETS in
    *[!a-z0-9.,-]*) fail "PULL_SECRETS is like registry,other, not $PULL_SECRETS" ;;
esac
check
if ! exists crd pipelines.nomad.dev || ! exists serviceaccount nomad-master --namespace "$NAMESPACE"; then
    fail "the namespace $NAMESPACE isn't prepared: run images/k8s/init.sh first (with the same NAMESPACE)"
fi

# What was asked for in place of the chart's own: one line --images per version, the last one's image for agents;
# Secrets for registries in the pods here, and as arguments for those that the master makes.
changed() {
    awk -v master="$IMAGE" -v operators="$OPERATOR_IMAGES" -v port="$NODE_PORT" -v pull="$PULL_SECRETS" -v warm="$WARM" '
        function secrets(start) { for (i = 1; i <= pulled; i++) print indent start secret[i] }
        BEGIN { count = split(operators, pair, ","); agent = pair[count]; sub(/^[^=]*=/, "", agent) }
        BEGIN { pulled = split(pull, secret, ",") }
        { indent = $0; sub(/[^ ].*/, "", indent) }
        /^ *image: nomad-master:/ { sub(/image: .*/, "image: " master) }
        /^ *image: nomad-operator:/ { sub(/image: .*/, "image: " agent) }
        { sub(/nodePort: [0-9]+/, "nodePort: " port) }
        /^ *- --warm=/ { sub(/--warm=.*/, "--warm=" warm) }
        /^ *- --images=/ {
            for (i = 1; i <= count; i++) print indent "- --images=" pair[i]
            next
        }
        { print }
        /^ *- --pull-policy=/ { secrets("- --pull-secret=") }
        /^ *serviceAccountName:/ && pulled { print indent "imagePullSecrets:"; secrets("  - name: ") }'
}

# Images that no node could be given yet, one line for each: the kubelets go on trying, so it is a warning.
unpulled() {
    in_namespace get pods --selector "$OURS" --output 'go-template={{range .items}}{{range .status.containerStatuses}}{{if
        .state.waiting}}{{.state.waiting.reason}} {{.image}}{{"\n"}}{{end}}{{end}}{{end}}' |
        sed -n -E 's/^(ErrImage[A-Za-z]*|ImagePullBackOff|InvalidImageName) //p' | sort -u
}
warned=''
warn() {
    for image in $(unpulled); do
        case ",$IMAGE,$OPERATOR_IMAGES," in *[,=]"$image",*) ;; *) continue ;; esac # of an earlier try
        case " $warned " in *" $image "*) continue ;; esac
        warned="$warned $image"
        echo "startup.sh: nodes can't get the image $image: is IMAGE or OPERATOR_IMAGES right, is it where they pull from," \
            "and do PULL_SECRETS let them? See: $HOW --namespace $NAMESPACE describe pods --selector $OURS" >&2
    done
}

say "Masters, agents and services in the namespace $NAMESPACE"
manifest 2-nomad.yaml | changed | kube apply --server-side --filename -

say "Waiting until a master leads"
end=$(($(date +%s) + TIMEOUT))
until [ -n "$(in_namespace get endpointslices --selector kubernetes.io/service-name=nomad-master \
    --output 'go-template={{range .items}}{{range .endpoints}}{{if .conditions.ready}}{{.addresses}}{{end}}{{end}}{{end}}')" ]; do
    if [ "$(date +%s)" -ge "$end" ]; then
        in_namespace get pods --selector "$OURS,app.kubernetes.io/component=master" >&2 || true
        in_namespace get events --field-selector type=Warning --sort-by .lastTimestamp 2>/dev/null | tail -n 5 >&2 || true
        fail "no master leads after $TIMEOUT s. See: $HOW --namespace $NAMESPACE logs deployment/nomad-master"
    fi
    warn
    sleep 1
done
in_namespace rollout status deployment/nomad-master --timeout "${TIMEOUT}s"
warn

port=$(in_namespace get service nomad-rest --output 'jsonpath={.spec.ports[0].nodePort}')
node=$(kube get nodes --output 'jsonpath={.items[0].status.addresses[?(@.type=="InternalIP")].address}')
cat <<END
==> Nomad runs.

    Its REST interface is port $port of every node, for instance:
        export NOMAD_MASTER=http://$node:$port
    From where nodes can't be reached, in another terminal (then NOMAD_MASTER isn't needed):
        $HOW --namespace $NAMESPACE port-forward service/nomad-master 30000

    The token and the key that signs your code are in the Secret nomad-master. To your credentials file:
        nomad login --kubernetes --namespace $NAMESPACE${CONTEXT:+ --context $CONTEXT} --url http://$node:$port
    or without --url for the port-forward. Or for this shell alone:
        eval "\$(NAMESPACE=$NAMESPACE${CONTEXT:+ CONTEXT=$CONTEXT} images/k8s/credentials.sh)"
    Then:
        nomad nodes
END
