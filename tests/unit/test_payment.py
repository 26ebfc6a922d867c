"""The payment of what a server is owed: no outcome, and no clock, makes it forget anything."""

import enum
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synapse_sticky.deliverable.index import StickyEvent
from synapse_sticky.servers.confirmation import Reply
from synapse_sticky.servers.payment import (
    MAX_EVENTS,
    NEVER,
    TRANSITIONS,
    Ask,
    Debtor,
    Found,
    Look,
    Outcome,
    Send,
    Sent,
    State,
)
from tests.diagram import drawn, on_page

ROOMS = ["!a:a.example", "!b:a.example", "!c:a.example"]
HOUR_MS = 3_600_000


def event(number: int, room_id: str = ROOMS[0]) -> StickyEvent:
    """A sticky event."""
    return StickyEvent(f"${number}", room_id, 0, number, HOUR_MS, number, owed=True)


# The table


def test_every_state_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(State)
    assert {outcome for outcomes in TRANSITIONS.values() for outcome in outcomes} == set(Outcome)


@pytest.mark.parametrize("state", State)
def test_no_state_is_a_trap(state: State) -> None:
    """From each there is a way to the end, and to each a way from the beginning."""

    def reachable(start: State) -> set[State]:
        found, left = {start}, [start]
        while left:
            new = set(TRANSITIONS[left.pop()].values()) - found
            found |= new
            left += new
        return found

    assert State.SETTLED in reachable(state)
    assert state in reachable(State.SETTLED)


def test_a_slot_is_needed_in_one_state_only() -> None:
    into = {
        (state, outcome)
        for state, outcomes in TRANSITIONS.items()
        for outcome, after in outcomes.items()
        if after is State.SENDING and state is not State.SENDING
    }
    assert into == {(State.CHOSEN, Outcome.TURN)}


def test_the_diagram_shows_the_table() -> None:
    """`python -m tests.diagram` draws it."""
    assert on_page() == drawn()


# Any outcomes


class Mood(enum.Enum):
    """How the simulated server behaves."""

    ANY = enum.auto()
    GOOD = enum.auto()


