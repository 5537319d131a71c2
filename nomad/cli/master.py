"""`nomad master`: the master of a Kubernetes cluster, until it is told to end; `nomad login`: its credentials.

What `nomad master` can be told has an option and a variable each; the manifests in images/k8s use both. It logs to
standard output. Its pods outlive it: another master goes on with them.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nomad.cli.common import Out, json_option
from nomad.credentials import DEFAULT_MASTER
from nomad.master import cycles
from nomad.settings import Heartbeats, Kubernetes

if TYPE_CHECKING:
    from nomad.settings import Settings

LEVELS = ("debug", "info", "warning", "error")

OBJECT_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")

LAST_SECONDS = 1.0
"""How long a master that leads no more may take to end by itself; its lease lasts so much longer than it led."""

LOGIN_SECONDS = 3.0
"""How long a login waits for what is at the address to say whether it takes the token."""

log = logging.getLogger(__name__)

kubeconfig_option = click.option(
    "--kubeconfig",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="How to reach the cluster.  [default: this pod's service account, else KUBECONFIG or ~/.kube/config]",
)
context_option = click.option("--context", metavar="NAME", help="A context of that file.")
namespace_option = click.option(
    "--namespace", envvar="NOMAD_NAMESPACE", default="nomad", show_default=True, help="Where Nomad is."
)


class Image(click.ParamType[tuple[str, str]]):
    """A Python version with the image for it."""

    name = "VERSION=IMAGE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Both."""
        if isinstance(value, tuple):
            return value
        version, _, image = str(value).partition("=")
        major, _, minor = version.partition(".")
        if not (major.isdigit() and minor.isdigit() and image):
            self.fail(f"{value!r} isn't like 3.11=nomad-operator:dev-py3.11", param, ctx)
        return version, image


class Toleration(click.ParamType[Mapping[str, object]]):
    """A toleration, as it stands in a pod."""

    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Mapping[str, object]:
        """The map."""
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            found = None
        if not isinstance(found, dict):
            self.fail(f"{value!r} is no JSON object", param, ctx)
        return found


class Size(click.ParamType[str]):
    """A size as Kubernetes writes it."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As it is."""
        from nomad.runtime.kubenodes import quantity

        try:
            size = quantity(str(value))
            good = size.is_finite() and size > 0
        except (ArithmeticError, ValueError, KeyError):
            good = False
        if not good:
            self.fail(f"{value!r} isn't like 1Gi or 500Mi", param, ctx)
        return str(value)


class ObjectName(click.ParamType[str]):
    """What an object of a cluster may be called."""

    name = "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As it is."""
        if len(str(value)) > 253 or not OBJECT_NAME.fullmatch(str(value)):
            self.fail(f"{value!r} is no name of a Secret: small letters, digits, - and .", param, ctx)
        return str(value)


