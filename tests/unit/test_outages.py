"""Which rooms are asked about after an outage, when, and whom."""

from collections.abc import Collection

from hypothesis import given
from hypothesis import strategies as st

from synapse_sticky.servers.outages import Outages, rooms_by_importance, servers_to_ask

MINUTE_MS = 60_000


def ask_all(
    outages: Outages, now_ms: int, was_answered: bool = True, failed: Collection[str] = ()
) -> list[str]:
    """The rooms that are due, in order, each asked about."""
    asked = []
    while (room_id := outages.due(now_ms)) is not None:
        asked.append(room_id)
        outages.ended(room_id, was_answered, now_ms, failed)
    return asked


def test_each_room_once_in_order() -> None:
    outages = Outages(10)
    outages.add(["!a", "!b"], 100)
    outages.add(["!b", "!c"], 200)
    assert outages.next_ms == 100
    assert ask_all(outages, 99) == []
    assert ask_all(outages, 100) == ["!a", "!b"]
    assert ask_all(outages, 1_000) == ["!c"]
    assert outages.next_ms is None


# P3
@given(st.integers(0, 30), st.integers(1, 5))
def test_dead_servers_before_the_live_one(dead: int, asked_at_once: int) -> None:
    """Each try gets on to servers that were not asked yet."""
    outages = Outages(10)
    outages.add(["!a"], 0)
    servers, was_asked = [*(f"dead{n}" for n in range(dead)), "live"], False
    while (now_ms := outages.next_ms) is not None:
        assert outages.due(now_ms) == "!a"
        asked = outages.failed_last("!a", servers)[:asked_at_once]
        was_asked = was_asked or "live" in asked
        outages.ended("!a", "live" in asked, now_ms, set(asked) - {"live"})
    assert was_asked is (dead < 4 * asked_at_once)


# P3
def test_a_server_that_is_back_is_asked_before_others() -> None:
    outages = Outages(10)
    outages.add(["!a"], 0)
    ask_all(outages, 0, was_answered=False, failed=["x", "y"])
    assert outages.failed_last("!a", ["x", "y", "z"]) == ["z", "x", "y"]
    outages.on_back(["y"], 0)
    assert outages.failed_last("!a", ["x", "y", "z"]) == ["y", "z", "x"]


# P3
def test_a_room_that_is_asked_about() -> None:
    """Others are due meanwhile, and it is not."""
    outages = Outages(10)
    outages.add(["!a", "!b"], 100)
    assert (outages.due(200), outages.due(200), outages.due(200)) == ("!a", "!b", None)
    assert outages.next_ms is None
    assert outages.waits_since_ms("!a") == 100
    outages.ended("!a", False, 200)
    outages.ended("!b", True, 200)
    assert outages.next_ms == 200 + MINUTE_MS
    assert outages.due(200 + MINUTE_MS) == "!a"
    assert outages.waits_since_ms("!a") == 100


# P3
def test_gaps_before_new_events() -> None:
    """Not those from before the end of the last try, and no more often than after other outages."""
    outages = Outages(10)
    outages.add_gaps({"!a": 0, "!b": 0}, 1_000)
    assert ask_all(outages, 1_000) == ["!a", "!b"]
    outages.add_gaps({"!a": 900, "!b": 1_001}, MINUTE_MS)
    assert outages.next_ms == 10 * MINUTE_MS + 1_000
    assert ask_all(outages, 10 * MINUTE_MS + 1_000) == ["!b"]


# P3
def test_so_many_rooms() -> None:
    outages = Outages(3)
    outages.add([f"!{n}" for n in range(10)], 0)
    assert ask_all(outages, 0) == ["!0", "!1", "!2"]


# P3
def test_a_room_that_nobody_answers_for() -> None:
    """It is tried a few times more, ever more rarely."""
    outages = Outages(10)
    outages.add(["!a"], 0)
    tried = []
    while (now_ms := outages.next_ms) is not None:
        assert ask_all(outages, now_ms, was_answered=False) == ["!a"]
        tried.append(now_ms)
    assert tried == [0, MINUTE_MS, 6 * MINUTE_MS, 21 * MINUTE_MS]


def test_a_server_that_is_back_is_asked_for_the_rooms_that_wait() -> None:
    outages = Outages(10)
    outages.add(["!a"], 0)
    ask_all(outages, 0, was_answered=False, failed=["x", "y"])
    outages.add(["!b"], 30_000)
    outages.on_back(["z"], 10_000)
    assert ask_all(outages, 10_000) == []
    outages.on_back(["z", "y"], 10_000)
    assert ask_all(outages, 10_000) == ["!a"]
    assert outages.next_ms == 30_000


# P3
def test_servers_that_come_and_go_all_the_time() -> None:
    """A room is asked about every ten minutes at most."""
    outages = Outages(10)
    asked = 0
    for now_ms in range(0, 60 * MINUTE_MS, 1_000):
        outages.add(["!a"], now_ms)
        outages.on_back([], now_ms)
        asked += len(ask_all(outages, now_ms))
    assert asked == 6


