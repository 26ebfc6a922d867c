"""Who sees sticky events on which endpoint, and how long they remain sticky there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from harness.client import Client, JsonDict, MatrixError, quote
from harness.homeserver import Homeserver
from harness.wait import eventually
from tests.sliding import Connection, drained, no_window, subscription, until_known, window
from tests.support import (
    HOUR_MS,
    REMAINING_KEY,
    SYNC_SECTION,
    MakeHomeserver,
    follow_until_seen,
    ids,
    now_ms,
    send_sticky,
    sleep_until,
    sticky_in,
    text,
    timeline_in,
    unique,
    wait_for_readers,
)

# Nothing of it goes by the database, and workers have PostgreSQL too.
pytestmark = pytest.mark.repeats("postgres")

RESTRICTED = ("joined", "invited")


@dataclass(frozen=True)
class History:
    """A room in which sticky and plain events alternate, a thread among them."""

    room_id: str
    # A word that stands in all of the events.
    word: str
    sticky: str
    sticky_reply: str
    plain: str
    plain_reply: str
    # When the last of them has ended.
    expired_ts: int

    @property
    def lifted(self) -> set[str]:
        """What everybody joined may see."""
        return {self.sticky, self.sticky_reply}

    @property
    def all(self) -> set[str]:
        """All of the events."""
        return self.lifted | {self.plain, self.plain_reply}


def in_thread(root: str, body: str) -> JsonDict:
    """The content of a message in a thread."""
    return {**text(body), "m.relates_to": {"rel_type": "m.thread", "event_id": root}}


def make_history(sender: Client, visibility: str, sticky_ms: int = HOUR_MS) -> History:
    """Make a public room whose history is restricted from the start, and talk in it."""
    room_id = sender.create_room(
        preset="public_chat",
        initial_state=[
            {
                "type": "m.room.history_visibility",
                "state_key": "",
                "content": {"history_visibility": visibility},
            }
        ],
    )
    word = unique("word")
    plain = sender.send(room_id, text(f"{word} plain"))
    sticky = sender.send(room_id, text(f"{word} sticky"), sticky_ms=sticky_ms)
    plain_reply = sender.send(room_id, in_thread(sticky, f"{word} plain reply"))
    sticky_reply = sender.send(
        room_id, in_thread(sticky, f"{word} sticky reply"), sticky_ms=sticky_ms
    )
    expired_ts = now_ms() + sticky_ms
    until_known(sender, room_id, [sticky, sticky_reply])
    return History(room_id, word, sticky, sticky_reply, plain, plain_reply, expired_ts)


# Endpoints


def events_in(answer: Any) -> Iterator[JsonDict]:
    """All events in an answer, however deep, those bundled with others included."""
    if isinstance(answer, dict):
        if "event_id" in answer and "type" in answer and "sender" in answer:
            yield answer
        for value in answer.values():
            yield from events_in(value)
    elif isinstance(answer, list | tuple):
        for value in answer:
            yield from events_in(value)


Request = Callable[[Client, str, str, str], Any]

# Each asks for what is about an event (whose text has a certain word) in a room.
ENDPOINTS: dict[str, Request] = {
    "/event": lambda client, room_id, event_id, word: client.event(room_id, event_id),
    "/context": lambda client, room_id, event_id, word: client.context(room_id, event_id, limit=30),
    "/messages": lambda client, room_id, event_id, word: client.messages(room_id, limit=30),
    "/messages forwards": lambda client, room_id, event_id, word: client.messages(
        room_id, "f", limit=50
    ),
    "/relations": lambda client, room_id, event_id, word: client.relations(room_id, event_id),
    "/relations by type": lambda client, room_id, event_id, word: client.relations(
        room_id, event_id, "m.thread", "m.room.message"
    ),
    "/search by rank": lambda client, room_id, event_id, word: client.search(word),
    "/search by time": lambda client, room_id, event_id, word: client.search(
        word,
        order_by="recent",
        filter={"rooms": [room_id]},
        event_context={"before_limit": 5, "after_limit": 5},
    ),
    "/threads": lambda client, room_id, event_id, word: client.threads(room_id),
    # What is lifted comes in the section, so that the timeline and the state before it are as
    # without the module.
    "/sync": lambda client, room_id, event_id, word: {
        kind: [(room.get("timeline"), room.get(SYNC_SECTION)) for room in rooms.values()]
        for kind, rooms in client.sync(
            filter={"room": {"include_leave": True, "timeline": {"limit": 30}}}
        )
        .get("rooms", {})
        .items()
    },
    "sliding sync": lambda client, room_id, event_id, word: client.sliding_sync(
        {
            "lists": {"all": window(timeline_limit=30)},
            "room_subscriptions": {room_id: subscription(timeline_limit=30)},
        }
    )["rooms"],
    "/initialSync": lambda client, room_id, event_id, word: client.request(
        "GET", f"/_matrix/client/v3/rooms/{quote(room_id)}/initialSync", params={"limit": 30}
    ),
}

# What each of them can show of a `History`, to somebody who may see everything.
NOT_SHOWN = {
    "/event": {"plain", "plain_reply"},
    "/relations": {"plain", "sticky"},
    "/relations by type": {"plain", "sticky"},
    "/threads": {"plain", "plain_reply"},
}


def unless_denied(request: Callable[[], Any]) -> Any:
    """The answer to a request; None if what it asks for is not for this user."""
    try:
        return request()
    except MatrixError as error:
        if error.status in (403, 404):
            return None
        raise


def shown_by(name: str, client: Client, history: History) -> set[str]:
    """The history's events that an endpoint shows to a user when asked about the sticky one."""
    answer = unless_denied(
        lambda: ENDPOINTS[name](client, history.room_id, history.sticky, history.word)
    )
    return {event["event_id"] for event in events_in(answer)} & history.all


