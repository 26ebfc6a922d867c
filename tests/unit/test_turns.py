"""Who sends next to a server, and how many servers are sent to at once."""

from hypothesis import given
from hypothesis import strategies as st

from synapse_sticky.servers.slots import Slots
from synapse_sticky.servers.turns import MAX_SENDING_MS, MAX_WAIT_MS, Ending, Ours, Turn

endings = st.sampled_from(Ending)


def wait_fully(turn: Turn) -> int:
    """Let a transaction of Synapse's queue wait as long as it may; return how long."""
    turn.synapse_comes()
    waited_ms = turn.synapse_waits_ms
    turn.synapse_waited(waited_ms)
    turn.synapse_begins(0)
    return waited_ms


# F5a
@given(st.lists(st.tuples(st.sampled_from(["synapse", "ours"]), endings), max_size=40))
def test_synapse_waits_once_for_an_outage(steps: list[tuple[str, Ending]]) -> None:
    """However our transactions end, those of Synapse's that arrive wait no longer in all."""
    turn, waited = Turn(), 0
    for who, ending in steps:
        turn.go_ahead()
        if who == "synapse":
            waited += wait_fully(turn)
            assert waited <= MAX_WAIT_MS
            turn.synapse_ended(0, arrived=ending is Ending.ARRIVED)
            if ending is not Ending.ARRIVED:
                # The next outage.
                waited = 0
        elif turn.claim():
            is_ahead = turn.is_ahead
            turn.ended(ending, 0)
            if ending is Ending.ARRIVED and not is_ahead:
                waited = 0


# F5a
@given(st.lists(st.tuples(st.sampled_from(["synapse", "ours"]), endings), max_size=40))
def test_without_an_outage_synapse_waits_for_what_arrives(
    steps: list[tuple[str, Ending]],
) -> None:
    """For two seconds in all, until a transaction of ours has arrived again."""
    turn, waited = Turn(), 0
    for who, ending in steps:
        if who == "synapse":
            waited += wait_fully(turn)
            assert waited <= MAX_WAIT_MS
            turn.synapse_ended(0, arrived=True)
        elif turn.claim():
            if ending is Ending.FAILED:
                # Synapse's transaction comes while ours is on its way.
                turn.synapse_comes()
                wait_ms = turn.synapse_waits_ms
                turn.synapse_waited(wait_ms)
                waited += wait_ms
                turn.synapse_begins(0)
                turn.synapse_ended(0, arrived=True)
            if ending is not Ending.UNAVAILABLE:
                turn.ended(ending, 0)
            waited *= ending is not Ending.ARRIVED


# F5a
@given(st.lists(endings, max_size=20), st.booleans())
def test_after_a_failure_of_ours_synapse_is_next(before: list[Ending], before_join: bool) -> None:
    """If the server was there when ours failed, we wait for Synapse's queue."""
    turn = Turn()
    for ending in before:
        assert turn.claim()
        turn.ended(ending, 0)
    assert turn.claim()
    turn.ended(Ending.FAILED, 0)
    assert turn.is_second(is_from_before_join=before_join)
    assert turn.synapse_waits_ms == 0


# F5a
@given(st.lists(endings, min_size=1, max_size=20))
def test_if_only_ours_fail_we_never_go_ahead(failures: list[Ending]) -> None:
    """Once Synapse's transactions arrive and ours do not, Synapse waits for nothing."""
    turn = Turn()
    turn.claim()
    turn.ended(Ending.UNAVAILABLE, 0)
    turn.synapse_begins(0)
    turn.synapse_ended(0, arrived=True)
    for ending in failures:
        if ending is Ending.ARRIVED:
            continue
        assert turn.claim()
        turn.ended(ending, 0)
        turn.go_ahead()
        assert not turn.is_ahead
        assert turn.synapse_waits_ms == 0
    turn.claim()
    turn.ended(Ending.ARRIVED, 0)
    turn.go_ahead()
    assert turn.is_ahead


# F3
def test_a_server_that_was_away_is_first_sent_what_it_missed() -> None:
    turn = Turn()
    turn.synapse_begins(0)
    assert not turn.is_ahead
    turn.synapse_ended(0, arrived=False)
    assert turn.synapse_waits_ms == MAX_WAIT_MS
    assert not turn.is_second(is_from_before_join=False)
    turn.finish()
    assert turn.synapse_waits_ms == 0


# F5
def test_the_turn_after_synapses_transaction_is_ours() -> None:
    """Though its next one would begin at once, and we wait for ours without doing anything."""
    turn = Turn()
    turn.synapse_begins(0)
    assert not turn.claim()
    turn.give_way()
    assert turn.synapse_waits_ms == 0
    turn.synapse_ended(0, arrived=True)
    assert turn.is_ours
    assert turn.synapse_waits_ms == MAX_WAIT_MS
    turn.synapse_comes()
    assert turn.claim()
    turn.ended(Ending.ARRIVED, 0)
    assert not turn.is_ours