# P3
def test_servers_that_fail_all_the_time() -> None:
    """Each that is back is asked, not more often than a few times a minute, beside the retries."""
    outages = Outages(10)
    outages.add(["!a"], 0)
    tried = []
    for now_ms in range(0, 30 * MINUTE_MS, 5_000):
        outages.on_back(["x" if now_ms < 2 * MINUTE_MS else "y"], now_ms)
        if ask_all(outages, now_ms, was_answered=False, failed=["x"]):
            tried.append(now_ms)
            outages.avoid("x", now_ms)
    assert tried == [*range(0, 2 * MINUTE_MS + 1, 10_000), 6 * MINUTE_MS, 21 * MINUTE_MS]


# P3
def test_rooms_that_rest_keep_no_others_from_being_asked_about() -> None:
    """They are asked about after their rest. A room that nobody answers for does not rest."""
    outages = Outages(2)
    outages.add(["!a", "!b"], 0)
    ask_all(outages, 0)
    outages.add(["!a", "!b", "!c", "!d", "!e"], MINUTE_MS)
    assert ask_all(outages, MINUTE_MS) == ["!c", "!d"]
    assert ask_all(outages, 10 * MINUTE_MS) == ["!a", "!b"]
    outages.add(["!x"], 30 * MINUTE_MS)
    while (now_ms := outages.next_ms) is not None:
        ask_all(outages, now_ms, was_answered=False)
    outages.add(["!x"], 60 * MINUTE_MS)
    assert ask_all(outages, 60 * MINUTE_MS) == ["!x"]


def test_a_server_that_has_failed_is_left_alone_for_a_moment() -> None:
    outages = Outages(10)
    outages.avoid("a", 0)
    assert outages.avoids("a", 1_000)
    assert not outages.avoids("b", 1_000)
    outages.avoid("c", 0)
    outages.on_back(["c"], 1_000)
    assert outages.avoids("c", 9_000)
    assert not outages.avoids("c", 10_000)
    assert outages.avoids("a", 10_000)
    assert not outages.avoids("a", MINUTE_MS)


# P3
def test_a_server_that_fails_again_is_left_alone_for_longer() -> None:
    """Several rooms in which it fails at the same time are one failure; to be slow is none."""
    outages = Outages(10)
    outages.avoid("a", 0)
    outages.avoid("a", 1_000)
    outages.avoid("slow", 0)
    assert not outages.avoids("a", 51_000)
    outages.avoid("a", MINUTE_MS)
    outages.avoid("slow", MINUTE_MS, has_failed=False)
    assert outages.avoids("a", 5 * MINUTE_MS)
    assert not outages.avoids("slow", 2 * MINUTE_MS)
    assert not outages.avoids("a", 6 * MINUTE_MS)
    outages.on_back(["a"], 2 * MINUTE_MS)
    assert not outages.avoids("a", 2 * MINUTE_MS)


# P3
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.sets(st.integers(0, 20)), st.integers(0, 100_000)),
            st.tuples(st.just("back"), st.just(set[int]()), st.integers(0, 100_000)),
            st.tuples(st.just("ask"), st.just(set[int]()), st.integers(0, 3_000_000)),
        )
    ),
    st.lists(st.booleans(), min_size=1),
)
def test_it_comes_to_an_end(steps: list[tuple[str, set[int], int]], answers: list[bool]) -> None:
    """Whatever happens: each room is asked about, at most four times for one outage.

    And once more, if a server is back.
    """
    outages, now_ms, asked, added = Outages(5), 0, 0, 0
    for kind, rooms, passed_ms in steps:
        now_ms += passed_ms
        if kind == "add":
            outages.add([f"!{n}" for n in sorted(rooms)], now_ms)
            added += len(rooms)
        elif kind == "back":
            outages.on_back(["x"], now_ms)
        elif (room_id := outages.due(now_ms)) is not None:
            outages.ended(room_id, answers[asked % len(answers)], now_ms, ["x"])
            asked += 1
    while (next_ms := outages.next_ms) is not None:
        now_ms = max(now_ms, next_ms)
        room_id = outages.due(now_ms)
        assert room_id is not None
        outages.ended(room_id, answers[asked % len(answers)], now_ms)
        asked += 1
        assert asked <= 5 * added
    assert bool(asked) == bool(added)


def test_rooms_by_importance() -> None:
    """The configured ones first, then those whose events live longest."""
    live_until = {("!a", "x"): 5, ("!b", "x"): 9, ("!a", "y"): 10, ("!c", "x"): 7}
    assert rooms_by_importance(["!z", "!c"], live_until) == ["!z", "!c", "!a", "!b"]


# P3
def test_servers_with_sticky_events_and_old_ones_are_asked_first() -> None:
    """By turns: those that send events only to be asked leave room for others."""
    live_until = {("!a", "x"): 5, ("!a", "y"): 10, ("!b", "u"): 99, ("!a", "gone"): 99}
    assert servers_to_ask("!a", ["u", "v", "x", "y"], live_until) == ["y", "u", "x", "v"]
