"""The index in memory against a naive model of what it has to answer."""

import gc
import tracemalloc
from collections.abc import Iterator

import attr
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synapse_sticky.clients.page import first_due_with, next_page_end
from synapse_sticky.deliverable.index import Due, StickyEvent, StickyIndex, hash_of_sender
from synapse_sticky.protocol import MAX_EVENTS
from synapse_sticky.storage.rows import EventChange, JoinChange

HOUR_MS = 3_600_000
ROOMS = [f"!{letter}:example.org" for letter in "abcd"]
# Few, so that histories often come back to the same event.
EVENT_NUMBERS = range(7)
USERS = [f"@{letter}:example.org" for letter in "xyz"]


def join_change(user_id: str, room_id: str, position: int, expires_ts: int) -> JoinChange:
    """A join as the store reports it; where Synapse has it does not matter here."""
    return JoinChange(
        member=user_id,
        room_id=room_id,
        position=position,
        expires_ts=expires_ts,
        stream_ordering=1,
        instance_name=None,
    )


class Model:
    """What the store holds, as plain rows, with the most naive answers to the questions."""

    def __init__(self) -> None:
        self.now_ts = 1_700_000_000_000
        self.position = self.now_ts
        self.events: dict[str, EventChange] = {}
        self.joins: dict[tuple[str, str], JoinChange] = {}
        self.revisions: dict[str, int] = {}

    def _next_position(self) -> int:
        self.position = max(self.position + 1, self.now_ts)
        return self.position

    def record(self, event_id: str, room_id: str, duration_ms: int, held: bool) -> None:
        """An event is noticed, or changes between held and deliverable."""
        known = self.events.get(event_id)
        position = self._next_position()
        expires_ts = known.expires_ts if known else self.now_ts + duration_ms
        room_id = known.room_id if known else room_id
        self.revisions[event_id] = position
        was_held = known is not None and known.held_reason is not None
        self.events[event_id] = EventChange(
            event_id,
            room_id,
            "@s:example.org",
            None if held else position,
            expires_ts,
            1,
            held_reason="soft_failed" if held or was_held else None,
        )

    def join(self, user_id: str, room_id: str) -> None:
        """A user joins a room."""
        self.joins[user_id, room_id] = join_change(
            user_id, room_id, self._next_position(), self.now_ts + HOUR_MS
        )

    def delete_expired(self) -> None:
        """The clean-up of the tables."""
        gone = [e for e in self.events.values() if e.expires_ts <= self.now_ts]
        for event in gone:
            del self.events[event.event_id]
        self.joins = {k: j for k, j in self.joins.items() if j.expires_ts > self.now_ts}

    def tell(self, index: StickyIndex) -> None:
        """Everything that is new since the index was last told, as the store reads it."""
        after = index.position
        changed = sorted(
            (e for e in self.events.values() if self.revisions[e.event_id] > after),
            key=lambda e: self.revisions[e.event_id],
        )
        joins = sorted(
            (j for j in self.joins.values() if j.position > after), key=lambda j: j.position
        )
        index.apply(
            [e for e in changed if e.expires_ts > self.now_ts],
            [j for j in joins if j.expires_ts > self.now_ts],
            self.position,
        )

    def live(self) -> list[EventChange]:
        """All unexpired events, held or not."""
        return [e for e in self.events.values() if e.expires_ts > self.now_ts]

    def due(self, user_id: str | None, rooms: set[str], since: int) -> list[tuple[int, int, str]]:
        """Where each event that a user has not seen is due, its position, and its id."""
        found = []
        for event in self.live():
            if event.position is None or event.room_id not in rooms:
                continue
            join = self.joins.get((user_id, event.room_id)) if user_id else None
            due_at = max(event.position, join.position if join else 0)
            if due_at > since:
                found.append((due_at, event.position, event.event_id))
        return sorted(found)


@attr.s(auto_attribs=True, frozen=True)
class Record:
    number: int
    room_id: str
    duration_ms: int
    held: bool


@attr.s(auto_attribs=True, frozen=True)
class Join:
    user_id: str
    room_id: str


@attr.s(auto_attribs=True, frozen=True)
class Pass:
    """Time passes; then some of the clean-ups run, if any."""

    ms: int
    index_forgets: bool
    store_deletes: bool


class Tell:
    """The index learns of everything that happened."""


