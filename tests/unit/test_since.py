"""What clients hold to say how far they have read."""

import re
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from synapse_sticky.clients.since import MAX_POSITION, Since, digest_of, name_of_sender

EXTENSION = "org.matrix.msc4354.sticky_events"

positions = st.integers(0, 2**48 - 1)
room_ids = st.text(max_size=30).map(lambda name: f"!{name}:example.org")
event_ids = st.text(max_size=30).map(lambda name: f"${name}")
digits = st.text("0123456789", min_size=1, max_size=640)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


def test_positions_are_times() -> None:
    # C9: they are to fit for some thousands of years
    assert MAX_POSITION == 2**48 - 1
    assert MAX_POSITION > 5_000 * 365 * 24 * 3_600_000


@given(positions, st.sets(room_ids, max_size=64))
def test_round_trip(position: int, rooms: set[str]) -> None:
    # X1, X4
    since = Since.create(position, rooms)
    read = Since.parse(since.to_text(None))
    assert read == since
    assert read.position == position
    assert all(map(read.names, rooms))
    assert not read.names("!elsewhere:example.org")
    # This form, unlike any other, passes the checks of a Synapse without the module.
    assert re.fullmatch(r"sticky_[0-9]+", since.to_text(None))


@given(positions, st.sets(room_ids, max_size=70), st.sets(room_ids, max_size=70))
def test_rooms_named_later(position: int, rooms: set[str], more: set[str]) -> None:
    # C3, C5: who is told nothing of a room now is told all of it later
    since = Since.create(position, rooms)
    later = since.with_names(more, most=64)
    if not more:
        assert later == since
    elif len(rooms | more) <= 64:
        assert later == Since.create(position, rooms | more)
    else:
        assert later == Since(0)


@given(positions, st.sets(room_ids, max_size=64), st.integers(1, 2**31))
def test_round_trip_where_synapses_own_names_writers(
    position: int, rooms: set[str], writer_id: int
) -> None:
    # X1, X5
    since = Since.create(position, rooms)
    text = since.to_text(writer_id)
    assert Since.parse(text) == since
    # What Synapse's own finds in it: of two positions of a writer it takes the last.
    stream, *writers = text.removeprefix("sticky_m").split("~")
    assert int(stream) == 0
    assert {name: int(number) for name, _, number in (w.partition(".") for w in writers)} == {
        str(writer_id): 1
    }
    # Another's, or not whole.
    for other in (text[:-1] + "2", text.replace("m0", "m1"), text.rpartition("~")[0]):
        assert Since.parse(other) == Since(0)


@given(positions)
def test_nearly_always_a_token_is_the_plain_position(position: int) -> None:
    # X1
    assert Since.create(position, []).to_text(None) == f"sticky_{position}"
    assert Since.parse(f"sticky_{position}") == Since(position)


@given(positions, st.sets(room_ids, min_size=65, max_size=90))
def test_more_rooms_than_a_token_holds(position: int, rooms: set[str]) -> None:
    # X4: as many as there is space for, and always the same ones
    since = Since.create(position, rooms, most=64)
    read = Since.parse(since.to_text(None))
    assert read == since == Since.create(position, sorted(rooms, reverse=True), most=64)
    assert read.position == position
    assert sum(map(read.names, rooms)) == 64
    # A browser may put it into a header or an address one day.
    assert len(since.to_text(None)) < 700


def test_rooms_are_named_first_then_senders() -> None:
    # X4, X8: to lose the name of an event only means that it comes twice
    names = ["$event", name_of_sender(5), "!room:example.org", "$other", name_of_sender(2**64 - 1)]
    kept = [
        {name for name in names if Since.create(1, names, most=most).names(name)}
        for most in range(6)
    ]
    rooms, senders = {names[2]}, {names[1], names[4]}
    assert kept[1] == rooms
    assert kept[3] == rooms | senders
    assert kept[5] == set(names)
    assert [len(some) for some in kept] == [0, 1, 2, 3, 4, 5]


@given(positions, st.sets(room_ids, max_size=70), st.sets(event_ids, max_size=70))
def test_what_is_undecided_stands_behind_the_names(
    position: int, rooms: set[str], events: set[str]
) -> None:
    # C3, X3
    digests = set(map(digest_of, events))
    since = Since.create(position, rooms, 64, digests)
    assert Since.from_number(since.number) == since
    assert since == Since.create(position, rooms, 64, sorted(digests, reverse=True))
    assert since.digests == Since.create(position, rooms, 64).digests
    assert since.undecided <= digests
    assert len(since.undecided) == min(len(digests), 64 - len(since.digests))
    assert sum(map(since.leaves_undecided, events)) == len(since.undecided)
    assert not any(map(since.names, events))
    assert not any(map(since.leaves_undecided, rooms))
    # As an address may have it.
    assert len(str(since.number)) < 720


