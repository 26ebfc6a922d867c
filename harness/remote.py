"""A Matrix server of the tests' own, which can send any event it likes."""

import contextlib
import enum
import json
import logging
import secrets
import socket
import ssl
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from canonicaljson import encode_canonical_json
from signedjson.key import generate_signing_key, get_verify_key
from signedjson.sign import sign_json
from unpaddedbase64 import encode_base64

from harness.certificate import write_certificate
from harness.client import JsonDict, MatrixError, quote
from harness.event_format import (
    ROOM_VERSIONS,
    Event,
    event_from_pdu,
    names_its_own_events,
    references,
    sign_event,
)
from harness.homeserver import Homeserver
from harness.processes import free_port

State = dict[tuple[str, str], Event]
RawAnswer = tuple[int, Iterable[bytes]]

_log = logging.getLogger(__name__)


class Absent(enum.Enum):
    """Stands for a key that an event is not to have."""

    ABSENT = enum.auto()


ABSENT = Absent.ABSENT


@dataclass
class Room:
    """What the server knows of a room."""

    room_id: str
    version: str
    # The other servers in the room.
    destinations: list[str] = field(default_factory=list)
    state: State = field(default_factory=dict)
    # The newest events, that no event known refers to as a previous one.
    heads: list[str] = field(default_factory=list)


FLOOD_BYTES = 64 * 1024 * 1024


class Harm(enum.Enum):
    """How a server fails a transaction, other than with an HTTP status."""

    # It does not answer for a minute.
    HANG = enum.auto()
    # It closes the connection.
    CLOSE = enum.auto()
    # It answers with an error of many bytes.
    FLOOD = enum.auto()


class _NotFound(Exception):
    """The answer is 404."""


class _NoSuchEvent(Exception):
    """The answer is 404, and nothing else, as Synapse's to the question for an event."""


class _Harmed(Exception):
    """The answer is that status, or none."""

    def __init__(self, harm: int | Harm) -> None:
        super().__init__(f"The test wants it so: {harm}")
        self.harm = harm


