"""How far back a walk goes, and which events it hands on, whatever another server answers."""

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synapse_sticky.servers.walk import (
    MAX_EVENTS,
    PAGE_EVENTS,
    FoundEvent,
    Receipt,
    Walk,
    event_ids_in,
    prev_event_ids_in,
)

OLDEST_TS = 1_000
RECENT_TS = 2_000
MAX_REQUESTS = 20


def found(
    event_id: str,
    prev: Iterable[str] = ("$known",),
    depth: int = 1,
    ts: int = RECENT_TS,
    server: str = "a",
) -> FoundEvent:
    return FoundEvent(event_id, server, tuple(prev), depth, ts, None)


class Other:
    """A server that has some events of a room, and answers as Synapse does."""

    def __init__(self, events: Iterable[FoundEvent]) -> None:
        self.events = {event.event_id: event for event in events}
        self.asked: list[str] = []
        self.requests = 0

    def page(self, event_ids: Iterable[str]) -> list[FoundEvent]:
        self.asked += event_ids
        self.requests += 1
        page: dict[str, FoundEvent] = {}
        pending = [(-self.events[name].depth, name) for name in event_ids if name in self.events]
        heapq.heapify(pending)
        while pending and len(page) < PAGE_EVENTS:
            _, name = heapq.heappop(pending)
            if name not in page:
                page[name] = self.events[name]
                for prev in page[name].prev_event_ids:
                    if prev in self.events:
                        heapq.heappush(pending, (-self.events[prev].depth, prev))
        return list(page.values())

    def before(self, event: FoundEvent, known: Collection[str]) -> list[FoundEvent]:
        """The ten events before one that come after the known ones."""
        before: dict[str, FoundEvent] = {}
        pending = list(event.prev_event_ids)
        while pending and len(before) < 10:
            name = pending.pop(0)
            if name in self.events and name not in known:
                before[name] = self.events[name]
                pending += before[name].prev_event_ids
        return list(before.values())


def walk_with(
    other: Other,
    newest: list[str],
    known: set[str],
    receipts: Mapping[str, Receipt] | None = None,
    history: Collection[str] = (),
) -> tuple[Walk, list[FoundEvent]]:
    """The whole walk, and the events that it has handed on, in order."""
    walk = walked(other, newest, known, history)
    handed = []
    while (event := walk.next()) is not None:
        if walk.choose(event):
            handed.append(event)
            walk.took(event, (receipts or {}).get(event.event_id, Receipt.ACCEPTED))
    return walk, handed


def walked(other: Other, newest: list[str], known: set[str], history: Collection[str] = ()) -> Walk:
    """A walk that has taken all pages."""
    walk = Walk(newest, OLDEST_TS, history)
    walk.know(known.intersection(walk.to_look_up()))
    while wanted := walk.wanted():
        walk.take(other.page(wanted))
        walk.know(known.intersection(walk.to_look_up()))
    return walk


def taken_by_synapse(
    other: Other, newest: list[str], known: set[str], unverified: Collection[str] = ()
) -> tuple[set[str], int]:
    """The events that are known after a walk, and how often Synapse asked for more.

    Before an event with a gap it fetches ten more. Those that directly follow one that it cannot
    verify it does not take, nor an event that another server hands it as long as it has a gap.
    """
    walk, known, gaps = walked(other, newest, known), set(known), 0
    while (event := walk.next()) is not None:
        walk.know(known.intersection([event.event_id, *event.prev_event_ids]))
        if not walk.choose(event):
            continue
        if event.server_name in unverified:
            walk.took(event, Receipt.UNVERIFIED)
            continue
        if not known.issuperset(event.prev_event_ids):
            gaps += 1
            fetched = other.before(event, known)
            bad = {e.event_id for e in fetched if e.server_name in unverified}
            taken = (e for e in fetched if bad.isdisjoint(e.prev_event_ids))
            known.update(e.event_id for e in taken if e.event_id not in bad)
        is_taken = known.issuperset(event.prev_event_ids)
        known.update([event.event_id] if is_taken else ())
        walk.took(event, Receipt.ACCEPTED if is_taken else Receipt.REFUSED)
    return known, gaps


def names(events: Iterable[FoundEvent]) -> list[str]:
    return [event.event_id for event in events]


def chain(length: int, ts: int = RECENT_TS) -> list[FoundEvent]:
    return [
        found(f"${n}", [f"${n - 1}"] if n else ["$known"], depth=n + 1, ts=ts)
        for n in range(length)
    ]


def history(chance: Random) -> list[FoundEvent]:
    """Mostly a line, with forks that end anywhere."""
    events: list[FoundEvent] = []
    for n in range(chance.randint(1, 150)):
        prev = {chance.randint(max(0, n - 5), n - 1) for _ in range(chance.randint(1, 3)) if n}
        events.append(found(f"${n}", [f"${p}" for p in prev] or ["$first"], depth=n + 1))
    return events


