"""The budget of probes holds whatever is asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nomad.measure.probes import ASSUMED_BANDWIDTH, PROBES_PER_SECOND, SHARE, Budget

NODES = st.sampled_from("abc")
ASKED = st.lists(st.tuples(NODES, NODES, st.integers(64, 100_000), st.floats(0, 0.3), st.integers(1, 3)), max_size=300)


@given(ASKED, st.one_of(st.none(), st.floats(1e5, 1e9)))
def test_no_node_and_no_link_has_more_than_its_share(
    asked: list[tuple[str, str, int, float, int]], bandwidth: float | None
) -> None:
    budget, now = Budget(), 0.0
    taken: list[tuple[float, str, str, int]] = []
    for source, target, nbytes, pause, probes in asked:
        now += pause
        if source != target:
            free = budget.wait(source, target, bandwidth, now, probes) == 0
            assert budget.take(source, target, nbytes, bandwidth, now, probes) == free
            if free:
                taken += [(now, source, target, nbytes // probes)] * probes
    for node in "abc":
        times = [at for at, *ends, _ in taken if node in ends]
        for first, last in zip(times, times[PROBES_PER_SECOND:], strict=False):
            assert last - first >= 1.0 - 1e-9
    for pair in {(source, target) for _, source, target, _ in taken}:
        mine = [(at, nbytes) for at, *ends, nbytes in taken if tuple(ends) == pair]
        for (first, _), (last, _) in zip(mine, mine[1:], strict=False):
            if last == first:
                continue
            sent = sum(nbytes for at, nbytes in mine if first <= at < last)
            assert sent <= SHARE * (bandwidth or ASSUMED_BANDWIDTH) * (last - first) * (1 + 1e-9) + 1e-6


def test_a_wide_link_is_found_out_step_by_step() -> None:
    budget = Budget()
    sizes = []
    for _ in range(6):
        sizes.append(budget.transfer_bytes("a", "b", None))
        budget.too_quick("a", "b")
    assert sizes == [4096, 16384, 65536, 262144, 1048576, 1048576]
    assert budget.transfer_bytes("a", "b", 1e6) == 20_000
    budget.forget("a")
    assert budget.transfer_bytes("a", "b", None) == 4096
