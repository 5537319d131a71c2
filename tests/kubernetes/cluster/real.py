"""A real Kubernetes on this machine: a control plane, and the nodes edge, fog and cloud with pods in containers.

`Real(folder).up()` and `.down()`; the folder is the cluster: whoever opens it again has the same cluster, also after
a crash of the one who started it. One cluster at a time fits on a machine (its networks have fixed addresses).
Needs root; `machine.prepare` installs the programs. The functions below `nodes` break things, for tests.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nomad.control import Shape
from tests.kubernetes.cluster import binaries, images, links, machine, network
from tests.kubernetes.cluster.envtest import (
    Control,
    apiserver_command,
    controllers_command,
    scheduler_command,
    start_etcd,
    wait_ready,
    write_accounts,
)
from tests.kubernetes.cluster.network import CONTROL_ADDRESS, Place
from tests.kubernetes.cluster.node import DNS_ADDRESS, DOMAIN, Node
from tests.kubernetes.cluster.pki import Authority
from tests.kubernetes.cluster.processes import ClusterError, Processes, wait_until
from tests.ports import free_port

FOLDER = Path("/tmp/nomad-real")
"""Of the cluster that the command line and the tests bring up."""
OWNER = Path("/run/nomad-test-cluster")
"""Says in which folder the machine's one cluster is."""
NODES = ("edge", "fog", "cloud")
PORT = 6443
TIER = "nomad.dev/tier"
LOST_SECONDS = 16
"""A node that hasn't been heard of for so long is lost."""


