# SPDX-License-Identifier: AGPL-3.0-or-later
"""Who sends next to a server, Synapse's own queue or we. No Synapse, no clock.

A receiving Synapse takes one transaction at a time from another server and refuses a second
one, so the two take turns. Synapse's traffic comes first, but for one case: a server that was
away is first sent the sticky events that it missed, so that it gets them in order.

Synapse's queue waits for nothing but a transaction of ours that is on its way or begins at once,
and after an outage until the missed events are sent and read: two seconds in all. If transactions
to the server are known to take long it waits until the one of ours has ended that is on its way. We
have the turn only for such a transaction: never while we ask something.
"""

import enum
from typing import Final

import attr

MAX_WAIT_MS: Final = 2_000
"""How long Synapse's queue for a server waits for us in all."""

MAX_SENDING_MS: Final = 10_000
"""How long it waits at most for the end of one transaction of ours that is on its way, to a server
whose transactions are known to take half as long.

The server would refuse Synapse's, which is repeated only seconds later. One that takes long for the
first time may hang for ours only."""

# A transaction of ours that took longer than that, while Synapse's queue waited for it, is
# followed by a rest of so many times as long, for the queue to send what has come in between.
_LONG_MS: Final = 400
_REST: Final = 4

_UNAVAILABLE: Final = frozenset({0, 502, 503, 504})


class Ending(enum.Enum):
    """How a transaction ended."""

    ARRIVED = "arrived"
    """The server took it."""
    FAILED = "failed"
    """The server, or a proxy before it, answered with an error."""
    UNAVAILABLE = "unavailable"
    """Nobody was there."""

    @classmethod
    def of(cls, status: int) -> "Ending":
        """Return what a failure with this HTTP status means; 0 is no answer."""
        return cls.UNAVAILABLE if status in _UNAVAILABLE else cls.FAILED


class Ours(enum.Enum):
    """Where our next transaction to a server is."""

    NONE = "none is planned"
    AFTER_SYNAPSE = "it comes after the one of Synapse's queue"
    NEXT = "it begins at once"
    SENDING = "it is on its way"


