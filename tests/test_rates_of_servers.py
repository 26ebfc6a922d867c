"""What another server sends above its rate is held, and follows in order."""

import time

import pytest

from harness.client import Client, JsonDict
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.support import (
    REMAINING_KEY,
    MakeHomeserver,
    follow,
    ids,
    is_recorded,
    quiet_token,
    section_ids,
    send_sticky,
    sticky,
    sticky_in,
)

pytestmark = pytest.mark.any_synapse

RATE = {"remote_rate_limit": {"per_second": 1, "burst_count": 3}}
SENT = 12


def test_what_is_above_the_rate_follows_in_order(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    # A1, A2: and nobody else waits for it
    homeserver, bob, room, carol = _flooded(make_homeserver, remote)
    other = bob.create_room(preset="public_chat")
    since = quiet_token(bob)
    began = time.monotonic()
    sent = [remote.send_event(room, carol, **sticky()).event_id for _ in range(SENT)]
    eventually(lambda: _held(homeserver) > 0, what="something held")
    (mine,) = send_sticky(bob, other)
    first = bob.sync(since, timeout_ms=5_000)
    assert ids(sticky_in(first, other)) in ([mine], [])
    # All are stored, and shown.
    followed = follow(
        bob, since, until=lambda f: set(sent) <= set(f.seen(room)), filter=TIMELINE_OF_NONE
    )
    assert followed.sticky(room) == sent
    assert time.monotonic() - began > SENT - 3 - 2
    assert _held(homeserver) == 0
    assert section_ids(bob, room) == sent


def test_held_events_outlive_a_restart(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    # A1, A2
    homeserver, bob, room, carol = _flooded(make_homeserver, remote)
    sent = [remote.send_event(room, carol, **sticky()).event_id for _ in range(SENT)]
    eventually(lambda: is_recorded(homeserver, sent[-1]), what="recorded")
    assert _held(homeserver) > 0
    homeserver.restart()

    def all_are_there() -> bool:
        assert section_ids(bob, room) == sent
        return True

    eventually(all_are_there, 60, "all")


def test_at_most_so_many_are_held(make_homeserver: MakeHomeserver, remote: RemoteServer) -> None:
    # A1, A2: the others are ordinary events, and the log says so
    homeserver, bob, room, carol = _flooded(
        make_homeserver,
        remote,
        remote_rate_limit={"per_second": 0.2, "burst_count": 3},
        max_held_per_server=3,
        cleanup_interval="1s",
    )
    sent: list[str] = []
    held: list[int] = []
    for _ in range(SENT):
        sent.append(remote.send_event(room, carol, **sticky()).event_id)
        held.append(_held(homeserver))

    def nothing_is_held() -> bool:
        held.append(_held(homeserver))
        return max(held) > 0 and held[-1] == 0

    stored = "SELECT 1 FROM events WHERE event_id = ?"
    eventually(lambda: homeserver.query(stored, sent[-1]), what="all stored")
    eventually(nothing_is_held, 90, "nothing held")
    # As many as may be.
    assert max(held) == 3
    delivered = section_ids(bob, room)
    assert 6 <= len(delivered) < SENT
    assert delivered == [event_id for event_id in sent if event_id in delivered]
    for event_id in sent:
        shown = bob.event(room, event_id)["unsigned"]
        assert (REMAINING_KEY in shown) == (event_id in delivered)
    eventually(
        lambda: "are ordinary events: more than `max_held_per_server`" in homeserver.log(),
        what="a warning",
    )


def _flooded(
    make_homeserver: MakeHomeserver, remote: RemoteServer, **config: object
) -> tuple[Homeserver, Client, str, str]:
    homeserver = make_homeserver(federation=True, module_config={**RATE, **config})
    homeserver.start()
    bob = homeserver.register()
    room = bob.create_room(preset="public_chat")
    return homeserver, bob, room, remote.join(homeserver, room, "carol")


def _held(homeserver: Homeserver) -> int:
    query = "SELECT COUNT(*) FROM synapse_sticky_held WHERE reason = 'over_rate'"
    ((count,),) = homeserver.query(query)
    return int(count)


TIMELINE_OF_NONE: JsonDict = {"room": {"timeline": {"types": []}}}