class RemoteServer:
    """A server that keeps rooms and events in memory, and checks nothing it is told.

    Use it with `with`. It follows the rooms it is in: events it sends, and those that it
    receives, become previous events of the next one it creates, and state events among them
    its current state.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.server_name = f"127.0.0.1:{self.port}"
        self.signing_key = generate_signing_key(secrets.token_hex(3))
        self.rooms: dict[str, Room] = {}
        # When False every request is answered with 503.
        self.online = True
        # What the server answers when asked for older events. A test may replace both.
        self.answer_backfill: Callable[[str, list[str], int], list[JsonDict]] = self.backfill
        self.answer_missing_events: Callable[[str, JsonDict], list[JsonDict]] = self.missing_events
        # What it says of each event that it is sent. None leaves the event out of the answer;
        # such an event, and one with an "error", it does not take. A test may replace it.
        self.judge: Callable[[Event], JsonDict | None] = lambda event: {}
        # What it sends in place of its answer to a path: a status, and a body in pieces. None if it
        # answers. A test may replace it.
        self.answer_instead: Callable[[str], RawAnswer | None] = lambda path: None
        # How it fails a transaction, by its ID and body: with an HTTP status or worse; None for
        # not at all. A test may replace it.
        self.harm: Callable[[str, JsonDict], int | Harm | None] = lambda txn_id, body: None
        # How long it wants to be left alone then, by a header.
        self.retry_after_s: int | None = None
        # The transactions that it failed.
        self.harmed: list[JsonDict] = []
        # How many bytes of each such error were written before the other side hung up.
        self.flooded: list[int] = []
        # Whether it has an event that it knows in its room's history, other than as an outlier.
        self.has_in_history: Callable[[Event], bool] = self._has_in_history
        # Whether it leaves memberships out of its answer to a join if it may: a faster join.
        self.omits_members = False
        # Set while it answers joins, and questions for the state of a room.
        self.lets_in = threading.Event()
        self.lets_in.set()
        self.tells_state = threading.Event()
        self.tells_state.set()
        # How long it takes to answer a transaction, and a question for the event at some time.
        self.answers_after_s = 0.0
        self.finds_after_s = 0.0
        # How many transactions came at the same time, at most. Synapse would refuse the second.
        self.most_transactions_at_once = 0
        self._transactions_now = 0
        self._events: dict[str, Event] = {}
        # In which order it learnt of them.
        self._numbers: dict[str, int] = {}
        self._state_before: dict[str, State] = {}
        self._referenced: set[str] = set()
        self._received: list[Event] = []
        self._transactions: list[list[Event]] = []
        self._requests: list[tuple[str, str]] = []
        # Guards all of the above; signalled when something was received.
        self._changed = threading.Condition(threading.RLock())
        self._http = httpx.Client(
            verify=False,
            trust_env=False,
            timeout=60,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self._server = _Server(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def __enter__(self) -> "RemoteServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._http.close()

    def user_id(self, localpart: str) -> str:
        """The id of a user of this server. Any of them exists."""
        return f"@{localpart}:{self.server_name}"

    # Events

    def create_event(
        self,
        room_id: str,
        type: str,
        content: Any,
        sender: str,
        state_key: str | None = None,
        *,
        auth_events: Iterable[Event | str] | None = None,
        prev_events: Iterable[Event | str] | None = None,
        depth: Any = None,
        origin_server_ts: Any = None,
        **top_level_keys: Any,
    ) -> Event:
        """Make an event, without telling anybody.

        `top_level_keys` are added to the event, or replace what is there, before it is hashed
        and signed. `ABSENT`, as the value of any of them, leaves a key out. Unless they are
        given, the previous events are the newest ones known, and the auth events those that are
        right after the previous events.
        """
        with self._changed:
            room = self.rooms[room_id]
            previous = [
                self._events.get(event, event) if isinstance(event, str) else event
                for event in (room.heads[-10:] if prev_events is None else prev_events)
            ]
            if auth_events is None:
                state = room.state if prev_events is None else self._state_after(room, previous)
                auth_events = _auth_events(room.version, state, type, content, sender, state_key)
            if depth is None:
                depths = [event.pdu.get("depth") for event in previous if isinstance(event, Event)]
                # Where a test has put something else there, or nothing, it is none.
                depth = max((known for known in depths if isinstance(known, int)), default=0) + 1
            pdu: JsonDict = {
                "type": type,
                "room_id": room_id,
                "sender": sender,
                "origin": self.server_name,
                "origin_server_ts": (
                    int(time.time() * 1000) if origin_server_ts is None else origin_server_ts
                ),
                "content": content,
                "depth": depth,
                "prev_events": references(room.version, previous),
                "auth_events": references(room.version, auth_events),
            }
            if state_key is not None:
                pdu["state_key"] = state_key
            if names_its_own_events(room.version):
                pdu["event_id"] = self._new_event_id()
            pdu.update(top_level_keys)
            pdu = {key: value for key, value in pdu.items() if value is not ABSENT}
            return self.sign(room.version, pdu)

    def sign(self, room_version: str, pdu: JsonDict) -> Event:
        """Hash and sign an event that was put together by hand."""
        return sign_event(room_version, pdu, self.server_name, self.signing_key)

    def _new_event_id(self) -> str:
        return f"${secrets.token_hex(9)}:{self.server_name}"

    def send(
        self,
        events: Event | JsonDict | Iterable[Event | JsonDict],
        destination: str | None = None,
        *,
        remember: bool = True,
    ) -> JsonDict:
        """Send events in one transaction, to all servers of their room or to one.

        Returns the answer, which says of every event id whether it was refused. Other than the
        answer may suggest, what a homeserver accepts it may not have processed yet. With
        `remember=False` this server does not build on the events, and does not give them out
        when asked.
        """
        pdus: list[JsonDict] = []
        destinations = [] if destination is None else [destination]
        if isinstance(events, Event | dict):
            events = [events]
        with self._changed:
            for event in events:
                if isinstance(event, Event):
                    pdus.append(event.pdu)
                    if remember:
                        self._remember(event)
                else:
                    pdus.append(event)
                if destination is None:
                    room_id = event.room_id if isinstance(event, Event) else event["room_id"]
                    for other in self.rooms[room_id].destinations:
                        if other not in destinations:
                            destinations.append(other)
        answer: JsonDict = {"pdus": {}}
        for name in destinations:
            transaction = {
                "origin": self.server_name,
                "origin_server_ts": int(time.time() * 1000),
                "pdus": pdus,
                "edus": [],
            }
            path = f"/_matrix/federation/v1/send/{secrets.token_hex(8)}"
            answer["pdus"].update(self.request(name, "PUT", path, transaction).get("pdus", {}))
        return answer

    def send_event(
        self,
        room_id: str,
        sender: str,
        content: Any = None,
        type: str = "m.room.message",
        state_key: str | None = None,
        **arguments: Any,
    ) -> Event:
        """Create an event, by default some text message, and send it."""
        if content is None:
            content = {"msgtype": "m.text", "body": f"message {secrets.token_hex(4)}"}
        event = self.create_event(room_id, type, content, sender, state_key, **arguments)
        self.send(event)
        return event

    def remember(self, events: Event | Iterable[Event]) -> None:
        """Take events into this server's own view of their rooms, as `send` does."""
        for event in [events] if isinstance(events, Event) else events:
            self._remember(event)

    def event(self, event_id: str) -> Event:
        """An event that this server knows."""
        with self._changed:
            return self._events[event_id]

    # Memberships

    def join(self, homeserver: Homeserver, room_id: str, user_localpart: str) -> str:
        """Join a user of this server to a room, and return the user's id."""
        user_id = self.user_id(user_localpart)
        destination = homeserver.server_name
        template = self.request(
            destination,
            "GET",
            f"/_matrix/federation/v1/make_join/{quote(room_id)}/{quote(user_id)}",
            params=[("ver", version) for version in ROOM_VERSIONS],
        )
        version = template.get("room_version", "1")
        join = self._finish_template(version, template["event"])
        answer = self.request(
            destination,
            "PUT",
            f"/_matrix/federation/v2/send_join/{quote(room_id)}/{quote(join.event_id)}",
            join.pdu,
        )
        # With its other signature, where the room is restricted.
        join = event_from_pdu(version, answer.get("event", join.pdu))
        with self._changed:
            room = self.rooms.setdefault(room_id, Room(room_id, version))
            if destination not in room.destinations:
                room.destinations.append(destination)
            for pdu in answer["auth_chain"]:
                event = event_from_pdu(version, pdu)
                self._learn(event)
            room.state = {}
            for pdu in answer["state"]:
                event = event_from_pdu(version, pdu)
                self._learn(event)
                assert event.state_slot is not None
                room.state[event.state_slot] = event
            # What was known from an earlier stay is long behind.
            room.heads = []
            self._state_before[join.event_id] = dict(room.state)
            self._remember(join)
        return user_id

    def leave(self, room_id: str, user_id: str, homeserver: Homeserver | None = None) -> Event:
        """Let a user of this server leave a room, or turn down an invitation.

        For a room that this server is not in, the homeserver must be given.
        """
        if homeserver is None:
            content = {"membership": "leave"}
            return self.send_event(room_id, user_id, content, "m.room.member", user_id)
        destination = homeserver.server_name
        template = self.request(
            destination,
            "GET",
            f"/_matrix/federation/v1/make_leave/{quote(room_id)}/{quote(user_id)}",
        )
        leave = self._finish_template(template.get("room_version", "1"), template["event"])
        path = f"/_matrix/federation/v2/send_leave/{quote(room_id)}/{quote(leave.event_id)}"
        self.request(destination, "PUT", path, leave.pdu)
        return leave

    def invite(
        self, room_id: str, sender: str, user_id: str, homeserver: Homeserver | None = None
    ) -> Event:
        """Invite a user of a homeserver, by default of one that is in the room already."""
        with self._changed:
            room = self.rooms[room_id]
            content = {"membership": "invite"}
            invite = self.create_event(room_id, "m.room.member", content, sender, user_id)
            shown = [
                event.pdu
                for slot, event in room.state.items()
                if slot[0] in ("m.room.create", "m.room.join_rules", "m.room.name")
                or slot == ("m.room.member", sender)
            ]
            present = list(room.destinations)
        destination = user_id.partition(":")[2] if homeserver is None else homeserver.server_name
        answer = self.request(
            destination,
            "PUT",
            f"/_matrix/federation/v2/invite/{quote(room_id)}/{quote(invite.event_id)}",
            {"event": invite.pdu, "room_version": room.version, "invite_room_state": shown},
        )
        invite = event_from_pdu(room.version, answer["event"])
        self._remember(invite)
        if present:
            self.send(invite)
        return invite

    def create_room(self, creator_localpart: str, version: str = "11", **content: Any) -> str:
        """Create a public room on this server, which homeservers can join through it.

        `content` is added to the content of the create event.
        """
        creator = self.user_id(creator_localpart)
        create: JsonDict = {"room_version": version, **content}
        if int(version) < 11:
            create["creator"] = creator
        first: JsonDict = {
            "type": "m.room.create",
            "sender": creator,
            "state_key": "",
            "origin": self.server_name,
            "origin_server_ts": int(time.time() * 1000),
            "content": create,
            "depth": 1,
            "prev_events": [],
            "auth_events": [],
        }
        if int(version) < 12:
            first["room_id"] = f"!{secrets.token_hex(9)}:{self.server_name}"
        if names_its_own_events(version):
            first["event_id"] = self._new_event_id()
        event = self.sign(version, first)
        with self._changed:
            room_id = event.room_id
            self.rooms[room_id] = Room(room_id, version)
            self._remember(event)
            users = {creator: 100} if int(version) < 12 else {}
            contents: list[tuple[str, str, JsonDict]] = [
                ("m.room.member", creator, {"membership": "join"}),
                ("m.room.power_levels", "", {"users": users}),
                ("m.room.join_rules", "", {"join_rule": "public"}),
                ("m.room.history_visibility", "", {"history_visibility": "shared"}),
            ]
            for type, state_key, state_content in contents:
                self._remember(self.create_event(room_id, type, state_content, creator, state_key))
        return room_id

    def _finish_template(self, room_version: str, template: JsonDict) -> Event:
        pdu = {
            **template,
            "origin": self.server_name,
            "origin_server_ts": int(time.time() * 1000),
        }
        pdu.pop("signatures", None)
        pdu.pop("hashes", None)
        if names_its_own_events(room_version):
            pdu["event_id"] = self._new_event_id()
        return self.sign(room_version, pdu)

    # What was received

    @property
    def received(self) -> list[Event]:
        """The events that homeservers have sent to this server and it took, oldest first."""
        with self._changed:
            return list(self._received)

    @property
    def transactions(self) -> list[list[Event]]:
        """The events of each transaction that had any, taken or not, oldest first."""
        with self._changed:
            return list(self._transactions)

    @property
    def requests(self) -> list[tuple[str, str]]:
        """The methods and paths (with parameters) of all requests to this server."""
        with self._changed:
            return list(self._requests)

    def wait_for(self, wanted: str | Callable[[Event], bool], timeout_s: float = 60) -> Event:
        """Wait until an event was received, with that id or that a function accepts."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for event in self._received:
                    if event.event_id == wanted if isinstance(wanted, str) else wanted(event):
                        return event
                rest = deadline - time.monotonic()
                if rest <= 0:
                    known = [(event.event_id, event.type) for event in self._received]
                    raise AssertionError(f"not received within {timeout_s} s; there was: {known}")
                self._changed.wait(rest)

    # The view of the rooms

    def _remember(self, event: Event) -> None:
        with self._changed:
            room = self.rooms.get(event.room_id)
            known = event.event_id in self._events
            self._learn(event)
            if known or room is None:
                return
            if event.event_id not in self._state_before:
                previous = [self._events.get(name, name) for name in event.prev_event_ids]
                self._state_before[event.event_id] = self._state_after(room, previous)
            self._referenced.update(event.prev_event_ids)
            room.heads = [head for head in room.heads if head not in self._referenced]
            if event.event_id not in self._referenced:
                room.heads.append(event.event_id)
            if event.state_slot is not None:
                room.state[event.state_slot] = event

    def _state_after(self, room: Room, previous: Iterable[Event | str]) -> State:
        """The state after some events, as far as it is known; else the newest state.

        Where they differ, it is the event that this server has known for the shortest time.
        """
        state: State = {}
        for event in previous:
            if isinstance(event, str) or event.event_id not in self._state_before:
                return dict(room.state)
            after = dict(self._state_before[event.event_id])
            if event.state_slot is not None:
                after[event.state_slot] = event
            for slot, other in after.items():
                state[slot] = max(state.get(slot, other), other, key=self._number)
        return state

    def _learn(self, event: Event) -> None:
        self._events[event.event_id] = event
        self._numbers.setdefault(event.event_id, len(self._numbers))

    def _number(self, event: Event) -> int:
        """How many events this server knew when it learnt of this one."""
        return self._numbers[event.event_id]

    def _auth_chain(self, events: Iterable[Event]) -> list[Event]:
        """The auth events of events, the auth events of those, and so on."""
        chain: dict[str, Event] = {}
        pending = [name for event in events for name in event.auth_event_ids]
        while pending:
            name = pending.pop()
            event = self._events.get(name)
            if event is not None and name not in chain:
                chain[name] = event
                pending += event.auth_event_ids
        return list(chain.values())

    def backfill(self, room_id: str, event_ids: list[str], limit: int) -> list[JsonDict]:
        """The usual answer to a request for the events up to some events."""
        with self._changed:
            known = [event_id for event_id in event_ids if self._is_known(event_id)]
            excluded = set[str]()
            if self.has_in_history != self._has_in_history:
                # What a test denies is not named, unless the answer begins there.
                denied = [e.event_id for e in self._events.values() if not self.has_in_history(e)]
                excluded = set(denied).difference(known)
            return [event.pdu for event in self._history(known, excluded, limit)]

    def _is_known(self, event_id: str) -> bool:
        try:
            self._known_event(event_id)
        except _NotFound:
            return False
        return True

    def missing_events(self, room_id: str, request: JsonDict) -> list[JsonDict]:
        """The usual answer to a request for the events between other events."""
        with self._changed:
            latest = [self._events[name] for name in request["latest_events"]]
            start = [name for event in latest for name in event.prev_event_ids]
            found = self._history(start, request["earliest_events"], request.get("limit", 10))
            return [event.pdu for event in reversed(found)]

    def _history(self, start: Iterable[str], excluded: Iterable[str], limit: int) -> list[Event]:
        """Events and what came before them, newest first."""
        seen = set(excluded)
        found: list[Event] = []
        pending = list(start)
        while pending and len(found) < limit:
            event = self._events.get(pending.pop(0))
            if event is not None and event.event_id not in seen:
                seen.add(event.event_id)
                found.append(event)
                pending += event.prev_event_ids
        return found

    # Requests to homeservers

    def request(
        self,
        destination: str,
        method: str,
        path: str,
        body: JsonDict | None = None,
        params: Iterable[tuple[str, str]] = (),
    ) -> JsonDict:
        """A signed request to another server. Raises `MatrixError`."""
        query = urllib.parse.urlencode(list(params))
        request = self._http.build_request(
            method,
            f"https://{destination}{path}" + (f"?{query}" if query else ""),
            content=None if body is None else encode_canonical_json(body),
        )
        signed: JsonDict = {
            "method": method,
            "uri": request.url.raw_path.decode(),
            "origin": self.server_name,
            "destination": destination,
        }
        if body is not None:
            signed["content"] = body
            request.headers["Content-Type"] = "application/json"
        signatures = sign_json(signed, self.server_name, self.signing_key)["signatures"]
        for key, signature in signatures[self.server_name].items():
            request.headers["Authorization"] = (
                f'X-Matrix origin="{self.server_name}",destination="{destination}",'
                f'key="{key}",sig="{signature}"'
            )
        response = self._http.send(request)
        if not response.is_success:
            raise MatrixError.from_response(response)
        answer: JsonDict = response.json()
        return answer

    # Requests from homeservers

    def note_request(self, method: str, target: str) -> None:
        """Take note of a request from a homeserver."""
        with self._changed:
            self._requests.append((method, target))

    def answer(self, method: str, target: str, body: Any) -> Any:
        """The answer to a request from a homeserver. Raises `_NotFound`."""
        url = urllib.parse.urlsplit(target)
        parameters = urllib.parse.parse_qs(url.query)
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        self.note_request(method, target)
        match method, parts[0], parts[1:]:
            case "GET", "_matrix", ["key", "v2", "server", *_]:
                return self._keys()
            case "GET", "_matrix", ["federation", "v1", "version"]:
                return {"server": {"name": "Tests", "version": "1"}}
            case "GET", "_matrix", ["federation", "v1", "backfill", room_id]:
                limit = int(parameters["limit"][0])
                return self._transaction(
                    self.answer_backfill(room_id, parameters.get("v", []), limit)
                )
            case "POST", "_matrix", ["federation", "v1", "get_missing_events", room_id]:
                return {"events": self.answer_missing_events(room_id, body)}
            case "PUT", "_matrix", ["federation", "v1", "send", txn_id]:
                if harm := self.harm(txn_id, body):
                    self.harmed.append(body)
                    raise _Harmed(harm)
                return self._answer_transaction(body)
            case _, "_matrix", ["federation", ("v1" | "v2") as version, *rest]:
                if rest[0] == "timestamp_to_event":
                    time.sleep(self.finds_after_s)
                if rest[0] == "send_join":
                    self.lets_in.wait(60)
                if rest[0] in ("state", "state_ids"):
                    self.tells_state.wait(60)
                with self._changed:
                    return self._answer_federation(method, version, rest, parameters, body)
        raise _NotFound(target)

    def _answer_federation(
        self,
        method: str,
        version: str,
        parts: list[str],
        parameters: Mapping[str, list[str]],
        body: Any,
    ) -> Any:
        match method, parts:
            case "GET", ["event", event_id]:
                try:
                    return self._transaction([self._known_event(event_id).pdu])
                except _NotFound as error:
                    raise _NoSuchEvent from error
            case "GET", ["event_auth", _, event_id]:
                chain = self._auth_chain([self._known_event(event_id)])
                return {"auth_chain": [event.pdu for event in chain]}
            case "GET", [("state" | "state_ids") as kind, _]:
                return self._answer_state(parameters["event_id"][0], full=kind == "state")
            case "GET", ["timestamp_to_event", room_id]:
                (ts,), (direction,) = parameters["ts"], parameters["dir"]
                event = self._event_at(room_id, int(ts), backwards=direction == "b")
                ts = event.pdu["origin_server_ts"]
                return {"event_id": event.event_id, "origin_server_ts": ts}
            case "GET", ["query", "profile"]:
                return {"displayname": parameters["user_id"][0]}
            case "GET", ["user", "devices", user_id]:
                return {"user_id": user_id, "stream_id": 1, "devices": []}
            case "POST", ["user", "keys", "query"]:
                return {"device_keys": {}}
            case "POST", ["user", "keys", "claim"]:
                return {"one_time_keys": {}}
            case "PUT", ["invite", _, _]:
                pdu, room_version = (
                    (body["event"], body["room_version"]) if version == "v2" else (body, "1")
                )
                signed = {"event": self._countersign(room_version, pdu)}
                return signed if version == "v2" else [200, signed]
            case "GET", ["make_join", room_id, user_id]:
                return self._answer_make_join(room_id, user_id)
            case "PUT", ["send_join", room_id, _]:
                omits = self.omits_members and parameters.get("omit_members") == ["true"]
                answer = self._answer_send_join(room_id, body, omits)
                return answer if version == "v2" else [200, answer]
        raise _NotFound("/".join(parts))

    def _has_in_history(self, event: Event) -> bool:
        return event.event_id in self._state_before

    def _event_at(self, room_id: str, ts: int, *, backwards: bool) -> Event:
        """The event in a room's history nearest to a time, in ms since the epoch."""
        sign = -1 if backwards else 1
        events = [
            (sign * (event.pdu["origin_server_ts"] - ts), sign * event.pdu["depth"], event_id)
            for event_id, event in self._events.items()
            if event.room_id == room_id and self.has_in_history(event)
        ]
        later = [event for event in events if event[0] >= 0]
        if not later:
            raise _NotFound(room_id)
        return self._events[min(later)[2]]

    def _keys(self) -> JsonDict:
        key = get_verify_key(self.signing_key)
        keys: JsonDict = sign_json(
            {
                "server_name": self.server_name,
                "verify_keys": {f"{key.alg}:{key.version}": {"key": encode_base64(key.encode())}},
                "old_verify_keys": {},
                "valid_until_ts": int((time.time() + 24 * 60 * 60) * 1000),
            },
            self.server_name,
            self.signing_key,
        )
        return keys

    def _answer_transaction(self, body: JsonDict) -> JsonDict:
        with self._changed:
            self._transactions_now += 1
            self.most_transactions_at_once = max(
                self.most_transactions_at_once, self._transactions_now
            )
        time.sleep(self.answers_after_s)
        with self._changed:
            answer = self._receive_transaction(body)
            self._transactions_now -= 1
        return answer

    def _receive_transaction(self, body: JsonDict) -> JsonDict:
        answer: JsonDict = {}
        events: list[Event] = []
        for pdu in body.get("pdus", ()):
            room = self.rooms.get(pdu.get("room_id", ""))
            # A room that this server has never been in: the version is anybody's guess.
            event = event_from_pdu("11" if room is None else room.version, pdu)
            events.append(event)
            judgement = self.judge(event)
            if judgement is not None:
                answer[event.event_id] = judgement
                if "error" not in judgement:
                    self._remember(event)
                    self._received.append(event)
        if events:
            self._transactions.append(events)
        self._changed.notify_all()
        return {"pdus": answer}

    def _known_event(self, event_id: str) -> Event:
        if event_id not in self._events:
            raise _NotFound(event_id)
        return self._events[event_id]

    def _answer_state(self, event_id: str, full: bool) -> JsonDict:
        if event_id not in self._state_before:
            raise _NotFound(event_id)
        state = list(self._state_before[event_id].values())
        chain = self._auth_chain(state)
        if full:
            return {
                "pdus": [event.pdu for event in state],
                "auth_chain": [event.pdu for event in chain],
            }
        return {
            "pdu_ids": [event.event_id for event in state],
            "auth_chain_ids": [event.event_id for event in chain],
        }

    def _transaction(self, pdus: list[JsonDict]) -> JsonDict:
        return {
            "origin": self.server_name,
            "origin_server_ts": int(time.time() * 1000),
            "pdus": pdus,
        }

    def _countersign(self, room_version: str, pdu: JsonDict) -> JsonDict:
        """Add this server's signature to an event of another server."""
        own = self.sign(room_version, pdu).pdu["signatures"]
        return {**pdu, "signatures": {**pdu.get("signatures", {}), **own}}

    def _answer_make_join(self, room_id: str, user_id: str) -> JsonDict:
        if room_id not in self.rooms:
            raise _NotFound(room_id)
        content = {"membership": "join"}
        template = self.create_event(room_id, "m.room.member", content, user_id, user_id)
        pdu = {
            key: value
            for key, value in template.pdu.items()
            if key not in ("signatures", "hashes", "event_id")
        }
        return {"event": pdu, "room_version": self.rooms[room_id].version}

    def _answer_send_join(self, room_id: str, pdu: JsonDict, omits_members: bool) -> JsonDict:
        room = self.rooms[room_id]
        join = event_from_pdu(room.version, pdu)
        self._remember(join)
        destination = join.sender.partition(":")[2]
        if destination not in room.destinations:
            room.destinations.append(destination)
        state = [
            event
            for (kind, _), event in self._state_before[join.event_id].items()
            if not (omits_members and kind == "m.room.member")
        ]
        servers = [self.server_name, *room.destinations]
        return {
            "origin": self.server_name,
            "event": pdu,
            "state": [event.pdu for event in state],
            "auth_chain": [event.pdu for event in self._auth_chain([join, *state])],
            "members_omitted": omits_members,
            **({"servers_in_room": servers} if omits_members else {}),
        }


