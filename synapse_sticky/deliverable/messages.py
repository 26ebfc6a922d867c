# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the processes tell each other directly. No Synapse, no clock.

These messages make things fast, and nothing else depends on them: a process that misses
one, or cannot read it, finds everything in the tables a little later.
"""

import json
from collections.abc import Sequence
from typing import Final

import attr

from synapse_sticky.seams.bounds import Bounds
from synapse_sticky.storage.rows import EventChange

MAX_EVENTS: Final = 100
"""How many events a message carries: more are read from the tables, by every process."""


@attr.s(slots=True, frozen=True, auto_attribs=True)
class StoredEvent:
    """A sticky event that a process has just stored.

    Attributes:
        expires_ts: when it expires, but for the moments that storing it took, in ms since
            the epoch.
    """

    event_id: str
    room_id: str
    stream_ordering: int
    expires_ts: int


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Stored:
    """A process tells which sticky events it has just stored.

    Attributes:
        writer: the name of the process.
        written: how far it has written the stream of events, without a gap.
    """

    writer: str
    written: int
    events: Sequence[StoredEvent]

    def encode(self) -> str:
        """Return the text that :meth:`decode` reads."""
        return json.dumps([self.writer, self.written, [attr.astuple(e) for e in self.events]])

    @classmethod
    def decode(cls, text: str) -> "Stored":
        """Read what :meth:`encode` has written.

        Raises:
            ValueError, TypeError: if that is something else.
        """
        writer, written, events = json.loads(text)
        return cls(writer, written, [StoredEvent(*row) for row in events])


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Recorded:
    """The process that gives out positions tells which events it has just recorded.

    Attributes:
        after: the last position that was given out before.
        position: the last position that is given out now.
        read: how far Synapse's streams were read to find them.
    """

    after: int
    position: int
    read: Bounds
    events: Sequence[EventChange]

    def encode(self) -> str:
        """Return the text that :meth:`decode` reads."""
        return json.dumps(
            [
                self.after,
                self.position,
                attr.astuple(self.read),
                [attr.astuple(change) for change in self.events],
            ]
        )

    @classmethod
    def decode(cls, text: str) -> "Recorded":
        """Read what :meth:`encode` has written.

        Raises:
            ValueError, TypeError: if that is something else.
        """
        after, position, read, events = json.loads(text)
        return cls(after, position, Bounds(*read), [EventChange(*row) for row in events])