class World:
    """A server that does anything, and what drives a debtor as the looper does.

    Attributes:
        owed: the events that are not settled, by room.
        kept: those that the server has in its rooms' history.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self.mood = Mood.ANY
        self.now = 0
        self.debtor = Debtor("b.example")
        self.owed: dict[str, list[StickyEvent]] = {room_id: [] for room_id in ROOMS}
        self.kept: set[str] = set()
        self.given_up: set[str] = set()
        self.refusals = dict[str, int]()
        self.join_position = random.choice([0, 50, 10_000])
        self._next_event = 0

    def chance(self, probability: float) -> bool:
        """Whether the server misbehaves now."""
        return self.mood is Mood.ANY and self.random.random() < probability

    def owe(self, room_id: str, count: int) -> None:
        """More events are due."""
        for _ in range(count):
            self._next_event += 1
            self.owed[room_id].append(event(self._next_event, room_id))
        self.debtor.payment(room_id).owe(self.now)

    def disturb(self) -> None:
        """Something happens that the payment did not ask for."""
        room_id = self.random.choice(ROOMS)
        happenings: list[Callable[[], object]] = [
            lambda: self.owe(room_id, self.random.randint(1, 70)),
            lambda: self.debtor.payment(room_id).join(self.now),
            self.debtor.wake,
            lambda: self.debtor.retry(self.now),
            lambda: self.debtor.synapse_ended(self.now),
            lambda: self.debtor.payment(room_id).took_beside(50),
            lambda: setattr(self, "now", self.now + self.random.choice([1, 500, 10_000, 400_000])),
        ]
        self.random.choice(happenings)()

    def settle(self, room_id: str, event_ids: set[str]) -> None:
        """These are settled."""
        self.owed[room_id] = [e for e in self.owed[room_id] if e.event_id not in event_ids]

    def run(self, steps: int) -> bool:
        """Perform steps; whether everything is settled."""
        for _ in range(steps):
            if self.mood is Mood.ANY and self.random.random() < 0.2:
                self.disturb()
            self.check_history()
            step = self.debtor.next(self.now)
            if step is not None:
                self.perform(step)
            elif self.debtor.is_settled:
                return True
            else:
                # Whatever it waits for has a time.
                wake_ts = self.debtor.next_ts
                if self.debtor.history:
                    wake_ts = min(wake_ts, max(self.debtor.history.next_ts, self.now + 1))
                assert wake_ts < NEVER, self.debtor
                assert wake_ts > self.now
                self.now = wake_ts
            self.check_nothing_forgotten()
        return False

    def check_nothing_forgotten(self) -> None:
        """What is owed has a payment, and a slot is held in one room at most."""
        for room_id, events in self.owed.items():
            payment = self.debtor.rooms.get(room_id)
            if events:
                assert payment is not None
                assert payment.state is not State.SETTLED
        sending = [p for p in self.debtor.rooms.values() if p.state is State.SENDING]
        assert not sending, "nothing is sent between two steps"

    def check_history(self) -> None:
        """Ask about what has arrived, as the looper does beside payments."""
        history = self.debtor.history
        if not history or history.next_ts > self.now:
            return
        batch, lost = history.batch(), []
        for checked in batch:
            reply = Reply.HAS if checked.event_id in self.kept else Reply.HAS_NOT
            if self.chance(0.3):
                reply = self.random.choice(list(Reply))
            kept = history.took(checked, reply, self.now)
            if kept is None:
                break
            if kept:
                self.settle(checked.room_id, {checked.event_id})
            else:
                lost.append(checked)
        payment = self.debtor.rooms.get(batch[0].room_id)
        if payment is not None and (lost or not history.has_room(payment.room_id)):
            payment.confirmed(lost, self.now)

    def perform(self, step: Look | Ask | Send) -> None:
        """What the looper does with a step."""
        room_id = step.payment.room_id
        if isinstance(step, Look):
            if self.chance(0.1):
                self.debtor.pause(self.now + 5_000, self.now, "back-off")
                return
            due = self.owed[room_id]
            step.payment.found(
                Found(
                    list(due),
                    None if self.chance(0.1) else True,
                    "$first" if self.chance(0.3) else None,
                    "$newest" if self.chance(0.2) else None,
                    self.join_position,
                ),
                self.now,
            )
            self.debtor.forget_settled()
        elif isinstance(step, Ask):
            reply = Reply.HAS
            if step.event_id.removeprefix("$").isdigit() and step.event_id not in self.kept:
                reply = Reply.HAS_NOT
            if self.chance(0.5):
                reply = self.random.choice(list(Reply))
            self.now += self.random.choice([1, 100, 10_000])
            step.payment.heard(reply, self.now)
            settled, step.payment.settled = step.payment.settled, []
            self.settle(room_id, {e.event_id for e in settled})
        elif self.chance(0.2):
            step.payment.deferred(self.now, self.now + 500)
        elif self.chance(0.2):
            # It waits for a slot.
            self.now += 100
        else:
            self.send(step)

    def send(self, step: Send) -> None:
        """A transaction, whatever comes of it."""
        assert 0 < len(step.events) <= MAX_EVENTS
        assert {e.event_id for e in step.events} <= {
            e.event_id for e in self.owed[step.payment.room_id]
        }
        step.payment.began(step.events)
        self.now += self.random.choice([10, 500, 20_000])
        if self.chance(0.3):
            self.debtor.failed(step, self.now, "it failed", is_alone=self.random.random() < 0.5)
            return
        if self.chance(0.05):
            step.payment.join(self.now)
        count = self.random.randint(1, len(step.events))
        sent = Sent(left=step.events[count:])
        for one in step.events[:count]:
            fate = self.random.random() if self.mood is Mood.ANY else 1
            if fate < 0.1:
                self.refusals[one.event_id] = self.refusals.get(one.event_id, 0) + 1
                sent.refused.append(one)
            elif fate < 0.2:
                sent.missing.append(one)
            else:
                sent.accepted.append(one)
                if fate > 0.3:
                    self.kept.add(one.event_id)
        given_up = {e.event_id for e in step.payment.sent(sent, self.now)}
        self.given_up |= given_up
        self.settle(step.payment.room_id, given_up)


# F1, F7
@settings(deadline=None, max_examples=30)
@given(st.randoms(use_true_random=False), st.integers(0, 300))
def test_nothing_owed_is_forgotten(random: Random, steps: int) -> None:
    """After any outcomes, a server that behaves from then on has everything, and soon."""
    world = World(random)
    for room_id in ROOMS:
        world.owe(room_id, random.randint(0, 120))
    world.run(steps)
    world.mood = Mood.GOOD
    began = world.now
    assert world.run(20_000), world.debtor
    assert not any(world.owed.values())
    assert world.now - began < HOUR_MS
    # Only what it refused several times is given up.
    assert all(world.refusals[event_id] >= 4 for event_id in world.given_up)


# F5a
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 120))
def test_failures_make_tries_rare_and_small(alone: list[bool], count: int) -> None:
    """The more transactions fail in a row, the longer the pause, and if they may be the
    reason they are halved."""
    debtor, now, last_pause, last_size = Debtor("b.example"), 0, 0, MAX_EVENTS
    due = [event(number) for number in range(1, count + 1)]
    debtor.payment(ROOMS[0]).owe(now)
    for is_alone in alone:
        step = debtor.next(now)
        assert isinstance(step, Look)
        step.payment.found(Found(due), now)
        step = debtor.next(now)
        if step is None:
            # All events are set aside by now, and for longer than the server.
            assert debtor.next_ts > now
            break
        assert isinstance(step, Send)
        assert len(step.events) <= last_size
        step.payment.began(step.events)
        debtor.failed(step, now, "it failed", is_alone=is_alone)
        if is_alone:
            last_size = max(1, len(step.events) // 2)
        pause = debtor.not_before - now
        assert pause >= last_pause
        assert debtor.next(now + pause - 1) is None
        now, last_pause = debtor.not_before, pause


# F7
def test_a_poisonous_event_holds_up_no_other() -> None:
    """The one event with which every transaction fails is found, and the others are sent."""
    debtor, now = Debtor("b.example"), 0
    due = {number: event(number) for number in range(1, 41)}
    debtor.payment(ROOMS[0]).owe(now)
    tries = 0
    while len(due) > 1:
        now = max(now, debtor.next_ts)
        step = debtor.next(now)
        if isinstance(step, Look):
            step.payment.found(Found(list(due.values()), join_position=NEVER), now)
        elif isinstance(step, Ask):
            step.payment.heard(Reply.HAS, now)
            for one in [*step.payment.settled, *due.values()]:
                if one in step.payment.settled or one.event_id in debtor.history:
                    due.pop(int(one.event_id.removeprefix("$")), None)
            step.payment.settled = []
        elif isinstance(step, Send):
            step.payment.began(step.events)
            if any(e.event_id == "$17" for e in step.events):
                tries += 1
                debtor.failed(step, now, "it answered 413", is_alone=True)
            else:
                step.payment.sent(Sent(accepted=step.events), now)
    assert list(due) == [17]
    assert tries < 15
    assert now < 120_000


# F2, F7
def test_a_slow_join_loses_nothing() -> None:
    """A server whose join takes half an hour is asked ever more rarely, and paid soon after."""
    debtor, now, questions, tries = Debtor("b.example"), 0, 0, 0
    due = [event(number) for number in range(1, 6)]
    ready_ts = 1_800_000
    first_id: str | None = "$first"
    debtor.payment(ROOMS[0]).join(now)
    while not all(e.event_id in debtor.history for e in due):
        now = max(now, debtor.next_ts)
        step = debtor.next(now)
        if isinstance(step, Look):
            step.payment.found(Found(due, joining_id=first_id, join_position=NEVER), now)
        elif isinstance(step, Ask):
            questions += 1
            outcome = step.payment.heard(Reply.HAS if now >= ready_ts else Reply.HAS_NOT, now)
            first_id = None if outcome is Outcome.READY else first_id
        elif isinstance(step, Send):
            tries += 1
            step.payment.began(step.events)
            # It does not know the room yet, and says so by not naming the events.
            took = step.events if now >= ready_ts else []
            missing = step.events if now < ready_ts else []
            step.payment.sent(Sent(accepted=took, missing=missing), now)
    assert now < ready_ts + 600_000
    assert questions < 60
    assert tries < 20


# F5
@pytest.mark.parametrize("count", [10, 30])
@pytest.mark.parametrize("beside", [0, 60, 80, 81, 100])
def test_having_the_last_does_not_tell_of_all(beside: int, count: int) -> None:
    """The server may have thrown some away: of few it is asked for each, many are sent twice."""
    debtor, due = Debtor("b.example"), [event(number) for number in range(1, count + 1)]
    payment = debtor.payment(ROOMS[0])
    payment.owe(0)
    payment.found(Found(due), 0)
    payment.began(due)
    payment.sent(Sent(accepted=due), 0)
    assert payment.would_lose(91 - count)
    assert not payment.would_lose(90 - count)
    payment.took_beside(beside)
    payment.heard(Reply.HAS, 1_000)
    assert not payment.would_lose(100)
    unclear = [e for e in due if e.event_id in debtor.history]
    may_be_lost = beside > 90 - count
    assert payment.settled == ([] if may_be_lost else due)
    assert unclear == (due if may_be_lost and count == 10 else [])
    if may_be_lost and count == 30:
        payment.found(Found(due), 1_000)
        assert payment.next_ts >= 30_000
        payment.step(payment.next_ts)
        payment.found(Found(due), payment.next_ts)
        assert payment.chosen == due


# F3, F8
def test_one_question_for_each_transaction_of_many() -> None:
    """Of a thousand events that a server missed while it was away."""
    debtor, now, requests = Debtor("b.example"), 0, 0
    due = [event(number) for number in range(1, 1_001)]
    debtor.payment(ROOMS[0]).owe(now)
    while due:
        now = max(now, debtor.next_ts)
        step = debtor.next(now)
        if isinstance(step, Look):
            step.payment.found(Found(list(due)), now)
        elif isinstance(step, Ask):
            step.payment.heard(Reply.HAS, now)
            due = due[len(step.payment.settled) :]
            step.payment.settled = []
        elif isinstance(step, Send):
            step.payment.began(step.events)
            step.payment.sent(Sent(accepted=step.events), now)
        requests += not isinstance(step, Look)
        assert requests < 50
    # Twenty transactions, and one more question for each time it is looked again what is owed.
    assert requests <= 2 * 20 + 2
    assert not debtor.history


# F5
def test_slow_readers_get_nothing_thrice() -> None:
    """A server that reads three events in a second is given the time."""
    debtor, now = Debtor("b.example"), 0
    due = [event(number) for number in range(1, 201)]
    copies = dict.fromkeys((e.event_id for e in due), 0)
    queue: list[str] = []
    read_at: dict[str, float] = {}
    debtor.payment(ROOMS[0]).owe(now)
    while due:
        now = max(now, debtor.next_ts)
        step = debtor.next(now)
        if isinstance(step, Look):
            step.payment.found(Found(list(due), join_position=NEVER), now)
        elif isinstance(step, Ask):
            has = read_at.get(step.event_id, NEVER) <= now
            step.payment.heard(Reply.HAS if has else Reply.HAS_NOT, now)
            # A few that were lost are asked about one by one.
            kept = [e for e in due if e.event_id in debtor.history] + step.payment.settled
            due = [e for e in due if e not in kept]
            step.payment.settled = []
            assert now < 3_600_000
        elif isinstance(step, Send):
            step.payment.began(step.events)
            for one in step.events:
                copies[one.event_id] += 1
                if one.event_id not in read_at:
                    queue.append(one.event_id)
                    begun = max(now, max(read_at.values(), default=0))
                    read_at[one.event_id] = begun + 333
            step.payment.sent(Sent(accepted=step.events), now)
    assert max(copies.values()) <= 2


# F2, F8
def test_many_events_from_before_a_join_are_sent_twice() -> None:
    """So that the server need not be asked for each: they count once the second copy arrived."""
    debtor, now = Debtor("b.example"), 0
    due = [event(number) for number in range(1, 1_001)]
    copies = dict.fromkeys((e.event_id for e in due), 0)
    sent_at: dict[str, int] = {}
    requests = 0
    debtor.payment(ROOMS[0]).owe(now)
    while due:
        now = max(now, debtor.next_ts)
        assert now < 120_000
        step = debtor.next(now)
        if isinstance(step, Look):
            step.payment.found(Found(list(due), join_position=NEVER), now)
            continue
        requests += 1
        if isinstance(step, Ask):
            step.payment.heard(Reply.HAS, now)
            assert all(copies[e.event_id] == 2 for e in step.payment.settled)
            due = [e for e in due if e not in step.payment.settled]
            step.payment.settled = []
        elif isinstance(step, Send):
            step.payment.began(step.events)
            for one in step.events:
                copies[one.event_id] += 1
                assert now - sent_at.setdefault(one.event_id, now) in (0, *range(30_000, 80_000))
            step.payment.sent(Sent(accepted=step.events), now)
    assert set(copies.values()) == {2}
    assert not debtor.history
    # Two transactions for each fifty events, and a question for each transaction.
    assert requests <= 85


class Receiver:
    """A server that takes everything, and a clock that runs from step to step.

    Attributes:
        copies: how often it was sent each event.
        reply: what it answers to every question.
    """

    def __init__(self, count: int) -> None:
        self.debtor = Debtor("b.example")
        self.payment = self.debtor.payment(ROOMS[0])
        self.now = 0
        self.due = [event(number) for number in range(1, count + 1)]
        self.copies = dict.fromkeys((e.event_id for e in self.due), 0)
        self.reply = Reply.HAS
        self.payment.owe(self.now)

    def step(self) -> Look | Ask | Send:
        """Perform the next step, once its time has come; a transaction only begins."""
        self.now = max(self.now, self.debtor.next_ts)
        step = self.debtor.next(self.now)
        assert step is not None
        if isinstance(step, Look):
            step.payment.found(Found(list(self.due)), self.now)
        elif isinstance(step, Ask):
            self.now += 100
            step.payment.heard(self.reply, self.now)
            settled, step.payment.settled = step.payment.settled, []
            self.due = [e for e in self.due if e not in settled]
        return step

    def take(self, step: Send) -> None:
        """Take a transaction."""
        step.payment.began(step.events)
        self.answer(step)

    def answer(self, step: Send) -> None:
        """Accept all of a transaction that has begun."""
        for one in step.events:
            self.copies[one.event_id] += 1
        step.payment.sent(Sent(accepted=step.events), self.now)


# F1, F5
def test_join_during_a_transaction_counts_for_that_one_only() -> None:
    """What the server took before it joined is sent again, and then no more."""
    server, has_joined = Receiver(120), False
    while server.due:
        step = server.step()
        if isinstance(step, Send):
            step.payment.began(step.events)
            if not has_joined:
                has_joined = True
                step.payment.join(server.now)
            server.answer(step)
        assert max(server.copies.values()) <= 2
    assert sorted(server.copies.values()) == [1] * 70 + [2] * 50


# F5
@pytest.mark.parametrize("every", [1, 2, 3])
def test_events_on_their_way_are_not_sent_again_after_a_deferral(every: int) -> None:
    """However often Synapse's queue is first in between."""
    server, tries = Receiver(200), 0
    while server.due:
        step = server.step()
        assert server.now < HOUR_MS
        if isinstance(step, Send):
            tries += 1
            if (every == 1 and tries % 2) or (every > 1 and not tries % every):
                step.payment.deferred(server.now, server.now + 500)
            else:
                server.take(step)
                assert max(server.copies.values()) == 1
    assert set(server.copies.values()) == {1}


