"""What comes beside an event whose history visibility is lifted: nothing else that is hidden."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from harness.client import Client, JsonDict, MatrixError, quote
from harness.event_format import Event
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.sliding import EXTENSION, until_known
from tests.support import EVENT_KEY, HOUR_MS, MakeHomeserver, follow_until_seen, ids, text, unique

HISTORY_VISIBILITY = "m.room.history_visibility"
SECRET = "org.example.secret"
STICKY: Any = {EVENT_KEY: {"duration_ms": HOUR_MS}}


@dataclass
class Past:
    """A room with restricted history, and what happened in it before others joined.

    Attributes:
        witness: somebody who has seen all of it.
        since: the token of whoever joins later, from before the join.
        word: stands in all messages.
        lifted: the sticky events.
        secrets: texts that stand in hidden events only, and the IDs of those events.
    """

    room_id: str
    witness: Client
    since: str = ""
    word: str = field(default_factory=lambda: unique("word"))
    lifted: list[str] = field(default_factory=list)
    secrets: list[str] = field(default_factory=list)

    def secret(self) -> str:
        """One more text that nobody who joins later may see."""
        self.secrets.append(unique("secret"))
        return self.secrets[-1]

    def hidden(self, event_id: str) -> None:
        """One more event that nobody who joins later may see, nor its ID."""
        self.secrets.append(event_id)


def make_past(homeserver: Homeserver, remote: RemoteServer, visibility: str) -> Past:
    """Talk in a room, and change its state and the names of who is in it meanwhile."""
    alice, bob = homeserver.register(), homeserver.register()
    room_id = alice.create_room(
        preset="public_chat",
        room_version="10",
        power_level_content_override={"state_default": 0},
        initial_state=[
            {
                "type": HISTORY_VISIBILITY,
                "state_key": "",
                "content": {"history_visibility": visibility},
            }
        ],
    )
    past = Past(room_id, alice)
    dave = remote.join(homeserver, room_id, "dave")

    def set_state(type: str, content: JsonDict, by: Client = alice, state_key: str = "") -> str:
        return by.send_state(room_id, type, content, state_key)

    def set_topic(topic: str) -> str:
        return set_state("m.room.topic", {"topic": topic})

    def set_name(client: Client, name: str) -> str:
        content = {"membership": "join", "displayname": name}
        return set_state("m.room.member", content, client, client.user_id)

    def say(client: Client, sticky: bool = True) -> str:
        body = f"{past.word} {'sticky' if sticky else past.secret()}"
        return client.send(room_id, text(body), sticky_ms=HOUR_MS if sticky else None)

    def from_elsewhere(
        after: str, type: str, content: JsonDict, state_key: str, **stickiness: Any
    ) -> str:
        remote.wait_for(after)
        event: Event = remote.send_event(room_id, dave, content, type, state_key, **stickiness)
        stored = "SELECT 1 FROM events WHERE event_id = ? AND NOT outlier"
        eventually(lambda: homeserver.query(stored, event.event_id), what="an event of dave's")
        return event.event_id

    def name_dave(after: str, name: str, **stickiness: Any) -> str:
        content = {"membership": "join", "displayname": name}
        return from_elsewhere(after, "m.room.member", content, dave, **stickiness)

    past.hidden(set_topic(past.secret()))
    past.hidden(set_name(alice, past.secret()))
    bob.join(room_id)
    past.hidden(set_name(bob, past.secret()))
    past.hidden(say(alice, sticky=False))
    past.lifted += [say(alice), say(bob)]
    # State that is sticky, and what it replaces: one that is replaced itself, a name, and one
    # that lasts.
    last = past.lifted[-1]
    past.lifted.append(from_elsewhere(last, "m.room.topic", {"topic": "dave's"}, "", **STICKY))
    past.hidden(name_dave(last, past.secret()))
    past.lifted.append(name_dave(last, "dave sticky", **STICKY))
    past.hidden(last := set_state(SECRET, {"value": past.secret()}))
    past.lifted.append(from_elsewhere(last, SECRET, {"value": "of dave"}, "", **STICKY))
    past.hidden(set_topic(past.secret()))
    past.hidden(say(bob, sticky=False))
    past.lifted.append(say(alice))
    in_thread = {"m.relates_to": {"rel_type": "m.thread", "event_id": past.lifted[0]}}
    past.lifted.append(
        alice.send(room_id, {**text(f"{past.word} reply"), **in_thread}, sticky_ms=HOUR_MS)
    )
    # What is current when others join is no secret, and what that replaces is one.
    past.hidden(set_topic(past.secret()))
    past.hidden(set_name(alice, past.secret()))
    past.hidden(last := set_name(bob, past.secret()))
    past.hidden(name_dave(last, past.secret()))
    set_topic("the topic")
    name_dave(set_name(alice, "alice"), "dave")
    bob.leave(room_id)
    until_known(alice, room_id, past.lifted)
    return past


Ask = Callable[[Client, Past], Any]


def _choices(**values: list[Any]) -> Iterator[JsonDict]:
    """Every combination of values."""
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def _named(name: str, parameters: JsonDict) -> str:
    return f"{name} {json.dumps(parameters)}"


LAZY = [False, True]


def about_an_event(index: int) -> Iterator[tuple[str, Ask]]:
    """Requests that name one of the lifted events."""

    def asks(prefix: str, middle: str) -> Ask:
        return lambda client, past: client.request(
            "GET", f"{prefix}/{quote(past.room_id)}/{middle}/{quote(past.lifted[index])}"
        )

    yield "/event", asks("/_matrix/client/v3/rooms", "event")
    yield (
        "/events/{id}",
        lambda client, past: client.request(
            "GET", f"/_matrix/client/r0/events/{quote(past.lifted[index])}"
        ),
    )
    for choice in _choices(limit=[0, 4, 40], lazy=LAZY):
        yield (
            _named("/context", choice),
            lambda client, past, choice=choice: client.context(  # type: ignore[misc]
                past.room_id,
                past.lifted[index],
                limit=choice["limit"],
                filter=json.dumps({"lazy_load_members": choice["lazy"]}),
            ),
        )
    yield (
        "/relations",
        lambda client, past: client.relations(past.room_id, past.lifted[index]),
    )


def about_a_room() -> Iterator[tuple[str, Ask]]:
    """Requests that name the room, or nothing."""
    for choice in _choices(dir=["b", "f"], limit=[3, 50], lazy=LAZY):
        yield (
            _named("/messages", choice),
            lambda client, past, choice=choice: all_messages(  # type: ignore[misc]
                client, past, **choice
            ),
        )
    for choice in _choices(order_by=["rank", "recent"], around=[0, 10], profile=[False, True]):
        yield (
            _named("/search", choice),
            lambda client, past, choice=choice: client.search(  # type: ignore[misc]
                past.word,
                order_by=choice["order_by"],
                include_state=choice["profile"],
                event_context={
                    "before_limit": choice["around"],
                    "after_limit": choice["around"],
                    "include_profile": choice["profile"],
                },
            ),
        )
    for choice in _choices(
        limit=[1, 5, 50],
        lazy=LAZY,
        use_state_after=[False, True],
        since=[False, True],
        types=[None, ["m.room.message"]],
    ):
        yield (
            _named("/sync", choice),
            lambda client, past, choice=choice: syncs(  # type: ignore[misc]
                client, past, **choice
            ),
        )
    for limit in (1, 5, 50):
        for prefix in ("/_matrix/client/r0", "/_matrix/client/r0/rooms/{}"):
            yield (
                f"{prefix}/initialSync {limit}",
                lambda client, past, prefix=prefix, limit=limit: client.request(  # type: ignore[misc]
                    "GET",
                    f"{prefix.format(quote(past.room_id))}/initialSync",
                    params={"limit": limit},
                ),
            )
    everything, lazily = [["*", "*"]], [["m.room.member", "$LAZY"], ["m.room.topic", ""]]
    for choice in _choices(
        limit=[1, 5, 50], required_state=[everything, lazily], since=[False, True]
    ):
        yield (
            _named("sliding sync", choice),
            lambda client, past, choice=choice: sliding_syncs(  # type: ignore[misc]
                client, past, **choice
            ),
        )
    yield "/threads", lambda client, past: client.threads(past.room_id)
    yield "/state", lambda client, past: client.state(past.room_id)
    for name in ("members", "joined_members"):
        yield (
            f"/{name}",
            lambda client, past, name=name: client.request(  # type: ignore[misc]
                "GET", f"/_matrix/client/v3/rooms/{quote(past.room_id)}/{name}"
            ),
        )
    yield (
        "/state/{type}",
        lambda client, past: client.request(
            "GET",
            f"/_matrix/client/v3/rooms/{quote(past.room_id)}/state/{SECRET}/",
            params={"format": "event"},
        ),
    )
    yield (
        "/notifications",
        lambda client, past: client.request("GET", "/_matrix/client/v3/notifications"),
    )
    yield (
        "/events",
        lambda client, past: client.request(
            "GET",
            "/_matrix/client/r0/events",
            params={"from": past.since, "timeout": 0},
        ),
    )


def all_messages(client: Client, past: Past, dir: str, limit: int, lazy: bool) -> Any:
    """All pages of a room's history."""
    pages: list[JsonDict] = []
    token = None
    while len(pages) < 100:
        page = client.messages(
            past.room_id, dir, limit=limit, filter={"lazy_load_members": lazy}, **{"from": token}
        )
        pages.append(page)
        token = page.get("end")
        if token is None:
            break
    return pages


