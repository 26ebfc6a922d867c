"""The harness itself: without these nothing else the tests say can be believed."""

import json

import pytest

from harness.client import Client, JsonDict
from harness.event_format import Event, event_from_pdu
from harness.homeserver import Homeserver
from harness.remote import ABSENT, RemoteServer
from harness.wait import eventually
from tests.support import DEPLOYMENTS, MakeHomeserver

# What most of them look at is the same on every deployment.
pytestmark = [pytest.mark.deployments("sqlite"), pytest.mark.any_synapse]


def membership(reader: Client, room_id: str, user_id: str) -> str:
    """What the reader's homeserver thinks the membership of a user is."""
    for event in reader.state(room_id):
        if (event["type"], event["state_key"]) == ("m.room.member", user_id):
            return str(event["content"]["membership"])
    return "none"


def _joined_timeline(answer: JsonDict, room_id: str) -> list[str]:
    room = answer.get("rooms", {}).get("join", {}).get(room_id, {})
    return [event["event_id"] for event in room.get("timeline", {}).get("events", [])]


@pytest.mark.deployments(*DEPLOYMENTS)
def test_users_send_and_sync(homeserver: Homeserver, alice: Client, bob: Client, room: str) -> None:
    """What one user sends the other one reads, with either kind of sync."""
    event_id = alice.send(room, {"msgtype": "m.text", "body": "hello"})
    eventually(lambda: event_id in _joined_timeline(bob.sync(), room), what="the event in /sync")
    body = {"lists": {"all": {"ranges": [[0, 9]], "required_state": [], "timeline_limit": 9}}}

    def in_sliding_sync() -> bool:
        timeline = bob.sliding_sync(body)["rooms"][room]["timeline"]
        return event_id in [event["event_id"] for event in timeline]

    eventually(in_sliding_sync, what="the event in sliding sync")
    assert homeserver.query("SELECT room_id FROM events WHERE event_id = ?", event_id) == [(room,)]
    assert bob.event(room, event_id)["content"]["body"] == "hello"
    assert bob.second_device().device_id != bob.device_id


def test_processes_survive_a_kill(homeserver: Homeserver, alice: Client, room: str) -> None:
    """Any process may be killed and started again."""
    victim = "event_persister1" if homeserver.workers else "main"
    homeserver.kill(victim)
    homeserver.start_process(victim)
    event_id = alice.send(room)
    eventually(lambda: event_id in _joined_timeline(alice.sync(), room), what="the event")


def test_bad_configuration(make_homeserver: MakeHomeserver) -> None:
    """A mistake in the configuration of the module is reported on startup."""
    homeserver = make_homeserver(module_config={"no_such_option": True})
    assert "no_such_option" in homeserver.start_expecting_failure()
    homeserver.reconfigure(module_config={})
    homeserver.start()
    homeserver.register().create_room()


@pytest.mark.parametrize("version", ["1", "2", "3", "6", "10", "11", "12"])
def test_remote_server(
    homeserver: Homeserver, alice: Client, remote: RemoteServer, version: str
) -> None:
    """Events cross the federation in both directions, in old and new room versions."""
    room = alice.create_room(preset="public_chat", room_version=version)
    carol = remote.join(homeserver, room, "carol")
    theirs = remote.send_event(room, carol, {"msgtype": "m.text", "body": "from afar"}, extra=5)
    eventually(lambda: theirs.event_id in _joined_timeline(alice.sync(), room))
    ours = alice.send(room, {"msgtype": "m.text", "body": "hello"})
    assert remote.wait_for(ours).content["body"] == "hello"
    # Built on what has just been received.
    reply = remote.send_event(room, carol)
    assert reply.prev_event_ids == [ours]
    eventually(lambda: reply.event_id in _joined_timeline(alice.sync(), room))


