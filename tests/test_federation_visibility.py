"""What servers that ask for events from before their join are shown."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from harness.client import Client, JsonDict, MatrixError, quote
from harness.event_format import event_from_pdu, redact
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.support import EVENT_KEY, HOUR_MS, now_ms, sleep_until, stored_pdu, text

# Nothing of it goes by the database, and workers have PostgreSQL too.
pytestmark = pytest.mark.repeats("postgres")

RESTRICTED = ("joined", "invited")
VERSION = "11"
FORBIDDEN = (403, "M_FORBIDDEN")


@dataclass
class History:
    """A room with restricted history, and what was said in it before others joined."""

    homeserver: Homeserver
    room_id: str
    sticky: set[str] = field(default_factory=set)
    plain: set[str] = field(default_factory=set)
    # When the last of the sticky ones ends.
    expires_ts: int = 0

    @property
    def all(self) -> set[str]:
        """All messages."""
        return self.sticky | self.plain

    def say(self, sender: Client, sticky_ms: int | None = None) -> str:
        """One more message."""
        event_id = sender.send(self.room_id, text("hidden"), sticky_ms=sticky_ms)
        (self.plain if sticky_ms is None else self.sticky).add(event_id)
        self.expires_ts = max(self.expires_ts, now_ms() + (sticky_ms or 0))
        return event_id


def make_history(
    homeserver: Homeserver,
    sender: Client,
    visibility: str,
    sticky_ms: int | None = HOUR_MS,
) -> History:
    """A public room in which every second of five messages is sticky."""
    event = {
        "type": "m.room.history_visibility",
        "state_key": "",
        "content": {"history_visibility": visibility},
    }
    room_id = sender.create_room(
        preset="public_chat", room_version=VERSION, initial_state=[event], name="a name"
    )
    history = History(homeserver, room_id)
    for duration_ms in (None, sticky_ms, None, sticky_ms, None):
        history.say(sender, duration_ms)
    return history


# Endpoints: each asks for all that is before some event, and gives what it is answered.


def by_event(server: RemoteServer, history: History, latest: str) -> list[JsonDict]:
    """One by one."""
    answers = [
        server.request(
            history.homeserver.server_name, "GET", f"/_matrix/federation/v1/event/{quote(event_id)}"
        )
        for event_id in sorted(history.all)
    ]
    return [pdu for answer in answers for pdu in answer["pdus"]]


def by_backfill(server: RemoteServer, history: History, latest: str) -> list[JsonDict]:
    """As a server does that pages back."""
    pdus: list[JsonDict] = server.request(
        history.homeserver.server_name,
        "GET",
        f"/_matrix/federation/v1/backfill/{quote(history.room_id)}",
        params=[("v", latest), ("limit", "100")],
    )["pdus"]
    return pdus


def by_missing_events(server: RemoteServer, history: History, latest: str) -> list[JsonDict]:
    """As a server does that finds a gap."""
    events: list[JsonDict] = server.request(
        history.homeserver.server_name,
        "POST",
        f"/_matrix/federation/v1/get_missing_events/{quote(history.room_id)}",
        {"earliest_events": [], "latest_events": [latest], "limit": 20, "min_depth": 0},
    )["events"]
    return events


Request = Callable[[RemoteServer, History, str], list[JsonDict]]

ENDPOINTS: dict[str, Request] = {
    "/event": by_event,
    "/backfill": by_backfill,
    "/get_missing_events": by_missing_events,
}


def without_unsigned(pdu: JsonDict) -> JsonDict:
    """What of an event is the same for everybody."""
    return {key: value for key, value in pdu.items() if key != "unsigned"}


def shown(server: RemoteServer, history: History, latest: str | None = None) -> dict[str, set[str]]:
    """The messages that each endpoint shows in full to a server in the room.

    All of them are in every answer, and the others are pruned as a redaction prunes. The server
    asks for what is before its join, if not before another event.
    """
    if latest is None:
        state = server.rooms[history.room_id].state
        latest = state["m.room.member", server.user_id("carol")].event_id
    result: dict[str, set[str]] = {}
    for name, request in ENDPOINTS.items():
        answer = [without_unsigned(pdu) for pdu in request(server, history, latest)]
        events = {event_from_pdu(VERSION, pdu).event_id: pdu for pdu in answer}
        assert len(events) == len(answer), f"{name} has something twice"
        result[name] = set()
        for event_id in history.all:
            pdu = without_unsigned(stored_pdu(history.homeserver, event_id))
            assert event_id in events, f"{name} lacks {event_id}"
            if events[event_id] == pdu:
                assert pdu["content"] == text("hidden")
                assert (EVENT_KEY in pdu) == (event_id in history.sticky)
                result[name].add(event_id)
            else:
                assert events[event_id] == redact(VERSION, pdu), name
                assert events[event_id]["content"] == {}
    return result


def on_every_endpoint(event_ids: set[str]) -> dict[str, set[str]]:
    """What `shown` is if these are shown everywhere."""
    return dict.fromkeys(ENDPOINTS, event_ids)


NOTHING = on_every_endpoint(set())


def refusals(server: RemoteServer, history: History, latest: str) -> dict[str, Any]:
    """How each endpoint refuses to answer a server."""
    result: dict[str, Any] = {}
    for name, request in ENDPOINTS.items():
        try:
            result[name] = request(server, history, latest)
        except MatrixError as error:
            result[name] = error.status, error.errcode
    return result


def until_lifted(server: RemoteServer, history: History) -> None:
    """Wait until the process that serves federation knows what is sticky."""
    eventually(lambda: shown(server, history) == on_every_endpoint(history.sticky))


# K2, F6
@pytest.mark.parametrize("visibility", RESTRICTED)
def test_servers_that_join_see_what_is_sticky(
    homeserver: Homeserver, alice: Client, remote: RemoteServer, visibility: str
) -> None:
    """In full, so that its hash is right; what is plain is as pruned as without the module."""
    history = make_history(homeserver, alice, visibility)
    ordinary = make_history(homeserver, alice, visibility, sticky_ms=None)
    for each in (history, ordinary):
        remote.join(homeserver, each.room_id, "carol")
    assert shown(remote, ordinary) == NOTHING
    until_lifted(remote, history)
    # What was said since is for it anyway.
    history.sticky = set()
    history.plain = {history.say(alice)}
    latest = alice.send(history.room_id)
    remote.wait_for(latest)
    eventually(
        lambda: shown(remote, history, latest) == on_every_endpoint(history.plain),
        what="the newest event",
    )


# K2, F6
def test_what_other_servers_have_sent(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """It is not only the events of this server's users that are lifted."""
    history = make_history(homeserver, alice, "joined")
    with RemoteServer() as third:
        dave = third.join(homeserver, history.room_id, "dave")
        stickiness: Any = {EVENT_KEY: {"duration_ms": HOUR_MS}}
        sticky = third.send_event(history.room_id, dave, text("hidden"), **stickiness)
        plain = third.send_event(history.room_id, dave, text("hidden"))
        history.sticky.add(sticky.event_id)
        history.plain.add(plain.event_id)
        eventually(lambda: stored_or_none(homeserver, plain.event_id))
        remote.join(homeserver, history.room_id, "carol")
        until_lifted(remote, history)