@click.command(short_help="Run the master of a Kubernetes cluster.")
@namespace_option
@click.option("--identity", envvar="NOMAD_POD_NAME", default="", metavar="POD", help="The pod that this runs in.")
@click.option(
    "--images",
    envvar="NOMAD_IMAGES",
    type=Image(),
    multiple=True,
    help="The image of operators that were written with that Python version; can be repeated.",
)
@click.option(
    "--control",
    envvar="NOMAD_CONTROL",
    metavar="ADDRESS",
    default="tls://master@nomad-master:30001",
    show_default=True,
    help="Where pods and agents on all nodes reach the master; master@ wants to see that this is one.",
)
@click.option(
    "--control-listen",
    envvar="NOMAD_CONTROL_LISTEN",
    metavar="ADDRESS",
    help="Where it listens for them.  [default: the port of --control, at all addresses]",
)
@click.option(
    "--relay",
    envvar="NOMAD_RELAY",
    metavar="ADDRESS",
    default="",
    help="Where pods on all nodes reach the relay, for links between nodes that can both only dial out; "
    "tls://HOST:PORT is encrypted from end to end.",
)
@click.option("--host", envvar="NOMAD_HOST", default="0.0.0.0", show_default=True, help="Where REST listens.")
@click.option("--port", envvar="NOMAD_PORT", type=click.IntRange(0, 65535), default=30_000, show_default=True)
@click.option(
    "--transport",
    envvar="NOMAD_TRANSPORT",
    type=click.Choice(["tls", "tcp"]),
    default="tls",
    show_default=True,
    help="How operators talk to each other.",
)
@click.option(
    "--warm",
    envvar="NOMAD_WARM",
    type=click.IntRange(0, 100),
    default=1,
    show_default=True,
    help="Operator pods per node that are started and wait.",
)
@click.option(
    "--warm-python", envvar="NOMAD_WARM_PYTHON", default="", metavar="VERSION", help="Whose image those have."
)
@click.option(
    "--lease-seconds", envvar="NOMAD_LEASE_SECONDS", type=click.FloatRange(3, 3600), default=13.0, show_default=True
)
@click.option(
    "--renew-seconds", envvar="NOMAD_RENEW_SECONDS", type=click.FloatRange(0.5, 3600), default=10.0, show_default=True
)
@click.option(
    "--node-grace",
    envvar="NOMAD_NODE_GRACE",
    type=click.FloatRange(1, 3600),
    default=10.0,
    show_default=True,
    help="Seconds that nothing was heard of a node until it is lost; 2.5 heart-beats of its pods where that is longer.",
)
@click.option(
    "--master-timeout",
    envvar="NOMAD_MASTER_TIMEOUT",
    type=click.FloatRange(1),
    default=3600.0,
    show_default=True,
    help="Seconds that pods go on without any master.",
)
@click.option(
    "--gather-from",
    envvar="NOMAD_GATHER_FROM",
    type=click.IntRange(1),
    default=Heartbeats().gather_from,
    show_default=True,
    metavar="PODS",
    help="From so many pods on they come by way of their nodes' agents, to spare the master's memory.",
)
@click.option(
    "--toleration", envvar="NOMAD_TOLERATION", type=Toleration(), multiple=True, help="Of operator pods; repeatable."
)
@click.option(
    "--pull-policy",
    envvar="NOMAD_PULL_POLICY",
    type=click.Choice(["IfNotPresent", "Always", "Never"]),
    default="IfNotPresent",
    show_default=True,
)
@click.option(
    "--pull-secret",
    envvar="NOMAD_PULL_SECRET",
    type=ObjectName(),
    multiple=True,
    metavar="SECRET",
    help="For a registry that asks operator pods who they are; can be repeated.",
)
@click.option(
    "--storage-class",
    envvar="NOMAD_STORAGE_CLASS",
    default="",
    metavar="NAME",
    help="Where operators' folders are kept; without one, in their pods.",
)
@click.option(
    "--storage-size",
    envvar="NOMAD_STORAGE_SIZE",
    type=Size(),
    default=Kubernetes().storage_size,
    show_default=True,
    metavar="SIZE",
    help="How large a volume each folder has there.",
)
@click.option(
    "--token-review/--no-token-review",
    envvar="NOMAD_TOKEN_REVIEW",
    help="Let users in by Kubernetes' own tokens, too: those of --allow-user and --allow-group.",
)
@click.option("--allow-user", envvar="NOMAD_ALLOW_USER", metavar="NAME", multiple=True)
@click.option("--allow-group", envvar="NOMAD_ALLOW_GROUP", metavar="NAME", multiple=True)
@click.option("--log-level", envvar="NOMAD_LOG_LEVEL", type=click.Choice(LEVELS), default="info", show_default=True)
@kubeconfig_option
@context_option
@click.option("--json", "as_json", is_flag=True, help="Log in JSON, one object a line.")
def master(
    namespace: str,
    identity: str,
    images: tuple[tuple[str, str], ...],
    control: str,
    control_listen: str | None,
    relay: str,
    host: str,
    port: int,
    transport: str,
    warm: int,
    warm_python: str,
    lease_seconds: float,
    renew_seconds: float,
    node_grace: float,
    master_timeout: float,
    gather_from: int,
    toleration: tuple[Mapping[str, object], ...],
    pull_policy: str,
    pull_secret: tuple[str, ...],
    storage_class: str,
    storage_size: str,
    token_review: bool,
    allow_user: tuple[str, ...],
    allow_group: tuple[str, ...],
    log_level: str,
    kubeconfig: str | None,
    context: str | None,
    as_json: bool,
) -> None:
    """Run the master of the Kubernetes cluster that this is in, or that --kubeconfig says, until SIGTERM.

    Several may run: one leads, the others wait to take over. images/k8s has the manifests that start it.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # the first process of a container has no default
    if renew_seconds >= lease_seconds - 1:
        raise click.UsageError("--renew-seconds must be more than a second less than --lease-seconds")
    if warm and not images:
        raise click.UsageError("pods that wait need an image: --images 3.11=IMAGE, or --warm 0")
    if warm and warm_python and warm_python not in dict(images):
        there = ", ".join(version for version, _ in images)
        raise click.UsageError(f"--warm-python {warm_python} has no image; --images names those for {there}")
    if token_review and not (allow_user or allow_group):
        raise click.UsageError("--token-review lets nobody in without --allow-user or --allow-group")
    from nomad.actor.threads import new_loop
    from nomad.master.kube.incluster import listens
    from nomad.settings import Pods, Rest, Settings

    output = logging.StreamHandler(sys.stdout)
    output.setFormatter(
        _JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=log_level.upper(), handlers=[output])
    settings = Settings(
        state=Path(os.devnull),  # nothing is kept on disk
        rest=Rest(host=host, port=port),
        pods=Pods(master_timeout=master_timeout),
        heartbeats=Heartbeats(gather_from=gather_from),
        control=control_listen or listens(control),
        kubernetes=Kubernetes(
            namespace=namespace,
            identity=identity,
            images=dict(images),
            control=control,
            relay=relay,
            transport=transport,
            warm=warm,
            warm_python=warm_python,
            lease_seconds=lease_seconds,
            renew_seconds=renew_seconds,
            node_grace=node_grace,
            tolerations=toleration,
            pull_policy=pull_policy,
            pull_secrets=pull_secret,
            storage_class=storage_class,
            storage_size=storage_size,
        ),
    )
    allowed = (allow_user, allow_group) if token_review else None
    gc.set_threshold(cycles.COLLECT_AFTER, *gc.get_threshold()[1:])
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_run(settings, kubeconfig, context, allowed))


async def _run(
    settings: Settings,
    kubeconfig: str | None,
    context: str | None,
    allowed: tuple[tuple[str, ...], tuple[str, ...]] | None,
) -> None:
    from nomad.clock import SystemClock
    from nomad.kubernetes.api import Api
    from nomad.kubernetes.reviews import TokenReviews
    from nomad.master.kube.incluster import serve_in_cluster
    from nomad.tasks import alongside

    over, loop = asyncio.Event(), asyncio.get_running_loop()
    serving = asyncio.current_task()
    assert serving is not None

    def end() -> None:
        if not over.is_set():
            over.set()
            if not leads.is_set():
                serving.cancel()

    leads = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    try:
        # What proves that this one leads never waits behind what it has to write.
        async with Api.open(kubeconfig, context) as api, Api.open(kubeconfig, context) as lease_api:
            reviews: Callable[[str], Awaitable[bool]] | None = None
            if allowed is not None:
                reviews = TokenReviews(api, *allowed, SystemClock())
            log.info("namespace %s of %s; waiting to lead", settings.kubernetes.namespace, api.server)
            leading = serve_in_cluster(settings, api, lease_api, other_tokens=reviews, lost=_end_soon)
            async with leading as served:
                leads.set()
                log.info("leads: REST at %s, pods dial %s", served.url, settings.kubernetes.control)
                async with alongside(cycles.search_rarely(SystemClock())):
                    await over.wait()
                log.info("ends; pods go on")
    except asyncio.CancelledError:
        if not over.is_set():
            raise
        log.info("ends before it has led")


class _JsonLines(logging.Formatter):
    """Records for programs."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        found: dict[str, object] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found)


