# SPDX-License-Identifier: AGPL-3.0-or-later
"""What clients hold to say how far they have read. Arithmetic only.

It is one number: in `/sync` in a slot of Synapse's own stream token (see
``hooks/token.py``), in the Sliding Sync extension (MSC4480) as a ``since`` that a
Synapse without this module accepts too, so that removing the module locks nobody out:

- ``sticky_<number>``, which has the right form for Synapse's own extension. If that is
  switched on it refuses the number, as one from the future, again and again.
- ``sticky_m0~<id>.<number>~<id>.1``, from 1.163 on PostgreSQL: Synapse's own reads a
  position for each writer of events there, and of two for the same writer the last. So
  what it reads is 1, and it hands out all that it has: it counts from 2.

The number is the position, nearly always. Three things a position cannot say, and for
those the bits above it name rooms, senders or events, by digests:

- An event that a response has shown in a timeline, although its turn has not come yet:
  more than one page of older ones was waiting, or nobody knew yet whether it would have
  one. Once its turn comes, the client has it already.
- A room with sticky events that the user is joined to and no list or subscription of
  a Sliding Sync request matched: its events lie behind the position but were never
  delivered. They are due as soon as a request matches the room.
- A sender with live sticky events whom the user ignores: those events lie behind the
  position too. They are due as soon as the user does not ignore the sender any more.

That needs no storage, works on any worker, survives a lost ``pos``, and a repeated
request gets the same answer.
"""

import hashlib
import re
from collections.abc import Collection, Iterable
from typing import Final

import attr

from synapse_sticky.protocol import SLIDING_SYNC_EXTENSION

_POSITION_BITS: Final = 48
_CHECKSUM_BITS: Final = 16
_DIGEST_BITS: Final = 32

MAX_NAMES: Final = 400
"""How many names a token has at most: Synapse reads no longer numbers."""

MAX_NAMES_IN_ADDRESS: Final = 64
"""The same for a token that clients put into addresses."""

_SINCE = re.compile(r"sticky_([0-9]{1,4000})")
# What Synapse's own implementation hands out on several writers. Its numbers
# count from 1 and say nothing about our positions.
_FOREIGN_SINCE = re.compile(r"sticky_m[0-9]+(~[0-9]+\.[0-9]+)*")
# Ours in that form. Synapse's own never names a writer twice.
_SINCE_OF_WRITER = re.compile(r"sticky_m0~([0-9]{1,20})\.([0-9]{1,4000})~\1\.1")

MAX_POSITION: Final = (1 << _POSITION_BITS) - 1
"""No position is ever larger: they are milliseconds since the epoch."""


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Since:
    """How far a client has read.

    Attributes:
        position: it has everything up to here, but for the rooms and senders named.
        digests: of the rooms, senders and events named.
        undecided: digests of further events, of which it is not known whether they are
            deliverable.
    """

    position: int
    digests: frozenset[int] = frozenset()
    undecided: frozenset[int] = frozenset()

    @classmethod
    def create(
        cls,
        position: int,
        names: Iterable[str],
        most: int = MAX_NAMES,
        undecided: Iterable[int] = (),
    ) -> "Since":
        """Return this position with these room IDs, names of senders, and event IDs.

        If they are too many it names rooms first, then senders, then events, and last the
        undecided ones. An event that is not named is delivered twice. The events that a
        room or a sender has now are not delivered if that is not named and the room is
        matched, or the sender not ignored any more, later: a client that is in so many
        rooms with sticky events, and matches none of them, wants none.
        """
        # Room IDs sort before names of senders, and those before event IDs.
        digests = frozenset(map(digest_of, sorted(names)[:most]))
        return cls(position, digests, frozenset(sorted(undecided)[: most - len(digests)]))

    def with_names(self, names: Collection[str], most: int = MAX_NAMES_IN_ADDRESS) -> "Since":
        """Return the same position, at which these room IDs are named too.

        If they are too many it is the beginning: then everything is delivered again.
        """
        if not names:
            return self
        digests = self.digests.union(map(digest_of, names))
        if len(digests) > most:
            return Since(0)
        undecided = frozenset(sorted(self.undecided)[: most - len(digests)])
        return Since(self.position, digests, undecided)

    @classmethod
    def from_number(cls, number: int) -> "Since":
        """Reads the number. What we have not written is from the future."""
        if number <= MAX_POSITION:
            return cls(max(number, 0))
        position, rest = number & MAX_POSITION, number >> (_POSITION_BITS + _CHECKSUM_BITS)
        digests: set[int] = set()
        undecided: set[int] = set()
        found = digests
        while rest:
            digest, rest = rest & ((1 << _DIGEST_BITS) - 1), rest >> _DIGEST_BITS
            if digest:
                found.add(digest)
            else:
                found = undecided
        since = cls(position, frozenset(digests), frozenset(undecided))
        return since if since.number == number else cls(MAX_POSITION)

    @property
    def number(self) -> int:
        """The number that stands for it."""
        if not self.digests and not self.undecided:
            return self.position
        # No digest is 0.
        undecided = [0, *sorted(self.undecided)] if self.undecided else []
        number = 0
        for digest in reversed([*sorted(self.digests), *undecided]):
            number = number << _DIGEST_BITS | digest
        return (number << _CHECKSUM_BITS | self._checksum) << _POSITION_BITS | self.position

    @classmethod
    def parse(cls, text: object) -> "Since":
        """Reads the ``since`` of a Sliding Sync request.

        Raises:
            ValueError: if it is no token at all, with a text for the client.
        """
        if isinstance(text, str):
            if match := _SINCE.fullmatch(text):
                return cls.from_number(int(match.group(1)))
            if match := _SINCE_OF_WRITER.fullmatch(text):
                return cls.from_number(int(match.group(2)))
            if _FOREIGN_SINCE.fullmatch(text):
                return cls(0)
        raise ValueError(
            f"since of the extension {SLIDING_SYNC_EXTENSION} must be a next_batch of the same"
        )

    def to_text(self, writer_id: int | None) -> str:
        """Return the `since` of a Sliding Sync client.

        Args:
            writer_id: of any writer that Synapse knows, if it reads positions of writers.
        """
        if writer_id is None:
            return f"sticky_{self.number}"
        return f"sticky_m0~{writer_id}.{self.number}~{writer_id}.1"

    def names(self, name: str) -> bool:
        """Whether this room, sender or event is named."""
        return bool(self.digests) and digest_of(name) in self.digests

    def leaves_undecided(self, event_id: str) -> bool:
        """Whether it names this event as one that may not be deliverable."""
        return bool(self.undecided) and digest_of(event_id) in self.undecided

    @property
    def _checksum(self) -> int:
        text = f"{self.position} {sorted(self.digests)}"
        if self.undecided:
            text += f" {sorted(self.undecided)}"
        digest = hashlib.blake2b(text.encode(), digest_size=_CHECKSUM_BITS // 8).digest()
        return int.from_bytes(digest, "big")


def name_of_sender(sender_hash: int) -> str:
    """Return the name that a token gives to the sender of this hash."""
    return f"#{sender_hash}"


def digest_of(name: str) -> int:
    """Return 32 bits, never 0, that stand for a name."""
    digest = hashlib.blake2b(name.encode(), digest_size=_DIGEST_BITS // 8).digest()
    return int.from_bytes(digest, "big") or 1