def _auth_events(
    room_version: str,
    state: State,
    type: str,
    content: Any,
    sender: str,
    state_key: str | None,
) -> list[Event]:
    """The events among the state that allow an event."""
    slots = [("m.room.power_levels", ""), ("m.room.member", sender)]
    if int(room_version) < 12:
        slots.append(("m.room.create", ""))
    if type == "m.room.member" and state_key is not None:
        slots.append(("m.room.member", state_key))
        if isinstance(content, dict) and content.get("membership") in ("join", "invite", "knock"):
            slots.append(("m.room.join_rules", ""))
    return [state[slot] for slot in dict.fromkeys(slots) if slot in state]


class _Server(ThreadingHTTPServer):
    """Serves HTTPS, with a thread for every connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, remote: RemoteServer) -> None:
        self.remote = remote
        super().__init__(("127.0.0.1", remote.port), _Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory() as directory:
            paths = Path(directory) / "tls.crt", Path(directory) / "tls.key"
            write_certificate(*paths)
            context.load_cert_chain(*paths)
        # The handshake is done by the thread of the connection, not by the one that accepts.
        self.socket = context.wrap_socket(
            self.socket, server_side=True, do_handshake_on_connect=False
        )

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that break are no concern of the tests."""


class _Handler(BaseHTTPRequestHandler):
    """Hands requests to the `RemoteServer`. One request per connection (HTTP/1.0)."""

    server: _Server
    connection: socket.socket
    timeout = 60

    def _handle(self) -> None:
        remote = self.server.remote
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length)
        raw_answer = remote.answer_instead(self.path)
        if raw_answer is not None:
            remote.note_request(self.command, self.path)
            self._send_raw(*raw_answer)
            return
        status = 200
        answer: object = None
        headers: dict[str, str] = {}
        if not remote.online:
            status, answer = 503, {"errcode": "M_UNKNOWN", "error": "The test wants me offline"}
        else:
            try:
                body = json.loads(content) if content else None
                answer = remote.answer(self.command, self.path, body)
            except _NotFound as error:
                status, answer = 404, {"errcode": "M_NOT_FOUND", "error": str(error)}
            except _NoSuchEvent:
                status, answer = 404, ""
            except _Harmed as error:
                if isinstance(error.harm, Harm):
                    if error.harm is Harm.HANG:
                        time.sleep(60)
                    elif error.harm is Harm.FLOOD:
                        self._flood(remote)
                    self.close_connection = True
                    return
                status, answer = error.harm, {"errcode": "M_UNKNOWN", "error": str(error)}
                if remote.retry_after_s is not None:
                    headers["Retry-After"] = str(remote.retry_after_s)
            except Exception as error:
                _log.exception("%s %s", self.command, self.path)
                status, answer = 500, {"errcode": "M_UNKNOWN", "error": str(error)}
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        # Otherwise the other side may ask again on a connection that is being closed.
        self.send_header("Connection", "close")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _send_raw(self, status: int, pieces: Iterable[bytes]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)

    def _flood(self, remote: RemoteServer) -> None:
        self.send_response(500)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        written = 0
        with contextlib.suppress(OSError):
            while written < FLOOD_BYTES:
                written += self.wfile.write(b" " * 64 * 1024)
        remote.flooded.append(written)

    do_GET = _handle
    do_PUT = _handle
    do_POST = _handle

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not printed; `RemoteServer.requests` has them."""
