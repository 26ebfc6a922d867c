"""A server floods a room: it gets what its rate allows, and nobody else pays for it."""

import statistics
import time

import pytest

from harness.client import Client
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.support import MakeHomeserver, follow_until_seen, quiet_token, send_sticky, sticky

pytestmark = pytest.mark.slow


# Enough to be above the default rate for some seconds.
FLOOD = 1_500
PROBES = 40


def test_others_do_not_pay(make_homeserver: MakeHomeserver, remote: RemoteServer) -> None:
    # A2: what is sent meanwhile is as fast as before, and all of the flood follows, in order
    homeserver = make_homeserver(federation=True)
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room, flooded = (alice.create_room(preset="public_chat") for _ in range(2))
    for client_room in (room, flooded):
        bob.join(client_room)
    carol = remote.join(homeserver, flooded, "carol")
    since = quiet_token(bob)
    sent = [remote.send_event(flooded, carol, **sticky()).event_id for _ in range(FLOOD)]
    eventually(lambda: _held(homeserver) > 100, 60, "many held")
    during = _latencies(alice, bob, room)
    assert _held(homeserver) > 0, "the flood was over before others were measured"
    followed = follow_until_seen(bob, flooded, sent, since, afterwards=0)
    assert [e for e in followed.sticky(flooded) if e in set(sent)] == sent[: len(sent)]
    eventually(lambda: _held(homeserver) == 0, 60, "nothing held")
    assert statistics.median(during) <= 1.5 * statistics.median(_latencies(alice, bob, room))


def _latencies(sender: Client, reader: Client, room: str) -> list[float]:
    """How long sticky events take from the send to the answer of a sync, in seconds."""
    since = quiet_token(reader)
    found = []
    for _ in range(PROBES):
        began = time.monotonic()
        sent = send_sticky(sender, room)
        followed = follow_until_seen(reader, room, sent, since, afterwards=0)
        found.append(time.monotonic() - began)
        since = followed.next_batch or since
    return found


def _held(homeserver: Homeserver) -> int:
    ((count,),) = homeserver.query(
        "SELECT COUNT(*) FROM synapse_sticky_held WHERE reason = 'over_rate'"
    )
    return int(count)
