"""Which events are judged again, some at a time, while more is decided."""

import attr
from hypothesis import given
from hypothesis import strategies as st

from synapse_sticky.noticing.reviews import Condition, Reviews

ROOMS = ["!a:example.org", "!b:example.org"]
USERS = ["@carol:one.example.org", "@dave:two.example.org"]


@attr.s(auto_attribs=True)
class Event:
    room_id: str
    sender: str
    stream_ordering: int
    judged_by: int = 0


events = st.lists(
    st.builds(
        Event, st.sampled_from(ROOMS), st.sampled_from(USERS), st.integers(-(2**63) + 1, 2**63 - 1)
    ),
    max_size=12,
    unique_by=lambda event: event.stream_ordering,
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("room"), st.sampled_from(ROOMS)),
        st.tuples(st.just("sender"), st.sampled_from(USERS)),
        st.tuples(st.just("server"), st.sampled_from(USERS)),
        st.tuples(st.just("everything"), st.just("")),
        st.tuples(st.just("read"), st.just("")),
        st.tuples(st.just("read and decide"), st.sampled_from(ROOMS)),
        st.tuples(st.just("judge"), st.just("")),
    ),
    max_size=30,
)


class Model:
    """Events in their rooms, and who has decided how often."""

    def __init__(self, found: list[Event], at_once: int) -> None:
        self.events = sorted(found, key=lambda event: event.stream_ordering)
        self.at_once = at_once
        self.decisions = 0
        self.expected = {event.stream_ordering: 0 for event in found}
        self.reviews = Reviews()
        self.reviews.note((event.room_id, 1) for event in found)
        self.read: list[Event] = []

    def decide(self, kind: str, subject: str) -> None:
        """Somebody decides something."""
        self.decisions += 1
        if kind == "room":
            self.reviews.add_rooms([subject])
        elif kind == "sender":
            self.reviews.add_sender(subject)
        elif kind == "server":
            self.reviews.add_server(subject.partition(":")[2])
        else:
            self.reviews.add_everything()
        for event in self.events:
            if subject in ("", event.room_id, event.sender):
                self.expected[event.stream_ordering] = self.decisions

    def read_some(self, decided: str | None = None) -> None:
        """Read the next events, a few. Somebody may decide on a room meanwhile."""
        for search in self.reviews.take_searches():
            rooms = {e.room_id for e in self.events if self._matches(search, e)}
            self.reviews.add_found(search, sorted(rooms))
        if not self.reviews:
            return
        review, (condition, (room_id, done, *arguments)) = self.reviews.next()
        assert condition.startswith("e.room_id = ? AND e.stream_ordering > ? AND (")
        assert isinstance(done, int)
        rest = condition.partition("(")[2].removesuffix(")"), tuple(arguments)
        found = [
            e
            for e in self.events
            if e.room_id == room_id and e.stream_ordering > done and self._matches(rest, e)
        ][: self.at_once]
        if decided is not None:
            self.decide("room", decided)
        full = len(found) == self.at_once
        self.reviews.go_on(review, found[-1].stream_ordering if full else None)
        self.read += found

    def judge(self) -> None:
        """Judge the events that were read, by what is decided now."""
        for event in self.read:
            event.judged_by = self.decisions
        self.read = []

    def _matches(self, events: Condition, event: Event) -> bool:
        condition, arguments = events
        if condition == "TRUE":
            return True
        (wanted,) = arguments
        assert isinstance(wanted, str)
        if condition == "e.sender = ?":
            return event.sender == wanted
        assert condition == "LOWER(e.sender) LIKE ?"
        return event.sender.endswith(wanted.removeprefix("%"))


@given(events, steps, st.integers(1, 4))
def test_in_the_end_all_are_judged_by_the_newest_decision(
    found: list[Event], history: list[tuple[str, str]], at_once: int
) -> None:
    # A1, A4: also what is decided while a slice is read
    model = Model(found, at_once)
    for kind, subject in history:
        if kind == "read":
            model.read_some()
        elif kind == "read and decide":
            model.read_some(subject)
        elif kind == "judge":
            model.judge()
        else:
            model.decide(kind, subject)
    for _ in range(200):
        model.read_some()
        model.judge()
    assert not model.reviews
    for event in found:
        assert event.judged_by >= model.expected[event.stream_ordering]


def test_the_newest_decision_goes_first() -> None:
    # A4: nobody waits for all that is judged again after a start
    reviews = Reviews()
    reviews.note((f"!{number}:example.org", 1) for number in range(100))
    reviews.add_everything()
    reviews.next()
    reviews.add_rooms(["!7:example.org"])
    _, (_, (room_id, *_)) = reviews.next()
    assert room_id == "!7:example.org"


def test_a_decision_meanwhile_begins_again() -> None:
    # A4: what was judged before it is judged once more
    found = [Event(ROOMS[0], USERS[0], number) for number in range(4)]
    model = Model(found, at_once=2)
    model.decide("room", ROOMS[0])
    model.read_some()
    model.judge()
    assert [event.judged_by for event in found] == [1, 1, 0, 0]
    model.decide("room", ROOMS[0])
    while model.reviews:
        model.read_some()
        model.judge()
    assert [event.judged_by for event in found] == [2, 2, 2, 2]


def test_a_decision_while_events_are_read_begins_again() -> None:
    # A4: what an earlier slice has judged is judged once more
    reviews = Reviews()
    reviews.add_rooms(ROOMS[:1])
    first, (_, (_, start)) = reviews.next()
    reviews.go_on(first, 500)
    for done in (1_000, None):
        second, (_, (_, after)) = reviews.next()
        assert after == 500
        reviews.add_rooms(ROOMS[:1])
        reviews.go_on(second, done)
        again, (_, (_, after)) = reviews.next()
        assert after == start
        reviews.go_on(again, 500)