class Real(Control):
    def __init__(self, folder: Path = FOLDER) -> None:
        super().__init__(folder)
        self.server = f"https://{CONTROL_ADDRESS}:{PORT}"
        self._processes = Processes(folder / "processes.json", folder / "logs")
        programs = binaries.kubernetes()
        self._programs = programs
        places = [Place(name, number) for number, name in enumerate(NODES, start=1)]
        self.nodes = {place.name: Node(place, folder / place.name, programs, self._processes) for place in places}

    # Bringing it up and taking it down.

    def is_up(self) -> bool:
        return self._processes.running("kube-apiserver") and (self.folder / "up").exists()

    def up(self) -> None:
        """Bring the cluster up unless it is, from whatever is left of an earlier one; 5 seconds on a quiet machine.

        Raises `ClusterError`, also when there is a cluster in another folder.
        """
        machine.prepare()
        with open(OWNER.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.is_up():
                return
            if (owner := self._other_owner()) is not None:
                raise ClusterError(f"there is a cluster in {owner}; only one fits on a machine")
            self.down()
            OWNER.write_text(str(self.folder))
            try:
                self._up()
            except BaseException:
                self.down(keep_logs=True)
                raise

    def down(self, *, keep_logs: bool = False) -> None:
        """End and remove everything of this cluster. Idempotent."""
        self._processes.stop_all(signal.SIGKILL)
        if self._other_owner() is None:
            for node in self.nodes.values():
                node.kill_containers()
                node.remove()
            network.remove_host(self.folder)
            OWNER.unlink(missing_ok=True)
        remove_log_links(self.folder)
        for entry in self.folder.iterdir() if self.folder.exists() else ():
            if entry.is_dir() and not (keep_logs and entry.name == "logs"):
                shutil.rmtree(entry)
            elif entry.is_file() or entry.is_socket():
                entry.unlink()

    def _other_owner(self) -> Path | None:
        """The folder of another cluster that is up on this machine."""
        owner = Path(OWNER.read_text()) if OWNER.exists() else self.folder
        return owner if owner != self.folder and Real(owner).is_up() else None

    def _up(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        network.make_host(self.folder)
        authority = Authority(self.folder / "pki")
        etcd, peer = free_port(), free_port()
        start_etcd(self._processes, self._programs, self.folder, etcd, peer)
        apiserver = apiserver_command(
            self._programs,
            self.folder,
            authority,
            etcd=etcd,
            address=CONTROL_ADDRESS,
            port=PORT,
            names=[CONTROL_ADDRESS],
            extra=["--kubelet-preferred-address-types=InternalIP"],
        )
        (self.folder / "apiserver.json").write_text(json.dumps(apiserver))
        write_accounts(self.folder, authority, self.server)
        self.start_apiserver(wait=False)
        for node in self.nodes.values():
            network.make_node(node.place)
            node.configure(authority, self.server, {TIER: node.name})
        self._wait_ready()
        self._start_controllers()
        self._start_dns()
        for node in self.nodes.values():
            node.start()
        self.load(images.pause(), images.toolbox())
        wait_until(self._all_ready, "three ready nodes", timeout=90)
        (self.folder / "up").touch()

    def _start_controllers(self) -> None:
        lost = [f"--node-monitor-grace-period={LOST_SECONDS}s", "--node-monitor-period=2s"]
        self._processes.start(
            "kube-controller-manager", controllers_command(self._programs, self.folder, ["*"], extra=lost)
        )
        self._processes.start("kube-scheduler", scheduler_command(self._programs, self.folder))

    def _start_dns(self) -> None:
        """CoreDNS on the control plane's address, as the Service kube-dns."""
        corefile = self.folder / "Corefile"
        corefile.write_text(
            f"{DOMAIN}:53 in-addr.arpa:53 {{\n"
            f"  bind {CONTROL_ADDRESS}\n  errors\n  cache 5\n"
            f"  kubernetes {DOMAIN} in-addr.arpa {{\n    kubeconfig {self.kubeconfig}\n    ttl 5\n  }}\n}}\n"
        )
        self._processes.start("coredns", [str(binaries.build("coredns")), "-conf", str(corefile)])
        name = {"name": "kube-dns", "namespace": "kube-system"}
        ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {**name, "labels": {"k8s-app": "kube-dns"}},
                "spec": {"clusterIP": DNS_ADDRESS, "ports": ports},
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {**name, "labels": {"kubernetes.io/service-name": "kube-dns"}},
                "addressType": "IPv4",
                "endpoints": [{"addresses": [CONTROL_ADDRESS], "conditions": {"ready": True}}],
                "ports": ports,
            },
        )

    # Images and pods.

    def load(self, *archives: Path) -> None:
        """Put the images of `docker save` or OCI archives on every node."""
        with ThreadPoolExecutor() as pool:
            for archive in archives:
                list(pool.map(lambda node, archive=archive: node.load(archive), self.nodes.values()))

    def pod(self, namespace: str, name: str) -> dict[str, Any]:
        return dict(self.get("pod", name, "-n", namespace))

    def wait_pod(self, namespace: str, name: str, condition: str = "Ready", timeout: float = 60.0) -> None:
        """Raises `ClusterError`."""
        self.kubectl(
            "wait", f"--for=condition={condition}", f"pod/{name}", "-n", namespace, f"--timeout={timeout:.0f}s"
        )

    def pod_pid(self, namespace: str, name: str, container: str = "") -> int:
        """The host's pid of process 1 of a pod's (first) container. Raises `ClusterError` when it doesn't run."""
        pod = self.pod(namespace, name)
        for status in pod["status"].get("containerStatuses", []):
            if container in ("", status["name"]) and "containerID" in status:
                return self.nodes[pod["spec"]["nodeName"]].container_pid(status["containerID"].partition("://")[2])
        raise ClusterError(f"pod {name} has no running container")

    def kill_pod(self, namespace: str, name: str, container: str = "", number: int = signal.SIGKILL) -> None:
        """Kill a pod's process behind the kubelet's back."""
        os.kill(self.pod_pid(namespace, name, container), number)

    # The control plane.

    def stop_apiserver(self, number: int = signal.SIGKILL) -> None:
        self._processes.stop("kube-apiserver", number=number)

    def start_apiserver(self, *, wait: bool = True) -> None:
        self._processes.start("kube-apiserver", json.loads((self.folder / "apiserver.json").read_text()))
        if wait:
            self._wait_ready()

    def _wait_ready(self) -> None:
        wait_ready(self._processes, self.server, self.folder / "pki")

    def wait_nodes(self, *names: str, ready: bool = True, timeout: float = 90.0) -> None:
        """Until the API says that these nodes (all of them) are ready, or aren't any more."""
        wanted = names or NODES
        state = "ready" if ready else "lost"
        wait_until(lambda: all(self._ready(name) == ready for name in wanted), f"{wanted} to be {state}", timeout)

    def _all_ready(self) -> bool:
        return all(self._ready(name) for name in NODES)

    def _ready(self, name: str) -> bool:
        for node in self.get("nodes")["items"]:
            if node["metadata"]["name"] == name:
                conditions = node["status"].get("conditions", [])
                return any(found["type"] == "Ready" and found["status"] == "True" for found in conditions)
        return False

    # What can happen to nodes.

    def stop_node(self, name: str) -> None:
        """The power fails: kubelet, containerd and all containers are gone at once, and nobody hears of it."""
        self.nodes[name].power_off()

    def start_node(self, name: str, *, wait: bool = True) -> None:
        """The power is back; the kubelet starts the pods that it still has."""
        network.set_uplink(self.nodes[name].place, up=True)
        self.nodes[name].start()
        if wait:
            self.wait_nodes(name)

    def cut_node(self, name: str, *, pods: bool = True) -> None:
        """The node no longer reaches the API server, nor do its pods unless `pods` is False; they go on."""
        network.cut(self.nodes[name].place, pods=pods)

    def unplug_node(self, name: str) -> None:
        """The node reaches nothing outside of itself; its pods go on."""
        network.set_uplink(self.nodes[name].place, up=False)

    def plug_node(self, name: str) -> None:
        network.set_uplink(self.nodes[name].place, up=True)

    def part_nodes(self, one: str, other: str) -> None:
        """The pods of two nodes no longer reach each other."""
        network.part(self.nodes[one].place, self.nodes[other].place)

    def heal(self) -> None:
        """Undo every `cut_node` and `part_nodes`."""
        network.heal()

    def set_nat(self, name: str, on: bool = True) -> None:
        """Put the pods of a node behind NAT: they dial out with the node's address, and nobody can dial them.

        Delays are between pods' own addresses: they don't hold for what a pod behind NAT dials.
        """
        network.set_nat(self.nodes[name].place, on)

    def drain(self, name: str, *options: str, timeout: float = 120.0) -> None:
        """As people do; pods that nobody would start again need `--force` among the options."""
        wanted = ["--ignore-daemonsets", "--delete-emptydir-data", f"--timeout={timeout:.0f}s"]
        self.kubectl("drain", name, *wanted, *options)

    def uncordon(self, name: str) -> None:
        self.kubectl("uncordon", name)

    # Delays.

    def set_delay(self, one: str, other: str, seconds: float, *, both: bool = True) -> None:
        """Packets between the pods of two nodes take so many seconds longer, one way; 0 takes it away again."""
        shape = Shape(latency=seconds) if seconds else None
        self.set_link(one, other, shape)
        if both:
            self.set_link(other, one, shape)

    def set_link(self, source: str, target: str, shape: Shape | None) -> None:
        """How packets from pods of `source` to pods of `target` travel; None for as fast as they can."""
        file = self.folder / "links.json"
        before: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        after = {key: value for key, value in before.items() if key != f"{source} {target}"}
        if shape is not None:
            after[f"{source} {target}"] = asdict(shape)
        pairs = [tuple(key.split()) for key in after]
        subnets = {name: node.place.pods for name, node in self.nodes.items()}
        socket = self.folder / "links.sock"
        if not self._processes.running("links"):
            socket.unlink(missing_ok=True)
            command = [sys.executable, "-m", links.__name__, str(socket), network.TUN]
            self._processes.start("links", command, {"PYTHONPATH": str(machine.TREE)})
            self._processes.wait("links", socket.exists, "until it listens")
            network.make_tun()
        shapes = [[source, target, after[f"{source} {target}"]] for source, target in pairs]
        links.ask(socket, {"subnets": subnets, "shapes": shapes})
        if before.keys() != after.keys():
            network.set_detours([(self.nodes[source].place, self.nodes[target].place) for source, target in pairs])
        file.write_text(json.dumps(after))

    def clear_delays(self) -> None:
        for one in NODES:
            for other in NODES:
                if one != other:
                    self.set_link(one, other, None)


def remove_log_links(folder: Path) -> None:
    """The kubelet's links to pods' logs have a folder that can't be chosen."""
    for link in Path("/var/log/containers").glob("*"):
        if link.is_symlink() and str(folder) in os.readlink(link):
            link.unlink()