def shown_everywhere(client: Client, history: History) -> dict[str, set[str]]:
    """What every endpoint shows to a user."""
    return {name: shown_by(name, client, history) for name in ENDPOINTS}


def expected(history: History, visible: set[str]) -> dict[str, set[str]]:
    """What every endpoint shows to a user who may see these events."""
    return {
        name: visible - {getattr(history, field) for field in NOT_SHOWN.get(name, ())}
        for name in ENDPOINTS
    }


NOTHING: dict[str, set[str]] = {name: set() for name in ENDPOINTS}


# History visibility


@pytest.mark.repeats("workers")
def test_the_endpoints_show_what_they_can(alice: Client) -> None:
    """The sender sees all: what is missing elsewhere was left out, not out of reach."""
    # K2
    history = make_history(alice, "joined")
    assert shown_everywhere(alice, history) == expected(history, history.all)


@pytest.mark.parametrize("visibility", RESTRICTED)
@pytest.mark.repeats("workers")
def test_late_joiners_see_what_is_sticky(
    homeserver: Homeserver, alice: Client, visibility: str
) -> None:
    """Whoever joins sees the sticky events from before on every endpoint, and no plain ones."""
    # K2
    history = make_history(alice, visibility)
    carol = homeserver.register()
    carol.join(history.room_id)
    assert shown_everywhere(carol, history) == expected(history, history.lifted)
    for plain in (history.plain, history.plain_reply):
        for endpoint in (carol.event, carol.context):
            with pytest.raises(MatrixError) as raised:
                endpoint(history.room_id, plain)
            assert raised.value.status in (403, 404)


@pytest.mark.parametrize("visibility", RESTRICTED)
@pytest.mark.repeats("workers")
def test_around_what_a_late_joiner_sends(
    homeserver: Homeserver, alice: Client, visibility: str
) -> None:
    """They are there around other events, too."""
    # K2
    history = make_history(alice, visibility)
    carol = homeserver.register()
    carol.join(history.room_id)
    own = carol.send(history.room_id)
    around = carol.context(history.room_id, own, limit=30)
    assert set(ids(around["events_before"])) & history.all == history.lifted
    before_own = carol.messages(history.room_id, limit=30, **{"from": around["start"]})
    assert set(ids(events_in(before_own))) & history.all <= history.lifted


