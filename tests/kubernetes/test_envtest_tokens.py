"""Tokens: users with those of Kubernetes' own, and who gets the master's from the cluster."""

from __future__ import annotations

import asyncio
import base64
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from nomad import credentials
from nomad.cli.main import cli
from nomad.errors import ApiForbidden
from nomad.kubernetes import names
from nomad.kubernetes.api import Api
from nomad.kubernetes.reviews import KEPT_SECONDS, TokenReviews
from tests.clock import VirtualClock
from tests.kubernetes.cluster import binaries
from tests.kubernetes.cluster.envtest import Envtest

CHART = Path(__file__).resolve().parents[2] / "images" / "k8s" / "chart"

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(120)]


def token_of(envtest: Envtest, account: str, namespace: str) -> str:
    return envtest.kubectl("create", "token", account, "-n", namespace).strip()


async def test_users_of_the_cluster_may_be_let_in(envtest: Envtest, namespace: str) -> None:
    await asyncio.to_thread(envtest.kubectl, "create", "serviceaccount", "robot", "-n", namespace)
    robot, default = [token_of(envtest, account, namespace) for account in ("robot", "default")]
    async with Api.open(envtest.kubeconfig) as api:
        clock = VirtualClock()
        user = TokenReviews(api, [f"system:serviceaccount:{namespace}:robot"], [], clock)
        group = TokenReviews(api, [], [f"system:serviceaccounts:{namespace}"], clock)
        assert [await user(token) for token in (robot, default, "nobody's", robot[:-4] + "AAAA")] == [
            True, False, False, False,
        ]  # fmt: skip
        assert [await group(token) for token in (robot, default)] == [True, True]

        asked = api.requests
        assert await user(robot)
        assert not await user("x" * 10_000)
        assert api.requests == asked, "what is known, or can be none, isn't asked again"
        await asyncio.to_thread(envtest.kubectl, "delete", "serviceaccount", "robot", "-n", namespace)
        assert await user(robot)
        async with asyncio.timeout(60):  # the API server itself remembers for a while, too
            while await user(robot):
                await clock.advance(KEPT_SECONDS)
                await asyncio.sleep(0.5)

        envtest.stop_apiserver()
        try:
            assert not await group(robot + "x")
        finally:
            await asyncio.to_thread(envtest.start_apiserver)
        assert await group(default)


def rights(namespace: str) -> list[Any]:
    """What the chart gives a master that may let users in by their tokens."""
    values = ["--set", "tokenReview.enabled=true", "--set", "tokenReview.users={robot}"]
    shown = ["--show-only", "templates/accounts.yaml", "--show-only", "templates/rbac.yaml"]
    command = [str(binaries.helm()), "template", "nomad", str(CHART), "--namespace", namespace]
    version = ["--kube-version", binaries.KUBERNETES_VERSION]
    done = subprocess.run([*command, *version, *values, *shown], capture_output=True, text=True, timeout=60, check=True)
    return [item for item in yaml.safe_load_all(done.stdout) if item]


async def test_with_its_rights_a_master_may_ask_whose_a_token_is_and_nothing_more(
    envtest: Envtest, namespace: str
) -> None:
    items = await asyncio.to_thread(rights, namespace)
    await asyncio.to_thread(envtest.apply, *items)
    kubeconfig = await asyncio.to_thread(envtest.kubeconfig_for, names.MASTER_NAME, namespace)
    token = token_of(envtest, names.MASTER_NAME, namespace)
    async with Api.open(kubeconfig) as api:
        user = f"system:serviceaccount:{namespace}:{names.MASTER_NAME}"
        assert await TokenReviews(api, [user], [], VirtualClock())(token)
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {"user": "somebody", "resourceAttributes": {"verb": "get", "resource": "secrets"}},
        }
        with pytest.raises(ApiForbidden):
            await api.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", body)
    for item in items:
        if item["kind"].startswith("ClusterRole"):
            await asyncio.to_thread(envtest.kubectl, "delete", item["kind"], item["metadata"]["name"])


def test_login(envtest: Envtest, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The master's credentials go from its Secret to where clients look for them."""
    monkeypatch.setenv("NOMAD_CONFIG_DIR", str(tmp_path))
    for name in ("NOMAD_TOKEN", "NOMAD_SIGNING_KEY", "NOMAD_MASTER"):
        monkeypatch.delenv(name, raising=False)
    options = ["login", "--kubernetes", "--namespace", namespace, "--kubeconfig", str(envtest.kubeconfig)]
    found = CliRunner().invoke(cli, options)
    assert found.exit_code == 5
    assert "a master makes it when it first leads" in found.output
    key = bytes(range(32))
    data = {"token": "its token", "signing_key": key.hex(), "pod_key": "none of yours"}
    encoded = {name: base64.b64encode(value.encode()).decode() for name, value in data.items()}
    secret = {"apiVersion": "v1", "kind": "Secret", "data": encoded}
    envtest.apply(secret | {"metadata": {"name": names.MASTER_NAME, "namespace": namespace}})
    found = CliRunner().invoke(cli, [*options, "--url", "http://10.1.2.3:30000"])
    assert found.exit_code == 0, found.output
    assert "its token" not in found.output
    kept = credentials.find("http://10.1.2.3:30000")
    assert (kept.token, kept.signing_key) == ("its token", key)
    assert "none of yours" not in credentials.credentials_path().read_text()
    assert CliRunner().invoke(cli, options).exit_code == 0
    assert credentials.find(credentials.DEFAULT_MASTER).token == "its token"