durations = st.sampled_from([1, 500, 10_000, 60_000, HOUR_MS]) | st.integers(1, HOUR_MS)
records = st.builds(
    Record, st.sampled_from(EVENT_NUMBERS), st.sampled_from(ROOMS), durations, st.booleans()
)
joins = st.builds(Join, st.sampled_from(USERS), st.sampled_from(ROOMS))
passes = st.builds(
    Pass,
    st.sampled_from([0, 1, 500, 9_999, 10_000, 60_000, HOUR_MS]) | st.integers(0, HOUR_MS),
    st.booleans(),
    st.booleans(),
)
Step = Record | Join | Pass | Tell
histories = st.lists(records | records | records | joins | passes | st.builds(Tell), max_size=60)


def _run(history: list[Step]) -> Iterator[tuple[Model, StickyIndex]]:
    """Plays a history, and stops at every point where the index knows everything."""
    model, index = Model(), StickyIndex()
    for step in [*history, Tell()]:
        if isinstance(step, Record):
            model.record(f"${step.number}", step.room_id, step.duration_ms, step.held)
        elif isinstance(step, Join):
            model.join(step.user_id, step.room_id)
        elif isinstance(step, Pass):
            model.now_ts += step.ms
            if step.index_forgets:
                index.expire(model.now_ts)
            if step.store_deletes:
                model.delete_expired()
        else:
            model.tell(index)
            yield model, index


def _index_of(*changes: EventChange) -> StickyIndex:
    index = StickyIndex()
    index.apply(changes, [], 100)
    return index


def _change(position: int | None, expires_ts: int) -> EventChange:
    """What the store says of the one event that the following tests are about."""
    return EventChange(
        event_id="$0",
        room_id=ROOMS[0],
        sender=USERS[0],
        position=position,
        expires_ts=expires_ts,
        stream_ordering=1,
    )


def test_an_event_is_due_until_it_expires() -> None:
    # E1, E4: sticky while the end is in the future, and not at the end itself
    index = _index_of(_change(1, 50_000))
    for now_ts, expected in ((49_999, 1), (50_000, 0), (50_001, 0)):
        assert len(index.due(None, {ROOMS[0]}, 0, now_ts)) == expected
        assert len(index.in_room(ROOMS[0], now_ts)) == expected


def test_an_event_that_was_recorded_anew() -> None:
    # E4: what it once was does not take it away
    index = _index_of(_change(1, 50_000))
    index.apply([_change(2, 90_000)], [], 101)
    index.expire(70_000)
    assert [due.position for due in index.due(None, {ROOMS[0]}, 0, 70_000)] == [2]
    index.expire(110_000)
    assert not index.knows("$0")


def test_changes_that_are_read_twice() -> None:
    # C3: a process that starts reads the rows, and the newest of them once more a little later
    changes = [
        EventChange(f"$r{n}", f"!r{n}", "@a:b", position, 90_000, n)
        for n, position in enumerate((10, 20, 30, 40))
    ]
    rooms = {change.room_id for change in changes}
    index = StickyIndex()
    index.apply(changes, [], 20)
    index.apply(changes[2:], [], 40)
    for since in (0, 10, 20, 30, 40):
        found = [due.position for due in index.due(None, rooms, since, 0)]
        assert found == [p for p in (10, 20, 30, 40) if p > since]


def test_an_event_that_was_held() -> None:
    index = _index_of(_change(None, 50_000))
    assert index.knows("$0")
    assert index.held_count == 1
    assert index.due(None, {ROOMS[0]}, 0, 0) == []
    index.apply([_change(2, 50_000)], [], 101)
    assert index.held_count == 0
    assert [due.position for due in index.due(None, {ROOMS[0]}, 0, 0)] == [2]
    index.apply([_change(None, 50_000)], [], 102)
    assert index.held_count == 1
    assert index.due(None, {ROOMS[0]}, 0, 0) == []
    index.expire(60_000)
    assert index.held_count == 0


def _plain(due: list[Due]) -> list[tuple[int, int, str]]:
    return [(d.position, d.event.position, d.event.event_id) for d in due]


