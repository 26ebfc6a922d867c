"""What was purged and comes again is new: nothing that is left of it stands in its way."""

from collections.abc import Sequence

import pytest

from harness.client import Client, quote
from harness.event_format import Event
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.federation import purge_room
from tests.support import (
    NO_TIMELINE,
    MakeHomeserver,
    follow,
    follow_until_seen,
    ids,
    is_recorded,
    is_stored,
    reasons,
    section_ids,
    send_plain,
    send_sticky,
    sticky,
    sticky_in,
)


def start_room(remote: RemoteServer, *members: Client) -> str:
    """A room of the other server with carol in it, and these users."""
    room = remote.create_room("carol", "11")
    for member in members:
        member.join(room, via=[remote.server_name])
    return room


def assert_comes_again(
    remote: RemoteServer, room: str, sent: Sequence[Event], alice: Client, bob: Client
) -> None:
    """The sticky events of a room that is gone come again to those who join it again."""
    wanted = sorted(event.event_id for event in sent)
    since = alice.sync(filter=NO_TIMELINE)["next_batch"]
    for user in (alice, bob):
        user.join(room, via=[remote.server_name])
    since = alice.sync(since, filter=NO_TIMELINE)["next_batch"]
    for event in sent:
        remote.send(event)
        eventually(lambda event=event: is_stored(alice.homeserver, event))  # type: ignore[misc]
    followed = follow(
        alice, since, until=lambda f: set(wanted) <= set(f.sticky(room)), filter=NO_TIMELINE
    )
    assert sorted(followed.sticky(room)) == wanted
    eventually(lambda: sorted(section_ids(bob, room)) == wanted)


# C1, C3
@pytest.mark.deployments("sqlite", "workers")
def test_a_room_that_is_purged_and_joined_again(
    homeserver: Homeserver, alice: Client, bob: Client, remote: RemoteServer
) -> None:
    """Its sticky events reach everybody, also who has read beyond them meanwhile."""
    admin = homeserver.register(admin=True)
    room = start_room(remote, alice, bob)
    carol = remote.user_id("carol")
    sent = [remote.send_event(room, carol, **sticky()) for _ in range(5)]
    wanted = [event.event_id for event in sent]
    eventually(lambda: section_ids(alice, room) == wanted, what="the events")
    purge_room(homeserver, admin, room)
    assert_comes_again(remote, room, sent, alice, bob)


# C1, C3
def test_a_room_that_is_forgotten_and_joined_again(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """Synapse purges it once all of its users have left and forgotten it."""
    homeserver = make_homeserver(
        "sqlite", federation=True, extra_config={"forgotten_room_retention_period": 1}
    )
    homeserver.start()
    admin = homeserver.register(admin=True)
    alice, bob = homeserver.register(), homeserver.register()
    room = start_room(remote, alice, bob)
    sent = [remote.send_event(room, remote.user_id("carol"), **sticky()) for _ in range(5)]
    wanted = [event.event_id for event in sent]
    eventually(lambda: section_ids(alice, room) == wanted, what="the events")
    for user in (alice, bob):
        user.leave(room)
        user.request("POST", f"/_matrix/client/v3/rooms/{quote(room)}/forget", json={})
    # Synapse looks once a minute at what it is to do, or at once if there is more to do.
    purge_room(homeserver, admin, admin.create_room())
    events = "SELECT 1 FROM events WHERE room_id = ?"
    eventually(lambda: not homeserver.query(events, room), what="the purge")
    assert is_recorded(homeserver, wanted[0])
    assert_comes_again(remote, room, sent, alice, bob)


# K1
@pytest.mark.deployments("sqlite")
def test_what_was_held_before_a_purge(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """An event that was soft-failed, and is not when it comes again, is delivered."""
    admin = homeserver.register(admin=True)
    room = start_room(remote, alice)
    carol, dave = remote.user_id("carol"), remote.user_id("dave")
    remote.send_event(room, dave, {"membership": "join"}, "m.room.member", dave)
    before = remote.send_event(room, dave)
    remote.send_event(room, carol, {"membership": "ban"}, "m.room.member", dave)
    held = remote.send_event(room, dave, prev_events=[before], **sticky())
    eventually(lambda: reasons(homeserver, held.event_id) == ["soft_failed"], what="the event")
    purge_room(homeserver, admin, room)
    # Whoever joins now is told of no ban.
    for sender, membership in ((carol, "leave"), (dave, "join")):
        content = {"membership": membership}
        remote.remember(remote.create_event(room, "m.room.member", content, sender, dave))
    alice.join(room, via=[remote.server_name])
    remote.send(held)
    eventually(lambda: is_stored(homeserver, held), what="the event again")
    eventually(lambda: section_ids(alice, room) == [held.event_id])
    assert reasons(homeserver, held.event_id) == []


# C1, K3
@pytest.mark.deployments("sqlite")
def test_an_own_event_that_comes_back_from_another_server(
    homeserver: Homeserver, remote: RemoteServer, bob: Client
) -> None:
    """Purged history can come back: also to those who have read beyond it meanwhile."""
    alice = homeserver.register(admin=True)
    room = alice.create_room(preset="public_chat", room_version="11")
    bob.join(room)
    remote.join(homeserver, room, "carol")
    since = bob.sync(filter=NO_TIMELINE)["next_batch"]
    (event_id,) = send_sticky(alice, room)
    remote.wait_for(event_id)
    newest = send_plain(alice, room, 3)[-1]
    remote.wait_for(newest)
    path = f"/_synapse/admin/v1/purge_history/{quote(room)}/{quote(newest)}"
    purge = alice.request("POST", path, json={})["purge_id"]
    status = f"/_synapse/admin/v1/purge_history_status/{purge}"
    eventually(lambda: alice.request("GET", status)["status"] == "complete", what="the purge")
    answer = bob.sync(since, filter=NO_TIMELINE)
    assert sticky_in(answer, room) == []
    # That is there again only once somebody scrolls back to it.
    eventually(lambda: event_id in ids(alice.messages(room, limit=50)["chunk"]), what="the event")
    followed = follow_until_seen(bob, room, [event_id], answer["next_batch"], filter=NO_TIMELINE)
    assert followed.sticky(room) == [event_id]