@pytest.mark.parametrize("visibility", RESTRICTED)
def test_those_not_joined_gain_nothing(
    homeserver: Homeserver, alice: Client, visibility: str
) -> None:
    """Strangers, the invited, those who left and those who were banned."""
    # K2, C8
    history = make_history(alice, visibility)
    room_id = history.room_id
    invited, left, kicked, banned, stranger = (homeserver.register() for _ in range(5))
    alice.invite(room_id, invited.user_id)
    for client in (left, kicked, banned):
        client.join(room_id)
        assert shown_by("/event", client, history) == {history.sticky, history.sticky_reply}
    left.leave(room_id)
    alice.kick(room_id, kicked.user_id)
    alice.ban(room_id, banned.user_id)
    for client in (invited, left, kicked, banned, stranger):
        assert shown_everywhere(client, history) == NOTHING
    invited.leave(room_id)
    assert shown_everywhere(invited, history) == NOTHING


@pytest.mark.repeats("workers")
def test_joining_again_lifts_again(homeserver: Homeserver, alice: Client) -> None:
    """What counts is whether the user is joined now."""
    # K2
    history = make_history(alice, "joined")
    carol = homeserver.register()
    for _ in range(2):
        carol.join(history.room_id)
        assert shown_by("/messages", carol, history) == history.lifted
        carol.leave(history.room_id)
        assert shown_by("/messages", carol, history) == set()


@pytest.mark.slow
@pytest.mark.repeats("workers")
def test_hidden_again_once_expired(homeserver: Homeserver, alice: Client) -> None:
    """When it is over, a sticky event is as hidden as any other of that time."""
    # K2, E4
    carol = homeserver.register()
    histories = []
    for visibility in RESTRICTED:
        history = make_history(alice, visibility, sticky_ms=20_000)
        carol.join(history.room_id)
        assert shown_by("/messages", carol, history) == history.lifted
        histories.append(history)
    sleep_until(max(history.expired_ts for history in histories))
    for history in histories:
        assert shown_everywhere(carol, history) == NOTHING
        assert shown_everywhere(alice, history) == expected(history, history.all)


@pytest.mark.repeats("workers")
def test_redacted_events_stay_hidden(homeserver: Homeserver, alice: Client) -> None:
    """A redacted event is not sticky any more, so it is hidden as before."""
    # K2, E5
    history = make_history(alice, "joined")
    alice.redact(history.room_id, history.sticky_reply)
    alice.redact(history.room_id, history.plain_reply)
    carol = homeserver.register()
    carol.join(history.room_id)

    def hidden() -> bool:
        for reader in (carol.via(url) for url in homeserver.client_urls):
            assert shown_by("/messages", reader, history) == {history.sticky}
        return True

    eventually(hidden, what="the redaction")
    for name in ENDPOINTS:
        assert shown_by(name, carol, history) <= {history.sticky}, name
    alice.redact(history.room_id, history.sticky)

    def all_hidden() -> bool:
        for reader in (carol.via(url) for url in homeserver.client_urls):
            assert shown_by("/event", reader, history) == set()
        return True

    eventually(all_hidden, what="the other redaction")
    assert shown_everywhere(carol, history) == NOTHING


@pytest.mark.parametrize("rel_type", ["m.thread", "m.replace"])
@pytest.mark.repeats("workers")
def test_nothing_plain_is_bundled_with_what_is_lifted(
    homeserver: Homeserver, alice: Client, rel_type: str
) -> None:
    """The newest reply and the newest edit come with an event. Plain ones stay hidden."""
    # K2
    history = make_history(alice, "joined")
    room_id = history.room_id
    secret = unique("secret")
    # Of another event than the history's, whose newest reply is sticky.
    root = alice.send(room_id, text(f"{history.word} another root"), sticky_ms=HOUR_MS)
    related = alice.send(
        room_id,
        {
            **text(secret),
            "m.new_content": text(secret),
            "m.relates_to": {"rel_type": rel_type, "event_id": root},
        },
    )
    until_known(alice, room_id, [root])
    carol = homeserver.register()
    carol.join(room_id)
    with pytest.raises(MatrixError) as raised:
        carol.event(room_id, related)
    assert raised.value.status == 404

    def telling(client: Client) -> list[str]:
        answers = {
            name: request(client, room_id, root, history.word)
            for name, request in ENDPOINTS.items()
        }
        answers["section"] = Connection(client, {"all": no_window()}).ask().body
        assert root in str(answers["section"])
        return [name for name, answer in answers.items() if secret in str(answer)]

    assert "/event" in telling(alice)
    assert telling(carol) == []


