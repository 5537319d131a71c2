from __future__ import annotations

from nomad.actor.progress import Chunk
from nomad.delivery.frames import Places, Position, step


def test_a_chunk_is_cut_with_its_places() -> None:
    dense = Chunk(list("abcd"), Places(0, range(5, 9)), 7)
    part = dense.cut(1, 3)
    assert part.values == ["b", "c"]
    assert part.places.origins == range(6, 8)
    assert (part.birth, part.places.lane, part.places.paths) == (7, 0, None)

    paths = [step(0), step(1), step(0)]
    sparse = Chunk(list("abc"), Places(2, [5, 5, 9], paths), 7)
    part = sparse.cut(1, 3).cut(1, 2)
    assert part.values == ["c"]
    assert part.places[0] == Position(9, step(0))
    assert part.places.lane == 2