def _end_soon(why: str) -> None:
    """What may be under way in this process must not meet what the next master does."""
    log.error("%s; ends", why)
    asyncio.get_running_loop().call_later(LAST_SECONDS, os._exit, 1)


@click.command(short_help="Get the credentials of a master on Kubernetes.")
@click.option("--kubernetes", "from_cluster", is_flag=True, required=True, help="Take them from the cluster's Secret.")
@namespace_option
@click.option("--url", metavar="URL", help=f"Where its master is reached from here.  [default: {DEFAULT_MASTER}]")
@kubeconfig_option
@context_option
@json_option
def login(
    from_cluster: bool,
    namespace: str,
    url: str | None,
    kubeconfig: str | None,
    context: str | None,
    as_json: bool,
) -> None:
    """Copy token and signing key of a master on Kubernetes to the credentials file.

    \b
    kubectl -n nomad port-forward service/nomad-master 30000 &
    nomad login --kubernetes

    Whoever may read the Secret nomad-master in its namespace can do this.
    """
    from nomad import credentials
    from nomad.errors import UsageError
    from nomad.kubernetes import names

    address = credentials.master_url(url)
    token, signing_key = asyncio.run(_secret(namespace, kubeconfig, context))
    if asyncio.run(_is_anothers(address, token)):
        raise UsageError(
            f"the master that answers at {address} is not the one in the namespace {namespace}: it doesn't take that "
            "one's token (does `nomad up` run here?). Say with --url where that one is reached: after `kubectl "
            f"--namespace {namespace} port-forward service/{names.MASTER_NAME} 30001:30000` --url http://127.0.0.1:30001"
        )
    credentials.save(address, token, signing_key)
    Out(as_json).document(
        {"url": address, "file": str(credentials.credentials_path())},
        f"The credentials of {address} are in {credentials.credentials_path()}.",
    )


