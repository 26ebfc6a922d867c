"""How much is released, reviewed and checked again at once."""

import asyncio
from collections.abc import Sequence
from typing import Any

from synapse_sticky.noticing.admission import Admission
from synapse_sticky.noticing.backlog import Backlog
from synapse_sticky.noticing.rechecks import Rechecks
from synapse_sticky.noticing.reviews import Reviews
from synapse_sticky.noticing.throttle import Key, Throttle
from synapse_sticky.seams.authorisation import CurrentStateCheck
from synapse_sticky.seams.background import Clock
from synapse_sticky.storage.rows import RecordedEvent, Rejudged
from synapse_sticky.storage.store import StickyStore

AT_ONCE = 500
SERVER = "elsewhere.example.org"


class Time(Clock):
    """Goes on by a millisecond each time that it is asked."""

    def __init__(self) -> None:
        self.ms = 1_000_000

    def now_ts(self) -> int:
        """The time."""
        self.ms += 1
        return self.ms


class Rows(StickyStore):
    """Held and live events, by room."""

    def __init__(self, rooms: Sequence[str], each: int, reason: str | None) -> None:
        reasons = frozenset({reason} if reason else ())
        self.by_room = {
            room_id: [
                RecordedEvent(f"${room_id}{n}", room_id, f"@u{n}:{SERVER}", n, 10**13, reasons)
                for n in range(each)
            ]
            for room_id in rooms
        }

    async def get_recorded(
        self,
        now_ts: int,
        condition: str = "TRUE",
        arguments: Sequence[object] = (),
        limit: int | None = None,
    ) -> list[RecordedEvent]:
        """Those of a room, after a stream ordering if that is asked for."""
        room_id = str(arguments[0]) if arguments else ""
        after: Any = arguments[1] if "stream_ordering > ?" in condition else -1
        return [e for e in self.by_room.get(room_id, ()) if e.stream_ordering > after][:limit]

    async def get_expiry_by_room(self, now_ts: int) -> list[tuple[str, int]]:
        """All rooms."""
        return [(room_id, 10**13) for room_id in self.by_room]

    async def count_held(self, now_ts: int, reason: str) -> list[tuple[str, str, int]]:
        """As many as there are."""
        return [(room, f"@u:{SERVER}", len(events)) for room, events in self.by_room.items()]

    def forget(self, events: Sequence[Rejudged]) -> None:
        """These are not held any more."""
        for item in events:
            self.by_room[item.event.room_id].remove(item.event)


class Off(Admission):
    """Finds everything switched off, and counts how often it is asked for a room."""

    def __init__(self) -> None:
        self.rooms_asked: list[str] = []

    async def _decided_for_room(self, room_id: str) -> frozenset[str]:
        self.rooms_asked.append(room_id)
        return frozenset({"switched_off"})

    def _decided_for_sender(self, sender: str) -> frozenset[str]:
        return frozenset()


class Nobody(CurrentStateCheck):
    """Knows no event."""

    def __init__(self) -> None:
        pass


def _backlog(store: Rows, throttle: Throttle, admission: Admission) -> tuple[Backlog, Time]:
    clock = Time()
    rechecks = Rechecks(Nobody())
    return Backlog(clock, store, admission, throttle, Reviews(), rechecks), clock


async def _slices(backlog: Backlog, clock: Time, store: Rows, count: int) -> list[int]:
    sizes = []
    for _ in range(count):
        clock.ms += 100
        for take in backlog.takers():
            taken = await take()
            store.forget(taken)
            sizes.append(len(taken))
    return sizes