@attr.s(slots=True, auto_attribs=True)
class Turn:
    """Who sends next to one server.

    Attributes:
        ours: where our next transaction is.
        is_alone: whether only our transactions fail: Synapse's arrive meanwhile.
        synapse_sends: whether a transaction of Synapse's queue is on its way.
        rests_until: until when we leave the server to Synapse's queue.
    """

    ours: Ours = Ours.NONE
    is_alone: bool = False
    synapse_sends: bool = False
    rests_until: int = 0
    _synapse_waits: bool = False
    _began_ts: int = 0
    _synapse_began_ts: int = 0
    # How long a transaction took that arrived, Synapse's or ours: the longest, of older ones less.
    _takes_ms: int = 0
    _we_failed: bool = False
    # Whether the last transaction of Synapse's failed, and none has arrived since.
    _is_away: bool = False
    # Whether the events that the server missed in an outage are being sent, and whether Synapse's
    # queue has waited for them as long as it may.
    _is_after_outage: bool = False
    _has_waited: bool = False
    # How long Synapse's queue has waited since the outage began, or without one since a
    # transaction of ours arrived.
    _waited_ms: int = 0
    # How long it has waited since the transaction of ours began that is on its way.
    _waited_for_this_ms: int = 0
    # Whether one arrived while it waited.
    _arrived: bool = False

    @property
    def is_ahead(self) -> bool:
        """Whether we go before Synapse's queue."""
        return self._is_after_outage and not self._has_waited

    @property
    def is_ours(self) -> bool:
        """Whether a transaction of ours is on its way, or begins at once."""
        return self.ours in (Ours.NEXT, Ours.SENDING)

    # Synapse's queue.

    @property
    def synapse_waits_ms(self) -> int:
        """How long Synapse's next transaction is to wait for us at most; 0 if it need not."""
        if not (self.is_ahead or self.is_ours):
            return 0
        left_ms = MAX_WAIT_MS - self._waited_ms
        if self.ours is Ours.SENDING and not (self._we_failed or self._is_away):
            sending_ms = min(2 * self._takes_ms, MAX_SENDING_MS)
            left_ms = max(left_ms, sending_ms - self._waited_for_this_ms)
        return max(0, left_ms)

    def synapse_comes(self) -> None:
        """Synapse's queue has a transaction, which may have to wait for us."""
        self._synapse_waits = True
        self._arrived = False

    def synapse_waited(self, waited_ms: int) -> None:
        """It has waited that long, until it looked again whether it still has to."""
        self._waited_for_this_ms += waited_ms
        if not self._arrived:
            self._waited_ms += waited_ms
            self._has_waited |= self._waited_ms >= MAX_WAIT_MS
        self._arrived = False

    def synapse_begins(self, now: int) -> None:
        """A transaction of Synapse's queue is sent."""
        self._synapse_began_ts = now
        self.synapse_sends, self._synapse_waits = True, False
        if self.ours is Ours.NEXT:
            self.ours = Ours.AFTER_SYNAPSE

    def synapse_ended(self, now: int, *, arrived: bool) -> None:
        """The transaction of Synapse's queue has ended."""
        if arrived:
            self._took(now - self._synapse_began_ts)
        self.synapse_sends, self._is_away = False, not arrived
        if self.ours is Ours.AFTER_SYNAPSE:
            self.ours = Ours.NEXT
        if not arrived:
            # An outage begins.
            self._waited_ms = 0
            self._has_waited = False
        self.is_alone |= arrived and self._we_failed
        self._is_after_outage = (self._is_after_outage or not arrived) and not self.is_alone

    def _took(self, took_ms: int) -> None:
        self._takes_ms = max(took_ms, self._takes_ms * 3 // 4)

    # We.

    @property
    def is_after_this(self) -> bool:
        """Whether ours begins once the transaction of Synapse's has ended that is on its way."""
        return self.synapse_sends and self.ours is Ours.AFTER_SYNAPSE

    def is_second(self, *, is_from_before_join: bool) -> bool:
        """Return whether Synapse's queue sends first what it has for the server.

        Args:
            is_from_before_join: whether it has nothing of what we are about to send.
        """
        return not self.is_ahead and (self._we_failed or not is_from_before_join)

    def go_ahead(self) -> None:
        """The server was away, or is owed events that Synapse's queue has forgotten."""
        self._is_after_outage = not self.is_alone

    def claim(self) -> bool:
        """Take the turn, or otherwise the one after Synapse's; return whether it is ours now."""
        if self.ours is not Ours.NEXT:
            is_synapses = self.synapse_sends or (self._synapse_waits and not self.is_ahead)
            self.ours = Ours.AFTER_SYNAPSE if is_synapses else Ours.NEXT
        return self.ours is Ours.NEXT

    def began(self, now: int) -> None:
        """Our transaction is on its way."""
        self.ours = Ours.SENDING
        self._began_ts, self._waited_for_this_ms = now, 0

    def ended(self, ending: Ending, now: int) -> None:
        """Our transaction has ended, and with it our turn."""
        self.finish_sending()
        took_ms = now - self._began_ts
        if self._synapse_waits and took_ms > _LONG_MS and not self.is_ahead:
            self.rests_until = now + _REST * took_ms
        self._we_failed = ending is not Ending.ARRIVED
        if not self._we_failed:
            self.is_alone = self._is_away = False
            self._took(took_ms)
            if not self.is_ahead:
                self._arrived, self._waited_ms = True, 0
        elif ending is Ending.UNAVAILABLE:
            self.go_ahead()
        else:
            self._is_after_outage = False

    def finish_sending(self) -> None:
        """Nothing of ours is on its way, or it was never sent: our turn is over."""
        self.ours = Ours.NONE

    def give_way(self) -> None:
        """We do not send at once: the turn is Synapse's."""
        if self.ours is Ours.NEXT:
            self.ours = Ours.NONE

    def finish(self) -> None:
        """Nothing is left to send."""
        self.ours = Ours.NONE
        self._is_after_outage = self._has_waited = False
