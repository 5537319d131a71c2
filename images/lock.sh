#!/bin/sh
# Writes images/constraints.txt anew: one exact version of every package that an image may have, for each version of
# Python and each architecture (differences stand in markers). Run it when setup.cfg has changed, or to get newer versions:
#
#   images/lock.sh              keeps the versions that still fit
#   images/lock.sh --upgrade    takes the newest of all
#
# Needs uv (https://docs.astral.sh/uv/): pip install uv.
set -eu
cd "$(dirname "$0")/.."

case "${1:-}" in
    -h | --help) sed -n 's/^# \{0,1\}//p' "$0" | tail -n +2; exit 0 ;;
    "" | --upgrade) ;;
    *) echo "lock.sh: unknown argument $1 (try --help)" >&2; exit 2 ;;
esac
command -v uv >/dev/null || { echo "lock.sh: uv isn't installed: pip install uv" >&2; exit 1; }

{
    echo "# The versions that images are built with. Written by images/lock.sh; don't edit."
    [ "${1:-}" = --upgrade ] || cat images/constraints.txt 2>/dev/null || true
} > images/constraints.new
trap 'rm -f images/constraints.new' EXIT
uv pip compile --quiet --universal --python-version 3.11 --extra bench --extra examples --extra scheduler \
    --no-annotate --no-header --output-file images/constraints.new setup.cfg > /dev/null
{
    echo "# The versions that images are built with. Written by images/lock.sh; don't edit."
    grep -v '^#' images/constraints.new
} > images/constraints.txt
