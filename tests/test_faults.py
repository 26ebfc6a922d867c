"""Nothing is lost: under load, and whichever process is killed at whatever moment."""

import random
import threading
import time

import pytest

from harness.client import Client
from harness.homeserver import BACKGROUND_WORKER, Homeserver
from harness.wait import eventually
from tests.support import MakeHomeserver
from tests.traffic import DURATION_MS, Reader, Traffic, send_until_acknowledged

pytestmark = pytest.mark.slow


def _users(homeserver: Homeserver, count: int) -> list[Client]:
    return [homeserver.register() for _ in range(count)]


def _rooms(members: list[Client], count: int) -> list[str]:
    """Public rooms that everybody is in."""
    room_ids = [members[0].create_room(preset="public_chat") for _ in range(count)]
    for member in members[1:]:
        for room_id in room_ids:
            member.join(room_id)
    return room_ids


# On workers, those whose processes are killed below lose nothing either.
# C1, C2, C3, C4
@pytest.mark.repeats("postgres", "workers")
@pytest.mark.any_synapse
def test_six_senders_lose_nothing(homeserver: Homeserver) -> None:
    """500 sticky events of six senders reach a reader with a timeline limit of 1, each once."""
    senders, reader = _users(homeserver, 6), Reader(homeserver.register())
    room_ids = _rooms([*senders, reader.client], 2)
    reader.read()
    with Traffic(senders, room_ids) as traffic:
        deadline = time.monotonic() + 300
        while len(traffic.acknowledged) < 500 and time.monotonic() < deadline:
            reader.read(timeout_ms=200)
    assert not traffic.errors
    assert len(traffic.acknowledged) >= 500
    assert not reader.read_all(traffic.acknowledged, timeout_s=90)
    assert {event_id: n for event_id, n in reader.seen.items() if n > 1} == {}
    # A reader that was away all the time gets the same, in pages.
    late = Reader(reader.client.second_device())
    assert not late.read_all(traffic.acknowledged, timeout_s=120)
    assert len(set(late.order)) == len(late.order)


# C3, C6
@pytest.mark.parametrize("kind", ["sqlite", "workers"])
def test_kills_lose_nothing(
    make_homeserver: MakeHomeserver, kind: str, pytestconfig: pytest.Config
) -> None:
    """Every acknowledged event is delivered, though processes are killed at random moments."""
    kills = pytestconfig.getoption("--kills")
    homeserver = make_homeserver(kind)
    homeserver.start()
    senders, reader = _users(homeserver, 3), Reader(homeserver.register())
    room_ids = _rooms([*senders, reader.client], 4 if kind == "workers" else 2)
    reader.read()
    stop = threading.Event()

    def read_on() -> None:
        while not stop.is_set():
            reader.read(timeout_ms=500)

    reading = threading.Thread(target=read_on)
    reading.start()
    try:
        # With pauses: a deployment of workers has a lot to do for each event.
        with Traffic(senders, room_ids, pause_s=0.2) as traffic:
            for number in range(kills):
                victim = homeserver.processes[number % len(homeserver.processes)]
                if number % 3:
                    had = len(traffic.acknowledged)
                    eventually(lambda: len(traffic.acknowledged) > had, 60, "traffic")  # noqa: B023
                # Otherwise perhaps before anything else is done.
                time.sleep(random.uniform(0, 0.5))
                homeserver.kill(victim)
                homeserver.start_process(victim)
    finally:
        stop.set()
        reading.join()
    assert not traffic.errors
    assert len(traffic.acknowledged) >= kills
    assert not reader.read_all(traffic.acknowledged, timeout_s=120)
    # And a device that was not there sees all of it as well.
    late = Reader(reader.client.second_device())
    assert not late.read_all(traffic.acknowledged, timeout_s=120)


# C6
@pytest.mark.parametrize("kind", ["workers"])
def test_background_worker_comes_back(make_homeserver: MakeHomeserver, kind: str) -> None:
    """While nobody gives out positions, syncs go on; what was sent comes once somebody does."""
    homeserver = make_homeserver(kind)
    homeserver.start()
    alice, bob = _users(homeserver, 2)
    (room_id,) = _rooms([alice, bob], 1)
    reader = Reader(bob, timeline_limit=1)
    reader.read()
    homeserver.kill(BACKGROUND_WORKER)
    sent = [send_until_acknowledged(alice, room_id, number) for number in range(5)]
    started = time.monotonic()
    reader.read()
    assert time.monotonic() - started < 5
    assert not set(sent) <= reader.seen.keys()
    homeserver.start_process(BACKGROUND_WORKER)
    assert not reader.read_all(sent, timeout_s=90)


# C6: a lost signal
def test_lost_signal_is_repaired(make_homeserver: MakeHomeserver) -> None:
    """A change of the tables that no process was told of is noticed all the same."""
    homeserver = make_homeserver("sqlite", module_config={"poll_interval": "500ms"})
    homeserver.start()
    alice = homeserver.register()
    room_id = alice.create_room()
    event_id = alice.send(room_id, sticky_ms=DURATION_MS)
    plain_id = alice.send(room_id)
    reader = Reader(alice, timeline_limit=1)
    reader.read_all([event_id], timeout_s=10)
    # As another process would write it, but without its signal.
    ((last_position, expires_ts),) = homeserver.query(
        "SELECT p.last_position, e.expires_ts FROM synapse_sticky_progress AS p, "
        "synapse_sticky_events AS e"
    )
    homeserver.execute(
        "UPDATE synapse_sticky_events SET revision = ?, position = ?",
        last_position + 1,
        last_position + 1,
    )
    homeserver.execute("UPDATE synapse_sticky_progress SET last_position = ?", last_position + 1)
    assert expires_ts
    assert plain_id
    eventually(lambda: reader.read() and reader.seen[event_id] == 2, what="the event again")


# C3
def test_another_process_gave_out_positions(make_homeserver: MakeHomeserver) -> None:
    """Who finds that positions were given out meanwhile looks again, and loses nothing."""
    homeserver = make_homeserver("sqlite")
    homeserver.start()
    alice = homeserver.register()
    room_id = alice.create_room()
    first = alice.send(room_id, sticky_ms=DURATION_MS)
    reader = Reader(alice, timeline_limit=1)
    assert not reader.read_all([first], timeout_s=10)
    recorded = "SELECT position FROM synapse_sticky_events ORDER BY position"
    # The timeline may have shown it before.
    eventually(lambda: len(homeserver.query(recorded)) == 1, 10, "the first position")
    ahead = "UPDATE synapse_sticky_progress SET last_position = last_position + 60000"
    assert homeserver.execute(ahead) == 1
    second = alice.send(room_id, sticky_ms=DURATION_MS)
    alice.send(room_id)
    assert not reader.read_all([second], timeout_s=10)
    eventually(lambda: len(homeserver.query(recorded)) == 2, 10, "the second position")
    positions = homeserver.query(recorded)
    ((last_position,),) = homeserver.query("SELECT last_position FROM synapse_sticky_progress")
    assert positions[1][0] - positions[0][0] > 50_000
    assert positions[1][0] == last_position