def test_events_from_before_a_ban_are_soft_failed(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """A remote user that was banned can still write events as of before the ban."""
    room = alice.create_room(preset="public_chat")
    carol = remote.join(homeserver, room, "carol")
    before = remote.send_event(room, carol)
    eventually(lambda: before.event_id in _joined_timeline(alice.sync(), room))
    alice.ban(room, carol)

    def is_the_ban(event: Event) -> bool:
        return event.type == "m.room.member" and event.content["membership"] == "ban"

    remote.wait_for(is_the_ban)
    late = remote.send_event(room, carol, prev_events=[before])
    query = "SELECT event_id FROM event_json WHERE event_id = ?"
    eventually(lambda: homeserver.query(query, late.event_id), what="the late event in the store")
    assert late.event_id not in _joined_timeline(alice.sync(), room)
    alice.unban(room, carol)
    remote.join(homeserver, room, "carol")
    after = remote.send_event(room, carol)
    eventually(lambda: after.event_id in _joined_timeline(alice.sync(), room))
    assert late.event_id not in _joined_timeline(alice.sync(), room)


def test_missing_events_are_fetched(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """A homeserver that was not sent an event asks for it, and for others a test makes up."""
    room = alice.create_room(preset="public_chat")
    carol = remote.join(homeserver, room, "carol")
    unsent = [remote.create_event(room, "m.room.message", {"body": "1"}, carol)]
    remote.remember(unsent)
    last = remote.send_event(room, carol)
    for event_id in (unsent[0].event_id, last.event_id):
        eventually(lambda: event_id in _joined_timeline(alice.sync(), room))  # noqa: B023
    assert any("get_missing_events" in path for _, path in remote.requests)


def test_invitations(homeserver: Homeserver, alice: Client, remote: RemoteServer) -> None:
    """Users can be invited in both directions, to rooms of either server."""
    room = alice.create_room(preset="private_chat")
    carol = remote.user_id("carol")
    alice.invite(room, carol)
    remote.join(homeserver, room, "carol")
    bob = homeserver.register()
    remote.invite(room, carol, bob.user_id)
    eventually(lambda: room in bob.sync().get("rooms", {}).get("invite", {}), what="the invitation")
    bob.join(room)
    remote.leave(room, carol)
    eventually(lambda: membership(alice, room, carol) == "leave", what="the leave")
    dave = remote.user_id("dave")
    alice.invite(room, dave)
    remote.leave(room, dave, homeserver)
    eventually(lambda: membership(alice, room, dave) == "leave", what="the refusal")


def test_numbers_no_other_room_version_allows(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """Old rooms have integers beyond 64 bits, in the content and at the top level.

    Synapse only takes them by backfill: it cannot evaluate push rules with them.
    """
    room = remote.create_room("carol", "1")
    content = {"body": "big", "n": 2**70}
    big = remote.send_event(room, remote.user_id("carol"), content, extra={"m": -(2**80)})
    alice.join(room, via=[remote.server_name])

    def read() -> list[int]:
        chunk = alice.messages(room, limit=50)["chunk"]
        return [event["content"]["n"] for event in chunk if event["event_id"] == big.event_id]

    assert eventually(read, what="the event by backfill") == [2**70]
    query = "SELECT json FROM event_json WHERE event_id = ?"
    ((stored,),) = homeserver.query(query, big.event_id)
    assert json.loads(stored)["extra"] == {"m": -(2**80)}


def test_malformed_events_are_refused(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """The remote server can write events that a homeserver refuses."""
    room = alice.create_room(preset="public_chat", room_version="11")
    carol = remote.join(homeserver, room, "carol")
    events = [
        remote.create_event(room, "m.room.message", {}, carol, depth=ABSENT),
        remote.create_event(room, "m.room.message", "no object", carol),
        # Changed after it was signed.
        event_from_pdu("11", {**remote.create_event(room, "x", {}, carol).pdu, "depth": 700}),
    ]
    remote.send(events, remember=False)
    good = remote.send_event(room, carol)
    eventually(lambda: good.event_id in _joined_timeline(alice.sync(), room))
    for event in events:
        query = "SELECT event_id FROM event_json WHERE event_id = ?"
        assert not homeserver.query(query, event.event_id)


@pytest.mark.parametrize("version", ["1", "10", "11", "12"])
def test_rooms_of_the_remote_server(
    homeserver: Homeserver, alice: Client, remote: RemoteServer, version: str
) -> None:
    """A homeserver can join a room through the remote server, and read what is older."""
    room = remote.create_room("carol", version)
    carol = remote.user_id("carol")
    older = remote.send_event(room, carol)
    remote.invite(room, carol, alice.user_id)
    eventually(
        lambda: room in alice.sync().get("rooms", {}).get("invite", {}), what="the invitation"
    )
    alice.join(room, via=[remote.server_name])
    newer = remote.send_event(room, carol)
    eventually(lambda: newer.event_id in _joined_timeline(alice.sync(), room))

    def read() -> bool:
        chunk = alice.messages(room, limit=50)["chunk"]
        return older.event_id in [event["event_id"] for event in chunk]

    eventually(read, what="the older event by backfill")
    assert any("/backfill/" in path for _, path in remote.requests)
    ours = alice.send(room)
    remote.wait_for(ours)
