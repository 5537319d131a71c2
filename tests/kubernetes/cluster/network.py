"""The network of the real cluster: a namespace per node, joined by the host's routing, and what tests do to it.

    host   bridge nmk-cp 10.88.0.1 (API server, DNS);  nmk-<node> 10.88.<n>.1
    node   namespace nmk-<node>: uplink 10.88.<n>.2, pods 10.244.<n>.0/24

Everything has the prefix `nmk-` and can be removed by that, whatever state it is in. Nothing is forwarded to networks
that aren't the cluster's. Where a delay is set between two nodes, packets between their pods take the way through the
TUN device of `links`.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.kubernetes.cluster.processes import ClusterError

PREFIX = "nmk-"
CONTROL = f"{PREFIX}cp"
TUN = f"{PREFIX}tun"
CHAIN = "NOMAD-TESTS"
CONTROL_ADDRESS = "10.88.0.1"
POD_RANGE = "10.244.0.0/16"
TABLE = 8844
"""The routing table of delayed packets, and the preference of the rules that lead to it."""


@dataclass(frozen=True)
class Place:
    """Where a node is in the network."""

    name: str
    number: int

    @property
    def namespace(self) -> str:
        return f"{PREFIX}{self.name}"

    @property
    def outside(self) -> str:
        """The host's end of the node's uplink."""
        return f"{PREFIX}{self.name}"

    @property
    def gateway(self) -> str:
        return f"10.88.{self.number}.1"

    @property
    def address(self) -> str:
        return f"10.88.{self.number}.2"

    @property
    def pods(self) -> str:
        return f"10.244.{self.number}.0/24"


def run(command: str, *, check: bool = True) -> str:
    """What a command prints. Raises `ClusterError`."""
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise ClusterError(f"`{command}`: {done.stderr.strip()}")
    return done.stdout


def succeeds(command: str) -> bool:
    return subprocess.run(shlex.split(command), capture_output=True, check=False).returncode == 0


def make_host(folder: Path) -> None:
    """The control plane's address, forwarding and its limits. What was set before is noted in `folder`."""
    forward = Path("/proc/sys/net/ipv4/ip_forward")
    (folder / "host.json").write_text(json.dumps({"ip_forward": forward.read_text().strip()}))
    forward.write_text("1")
    run(f"ip link add {CONTROL} type bridge")
    run(f"ip address add {CONTROL_ADDRESS}/24 dev {CONTROL}")
    run(f"ip link set {CONTROL} up")
    run(f"iptables -w -N {CHAIN}")
    run(f"iptables -w -N {CHAIN}-CUT")
    for built_in in ("INPUT", "OUTPUT", "FORWARD"):
        run(f"iptables -w -I {built_in} 1 -j {CHAIN}-CUT")
    run(f"iptables -w -I FORWARD 2 -j {CHAIN}")
    run(f"iptables -w -A {CHAIN} -i {PREFIX}+ -o {PREFIX}+ -j ACCEPT")
    run(f"iptables -w -A {CHAIN} -i {PREFIX}+ -j REJECT")
    run(f"iptables -w -A {CHAIN} -o {PREFIX}+ -j REJECT")


def remove_host(folder: Path) -> None:
    """Everything of `make_host`, delays and namespaces included. Idempotent."""
    for built_in in ("INPUT", "OUTPUT", "FORWARD"):
        for chain in (f"{CHAIN}-CUT", CHAIN):
            while succeeds(f"iptables -w -D {built_in} -j {chain}"):
                pass
    for chain in (f"{CHAIN}-CUT", CHAIN):
        run(f"iptables -w -F {chain}", check=False)
        run(f"iptables -w -X {chain}", check=False)
    while succeeds(f"ip rule delete pref {TABLE}"):
        pass
    run(f"ip route flush table {TABLE}", check=False)
    for line in run("ip netns list").splitlines():
        if line.startswith(PREFIX):
            run(f"ip netns delete {line.split()[0]}")
    for link in json.loads(run("ip -json link show") or "[]"):
        if link["ifname"].startswith(PREFIX):
            run(f"ip link delete {link['ifname']}", check=False)
    note = folder / "host.json"
    if note.exists():
        Path("/proc/sys/net/ipv4/ip_forward").write_text(json.loads(note.read_text())["ip_forward"])
        note.unlink()


def make_node(place: Place) -> None:
    inside = f"ip -n {place.namespace}"
    run(f"ip netns add {place.namespace}")
    run(f"ip link add {place.outside} type veth peer name uplink netns {place.namespace}")
    run(f"ip address add {place.gateway}/24 dev {place.outside}")
    run(f"ip link set {place.outside} up")
    run(f"{inside} link set lo up")
    run(f"{inside} address add {place.address}/24 dev uplink")
    run(f"{inside} link set uplink up")
    run(f"{inside} route add default via {place.gateway}")
    run(f"ip netns exec {place.namespace} sysctl -q -w net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0")
    run(f"ip route add {place.pods} via {place.address}")


def set_uplink(place: Place, up: bool) -> None:
    """Pull the node's cable, or plug it in again."""
    run(f"ip link set {place.outside} {'up' if up else 'down'}")
    if up:
        run(f"ip route replace {place.pods} via {place.address}")


def cut(place: Place, *, pods: bool) -> None:
    """Nothing passes between the control plane and the node any more, nor (`pods`) its pods."""
    for address in [place.address, *([place.pods] if pods else [])]:
        for control in (CONTROL_ADDRESS, place.gateway):
            run(f"iptables -w -A {CHAIN}-CUT -s {address} -d {control} -j DROP")
            run(f"iptables -w -A {CHAIN}-CUT -s {control} -d {address} -j DROP")


def part(one: Place, other: Place) -> None:
    """Nothing passes between the pods of two nodes any more."""
    run(f"iptables -w -A {CHAIN}-CUT -s {one.pods} -d {other.pods} -j DROP")
    run(f"iptables -w -A {CHAIN}-CUT -s {other.pods} -d {one.pods} -j DROP")


def heal() -> None:
    """Undo every `cut` and `part`."""
    run(f"iptables -w -F {CHAIN}-CUT")


def set_nat(place: Place, on: bool) -> None:
    """The node's pods can only dial out, with the node's address; or again be reached as any other."""
    inside = f"ip netns exec {place.namespace} iptables -w"
    rules = (
        f"-t nat {{}} POSTROUTING -s {place.pods} -o uplink -j MASQUERADE",
        f"{{}} FORWARD -i uplink -d {place.pods} -m conntrack --ctstate NEW -j DROP",
    )
    for rule in rules:
        present = succeeds(f"{inside} {rule.format('-C')}")
        if on != present:
            run(f"{inside} {rule.format('-I' if on else '-D')}")


def make_tun() -> None:
    """The device of `links`, which has opened it."""
    run(f"ip link set {TUN} mtu 1500 txqueuelen 2000 addrgenmode none up")
    run(f"sysctl -q -w net.ipv4.conf.{TUN}.rp_filter=0")
    run(f"ip route replace default dev {TUN} table {TABLE}")


def set_detours(pairs: Iterable[tuple[Place, Place]]) -> None:
    """Packets between the pods of exactly these nodes (source, target) take the way through the TUN device."""
    while succeeds(f"ip rule delete pref {TABLE}"):
        pass
    for source, target in pairs:
        run(f"ip rule add pref {TABLE} iif {source.outside} from {source.pods} to {target.pods} lookup {TABLE}")