@pytest.mark.repeats("workers")
def test_nothing_plain_comes_with_a_reply_that_is_bundled(
    homeserver: Homeserver, alice: Client
) -> None:
    """The newest reply may be lifted itself: then its plain edit stays hidden too."""
    # K2
    history = make_history(alice, "joined")
    secret = unique("secret")
    relation = {"rel_type": "m.replace", "event_id": history.sticky_reply}
    content = {**text(secret), "m.new_content": text(secret), "m.relates_to": relation}
    edit = alice.send(history.room_id, content)
    carol = homeserver.register()
    carol.join(history.room_id)
    with pytest.raises(MatrixError) as raised:
        carol.event(history.room_id, edit)
    assert raised.value.status == 404
    for name, request in ENDPOINTS.items():
        answer = request(carol, history.room_id, history.sticky, history.word)
        assert secret not in str(answer), name
    shown = carol.event(history.room_id, history.sticky)
    newest = shown["unsigned"]["m.relations"]["m.thread"]["latest_event"]
    assert newest["event_id"] == history.sticky_reply
    assert secret in str(alice.event(history.room_id, history.sticky))


@pytest.mark.parametrize("visibility", RESTRICTED)
@pytest.mark.repeats("workers")
def test_admins_see_what_is_bundled(homeserver: Homeserver, alice: Client, visibility: str) -> None:
    """Synapse shows admins everything of a room that they are not in, and so it stays."""
    # O1
    history = make_history(alice, visibility)
    room_id = history.room_id
    admin = homeserver.register(admin=True).via(homeserver.main_url)
    for root in (history.plain, history.sticky):
        for rel_type in ("m.thread", "m.replace", "m.reference"):
            relation = {"rel_type": rel_type, "event_id": root}
            alice.send(
                room_id,
                {**text("related"), "m.new_content": text("edited"), "m.relates_to": relation},
            )
    path = f"/_synapse/admin/v1/rooms/{quote(room_id)}"

    def bundled(root: str) -> list[dict[str, Any]]:
        context = admin.request("GET", f"{path}/context/{quote(root)}")
        messages = admin.request("GET", f"{path}/messages?dir=b&limit=50")["chunk"]
        (event,) = [event for event in messages if event["event_id"] == root]
        return [e["unsigned"].get("m.relations", {}) for e in (context["event"], event)]

    def all_is_bundled() -> bool:
        both = zip(bundled(history.plain), bundled(history.sticky), strict=True)
        for of_plain, of_sticky in both:
            assert of_plain.keys() == {"m.thread", "m.replace", "m.reference"}
            assert of_sticky.keys() == of_plain.keys()
            assert of_plain["m.thread"]["count"] == 1
            # Two more are of the history.
            assert of_sticky["m.thread"]["count"] == 3
            for references in (of_plain["m.reference"], of_sticky["m.reference"]):
                assert len(references["chunk"]) == 1
        return True

    eventually(all_is_bundled, what="all that is bundled, on the main process")


@pytest.mark.repeats("workers")
def test_ignored_senders_stay_ignored(homeserver: Homeserver, alice: Client) -> None:
    """Being sticky is no way around that."""
    # K2, C8
    history = make_history(alice, "joined")
    carol = homeserver.register()
    carol.join(history.room_id)
    carol.set_ignored_users([alice.user_id])

    def ignored() -> bool:
        for reader in (carol.via(url) for url in homeserver.client_urls):
            assert shown_by("/event", reader, history) == set()
        return True

    eventually(ignored, what="the ignored user")
    for name in ENDPOINTS:
        assert shown_by(name, carol, history) == set(), name


# Erased senders


