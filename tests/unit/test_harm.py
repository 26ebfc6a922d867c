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
