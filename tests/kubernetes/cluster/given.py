"""A cluster of the user's own: what $KUBECONFIG names. Tests that need no control over nodes run on it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.kubernetes.cluster.envtest import Control
from tests.kubernetes.cluster.processes import ClusterError
from tests.kubernetes.cluster.real import FOLDER


class Given(Control):
    """`folder` is where kubeconfigs of accounts are written. Raises `ClusterError` when the cluster doesn't answer."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        super().__init__(folder)
        self.kubeconfig = kubeconfig
        self.server = self.kubectl("config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}")
        self.kubectl("version")

    def kubeconfig_for(self, service_account: str, namespace: str, *, server: str = "") -> Path:
        token = self.kubectl("create", "token", service_account, "-n", namespace, "--duration", "1h").strip()
        path = self.folder / f"kubeconfig-{namespace}-{service_account}"
        path.touch(0o600)
        path.write_text(self.kubectl("config", "view", "--minify", "--flatten"))
        self.kubectl("config", "set-credentials", "account", f"--token={token}", kubeconfig=path)
        self.kubectl(
            "config", "set-context", "--current", "--user=account", f"--namespace={namespace}", kubeconfig=path
        )
        return path


def kubeconfig() -> Path | None:
    """The user's, unless it is that of the cluster that the tests made themselves."""
    named = os.environ.get("KUBECONFIG", "")
    if not named or Path(named) == FOLDER / "kubeconfig":
        return None
    if not Path(named).is_file():
        raise ClusterError(f"KUBECONFIG names {named}, which isn't a file")
    return Path(named)
