"""One node of the real cluster: containerd, kubelet and kube-proxy in a network namespace of their own.

Everything of a node is in its folder: containerd's root, state and socket, the kubelet's, the pods' logs. They run in
the host's mount namespace, so that the kubelet's mounts are seen by containerd.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

import psutil
import yaml

from tests.kubernetes.cluster import network
from tests.kubernetes.cluster.envtest import write_kubeconfig
from tests.kubernetes.cluster.network import Place
from tests.kubernetes.cluster.pki import Authority
from tests.kubernetes.cluster.processes import ClusterError, Processes, wait_gone, wait_until

CNI_PLUGINS = Path("/usr/lib/cni")
PAUSE = "nomad.dev/pause:1"
DNS_ADDRESS = "10.96.0.10"
DOMAIN = "cluster.local"
CONTAINERD = """
version = 2
root = "{root}"
state = "{state}"
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{root}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  max_concurrent_downloads = 1
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{cni}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
        Root = "{state}/runc"
"""


class Node:
    def __init__(self, place: Place, folder: Path, programs: Path, processes: Processes) -> None:
        self.place = place
        self.name = place.name
        self._folder = folder
        self._programs = programs
        self._processes = processes
        self._root, self._state = folder / "containerd", folder / "run"
        self.socket = self._state / "containerd.sock"

    @property
    def processes(self) -> list[str]:
        return [f"{part}-{self.name}" for part in ("containerd", "kubelet", "kube-proxy")]

    def configure(self, authority: Authority, server: str, labels: dict[str, str]) -> None:
        """Write what the three programs read."""
        self._folder.mkdir(parents=True)
        certificate, key = authority.issue(f"kubelet-{self.name}", f"system:node:{self.name}", ["system:nodes"])
        user = {"client-certificate": str(certificate), "client-key": str(key)}
        write_kubeconfig(self._folder / "kubeconfig", server, authority.certificate, user)
        self._write("containerd.toml", self._containerd())
        (self._folder / "cni").mkdir()
        self._write("cni/10-nomad.conflist", json.dumps(self._cni()))
        self._write("kubelet.yaml", yaml.safe_dump(self._kubelet(authority)))
        self._write("kube-proxy.yaml", yaml.safe_dump(self._proxy()))
        self._write("labels", ",".join(f"{key}={value}" for key, value in labels.items()))

    def start(self) -> None:
        """Start what doesn't run; returns when containerd answers."""
        inside = ["nsenter", f"--net=/run/netns/{self.place.namespace}", "--"]
        containerd, kubelet, proxy = self.processes
        self._state.mkdir(parents=True, exist_ok=True)
        if not self._processes.running(containerd):
            self._processes.start(
                containerd, [*inside, "containerd", "--config", str(self._folder / "containerd.toml")]
            )
        self._processes.wait(containerd, lambda: self._ctr_works(), "until containerd answers")
        if not self._processes.running(kubelet):
            make_cgroups(f"nomad-{self.name}")
            command = [
                str(self._programs / "kubelet"),
                f"--config={self._folder / 'kubelet.yaml'}",
                f"--kubeconfig={self._folder / 'kubeconfig'}",
                f"--root-dir={self._folder / 'kubelet'}",
                f"--cert-dir={self._folder / 'kubelet' / 'pki'}",
                f"--hostname-override={self.name}",
                f"--node-ip={self.place.address}",
                f"--node-labels={(self._folder / 'labels').read_text()}",
            ]
            self._processes.start(kubelet, [*inside, *command])
        if not self._processes.running(proxy):
            command = [str(self._programs / "kube-proxy"), f"--config={self._folder / 'kube-proxy.yaml'}"]
            self._processes.start(proxy, [*inside, *command])

    def load(self, archive: Path) -> None:
        """Images of a `docker save` or an OCI archive."""
        self.ctr("images", "import", "--no-unpack=false", str(archive))
        rows = [line.split() for line in self.ctr("images", "list").splitlines()[1:]]
        named = {digest for name, _, digest, *_ in rows if not name.startswith("sha256:")}
        replaced = [name for name, _, digest, *_ in rows if digest not in named]
        if replaced:  # what has no name any more is only in the way; containers that run keep what they need
            self.ctr("images", "remove", *replaced)

    def images(self) -> list[str]:
        return self.ctr("images", "list", "--quiet").split()

    def ctr(self, *arguments: str) -> str:
        command = ["ctr", "--address", str(self.socket), "--namespace", "k8s.io", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise ClusterError(f"ctr {' '.join(arguments)} on {self.name}: {done.stderr.strip()}")
        return done.stdout

    def container_pid(self, container: str) -> int:
        """The process 1 of the container with this id. Raises `ClusterError` when it doesn't run."""
        path = self._state / "io.containerd.runtime.v2.task" / "k8s.io" / container / "init.pid"
        try:
            return int(path.read_text())
        except FileNotFoundError:
            raise ClusterError(f"container {container} doesn't run on {self.name}") from None

    def power_off(self) -> None:
        """End everything at once, as a pulled plug does: nobody is told, no connection is closed."""
        network.set_uplink(self.place, up=False)
        self._processes.stop(*self.processes, number=signal.SIGKILL)
        self.kill_containers()

    def kill_containers(self) -> None:
        """Kill all containers with their shims, and what is left of them outside of the disk."""
        victims = []
        for shim in self._shims():
            victims += [*shim.children(recursive=True), shim]
        for process in victims:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        wait_gone(victims, timeout=10)
        unmount_below(self._folder)
        for part in (self._state, self._folder / "addresses", self._folder / "kubelet" / "pods"):
            remove(part)

    def remove(self) -> None:
        """The folder goes; nothing of the node may run."""
        unmount_below(self._folder)
        remove_cgroups(f"nomad-{self.name}")
        remove(self._folder)

    def _shims(self) -> Iterable[psutil.Process]:
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if command and "containerd-shim" in command[0] and str(self.socket) in command:
                yield process

    def _ctr_works(self) -> bool:
        try:
            self.ctr("version")
        except ClusterError:
            return False
        return True

    def _write(self, name: str, content: str) -> None:
        (self._folder / name).write_text(content)

    def _containerd(self) -> str:
        return CONTAINERD.format(
            root=self._root,
            state=self._state,
            socket=self.socket,
            pause=PAUSE,
            plugins=CNI_PLUGINS,
            cni=self._folder / "cni",
        )

    def _cni(self) -> object:
        """Each pod has a point-to-point link to its node: everything is routed, so that Services work in every case."""
        addresses = {
            "type": "host-local",
            "ranges": [[{"subnet": self.place.pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(self._folder / "addresses"),
        }
        plugins = [{"type": "ptp", "ipMasq": False, "ipam": addresses}]
        return {"cniVersion": "1.0.0", "name": "nomad", "plugins": plugins}

    def _kubelet(self, authority: Authority) -> object:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.place.address,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(authority.certificate)},
            },
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "podLogsDir": str(self._folder / "logs"),
            "clusterDNS": [DNS_ADDRESS],
            "clusterDomain": DOMAIN,
            "resolvConf": "",
            "cgroupDriver": "cgroupfs",
            # Without cgroups of their own, a kubelet that is to resize a running pod crashes.
            "cgroupsPerQOS": True,
            "cgroupRoot": f"/nomad-{self.name}",
            "enforceNodeAllocatable": [],
            "failCgroupV1": False,
            "failSwapOn": False,
            "evictionHard": {},
            "imageGCHighThresholdPercent": 100,
            "oomScoreAdj": 0,
            "makeIPTablesUtilChains": False,
            # A lost node is noticed in a quarter of a minute instead of one.
            "nodeStatusUpdateFrequency": "4s",
            "nodeLeaseDurationSeconds": 15,
        }

    def _proxy(self) -> object:
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": str(self._folder.parent / "kubeconfig-proxy")},
            "mode": "iptables",
            "hostnameOverride": self.name,
            "bindAddress": self.place.address,
            "clusterCIDR": network.POD_RANGE,
            "detectLocalMode": "ClusterCIDR",
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            "iptables": {"minSyncPeriod": "0.2s"},
        }


