# SPDX-License-Identifier: AGPL-3.0-or-later
"""How far Synapse's streams are written, and what lies between two such points.

Arithmetic only. Synapse's event stream may have several writers. The scalar
bound ("everything up to here is persisted") is complete but waits for the
slowest writer, and stands still while one is down. So events are read twice:
early, up to each writer's own bound, and then once more up to the scalar bound,
which finds what a writer left behind that is no writer any more. Reading twice
is harmless, since what is known already is skipped; and only the scalar bounds
need to be stored.

Backfilled events count downwards, from -1.
"""

import enum
from collections.abc import Iterator, Mapping

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


def unread(read: Bounds, written: Bounds) -> Iterator[Range]:
    """The ranges between what was read and what is written by now."""
    if written.events > read.events:
        yield Range(Stream.EVENTS, read.events, written.events)
    for writer, end in written.events_by_writer.items():
        start = max(written.events, read.events_by_writer.get(writer, 0))
        if end > start:
            yield Range(Stream.EVENTS, start, end, writer)
    if written.backfill < read.backfill:
        yield Range(Stream.BACKFILL, read.backfill, written.backfill)
    for writer, end in written.backfill_by_writer.items():
        start = min(written.backfill, read.backfill_by_writer.get(writer, 0))
        if end < start:
            yield Range(Stream.BACKFILL, start, end, writer)
    if written.un_partial_stated > read.un_partial_stated:
        yield Range(Stream.UN_PARTIAL_STATED, read.un_partial_stated, written.un_partial_stated)


def in_steps(read: Bounds, written: Bounds, step: int) -> Iterator[Bounds]:
    """Cuts a long way into bounds that are each at most ``step`` further.

    The last one is ``written`` itself; all before it are scalar.
    """
    while written.events - read.events > step or read.backfill - written.backfill > step:
        read = Bounds(
            events=min(read.events + step, written.events),
            backfill=max(read.backfill - step, written.backfill),
            un_partial_stated=read.un_partial_stated,
        )
        yield read
    yield written