@settings(deadline=None, max_examples=400)
@given(histories, st.sets(st.sampled_from([*ROOMS, "!none:example.org"])), st.data())
def test_due_is_what_the_model_says(
    history: list[Step], rooms: set[str], data: st.DataObject
) -> None:
    # C1, C3, C5, C10, E4
    for model, index in _run(history):
        positions = [*model.revisions.values(), *(j.position for j in model.joins.values())]
        since = data.draw(st.sampled_from([model.position, *positions])) + data.draw(
            st.integers(-2, 2)
        )
        many_rooms = rooms | {f"!{number}:elsewhere.org" for number in range(70)}
        for user_id in (*USERS, None):
            for begin in (0, since):
                expected = model.due(user_id, rooms, begin)
                assert _plain(index.due(user_id, rooms, begin, model.now_ts)) == expected
                # The index looks from the shorter side; the answer must not depend on it.
                assert _plain(index.due(user_id, many_rooms, begin, model.now_ts)) == expected


@settings(deadline=None, max_examples=200)
@given(histories)
def test_the_other_questions(history: list[Step]) -> None:
    # E1, E4
    for model, index in _run(history):
        live = model.live()
        for event in live:
            assert index.knows(event.event_id)
            until_ts = 0 if event.position is None else event.expires_ts
            assert index.sticky_until_ts(event.event_id) == until_ts
            found = index.get(event.event_id)
            assert (found.position if found else None) == event.position
            released = event.position is not None and event.held_reason is not None
            assert index.was_held(event.event_id) == released
        deliverable = [event for event in live if event.position is not None]
        for after in (0, *(event.position or 0 for event in deliverable)):
            later = {event.event_id for event in index.after(after)}
            assert later >= {e.event_id for e in deliverable if (e.position or 0) > after}
            assert not later & {e.event_id for e in deliverable if (e.position or 0) <= after}
        for room_id in ROOMS:
            expected = sorted(e.position or 0 for e in deliverable if e.room_id == room_id)
            assert [e.position for e in index.in_room(room_id, model.now_ts)] == expected
            assert room_id in index.rooms or not expected
            for user_id in USERS:
                join = model.joins.get((user_id, room_id))
                if join and join.expires_ts > model.now_ts:
                    assert index.join(user_id, room_id) == join
                    for after in (join.position - 1, join.position):
                        assert (join in index.joins_after(user_id, after)) == (
                            after < join.position
                        )
        # Once it was told to forget, nothing is left of what expired some time ago.
        index.expire(model.now_ts)
        known = {f"${number}" for number in EVENT_NUMBERS if index.knows(f"${number}")}
        assert known >= {event.event_id for event in live}
        for name in known:
            kept = index.get(name)
            assert index.sticky_until_ts(name) == (kept.expires_ts if kept else 0)
            assert kept is None or kept.expires_ts > model.now_ts - 10_000
        assert len(index) == len([name for name in known if index.get(name)])
        assert index.held_count == len(known) - len(index)
    index.expire(model.now_ts + 2 * HOUR_MS)
    assert len(index) == index.held_count == len(index.rooms) == 0
    assert not any(index.join(u, r) for u in USERS for r in ROOMS)


@settings(deadline=None, max_examples=300)
@given(histories, st.integers(1, 7), st.sampled_from(USERS))
def test_pages_deliver_each_event_once_and_in_order(
    history: list[Step], limit: int, user_id: str
) -> None:
    # C3, C4, C10
    rooms = set(ROOMS)
    for model, index in _run(history):
        expected = model.due(user_id, rooms, 0)
        delivered: list[tuple[int, int, str]] = []
        since, pages = 0, 0
        while due := index.due(user_id, rooms, since, model.now_ts):
            end = next_page_end(due, 0, limit)
            page = due[:end]
            assert page
            # Only what is due at one position, which a join makes it, exceeds the limit.
            if end > limit:
                assert len({d.position for d in page[limit - 1 :]}) == 1
            delivered += _plain(page)
            since = page[-1].position
            pages += 1
        assert delivered == expected
        assert pages <= len(expected)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(records, max_size=12), max_size=12), st.integers(1, 5))
def test_pages_while_more_arrives(batches: list[list[Record]], limit: int) -> None:
    # C3, C4, C10
    model, index = Model(), StickyIndex()
    delivered: list[tuple[int, int, str]] = []
    since, number = 0, 0
    pending = list(batches)
    while pending or since < index.position:
        for record in pending.pop(0) if pending else []:
            number += 1
            model.record(f"${number}", record.room_id, HOUR_MS, held=False)
        model.tell(index)
        due = index.due(USERS[0], set(ROOMS), since, model.now_ts)
        end = next_page_end(due, 0, limit)
        assert end <= limit
        delivered += _plain(due[:end])
        since = due[end].position - 1 if end < len(due) else index.position
    assert delivered == model.due(USERS[0], set(ROOMS), 0)


