"""What payments cost Synapse's own traffic to a server: nothing to speak of."""

from statistics import median, quantiles

import pytest

from tests.unit.paying import Queue, World


# F5, F5a
@pytest.mark.parametrize(
    ("takes_ms", "asks_ms", "every_ms"),
    [(300, 1_000, 700), (1_000, 1_000, 1_200), (100, 300, 150), (500, 20, 700)],
)
def test_queue_waits_for_transactions_only(takes_ms: int, asks_ms: int, every_ms: int) -> None:
    """Never while a server is only asked something, in whatever room."""
    world = World()
    server = world.server("b.example", takes_ms=takes_ms, asks_ms=asks_ms)
    queue = Queue(world, server, every_ms)
    for number in range(20):
        world.events(f"!{number}", 60)
        world.join(f"!{number}", server)
    assert world.run_until_paid([server], 900_000)
    # One of ours at a time.
    assert max(queue.waits) <= takes_ms + 20
    assert queue.refused == 0
    assert set(server.copies.values()) == {2}
    assert world.api.errors == []


# F5, F5a
@pytest.mark.parametrize(("takes_ms", "every_ms"), [(2_500, 3_000), (4_000, 5_000), (2_500, 1_000)])
def test_queue_to_a_slow_server(takes_ms: int, every_ms: int) -> None:
    """It waits until ours has ended, which then rests: nothing of Synapse's is refused."""
    world = World()
    server = world.server("b.example", takes_ms=takes_ms, asks_ms=20)
    queue = Queue(world, server, every_ms)
    world.events("!room", 1_000)
    world.join("!room", server)
    world.time.run(lambda: False, 900_000)
    assert queue.refused == 0
    # Without us each takes as long as a transaction, and what came during the one before.
    alone_ms = takes_ms if every_ms > takes_ms else 2 * takes_ms
    assert median(queue.latencies) <= 3 * alone_ms / 2
    assert quantiles(queue.latencies, n=20)[-1] <= alone_ms + takes_ms
    # It is paid all the same.
    assert len(server.copies) >= 500


# F5a
def test_queue_to_a_server_that_hangs_for_ours_only() -> None:
    """It waits for two seconds in all."""
    world = World()
    server = world.server("b.example", takes_ms=20)
    queue = Queue(world, server, 1_000)
    world.time.run(lambda: False, 5_000)
    server.hangs = True
    world.events("!room", 100)
    world.join("!room", server)
    world.time.run(lambda: False, 120_000)
    assert 1_900 <= sum(queue.waits) <= 2_100
    assert len(queue.latencies) >= 120


# F3, F5a
@pytest.mark.parametrize("every_ms", [None, 600_000, 2_000])
@pytest.mark.parametrize("status", [400, 413, 500, 0, 429, 503, 504])
def test_oldest_event_cannot_be_taken(status: int, every_ms: int | None) -> None:
    """The others arrive all the same, whether Synapse has anything for the server or not."""
    world = World()
    server = world.server("b.example")
    server.breaks = lambda event_ids: status if "$1" in event_ids else None
    world.time.run(lambda: False, 2_000)
    world.events("!room", 20)
    if every_ms is not None:
        Queue(world, server, every_ms)
    world.join("!room", server)
    rest = {f"${number}" for number in range(2, 21)}
    # The second may also mean that nobody is there.
    limit_ms = 60_000 if status in (400, 413, 500) else 300_000
    assert world.time.run(lambda: server.kept >= rest, limit_ms)


# F3, F5a
@pytest.mark.parametrize("status", [413, 0, 429, 504])
def test_transactions_that_are_too_large(status: int) -> None:
    """They get smaller, whatever tells that they are."""
    world = World()
    server = world.server("b.example")
    server.breaks = lambda event_ids: status if len(event_ids) > 10 else None
    world.time.run(lambda: False, 2_000)
    world.events("!room", 40)
    world.join("!room", server)
    assert world.time.run(lambda: len(server.kept) == 40, 90_000)


# F3, F5
def test_queue_that_is_never_idle() -> None:
    """It goes first for half a minute, and then we take turns with it."""
    world = World(federation_grace_period="1s")
    server = world.server("b.example", takes_ms=100)
    Queue(world, server, 50)
    world.joined("!room", server)
    world.time.run(lambda: False, 2_000)
    world.events("!room", 300)
    sticky = {f"${number}" for number in range(1, 301)}
    assert world.time.run(lambda: server.kept >= sticky, 60_000)
