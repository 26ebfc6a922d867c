"""Which parts of Synapse's streams are read, against writers that work side by side."""

import itertools
from collections.abc import Iterable

import attr
from hypothesis import given
from hypothesis import strategies as st

from synapse_sticky.noticing.ranges import in_steps, pending_ranges
from synapse_sticky.seams.bounds import Bounds, Range, Stream

WRITERS = ["persister1", "persister2", "persister3"]
FORWARDS = {Stream.EVENTS, Stream.UN_PARTIAL_STATED}


def _numbers(part: Range) -> range:
    """The numbers that a range stands for, in whichever direction its stream counts."""
    if part.end >= part.start:
        assert part.stream in FORWARDS
        return range(part.start + 1, part.end + 1)
    assert part.stream is Stream.BACKFILL
    return range(part.end, part.start)


def _covered(parts: Iterable[Range]) -> dict[tuple[Stream, str | None], list[int]]:
    """What is read of each stream and writer, each number as often as it is read."""
    covered: dict[tuple[Stream, str | None], list[int]] = {}
    for part in parts:
        covered.setdefault((part.stream, part.writer), []).extend(_numbers(part))
    return covered


small = st.integers(0, 30)
writers = st.dictionaries(st.sampled_from(WRITERS), small)


@st.composite
def bounds_pairs(draw: st.DrawFn) -> tuple[Bounds, Bounds]:
    """What was read, and what is written by now. Nothing moves back, but writers come and go."""
    read_events, read_backfill, read_other = draw(small), draw(small), draw(small)
    # A writer is never behind what all of them have written.
    read = Bounds(
        read_events,
        -read_backfill,
        read_other,
        {name: read_events + ahead for name, ahead in draw(writers).items()},
        {name: -read_backfill - ahead for name, ahead in draw(writers).items()},
    )
    events, backfill = read_events + draw(small), read_backfill + draw(small)
    written = Bounds(
        events,
        -backfill,
        read_other + draw(small),
        {
            name: max(events, read.events_by_writer.get(name, 0)) + ahead
            for name, ahead in draw(writers).items()
        },
        {
            name: min(-backfill, read.backfill_by_writer.get(name, 0)) - ahead
            for name, ahead in draw(writers).items()
        },
    )
    return read, written


@given(bounds_pairs())
def test_everything_new_is_read_and_nothing_twice(pair: tuple[Bounds, Bounds]) -> None:
    # K3
    read, written = pair
    parts = list(pending_ranges(read, written))
    covered = _covered(parts)
    expected: dict[tuple[Stream, str | None], range] = {
        (Stream.EVENTS, None): range(read.events + 1, written.events + 1),
        (Stream.BACKFILL, None): range(written.backfill, read.backfill),
        (Stream.UN_PARTIAL_STATED, None): range(
            read.un_partial_stated + 1, written.un_partial_stated + 1
        ),
    }
    for name, end in written.events_by_writer.items():
        # What lies up to the scalar bound is read from all writers together.
        begin = max(written.events, read.events_by_writer.get(name, 0))
        expected[Stream.EVENTS, name] = range(begin + 1, end + 1)
    for name, end in written.backfill_by_writer.items():
        begin = min(written.backfill, read.backfill_by_writer.get(name, 0))
        expected[Stream.BACKFILL, name] = range(end, begin)
    assert covered == {key: list(numbers) for key, numbers in expected.items() if numbers}
    for part in parts:
        assert part.start != part.end
        assert (part.low, part.high) == tuple(sorted((part.start, part.end)))


@given(bounds_pairs())
def test_nothing_new_is_nothing_to_read(pair: tuple[Bounds, Bounds]) -> None:
    for bounds in pair:
        assert list(pending_ranges(bounds, bounds)) == []
        assert list(in_steps(bounds, bounds, 5)) == [bounds]


@attr.s(auto_attribs=True)
class Writing:
    """A stream that several writers write to, each number taken first and committed later."""

    down: bool
    taken: list[str] = attr.Factory(list)
    committed: set[int] = attr.Factory(set)

    def take(self, writer: str) -> None:
        """A writer takes the next number."""
        self.taken.append(writer)

    def commit(self, which: int) -> None:
        """One of the numbers that were taken is committed."""
        pending = [n for n in range(1, len(self.taken) + 1) if n not in self.committed]
        if pending:
            self.committed.add(pending[which % len(pending)])

    def bound(self, writer: str | None = None) -> int:
        """Up to where everything is committed: by that writer, or by all of them."""
        for number, owner in enumerate(self.taken, start=1):
            if number not in self.committed and writer in (None, owner):
                return self._signed(number - 1)
        return self._signed(len(self.taken))

    def visible(self, part: Range) -> set[int]:
        """What a query for this range finds now."""
        return {
            number
            for number in map(abs, _numbers(part))
            if number in self.committed and part.writer in (None, self.taken[number - 1])
        }

    def _signed(self, number: int) -> int:
        return -number if self.down else number


actions = st.one_of(
    st.tuples(st.just("take"), st.sampled_from(WRITERS), st.booleans()),
    st.tuples(st.just("commit"), st.integers(0, 10), st.booleans()),
    st.tuples(st.just("look"), st.integers(1, 4), st.booleans()),
    st.tuples(st.just("look"), st.just(1000), st.just(False)),
    st.tuples(st.just("writers"), st.sets(st.sampled_from(WRITERS)), st.just(False)),
    st.tuples(st.just("restart"), st.none(), st.just(False)),
)


