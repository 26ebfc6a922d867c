# SPDX-License-Identifier: AGPL-3.0-or-later
"""The payment of what one server is owed, as a machine. No Synapse, no clock.

A :class:`Payment` is what a server is owed in one room. Its states and how they follow each
other stand in one table, :data:`TRANSITIONS`. A :class:`Debtor` is a server with its payments:
it says which of them comes next, and remembers how the last tries ended. Neither does anything;
``looper.py`` performs the steps that they name, and reports the outcomes.
"""

import enum
from collections.abc import Collection, Iterable, Mapping
from typing import Final

import attr

from synapse_sticky.deliverable.index import StickyEvent
from synapse_sticky.servers.confirmation import (
    CHECK_PAUSE_MS,
    MAX_CHECKS,
    READ_MS,
    Arrival,
    History,
    Joining,
    Reply,
    Silence,
)

MAX_EVENTS: Final = 50
"""How many events a transaction has at most, by the specification."""

# How many events may be staged at the server when it is sent more of them.
_MAX_STAGED: Final = 30
# Of that many events at most, which the server may not have, it is asked for each; more are sent
# twice: those from before a join, and those that it may have thrown away.
_MAX_ASKED: Final = 10
# How long after the first copy the second one is sent at least, and at most twice as long: all
# together that were first sent within that time. By then a server has found out what came before
# its join.
_SECOND_COPY_MS: Final = 15_000
# How long a server may take to read a second copy, though it only ignores it: no answer tells when
# it has, for it has the event already. Nothing hurries, and too many at once would be thrown away.
_SECOND_COPY_READ_MS: Final = 40
# A Synapse that throws staged events away keeps the last, and fetches so many before it. So having
# the last does not tell of those before these.
_MAX_FETCHED: Final = 10
# So many copies of an event are enough for a server that takes them and answers no question.
_MAX_SILENT_COPIES: Final = 2
# How many events of a room a Synapse surely keeps staged; it throws most away above 100, which
# other servers send as well.
_MAX_KEPT: Final = 90
# After that many we look again what is owed, and whether the server is still in the room.
_MAX_EVENTS_PER_VISIT: Final = 10 * MAX_EVENTS
# How many refusals make us give an event up, of which one counts in so long a time: Synapse reports
# passing faults so too.
_MAX_REFUSALS: Final = 4
_REFUSAL_COUNTS_MS: Final = 120_000
# How long a room is put off at most after errors of ours, and after how many in a row, in whatever
# rooms, the whole server is.
_LONGEST_ERROR_PAUSE_MS: Final = 60_000
_MAX_ERRORS: Final = 5
_FIRST_PAUSE_MS: Final = 1_000
# So many failures in a row may mean that nobody is there. After that the transactions may be the
# reason: a proxy may hang up on them, or answer for the server.
_MAX_UNCLEAR_FAILURES: Final = 3
_LONGEST_PAUSE_MS: Final = 300_000
# The pause of an event that makes a transaction fail even if it is alone in it.
_ALONE_PAUSE_MS: Final = 5_000
# The pause of an event that a server took twice and does not have: it may be a slow reader. If it
# has rejected the event for good, more copies change nothing.
_TAKEN_PAUSE_MS: Final = 60_000
_LONGEST_TAKEN_PAUSE_MS: Final = 3_600_000
_LONGEST_SERVER_PAUSE_MS: Final = 600_000
# A server that shows that it is back is tried after that part of its pause.
_PART_IF_BACK: Final = 10
# How long Synapse's queue goes first before we take turns with it.
MAX_DEFERRAL_MS: Final = 30_000

NEVER: Final = 1 << 62
"""A time that does not come."""


class State(enum.Enum):
    """The states of a payment."""

    SETTLED = "Nothing is owed"
    DUE = "Something may be owed"
    JOINING = "Waits until the server has finished its join"
    DIGESTING = "Waits until the server has read most of what Synapse's queue sent"
    CHOSEN = "Events are chosen, and wait for the turn and for a slot"
    BEHIND_SYNAPSE = "Waits for Synapse's own queue"
    SENDING = "A transaction is on its way; holds a slot"
    ARRIVING = "Asks whether the events have arrived"
    CONFIRMING = "All events were sent, and the server is asked whether it kept them"
    PAUSED = "Waits before it tries again"


