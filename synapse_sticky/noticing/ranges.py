# SPDX-License-Identifier: AGPL-3.0-or-later
"""The parts of Synapse's streams that are still to be read. No Synapse, no clock.

The scalar bound of the event stream is complete, but waits for the slowest writer, and
stands still while one is down. So events are read twice: early, up to each writer's own
bound, and then once more up to the scalar bound, which finds the events of a process
that is no writer any more. Reading twice is harmless, since known events are skipped;
and only the scalar bounds need to be stored.
"""

from collections.abc import Iterator

import attr

from synapse_sticky.seams.bounds import Bounds, Range, Stream


def pending_ranges(read: Bounds, written: Bounds) -> Iterator[Range]:
    """Return the ranges between the bounds read so far and those written by now."""
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
    """Cut a long way into bounds that are each at most ``step`` further.

    The last one is ``written`` itself; those before it go on in the scalar bounds only.
    """
    while written.events - read.events > step or read.backfill - written.backfill > step:
        read = attr.evolve(
            read,
            events=min(read.events + step, written.events),
            backfill=max(read.backfill - step, written.backfill),
        )
        yield read
    yield written