@pytest.mark.parametrize("visibility", ["shared", "joined"])
@pytest.mark.repeats("workers")
def test_erased_senders(
    homeserver: Homeserver, alice: Client, bob: Client, visibility: str
) -> None:
    """What an erased user has sent is pruned, or hidden, as if it were not sticky."""
    # E6, K2
    history = make_history(alice, visibility)
    room_id = history.room_id
    bob.join(room_id)
    dave = homeserver.register()
    dave.join(room_id)
    content = {**text(f"{history.word} of dave")}
    plain = dave.send(room_id, content)
    sticky = dave.send(room_id, content, sticky_ms=HOUR_MS)
    until_known(alice, room_id, [sticky])
    dave.deactivate(erase=True)
    carol = homeserver.register()
    carol.join(room_id)
    erased = {plain, sticky}

    def contents(events: Any) -> dict[str, JsonDict]:
        return {e["event_id"]: e["content"] for e in events_in(events) if e["event_id"] in erased}

    def same_as_plain(client: Client) -> bool:
        wanted: dict[str, JsonDict] = {name: {} for name in erased if visibility != "joined"}
        assert contents(client.messages(room_id, limit=30)["chunk"]) == wanted
        for event_id in erased:
            event = unless_denied(lambda event_id=event_id: client.event(room_id, event_id))  # type: ignore[misc]
            assert contents(event) == {name: {} for name in wanted if name == event_id}
        return True

    for url in homeserver.client_urls:
        eventually(
            lambda url=url: same_as_plain(carol.via(url)),  # type: ignore[misc]
            what=f"dave erased at {url}",
        )
    answer = carol.sync(filter={"room": {"timeline": {"limit": 1}}})
    assert not erased & set(ids(sticky_in(answer, room_id)))
    assert history.lifted <= set(ids(sticky_in(answer, room_id)))
    in_timeline = timeline_in(carol.sync(filter={"room": {"timeline": {"limit": 30}}}), room_id)
    in_messages = carol.messages(room_id, limit=30)["chunk"]
    assert contents(in_timeline) == contents(in_messages)
    assert not erased & set(drained(Connection(carol).drain(), room_id))
    # Those who were there see what they saw.
    assert contents(bob.messages(room_id, limit=30)["chunk"]) == dict.fromkeys(erased, content)


# The remaining time


def occurrences(
    client: Client, history: History, event_id: str
) -> Iterator[tuple[str, JsonDict, int, int]]:
    """Where an event is shown, the event there, and between which times it was answered."""
    more: dict[str, Callable[[], Any]] = {
        "/sync section": lambda: {
            room_id: room.get("msc4354_sticky")
            for room_id, room in client.sync(filter={"room": {"timeline": {"limit": 1}}})["rooms"][
                "join"
            ].items()
        },
        "sliding sync section": lambda: Connection(client, {"all": no_window()}).ask().sections,
        "/notifications": lambda: client.request("GET", "/_matrix/client/v3/notifications"),
    }
    for name, request in ENDPOINTS.items():
        more[name] = lambda request=request: request(  # type: ignore[misc]
            client, history.room_id, history.sticky, history.word
        )
    for name, ask in more.items():
        before = now_ms()
        answer = ask()
        after = now_ms()
        for event in events_in(answer):
            if event["event_id"] == event_id:
                yield name, event, before, after


@pytest.mark.repeats("workers")
def test_remaining_time_on_every_endpoint(
    homeserver: Homeserver, alice: Client, bob: Client
) -> None:
    """It agrees with when the event was received. Plain events have none."""
    # E3, E1
    duration_ms = 1_000_000
    history = make_history(alice, "shared", duration_ms)
    bob.join(history.room_id)
    # So that the timelines of one event do not have it.
    last = alice.send(history.room_id)
    wait_for_readers(bob, history.room_id, last)
    follow_until_seen(bob, history.room_id, history.lifted)
    everywhere = {*ENDPOINTS, "/sync section", "sliding sync section"}
    for event_id in history.lifted:
        query = "SELECT received_ts, origin_server_ts FROM events WHERE event_id = ?"
        ((received_ts, origin_server_ts),) = homeserver.query(query, event_id)
        expires_ts = min(received_ts, origin_server_ts) + duration_ms
        places = set()
        for place, event, before, after in occurrences(bob, history, event_id):
            remaining = event["unsigned"].get(REMAINING_KEY)
            assert type(remaining) is int, place
            assert before <= expires_ts - remaining <= after, place
            places.add(place)
        missing = {"/relations", "/relations by type"} if event_id == history.sticky else set()
        assert places - {"/notifications"} == everywhere - missing
    for event_id in (history.plain, history.plain_reply):
        for place, event, _, _ in occurrences(bob, history, event_id):
            assert REMAINING_KEY not in event["unsigned"], place


