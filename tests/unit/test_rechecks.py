"""Which changes of a room's state make which soft-failed events be checked again."""

import asyncio
from collections.abc import Collection, Iterable, Mapping

import attr
from hypothesis import given
from hypothesis import strategies as st

from synapse_sticky.noticing.rechecks import Rechecks
from synapse_sticky.seams.authorisation import CurrentStateCheck
from synapse_sticky.seams.contents import StateChange
from synapse_sticky.storage.rows import RecordedEvent

ROOMS = ["!a:example.org", "!b:example.org"]
CAROL, DAVE = "@carol:example.org", "@dave:example.org"
LEVELS = ("m.room.power_levels", "")
KEYS = [LEVELS, ("m.room.member", CAROL), ("m.room.member", DAVE), ("m.room.name", "")]


class Check(CurrentStateCheck):
    """Knows by what events are authorised, as it was told, and which are at present."""

    def __init__(self, types: Mapping[str, Iterable[tuple[str, str]]]) -> None:
        self.types = {event_id: frozenset(keys) for event_id, keys in types.items()}
        self.authorised: set[str] = set()
        self.asked: list[str] = []
        self.most_at_once = 0

    async def authorised_by(
        self, event_ids: Collection[str]
    ) -> dict[str, frozenset[tuple[str, str]]]:
        """What was said of them."""
        self.most_at_once = max(self.most_at_once, len(event_ids))
        return {event_id: self.types[event_id] for event_id in event_ids if event_id in self.types}

    async def allowed(self, event_ids: Collection[str]) -> set[str]:
        """Those that are authorised."""
        self.asked += event_ids
        return {event_id for event_id in event_ids if event_id in self.authorised}


def held(
    number: int, room_id: str = ROOMS[0], expires_ts: int = 1_000, sender: str = CAROL
) -> RecordedEvent:
    """A soft-failed event."""
    return RecordedEvent(
        f"${number}", room_id, sender, number, expires_ts, frozenset({"soft_failed"})
    )


class Rows:
    """The rows of soft-failed events."""

    def __init__(self, *events: RecordedEvent) -> None:
        self.events = list(events)

    async def find(self, room_id: str, after: int, limit: int) -> list[RecordedEvent]:
        """Those of a room, in order."""
        found = [e for e in self.events if e.room_id == room_id and e.stream_ordering > after]
        return sorted(found, key=lambda event: event.stream_ordering)[:limit]

    def check_all(self, rechecks: Rechecks) -> list[str]:
        """Check what is due; the IDs of those that pass, in their order."""
        passed = []
        while rechecks:
            passing = asyncio.run(rechecks.take_passing(self.find))
            passed += [event.event_id for event in passing]
            self.events = [event for event in self.events if event not in passing]
        return passed


def watching(check: Check, rows: Rows) -> Rechecks:
    """Looks after the events of these rows."""
    rechecks = Rechecks(check)
    rechecks.add(rows.events)
    rows.check_all(rechecks)
    check.asked.clear()
    return rechecks


def test_only_what_authorises_an_event_matters() -> None:
    # K1: not the name of the room, another's membership, or anything in another room
    check, rows = Check({"$1": [LEVELS, ("m.room.member", CAROL)]}), Rows(held(1))
    rechecks = watching(check, rows)
    # An empty state key is not any state key.
    others = [("m.room.member", ""), ("m.room.power_levels", CAROL)]
    for key in KEYS + others:
        for room_id in ROOMS:
            rechecks.on_changes([StateChange(room_id, *key)])
            assert bool(rechecks) == (room_id == ROOMS[0] and key in KEYS[:2])
            assert rows.check_all(rechecks) == []
    assert check.asked == ["$1"] * 2


def test_those_that_pass() -> None:
    # K1: what does not pass is looked after further, in the order of arrival
    check = Check({f"${n}": [LEVELS] for n in range(3)})
    rows = Rows(*(held(n) for n in range(3)))
    rechecks = watching(check, rows)
    check.authorised = {"$0", "$1"}
    rechecks.on_changes([StateChange(ROOMS[0], *LEVELS)])
    assert rows.check_all(rechecks) == ["$0", "$1"]
    check.authorised = {"$2"}
    rechecks.on_changes([StateChange(ROOMS[0], *LEVELS)])
    assert rows.check_all(rechecks) == ["$2"]


