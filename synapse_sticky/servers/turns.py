# SPDX-License-Identifier: AGPL-3.0-or-later
"""Who sends next to a server, Synapse's own queue or we. No Synapse, no clock.

A receiving Synapse takes one transaction at a time from another server and refuses a second
one, so the two take turns. Synapse's traffic comes first, but for one case: a server that was
away is first sent the sticky events that it missed, so that it gets them in order. That, and a
transaction of ours that is on its way, is all that Synapse's queue ever waits for: two seconds
in all after an outage, and otherwise two seconds until a transaction of ours has arrived again.
"""

import enum
from typing import Final

import attr

MAX_WAIT_MS: Final = 2_000
"""How long Synapse's queue for a server waits for us in all."""

MAX_READING_MS: Final = 10_000
"""How long it waits in all, after an outage, until the server has read what we sent.

Otherwise the server would throw that away."""

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


@attr.s(slots=True, auto_attribs=True)
class Turn:
    """Who sends next to one server.

    Attributes:
        is_alone: whether only our transactions fail: Synapse's arrive meanwhile.
        synapse_sends: whether a transaction of Synapse's queue is on its way.
    """

    is_alone: bool = False
    synapse_sends: bool = False
    _synapse_waits: bool = False
    _is_ours: bool = False
    # Whether our turn comes once Synapse's transaction has ended.
    _is_claimed: bool = False
    _we_failed: bool = False
    # Whether the events that the server missed in an outage are being sent, and whether Synapse's
    # queue has waited for them as long as it may.
    _is_after_outage: bool = False
    _has_waited: bool = False
    # How long Synapse's queue has waited since the outage began, or without one since a
    # transaction of ours arrived.
    _waited_ms: int = 0
    # Whether one arrived while it waited.
    _arrived: bool = False
    _waited_for_reading_ms: int = 0

    @property
    def is_ahead(self) -> bool:
        """Whether we go before Synapse's queue."""
        return self._is_after_outage and not self._has_waited

    # Synapse's queue.

    @property
    def synapse_waits_ms(self) -> int:
        """How long Synapse's next transaction is to wait for us at most; 0 if it need not."""
        if not (self.is_ahead or self._is_ours):
            return 0
        return max(0, MAX_WAIT_MS - self._waited_ms)

    @property
    def reading_waits_ms(self) -> int:
        """How long it is to wait until the server has read what we sent; 0 if it need not."""
        if not self._is_after_outage:
            return 0
        return max(0, MAX_READING_MS - self._waited_for_reading_ms)

    def synapse_comes(self) -> None:
        """Synapse's queue has a transaction, which may have to wait for us."""
        self._synapse_waits = True
        self._arrived = False

    def synapse_waited(self, waited_ms: int) -> None:
        """It has waited that long for our transactions."""
        if not self._arrived:
            self._waited_ms += waited_ms
            self._has_waited |= self._waited_ms >= MAX_WAIT_MS

    def synapse_waited_for_reading(self, waited_ms: int) -> None:
        """It has waited that long until the server had read what we sent."""
        self._waited_for_reading_ms += waited_ms

    def synapse_begins(self) -> None:
        """A transaction of Synapse's queue is sent."""
        self.synapse_sends, self._synapse_waits = True, False

    def synapse_ended(self, *, arrived: bool) -> None:
        """The transaction of Synapse's queue has ended."""
        self.synapse_sends = False
        self._is_ours |= self._is_claimed
        self._is_claimed = False
        if not arrived:
            # An outage begins.
            self._waited_ms = self._waited_for_reading_ms = 0
            self._has_waited = False
        self.is_alone |= arrived and self._we_failed
        self._is_after_outage = (self._is_after_outage or not arrived) and not self.is_alone

    # We.

    @property
    def is_ours(self) -> bool:
        """Whether we send, or are about to."""
        return self._is_ours

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
        """Take the turn, or otherwise the next one; return whether it is ours now."""
        is_synapses = self.synapse_sends or (self._synapse_waits and not self.is_ahead)
        if not self._is_ours:
            self._is_ours, self._is_claimed = not is_synapses, is_synapses
        return self._is_ours

    def ended(self, ending: Ending) -> None:
        """Our transaction has ended, and with it our turn."""
        self._is_ours = False
        self._we_failed = ending is not Ending.ARRIVED
        if not self._we_failed:
            self.is_alone = False
            if not self.is_ahead:
                self._arrived, self._waited_ms = True, 0
        elif ending is Ending.UNAVAILABLE:
            self.go_ahead()
        else:
            self._is_after_outage = False

    def release(self, *, is_done: bool) -> None:
        """We do not send now.

        Args:
            is_done: whether there is nothing to send at all.
        """
        self._is_ours = False
        self._is_claimed &= not is_done
        if is_done:
            self._is_after_outage = self._has_waited = False
