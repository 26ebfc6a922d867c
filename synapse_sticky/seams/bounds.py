# SPDX-License-Identifier: AGPL-3.0-or-later
"""How far Synapse's streams are written. No Synapse, no clock.

Synapse's event stream may have several writers: beside the scalar bound ("everything up
to here is persisted") each of them has its own. Backfilled events count downwards,
from -1.
"""

import enum
from collections.abc import Callable, Mapping
from typing import Final

import attr


class Stream(enum.Enum):
    """A stream of Synapse's that sticky events come through."""

    EVENTS = "events"
    BACKFILL = "backfill"
    UN_PARTIAL_STATED = "un_partial_stated"


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Bounds:
    """Up to where each stream is persisted, or read, as seen by one process."""

    events: int = 0
    backfill: int = 0
    un_partial_stated: int = 0
    events_by_writer: Mapping[str, int] = attr.Factory(dict)
    backfill_by_writer: Mapping[str, int] = attr.Factory(dict)

    def cover(self, instance_name: str | None, stream_ordering: int) -> bool:
        """Whether an event that was written there lies within these bounds."""
        # What was written before there were several writers has no name.
        writer = instance_name or "master"
        if stream_ordering < 0:
            return stream_ordering >= min(self.backfill, self.backfill_by_writer.get(writer, 0))
        return stream_ordering <= max(self.events, self.events_by_writer.get(writer, 0))

    def cover_all_of(self, other: "Bounds") -> bool:
        """Whether the scalar bounds lie beyond all bounds of others, those of writers included."""
        newest = max([other.events, *other.events_by_writer.values()])
        oldest = min([other.backfill, *other.backfill_by_writer.values()])
        return self.events >= newest and self.backfill <= oldest

    def is_beyond(self, other: "Bounds") -> bool:
        """Whether any of these bounds is further than all that others cover."""
        return (
            self.events > other.events
            or self.backfill < other.backfill
            or self.un_partial_stated > other.un_partial_stated
            or any(not other.cover(*bound) for bound in self.events_by_writer.items())
            or any(not other.cover(*bound) for bound in self.backfill_by_writer.items())
        )

    def within(self, other: "Bounds") -> "Bounds":
        """Return the scalar bounds, but none that is further than another's."""
        return Bounds(
            min(self.events, other.events),
            max(self.backfill, other.backfill),
            min(self.un_partial_stated, other.un_partial_stated),
        )

    def joined(self, other: "Bounds") -> "Bounds":
        """Return the further one of each of these bounds and others."""
        return Bounds(
            max(self.events, other.events),
            min(self.backfill, other.backfill),
            max(self.un_partial_stated, other.un_partial_stated),
            _each(max, self.events_by_writer, other.events_by_writer),
            _each(min, self.backfill_by_writer, other.backfill_by_writer),
        )


NOTHING_READ: Final = Bounds()


def _each(
    further: Callable[[int, int], int], ours: Mapping[str, int], others: Mapping[str, int]
) -> Mapping[str, int]:
    return {
        writer: further(ours.get(writer, 0), others.get(writer, 0)) for writer in {**ours, **others}
    }


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Range:
    """A part of a stream: after ``start`` up to and including ``end``.

    Attributes:
        writer: only what this writer wrote; None for all of them.
    """

    stream: Stream
    start: int
    end: int
    writer: str | None = None

    @property
    def low(self) -> int:
        """The smaller of the two ends."""
        return min(self.start, self.end)

    @property
    def high(self) -> int:
        """The larger of the two ends."""
        return max(self.start, self.end)