# F1
@pytest.mark.parametrize("reply", [Reply.SILENT, Reply.BUSY, Reply.NOT_ASKED])
def test_silence_does_not_tell_that_events_have_arrived(reply: Reply) -> None:
    """They are sent once more, and stay owed to a server that must not be asked."""
    server = Receiver(30)
    server.reply = reply
    while server.due and server.now < HOUR_MS:
        step = server.step()
        if isinstance(step, Send):
            server.take(step)
        if max(server.copies.values()) < 2:
            assert len(server.due) == 30
    if reply is Reply.NOT_ASKED:
        assert server.due
        assert max(server.copies.values()) < 25
    else:
        assert not server.due
        assert set(server.copies.values()) == {2}


# F1
def test_server_that_may_not_tell_yet_is_sent_events_once() -> None:
    """Its join is a faster one: it has read them, and does not tell before it is finished."""
    server = Receiver(30)
    server.reply = Reply.MAY_NOT_TELL
    while server.due:
        step = server.step()
        if isinstance(step, Send):
            server.take(step)
    assert set(server.copies.values()) == {1}


# F7
def test_tries_of_events_that_are_not_owed_any_more_are_forgotten() -> None:
    """Though something else is owed all the time."""
    server = Receiver(20)
    payment = server.payment
    for number in range(21, 2_000):
        server.now = max(server.now, server.debtor.next_ts)
        step = server.debtor.next(server.now)
        if isinstance(step, Look):
            # The oldest expires.
            server.due = [*server.due[1:], event(number)]
            payment.found(Found(list(server.due)), server.now)
        elif isinstance(step, Send):
            payment.began(step.events)
            payment.sent(Sent(missing=step.events, refused=step.events[:1]), server.now)
    assert len(payment._tries) <= 20