def test_the_largest_token_can_be_read_again() -> None:
    # X1
    largest = Since(MAX_POSITION, frozenset(range(2**32 - 400, 2**32)))
    assert Since.parse(largest.to_text(None)) == largest


@pytest.mark.parametrize(
    "text",
    ["sticky_m5", "sticky_m5~1.7", "sticky_m5~1.7~2.9", "sticky_m0~12.3"],
)
def test_tokens_of_several_writers_by_synapse_start_from_the_beginning(text: str) -> None:
    # X5
    assert Since.parse(text) == Since(0)


@pytest.mark.parametrize("number", [1, 7, 4711])
def test_tokens_of_one_writer_by_synapse_lie_before_everything(number: int) -> None:
    # X5: positions are times, and those are small numbers
    assert Since.parse(f"sticky_{number}").position == number < 10**12


@given(digits)
@example("0" * 640)
@example("9" * 640)
@example(str(2**48))
@example(str(2**80))
def test_any_number_can_be_read(text: str) -> None:
    # X5
    since = Since.parse(f"sticky_{text}")
    assert 0 <= since.position <= MAX_POSITION
    since.names("!room:example.org")
    # What is written for it is read in turn as the same.
    assert Since.parse(since.to_text(None)) == since


@given(st.integers(2**48, 2**200) | digits.map(lambda text: int(text) + 2**48))
def test_numbers_that_we_have_not_written_are_from_the_future(number: int) -> None:
    # C9, X5: everything is delivered again then, and nothing left out
    since = Since.from_number(number)
    assert since == Since(MAX_POSITION) or since.number == number


@pytest.mark.parametrize("count", [1, 2, 64])
def test_mutilated_tokens_are_from_the_future(count: int) -> None:
    # C9: whichever bit is wrong, but for one number in 65,536
    number = Since.create(1_795_000_000_000, [f"!{n}:example.org" for n in range(count)]).number
    assert number.bit_length() > 64
    read = [Since.from_number(number ^ 1 << bit) for bit in range(number.bit_length())]
    assert [since for since in read if since != Since(MAX_POSITION)] == []


@given(any_json)
@example("")
@example("sticky_")
@example("sticky_-1")
@example("sticky_1 ")
@example("sticky_1\n")
@example(" sticky_1")
@example("sticky_1.0")
@example("sticky_1e3")
@example("sticky_\u0663")
@example("sticky_m")
@example("sticky_m1~")
@example("sticky_m1~2")
@example("sticky_m1.2")
@example("sticky_m1~2.3~")
@example("sticky_m1~2.3\n")
@example("sticky_1_2")
@example("Sticky_1")
@example("s72594_4483_1934")
@example(5)
@example(True)
@example(["sticky_1"])
@example("sticky_" + "9" * 4001)
@example("sticky_" + "9" * 1_000_000)
def test_what_is_no_token(value: Any) -> None:
    # X5
    with pytest.raises(ValueError, match=re.escape(EXTENSION)) as caught:
        Since.parse(value)
    assert len(str(caught.value)) < 300


def test_a_book_of_digits_costs_nothing() -> None:
    # X5
    start = time.process_time()
    for head in ("sticky_", "sticky_m", "sticky_m1~1."):
        with pytest.raises(ValueError, match="since"):
            Since.parse(head + "1" * 3_000_000 + "!")
    assert time.process_time() - start < 1


@given(st.integers() | st.integers(-(2**5000), 2**5000))
@example(2**48)
@example(2**63)
@example(-1)
def test_positions_are_brought_into_range(number: int) -> None:
    # C9
    since = Since.from_number(number)
    assert 0 <= since.position <= MAX_POSITION
    if number < 0:
        assert since == Since(0)
    elif number <= MAX_POSITION:
        assert since == Since(number)


def test_tokens_outlive_restarts() -> None:
    # X4, C9: what they name must never depend on a process
    assert (
        Since.create(1, ["!room:example.org"]).to_text(None)
        == "sticky_65102244463251280562111905793"
    )


def test_digests_are_spread() -> None:
    # X4: two of a user's rooms are not mistaken for one another
    digests = [Since.create(0, [f"!{number}:example.org"]).digests for number in range(5_000)]
    assert len(set(digests)) >= 4_999
