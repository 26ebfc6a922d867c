# SPDX-License-Identifier: AGPL-3.0-or-later
"""What clients hold to say how far they have read. Arithmetic only.

``/sync`` tokens carry the plain position in a slot of Synapse's own stream
token (see ``seams/streams.py``). The ``since`` of the Sliding Sync extension
(MSC4480) is written here: ``sticky_<number>``, the only form that a Synapse
without this module accepts too, so that removing the module locks nobody out.

The low 48 bits of the number are the position. Nearly always that is all. Only
if the user is joined to rooms with sticky events that no list or subscription
of the request matched, the bits above name them, 32 bits each: those rooms'
events lie behind the position but were never delivered, and are due as soon as
a request matches the room. Keeping that in the token needs no storage, works on
any worker, survives a lost ``pos``, and a repeated request gets the same answer.
"""

import hashlib
import re
from collections.abc import Iterable
from typing import Final

import attr

from synapse_sticky.names import SLIDING_SYNC_EXTENSION

_POSITION_BITS: Final = 48
_ROOM_BITS: Final = 32
_MAX_UNMATCHED_ROOMS: Final = 64

_SINCE = re.compile(r"sticky_([0-9]{1,640})")
# What Synapse's own implementation hands out on several writers. Its numbers
# count from 1 and say nothing about our positions.
_FOREIGN_SINCE = re.compile(r"sticky_m[0-9]+(~[0-9]+\.[0-9]+)*")

MAX_POSITION: Final = (1 << _POSITION_BITS) - 1
"""No position is ever larger: they are milliseconds since the epoch."""


def clamp_position(position: int) -> int:
    """Brings whatever a client wrote into the range of positions.

    Anything above is as much from the future as the largest position.
    """
    return max(0, min(position, MAX_POSITION))


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Since:
    """How far a Sliding Sync client has read.

    Attributes:
        position: it has everything up to here, in the rooms that were matched.
        unmatched: digests of rooms whose events up to there it has not.
    """

    position: int
    unmatched: frozenset[int] = frozenset()

    @classmethod
    def create(cls, position: int, unmatched_rooms: Iterable[str]) -> "Since":
        """A token for this position that remembers these rooms.

        Beyond 64 rooms it remembers the first ones by room ID.
        """
        room_ids = sorted(unmatched_rooms)[:_MAX_UNMATCHED_ROOMS]
        return cls(position, frozenset(map(room_digest, room_ids)))

    @classmethod
    def parse(cls, text: object) -> "Since":
        """Reads a token that a client sent.

        Raises:
            ValueError: if it is no token at all, with a text for the client.
        """
        if isinstance(text, str):
            if match := _SINCE.fullmatch(text):
                number = int(match.group(1))
                position, rest = number & MAX_POSITION, number >> _POSITION_BITS
                unmatched = set()
                while rest:
                    unmatched.add(rest & ((1 << _ROOM_BITS) - 1))
                    rest >>= _ROOM_BITS
                return cls(position, frozenset(unmatched))
            if _FOREIGN_SINCE.fullmatch(text):
                return cls(0)
        raise ValueError(
            f"since of the extension {SLIDING_SYNC_EXTENSION} must be a next_batch of the same"
        )

    def __str__(self) -> str:
        number = 0
        for digest in sorted(self.unmatched, reverse=True):
            number = number << _ROOM_BITS | digest
        return f"sticky_{number << _POSITION_BITS | self.position}"

    def was_unmatched(self, room_id: str) -> bool:
        """Whether this room's events up to the position are still due."""
        return bool(self.unmatched) and room_digest(room_id) in self.unmatched


def room_digest(room_id: str) -> int:
    """32 bits, never 0, that stand for a room in a token."""
    digest = hashlib.blake2b(room_id.encode(), digest_size=_ROOM_BITS // 8).digest()
    return int.from_bytes(digest, "big") or 1
