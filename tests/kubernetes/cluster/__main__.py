"""`python -m tests.kubernetes.cluster up|down|status|build|load`: the real cluster from a command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.kubernetes.cluster import images
from tests.kubernetes.cluster.binaries import BuildError
from tests.kubernetes.cluster.processes import ClusterError
from tests.kubernetes.cluster.real import FOLDER, Real


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kubernetes.cluster", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where the cluster is kept (default: {FOLDER})")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="bring a cluster up, or leave the one that is up")
    commands.add_parser("down", help="remove it, and everything that it made")
    commands.add_parser("status", help="whether it is up, and what runs in it")
    commands.add_parser(
        "build", help="build the repository's images and put them on every node; takes what images/build.sh does"
    )
    load = commands.add_parser("load", help="put images on every node")
    load.add_argument("archive", nargs="+", type=Path, help="written by docker save")
    chosen, arguments = parser.parse_known_args()
    if arguments and chosen.command != "build":
        parser.error(f"unrecognized arguments: {' '.join(arguments)}")
    try:
        run(Real(chosen.folder), chosen, arguments)
    except (BuildError, ClusterError) as error:
        sys.exit(str(error))


def run(cluster: Real, chosen: argparse.Namespace, arguments: list[str]) -> None:
    if chosen.command == "up":
        if not cluster.is_up():
            cluster.up()
        print(f"export KUBECONFIG={cluster.kubeconfig}")
    elif chosen.command == "down":
        cluster.down()
    elif not cluster.is_up():
        sys.exit("the cluster isn't up")
    elif chosen.command == "status":
        print(f"export KUBECONFIG={cluster.kubeconfig}")
        print(cluster.kubectl("get", "nodes", "--label-columns=nomad.dev/tier"))
        print(cluster.kubectl("get", "pods", "--all-namespaces", "--output=wide"))
    elif chosen.command == "build":
        cluster.load(images.build(*arguments))
    else:
        cluster.load(*chosen.archive)


if __name__ == "__main__":
    main()
