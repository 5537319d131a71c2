"""Kubernetes' API without nodes: etcd, kube-apiserver and the controllers that tidy up, on loopback, in a few seconds.

Namespaces end, owner references cascade and service accounts get made, for those controllers run; nothing schedules
or starts pods. The API server can be killed and brought back at the same address. Everything that anyone asks of it
is in an audit log, which `Envtest.requests` reads.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from tests.kubernetes.cluster import binaries
from tests.kubernetes.cluster.pki import Authority, signing_key
from tests.kubernetes.cluster.processes import ClusterError, Processes
from tests.ports import free_port

CONTROLLERS = (
    "namespace-controller",
    "garbage-collector-controller",
    "serviceaccount-controller",
    "serviceaccount-token-controller",
    "root-ca-certificate-publisher-controller",
)
SERVICE_RANGE = "10.96.0.0/16"
ADMIN_GROUP = "system:masters"

# Kubernetes' own parts and the tests' administrator aren't what an audit is about.
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "None", "nonResourceURLs": ["/readyz*", "/livez*", "/healthz*"]},
        {"level": "None", "users": ["system:apiserver", "system:kube-controller-manager", "system:kube-scheduler"]},
        {"level": "None", "userGroups": ["system:nodes"]},
        {"level": "Metadata"},
    ],
}


@dataclass(frozen=True)
class Request:
    """One request in the audit log, once it was answered; a watch is there when it begins and again when it ends."""

    user: str
    """"system:serviceaccount:<namespace>:<name>", or the administrator's "admin"."""
    verb: str
    """As in a Role: get, list, watch, create, update, patch, delete, deletecollection; for other paths the method."""
    resource: str
    """With the subresource, as in a Role: "pods", "pods/log"; "" for a path that is none."""
    group: str
    namespace: str
    name: str
    path: str
    code: int
    """The HTTP status."""
    stage: str
    """"ResponseStarted" (of a watch) or "ResponseComplete"."""
    time: str


