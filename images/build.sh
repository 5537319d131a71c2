#!/bin/sh
# Builds the images: nomad-master, and nomad-operator for each version of Python that pipelines are written with.
#
#   images/build.sh [--python 3.11,3.12,3.13] [--extras examples] [--tag dev] [--repository example.com/me/]
#                   [--push] [--platform linux/amd64,linux/arm64] [--network host] [--only master|operator]
#
#   --python      versions of Python, with commas between; the first one is the master's own. Default: 3.11
#   --extras      extras of Nomad that operators import, e.g. examples (OpenCV, dlib and the face-recognition models)
#   --tag         Default: dev. Images are nomad-master:TAG and nomad-operator:TAG-pyVERSION
#   --repository  what stands before the names, with its slash at the end
#   --push        push them, too
#   --platform    for other architectures than this machine's; needs docker buildx, and --push when there are several
#   --network     the network that the build uses, as docker build takes it
#   --only        one of the two roles
#
# DOCKER names another program (podman). BASE names another base image, by digest if you like (then for one Python).
# PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and PIP_TRUSTED_HOST are used while building and aren't kept in the images.
set -eu
cd "$(dirname "$0")/.."

fail() { echo "build.sh: $1" >&2; exit "${2:-2}"; }

pythons=3.11 extras='' tag=dev repository='' push='' platform='' network='' only=''
docker=${DOCKER:-docker}
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set -eu/{/^#/s/^# \{0,1\}//p;}' images/build.sh; exit 0 ;;
        --push) push=yes; shift; continue ;;
        --python | --extras | --tag | --repository | --platform | --network | --only) ;;
        *) fail "unknown argument $1 (try --help)" ;;
    esac
    [ $# -ge 2 ] || fail "$1 needs a value"
    case $1 in
        --python) pythons=$2 ;;
        --extras) extras=$2 ;;
        --tag) tag=$2 ;;
        --repository) repository=$2 ;;
        --platform) platform=$2 ;;
        --network) network=$2 ;;
        --only) only=$2 ;;
    esac
    shift 2
done
case $only in '' | master | operator) ;; *) fail "--only is master or operator, not $only" ;; esac
command -v "$docker" >/dev/null || fail "$docker isn't installed" 1
"$docker" version >/dev/null 2>&1 || fail "$docker doesn't answer: is its daemon running, and may you use it?" 1

# buildx where there is one: it builds for other architectures. Plain `docker build` does for this machine's own.
if "$docker" buildx version >/dev/null 2>&1; then
    buildx=yes
else
    buildx=''
    export DOCKER_BUILDKIT=0
    [ -z "$platform" ] || fail "--platform needs docker buildx" 1
fi

build() { # role, python, image
    set -- "$1" "$2" "$3" --file "images/Dockerfile.$1" --build-arg "PYTHON=$2" --tag "$3"
    role=$1 python=$2 image=$3
    shift 3
    [ "$role" = master ] || [ -z "$extras" ] || set -- "$@" --build-arg "EXTRAS=$extras"
    [ -z "${BASE:-}" ] || set -- "$@" --build-arg "BASE=$BASE"
    for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_TRUSTED_HOST; do
        # Without a value docker takes it from the environment: it is in no list of processes.
        if printenv "$name" >/dev/null; then set -- "$@" --build-arg "$name"; fi
    done
    [ -z "$network" ] || set -- "$@" --network "$network"
    [ -z "$platform" ] || set -- "$@" --platform "$platform"
    echo "==> $image (Python $python)"
    if [ -n "$buildx" ]; then
        if [ -n "$push" ]; then
            "$docker" buildx build --push "$@" .
        else
            case $platform in
                *,*) "$docker" buildx build "$@" . ;; # several architectures fit no local image store: a trial build
                *) "$docker" buildx build --load "$@" . ;;
            esac
        fi
    else
        "$docker" build "$@" .
        [ -z "$push" ] || "$docker" push "$image"
    fi
}

[ "$only" = operator ] || build master "${pythons%%,*}" "${repository}nomad-master:$tag"
[ "$only" = master ] || for python in $(echo "$pythons" | tr , ' '); do
    build operator "$python" "${repository}nomad-operator:$tag-py$python"
done