async def _is_anothers(address: str, token: str) -> bool:
    """Whether a master answers there to whom this token says nothing. False as well where none answers."""
    from nomad.errors import AuthenticationError, NomadError
    from nomad.rest import Rest

    try:
        async with asyncio.timeout(LOGIN_SECONDS), Rest(address, token, timeout=LOGIN_SECONDS) as rest:
            await rest.request("GET", "nodes")
    except AuthenticationError:
        return True
    except (NomadError, TimeoutError):
        pass  # it may be out of reach until a port-forward stands
    return False


async def _secret(namespace: str, kubeconfig: str | None, context: str | None) -> tuple[str, bytes]:
    """Raises `NotFoundError`, `StateError` and `ApiError`."""
    import base64

    from nomad.errors import ApiNotFound, NotFoundError, StateError
    from nomad.kubernetes import names, paths
    from nomad.kubernetes.api import Api

    async with Api.open(kubeconfig, context) as api:
        try:
            secret = await api.get(paths.secrets(namespace, names.MASTER_NAME))
        except ApiNotFound:
            raise NotFoundError(
                f"there is no Secret {names.MASTER_NAME} in the namespace {namespace} of {api.server}: "
                "a master makes it when it first leads"
            ) from None
    try:
        data = {key: base64.b64decode(value).decode() for key, value in (secret.get("data") or {}).items()}
        return data["token"], bytes.fromhex(data["signing_key"])
    except (KeyError, ValueError) as exc:
        raise StateError(f"the Secret {names.MASTER_NAME} in {namespace} isn't a master's: {exc!r}") from None
