"""Many events of one room that become held at once, again and again."""

import time

from synapse_sticky.deliverable.index import StickyIndex
from synapse_sticky.storage.rows import EventChange

MANY = 20_000


def _change(number: int, position: int | None) -> EventChange:
    return EventChange(f"${number}", "!r:x", "@u:x", position, 10**13, number)


def test_a_large_room_is_switched_off_in_linear_time() -> None:
    index = StickyIndex()
    index.apply([_change(n, n + 1) for n in range(MANY)], [], MANY)
    began = time.process_time()
    index.apply([_change(n, None) for n in range(MANY)], [], 2 * MANY)
    assert time.process_time() - began < 2
    assert len(index) == 0
    assert index.held_count == MANY
    assert not index.rooms


def test_switching_does_not_grow_the_index() -> None:
    index, position = StickyIndex(), 0
    for _ in range(50):
        for number in range(10):
            index.apply([_change(number, position := position + 1)], [], position)
        index.apply([_change(number, None) for number in range(10)], [], position := position + 10)
    assert sum(map(len, index._expiring.values())) == 10
    index.expire(10**13 + 20_000)
    assert index.held_count == 0