# P3
@given(st.integers())
def test_all_that_is_missing_is_handed_on_once_and_in_order(seed: int) -> None:
    chance = Random(seed)
    events = history(chance)
    count = chance.randint(0, len(events))
    known = {"$first", *names(events[:count])}
    missing = events[count:]
    referenced = {p for event in events for p in event.prev_event_ids}
    other = Other(events)
    _, handed = walk_with(other, [n for n in names(events) if n not in referenced], known)
    assert sorted(names(handed)) == sorted(names(missing))
    there = set(known)
    for event in handed:
        assert there.issuperset(event.prev_event_ids)
        there.add(event.event_id)
    assert not known.intersection(other.asked)
    assert other.requests <= 4


def anything(chance: Random) -> FoundEvent:
    def some() -> str:
        return f"${chance.randint(0, 300)}"

    prev = {some() for _ in range(chance.randint(1, 20))}
    depth, ts = chance.randint(0, 2**60), chance.randint(0, 2**60)
    return found(some(), prev, depth, ts, server=str(chance.randint(0, 10)))


# P3
@given(st.integers())
def test_whatever_is_answered(seed: int) -> None:
    """Bounded in everything, and nothing comes twice."""
    chance = Random(seed)
    known = {f"${chance.randint(0, 300)}" for _ in range(chance.randint(0, 100))}
    most = chance.choice([2, PAGE_EVENTS])
    walk = Walk([f"${n}" for n in range(5_000)], OLDEST_TS)
    walk.know(known)
    requests = 0
    while wanted := walk.wanted():
        assert len(wanted) <= 50
        assert not known.intersection(wanted)
        requests += 1
        walk.take(anything(chance) for _ in range(chance.randint(0, most)))
        walk.know(known.intersection(walk.to_look_up()))
    handed, there, gaps, refused = [], set(known), 0, 0
    unverified: list[str] = []
    verified: set[str] = set()
    kinds = chance.sample(list(Receipt), chance.randint(1, 3))
    while (event := walk.next()) is not None:
        if not walk.choose(event):
            continue
        receipt = chance.choice(kinds)
        has_gap = not there.issuperset(event.prev_event_ids)
        gaps += has_gap
        if has_gap:
            refused = 0 if receipt is Receipt.ACCEPTED else refused + 1
            assert refused <= 4
        handed.append(event.event_id)
        if receipt is Receipt.ACCEPTED:
            there.add(event.event_id)
        if receipt is Receipt.UNVERIFIED:
            unverified.append(event.server_name)
        else:
            verified.add(event.server_name)
        walk.took(event, receipt)
    assert requests <= MAX_REQUESTS
    assert len(set(handed)) == len(handed) <= MAX_EVENTS
    assert not known.intersection(handed)
    assert gaps <= 20
    assert len(set(unverified)) == len(unverified)
    assert len(set(unverified) - verified) <= 3


def test_made_up_names() -> None:
    """A server that does not have them is asked for each once, up to a bound."""
    other = Other([])
    _, handed = walk_with(other, [f"${n}" for n in range(5_000)], {"$known"})
    assert (other.requests, len(other.asked), handed) == (10, 500, [])
    assert len(set(other.asked)) == len(other.asked)


# P3
@pytest.mark.parametrize("count", [49, 50, 120])
def test_made_up_names_beside_real_ones(count: int) -> None:
    """Events that others have pushed name them as predecessors: the real ones are found first."""
    for newest in (["$199", *made_up(count)], [*made_up(count), "$199"]):
        other = Other(chain(200))
        _, handed = walk_with(other, newest, {"$known"})
        assert names(handed) == names(other.events.values())
        assert other.requests <= 10


def made_up(count: int) -> list[str]:
    return [f"$made-up{n}" for n in range(count)]


# P3
def test_long_names() -> None:
    """They are asked for in a URL, which has to stay short."""
    walk = Walk([f"${n:0>254}" for n in range(50)], OLDEST_TS)
    walk.to_look_up()
    assert len(walk.wanted()) == 15


def ancestors(events: Iterable[FoundEvent], of: Iterable[str]) -> set[str]:
    """The events behind some, which are not among them unless behind another."""
    by_id = {event.event_id: event for event in events}
    behind: set[str] = set()
    pending = [p for name in of if name in by_id for p in by_id[name].prev_event_ids]
    while pending:
        name = pending.pop()
        if name not in behind:
            behind.add(name)
            pending += by_id[name].prev_event_ids if name in by_id else ()
    return behind