# F5
def test_synapse_is_next_if_it_waits() -> None:
    """A transaction of Synapse's does not wait for two of ours in a row."""
    turn = Turn()
    assert turn.claim()
    turn.synapse_comes()
    turn.ended(Ending.ARRIVED, 0)
    assert not turn.claim()
    assert turn.synapse_waits_ms == 0
    turn.synapse_begins(0)
    turn.synapse_ended(0, arrived=True)
    assert turn.claim()


# F5
def test_turn_that_is_not_needed_any_more() -> None:
    turn = Turn()
    turn.synapse_begins(0)
    assert not turn.claim()
    turn.finish()
    turn.synapse_ended(0, arrived=True)
    assert not turn.is_ours


# F5
@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["take", "fail", "give back"]))),
    st.integers(1, 3),
)
def test_slots_are_bounded_and_fair(steps: list[tuple[int, str]], limit: int) -> None:
    """Never more than there are; first come, first served; failing servers last."""
    slots = Slots(limit)
    held: list[str] = []
    waiting: dict[bool, list[str]] = {False: [], True: []}

    def give_all() -> None:
        while (given := slots.give()) is not None:
            queue = waiting[False] or waiting[True]
            assert given[0] == queue.pop(0)
            held.append(given[0])
            assert slots.has(given[0])
        assert len(held) == min(limit, len(held) + len(waiting[False] + waiting[True]))

    for number, action in steps:
        name = str(number)
        if action == "give back":
            slots.take_back(name)
            if name in held:
                held.remove(name)
        elif not slots.is_waiting(name):
            slots.request(name, is_failing=action == "fail")
            if name not in held:
                waiting[action == "fail"].append(name)
                assert slots.is_waiting(name)
        give_all()
    while held:
        slots.take_back(held.pop(0))
        give_all()
    # Nobody waits for ever.
    assert not any(waiting.values())


# F5
def test_late_return_of_a_slot_takes_no_other_one() -> None:
    """A server that has had a slot for long enough may have the next one by then."""
    slots = Slots(1)
    slots.request("a", is_failing=False)
    assert slots.give() == ("a", 1)
    slots.take_back("a")
    slots.request("a", is_failing=False)
    assert slots.give() == ("a", 2)
    slots.take_back("a", 1)
    assert slots.has("a")
    slots.take_back("a", 2)
    assert not slots.has("a")


# F5a
def test_synapse_waits_for_the_end_of_ours_that_is_on_its_way() -> None:
    """It would be refused meanwhile; but not once one of ours has failed.

    If it is known how long transactions to the server take: for twice as long.
    """
    turn = Turn()
    turn.synapse_begins(0)
    turn.synapse_ended(MAX_SENDING_MS, arrived=True)
    for ending in (Ending.ARRIVED, Ending.FAILED):
        assert turn.claim()
        turn.synapse_comes()
        assert turn.synapse_waits_ms == MAX_WAIT_MS
        turn.began(0)
        turn.synapse_waited(MAX_WAIT_MS)
        assert turn.synapse_waits_ms == MAX_SENDING_MS - MAX_WAIT_MS
        turn.ended(ending, MAX_WAIT_MS)
        # We rest, so that what has come in between is sent first.
        assert turn.rests_until > 4 * MAX_WAIT_MS
        turn.synapse_begins(0)
        turn.synapse_ended(0, arrived=True)
    turn.claim()
    turn.began(0)
    assert turn.synapse_waits_ms == 0


# F5a
@given(st.integers(0, 2 * MAX_SENDING_MS), st.booleans())
def test_synapse_waits_long_if_transactions_are_known_to_take_long(
    took_ms: int, is_ours: bool
) -> None:
    """Synapse's or ours; otherwise for two seconds: the server may hang for ours only."""
    turn = Turn()
    if is_ours:
        turn.claim()
        turn.began(0)
        turn.ended(Ending.ARRIVED, took_ms)
    else:
        turn.synapse_begins(0)
        turn.synapse_ended(took_ms, arrived=True)
    turn.claim()
    turn.began(took_ms)
    turn.synapse_comes()
    assert turn.synapse_waits_ms == max(MAX_WAIT_MS, min(2 * took_ms, MAX_SENDING_MS))


# F5
def test_turn_is_never_ours_while_synapse_sends() -> None:
    """Though it was before, and Synapse has waited for as long as it may."""
    turn = Turn()
    assert turn.claim()
    turn.synapse_comes()
    turn.synapse_begins(0)
    assert not turn.is_ours
    assert not turn.claim()
    assert turn.is_after_this
    turn.synapse_ended(0, arrived=True)
    assert turn.ours is Ours.NEXT


# F5
def test_turn_stays_ours_until_our_transaction_has_ended() -> None:
    """Though one of Synapse's, which could not wait for longer, began and ended meanwhile."""
    turn = Turn()
    assert turn.claim()
    turn.began(0)
    turn.synapse_begins(0)
    turn.synapse_ended(0, arrived=False)
    turn.give_way()
    assert turn.is_ours
    turn.ended(Ending.ARRIVED, 0)
    assert not turn.is_ours
