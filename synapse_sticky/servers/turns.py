# SPDX-License-Identifier: AGPL-3.0-or-later
"""Who sends next to a server, Synapse's own queue or we. No Synapse, no clock.

A receiving Synapse takes one transaction at a time from another server and refuses a second
one, so the two take turns. Synapse's traffic comes first, but for one case: a server that was
away is first sent the sticky events that it missed, so that it gets them in order. That, and a
transaction of ours that is on its way, is all that Synapse's queue ever waits for, and for two
seconds at most until a transaction of ours has arrived again.
"""

import enum
from typing import Final

import attr

MAX_WAIT_MS: Final = 2_000
"""How long Synapse's queue for a server waits for us, in all, until we got through again."""

MAX_READING_MS: Final = 10_000
"""How long it waits until the server has read what we sent, if it would be thrown away."""

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
        is_ahead: whether we go before Synapse's queue.
        is_alone: whether only our transactions fail: Synapse's arrive meanwhile.
        synapse_sends: whether a transaction of Synapse's queue is on its way.
    """

    is_ahead: bool = False
    is_alone: bool = False
    synapse_sends: bool = False
    _is_ours: bool = False
    _is_claimed: bool = False
    _we_failed: bool = False
    _waited_ms: int = 0

    # Synapse's queue.

    @property
    def synapse_waits_ms(self) -> int:
        """How long Synapse's next transaction is to wait for us at most; 0 if it need not."""
        if not (self.is_ahead or self._is_ours):
            return 0
        return max(0, MAX_WAIT_MS - self._waited_ms)

    def synapse_waited(self, waited_ms: int) -> None:
        """Synapse's queue has waited that long for us."""
        self._waited_ms += waited_ms

    def synapse_begins(self) -> None:
        """A transaction of Synapse's queue is sent."""
        self.synapse_sends = True

    def synapse_ended(self, *, arrived: bool) -> None:
        """The transaction of Synapse's queue has ended."""
        self.synapse_sends = False
        self._is_ours |= self._is_claimed
        self._is_claimed = False
        if not arrived:
            self._waited_ms = 0
        self.is_alone |= arrived and self._we_failed
        self.is_ahead = (self.is_ahead or not arrived) and not self.is_alone

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
        self.is_ahead = not self.is_alone

    def claim(self) -> bool:
        """Take the turn, or else the next one; return whether it is ours now."""
        self._is_claimed = self.synapse_sends and not self._is_ours
        self._is_ours |= not self.synapse_sends
        return self._is_ours

    def ended(self, ending: Ending) -> None:
        """Our transaction has ended, and with it our turn."""
        self._is_ours = False
        self._we_failed = ending is not Ending.ARRIVED
        if not self._we_failed:
            self._waited_ms, self.is_alone = 0, False
        elif ending is Ending.UNAVAILABLE:
            self.is_ahead = not self.is_alone
        else:
            self.is_ahead = False

    def release(self, *, is_done: bool) -> None:
        """We do not send now.

        Args:
            is_done: whether there is nothing to send at all.
        """
        self._is_ours = self._is_claimed = False
        self.is_ahead &= not is_done