@given(st.lists(actions, max_size=60), st.booleans())
def test_following_writers_finds_all_they_write(
    history: list[tuple[str, object, bool]], keeps_writers: bool
) -> None:
    # C1: no order of taking and committing numbers hides any of them for good, nor does a
    # change of the list of writers; and what a running writer has committed is found early.
    # Nobody is told that something was read before it was
    streams = {Stream.EVENTS: Writing(down=False), Stream.BACKFILL: Writing(down=True)}
    known = set(WRITERS)
    found: dict[Stream, set[int]] = {stream: set() for stream in streams}
    read = stored = told = Bounds()

    def written() -> Bounds:
        events, backfill = streams[Stream.EVENTS], streams[Stream.BACKFILL]
        return Bounds(
            events.bound(),
            backfill.bound(),
            0,
            {name: events.bound(name) for name in known},
            {name: backfill.bound(name) for name in known},
        )

    def look(step: int) -> None:
        nonlocal read, stored, told
        for bounds in in_steps(read, written(), step):
            for part in pending_ranges(read, bounds):
                found[part.stream] |= streams[part.stream].visible(part)
            read = bounds
            told = told.joined(read)
            # Those of writers need not be kept over a restart.
            stored = (
                read
                if keeps_writers
                else attr.evolve(read, events_by_writer={}, backfill_by_writer={})
            )
            for kind, writing in streams.items():
                for number, owner in enumerate(writing.taken, start=1):
                    signed = number if kind is Stream.EVENTS else -number
                    if told.cover(owner, signed):
                        assert number in found[kind]
                    elif number <= abs(writing.bound()) and bounds == written():
                        raise AssertionError("read, and not said to be")

    for action, argument, backfilled in history:
        stream = streams[Stream.BACKFILL if backfilled else Stream.EVENTS]
        if action == "take":
            stream.take(str(argument))
        elif action == "commit":
            assert isinstance(argument, int)
            stream.commit(argument)
        elif action == "writers":
            assert isinstance(argument, set)
            known = argument
        elif action == "restart":
            read = stored
        else:
            assert isinstance(argument, int)
            look(argument)
            for kind, writing in streams.items():
                early = {
                    number
                    for number, owner in enumerate(writing.taken, start=1)
                    if owner in known and number <= abs(writing.bound(owner))
                }
                assert found[kind] >= early
    for writing in streams.values():
        while abs(writing.bound()) < len(writing.taken):
            writing.commit(0)
    look(1000)
    for kind, writing in streams.items():
        assert found[kind] == set(range(1, len(writing.taken) + 1))


@given(bounds_pairs(), st.integers(1, 12))
def test_steps_lead_all_the_way(pair: tuple[Bounds, Bounds], step: int) -> None:
    # A long outage is made up for in bites that the database can take
    read, written = pair
    steps = list(in_steps(read, written, step))
    assert steps[-1] == written
    parts: list[Range] = []
    for before, after in itertools.pairwise([read, *steps]):
        assert before.events <= after.events <= before.events + step
        assert before.backfill >= after.backfill >= before.backfill - step
        assert after.events <= written.events
        assert after.backfill >= written.backfill
        parts += pending_ranges(before, after)
    assert len(steps) <= 2 + (written.events - read.events) / step + (
        (read.backfill - written.backfill) / step
    )
    # Together they read each number exactly once, as one look would.
    whole = _covered(pending_ranges(read, written))
    assert {key: sorted(numbers) for key, numbers in _covered(parts).items() if not key[1]} == {
        key: sorted(numbers) for key, numbers in whole.items() if not key[1]
    }
    # The steps go on in the scalar bounds: what each writer wrote is read once, at the end.
    for (stream, writer), numbers in _covered(parts).items():
        if writer and stream is Stream.EVENTS:
            start = max(written.events, read.events_by_writer.get(writer, 0))
            assert numbers == list(range(start + 1, written.events_by_writer[writer] + 1))
        elif writer:
            start = min(written.backfill, read.backfill_by_writer.get(writer, 0))
            assert numbers == list(range(written.backfill_by_writer[writer], start))
    # What was read stays read.
    for writer in WRITERS:
        for place in (-50, -5, 5, 50):
            if read.cover(writer, place):
                assert all(after.cover(writer, place) for after in steps[:-1])


@given(bounds_pairs(), st.sampled_from([*WRITERS, None]), st.integers(-60, 60))
def test_what_bounds_cover(pair: tuple[Bounds, Bounds], writer: str | None, place: int) -> None:
    # X4: what either covers both together do, and what no writer's bound reaches none does
    one, other = pair
    together = one.joined(other)
    assert together == other.joined(one) == together.joined(one)
    assert together.cover(writer, place) == (one.cover(writer, place) or other.cover(writer, place))


@given(bounds_pairs(), st.sampled_from(WRITERS), st.integers(-60, 60))
def test_what_is_beyond_other_bounds(pair: tuple[Bounds, Bounds], writer: str, place: int) -> None:
    # C1: a stored bound that Synapse's streams do not reach is seen, and no other
    one, other = pair
    assert not one.is_beyond(one.joined(other))
    for bounds in pair:
        assert not one.within(other).is_beyond(bounds)
    if one.cover(writer, place) and not other.cover(writer, place):
        assert one.is_beyond(other)