class Control:
    """What every test cluster has: an API server, accounts, kubectl and the audit log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kubeconfig = folder / "kubeconfig"
        """The administrator's."""
        self.audit_log = folder / "audit.log"
        self.server = ""
        """The API server's URL."""

    def kubectl(self, *arguments: str, input: str | None = None, kubeconfig: Path | None = None) -> str:
        """What kubectl prints. Raises `ClusterError` with what it says when it fails."""
        command = [
            str(binaries.kubernetes() / "kubectl"),
            "--kubeconfig",
            str(kubeconfig or self.kubeconfig),
            *arguments,
        ]
        done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise ClusterError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def get(self, *arguments: str) -> Any:
        """What `kubectl get ... -o json` gives."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *objects: dict[str, Any]) -> None:
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=yaml.safe_dump_all(objects))

    def create_namespace(self, name: str, labels: dict[str, str] | None = None) -> None:
        """A namespace in which pods can be made: it has its service account `default`. That takes a minute at times:
        where the API server was away, controllers don't ask it again at once.
        """
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels or {}}})
        self.kubectl("wait", "--for=create", "serviceaccount/default", "-n", name, "--timeout=100s")

    def kubeconfig_for(self, service_account: str, namespace: str, *, server: str = "") -> Path:
        """A kubeconfig with a token of that (existing) service account, from the TokenRequest API."""
        token = self.kubectl("create", "token", service_account, "-n", namespace, "--duration", "24h").strip()
        path = self.folder / f"kubeconfig-{namespace}-{service_account}"
        write_kubeconfig(path, server or self.server, self.folder / "pki" / "ca.crt", {"token": token}, namespace)
        return path

    def requests(self, since: int = 0, user: str = "") -> list[Request]:
        """What was asked of the API server from byte `since` of the audit log on, by `user` if one is named."""
        return [request for request in self._audit(since) if not user or request.user == user]

    def audit_size(self) -> int:
        """Where the audit log ends now: the `since` for what comes."""
        return self.audit_log.stat().st_size if self.audit_log.exists() else 0

    def _audit(self, since: int) -> Iterator[Request]:
        if not self.audit_log.exists():
            return
        with self.audit_log.open("rb") as log:
            log.seek(since)
            for line in log:
                if not line.endswith(b"\n"):
                    return
                entry = json.loads(line)
                target = entry.get("objectRef", {})
                parts = (target.get("resource", ""), target.get("subresource", ""))
                yield Request(
                    user=entry["user"].get("username", ""),
                    verb=entry["verb"],
                    resource="/".join(part for part in parts if part),
                    group=target.get("apiGroup", ""),
                    namespace=target.get("namespace", ""),
                    name=target.get("name", ""),
                    path=entry["requestURI"],
                    code=entry.get("responseStatus", {}).get("code", 0),
                    stage=entry["stage"],
                    time=entry["requestReceivedTimestamp"],
                )


class Envtest(Control):
    """Use it with `with` or `async with`; `folder` is emptied when it starts and keeps the logs when it ends."""

    apiserver_options: tuple[str, ...] = ("--endpoint-reconciler-type=none",)

    def __init__(self, folder: Path, *, controllers: Sequence[str] = CONTROLLERS) -> None:
        super().__init__(folder)
        self._controllers = controllers
        self._processes = Processes(folder / "processes.json", folder / "logs")
        self._apiserver: list[str] = []

    def __enter__(self) -> Self:
        self._processes.stop_all(signal.SIGKILL)  # of a run that was killed
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self._start()
        except BaseException:
            self._processes.stop_all(signal.SIGKILL)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.stop_all(signal.SIGKILL)

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.__exit__)

    def stop_apiserver(self, number: int = signal.SIGKILL) -> None:
        """Kill the API server (or send it another signal) and wait for its end; etcd keeps everything."""
        self._processes.stop("kube-apiserver", number=number)

    def start_apiserver(self) -> None:
        """Start it again at the same address; returns when it is ready."""
        self._processes.start("kube-apiserver", self._apiserver)
        self._wait_ready()

    def pause_apiserver(self) -> None:
        """Let it accept connections and answer nothing."""
        self._processes.send("kube-apiserver", signal.SIGSTOP)

    def resume_apiserver(self) -> None:
        self._processes.send("kube-apiserver", signal.SIGCONT)

    def _start(self) -> None:
        programs = binaries.kubernetes()
        authority = Authority(self.folder / "pki")
        port, etcd, peer = free_port(), free_port(), free_port()
        self.server = f"https://127.0.0.1:{port}"
        start_etcd(self._processes, programs, self.folder, etcd, peer)
        self._apiserver = apiserver_command(
            programs,
            self.folder,
            authority,
            etcd=etcd,
            address="127.0.0.1",
            port=port,
            extra=self.apiserver_options,
        )
        self._processes.start("kube-apiserver", self._apiserver)
        write_accounts(self.folder, authority, self.server)
        self._wait_ready()
        if self._controllers:
            self._processes.start(
                "kube-controller-manager", controllers_command(programs, self.folder, self._controllers)
            )

    def _wait_ready(self) -> None:
        wait_ready(self._processes, self.server, self.folder / "pki")


def start_etcd(processes: Processes, programs: Path, folder: Path, port: int, peer: int) -> None:
    processes.start(
        "etcd",
        [
            str(programs / "etcd"),
            f"--data-dir={folder / 'etcd'}",
            "--unsafe-no-fsync",
            "--log-level=warn",
            f"--listen-client-urls=http://127.0.0.1:{port}",
            f"--advertise-client-urls=http://127.0.0.1:{port}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=default=http://127.0.0.1:{peer}",
        ],
    )


def apiserver_command(
    programs: Path,
    folder: Path,
    authority: Authority,
    *,
    etcd: int,
    address: str,
    port: int,
    names: Sequence[str] = (),
    extra: Sequence[str] = (),
) -> list[str]:
    """How kube-apiserver is started; its certificate is good for loopback, the first service IP and `names`."""
    pki = folder / "pki"
    known = ["127.0.0.1", "10.96.0.1", "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
    authority.issue("apiserver", "kube-apiserver", addresses=[*known, *names])
    authority.issue("apiserver-kubelet", "kube-apiserver-kubelet", [ADMIN_GROUP])
    signing = signing_key(pki / "service-accounts.key")
    policy = folder / "audit-policy.yaml"
    policy.write_text(yaml.safe_dump(AUDIT_POLICY))
    return [
        str(programs / "kube-apiserver"),
        f"--etcd-servers=http://127.0.0.1:{etcd}",
        f"--bind-address={address}",
        f"--secure-port={port}",
        f"--tls-cert-file={pki / 'apiserver.crt'}",
        f"--tls-private-key-file={pki / 'apiserver.key'}",
        f"--client-ca-file={pki / 'ca.crt'}",
        f"--kubelet-client-certificate={pki / 'apiserver-kubelet.crt'}",
        f"--kubelet-client-key={pki / 'apiserver-kubelet.key'}",
        f"--service-account-key-file={signing}",
        f"--service-account-signing-key-file={signing}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged",
        f"--audit-policy-file={policy}",
        f"--audit-log-path={folder / 'audit.log'}",
        "--audit-log-mode=blocking",
        "--audit-log-maxsize=4000",
        "--profiling=false",
        "--shutdown-delay-duration=0s",
        *extra,
    ]


def controllers_command(
    programs: Path, folder: Path, controllers: Sequence[str], extra: Sequence[str] = ()
) -> list[str]:
    pki = folder / "pki"
    return [
        str(programs / "kube-controller-manager"),
        f"--kubeconfig={folder / 'kubeconfig-controllers'}",
        "--use-service-account-credentials=false",
        f"--controllers={','.join(controllers)}",
        f"--service-account-private-key-file={pki / 'service-accounts.key'}",
        f"--root-ca-file={pki / 'ca.crt'}",
        "--leader-elect=false",
        "--secure-port=0",
        "--kube-api-qps=200",
        "--kube-api-burst=400",
        *extra,
    ]


def scheduler_command(programs: Path, folder: Path) -> list[str]:
    return [
        str(programs / "kube-scheduler"),
        f"--kubeconfig={folder / 'kubeconfig-scheduler'}",
        "--leader-elect=false",
        "--secure-port=0",
    ]


def write_accounts(folder: Path, authority: Authority, server: str) -> None:
    """Kubeconfigs of the administrator and of Kubernetes' own parts, by certificates."""
    for file, user, groups in (
        ("kubeconfig", "admin", [ADMIN_GROUP]),
        ("kubeconfig-controllers", "system:kube-controller-manager", [ADMIN_GROUP]),
        ("kubeconfig-scheduler", "system:kube-scheduler", []),
        ("kubeconfig-proxy", "system:kube-proxy", []),
    ):
        certificate, key = authority.issue(file, user, groups)
        write_kubeconfig(
            folder / file,
            server,
            authority.certificate,
            {"client-certificate": str(certificate), "client-key": str(key)},
        )


def write_kubeconfig(path: Path, server: str, ca: Path, user: dict[str, str], namespace: str = "default") -> None:
    cluster = {"server": server, "certificate-authority": str(ca)}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "nomad-test", "cluster": cluster}],
        "users": [{"name": "user", "user": user}],
        "contexts": [
            {"name": "nomad-test", "context": {"cluster": "nomad-test", "user": "user", "namespace": namespace}}
        ],
        "current-context": "nomad-test",
    }
    path.touch(0o600)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def wait_ready(processes: Processes, server: str, pki: Path) -> None:
    """Until the API server says that it is ready, RBAC's own roles included."""
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    context.load_cert_chain(pki / "kubeconfig.crt", pki / "kubeconfig.key")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))

    def ready() -> bool:
        try:
            with opener.open(f"{server}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    processes.wait("kube-apiserver", ready, "until it is ready", timeout=90)