# P3
@given(st.integers())
def test_nothing_behind_a_known_event_is_handed_on(seed: int) -> None:
    """Whichever events are known: those before a join are not, and a page goes on behind it."""
    chance = Random(seed)
    events = history(chance)[: PAGE_EVENTS - 1]
    known = set(chance.sample(names(events), chance.randint(0, min(5, len(events)))))
    referenced = {p for event in events for p in event.prev_event_ids}
    tips = [name for name in names(events) if name not in referenced]
    events.append(found("$newest", tips, PAGE_EVENTS))
    before = {p for event in events if event.event_id in known for p in event.prev_event_ids}
    _, handed = walk_with(Other(events), ["$newest"], known, history=before - known)
    behind = ancestors(events, known)
    assert not set(names(handed)) & (known | behind)


# P3
def test_history_from_before_a_join() -> None:
    """A page reaches far behind the event that is known."""
    other = Other(chain(100))
    _, handed = walk_with(other, ["$99"], {"$95", "$96", "$97"})
    assert names(handed) == ["$98", "$99"]
    assert other.requests == 1


# P3
@pytest.mark.parametrize(
    ("newest", "expected"),
    [(["$98"], ["$fork", "$98"]), (["$97", "$fork"], ["$fork"]), (["$94", "$97"], [])],
)
def test_a_fork_that_began_before_a_join(newest: list[str], expected: list[str]) -> None:
    """It leads to the same history, which is missing here and stays so."""
    events = [*chain(98), found("$fork", ["$94"], 96), found("$98", ["$97", "$fork"], 99)]
    _, handed = walk_with(Other(events), newest, {"$95", "$96", "$97"}, history=["$94"])
    assert names(handed) == expected


# P3
def test_a_gap() -> None:
    """It is named like a newest event, and is filled down to the events that are known."""
    known = {f"${n}" for n in (*range(10), 30, 31)}
    _, handed = walk_with(Other(chain(33)), ["$32", "$29"], known)
    assert names(handed) == [f"${n}" for n in (*range(10, 30), 32)]


# P3
def test_depths_that_are_wrong() -> None:
    """The order is that of the events that each refers to."""
    for depth in (1, 2**53):
        events = chain(60)
        events[30] = found("$30", ["$29"], depth)
        _, handed = walk_with(Other(events), ["$59"], {"$known"})
        assert names(handed) == names(events)


# P3
def test_a_circle() -> None:
    """In old room versions the sender makes up the IDs."""
    circle = [found("$0", ["$1"]), found("$1", ["$0"]), found("$2", ["$1"]), found("$3", ["$3"])]
    _, handed = walk_with(Other([*circle, found("$4")]), ["$2", "$3", "$4"], {"$known"})
    assert names(handed) == ["$4"]


# P3
def test_a_long_absence() -> None:
    """Only as far as anything can be sticky; the first event of the rest has a gap before it."""
    history = [*chain(300, ts=OLDEST_TS - 1)]
    history += [found(f"${n}", [f"${n - 1}"], depth=n + 1) for n in range(300, 330)]
    other = Other(history)
    _, handed = walk_with(other, ["$329"], {"$known"})
    assert names(handed) == [f"${n}" for n in range(300, 330)]
    # A few more pages, since the times may be forged.
    assert other.requests == 3


def test_a_room_in_which_nothing_is_recent() -> None:
    other = Other(chain(300, ts=OLDEST_TS - 1))
    _, handed = walk_with(other, ["$299"], {"$known"})
    assert (handed, other.requests) == ([], 1)


# P3
@pytest.mark.parametrize("count", [1, 60, 100])
def test_times_that_are_wrong(count: int) -> None:
    """An event is at least as new as those that it refers to."""
    events = chain(count + 60)
    for n in range(30, 30 + count):
        events[n] = found(f"${n}", [f"${n - 1}"], n + 1, ts=0)
    _, handed = walk_with(Other(events), [events[-1].event_id], {"$known"})
    assert names(handed) == names(events)


def wide(
    length: int,
    width: int,
    merged_every: int,
    ts: Callable[[int], int] = lambda number: RECENT_TS,
    unverified: Collection[int] = (),
) -> tuple[list[FoundEvent], list[str]]:
    """So many chains that are merged now and then, and their ends."""
    events: list[FoundEvent] = []
    tips = ["$known"] * width

    def add(prev: list[str]) -> str:
        n = len(events)
        server = "unverified" if n in unverified else "a"
        events.append(found(f"${n}", prev, n + 1, ts(n), server))
        return f"${n}"

    while len(events) < length:
        tips = [add([tip]) for tip in tips]
        if len(events) % merged_every < width:
            tips = [add(list(dict.fromkeys(tips)))] * width
    return events, list(dict.fromkeys(tips))