def _due(group_sizes: list[int]) -> list[Due]:
    """As many events due at position 1, at 2, and so on."""
    return [
        Due(
            position,
            StickyEvent(f"${position}-{n}", ROOMS[0], hash(USERS[0]), position, HOUR_MS, 1, True),
        )
        for position, size in enumerate(group_sizes, start=1)
        for n in range(size)
    ]


@given(st.lists(st.integers(1, 6), max_size=20), st.integers(0, 25), st.integers(1, 200))
def test_where_a_page_ends(group_sizes: list[int], start: int, limit: int) -> None:
    # C4, C5
    due = _due(group_sizes)
    start = min(start, len(due))
    end = next_page_end(due, start, limit)
    assert start <= end <= len(due)
    # It takes as much as it may, and what is due at one position is not torn apart.
    assert end - start >= min(limit, len(due) - start)
    assert end in (start, len(due)) or due[end - 1].position != due[end].position
    assert end - start < limit + 6


@given(st.lists(st.integers(1, 4), max_size=12), st.data())
def test_where_what_must_wait_begins(group_sizes: list[int], data: st.DataObject) -> None:
    # C3: nothing due at the position of an event that must wait may be handed out
    due = _due(group_sizes)
    waiting = {d.event.event_id for d in due if data.draw(st.booleans())}
    begin = first_due_with(due, waiting)
    assert all(d.event.event_id not in waiting for d in due[:begin])
    assert begin in (0, len(due)) or due[begin - 1].position != due[begin].position
    if begin < len(due):
        # And no sooner than there.
        here = [d.event.event_id for d in due if d.position == due[begin].position]
        assert waiting.intersection(here)


def test_a_page_has_a_hundred_events() -> None:
    # C4
    assert MAX_EVENTS == 100


# What it costs


def _changes(first: int, count: int, expires_ts: int) -> Iterator[EventChange]:
    """Changes as they come from the database: with strings of their own."""
    for number in range(first, first + count):
        yield EventChange(
            f"${number:043}",
            f"!{number % 200:042}:example.org",
            f"@user{number % 2_000:010}:example.org",
            number + 1,
            expires_ts,
            number + 1,
        )


def _traced_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.fixture
def _tracing() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("_tracing")
def test_memory_of_live_events() -> None:
    before = _traced_bytes()
    index = StickyIndex()
    for first in range(0, 20_000, 1_000):
        index.apply(_changes(first, 1_000, HOUR_MS), [], first + 1_000)
    assert len(index) == 20_000
    assert len(index.rooms) == 200
    assert (_traced_bytes() - before) / 20_000 <= 500
    index.expire(2 * HOUR_MS)
    assert len(index) == 0
    # Hash tables keep some of the space they once had.
    assert _traced_bytes() - before < 2_000_000


@pytest.mark.usefixtures("_tracing")
@pytest.mark.slow
def test_memory_does_not_grow_with_what_was() -> None:
    # E4
    index = StickyIndex()
    sizes = {}
    for minute in range(30):
        # 500 events a minute, sticky for five minutes each: at most 3,000 at a time.
        expires_ts = (minute + 5) * 60_000
        position = minute * 500
        joins = [
            join_change(f"@u{minute}-{n}:example.org", ROOMS[n % 4], position + n, expires_ts)
            for n in range(100)
        ]
        index.apply(_changes(position, 500, expires_ts), joins, position + 500)
        index.expire(minute * 60_000)
        if minute in (10, 11, 12, 27, 28, 29):
            sizes[minute] = _traced_bytes()
    assert len(index) <= 3_500
    # Its lists are cleared now and then only, so not every minute is like the other.
    assert max(sizes[27], sizes[28], sizes[29]) < 1.3 * max(sizes[10], sizes[11], sizes[12])


def test_hashes_of_senders_are_the_same_in_every_process() -> None:
    # X8: a token that one process writes may be read by another
    assert hash_of_sender("@user:example.org") == 4_103_850_528_808_804_283
    assert len({hash_of_sender(f"@{number}:example.org") for number in range(5_000)}) == 5_000
