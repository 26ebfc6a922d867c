"""Who sends next to a server, and how many servers are sent to at once."""

from hypothesis import given
from hypothesis import strategies as st

from synapse_sticky.servers.slots import Slots
from synapse_sticky.servers.turns import MAX_WAIT_MS, Ending, Turn

endings = st.sampled_from(Ending)


# F5a
@given(st.lists(st.tuples(st.sampled_from(["synapse", "ours"]), endings), max_size=40))
def test_synapse_waits_two_seconds_at_most_until_we_get_through(
    steps: list[tuple[str, Ending]],
) -> None:
    """However our transactions end, those of Synapse's that arrive wait no longer in all."""
    turn, waited = Turn(), 0
    for who, ending in steps:
        turn.go_ahead()
        if who == "synapse":
            # As long as it may.
            wait_ms = turn.synapse_waits_ms
            turn.synapse_waited(wait_ms)
            waited += wait_ms
            assert waited <= MAX_WAIT_MS
            turn.synapse_begins()
            turn.synapse_ended(arrived=ending is Ending.ARRIVED)
            if ending is not Ending.ARRIVED:
                waited = 0
        elif turn.claim():
            turn.ended(ending)
            if ending is Ending.ARRIVED:
                waited = 0


# F5a
@given(st.lists(endings, max_size=20), st.booleans())
def test_after_a_failure_of_ours_synapse_is_next(before: list[Ending], before_join: bool) -> None:
    """If the server was there when ours failed, we wait for Synapse's queue."""
    turn = Turn()
    for ending in before:
        assert turn.claim()
        turn.ended(ending)
    assert turn.claim()
    turn.ended(Ending.FAILED)
    assert turn.is_second(is_from_before_join=before_join)
    assert turn.synapse_waits_ms == 0


# F5a
@given(st.lists(endings, min_size=1, max_size=20))
def test_if_only_ours_fail_we_never_go_ahead(failures: list[Ending]) -> None:
    """Once Synapse's transactions arrive and ours do not, Synapse waits for nothing."""
    turn = Turn()
    turn.claim()
    turn.ended(Ending.UNAVAILABLE)
    turn.synapse_begins()
    turn.synapse_ended(arrived=True)
    for ending in failures:
        if ending is Ending.ARRIVED:
            continue
        assert turn.claim()
        turn.ended(ending)
        turn.go_ahead()
        assert not turn.is_ahead
        assert turn.synapse_waits_ms == 0
    turn.claim()
    turn.ended(Ending.ARRIVED)
    turn.go_ahead()
    assert turn.is_ahead


# F3
def test_a_server_that_was_away_is_first_sent_what_it_missed() -> None:
    turn = Turn()
    turn.synapse_begins()
    assert not turn.is_ahead
    turn.synapse_ended(arrived=False)
    assert turn.synapse_waits_ms == MAX_WAIT_MS
    assert not turn.is_second(is_from_before_join=False)
    turn.release(is_done=True)
    assert turn.synapse_waits_ms == 0


# F5
def test_the_turn_after_synapses_transaction_is_ours() -> None:
    """Though its next one would begin at once."""
    turn = Turn()
    turn.synapse_begins()
    assert not turn.claim()
    assert turn.synapse_waits_ms == 0
    turn.synapse_ended(arrived=True)
    assert turn.is_ours
    assert turn.synapse_waits_ms == MAX_WAIT_MS
    assert turn.claim()
    turn.ended(Ending.ARRIVED)
    assert not turn.is_ours


# F5
@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["take", "fail", "give back", "leave"])))
)
def test_slots_are_bounded_and_fair(steps: list[tuple[int, str]]) -> None:
    """Never more than there are; first come, first served; failing servers last."""
    slots, limit = Slots(3), 3
    taken: set[str] = set()
    waiting: dict[bool, list[str]] = {False: [], True: []}
    for number, action in steps:
        name = str(number)
        if action == "give back":
            slots.give_back(name)
            taken.discard(name)
            continue
        if action == "leave":
            slots.leave(name)
            for queue in waiting.values():
                if name in queue:
                    queue.remove(name)
            continue
        if name in taken:
            continue
        is_failing = action == "fail"
        if name in waiting[not is_failing]:
            waiting[not is_failing].remove(name)
        if name not in waiting[is_failing]:
            waiting[is_failing].append(name)
        is_next = len(taken) < limit and (waiting[False] or waiting[True])[0] == name
        assert slots.take(name, is_failing=is_failing) is is_next
        if is_next:
            waiting[is_failing].remove(name)
            taken.add(name)
        assert len(taken) <= limit
    for name in taken:
        slots.give_back(name)
    # Nobody waits for ever.
    for expected in (waiting[False] + waiting[True])[:limit]:
        assert slots.next() == expected
        assert slots.take(expected, is_failing=expected in waiting[True])
