"""`nomad export`: a pipeline and its code as objects of Kubernetes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nomad.cli.common import Out, pipeline_argument, with_cluster
from nomad.errors import UsageError

if TYPE_CHECKING:
    from nomad.client import Cluster


@click.command(short_help="Print a pipeline for `kubectl apply`.")
@pipeline_argument
@click.option("-n", "--namespace", metavar="NAME", help="Name this namespace in it; else kubectl's own is taken.")
@click.option("--for", "other", metavar="URL", help="Sign its code for the master at URL, by what `nomad login` knows.")
@with_cluster
async def export(cluster: Cluster, out: Out, pipeline: str, namespace: str | None, other: str | None) -> None:
    """Print PIPELINE and its code as objects of Kubernetes, for `kubectl -n nomad apply -f -`.

    A master runs only what was signed with its own key. Say with --for where it is to be applied, unless that is the
    cluster it comes from. With --json it is one list, of the kind List.
    """
    import yaml

    from nomad import bundle
    from nomad.master.kube import resource

    handle = await cluster.pipeline(pipeline)
    data = await handle.bundle()
    own = _signing_key(cluster.url)
    found = bundle.read(data, bundle.public_key(own))
    if other is not None:
        data = bundle.sign_again(data, bundle.public_key(own), _signing_key(other))
    status = handle.last_status
    spec = resource.with_profile(found.spec(status.id, status.start, status.end), status.profile)
    inner = status.operators[1:-1]
    pins = {op.name: op.pin for op in inner if op.pin}
    objects = resource.exported(spec, found.digest, data, moves=status.moves, pins=pins)
    if namespace is not None:
        for item in objects:
            item["metadata"]["namespace"] = namespace
    text = yaml.safe_dump_all(objects, sort_keys=False)
    out.document({"apiVersion": "v1", "kind": "List", "items": objects}, text=text.rstrip())


def _signing_key(url: str) -> bytes:
    from nomad import credentials

    known = credentials.master_url(url)
    key = credentials.find(known).signing_key
    if key is None:
        raise UsageError(f"no signing key is known for {known}: run `nomad login --kubernetes --url {known}` first")
    return key


COMMANDS = (export,)
