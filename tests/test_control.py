"""What pods and masters say to each other, as bytes."""

from __future__ import annotations

from dataclasses import asdict

from pydantic import TypeAdapter

from nomad import control
from nomad.control import PodStats
from nomad.master.views import DataLinkView

STATS, LINKS = TypeAdapter(PodStats), TypeAdapter(list[DataLinkView])


def heard(stats: PodStats) -> PodStats:
    message = control.unpack(control.pack(control.heartbeat(stats, None)))
    found = STATS.validate_python(message["stats"])
    found.links = [asdict(link) for link in LINKS.validate_python(found.links)]
    return found


def test_a_heart_beat_leaves_out_what_is_as_in_the_beginning_and_nothing_is_lost() -> None:
    links = [
        DataLinkView("p:a>b", "in", state="open", connected=True, peer_epoch=1, rtt=0.0),
        DataLinkView("p:b>c", "out", unsettled_messages=3, rtt_least=0.01),
    ]
    stats = PodStats(received=7, busy=0.0, mode="inline", last_output=b"", links=[asdict(link) for link in links])
    assert heard(stats) == stats
    assert heard(PodStats()) == PodStats()
    assert control.heartbeat(PodStats(), None)["stats"] == {"links": []}
    assert len(control.pack(control.heartbeat(stats, None))) < len(control.pack(asdict(stats))) / 2