def test_a_flood_over_many_rooms_is_released_in_slices() -> None:
    # A2: in the order of each room, and no room waits for all of another
    rooms = [f"!{number}:example.org" for number in range(60)]
    store, throttle = Rows(rooms, 300, "over_rate"), Throttle(None, 20_000)
    backlog, clock = _backlog(store, throttle, Off())
    throttle.load({(room_id, SERVER): 300 for room_id in rooms})

    async def play() -> list[int]:
        return await _slices(backlog, clock, store, 60)

    sizes = asyncio.run(play())
    assert max(sizes) <= AT_ONCE
    assert sum(sizes) == 60 * 300
    assert not throttle.keys


def test_nothing_is_left_when_a_slice_ends_within_a_room() -> None:
    # A2
    key: Key = ("!a:example.org", SERVER)
    store, throttle = Rows([key[0]], 3 * AT_ONCE + 1, "over_rate"), Throttle(None, 20_000)
    backlog, clock = _backlog(store, throttle, Off())
    throttle.load({key: 3 * AT_ONCE + 1})

    async def play() -> list[int]:
        return await _slices(backlog, clock, store, 5)

    assert asyncio.run(play())[:4] == [AT_ONCE, AT_ONCE, AT_ONCE, 1]


def test_a_review_goes_on_where_it_was() -> None:
    # A4: each event once, and the settings of a room are read once for a slice
    rooms = ["!a:example.org", "!b:example.org"]
    store, admission = Rows(rooms, 1_200, None), Off()
    clock = Time()
    reviews = Reviews()
    backlog = Backlog(clock, store, admission, Throttle(None, 20_000), reviews, Rechecks(Nobody()))
    reviews.add_rooms(rooms)

    async def play() -> list[list[Rejudged]]:
        slices = []
        while reviews:
            (take,) = backlog.takers()
            slices.append(await take())
        return slices

    slices = asyncio.run(play())
    assert max(map(len, slices)) <= AT_ONCE
    judged = [item.event.event_id for part in slices for item in part]
    assert len(judged) == len(set(judged)) == 2_400
    assert len(admission.rooms_asked) <= len(slices) + len(rooms)


def test_nobody_waits_for_a_pause_but_for_slices_that_nobody_waits_for() -> None:
    # A2, A4: a decision takes effect at once, also between two releases
    key: Key = ("!a:example.org", SERVER)
    store, throttle = Rows([key[0]], 3 * AT_ONCE, "over_rate"), Throttle(None, 20_000)
    clock, reviews = Time(), Reviews()
    backlog = Backlog(clock, store, Off(), throttle, reviews, Rechecks(Nobody()))
    throttle.load({key: 3 * AT_ONCE})

    async def take_all() -> int:
        return len([await take() for take in backlog.takers()])

    assert backlog
    assert asyncio.run(take_all()) == 1
    assert not backlog
    assert backlog.is_left
    assert asyncio.run(take_all()) == 0
    reviews.add_rooms([key[0]])
    assert backlog
    assert asyncio.run(take_all()) == 1
    clock.ms += 100
    assert backlog


class Deciding(Rows):
    """Rows, and an admin who decides on one more user whenever they are asked for rooms."""

    def __init__(self, reviews: Reviews, users: int) -> None:
        super().__init__([], 0, None)
        self._reviews = reviews
        self._users = users

    async def get_rooms(
        self, now_ts: int, condition: str, arguments: Sequence[object]
    ) -> list[str]:
        """None: the users have no sticky events."""
        if self._users:
            self._users -= 1
            self._reviews.add_sender(f"@u{self._users}:{SERVER}")
        return []


def test_decisions_that_come_one_after_the_other() -> None:
    # A6: on users without events, each while the rooms of the one before are looked for
    clock, reviews = Time(), Reviews()
    store = Deciding(reviews, users=3)
    backlog = Backlog(clock, store, Off(), Throttle(None, 20_000), reviews, Rechecks(Nobody()))
    reviews.add_sender(f"@carol:{SERVER}")

    async def play() -> int:
        slices = 0
        while reviews:
            (take,) = backlog.takers()
            assert await take() == []
            slices += 1
        return slices

    assert asyncio.run(play()) <= 4