def unmount_below(folder: Path) -> None:
    """Everything mounted in `folder`, the innermost first."""
    inside = [
        mount for line in Path("/proc/mounts").read_text().splitlines() if _is_below(mount := line.split()[1], folder)
    ]
    for mount in reversed(inside):
        subprocess.run(["umount", "--lazy", mount], capture_output=True, check=False)


def remove(folder: Path) -> None:
    """Remove what may still be in use for a moment."""

    def gone() -> bool:
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()

    wait_until(gone, f"{folder} to go")


def make_cgroups(name: str) -> None:
    """A cgroup for all pods of a node, in every hierarchy."""
    for folder in cgroups(name):
        folder.mkdir(exist_ok=True)
        for setting in ("cpuset.cpus", "cpuset.mems"):  # a cpuset of cgroups v1 has none until it is told
            if folder.parent.name == "cpuset":
                (folder / setting).write_text((folder.parent / setting).read_text())


def remove_cgroups(name: str) -> None:
    """Take it away, with all below; nothing of the node may run."""

    def gone() -> bool:
        for folder in cgroups(name):
            for path, _, _ in os.walk(folder, topdown=False):
                try:
                    os.rmdir(path)
                except OSError:
                    return False  # the last process in it isn't quite gone
        return True

    wait_until(gone, f"the cgroups of {name} to go")


def cgroups(name: str) -> list[Path]:
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        return [root / name]
    return [folder / name for folder in root.iterdir() if (folder / "tasks").exists()]


def _is_below(path: str, folder: Path) -> bool:
    return os.path.commonpath([path, str(folder)]) == str(folder)