class Outcome(enum.Enum):
    """What can happen to a payment."""

    OWED = "more may be owed"
    JOINED = "the server has joined"
    TIME = "the time has come"
    NOTHING = "nothing is owed"
    NOT_NOW = "nothing can be sent yet"
    SENT_ALL = "all is sent"
    IS_JOINING = "its join is under way"
    IS_DIGESTING = "it has a lot to read"
    CHOSE = "events to send"
    READY = "it is ready"
    NOT_READY = "not yet"
    DEFERRED = "Synapse's queue is first"
    TURN = "turn and slot"
    TAKEN = "it took events"
    ROOM_LEFT = "it can take more"
    NOTHING_TAKEN = "it took none"
    FAILED = "the transaction failed"
    ARRIVED = "they arrived"
    LOST = "they did not arrive"
    CONFIRMED = "it kept them, or not"


TRANSITIONS: Final[dict[State, dict[Outcome, State]]] = {
    State.SETTLED: {Outcome.OWED: State.DUE, Outcome.JOINED: State.DUE},
    State.DUE: {
        Outcome.NOTHING: State.SETTLED,
        Outcome.NOT_NOW: State.PAUSED,
        Outcome.SENT_ALL: State.CONFIRMING,
        Outcome.IS_JOINING: State.JOINING,
        Outcome.IS_DIGESTING: State.DIGESTING,
        Outcome.CHOSE: State.CHOSEN,
        Outcome.TAKEN: State.ARRIVING,
        Outcome.JOINED: State.DUE,
    },
    State.JOINING: {
        Outcome.READY: State.DUE,
        Outcome.NOT_READY: State.JOINING,
        Outcome.JOINED: State.DUE,
    },
    State.DIGESTING: {
        Outcome.READY: State.DUE,
        Outcome.NOT_READY: State.DIGESTING,
        Outcome.LOST: State.PAUSED,
        Outcome.JOINED: State.DUE,
    },
    State.CHOSEN: {
        Outcome.DEFERRED: State.BEHIND_SYNAPSE,
        Outcome.TURN: State.SENDING,
        Outcome.JOINED: State.DUE,
    },
    State.BEHIND_SYNAPSE: {Outcome.TIME: State.DUE, Outcome.JOINED: State.DUE},
    State.SENDING: {
        Outcome.TAKEN: State.ARRIVING,
        Outcome.ROOM_LEFT: State.CHOSEN,
        Outcome.NOTHING_TAKEN: State.DUE,
        Outcome.FAILED: State.PAUSED,
        Outcome.JOINED: State.SENDING,
    },
    State.ARRIVING: {
        Outcome.ARRIVED: State.DUE,
        Outcome.ROOM_LEFT: State.CHOSEN,
        Outcome.NOT_READY: State.ARRIVING,
        Outcome.LOST: State.DUE,
        Outcome.JOINED: State.DUE,
    },
    State.CONFIRMING: {
        Outcome.OWED: State.DUE,
        Outcome.CONFIRMED: State.DUE,
        Outcome.JOINED: State.DUE,
    },
    State.PAUSED: {
        Outcome.OWED: State.DUE,
        Outcome.CONFIRMED: State.DUE,
        Outcome.TIME: State.DUE,
        Outcome.JOINED: State.DUE,
    },
}
"""Which state follows which, by the outcome. What is not here cannot happen."""


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Look:
    """Find out what is owed in a room, and report it to :meth:`Payment.found`."""

    payment: "Payment"


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Ask:
    """Ask the server whether it has an event, and report it to :meth:`Payment.heard`.

    Attributes:
        in_history: whether to ask for it in the room's history: not just as an outlier.
        with_history: whether to ask for it with what came before it there.
    """

    payment: "Payment"
    event_id: str
    in_history: bool = False
    with_history: bool = False


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Send:
    """Send events, oldest first, once there are the turn and a slot.

    Report :meth:`Payment.deferred`, or :meth:`Payment.began` and then how it ended to
    :meth:`Payment.sent` or :meth:`Debtor.failed`.
    """

    payment: "Payment"
    events: list[StickyEvent]


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Sent:
    """How a server answered a transaction.

    Attributes:
        left: the events that did not fit, and are to be sent next. What is in none of these
            lists is not owed any more.
    """

    left: list[StickyEvent] = attr.Factory(list)
    accepted: list[StickyEvent] = attr.Factory(list)
    refused: list[StickyEvent] = attr.Factory(list)
    missing: list[StickyEvent] = attr.Factory(list)


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Found:
    """What a look into a room has found.

    Attributes:
        due: the events to pay, oldest first.
        is_member: whether the server is in the room; None if that is not known yet.
        joining_id: the room's first event, if the server's join may not be finished.
        undigested_id: the newest event of more than the server can have read, if any.
        join_position: where the server joined, if that is known: every single event from
            before is looked for in the room's history.
    """

    due: list[StickyEvent]
    is_member: bool | None = True
    joining_id: str | None = None
    undigested_id: str | None = None
    join_position: int = 0