def test_many_are_checked_a_slice_at_a_time() -> None:
    # K1: news wait for one slice only; and events that are gone cost one look
    count = 2_000
    check = Check({f"${n}": [LEVELS, ("m.room.member", CAROL)] for n in range(0, count, 2)})
    rows = Rows(*(held(n) for n in range(count)))
    rechecks = Rechecks(check)
    rechecks.add(rows.events)
    assert rows.check_all(rechecks) == []
    assert check.asked == [f"${n}" for n in range(0, count, 2)]
    check.authorised = {f"${n}" for n in range(count)}
    rechecks.on_changes([StateChange(ROOMS[0], *LEVELS)])
    assert rows.check_all(rechecks) == [f"${n}" for n in range(0, count, 2)]
    assert check.most_at_once <= 200


def test_a_change_while_others_are_checked() -> None:
    # K1: what was checked before the change is checked once more
    count = 500
    check = Check({f"${n}": [LEVELS] for n in range(count)})
    rows = Rows(*(held(n) for n in range(count)))
    rechecks = watching(check, rows)
    rechecks.on_changes([StateChange(ROOMS[0], *LEVELS)])
    assert asyncio.run(rechecks.take_passing(rows.find)) == []
    check.authorised = {"$1", "$499"}
    rechecks.on_changes([StateChange(ROOMS[0], *LEVELS)])
    assert rows.check_all(rechecks) == ["$1", "$499"]


def test_rooms_take_turns() -> None:
    # K1: a room with many does not hold up another
    check = Check({f"${n}": [LEVELS] for n in range(1_001)})
    rows = Rows(*(held(n) for n in range(1_000)), held(1_000, ROOMS[1]))
    rechecks = watching(check, rows)
    rechecks.on_changes(StateChange(room_id, *LEVELS) for room_id in ROOMS)
    for _ in range(2):
        asyncio.run(rechecks.take_passing(rows.find))
    assert "$1000" in check.asked


@attr.s(auto_attribs=True, frozen=True)
class Watch:
    item: RecordedEvent
    types: frozenset[tuple[str, str]]


@attr.s(auto_attribs=True, frozen=True)
class Expire:
    now_ts: int


watches = st.builds(
    Watch,
    st.builds(
        held,
        st.integers(0, 9),
        st.sampled_from(ROOMS),
        st.integers(0, 100),
        st.sampled_from([CAROL, DAVE]),
    ),
    st.frozensets(st.sampled_from(KEYS), min_size=1),
)
expiries = st.builds(Expire, st.integers(0, 100))
changes = st.builds(
    lambda room_id, key: StateChange(room_id, *key), st.sampled_from(ROOMS), st.sampled_from(KEYS)
)


@given(st.lists(watches | watches | expiries), st.lists(changes, max_size=3))
def test_those_that_may_pass_are_checked(
    history: list[Watch | Expire], news: list[StateChange]
) -> None:
    # K1: each that depends on what has changed is checked, once, in the order of arrival
    check, rows = Check({}), Rows()
    rechecks = Rechecks(check)
    for step in history:
        if isinstance(step, Expire):
            rows.events = [event for event in rows.events if event.expires_ts > step.now_ts]
            rechecks.expire(step.now_ts)
        elif step.item.event_id not in check.types:
            # An event is in one room, and does not change.
            check.types[step.item.event_id] = step.types
            rows.events.append(step.item)
            rechecks.add([step.item])
            rows.check_all(rechecks)
        assert rechecks.rooms >= {event.room_id for event in rows.events}
    check.asked.clear()
    rechecks.on_changes(news)
    rows.check_all(rechecks)
    changed = {(change.room_id, change.type, change.state_key) for change in news}
    for room_id in ROOMS:
        in_room = sorted(
            (event for event in rows.events if event.room_id == room_id),
            key=lambda event: event.stream_ordering,
        )
        asked = [event.event_id for event in in_room if event.event_id in check.asked]
        assert [e for e in check.asked if e in {x.event_id for x in in_room}] == asked
        matter = {
            event.event_id
            for event in in_room
            if any((room_id, *key) in changed for key in check.types[event.event_id])
        }
        # All events of their senders are.
        assert matter <= set(asked)
        senders = {event.sender for event in in_room if event.event_id in matter}
        if not any(isinstance(step, Expire) for step in history):
            assert {e.sender for e in in_room if e.event_id in asked} == senders
    rechecks.clear()
    assert not rechecks.rooms
    rechecks.on_changes(news)
    assert not rechecks
