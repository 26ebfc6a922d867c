"""How positions are given out."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from synapse_sticky.deliverable.positions import give_positions

times = st.integers(0, 2**42)


@given(st.lists(st.tuples(st.lists(st.text()), times)))
def test_positions_grow_whatever_the_clock_does(batches: list[tuple[list[str], int]]) -> None:
    last: int | None = None
    given_out: list[int] = []
    for items, now_ts in batches:
        before = last
        positioned, last = give_positions(items, before, now_ts)
        assert [item for _, item in positioned] == items
        positions = [position for position, _ in positioned]
        # Never in the past, and as soon as possible.
        first = now_ts if before is None else max(before, now_ts)
        assert all(position >= now_ts for position in positions)
        assert all(position <= first + len(items) for position in positions)
        given_out += positions
        # Without items the last one stays the last.
        assert last == (positions[-1] if positions else now_ts if before is None else before)
    assert all(a < b for a, b in pairwise(given_out))
