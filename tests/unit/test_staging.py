"""Whether a server's word is taken for what it took."""

from hypothesis import given
from hypothesis import strategies as st

from synapse_sticky.servers.staging import Staging

SERVER, ROOM = "b.example", "!r:a.example"
NOW_TS = 1_700_000_000_000


# F5
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1_000, 60_000)), max_size=30))
def test_ordinary_traffic_is_believed(steps: list[tuple[int, int]]) -> None:
    """A few events a second fill nobody's staging area, however long that goes on."""
    staging, now_ts = Staging(), NOW_TS
    for count, pause_ms in steps:
        staging.add(SERVER, ROOM, count, "$newest", now_ts)
        assert staging.newest_unread(SERVER, ROOM, now_ts) is None
        now_ts += pause_ms


# F1, F5
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_a_hundred_at_once_are_not(counts: list[int]) -> None:
    """What could have made a server throw events away is never believed, whatever its parts."""
    staging = Staging()
    for number, count in enumerate(counts):
        staging.add(SERVER, ROOM, count, f"${number}", NOW_TS)
    newest = f"${len(counts) - 1}"
    if sum(counts) >= 100:
        assert staging.newest_unread(SERVER, ROOM, NOW_TS) == newest
    if sum(counts) <= 40:
        assert staging.newest_unread(SERVER, ROOM, NOW_TS) is None


# F5
def test_rooms_and_servers_are_apart() -> None:
    """Each room has a staging area of its own at each server."""
    staging = Staging()
    staging.add(SERVER, ROOM, 200, "$a", NOW_TS)
    assert staging.newest_unread(SERVER, "!other:a.example", NOW_TS) is None
    assert staging.newest_unread("c.example", ROOM, NOW_TS) is None


# F5
def test_doubt_ends() -> None:
    """Once the server has read all of it, or has had the time to."""
    staging = Staging()
    staging.add(SERVER, ROOM, 200, "$a", NOW_TS)
    staging.expire(NOW_TS + 1_000)
    assert staging.newest_unread(SERVER, ROOM, NOW_TS + 1_000) == "$a"
    assert staging.newest_unread(SERVER, ROOM, NOW_TS + 20_000) is None
    staging.expire(NOW_TS + 60_000)
    assert not staging._rooms
    staging.add(SERVER, ROOM, 200, "$b", NOW_TS)
    staging.has_read(SERVER, ROOM, "$a", NOW_TS)
    assert staging.newest_unread(SERVER, ROOM, NOW_TS) == "$b"
    staging.has_read(SERVER, ROOM, "$b", NOW_TS)
    assert staging.newest_unread(SERVER, ROOM, NOW_TS) is None


# F5
def test_doubt_ends_while_more_is_sent() -> None:
    """What came after the question counts on, and what was before it does not."""
    staging = Staging()
    staging.add(SERVER, ROOM, 200, "$a", NOW_TS)
    staging.ask(SERVER, ROOM, NOW_TS)
    staging.add(SERVER, ROOM, 10, "$b", NOW_TS)
    staging.has_read(SERVER, ROOM, "$a", NOW_TS)
    assert staging.newest_unread(SERVER, ROOM, NOW_TS) is None
    staging.add(SERVER, ROOM, 40, "$c", NOW_TS)
    assert staging.newest_unread(SERVER, ROOM, NOW_TS) == "$c"