@attr.s(slots=True, auto_attribs=True)
class _Tries:
    count: int = 0
    refusals: int = 0
    next_refusal_ts: int = 0
    copies: int = 0
    # Whether the server took the first of two copies.
    is_repeated: bool = False
    next_ts: int = 0
    # How many events of others the server had taken in the room before it took this one.
    taken_before: int = 0


@attr.s(slots=True, auto_attribs=True)
class Payment:
    """What one server is owed in one room.

    Attributes:
        next_ts: when it wants to go on; other rooms of the server may come first.
        chosen: the events to send, oldest first.
        awaited: the events that the server took, and that have not arrived as far as we know.
        settled: the events that have arrived and need no check, until they are taken.
    """

    room_id: str
    debtor: "Debtor"
    state: State = State.SETTLED
    next_ts: int = NEVER
    chosen: list[StickyEvent] = attr.Factory(list)
    awaited: list[StickyEvent] = attr.Factory(list)
    settled: list[StickyEvent] = attr.Factory(list)
    _join_position: int = 0
    _tries: dict[str, _Tries] = attr.Factory(dict)
    _question: Arrival | None = None
    _joining: Joining | None = None
    _is_deferred: bool = False
    # Whether the server has joined since the transaction, or the look, began that is under way.
    _joined_meanwhile: bool = False
    # How often in a row the server did not know the room, and until when not to try again.
    _unknown: int = 0
    _not_before: int = 0
    # How many errors of ours there were in a row, and until when not to try again after them.
    _errors: int = 0
    _put_off_until: int = 0
    # Since when the server reads the events that are awaited.
    _reading_since: int = 0
    # Whether many events from before the join were due at once, and whether of any that arrived the
    # server has not shown that it is in the room's history.
    _are_many_early: bool = False
    _has_gaps: bool = False
    # When the second copies are sent of the events that arrive now.
    _second_copy_ts: int = 0
    # How many events of others the server took in all.
    _taken_beside: int = 0
    # Whether it may have thrown some of the awaited events away.
    _may_have_lost: bool = False

    def _become(self, outcome: Outcome, next_ts: int) -> None:
        self.state, self.next_ts = TRANSITIONS[self.state][outcome], next_ts

    # What happens elsewhere.

    def owe(self, now: int) -> None:
        """More events may be owed."""
        if self.state in (State.SETTLED, State.CONFIRMING, State.PAUSED):
            self._become(Outcome.OWED, max(now, self._put_off_until))

    def join(self, now: int) -> None:
        """The server has joined the room: everything is owed, and it may want what it refused."""
        self._joined_meanwhile = True
        self._tries.clear()
        self._drop()
        self._question = self._joining = None
        self._are_many_early = self._has_gaps = False
        self._unknown = self._not_before = 0
        self.debtor.history.forget_room(self.room_id)
        self._become(Outcome.JOINED, now)

    def retry(self, now: int) -> None:
        """Try everything now, whatever pause it is in."""
        self._not_before = self._put_off_until = 0
        for tries in self._tries.values():
            tries.next_ts = 0
        if self.state in _WAITING:
            self._become(Outcome.TIME, now)
        elif self.state is not State.CONFIRMING:
            self.next_ts = min(self.next_ts, now)

    def confirmed(self, lost: list[StickyEvent], now: int) -> list[StickyEvent]:
        """Events were looked for in the room's history; return those to give up."""
        given_up = self._delay(lost, now, "it took the events and does not have them")
        if self.state in (State.CONFIRMING, State.PAUSED):
            self._become(Outcome.CONFIRMED, now)
        return given_up

    def took_beside(self, count: int) -> None:
        """The server took events of this room from Synapse's own queue."""
        self._taken_beside += count
        self._may_have_lost |= self.would_lose(0)

    def would_lose(self, count: int) -> bool:
        """Return whether that many more events would make the server throw some of ours away."""
        if not self.awaited:
            return False
        beside = self._taken_beside - self._tries[self.awaited[0].event_id].taken_before
        return len(self.awaited) + beside + count > _MAX_KEPT

    # Its steps, and how they ended.

    def step(self, now: int) -> Look | Ask | Send:
        """Return what to do next; to be called when :attr:`next_ts` has come."""
        if self.state in _WAITING:
            self._become(Outcome.TIME, now)
        if self.state is State.CHOSEN:
            return Send(self, self.chosen[: self.debtor.limit])
        question = self._joining if self.state is State.JOINING else self._question
        if self.state is State.DUE or question is None:
            self._joined_meanwhile = False
            return Look(self)
        if self.state is not State.ARRIVING:
            return Ask(self, question.event_id)
        in_history = not any(map(self._is_first, self.awaited))
        with_history = not in_history and self.debtor.tells_history
        return Ask(self, question.event_id, in_history, with_history)

    def found(self, found: Found, now: int) -> None:
        """The room was looked into."""
        if self._joined_meanwhile:
            # What was found out is from before.
            self._become(Outcome.JOINED, now)
            return
        self._join_position = found.join_position
        self.chosen = []
        if not found.due or found.is_member is False:
            self.debtor.history.forget_room(self.room_id)
            self._drop()
            self._become(Outcome.NOTHING, NEVER)
            return
        unsent = self._keep_due(found.due)
        times = [self._tries.get(event.event_id, _Tries()).next_ts for event in unsent]
        payable = [event for event, ts in zip(unsent, times, strict=True) if ts <= now]
        next_ts = max(self._not_before, min(times, default=NEVER))
        if self.awaited and (next_ts > now or len(self.awaited) > _MAX_STAGED):
            self._await_arrival(now)
        elif not unsent:
            self._become(Outcome.SENT_ALL, NEVER)
        elif found.is_member is None:
            self._become(Outcome.NOT_NOW, now + _FIRST_PAUSE_MS)
        elif next_ts > now:
            self._become(Outcome.NOT_NOW, next_ts)
        elif found.undigested_id is not None:
            self._question = Arrival.of_others(found.undigested_id, now)
            self._become(Outcome.IS_DIGESTING, now)
        elif self._waits_for_join(found.joining_id, now):
            pass
        else:
            self.chosen = payable[:_MAX_EVENTS_PER_VISIT]
            self._are_many_early |= sum(map(self._is_early, found.due)) > _MAX_ASKED
            self._become(Outcome.CHOSE, now)
        if self.state is not State.CHOSEN:
            self._is_deferred = False

    def _keep_due(self, due: list[StickyEvent]) -> list[StickyEvent]:
        """Forget the events that are not due any more; return the due ones to send."""
        due_ids = {event.event_id for event in due}
        self._tries = {e: tries for e, tries in self._tries.items() if e in due_ids}
        self.awaited = [event for event in self.awaited if event.event_id in due_ids]
        awaited_ids = {event.event_id for event in self.awaited}
        return [
            event
            for event in due
            if event.event_id not in self.debtor.history and event.event_id not in awaited_ids
        ]

    def _await_arrival(self, now: int) -> None:
        """Ask for the events that the server took: for the last, or until it can take more."""
        read_ms, since_ts = self.debtor.read_ms, self._reading_since
        if self._are_second_copies:
            last = self.awaited[-2 - _MAX_FETCHED if len(self.awaited) > 1 + _MAX_FETCHED else -1]
            count, read_ms = len(self.awaited), max(read_ms, _SECOND_COPY_READ_MS)
        else:
            last = self.awaited[-_MAX_STAGED if self.chosen else -1]
            count = self.awaited.index(last) + 1
        self._question = Arrival.of(last.event_id, count, read_ms, since_ts, now)
        self._become(Outcome.TAKEN, self._question.next_ts)

    def _waits_for_join(self, event_id: str | None, now: int) -> bool:
        if event_id is None:
            self._joining = None
            return False
        if self._joining is None:
            self._joining = Joining(event_id, now, now)
        if self._joining.is_unclear:
            return False
        self._become(Outcome.IS_JOINING, self._joining.next_ts)
        return True

    def heard(
        self, reply: Reply, now: int, round_trip_ms: int = 0, before: Collection[str] = ()
    ) -> Outcome:
        """The server has answered the question, after some time; return how the payment goes on.

        Args:
            before: the events before the one asked for that are in the room's history.
        """
        if self.state is State.JOINING and self._joining is not None:
            return self._heard_of_join(self._joining, reply, now)
        question = self._question
        if self.state not in (State.DIGESTING, State.ARRIVING) or question is None:
            # The server has joined again meanwhile.
            return Outcome.JOINED
        has = question.took(reply, now)
        if has is None:
            outcome, next_ts = Outcome.NOT_READY, question.next_ts
        elif self.state is State.DIGESTING:
            outcome = Outcome.READY if has else Outcome.LOST
            next_ts = now if has else now + _FIRST_PAUSE_MS
        elif has:
            if not self._are_second_copies:
                self.debtor.read_ms = question.read_ms(self.debtor.read_ms, now, round_trip_ms)
            self._reading_since = now
            outcome, next_ts = self._arrived(question.event_id, now, before), now
        else:
            self._have_not_arrived(question, now)
            outcome, next_ts = Outcome.LOST, now
        self._become(outcome, next_ts)
        return outcome

    def _have_not_arrived(self, question: Arrival, now: int) -> None:
        """The server does not have the awaited events, as far as it says anything."""
        self._has_gaps = True
        if question.has_answered:
            # It may have the others: it is asked for each, and is sent what it lacks.
            self._find_out(self.awaited, now)
            self._not_before = now + len(self.awaited) * CHECK_PAUSE_MS // MAX_CHECKS
        else:
            enough = _MAX_SILENT_COPIES if question.is_silent else NEVER
            lost = [e for e in self.awaited if self._tries[e.event_id].copies < enough]
            # That the server took the others again has to do.
            self.settled += [event for event in self.awaited if event not in lost]
            self._delay(lost, now, "it took the events and does not have them")
        self._drop()

    def _heard_of_join(self, joining: Joining, reply: Reply, now: int) -> Outcome:
        is_ready = joining.took(reply, now)
        if is_ready is None:
            self.debtor.obstacle = "its join is not finished yet"
            self._become(Outcome.NOT_READY, joining.next_ts)
            return Outcome.NOT_READY
        self._become(Outcome.READY, now)
        return Outcome.READY if is_ready else Outcome.NOT_READY

    def _arrived(self, event_id: str, now: int, before: Collection[str]) -> Outcome:
        """Events up to this one have arrived, some of which are known to be in the history."""
        count = [event.event_id for event in self.awaited].index(event_id) + 1
        if before and count < len(self.awaited):
            # The next question shows whether that one is in the history.
            count -= 1
        # Otherwise those before it were read as well.
        may_have_lost, self._may_have_lost = self._may_have_lost, False
        arrived, self.awaited = self.awaited[:count], self.awaited[count:]
        unsure = [
            event
            for event in arrived
            if (may_have_lost or self._is_first(event)) and event.event_id not in before
        ]
        # Of the one with which an answer begins it does not tell.
        self._has_gaps |= any(event.event_id != event_id for event in unsure)
        once = sum(not self._is_repeated(event) for event in unsure)
        self._find_out(unsure, now, sends_again=once > _MAX_ASKED)
        self.settled += [event for event in arrived if event not in unsure]
        return Outcome.ROOM_LEFT if self.chosen else Outcome.ARRIVED

    def _find_out(self, events: list[StickyEvent], now: int, *, sends_again: bool = False) -> None:
        """The server may have these: send them a second time, or ask for each."""
        once = [e for e in events if not self._is_repeated(e)]
        if self._sends_twice or sends_again:
            self._send_again(once, now)
            events = [event for event in events if event not in once]
        self.debtor.history.add(events, now)

    def _drop(self) -> None:
        """Nothing is chosen or awaited any more."""
        self.chosen, self.awaited, self._may_have_lost = [], [], False

    def _send_again(self, events: list[StickyEvent], now: int) -> None:
        """Send these a second time later: the server ignores those that it has in its history."""
        if self._second_copy_ts < now + _SECOND_COPY_MS:
            self._second_copy_ts = now + 2 * _SECOND_COPY_MS
        for event in events:
            self.debtor.obstacle = "it took the events, and is sent them once more"
            tries = self._tries.setdefault(event.event_id, _Tries())
            tries.is_repeated = True
            tries.next_ts = self._second_copy_ts

    @property
    def _sends_twice(self) -> bool:
        """Whether events from before the join that the server may not have are sent twice."""
        return self._are_many_early and (self._has_gaps or not self.debtor.tells_history)

    def _is_first(self, event: StickyEvent) -> bool:
        """Whether the server may have refused an event, or have it as an outlier.

        It is from before the join, and what was sent is the first copy.
        """
        return self._is_early(event) and not self._is_repeated(event)

    def _is_repeated(self, event: StickyEvent) -> bool:
        """Whether the server took a copy of an event before it is, or was, sent this one."""
        tries = self._tries.get(event.event_id)
        return tries is not None and tries.is_repeated

    @property
    def _are_second_copies(self) -> bool:
        """Whether all awaited events are second copies."""
        return all(map(self._is_repeated, self.awaited))

    def _is_early(self, event: StickyEvent) -> bool:
        """Whether an event is from before the server's join, as far as that is known."""
        return event.position < self._join_position

    def deferred(self, now: int, until_ts: int) -> None:
        """Synapse's own queue goes first."""
        self._is_deferred = True
        self.debtor.obstacle = "Synapse's own queue is sending to it"
        self._become(Outcome.DEFERRED, until_ts)

    @property
    def is_deferred(self) -> bool:
        """Whether Synapse's queue went first, and it is our turn as soon as that has ended."""
        return self._is_deferred

    def began(self, events: list[StickyEvent]) -> None:
        """A transaction with these events is on its way."""
        self._is_deferred = False
        self._joined_meanwhile = False
        if self._joining is not None:
            # Then it is asked again.
            self._joining.is_unclear = False
        self.chosen = self.chosen[len(events) :]
        self._become(Outcome.TURN, NEVER)

    def sent(self, sent: Sent, now: int) -> list[StickyEvent]:
        """The server has answered, or nothing was left to send; return the events to give up."""
        if sent.accepted or sent.refused or sent.missing:
            self.debtor.succeeded(len(sent.accepted))
        if self._joined_meanwhile:
            # What it did with these does not count any more.
            self._become(Outcome.NOTHING_TAKEN, now)
            return []
        self.chosen = sent.left + self.chosen
        for event in sent.accepted:
            tries = self._tries.setdefault(event.event_id, _Tries())
            tries.copies += 1
            tries.taken_before = self._taken_beside
        if not self.awaited:
            self._reading_since = now
        self.awaited += sent.accepted
        self._may_have_lost |= self.would_lose(0)
        self._unknown = 0 if sent.accepted else self._unknown
        given_up = self._delay(sent.refused, now, "it refuses some of the events", refusal=1)
        if sent.missing:
            self._pause_room(now)
        if self.chosen and len(self.awaited) <= _MAX_STAGED:
            self._become(Outcome.ROOM_LEFT, now)
        elif self.awaited:
            # The next transaction must find room beside what is staged then.
            self._await_arrival(now)
        else:
            self._become(Outcome.NOTHING_TAKEN, now)
        return given_up

    def _pause_room(self, now: int) -> None:
        """The server does not know the room: send it nothing there for a while."""
        self.debtor.obstacle = "it does not know the room yet"
        self.chosen = []
        self._unknown += 1
        self._not_before = now + _pause_ms(_FIRST_PAUSE_MS, self._unknown, _LONGEST_PAUSE_MS)

    def failed(self, now: int) -> None:
        """The transaction failed, as :meth:`Debtor.failed` knows."""
        # Those of the transactions before it are taken: now the room's history has to tell.
        if self.awaited:
            self._has_gaps = True
            self._find_out(self.awaited, now)
        self._drop()
        self._become(Outcome.FAILED, now)

    def broke(self, now: int) -> None:
        """A step could not be performed, for an error of ours: let other rooms go first."""
        if self.state is State.SENDING:
            self.failed(now)
        self._errors += 1
        pause_ms = _pause_ms(_FIRST_PAUSE_MS, self._errors, _LONGEST_ERROR_PAUSE_MS)
        self.next_ts = self._put_off_until = now + pause_ms

    def worked(self) -> None:
        """A step was performed."""
        self._errors = self._put_off_until = 0

    def set_aside(self, event: StickyEvent, now: int) -> None:
        """This event makes a transaction fail even if it is alone in it: let others go first."""
        tries = self._tries.setdefault(event.event_id, _Tries())
        tries.count += 1
        tries.next_ts = now + _pause_ms(_ALONE_PAUSE_MS, tries.count, _LONGEST_PAUSE_MS)

    def _delay(
        self, events: Iterable[StickyEvent], now: int, obstacle: str, refusal: int = 0
    ) -> list[StickyEvent]:
        """Try these again after a pause; return those that were refused too often for that."""
        given_up = []
        for event in events:
            self.debtor.obstacle = obstacle
            tries = self._tries.setdefault(event.event_id, _Tries())
            tries.count += 1
            if refusal and now >= tries.next_refusal_ts:
                tries.refusals += refusal
                tries.next_refusal_ts = now + _REFUSAL_COUNTS_MS
            if tries.refusals >= _MAX_REFUSALS:
                given_up.append(event)
                del self._tries[event.event_id]
                continue
            pause_ms = _pause_ms(_FIRST_PAUSE_MS, tries.count, _LONGEST_PAUSE_MS)
            if tries.copies > 1:
                taken_ms = _pause_ms(_TAKEN_PAUSE_MS, tries.copies - 1, _LONGEST_TAKEN_PAUSE_MS)
                pause_ms = max(pause_ms, taken_ms)
            tries.next_ts = now + pause_ms
        return given_up


