"""What a server shows of its history: whatever it lost of many events in a row comes again."""

from collections.abc import Collection
from typing import Any

import pytest

from synapse_sticky.seams.federation import Answer
from synapse_sticky.servers.confirmation import Reply
from tests.unit.paying import HOUR_MS, Pdu, Server, World


def assert_paid(world: World, server: Server, count: int) -> None:
    """All of them arrive."""
    assert world.run_until_paid([server], HOUR_MS)
    world.time.run(lambda: not server.staged, 200_000)
    lost = {f"${number + 1}" for number in range(count)} - server.kept
    assert not lost, f"{len(lost)} are lost"


# F2, F5
@pytest.mark.parametrize(("reads_ms", "others"), [(20, 70), (10, 90)])
def test_pruned_in_the_middle_of_a_transaction(reads_ms: int, others: int) -> None:
    """A Synapse stages a transaction's events one by one, and may prune between two of them."""
    world = World()
    server = world.server("b.example", reads_ms=reads_ms)

    async def send(server_name: str, events: Collection[Pdu]) -> Answer:
        for event in events:
            server.copies[event.event_id] += 1
            world.network.stage(server, event.event_id)
            await world.time.sleep(4)
        server.sends += 1
        return Answer(frozenset(event.event_id for event in events), frozenset())

    fake: Any = world.network
    fake.send = send

    def push() -> None:
        for number in range(others):
            world.network.stage(server, f"$other{number}")

    world.time.call_later(1_600, push)
    world.events("!room", 300, row_of=300)
    world.join("!room", server)
    assert_paid(world, server, 300)


# F2, F5
def test_server_that_does_not_know_the_question() -> None:
    """It is asked for single events, and sent all twice."""
    world = World()
    server = world.server("b.example", reads_ms=20, tells_history=False)
    world.events("!room", 1_000, row_of=1_000)
    world.join("!room", server)
    assert_paid(world, server, 1_000)
    assert set(server.copies.values()) == {2}


def answers_truly_after(world: World, server: Server, wait_ms: int) -> None:
    """Let a server answer what is so from then on, as when its join has ended."""
    world.time.call_later(wait_ms, lambda: setattr(server, "reply", None))


# F2
def test_server_that_may_not_tell() -> None:
    """It reads slowly while its faster join is under way."""
    world = World()
    server = world.server("b.example", reads_ms=100, reply=Reply.MAY_NOT_TELL)
    answers_truly_after(world, server, 30_000)
    world.events("!room", 1_000, row_of=1_000)
    world.join("!room", server)
    assert_paid(world, server, 1_000)


# F2
def test_later_events_in_the_same_transaction() -> None:
    """The last is from after the join, and has come though others before it are lost."""
    world = World()
    server = world.server("b.example", reads_ms=40, reply=Reply.HAS_NOT)
    answers_truly_after(world, server, 20_000)
    world.events("!room", 145, row_of=145)
    world.join("!room", server)
    world.events("!room", 5)
    for number in range(146, 151):
        world.network.previous[f"${number}"] = [f"${number - 1}"]
    send = world.network.send

    async def send_and_push(server_name: str, events: Collection[Pdu]) -> Answer:
        answer = await send(server_name, events)
        if server.copies["$150"] == 1:
            for number in range(60):
                world.network.stage(server, f"$other{number}")
        return answer

    fake: Any = world.network
    fake.send = send_and_push
    assert_paid(world, server, 150)


# F1, F2
@pytest.mark.parametrize("refused", [1, 5, 11, 20, 60])
def test_first_that_nobody_can_ask_for(refused: int) -> None:
    """It was refused with those after it, and then the server was away: that says nothing."""
    world = World()
    server = world.server("b.example", reads_ms=10)
    refusals = iter([False] * refused)
    server.fetches = lambda: next(refusals, True)
    away_until_ms = 0

    async def has_in_history(server_name: str, event_id: str) -> Reply:
        nonlocal away_until_ms
        now = world.time.monotonic_ms()
        if event_id == "$1" and not away_until_ms:
            away_until_ms = now + 200_000
        is_away = now < away_until_ms
        server.fails = 504 if is_away else None
        await world.time.sleep(10_000 if is_away else 20)
        if is_away:
            return Reply.SILENT
        return Reply.HAS if event_id in server.kept else Reply.HAS_NOT

    fake: Any = world.network
    fake.has_in_history = has_in_history
    world.events("!room", 300, row_of=300)
    world.join("!room", server)
    assert_paid(world, server, 300)
