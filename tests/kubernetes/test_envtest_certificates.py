"""Certificates in the Secrets of a real API server."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import pytest

from nomad.errors import ApiUnavailable
from nomad.kubernetes import paths
from nomad.kubernetes.api import Api
from nomad.kubernetes.certificates import AGAIN, EVERY, Certificates
from nomad.kubernetes.certs import CA_LIFE, LEAF_LIFE, OVERLAP
from nomad.kubernetes.names import CA_SECRET, MASTER_TLS_SECRET, POD_TLS_SECRET
from nomad.transport import tls
from nomad.transport.certificates import MASTER, POD
from nomad.transport.tls import TlsTransport
from tests.clock import VirtualClock
from tests.contract.transport import dropped, listening, soon, until
from tests.kubernetes.cluster.envtest import Envtest

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(120)]


async def versions(api: Api, namespace: str) -> dict[str, str]:
    names = (CA_SECRET, MASTER_TLS_SECRET, POD_TLS_SECRET)
    found = {name: await api.get(paths.secrets(namespace, name)) for name in names}
    return {name: secret["metadata"]["resourceVersion"] for name, secret in found.items()}


async def test_a_year_in_secrets(envtest: Envtest, namespace: str, tmp_path: Path) -> None:
    clock = VirtualClock()
    async with Api.open(envtest.kubeconfig) as api:
        certificates = Certificates(api, namespace, clock)
        await asyncio.gather(certificates.renew(), Certificates(api, namespace, clock).renew())  # two leaders at once
        before, asked = await versions(api, namespace), api.requests
        await certificates.renew()
        assert await versions(api, namespace) == before, "written without need"
        assert api.requests - asked == 6, "three to look, three of this test"

        await clock.advance(LEAF_LIFE.total_seconds() * 0.7)
        await certificates.renew()
        after = await versions(api, namespace)
        assert [name for name in after if after[name] != before[name]] == [MASTER_TLS_SECRET, POD_TLS_SECRET]

        await clock.advance(CA_LIFE.total_seconds() * 2 / 3)
        await Certificates(api, namespace, clock).renew()  # another process
        pods = await api.get(paths.secrets(namespace, POD_TLS_SECRET))
        assert pods["type"] == "kubernetes.io/tls"
        assert base64.b64decode(pods["data"]["ca.crt"]).count(b"BEGIN CERTIFICATE") == 2
        signing = (await api.get(paths.secrets(namespace, CA_SECRET)))["data"]["tls.crt"]
        await clock.advance(OVERLAP.total_seconds())
        await certificates.renew()
        assert (await api.get(paths.secrets(namespace, CA_SECRET)))["data"]["tls.crt"] != signing


async def test_a_master_and_a_pod_talk_by_them(envtest: Envtest, namespace: str, tmp_path: Path) -> None:
    async with Api.open(envtest.kubeconfig) as api:
        certificates = Certificates(api, namespace)
        await certificates.renew()
        certificates.put(tmp_path / "master")
        certificates.put(tmp_path / "pod", POD)
        assert (tmp_path / "master" / "tls.key").stat().st_mode & 0o777 == 0o600
    try:
        tls.use(tmp_path / "master")
        async with listening(TlsTransport(), "tls://127.0.0.1:0") as (listener, accepted):
            tls.use(tmp_path / "pod")
            connection = await TlsTransport().connect(listener.reachable)
            await soon(accepted.get())
            assert connection.peer.startswith(f"tls://{MASTER}@")
            await dropped(connection)
    finally:
        tls.use(None)


async def test_looked_after_by_a_timer(envtest: Envtest, namespace: str, tmp_path: Path) -> None:
    clock = VirtualClock()
    async with Api.open(envtest.kubeconfig) as api:
        certificates = Certificates(api, namespace, clock)
        await certificates.renew()
        certificates.put(tmp_path)
        first = (tmp_path / "tls.crt").read_bytes()
        keeping = asyncio.ensure_future(certificates.keep(tmp_path))
        await clock.advance(LEAF_LIFE.total_seconds() * 0.7)

        async def renewed() -> None:
            while (tmp_path / "tls.crt").read_bytes() == first:
                await asyncio.sleep(0.01)
                await clock.advance(EVERY)

        await soon(renewed())
        keeping.cancel()
        await asyncio.wait([keeping])


async def test_an_api_that_is_away_is_asked_again(
    envtest: Envtest, namespace: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = VirtualClock()
    async with Api.open(envtest.kubeconfig) as api:
        certificates = Certificates(api, namespace, clock)
        looks = []

        async def away() -> None:
            looks.append(clock.now())
            raise ApiUnavailable("the API server is away")

        monkeypatch.setattr(certificates, "renew", away)
        began = clock.now()
        keeping = asyncio.ensure_future(certificates.keep())
        await clock.advance(EVERY + 2 * AGAIN)
        await until(lambda: len(looks) == 3)
        keeping.cancel()
        await asyncio.wait([keeping])
        assert [when - began for when in looks] == [EVERY, EVERY + AGAIN, EVERY + 2 * AGAIN]