def _pause_ms(first_ms: int, count: int, longest_ms: int) -> int:
    return min(first_ms << max(0, min(count - 1, 20)), longest_ms)


@attr.s(slots=True, auto_attribs=True)
class Debtor:
    """A server that is owed something, as far as we know.

    Attributes:
        rooms: what it is owed by room.
        history: the events that are still to be found in the history of their rooms.
        silence: whether it answers no questions.
        limit: how many events a transaction may have: fewer after one of ours failed.
        failures: how many transactions have failed in a row.
        not_before: the server is left alone until then.
        obstacle: why the last try came to nothing.
        read_ms: how long it takes to read one event of a transaction.
        tells_history: whether it can be asked what came before an event, as far as we know.
    """

    server_name: str
    rooms: dict[str, Payment] = attr.Factory(dict)
    history: History = attr.Factory(History)
    silence: Silence = attr.Factory(Silence)
    limit: int = MAX_EVENTS
    failures: int = 0
    not_before: int = 0
    obstacle: str = ""
    read_ms: int = READ_MS
    tells_history: bool = True
    # For the log.
    paid: int = 0
    oldest_age_ms: int = 0
    _not_before_if_back: int = 0
    # Until when Synapse's queue goes first; None if it does not.
    _defers_until: int | None = None
    # How many events the server took since it went first for the last time.
    _taken_since: int = 0
    # How many errors of ours there were in a row, in whatever rooms.
    _errors: int = 0

    def payment(self, room_id: str) -> Payment:
        """Return the payment in a room, a new one if there was none."""
        return self.rooms.setdefault(room_id, Payment(room_id, self))

    @property
    def next_ts(self) -> int:
        """When the server wants to go on."""
        return max(self.not_before, min((p.next_ts for p in self.rooms.values()), default=NEVER))

    def next(self, now: int) -> Look | Ask | Send | None:
        """Return what to do next, None if there is nothing to do yet."""
        if not self.rooms or self.next_ts > now:
            return None
        # If Synapse's queue has let us go first, nothing else is to come between.
        can_go_on = [payment for payment in self.rooms.values() if payment.next_ts <= now]
        return min(can_go_on, key=lambda p: (not p.is_deferred, p.next_ts)).step(now)

    def is_busy(self, now: int) -> bool:
        """Return whether it is being sent events, so that Synapse's queue may wait for the end."""
        return now >= self.not_before and any(
            p.state in _BUSY or p.chosen or (p.state in _WAITING and p.next_ts <= now)
            for p in self.rooms.values()
        )

    def would_lose(self, counts: Mapping[str, int]) -> bool:
        """Return whether so many more events, by room, make it throw away what it is reading."""
        return any(
            room_id in self.rooms and self.rooms[room_id].would_lose(count)
            for room_id, count in counts.items()
        )

    @property
    def has_unsent(self) -> bool:
        """Whether anything is still to be sent."""
        return any(p.state not in _SENT_ALL for p in self.rooms.values())

    @property
    def is_settled(self) -> bool:
        """Whether nothing is owed."""
        return not self.rooms and not self.history

    def forget_settled(self) -> None:
        """Forget the rooms in which nothing is owed."""
        for room_id in [p.room_id for p in self.rooms.values() if p.state is State.SETTLED]:
            del self.rooms[room_id]

    def pause(self, until_ts: int, if_back_ts: int, obstacle: str) -> None:
        """Leave the server alone; until an earlier time if it shows that it is back."""
        self.not_before, self._not_before_if_back = until_ts, if_back_ts
        self.obstacle = obstacle

    def wake(self) -> None:
        """The server shows that it is back."""
        self.not_before = min(self.not_before, self._not_before_if_back)

    def retry(self, now: int) -> None:
        """Try everything now, whatever pause it is in."""
        self.not_before = 0
        for payment in self.rooms.values():
            payment.retry(now)

    def broke(self, step: Look | Ask | Send | None, now: int, obstacle: str) -> None:
        """A step could not be performed, for an error of ours."""
        self.obstacle = obstacle
        self._errors += 1
        if step is not None:
            step.payment.broke(now)
        if step is None or self._errors > _MAX_ERRORS:
            until_ts = now + _pause_ms(
                _FIRST_PAUSE_MS, self._errors - _MAX_ERRORS, _LONGEST_ERROR_PAUSE_MS
            )
            self.pause(until_ts, until_ts, obstacle)

    def worked(self, step: Look | Ask | Send) -> None:
        """A step was performed."""
        self._errors = 0
        step.payment.worked()

    def synapse_ended(self, now: int) -> None:
        """A transaction of Synapse's own queue has ended."""
        for payment in self.rooms.values():
            if payment.state is State.BEHIND_SYNAPSE:
                payment.next_ts = now

    def may_defer(self, now: int) -> bool:
        """Return whether Synapse's queue, which is busy, goes first.

        Not for ever: it may get nowhere, or never be done. Then we take turns with it for as many
        events as one visit has.
        """
        if self._defers_until is None:
            self._defers_until, self._taken_since = now + MAX_DEFERRAL_MS, 0
        return now < self._defers_until

    def stop_deferring(self) -> None:
        """Synapse's queue is idle, or is to go first again."""
        self._defers_until = None

    def succeeded(self, taken: int) -> None:
        """The server has taken a transaction, and so many of its events."""
        self._taken_since += taken
        if self._taken_since >= _MAX_EVENTS_PER_VISIT:
            self.stop_deferring()
        self.failures, self.not_before = 0, 0
        self.limit = min(self.limit + 1, MAX_EVENTS)

    def failed(
        self,
        send: Send,
        now: int,
        obstacle: str,
        *,
        is_alone: bool,
        pause_ms: int = 0,
    ) -> None:
        """A transaction has failed as a whole.

        Args:
            is_alone: whether the server was there: then the transaction may be the reason,
                and is halved down to the event with which it fails.
            pause_ms: how long the server wants to be left alone.
        """
        self.failures += 1
        ours_ms = _pause_ms(_FIRST_PAUSE_MS, self.failures, _LONGEST_SERVER_PAUSE_MS)
        if_back_ts = now + max(ours_ms // _PART_IF_BACK, pause_ms)
        self.pause(now + max(ours_ms, pause_ms), if_back_ts, obstacle)
        send.payment.failed(now)
        self.stop_deferring()
        is_alone |= self.failures > _MAX_UNCLEAR_FAILURES
        if is_alone and len(send.events) > 1:
            self.limit = len(send.events) // 2
        elif is_alone:
            # Counted from when the server is tried again: otherwise it would be the first again.
            send.payment.set_aside(send.events[0], self.not_before)


_SENT_ALL: Final = {State.SETTLED, State.CONFIRMING}
_WAITING: Final = {State.PAUSED, State.BEHIND_SYNAPSE}
_BUSY: Final = {State.DUE, State.DIGESTING, State.CHOSEN, State.SENDING}