# F5a
def test_transaction_with_nothing_to_send_ends_no_pause() -> None:
    """All of its events were redacted or had arrived in the meantime: that says nothing."""
    server = Receiver(60)
    assert isinstance(server.step(), Look)
    step = server.step()
    assert isinstance(step, Send)
    step.payment.began(step.events)
    server.debtor.failed(step, server.now, "it answered 500", is_alone=True)
    failures, limit = server.debtor.failures, server.debtor.limit
    while not isinstance(step := server.step(), Send):
        pass
    step.payment.began(step.events)
    step.payment.sent(Sent(), server.now)
    assert (server.debtor.failures, server.debtor.limit) == (failures, limit)


# F2, F8
def test_what_is_taken_beside_counts_for_what_was_taken_before() -> None:
    """A few plain events now and then do not make it doubtful whether ours have arrived."""
    server = Receiver(1_000)
    while server.due:
        step = server.step()
        if isinstance(step, Send):
            server.take(step)
        server.payment.took_beside(2)
        assert server.now < HOUR_MS
    assert set(server.copies.values()) == {1}
    assert not server.debtor.history


# F1
def test_event_that_the_server_has_rejected_does_not_take_others_along() -> None:
    """Only that one is sent again, ever more rarely; the others count once they are found."""
    server = Receiver(50)
    rejected = server.due[-1]
    while server.now < HOUR_MS:
        history = server.debtor.history
        if history and history.next_ts <= server.now:
            (first, *_) = history.batch()
            has = first.event_id != rejected.event_id
            kept = history.took(first, Reply.HAS if has else Reply.HAS_NOT, server.now)
            if kept:
                server.due = [e for e in server.due if e != first]
            elif kept is False:
                server.payment.confirmed([first], server.now)
        if server.debtor.next(server.now) is None:
            server.now += 500
            continue
        server.reply = Reply.HAS_NOT if rejected in server.payment.awaited else Reply.HAS
        step = server.step()
        if isinstance(step, Send):
            server.take(step)
    assert server.due == [rejected]
    assert 3 <= server.copies.pop(rejected.event_id) <= 8
    assert set(server.copies.values()) == {1}


