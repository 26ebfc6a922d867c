"""What operators do to the database: sticky events still reach everybody afterwards."""

import contextlib
import shutil
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from harness.client import Client, MatrixError
from harness.homeserver import Homeserver
from harness.postgres import PostgresServer
from harness.wait import eventually
from tests.federation import purge_room
from tests.support import (
    HOUR_MS,
    MakeHomeserver,
    follow_until_seen,
    is_recorded,
    sabotage,
    section_ids,
    send_plain,
    send_sticky,
    unique,
)

pytestmark = pytest.mark.slow

Result = TypeVar("Result")

RESTORED = "was restored"
POSITION = "SELECT position FROM synapse_sticky_events WHERE event_id = ?"


def restore_dump(homeserver: Homeserver, dump: Path) -> None:
    """Replace all tables that a dump has. The module's stay as they are, if it has none."""
    database = homeserver.directory / "homeserver.db"
    newer = homeserver.directory / "newer.db"
    shutil.move(database, newer)
    shutil.copy(dump, database)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("ATTACH ? AS newer", (str(newer),))
        statements = connection.execute(
            "SELECT name, sql FROM newer.sqlite_master WHERE sql IS NOT NULL "
            "AND tbl_name LIKE 'synapse_sticky_%' ORDER BY type DESC"
        ).fetchall()
        for _, statement in statements:
            connection.execute(statement)
        for name, statement in statements:
            if statement.startswith("CREATE TABLE"):
                connection.execute(f"INSERT INTO main.{name} SELECT * FROM newer.{name}")
        connection.commit()


def times_of_syncs(reader: Client, sender: Client, room: str) -> list[float]:
    """How long answers take that show a new sticky event, sorted."""
    times = []
    since = reader.sync()["next_batch"]
    for _ in range(5):
        sender.send(room, sticky_ms=60_000)
        began = time.monotonic()
        since = reader.sync(since)["next_batch"]
        times.append(time.monotonic() - began)
    return sorted(times)


# C1, C9, X4
def test_a_dump_from_before_the_module(make_homeserver: MakeHomeserver) -> None:
    """Restored over a newer database: the module starts over, says so, and nobody waits."""
    homeserver = make_homeserver("sqlite", module=False)
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    homeserver.stop()
    dump = homeserver.directory / "dump.db"
    shutil.copy(homeserver.directory / "homeserver.db", dump)
    homeserver.reconfigure(module=True)
    homeserver.start()
    lost = send_sticky(alice, room, 3)
    send_plain(alice, room, 20)
    eventually(lambda: section_ids(bob, room) == lost, what="the events")
    bob.leave(room)
    bob.join(room)
    homeserver.stop()
    restore_dump(homeserver, dump)
    homeserver.start()
    sent = send_sticky(alice, room, 2)
    eventually(lambda: section_ids(bob, room) == sent, what="the events after that")
    assert homeserver.log().count(RESTORED) == 1
    times = times_of_syncs(bob, alice, room)
    # Who waits, waits every time.
    assert times[0] < 0.3, times
    # How an operator starts over, also while Synapse runs: what still lives comes again.
    since = bob.sync()["next_batch"]
    homeserver.execute("DELETE FROM synapse_sticky_progress")
    follow_until_seen(bob, room, sent, since)
    sent += send_sticky(alice, room)
    eventually(lambda: set(section_ids(bob, room)).issuperset(sent), what="the next event")
    assert homeserver.log().count(RESTORED) == 1


# C1, C9
@pytest.mark.parametrize("started_once", [True, False], ids=["started_once", "never_started"])
@pytest.mark.any_synapse
def test_from_sqlite_to_postgres(
    make_homeserver: MakeHomeserver, postgres: PostgresServer, started_once: bool
) -> None:
    """With synapse_port_db: what is sticky stays so, and the very first event afterwards is."""
    homeserver = make_homeserver(
        "sqlite", extra_config={"background_updates": {"sleep_duration_ms": 1}}
    )
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    before = send_sticky(alice, room, 2)
    eventually(lambda: section_ids(bob, room) == before, what="the events before")
    since = bob.sync()["next_batch"]
    homeserver.stop()
    homeserver.reconfigure(database=postgres.create_database())
    if started_once:
        homeserver.start()
        homeserver.stop()
    homeserver.port_from_sqlite()
    homeserver.start()
    (first,) = send_sticky(alice, room)
    eventually(lambda: section_ids(bob, room) == [*before, first], what="the first event")
    followed = follow_until_seen(bob, room, [first], since)
    if started_once:
        assert followed.seen(room) == [first]


def newest(homeserver: Homeserver) -> int:
    """The place of the newest event in the stream."""
    ((place,),) = homeserver.query("SELECT max(stream_ordering) FROM events")
    return int(place)


