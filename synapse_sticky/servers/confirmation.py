# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a server's answers mean, how often to ask, and until when. No Synapse, no clock.

That a server took events does not say that it has them: Synapse stages them, throws most away
if too many are staged, and ignores all of a room that it is still joining. So it is asked whether
they have arrived. And one that has an event need not have it in the room's history: it may have
refused it, because it could not make out at that moment what came before, and have fetched it
as a mere outlier, which no client sees. So that is asked too, without haste.
"""

import enum
from collections.abc import Iterable
from typing import Final

import attr

from synapse_sticky.deliverable.index import StickyEvent

MAX_CHECKS: Final = 5
"""How many events are checked at a time: a receiving Synapse answers ten questions a second
before it slows a server down."""
CHECK_PAUSE_MS: Final = 1_000
_SILENT_CHECK_PAUSE_MS: Final = 10_000
_MAX_SILENT_CHECKS: Final = 3

READ_MS: Final = 10
"""How long a server takes to read an event at least; every question keeps it from reading."""

_LONGEST_READ_MS: Final = 300
# One event tells nothing: most of the time is that of the requests.
_MIN_TO_LEARN_FROM: Final = 10
_FIRST_PAUSE_MS: Final = 40
_LONGEST_PAUSE_MS: Final = 2_000
# How long a server may take to read a transaction, beyond the time that it took so far: what it
# has thrown away does not come later.
_MAX_DIGESTION_MS: Final = 10_000
# How long to ask for an event before we look again whether there is still a lot to read.
_MAX_LOOK_MS: Final = 5_000
# How long to ask, if the server may not tell yet: then it has read them.
_MAX_SILENCE_MS: Final = 2_000
_BUSY_PAUSE_MS: Final = 5_000
# How long a server is asked nothing that did not answer: so long at first, and twice as long then.
_FIRST_SILENCE_MS: Final = 15_000
_LONGEST_SILENCE_MS: Final = 300_000
# How long a server is only asked whether its join is finished. After that it is sent the events
# now and then all the same, for not every server can be asked.
_JOIN_PATIENCE_MS: Final = 120_000
_FIRST_JOIN_PAUSE_MS: Final = 100
_LONGEST_JOIN_PAUSE_MS: Final = 30_000

_MAY_NOT_TELL: Final = "M_UNABLE_DUE_TO_PARTIAL_STATE"
_UNRECOGNIZED: Final = "M_UNRECOGNIZED"


class Reply(enum.Enum):
    """What a server says to the question whether it has an event."""

    HAS = "has"
    """It has the event, or does not know the question: it is taken at its word then."""
    HAS_NOT = "has_not"
    MAY_NOT_TELL = "may_not_tell"
    """Its join to the room is a faster one and still under way."""
    BUSY = "busy"
    """It is asked too much."""
    SILENT = "silent"
    """It does not answer."""
    NOT_ASKED = "not_asked"
    """Synapse is backing off from it, and an answer would end that: there was no question."""

    @classmethod
    def of_error(cls, status: int, code: str) -> "Reply":
        """Return what an error means, by its HTTP status (0 is no answer) and Matrix code."""
        if code == _MAY_NOT_TELL:
            return cls.MAY_NOT_TELL
        if status == 429:
            return cls.BUSY
        if not 400 <= status < 500 and status != 501:
            return cls.SILENT
        # Without a Matrix code it is no server's answer, but that of a proxy which does not let
        # the question through.
        does_not_know = not code or code == _UNRECOGNIZED or status in (405, 501)
        return cls.HAS if does_not_know else cls.HAS_NOT


@attr.s(slots=True, auto_attribs=True)
class Arrival:
    """Asks a server for an event that it took until it has it, for a bounded time.

    Attributes:
        next_ts: when to ask; not before the server can have read as many events as it took.
        is_silent: whether it has answered nothing so far.
        has_answered: whether it has said anything about the event so far.
    """

    event_id: str
    next_ts: int
    _sent_ts: int
    _limit_ms: int
    _count: int = 1
    _pause_ms: int = _FIRST_PAUSE_MS
    is_silent: bool = True
    has_answered: bool = False

    @classmethod
    def of(cls, event_id: str, count: int, read_ms: int, since_ts: int, now: int) -> "Arrival":
        """Begin to ask for the last of so many events of ours.

        Args:
            read_ms: how long the server takes to read one of them, as far as we know.
            since_ts: since when it has read them, or those before them.
        """
        wait_ms = count * read_ms
        # It may have finished long ago.
        since_ts = max(since_ts, now - wait_ms)
        pause_ms = max(_FIRST_PAUSE_MS, wait_ms // 4)
        limit_ms = wait_ms + _MAX_DIGESTION_MS
        return cls(event_id, since_ts + wait_ms, since_ts, limit_ms, count, pause_ms)

    @classmethod
    def of_others(cls, event_id: str, now: int) -> "Arrival":
        """Begin to ask for an event of Synapse's queue, which the server may throw away."""
        return cls(event_id, now, now, _MAX_LOOK_MS)

    def took(self, reply: Reply, now: int) -> bool | None:
        """Return whether the event has arrived; None if that is to be asked again."""
        waited_ms = now - self._sent_ts
        if reply is Reply.HAS:
            return True
        self.is_silent &= reply in (Reply.SILENT, Reply.BUSY)
        self.has_answered |= reply in (Reply.HAS_NOT, Reply.MAY_NOT_TELL)
        if reply is Reply.MAY_NOT_TELL and waited_ms >= _MAX_SILENCE_MS:
            # That the server took it has to do.
            return True
        if waited_ms >= self._limit_ms:
            return False
        self.next_ts = now + (_BUSY_PAUSE_MS if reply is Reply.BUSY else self._pause_ms)
        self._pause_ms = min(self._pause_ms * 3 // 2, _LONGEST_PAUSE_MS)
        return None

    def read_ms(self, before_ms: int, now: int, round_trip_ms: int) -> int:
        """Return how long the server takes to read an event, if they have arrived by now.

        Args:
            before_ms: how long, as far as was known before.
            round_trip_ms: how long the last question took.
        """
        if self._count < _MIN_TO_LEARN_FROM:
            return before_ms
        took_ms = (now - round_trip_ms - self._sent_ts) // self._count
        if not self.has_answered:
            # It had them when it was asked first, which may have been late.
            took_ms = min(took_ms, before_ms) * 9 // 10
        return max(READ_MS, min(took_ms, _LONGEST_READ_MS))


@attr.s(slots=True, auto_attribs=True)
class Joining:
    """Asks a server whether its join is finished, ever more rarely.

    Until then it does not tell us even of the room's first event, for it does not know that we
    are in the room.

    Attributes:
        event_id: the room's first event.
        next_ts: when to ask.
        since_ts: when it was asked first.
        is_unclear: whether the last answer led nowhere: sending will tell.
    """

    event_id: str
    next_ts: int
    since_ts: int
    is_unclear: bool = False
    _pause_ms: int = _FIRST_JOIN_PAUSE_MS

    def took(self, reply: Reply, now: int) -> bool | None:
        """Return whether the join is finished; False if that cannot be found out, None if not."""
        if reply in (Reply.HAS, Reply.MAY_NOT_TELL):
            return True
        self.next_ts = now + max(self._pause_ms, _BUSY_PAUSE_MS * (reply is Reply.BUSY))
        self._pause_ms = min(self._pause_ms * 3 // 2, _LONGEST_JOIN_PAUSE_MS)
        # If it does not answer at all, sending will tell.
        is_silent = reply in (Reply.SILENT, Reply.NOT_ASKED)
        self.is_unclear = is_silent or now - self.since_ts >= _JOIN_PATIENCE_MS
        return False if self.is_unclear else None


@attr.s(slots=True, auto_attribs=True)
class Silence:
    """Whether a server answers no questions: then it is asked ever more rarely, in all rooms."""

    _until: int = 0
    _count: int = 0

    def is_on(self, now: int) -> bool:
        """Return whether not to ask at all now."""
        return now < self._until

    def took(self, reply: Reply, now: int) -> None:
        """The server was asked something."""
        if reply is Reply.SILENT:
            pause_ms = min(_FIRST_SILENCE_MS << min(self._count, 10), _LONGEST_SILENCE_MS)
            self._count += 1
            self._until = now + pause_ms
        elif reply is not Reply.NOT_ASKED:
            self._count = self._until = 0


@attr.s(slots=True, auto_attribs=True)
class History:
    """The events that arrived at one server and are still to be found in their rooms' history.

    Attributes:
        next_ts: not to be checked before.
        is_checking: whether the server is being asked.
    """

    next_ts: int = 0
    is_checking: bool = False
    _unchecked: dict[str, StickyEvent] = attr.Factory(dict)
    _silent: int = 0

    def __bool__(self) -> bool:
        return bool(self._unchecked)

    def __contains__(self, event_id: str) -> bool:
        return event_id in self._unchecked

    def add(self, events: Iterable[StickyEvent], now: int) -> None:
        """These have arrived."""
        self._unchecked.update((event.event_id, event) for event in events)
        self.next_ts = max(self.next_ts, now + CHECK_PAUSE_MS)

    def forget_room(self, room_id: str) -> None:
        """The events of a room need no check any more."""
        self._unchecked = {e.event_id: e for e in self._unchecked.values() if e.room_id != room_id}

    def forget(self, events: Iterable[StickyEvent]) -> None:
        """These need no check any more."""
        for event in events:
            self._unchecked.pop(event.event_id, None)

    def has_room(self, room_id: str) -> bool:
        """Return whether there are any of this room."""
        return any(event.room_id == room_id for event in self._unchecked.values())

    def batch(self) -> list[StickyEvent]:
        """Return the events to check now, all of one room, in the order in which they came."""
        room_id = next(iter(self._unchecked.values())).room_id
        return [e for e in self._unchecked.values() if e.room_id == room_id][:MAX_CHECKS]

    @property
    def must_ask(self) -> bool:
        """Whether the server is to be asked: not if it did not answer several times in a row."""
        return self._silent < _MAX_SILENT_CHECKS

    def took(self, event: StickyEvent, reply: Reply, now: int) -> bool | None:
        """Return whether an event is in its room's history; None if there is no answer yet."""
        self.next_ts = now + CHECK_PAUSE_MS
        if event.event_id not in self._unchecked:
            # The server has joined again meanwhile.
            return None
        if reply in (Reply.HAS, Reply.HAS_NOT):
            self._silent = 0
        else:
            self._silent += reply is Reply.SILENT
            if self.must_ask or reply is Reply.NOT_ASKED:
                self._put_last(event.room_id)
                self.next_ts = now + _SILENT_CHECK_PAUSE_MS
                return None
        del self._unchecked[event.event_id]
        return reply is not Reply.HAS_NOT

    def _put_last(self, room_id: str) -> None:
        """Let the other rooms come first."""
        events = [e for e in self._unchecked.values() if e.room_id == room_id]
        self.forget_room(room_id)
        self._unchecked.update((event.event_id, event) for event in events)
