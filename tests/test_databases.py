"""What operators do to the database: sticky events still reach everybody afterwards."""

import pytest

from harness.postgres import PostgresServer
from harness.wait import eventually
from tests.support import MakeHomeserver, follow_until_seen, section_ids, send_sticky

pytestmark = pytest.mark.slow


# C1, C9
@pytest.mark.parametrize("started_once", [True, False], ids=["started_once", "never_started"])
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
