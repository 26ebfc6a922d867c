"""The database is away, or somebody holds it up."""

import contextlib
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from harness.client import Client, MatrixError
from harness.homeserver import Homeserver
from harness.postgres import PostgresServer
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.federation import wait_until_received
from tests.support import (
    GRACE_PERIOD,
    MakeHomeserver,
    assert_once,
    follow_until_seen,
    sabotage,
    send_sticky,
    sticky,
)

pytestmark = pytest.mark.slow

# Longer than any of the intervals at which the module asks the database.
AWAY_S = 12
# More than the connections that Synapse has at most.
POOL = 20


def ours_in(log: str) -> list[str]:
    """The entries of a log that are the module's, or about errors in its work."""
    entries = re.split(r"^(?=\d{4}-\d\d-\d\d \d\d:)", log, flags=re.MULTILINE)
    signs = (" synapse_sticky.", "/synapse_sticky/", "Background process 'sticky_")
    return [entry for entry in entries if any(sign in entry for sign in signs)]


def test_database_that_goes_away(
    make_homeserver: MakeHomeserver, own_postgres: PostgresServer, remote: RemoteServer
) -> None:
    """The log says so in one line, not at each try, and afterwards everything goes on."""
    # C3, F1
    homeserver = make_homeserver(
        "postgres",
        database=own_postgres.create_database(),
        federation=True,
        module_config={"federation_grace_period": GRACE_PERIOD, "cleanup_interval": "1s"},
    )
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    carol = remote.join(homeserver, room, "carol")
    since = follow_until_seen(bob, room, send_sticky(alice, room)).next_batch
    before = send_sticky(alice, room, 2)

    position = homeserver.log_position()
    own_postgres.go_away()
    time.sleep(AWAY_S)
    (told,) = ours_in(homeserver.log_since(position))
    assert " ERROR synapse_sticky" in told
    assert "The database does not answer (" in told
    assert len(told.splitlines()) == 1
    own_postgres.come_back()

    eventually(lambda: answers(alice, room), 60, "Synapse, with its database")
    after = send_sticky(alice, room, 2)
    after.append(remote.send_event(room, carol, **sticky()).event_id)
    followed = follow_until_seen(bob, room, before + after, since)
    assert_once(followed, room, before + after)
    wait_until_received(remote, before + after[:2])


def answers(client: Client, room: str) -> bool:
    """Whether Synapse can serve a client with each connection of its pool.

    Each that is lost is noticed when it is used, and a request fails with it.
    """

    def has_failed(_: int) -> bool:
        try:
            client.messages(room)
        except MatrixError:
            return True
        return False

    with ThreadPoolExecutor(POOL) as pool:
        return not any([*pool.map(has_failed, range(3 * POOL))])


# Any number that nobody else uses: what the module calls its lock.
LOCK = 43545953


@contextlib.contextmanager
def frozen_process(arguments: dict[str, Any], statement: str) -> Iterator[Any]:
    """A process that came to a halt within a transaction, after this statement."""
    import psycopg2

    frozen = psycopg2.connect(**arguments, application_name="frozen")
    with contextlib.closing(frozen), frozen.cursor() as cursor:
        cursor.execute(statement)
        yield frozen


def holder(frozen: Any) -> str:
    """What the log says of such a process."""
    return f"PostgreSQL's process {frozen.info.backend_pid} (application 'frozen', client "


def test_process_that_hangs_with_the_lock(
    make_homeserver: MakeHomeserver, postgres: PostgresServer
) -> None:
    """The others say who holds it, and wait; not for ever."""
    # O2
    arguments = postgres.create_database()
    homeserver = make_homeserver("postgres", database=arguments)
    with frozen_process(arguments, f"SELECT pg_advisory_xact_lock({LOCK})") as frozen:
        assert_refused(homeserver, frozen)
        homeserver.reconfigure(extra_config={})
        position = homeserver.log_position()
        with ThreadPoolExecutor() as pool:
            starting = pool.submit(homeserver.start)
            try:
                eventually(
                    lambda: holder(frozen) in homeserver.log_since(position), 60, "who holds it"
                )
                assert not starting.done()
            finally:
                frozen.rollback()
            starting.result()
        (line,) = [x for x in homeserver.log_since(position).splitlines() if holder(frozen) in x]
        assert " WARNING synapse_sticky.seams.database" in line
    alice = homeserver.register()
    room = alice.create_room()
    follow_until_seen(alice, room, send_sticky(alice, room))
    homeserver.stop()

    # One that only uses the tables keeps others from changing them.
    homeserver.execute("UPDATE synapse_sticky_schema SET version = version - 1")
    with frozen_process(arguments, "SELECT 1 FROM synapse_sticky_progress") as frozen:
        assert_refused(homeserver, frozen)


def assert_refused(homeserver: Homeserver, frozen: Any) -> None:
    """Synapse ends after a while, and its last line says who is to blame."""
    sabotage(homeserver, "Impatient")
    last_line = homeserver.start_expecting_failure().rstrip().splitlines()[-1]
    assert "they have been locked by " + holder(frozen) in last_line
    assert "idle in transaction, in this transaction since 20" in last_line
