"""Reads kubeconfigs, with all their kinds of credentials, by way of kubernetes_asyncio. The one file that knows it.

That package brings seven hundred modules of models, which take half a second and 40 MB and aren't used here. So it is
imported in a process of its own, this file as a program, which says what it has found and ends; a program that has the
package imported already does without. Called by `nomad.kubernetes.login`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nomad.errors import UsageError

PACKAGE = "kubernetes_asyncio"


@dataclass(frozen=True, slots=True)
class Access:
    """Where a cluster is, and who asks."""

    server: str
    """The API's URL, without a slash at its end."""
    authority: str = ""
    """PEM, of who signed the server's certificate; "": whom this machine trusts."""
    certificate: str = ""
    """PEM, the user's own; "": none."""
    key: str = ""
    """PEM, the certificate's."""
    authorization: str = ""
    """The header's value."""
    verify: bool = True
    """Whether the server has to prove itself."""
    server_name: str | None = None
    """What its certificate calls the server, if not as its URL does."""
    proxy: str | None = None


async def read(file: str, context: str | None) -> Access:
    """What a kubeconfig says of a context, None for the current one; `file` may be several, as in $KUBECONFIG.

    Runs the plugins that it names. Raises `UsageError`.
    """
    try:
        return await (_load if PACKAGE in sys.modules else _ask)(file, context)
    except UsageError as exc:
        raise UsageError(f"there is no Kubernetes cluster to be reached by {file}: {exc}") from exc


async def _ask(file: str, context: str | None) -> Access:
    """By a process of its own. What it says comes over a socket: its terminal is ours, as plugins may ask there."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    try:
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", __name__, str(theirs.fileno()), file, *([context] if context else ())),
                pass_fds=(theirs.fileno(),),
            )
        try:
            text = await reader.read()
        except asyncio.CancelledError:
            process.kill()
            raise
        finally:
            await process.wait()
    except OSError as exc:
        raise UsageError(f"{sys.executable} can't be run: {exc}") from exc
    finally:
        writer.close()
    said = json.loads(text or b"{}")
    if "server" not in said:
        raise UsageError(said.get("error") or f"the process that reads it ended with code {process.returncode}")
    return Access(**said)


async def _load(file: str, context: str | None) -> Access:
    """Here."""
    import yaml
    from kubernetes_asyncio import config
    from kubernetes_asyncio.client import Configuration

    configuration: Any = Configuration()
    loader: Any = config  # is typed in part only
    try:
        await loader.load_kube_config(file, context, configuration, persist_config=False)
        authorization = [found["value"] for found in (await configuration.auth_settings()).values()]
        return Access(
            server=str(configuration.host).rstrip("/"),
            authority=_text(configuration.ssl_ca_cert),
            certificate=_text(configuration.cert_file),
            key=_text(configuration.key_file),
            authorization=authorization[0] if authorization else "",
            verify=bool(configuration.verify_ssl),
            server_name=configuration.tls_server_name,
            proxy=configuration.proxy,
        )
    except (AttributeError, TypeError, KeyError, UnicodeError, yaml.YAMLError) as exc:  # it reads on, whatever it finds
        raise UsageError(
            f"it isn't a kubeconfig, or not all of one (`kubectl config view` looks at it): {exc}"
        ) from exc
    except Exception as exc:  # plugins that make credentials fail in their own ways
        raise UsageError(str(exc) or type(exc).__name__) from exc


def _text(file: str | None) -> str:
    return Path(file).read_text() if file else ""


def main() -> None:
    """`FD FILE [CONTEXT]`: write to that socket what is found, or as `error` why nothing is."""
    number, file, *context = sys.argv[1:]
    try:
        said = asdict(asyncio.run(_load(file, context[0] if context else None)))
    except UsageError as exc:
        said = {"error": str(exc)}
    with socket.socket(fileno=int(number)) as there:
        there.sendall(json.dumps(said).encode())


if __name__ == "__main__":
    main()