def syncs(
    client: Client,
    past: Past,
    limit: int,
    lazy: bool,
    use_state_after: bool,
    since: bool,
    types: list[str] | None,
) -> Any:
    """An initial sync, or one with a gap."""
    timeline = {"limit": limit} if types is None else {"limit": limit, "types": types}
    more: JsonDict = {}
    if use_state_after:
        more = {"use_state_after": "true", "org.matrix.msc4222.use_state_after": "true"}
    return client.sync(
        past.since if since else None,
        filter={
            "room": {
                "rooms": [past.room_id],
                "timeline": timeline,
                "state": {"lazy_load_members": lazy},
            }
        },
        **more,
    )


def sliding_syncs(client: Client, past: Past, limit: int, required_state: Any, since: bool) -> Any:
    """A connection's first answer, or one in which the room appears."""
    body: JsonDict = {"conn_id": unique(), "extensions": {EXTENSION: {"enabled": True}}}
    pos = client.sliding_sync({**body, "room_subscriptions": {}})["pos"] if since else None
    room = {"timeline_limit": limit, "required_state": required_state}
    return client.sliding_sync({**body, "room_subscriptions": {past.room_id: room}}, pos)


REQUESTS: dict[str, Ask] = dict(about_a_room()) | {
    f"{name} of {index}": ask for index in range(7) for name, ask in about_an_event(index)
}