@pytest.mark.repeats("workers")
def test_remaining_time_in_notifications(alice: Client, bob: Client, room: str) -> None:
    """The list of what a user was notified of has it as well."""
    # E3
    event_id = alice.send(room, text(f"to {bob.user_id}"), sticky_ms=HOUR_MS)

    def notified() -> JsonDict | None:
        answer = bob.request("GET", "/_matrix/client/v3/notifications")
        found = [e for e in events_in(answer) if e["event_id"] == event_id]
        return found[0] if found else None

    event = eventually(notified, what="the notification") or {}
    assert 0 < event["unsigned"][REMAINING_KEY] <= HOUR_MS


@pytest.mark.slow
@pytest.mark.repeats("workers")
def test_no_remaining_time_once_expired(alice: Client, bob: Client) -> None:
    """The field is gone then, rather than 0 or negative."""
    # E3, E4
    duration_ms = 15_000
    history = make_history(alice, "shared", duration_ms)
    bob.join(history.room_id)
    event = bob.event(history.room_id, history.sticky_reply)
    assert 0 < event["unsigned"][REMAINING_KEY] <= duration_ms
    sleep_until(history.expired_ts)
    for event_id in history.lifted:
        places = set()
        for place, event, _, _ in occurrences(bob, history, event_id):
            assert REMAINING_KEY not in event["unsigned"], place
            # It still says that it was sticky: that is part of the event.
            assert event["msc4354_sticky"] == {"duration_ms": duration_ms}
            places.add(place)
        missing = {"/relations", "/relations by type"} if event_id == history.sticky else set()
        assert places - {"/notifications"} == set(ENDPOINTS) - missing


@pytest.mark.repeats("workers")
def test_no_remaining_time_on_redacted_events(alice: Client, bob: Client, room: str) -> None:
    """A redacted event is not sticky."""
    # E3, E5
    event_id = alice.send(room, sticky_ms=HOUR_MS)
    wait_for_readers(bob, room, event_id)
    alice.redact(room, event_id)

    def redacted() -> JsonDict | None:
        event = bob.event(room, event_id)
        return event if "redacted_because" in event["unsigned"] else None

    event = eventually(redacted, what="the redaction") or {}
    assert REMAINING_KEY not in event["unsigned"]


# E5, K2
def test_redacted_events_are_not_lifted_as_they_were(make_homeserver: MakeHomeserver) -> None:
    """With MSC2815 some users may read redacted events, if the room does not hide them."""
    homeserver = make_homeserver(extra_config={"experimental_features": {"msc2815_enabled": True}})
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    visibility = {"history_visibility": "joined"}
    room = alice.create_room(
        preset="public_chat",
        initial_state=[
            {"type": "m.room.history_visibility", "state_key": "", "content": visibility}
        ],
        power_level_content_override={"users_default": 100},
    )
    (event_id,) = send_sticky(alice, room, content=text("secret"))
    bob.join(room)
    path = f"/_matrix/client/v3/rooms/{quote(room)}/event/{quote(event_id)}"
    unredacted = {"fi.mau.msc2815.include_unredacted_content": "true"}
    shown = eventually(
        lambda: unless_denied(lambda: bob.request("GET", path, params=unredacted)),
        what="the sticky event on /event",
    )
    assert shown["content"] == text("secret")
    alice.redact(room, event_id)
    with pytest.raises(MatrixError) as hidden:
        bob.request("GET", path, params=unredacted)
    assert hidden.value.status == 404
