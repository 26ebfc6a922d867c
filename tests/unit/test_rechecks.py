"""Which changes of a room's state make which soft-failed events be checked again."""

import asyncio
from collections.abc import Iterable, Mapping

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
        self._types = types
        self.authorised: set[str] = set()
        self.asked: list[str] = []

    async def authorised_by(self, event_id: str) -> frozenset[tuple[str, str]]:
        """What was said of it."""
        return frozenset(self._types[event_id])

    async def allows(self, event_id: str) -> bool:
        """Whether it is among those."""
        self.asked.append(event_id)
        return event_id in self.authorised


def held(number: int, room_id: str = ROOMS[0], expires_ts: int = 1_000) -> RecordedEvent:
    """A soft-failed event."""
    return RecordedEvent(
        f"${number}", room_id, CAROL, number, expires_ts, frozenset({"soft_failed"})
    )


def watching(types: Mapping[str, Iterable[tuple[str, str]]], *items: RecordedEvent) -> Rechecks:
    """Looks after these events."""
    rechecks = Rechecks(Check(types))
    asyncio.run(rechecks.watch(items))
    return rechecks


def test_only_what_authorises_an_event_matters() -> None:
    # K1: not the name of the room, another's membership, or anything in another room
    item = held(1)
    rechecks = watching({"$1": [LEVELS, ("m.room.member", CAROL)]}, item)
    for type, state_key in KEYS:
        expected = [item] if (type, state_key) in KEYS[:2] else []
        assert rechecks.affected([StateChange(ROOMS[0], type, state_key)]) == expected
        assert rechecks.affected([StateChange(ROOMS[1], type, state_key)]) == []
    # An empty state key is not any state key.
    assert rechecks.affected([StateChange(ROOMS[0], "m.room.member", "")]) == []
    assert rechecks.affected([StateChange(ROOMS[0], "m.room.power_levels", CAROL)]) == []
    assert rechecks.affected([]) == []


def test_those_that_pass() -> None:
    # K1: asked is about these only, and what does not pass is looked after further
    check = Check({f"${n}": [LEVELS] for n in range(3)})
    rechecks = Rechecks(check)
    items = [held(n) for n in range(3)]
    asyncio.run(rechecks.watch(items))
    check.authorised = {"$0", "$1"}
    change = StateChange(ROOMS[0], *LEVELS)
    assert asyncio.run(rechecks.passing(items[1:])) == [items[1]]
    assert check.asked == ["$1", "$2"]
    rechecks.forget([items[1]])
    assert rechecks.affected([change]) == [items[0], items[2]]


@attr.s(auto_attribs=True, frozen=True)
class Watch:
    item: RecordedEvent
    types: frozenset[tuple[str, str]]


@attr.s(auto_attribs=True, frozen=True)
class Forget:
    number: int


@attr.s(auto_attribs=True, frozen=True)
class Expire:
    now_ts: int


watches = st.builds(
    Watch,
    st.builds(held, st.integers(0, 9), st.sampled_from(ROOMS), st.integers(0, 100)),
    st.frozensets(st.sampled_from(KEYS)),
)
forgets, expiries = st.builds(Forget, st.integers(0, 9)), st.builds(Expire, st.integers(0, 100))
changes = st.builds(
    lambda room_id, key: StateChange(room_id, *key), st.sampled_from(ROOMS), st.sampled_from(KEYS)
)


@given(st.lists(watches | watches | forgets | expiries), st.lists(changes, max_size=3))
def test_affected_is_what_the_model_says(
    history: list[Watch | Forget | Expire], news: list[StateChange]
) -> None:
    # K1: each once, in the order of arrival
    types: dict[str, frozenset[tuple[str, str]]] = {}
    rechecks = Rechecks(Check(types))
    model: dict[str, RecordedEvent] = {}
    for step in history:
        if isinstance(step, Watch):
            # An event is in one room, and does not change.
            if step.item.event_id not in types:
                types[step.item.event_id] = step.types
                model[step.item.event_id] = step.item
                asyncio.run(rechecks.watch([step.item]))
        elif isinstance(step, Forget):
            item = model.pop(f"${step.number}", None) or held(step.number)
            rechecks.forget([item])
        else:
            model = {e: item for e, item in model.items() if item.expires_ts > step.now_ts}
            rechecks.expire(step.now_ts)
        assert set(rechecks.rooms) == {item.room_id for item in model.values()}
    changed = {(change.room_id, change.type, change.state_key) for change in news}
    expected = [
        item
        for item in sorted(model.values(), key=lambda item: item.stream_ordering)
        if any((item.room_id, *key) in changed for key in types[item.event_id])
    ]
    assert rechecks.affected(news) == expected
    rechecks.clear()
    assert not rechecks.rooms
    assert rechecks.affected(news) == []