# C1
def test_a_database_that_is_set_back_while_synapse_runs(make_homeserver: MakeHomeserver) -> None:
    """As by a failover: what Synapse stores below what was read is noticed, and it is said once."""
    homeserver = make_homeserver("postgres", module_config={"cleanup_interval": "1s"})
    homeserver.start()
    admin = homeserver.register(admin=True)
    alice, bob = homeserver.register(), homeserver.register()
    room, lost = (alice.create_room(preset="public_chat") for _ in range(2))
    bob.join(room)
    before = send_sticky(alice, room)
    eventually(lambda: section_ids(bob, room) == before, what="the event before")
    place = newest(homeserver)
    homeserver.execute("SELECT setval('events_stream_seq', ?)", place + 1000)
    (gone,) = send_sticky(alice, lost)
    eventually(lambda: section_ids(alice, lost) == [gone], what="the event that gets lost")
    purge_room(homeserver, admin, lost)
    assert newest(homeserver) == place
    homeserver.execute("SELECT setval('events_stream_seq', ?)", place)
    sent = send_sticky(alice, room, 3)
    eventually(lambda: section_ids(bob, room) == before + sent, what="the events")
    assert newest(homeserver) < place + 1000
    times = times_of_syncs(bob, alice, room)
    assert times[0] < 0.45, times
    assert homeserver.log().count("was set back while Synapse was running") == 1
    homeserver.stop()
    # Synapse does not start again without this, and says so.
    homeserver.execute("DELETE FROM stream_positions WHERE stream_name = 'events'")
    homeserver.start()
    sent += send_sticky(alice, room, 2)
    eventually(lambda: set(section_ids(bob, room)).issuperset(sent), what="events after that")
    assert homeserver.log().count("Restart Synapse") == 1


def patiently(request: Callable[[], Result]) -> Result:
    """Ask a Synapse that still notices which of its connections are lost."""

    def ask() -> Result | None:
        try:
            return request()
        except MatrixError:
            return None

    return eventually(ask, 20, "Synapse, with its database")


def send_patiently(client: Client, room: str, count: int) -> list[str]:
    """Send sticky events, each once."""
    return [
        patiently(partial(client.send, room, sticky_ms=HOUR_MS, txn_id=unique()))
        for _ in range(count)
    ]


def assert_section_everywhere(user: Client, room: str, wanted: list[str]) -> None:
    """Every reader shows these sticky events, in this order, once it knows of them."""
    for url in user.homeserver.client_urls:
        section = partial(section_ids, user.via(url), room)
        eventually(lambda section=section: patiently(section) == wanted)  # type: ignore[misc]


# C1, C9
def test_workers_whose_database_is_set_back(
    make_homeserver: MakeHomeserver, own_postgres: PostgresServer, tmp_path: Path
) -> None:
    """By a dump without the module's tables, while stopped; then by a failover while running."""
    database = own_postgres.create_database()
    homeserver = make_homeserver(
        "workers", database=database, module_config={"cleanup_interval": "1s"}
    )
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    before = send_sticky(alice, room, 2)
    dump = tmp_path / "dump"
    own_postgres.dump(database, dump, "--exclude-table=synapse_sticky_*")
    lost = send_sticky(alice, room, 3)
    send_plain(alice, room, 20)
    since = follow_until_seen(bob, room, before + lost).next_batch

    homeserver.stop()
    own_postgres.restore(database, dump)
    homeserver.start()
    sent = before + send_sticky(alice, room, 2)
    assert_section_everywhere(bob, room, sent)
    # Whoever has read beyond is not kept from what comes.
    since = follow_until_seen(bob, room, sent[2:], since).next_batch
    assert homeserver.log().count(RESTORED) == 1

    carol = homeserver.register()
    other = carol.create_room()
    with own_postgres.failing_over():
        lost = send_patiently(carol, other, 20)
        eventually(lambda: is_recorded(homeserver, lost[-1]), what="the events that get lost")
    for _ in range(3):
        sent += send_patiently(alice, room, 1)
        assert_section_everywhere(bob, room, sent)
    patiently(lambda: follow_until_seen(bob, room, sent[4:], since))
    assert homeserver.log().count("was set back while Synapse was running") == 1


# C3
def test_an_event_that_is_stored_while_the_module_starts_over(
    make_homeserver: MakeHomeserver, tmp_path: Path
) -> None:
    """It is found among all events, and again where the streams go on: it comes once."""
    homeserver = make_homeserver("sqlite")
    find = "synapse_sticky.seams.tables:SynapseTables.find_recent_candidates"
    sabotage(homeserver, "Unreliable", {"directory": str(tmp_path), "functions": [find]})
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    before = send_sticky(alice, room)
    eventually(lambda: section_ids(bob, room) == before, what="the event before")
    slow = tmp_path / "slow_find_recent_candidates"
    slow.touch()
    homeserver.execute("DELETE FROM synapse_sticky_progress")
    eventually((tmp_path / "in_find_recent_candidates").exists, 30, "the module starts over")
    (meanwhile,) = send_sticky(alice, room)
    slow.unlink()
    eventually(lambda: is_recorded(homeserver, meanwhile), what="the event")
    (first,) = homeserver.query(POSITION, meanwhile)
    (afterwards,) = send_sticky(alice, room)
    eventually(lambda: is_recorded(homeserver, afterwards), what="the next event")
    assert homeserver.query(POSITION, meanwhile) == [first]
