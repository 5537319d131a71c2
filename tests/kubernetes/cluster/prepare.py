"""What `make test-kubernetes` does first: install and build everything, and say which tests can't run here, and why.

`python -m tests.kubernetes.cluster.prepare`. Fails where nothing could be tested.
"""

from __future__ import annotations

import sys

from tests.kubernetes.cluster import binaries, given, images, machine
from tests.kubernetes.cluster.processes import ClusterError


def main() -> None:
    try:
        for name in binaries.PACKAGES:
            binaries.build(name)
        print("API server alone, and with 1,000 faked nodes: everything is here.")
        if kubeconfig := given.kubeconfig():
            print(f"Real cluster: yours, from {kubeconfig}; tests that need control over nodes are skipped.")
        elif reason := machine.unfit():
            print(f"Real cluster: its tests are SKIPPED: {reason}.")
        else:
            machine.prepare()
            images.pause()
            images.warm_up()
            print("Real cluster: everything is here.")
    except (binaries.BuildError, ClusterError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