# F5
def test_one_event_does_not_tell_how_fast_a_server_reads() -> None:
    """Most of the time that it took is that of the requests."""
    server = Receiver(1)
    while server.due:
        step = server.step()
        if isinstance(step, Send):
            server.now += 400
            server.take(step)
            server.now += 400
    assert server.debtor.read_ms == 10


# F1, F5
def test_join_during_a_look_is_not_forgotten() -> None:
    """The look says that the server is not in the room, which it has joined meanwhile."""
    server = Receiver(5)
    step = server.debtor.next(server.now)
    assert isinstance(step, Look)
    server.payment.join(server.now)
    server.payment.found(Found(list(server.due), is_member=False), server.now)
    while server.due:
        step = server.step()
        if isinstance(step, Send):
            server.take(step)
    assert set(server.copies.values()) == {1}


# F5
@pytest.mark.parametrize(
    ("status", "code", "reply"),
    [
        (404, "M_NOT_FOUND", Reply.HAS_NOT),
        (403, "M_FORBIDDEN", Reply.HAS_NOT),
        (404, "M_UNRECOGNIZED", Reply.HAS),
        # A proxy does not let the question through.
        (404, "", Reply.HAS),
        (501, "", Reply.HAS),
        (429, "", Reply.BUSY),
        (502, "", Reply.SILENT),
        (0, "", Reply.SILENT),
    ],
)
def test_errors_of_proxies_tell_nothing_of_an_event(status: int, code: str, reply: Reply) -> None:
    """They have no Matrix code."""
    assert Reply.of_error(status, code) is reply