def answers(client: Client, past: Past) -> dict[str, str]:
    """The text of every answer that the user gets."""
    # Synapse keeps events in memory with the content that they replaced, once it was read.
    all_messages(past.witness, past, "b", 100, lazy=False)
    result: dict[str, str] = {}
    for name, ask in REQUESTS.items():
        try:
            result[name] = json.dumps(ask(client, past))
        except MatrixError as error:
            if error.status not in (403, 404):
                raise
            result[name] = ""
    return result


def _event_ids(value: Any) -> Iterator[str]:
    """The IDs of all events in an answer, however deep."""
    if isinstance(value, dict):
        if "event_id" in value and "sender" in value:
            yield value["event_id"]
        for inner in value.values():
            yield from _event_ids(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _event_ids(inner)


def joined_parts(answer: str) -> Any:
    """The events in each part of a joined room in `/sync`, but for the section.

    And but for memberships: those of the section's senders come too.
    """
    (room,) = json.loads(answer)["rooms"]["join"].values()
    state = {
        name: sorted(e["event_id"] for e in room[name]["events"] if e["type"] != "m.room.member")
        for name in room
        if "state" in name
    }
    return ids(room["timeline"]["events"]), room["timeline"]["limited"], state


@pytest.mark.slow
def test_lifting_shows_nothing_else(make_homeserver: MakeHomeserver, remote: RemoteServer) -> None:
    """Beside a lifted event comes no state, name or content from before the user's join.

    The same requests are put to a server with the module and, once it is taken out, without.
    """
    # K2
    homeserver = make_homeserver("sqlite", federation=True)
    homeserver.start()
    pasts = [make_past(homeserver, remote, visibility) for visibility in ("joined", "invited")]
    readers = []
    for past in pasts:
        reader = homeserver.register()
        past.since = reader.sync()["next_batch"]
        reader.join(past.room_id)
        follow_until_seen(reader, past.room_id, past.lifted)
        readers.append((reader, past, set(ids(reader.state(past.room_id)))))
    with_module = [answers(reader, past) for reader, past, _ in readers]
    homeserver.stop()
    homeserver.reconfigure(module=False)
    homeserver.start()
    problems: list[str] = []
    for (reader, past, current), lifting in zip(readers, with_module, strict=True):
        plain = answers(reader, past)
        visible = {e for text in plain.values() for e in _event_ids(json.loads(text or "null"))}
        for name, answer in lifting.items():
            leaked = [s for s in past.secrets if s in answer and s not in plain[name]]
            if leaked:
                problems.append(f"{name} tells {leaked}")
            strange = set(_event_ids(json.loads(answer or "null"))) - set(past.lifted) - current
            if strange - visible:
                problems.append(f"{name} shows {strange - visible}")
            if name.startswith("/sync") and joined_parts(answer) != joined_parts(plain[name]):
                problems.append(f"{name} has other events than without the module")
        for index, event_id in enumerate(past.lifted):
            for name in ("/event", "/events/{id}", '/context {"limit": 40, "lazy": true}'):
                if event_id not in lifting[f"{name} of {index}"]:
                    problems.append(f"{name} lacks the lifted event {index}")
        for name in lifting:
            if name.startswith(("/messages", "/sync", "sliding sync")):
                missing = [e for e in past.lifted if e not in lifting[name]]
                if missing and '"limit": 50' in name:
                    problems.append(f"{name} lacks {missing}")
    assert not problems, "\n".join(problems[:100])


# K2
@pytest.mark.any_synapse
def test_rooms_without_lifted_events_are_as_ever(make_homeserver: MakeHomeserver) -> None:
    """Synapse makes the rooms of an answer one after the other, in a few contexts."""
    homeserver = make_homeserver()
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    visibility = {"type": "m.room.history_visibility", "state_key": ""}
    joined_only = [{**visibility, "content": {"history_visibility": "joined"}}]
    lifted = []
    for _ in range(20):
        lifted.append(alice.create_room(preset="public_chat", initial_state=joined_only))
        alice.send(lifted[-1], sticky_ms=HOUR_MS)
        bob.join(lifted[-1])
    rooms = []
    for _ in range(20):
        rooms.append(alice.create_room(preset="public_chat", topic="old"))
        bob.join(rooms[-1])
        alice.send_state(rooms[-1], "m.room.topic", {"topic": "new"})
    window = {"ranges": [[0, 99]], "required_state": [["m.room.topic", ""]], "timeline_limit": 3}

    def replaced_topics(connection: str) -> list[str]:
        answer = bob.sliding_sync({"conn_id": connection, "lists": {"all": window}})
        return [
            event["unsigned"].get("prev_content", {}).get("topic")
            for room in rooms
            for event in answer["rooms"][room]["required_state"]
        ]

    assert replaced_topics("first") == ["old"] * len(rooms)
    # Now these come before the others.
    for room in lifted:
        alice.send(room)
    assert replaced_topics("second") == ["old"] * len(rooms)
