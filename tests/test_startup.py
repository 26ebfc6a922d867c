"""What the module does when Synapse starts: refuse, create and upgrade its tables, catch up."""

import importlib.metadata
import subprocess
import sys
import threading
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.client import JsonDict
from harness.homeserver import MODULE, Homeserver
from harness.postgres import PostgresServer
from harness.remote import RemoteServer
from harness.wait import eventually
from synapse_sticky.storage.migrations import COMPATIBLE_VERSION
from tests.federation import wait_until_joined, wait_until_received
from tests.sliding import Connection, drained
from tests.support import (
    HOUR_MS,
    MakeHomeserver,
    assert_once,
    drop_tables,
    follow_until_seen,
    ids,
    is_recorded,
    is_stored,
    now_ms,
    our_tables,
    reasons,
    remaining_ms,
    sabotage,
    send_plain,
    send_sticky,
    serious_problems,
    sticky,
    sticky_in,
    timeline_in,
)

pytestmark = pytest.mark.slow

SYNAPSE_VERSION = importlib.metadata.version("matrix-synapse")


# Mistakes


@pytest.mark.parametrize(
    ("config", "path", "complaints"),
    [
        ({"max_events_per_synk": 5}, ".max_events_per_synk", ["max_events_per_sync"]),
        ({"max_events_per_sync": 0}, ".max_events_per_sync", ["got 0", "1 to 100"]),
        ({"poll_interval": 5}, ".poll_interval", ["got 5", "500ms"]),
        (["cleanup_interval"], "", ["got ['cleanup_interval']"]),
    ],
)
@pytest.mark.any_synapse
def test_mistakes_in_the_configuration(
    make_homeserver: MakeHomeserver, config: Any, path: str, complaints: list[str]
) -> None:
    """Synapse does not start, and says which option is wrong, and what is right."""
    # O2
    module = {"module": MODULE, "config": config}
    homeserver = make_homeserver(extra_config={"modules": [module]})
    output = homeserver.start_expecting_failure()
    for complaint in (f"'modules.<item 0>.config{path}'", *complaints):
        assert complaint in output
    # A mistake of the administrator's, and no crash.
    assert "Traceback" not in output


@pytest.mark.parametrize("kind", ["sqlite", "workers"])
def test_synapses_own_sticky_events(make_homeserver: MakeHomeserver, kind: str) -> None:
    """Where they are switched on the module takes their place, and every process says so once."""
    # O4
    homeserver = make_homeserver(kind, own_flag=True)
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    sent = send_sticky(alice, room, 2)
    send_plain(alice, room, 11)
    followed = follow_until_seen(bob, room, sent)
    # Synapse's own would come first, and the same events once more.
    assert followed.sticky(room) == sent
    assert_once(followed, room, sent)
    # Nothing is left for Synapse's own to hand out when they are back.
    assert homeserver.query("SELECT count(*) FROM sticky_events") == [(0,)]
    for process in homeserver.processes:
        told = [
            line
            for line in homeserver.log(process).splitlines()
            if " INFO synapse_sticky" in line and "msc4354_enabled: true" in line
        ]
        assert len(told) == 1, process
    assert serious_problems(homeserver.problems_since({})) == []
    homeserver.stop()
    homeserver.reconfigure(own_flag=False)
    position = homeserver.log_position()
    homeserver.start()
    assert "msc4354_enabled" not in homeserver.log_since(position)


@pytest.mark.parametrize("version", ["1.147.1", "1.148.0rc1"])
@pytest.mark.any_synapse
def test_synapse_that_is_too_old(
    make_homeserver: MakeHomeserver, tmp_path: Path, version: str
) -> None:
    """A real Synapse from before the oldest tested one is refused in one line."""
    # O2
    homeserver = make_homeserver(python=python_with_synapse(version, tmp_path))
    output = homeserver.start_expecting_failure()
    heading, message = output.strip().splitlines()
    assert heading == "Error in configuration:"
    assert f"needs Synapse 1.148.0 or later, and this is {version}. Upgrade Synapse, or" in message


