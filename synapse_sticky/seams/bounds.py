# SPDX-License-Identifier: AGPL-3.0-or-later
"""How far Synapse's streams are written. No Synapse, no clock.

Synapse's event stream may have several writers: beside the scalar bound ("everything up
to here is persisted") each of them has its own. Backfilled events count downwards,
from -1.
"""

import enum
from collections.abc import Mapping

import attr


class Stream(enum.Enum):
    """A stream of Synapse's that sticky events come through."""

    EVENTS = "events"
    BACKFILL = "backfill"
    UN_PARTIAL_STATED = "un_partial_stated"


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Bounds:
    """Up to where each stream is persisted, as seen by one process."""

    events: int
    backfill: int
    un_partial_stated: int
    events_by_writer: Mapping[str, int] = attr.Factory(dict)
    backfill_by_writer: Mapping[str, int] = attr.Factory(dict)


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