def stored_or_none(homeserver: Homeserver, event_id: str) -> JsonDict | None:
    """An event as it is stored, if it is."""
    try:
        return stored_pdu(homeserver, event_id)
    except ValueError:
        return None


# K2, E4
@pytest.mark.repeats("workers")
def test_hidden_again_once_expired(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """Then it is as hidden as what was plain all the time."""
    histories = []
    for visibility in RESTRICTED:
        history = make_history(homeserver, alice, visibility, sticky_ms=15_000)
        remote.join(homeserver, history.room_id, "carol")
        until_lifted(remote, history)
        histories.append(history)
    for history in histories:
        sleep_until(history.expires_ts)
        assert shown(remote, history) == NOTHING


# K2
def test_servers_outside_of_the_room(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """Who is not in the room, or not any more, gets nothing; who is back in it, all again."""
    history = make_history(homeserver, alice, "joined")
    latest = max(history.plain)
    alice.invite(history.room_id, remote.user_id("carol"))
    nothing = dict.fromkeys(ENDPOINTS, FORBIDDEN)
    assert refusals(remote, history, latest) == nothing
    carol = remote.join(homeserver, history.room_id, "carol")
    until_lifted(remote, history)
    remote.leave(history.room_id, carol)
    eventually(lambda: refusals(remote, history, latest) == nothing, what="the leave")
    remote.join(homeserver, history.room_id, "carol")
    until_lifted(remote, history)


# K2, E5
@pytest.mark.repeats("workers")
def test_redacted_events_stay_redacted(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """A redacted event is not sticky any more, so nothing is lifted."""
    history = make_history(homeserver, alice, "joined")
    remote.join(homeserver, history.room_id, "carol")
    until_lifted(remote, history)
    redacted, still_sticky = history.sticky
    redaction = alice.redact(history.room_id, redacted)
    remote.wait_for(redaction)
    eventually(
        lambda: shown(remote, history) == on_every_endpoint({still_sticky}), what="the redaction"
    )


# E6, K2
@pytest.mark.parametrize("visibility", ["shared", "joined"])
@pytest.mark.repeats("workers")
def test_erased_senders_stay_pruned(
    homeserver: Homeserver, alice: Client, bob: Client, remote: RemoteServer, visibility: str
) -> None:
    """What an erased user has sent is pruned for servers that were not there at the time."""
    history = make_history(homeserver, alice, visibility)
    bob.join(history.room_id)
    of_bob = {history.say(bob, HOUR_MS), history.say(bob)}
    remote.join(homeserver, history.room_id, "carol")
    visible = history.sticky if visibility == "joined" else history.all
    eventually(lambda: shown(remote, history) == on_every_endpoint(visible))
    homeserver.register(admin=True).request(
        "POST", f"/_synapse/admin/v1/deactivate/{quote(bob.user_id)}", json={"erase": True}
    )
    eventually(
        lambda: shown(remote, history) == on_every_endpoint(visible - of_bob), what="the erasure"
    )


# K2, S6
@pytest.mark.repeats("workers")
def test_what_state_replaced_stays_hidden(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """A sticky state event is shown without the content that it replaced."""
    room_id = alice.create_room(
        preset="public_chat",
        room_version=VERSION,
        power_level_content_override={"state_default": 0},
        initial_state=[
            {
                "type": "m.room.history_visibility",
                "state_key": "",
                "content": {"history_visibility": "joined"},
            }
        ],
    )
    history = History(homeserver, room_id)
    with RemoteServer() as third:
        dave = third.join(homeserver, room_id, "dave")
        secret = alice.send_state(room_id, "m.room.topic", {"topic": "secret topic"})
        third.wait_for(secret)
        stickiness: Any = {EVENT_KEY: {"duration_ms": HOUR_MS}}
        sticky = third.send_event(
            room_id, dave, {"topic": "of dave"}, "m.room.topic", "", **stickiness
        )
        history.sticky.add(sticky.event_id)
        eventually(lambda: stored_or_none(homeserver, sticky.event_id))
        remote.join(homeserver, room_id, "carol")
        state = remote.rooms[room_id].state
        latest = state["m.room.member", remote.user_id("carol")].event_id

        def answers() -> dict[str, str]:
            # Synapse keeps the event in memory with what it replaced, once a client read it.
            alice.messages(room_id)
            return {
                name: json.dumps(request(remote, history, latest))
                for name, request in ENDPOINTS.items()
            }

        eventually(lambda: all("of dave" in answer for answer in answers().values()))
        for name, answer in answers().items():
            for hidden in ("secret topic", "prev_content", "replaces_state"):
                assert hidden not in answer, name