def python_with_synapse(version: str, directory: Path) -> str:
    """Install another Synapse over the libraries of this Python, and return what runs it."""
    packages = directory / "packages"
    options = ["--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
    what = ["--target", str(packages), f"matrix-synapse=={version}"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *what], check=True)
    python = directory / "python"
    paths = f'"{packages}${{PYTHONPATH:+:$PYTHONPATH}}"'
    python.write_text(f'#!/bin/sh\nPYTHONPATH={paths} exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.mark.any_synapse
def test_module_that_is_listed_twice(make_homeserver: MakeHomeserver) -> None:
    """Synapse does not start, and the last line says exactly that."""
    # O2
    module = {"module": MODULE, "config": {}}
    homeserver = make_homeserver(extra_config={"modules": [module, module]})
    output = homeserver.start_expecting_failure()
    last_line = output.rstrip().splitlines()[-1]
    assert "listed 2 times under `modules` in homeserver.yaml. Remove all of its" in last_line
    assert "does not fit" not in output


@pytest.mark.any_synapse
def test_synapse_that_is_newer_than_tested(make_homeserver: MakeHomeserver) -> None:
    """It starts, and says once that nobody has tried this: of the next release, not of a patch."""
    homeserver = make_homeserver()
    for version, is_newer in (
        ("1.164.0rc3", False),
        ("1.164.7", False),
        ("1.165.0rc1", True),
        ("99.1.0", True),
    ):
        sabotage(homeserver, "OtherVersion", {"version": version})
        position = homeserver.log_position()
        homeserver.start()
        warnings = [
            line
            for line in homeserver.log_since(position).splitlines()
            if " WARNING synapse_sticky" in line
        ]
        assert len(warnings) == is_newer
        assert all("1.148.0 to 1.164, and this is " + version in line for line in warnings)
        if version != "99.1.0":
            homeserver.stop()
    alice = homeserver.register()
    room = alice.create_room()
    (event_id,) = send_sticky(alice, room)
    follow_until_seen(alice, room, [event_id])


@pytest.mark.parametrize(
    ("saboteur", "complaint"),
    [
        ("WithoutSyncMethod", "SyncHandler._generate_sync_entry_for_rooms is not there"),
        (
            "OtherSyncParameter",
            "SyncHandler._generate_sync_entry_for_rooms does not take sync_result_builder",
        ),
        (
            "OtherVisibilityParameter",
            "visibility.filter_and_transform_events_for_client does not take always_include_ids",
        ),
        ("WithoutTokenSlot", "StreamToken.groups_key is not there"),
        ("WithoutStoredFlag", "PersistEventsStore._msc4354_enabled is not there"),
        (
            "UnknownServlet",
            "synapse.rest.client.room.RoomOtherRestServlet has sticky events of its own",
        ),
        (
            "RenamedName",
            "cannot import name 'stop_cancellation' from 'synapse.util.async_helpers'",
        ),
        ("RenamedMethod", "DelayedEventsHandler.add is not there"),
        ("WithoutTurns", "PerDestinationQueue.attempt_new_transaction is not there"),
        ("OtherTransactions", "TransactionManager.send_new_transaction does not take pdus"),
        (
            "OtherVisibilityForServers",
            "visibility.filter_events_for_server does not take target_server_name",
        ),
    ],
)
@pytest.mark.any_synapse
def test_seams_that_do_not_fit(
    make_homeserver: MakeHomeserver, saboteur: str, complaint: str
) -> None:
    """A Synapse whose insides have changed is refused, rather than served wrongly."""
    # O2
    homeserver = make_homeserver()
    sabotage(homeserver, saboteur)
    output = homeserver.start_expecting_failure()
    assert complaint in output
    assert f"does not fit Synapse {SYNAPSE_VERSION}" in output
    assert "tested with Synapse 1.148.0 to " in output


# Tables


SCHEMA = "SELECT version, compatible_version FROM synapse_sticky_schema"

# Their columns in the first version, and in the last before there were switches.
COLUMNS = {
    1: {
        "synapse_sticky_events": (
            "event_id, room_id, sender, expires_ts, stream_ordering, revision, position,"
            " held_reason"
        ),
        "synapse_sticky_progress": (
            "events_stream, backfill_stream, un_partial_stated_stream, last_position"
        ),
    },
    4: {
        "synapse_sticky_events": (
            "event_id, room_id, sender, expires_ts, stream_ordering, revision, position,"
            " held_reason, owed"
        ),
        "synapse_sticky_progress": (
            "events_stream, backfill_stream, un_partial_stated_stream, last_position, by_writer"
        ),
        "synapse_sticky_joins": (
            "member, room_id, stream_ordering, instance_name, position, expires_ts"
        ),
        "synapse_sticky_watermarks": (
            "server_name, room_id, joined_position, settled_position, expires_ts, settled_from"
        ),
    },
}

WITHOUT_PRIMARY_KEY = {
    "sqlite": (
        "SELECT m.name FROM sqlite_master AS m WHERE m.type = 'table' AND m.name LIKE ? AND "
        "NOT EXISTS (SELECT 1 FROM pragma_table_info(m.name) AS c WHERE c.pk > 0)"
    ),
    "postgres": (
        "SELECT t.tablename FROM pg_tables AS t WHERE t.tablename LIKE ? AND NOT EXISTS "
        "(SELECT 1 FROM information_schema.table_constraints AS c "
        "WHERE c.table_name = t.tablename AND c.constraint_type = 'PRIMARY KEY')"
    ),
}
TYPE_OF_OWED = {
    "sqlite": "SELECT type FROM pragma_table_info('synapse_sticky_events') WHERE name = 'owed'",
    "postgres": (
        "SELECT data_type FROM information_schema.columns "
        "WHERE table_name = 'synapse_sticky_events' AND column_name = 'owed'"
    ),
}


def rows_of(homeserver: Homeserver, version: int) -> dict[str, list[tuple[Any, ...]]]:
    """What stands in the tables of a version."""
    return {
        table: homeserver.query(f"SELECT {columns} FROM {table}")
        for table, columns in COLUMNS[version].items()
    }


def turn_back(homeserver: Homeserver, kind: str, version: int) -> None:
    """Make the module's tables those of an older version, with the same rows."""
    before = rows_of(homeserver, version)
    drop_tables(homeserver, kind)
    for number in range(1, version + 1):
        for statement in script_statements(number):
            homeserver.execute(
                statement.replace("SMALLINT NOT NULL DEFAULT 0", "BOOLEAN NOT NULL DEFAULT FALSE")
            )
    for table, columns in COLUMNS[version].items():
        for row in before[table]:
            values = [*row[:-1], bool(row[-1]) if columns.endswith("owed") else row[-1]]
            marks = ", ".join("?" * len(values))
            homeserver.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", *values)
    homeserver.execute(
        "CREATE TABLE synapse_sticky_schema (lock CHAR(1) NOT NULL DEFAULT 'X' UNIQUE,"
        " version INTEGER NOT NULL, compatible_version INTEGER NOT NULL, CHECK (lock = 'X'))"
    )
    homeserver.execute(
        "INSERT INTO synapse_sticky_schema (version, compatible_version) VALUES (?, ?)",
        version,
        min(version, COMPATIBLE_VERSION),
    )


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
@pytest.mark.any_synapse
def test_tables_of_the_first_version(make_homeserver: MakeHomeserver, kind: str) -> None:
    """They are upgraded, and what stands in them goes on to count."""
    homeserver = make_homeserver(kind)
    homeserver.start()
    ((newest, _),) = homeserver.query(SCHEMA)
    tables = our_tables(homeserver, kind)
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    (event_id,) = send_sticky(alice, room)
    since = follow_until_seen(bob, room, [event_id]).next_batch
    homeserver.stop()
    before = rows_of(homeserver, 1)
    assert [len(found) for found in before.values()] == [1, 1]
    turn_back(homeserver, kind, 1)

    position = homeserver.log_position()
    homeserver.start()
    assert homeserver.query(SCHEMA) == [(newest, COMPATIBLE_VERSION)]
    assert our_tables(homeserver, kind) == tables
    assert homeserver.query(WITHOUT_PRIMARY_KEY[kind], "synapse_sticky%") == []
    assert rows_of(homeserver, 1)["synapse_sticky_events"] == before["synapse_sticky_events"]
    (later,) = send_sticky(alice, room)
    followed = follow_until_seen(bob, room, [later], since)
    assert followed.seen(room) == [later]
    assert_once(follow_until_seen(alice, room, [event_id, later]), room, [event_id, later])
    assert homeserver.problems_since(position) == ""


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
@pytest.mark.any_synapse
def test_tables_from_before_the_switches(
    make_homeserver: MakeHomeserver, remote: RemoteServer, kind: str
) -> None:
    """They are upgraded, with live, held and owed events, and events are recorded in them."""
    homeserver = make_homeserver(
        kind, federation=True, module_config={"federation_grace_period": "1s"}
    )
    homeserver.start()
    fresh = homeserver.query(TYPE_OF_OWED[kind])
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat", room_version="11")
    bob.join(room)
    carol = remote.join(homeserver, room, "carol")
    before = remote.send_event(room, carol)
    eventually(lambda: is_stored(homeserver, before))
    alice.ban(room, carol)
    held = remote.send_event(room, carol, prev_events=[before], **sticky())
    eventually(lambda: is_recorded(homeserver, held.event_id), what="the soft failure")
    dave = remote.join(homeserver, room, "dave")
    wait_until_joined(homeserver, room, dave)
    remote.online = False
    sent = send_sticky(alice, room, 3)
    since = follow_until_seen(bob, room, sent).next_batch
    homeserver.stop()
    turn_back(homeserver, kind, 4)
    before_types = homeserver.query(TYPE_OF_OWED[kind])
    assert before_types != fresh

    position = homeserver.log_position()
    homeserver.start()
    # An older process that still runs writes booleans.
    assert homeserver.query(TYPE_OF_OWED[kind]) == before_types
    assert homeserver.query(WITHOUT_PRIMARY_KEY[kind], "synapse_sticky%") == []
    assert reasons(homeserver, held.event_id) == ["soft_failed"]
    sent += send_sticky(alice, room)
    eventually(lambda: is_recorded(homeserver, sent[-1]), what="the new event")
    remote.online = True
    wait_until_received(remote, sent)
    alice.unban(room, carol)
    remote.join(homeserver, room, "carol")
    followed = follow_until_seen(bob, room, [sent[-1], held.event_id], since)
    assert_once(followed, room, [sent[-1], held.event_id])
    assert not set(sent[:-1]) & set(followed.seen(room))
    assert_once(follow_until_seen(alice, room, [*sent, held.event_id]), room, sent)
    # Synapse itself may have tried to reach the server while it was away.
    assert serious_problems(homeserver.problems_since(position)) == []


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_new_tables(make_homeserver: MakeHomeserver, kind: str) -> None:
    """They have what tools for databases ask for, and no older code has to fit them."""
    homeserver = make_homeserver(kind)
    homeserver.start()
    assert homeserver.query(WITHOUT_PRIMARY_KEY[kind], "synapse_sticky%") == []
    assert homeserver.query(TYPE_OF_OWED[kind])[0][0].lower() == "smallint"
    ((version, compatible_version),) = homeserver.query(SCHEMA)
    assert version == compatible_version


def script_statements(version: int) -> list[str]:
    """The statements of one of the module's schema files."""
    schema = files("synapse_sticky.storage").joinpath("schema")
    (script,) = [
        entry.read_text() for entry in schema.iterdir() if entry.name.startswith(f"{version:04}_")
    ]
    lines = [line for line in script.splitlines() if not line.startswith("--")]
    return [statement for statement in "\n".join(lines).split(";") if statement.strip()]


@pytest.mark.any_synapse
def test_tables_of_a_later_version(make_homeserver: MakeHomeserver) -> None:
    """They are used if their writer says that one can, and left alone otherwise."""
    homeserver = make_homeserver()
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room()
    (event_id,) = send_sticky(alice, room)
    eventually(lambda: is_recorded(homeserver, event_id), what="the row")
    homeserver.stop()
    update = "UPDATE synapse_sticky_schema SET version = 999, compatible_version = ?"

    homeserver.execute(update, 999)
    output = homeserver.start_expecting_failure()
    assert "have version 999 and need a synapse_sticky that knows version 999 or later" in output
    assert "Install the newer synapse_sticky again" in output
    assert homeserver.query(SCHEMA) == [(999, 999)]
    assert is_recorded(homeserver, event_id)

    homeserver.execute(update, 1)
    homeserver.start()
    (later,) = send_sticky(alice, room)
    assert_once(follow_until_seen(alice, room, [event_id, later]), room, [event_id, later])
    assert homeserver.query(SCHEMA) == [(999, 1)]


def migrate_at_once(database: JsonDict, count: int) -> list[BaseException]:
    """Migrate from many threads at the same moment, and return what was raised."""
    from synapse.config.database import DatabaseConnectionConfig
    from synapse.storage.engines import create_engine

    from synapse_sticky.seams.database import MigrationConnection
    from synapse_sticky.storage.migrations import migrate

    config = DatabaseConnectionConfig("master", database)
    pool = SimpleNamespace(_database_config=config, engine=create_engine(config.config))
    stores = SimpleNamespace(main=SimpleNamespace(db_pool=pool))
    # As much of a homeserver as there is at that moment.
    hs: Any = SimpleNamespace(hostname="test", get_datastores=lambda: stores)
    errors: list[BaseException] = []
    barrier = threading.Barrier(count, timeout=60)

    def run() -> None:
        try:
            connection = MigrationConnection(hs)
            try:
                barrier.wait()
                migrate(connection)
            finally:
                connection.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_migrations_at_once_on_postgres(request: pytest.FixtureRequest) -> None:
    """All processes migrate when they start. One does the work, the others wait and agree."""
    if "postgres" not in request.config.getoption("--deployments"):
        pytest.skip("needs the deployment postgres")
    import psycopg2

    server: PostgresServer = request.getfixturevalue("postgres")
    for _ in range(10):
        database = server.create_database()
        assert migrate_at_once({"name": "psycopg2", "args": dict(database)}, 8) == []
        connection = psycopg2.connect(**database)
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM synapse_sticky_schema")
            assert cursor.fetchone() == (1,)
            cursor.execute("SELECT count(*) FROM synapse_sticky_events")
        connection.close()


def test_migrations_at_once_on_sqlite(tmp_path: Path) -> None:
    """There is only one process then, but perhaps a tool beside it."""
    for number in range(10):
        path = tmp_path / f"{number}.db"
        assert migrate_at_once({"name": "sqlite3", "args": {"database": str(path)}}, 1) == []
        path = tmp_path / f"many{number}.db"
        # Synapse's own tables are there already, and with them the journal's mode.
        prepare_sqlite(path)
        assert migrate_at_once({"name": "sqlite3", "args": {"database": str(path)}}, 4) == []


def prepare_sqlite(path: Path) -> None:
    """Make an empty database as Synapse does."""
    import sqlite3

    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE something (number INTEGER)")
    connection.close()


@pytest.mark.any_synapse
def test_workers_starting_at_once(make_homeserver: MakeHomeserver) -> None:
    """Six processes find no tables. No log has anything to complain about, each time."""
    homeserver = make_homeserver("workers", module=False)
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room()
    homeserver.stop()
    homeserver.reconfigure(module=True)
    for _ in range(2):
        assert our_tables(homeserver, "postgres") == set()
        position = homeserver.log_position()
        homeserver.start()
        (event_id,) = send_sticky(alice, room)
        assert_once(follow_until_seen(alice, room, [event_id]), room, [event_id])
        homeserver.stop()
        assert serious_problems(homeserver.problems_since(position)) == []
        drop_tables(homeserver, "postgres")


# What was there before


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_events_from_before_the_first_start(
    make_homeserver: MakeHomeserver, remote: RemoteServer, kind: str
) -> None:
    """What other servers sent while there was no module is delivered while it is sticky."""
    # C1, C9
    homeserver = make_homeserver(kind, federation=True, module=False)
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    carol = remote.join(homeserver, room, "carol")

    def send(sticky: Any, **arguments: Any) -> str:
        return remote.send_event(room, carol, msc4354_sticky=sticky, **arguments).event_id

    sent = now_ms()
    lasting = [send({"duration_ms": HOUR_MS}) for _ in range(2)]
    received = now_ms()
    # Expired, expired long ago, malformed, and redacted.
    send({"duration_ms": 1})
    send({"duration_ms": 60_000}, origin_server_ts=now_ms() - 120_000)
    send({"duration_ms": "1000"})
    redacted = send({"duration_ms": HOUR_MS})
    remote.send_event(room, carol, {"redacts": redacted}, "m.room.redaction", redacts=redacted)
    last = remote.send_event(room, carol).event_id
    eventually(lambda: last in ids(timeline_in(bob.sync(), room)), what="the last event")
    since = bob.sync()["next_batch"]
    sliding = Connection(bob)
    sliding.ask()
    send_plain(alice, room, 3)
    homeserver.stop()

    homeserver.reconfigure(module=True)
    homeserver.start()
    short = {"room": {"timeline": {"limit": 1}}}
    for client, token in ((alice, None), (bob, since)):
        followed = follow_until_seen(client, room, lasting, token, filter=short)
        assert followed.sticky(room) == lasting
    assert drained(sliding.drain(), room) == lasting
    asked = now_ms()
    events = sticky_in(alice.sync(filter=short), room)
    assert ids(events) == lasting
    for event in events:
        # Counted from when it was received, which was before the module was there.
        remaining = remaining_ms(event)
        assert remaining is not None
        assert sent + HOUR_MS - now_ms() <= remaining <= received + HOUR_MS - asked


def test_events_from_while_the_module_was_away(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """Taken out and put back, the module delivers what came in between, and nothing twice."""
    # C9
    homeserver = make_homeserver(federation=True)
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room(preset="public_chat")
    carol = remote.join(homeserver, room, "carol")
    sticky = {"duration_ms": HOUR_MS}
    first = remote.send_event(room, carol, msc4354_sticky=sticky).event_id
    since = follow_until_seen(alice, room, [first]).next_batch
    sliding = Connection(alice)
    assert drained(sliding.drain(), room) == [first]
    homeserver.stop()

    homeserver.reconfigure(module=False)
    homeserver.start()
    meanwhile = [remote.send_event(room, carol, msc4354_sticky=sticky).event_id for _ in range(2)]
    eventually(
        lambda: set(meanwhile) <= set(ids(timeline_in(alice.sync(), room))),
        what="the events from in between",
    )
    send_plain(alice, room, 3)
    homeserver.stop()

    homeserver.reconfigure(module=True)
    homeserver.start()
    last = remote.send_event(room, carol, msc4354_sticky=sticky).event_id
    short = {"room": {"timeline": {"limit": 1}}}
    followed = follow_until_seen(alice, room, [*meanwhile, last], since, filter=short)
    assert_once(followed, room, [*meanwhile, last])
    assert first not in followed.seen(room)
    assert followed.sticky(room)[:2] == meanwhile
    assert drained(sliding.collect(room, [*meanwhile, last]), room) == [*meanwhile, last]