# P3
@given(st.integers(1, 8), st.integers(20, 100), st.integers(MAX_EVENTS, 2 * MAX_EVENTS))
def test_more_than_is_taken(width: int, merged_every: int, length: int) -> None:
    """The newest ones, after one gap in each of the chains."""
    events, tips = wide(length, width, merged_every)
    known, gaps = taken_by_synapse(Other(events), tips, {"$known"})
    assert not set(names(events[-MAX_EVENTS + 20 :])) - known
    assert gaps <= width


# P3
@given(st.integers(1, 8), st.integers(20, 100))
def test_a_long_absence_from_a_wide_room(width: int, merged_every: int) -> None:
    """All that is recent, after one gap in each of the chains."""
    events, tips = wide(300, width, merged_every, ts=lambda n: OLDEST_TS - 150 + n)
    known, gaps = taken_by_synapse(Other(events), tips, {"$known"})
    assert not {e.event_id for e in events if e.origin_server_ts > OLDEST_TS} - known
    assert gaps <= width


# P3
@given(st.integers(1, 3), st.integers(20, 100), st.integers(0, 280), st.integers(1, 3))
def test_events_that_cannot_be_verified(
    width: int, merged_every: int, first: int, count: int
) -> None:
    """Not those themselves, nor the few that follow directly, and all others."""
    unverified = [first + 60 * n for n in range(count)]
    events, tips = wide(300, width, merged_every, unverified=unverified)
    known, _ = taken_by_synapse(Other(events), tips, {"$known"}, ["unverified"])
    assert len(set(names(events)) - known) <= 3 * count * width


def test_nothing_is_asked_if_the_newest_is_known() -> None:
    other = Other(chain(3))
    _, handed = walk_with(other, ["$2"], {"$known", "$0", "$1", "$2"})
    assert (other.requests, handed) == (0, [])


def test_events_that_come_by_themselves_meanwhile() -> None:
    """They are not handed on any more, and count as predecessors."""
    walk = Walk(["$9"], OLDEST_TS)
    walk.know({"$known"}.intersection(walk.to_look_up()))
    walk.take(Other(chain(10)).page(walk.wanted()))
    walk.know({"$known"}.intersection(walk.to_look_up()))
    handed = []
    while (event := walk.next()) is not None:
        if walk.choose(event):
            handed.append(event.event_id)
            walk.took(event, Receipt.ACCEPTED)
            walk.know({"$4", "$5"})
    assert handed == ["$0", "$1", "$2", "$3", "$6", "$7", "$8", "$9"]
    assert walk.counts == {Receipt.ACCEPTED: 8}


def test_events_after_one_that_was_refused() -> None:
    """They are tried a few times: Synapse may find another way to get there."""
    other = Other(chain(30))
    walk, handed = walk_with(other, ["$29"], {"$known"}, {"$0": Receipt.REFUSED})
    assert names(handed) == ["$0", *(f"${n}" for n in range(3, 30))]
    assert walk.counts == {Receipt.ACCEPTED: 27, Receipt.REFUSED: 1}
    refused = dict.fromkeys((f"${n}" for n in range(30)), Receipt.REFUSED)
    _, handed = walk_with(other, ["$29"], {"$known"}, refused)
    assert names(handed) == ["$0", "$3", "$6", "$9", "$12"]


def test_the_newest_event_is_tried_in_any_case() -> None:
    other = Other(chain(3))
    _, handed = walk_with(other, ["$2"], {"$known"}, {"$0": Receipt.REFUSED})
    assert names(handed) == ["$0", "$2"]


# P3
def test_servers_whose_events_cannot_be_verified() -> None:
    """After a few, only servers are left whose events can be."""
    events = [found(f"${n}", server=f"bad{n}" if 0 < n < 9 else "good") for n in range(20)]
    receipts = {f"${n}": Receipt.UNVERIFIED for n in range(1, 9)}
    heads = names(events)
    walk, handed = walk_with(Other(events), heads, {"$known"}, receipts)
    assert len(handed) == 15
    assert walk.counts == {Receipt.ACCEPTED: 12, Receipt.UNVERIFIED: 3}


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (["$a", "$b", "$a"], ["$a", "$b"]),
        (["$a", 1, None, ["$b"], "b", "", "$", "$\0", "$ä", "$a b", "$" + "x" * 300], ["$a"]),
        ("$a", []),
        (None, []),
        ({"$a": 1}, []),
    ],
)
def test_event_ids_in_whatever_comes(named: object, expected: list[str]) -> None:
    assert event_ids_in(named) == expected


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (["$a", "$b"], ("$a", "$b")),
        (["$a", "$a"], None),
        (["$a", 1], None),
        ([], None),
        ([f"${n}" for n in range(21)], None),
        (None, None),
    ],
)
def test_prev_events_that_make_sense(named: object, expected: tuple[str, ...] | None) -> None:
    assert prev_event_ids_in(named) == expected
