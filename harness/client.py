"""A Matrix client, as plain as the tests need it."""

import copy
import itertools
import json as json_module
import re
import secrets
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import httpx

from harness.wait import eventually

if TYPE_CHECKING:
    from harness.homeserver import Homeserver

JsonDict = dict[str, Any]

STICKY_PARAMETER = "org.matrix.msc4354.sticky_duration_ms"
DELAY_PARAMETER = "org.matrix.msc4140.delay"
SLIDING_SYNC_PATH = "/_matrix/client/unstable/org.matrix.simplified_msc3575/sync"

# What a client reader serves; anything else goes to the main process.
_SERVED_BY_READERS = re.compile(
    r"""
    /_matrix/client/
    (
        versions$
      | unstable/org\.matrix\.simplified_msc3575/sync$
      | (r0|v1|v3|unstable)/
        (
            (sync|events|initialSync|createRoom|joined_rooms|publicRooms|search)$
          | (join|knock|profile)/
          | user/[^/]+/filter
          | rooms/[^/]+/(?!(forget|upgrade|report|typing|receipt|read_markers)\b)
        )
    )
    """,
    re.VERBOSE,
)


class MatrixError(Exception):
    """An answer other than 2xx."""

    def __init__(self, status: int, errcode: str, error: str, body: Any) -> None:
        super().__init__(f"{status} {errcode}: {error}")
        self.status = status
        self.errcode = errcode
        self.error = error
        self.body = body

    @classmethod
    def from_response(cls, response: httpx.Response) -> "MatrixError":
        """Read the error of an answer, whatever it looks like."""
        try:
            body = response.json()
        except ValueError:
            body = response.text
        details = body if isinstance(body, dict) else {}
        return cls(
            response.status_code,
            details.get("errcode", ""),
            details.get("error", ""),
            body,
        )


def quote(part: str) -> str:
    """Quote one part of a path."""
    return urllib.parse.quote(part, safe="")


class Client:
    """A device of a user of one homeserver. May be used by many threads at once.

    Where there are several client readers the requests alternate between them, so a read
    may not see an earlier write yet. Changes to rooms and memberships made with the methods
    below are the exception: they return once every reader knows of them (`settle=False`
    turns that off).
    """

    def __init__(
        self,
        homeserver: "Homeserver",
        user_id: str,
        access_token: str,
        device_id: str,
        password: str,
    ) -> None:
        self.homeserver = homeserver
        self.user_id = user_id
        self.access_token = access_token
        self.device_id = device_id
        self.password = password
        self._turns = itertools.count()
        self._only_url: str | None = None

    def __repr__(self) -> str:
        return f"<Client {self.user_id} {self.device_id}>"

    def via(self, url: str) -> "Client":
        """The same device, with all of its requests going to one process."""
        pinned = copy.copy(self)
        pinned._only_url = url
        return pinned

    def _url_for(self, path: str) -> str:
        if self._only_url is not None:
            return self._only_url
        if _SERVED_BY_READERS.match(path):
            urls = self.homeserver.client_urls
            return urls[next(self._turns) % len(urls)]
        return self.homeserver.main_url

    def request(
        self,
        method: str,
        path: str,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        timeout: float = 60,
    ) -> JsonDict:
        """One request, whose answer is the parsed body. Raises `MatrixError`.

        `path` starts with `/_matrix` or `/_synapse`. Parameters that are None are left out.
        """
        response = self.homeserver.http.request(
            method,
            self._url_for(path) + path,
            json=json,
            params={name: value for name, value in (params or {}).items() if value is not None},
            headers={"Authorization": f"Bearer {self.access_token}"},
            timeout=timeout,
        )
        if not response.is_success:
            raise MatrixError.from_response(response)
        body: JsonDict = response.json()
        return body

    def _settle(self, what: str, settled: Callable[["Client"], bool]) -> None:
        """Wait until every client reader that is running has caught up with a change."""
        if len(self.homeserver.client_urls) == 1:
            return

        def settled_on(reader: Client) -> bool:
            try:
                return settled(reader)
            except httpx.TransportError:
                return True  # Nobody can read anything stale from a process that is down.
            except MatrixError as error:
                raise AssertionError(f"the reader answers {error}") from error

        for url in self.homeserver.client_urls:
            reader = self.via(url)
            eventually(
                lambda reader=reader: settled_on(reader),  # type: ignore[misc]
                timeout_s=30,
                what=f"{what} known to {url}",
            )

    def _settle_state(self, room_id: str, type: str, state_key: str, event_id: str) -> None:
        path = f"/_matrix/client/v3/rooms/{quote(room_id)}/state/{quote(type)}/{quote(state_key)}"
        self._settle(
            f"{type} of {room_id}",
            lambda reader: (
                reader.request("GET", path, params={"format": "event"})["event_id"] == event_id
            ),
        )

    def _settle_membership(self, room_id: str, user_id: str, membership: str) -> None:
        path = f"/_matrix/client/v3/rooms/{quote(room_id)}/state/m.room.member/{quote(user_id)}"
        self._settle(
            f"{membership} of {user_id} in {room_id}",
            lambda reader: reader.request("GET", path)["membership"] == membership,
        )

    # Rooms and memberships

    def create_room(self, *, settle: bool = True, **body: Any) -> str:
        """Create a room, and return its id. The arguments are the body of the request."""
        path = "/_matrix/client/v3/createRoom"
        creator = self.via(self._url_for(path))
        room_id: str = creator.request("POST", path, json=body)["room_id"]
        if settle:
            # The process that created the room has waited for all of it.
            state = creator.state_ids(room_id)
            self._settle(f"the room {room_id}", lambda reader: reader.state_ids(room_id) == state)
        return room_id

    def state(self, room_id: str) -> list[JsonDict]:
        """The state events of a room."""
        path = f"/_matrix/client/v3/rooms/{quote(room_id)}/state"
        events: Any = self.request("GET", path)
        return list(events)

    def state_ids(self, room_id: str) -> set[str]:
        """The ids of the state events of a room."""
        return {event["event_id"] for event in self.state(room_id)}

    def join(self, room_id: str, via: Iterable[str] = (), *, settle: bool = True) -> None:
        """Join a room, with the help of other servers if need be."""
        self.request(
            "POST",
            f"/_matrix/client/v3/join/{quote(room_id)}",
            json={},
            params={"server_name": list(via), "via": list(via)},
        )
        if settle:
            self._settle_membership(room_id, self.user_id, "join")

    def leave(self, room_id: str, *, settle: bool = True) -> None:
        """Leave a room, or turn down an invitation."""
        self._change_membership(room_id, "leave", self.user_id, "leave", settle)

    def invite(self, room_id: str, user_id: str, *, settle: bool = True) -> None:
        """Invite a user."""
        self._change_membership(room_id, "invite", user_id, "invite", settle)

    def kick(self, room_id: str, user_id: str, *, settle: bool = True) -> None:
        """Remove a user."""
        self._change_membership(room_id, "kick", user_id, "leave", settle)

    def ban(self, room_id: str, user_id: str, *, settle: bool = True) -> None:
        """Ban a user."""
        self._change_membership(room_id, "ban", user_id, "ban", settle)

    def unban(self, room_id: str, user_id: str, *, settle: bool = True) -> None:
        """Lift the ban of a user."""
        self._change_membership(room_id, "unban", user_id, "leave", settle)

    def _change_membership(
        self, room_id: str, action: str, user_id: str, membership: str, settle: bool
    ) -> None:
        self.request(
            "POST",
            f"/_matrix/client/v3/rooms/{quote(room_id)}/{action}",
            json={} if action == "leave" else {"user_id": user_id},
        )
        if settle:
            self._settle_membership(room_id, user_id, membership)

    # Sending

    def send(
        self,
        room_id: str,
        content: JsonDict | None = None,
        type: str = "m.room.message",
        sticky_ms: Any = None,
        delay_ms: int | None = None,
        txn_id: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> str:
        """Send an event; by default some text message. Returns the event id.

        With `delay_ms` it is a delayed event, and its delay id is returned.
        """
        if content is None:
            content = {"msgtype": "m.text", "body": f"message {secrets.token_hex(4)}"}
        answer = self.request(
            "PUT",
            f"/_matrix/client/v3/rooms/{quote(room_id)}/send/{quote(type)}"
            f"/{quote(txn_id or secrets.token_hex(8))}",
            json=content,
            params={STICKY_PARAMETER: sticky_ms, DELAY_PARAMETER: delay_ms, **(params or {})},
        )
        identifier: str = answer["event_id" if delay_ms is None else "delay_id"]
        return identifier

    def send_state(
        self,
        room_id: str,
        type: str,
        content: JsonDict,
        state_key: str = "",
        sticky_ms: Any = None,
        delay_ms: int | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        settle: bool = True,
    ) -> str:
        """Send a state event. Returns the event id, or with `delay_ms` the delay id."""
        answer = self.request(
            "PUT",
            f"/_matrix/client/v3/rooms/{quote(room_id)}/state/{quote(type)}/{quote(state_key)}",
            json=content,
            params={STICKY_PARAMETER: sticky_ms, DELAY_PARAMETER: delay_ms, **(params or {})},
        )
        if delay_ms is not None:
            delay_id: str = answer["delay_id"]
            return delay_id
        event_id: str = answer["event_id"]
        if settle:
            self._settle_state(room_id, type, state_key, event_id)
        return event_id

    def redact(
        self,
        room_id: str,
        event_id: str,
        params: Mapping[str, Any] | None = None,
        body: JsonDict | None = None,
    ) -> str:
        """Redact an event. Returns the id of the redaction."""
        answer = self.request(
            "PUT",
            f"/_matrix/client/v3/rooms/{quote(room_id)}/redact/{quote(event_id)}"
            f"/{secrets.token_hex(8)}",
            json=body or {},
            params=params,
        )
        redaction: str = answer["event_id"]
        return redaction

    def schedule(
        self,
        room_id: str,
        delay_ms: int,
        body: JsonDict | None = None,
        type: str = "m.room.message",
        txn_id: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> str:
        """Schedule a delayed event at the endpoint for it, which Synapse has from 1.164.

        `body` is what the request has beside the delay and the content. Returns the delay id.
        """
        content = {"msgtype": "m.text", "body": f"message {secrets.token_hex(4)}"}
        answer = self.request(
            "PUT",
            f"/_matrix/client/unstable/org.matrix.msc4140/rooms/{quote(room_id)}"
            f"/delayed_event/{quote(type)}/{quote(txn_id or secrets.token_hex(8))}",
            json={"delay_ms": delay_ms, "content": content, **(body or {})},
            params=params,
        )
        delay_id: str = answer["delay_id"]
        return delay_id

    def manage_delayed_event(self, delay_id: str, action: str) -> None:
        """Do "send", "cancel" or "restart" to a delayed event."""
        self.request(
            "POST",
            f"/_matrix/client/unstable/org.matrix.msc4140/delayed_events/{quote(delay_id)}",
            json={"action": action},
        )

    # Reading

    def sync(
        self,
        since: str | None = None,
        timeout_ms: int = 0,
        filter: JsonDict | str | None = None,
        **params: Any,
    ) -> JsonDict:
        """One answer of `/sync`. A filter may be an id, or the filter itself."""
        return self.request(
            "GET",
            "/_matrix/client/v3/sync",
            params={
                "since": since,
                "timeout": timeout_ms,
                "filter": json_module.dumps(filter) if isinstance(filter, dict) else filter,
                **params,
            },
            timeout=60 + timeout_ms / 1000,
        )

    def sliding_sync(
        self, body: JsonDict, pos: str | None = None, timeout_ms: int = 0, **params: Any
    ) -> JsonDict:
        """One answer of simplified sliding sync."""
        return self.request(
            "POST",
            SLIDING_SYNC_PATH,
            json=body,
            params={"pos": pos, "timeout": timeout_ms, **params},
            timeout=60 + timeout_ms / 1000,
        )

    def event(self, room_id: str, event_id: str) -> JsonDict:
        """One event."""
        path = f"/_matrix/client/v3/rooms/{quote(room_id)}/event/{quote(event_id)}"
        return self.request("GET", path)

    def messages(self, room_id: str, dir: str = "b", **params: Any) -> JsonDict:
        """A page of a room's timeline; by default the newest events first."""
        path = f"/_matrix/client/v3/rooms/{quote(room_id)}/messages"
        if isinstance(params.get("filter"), dict):
            params["filter"] = json_module.dumps(params["filter"])
        return self.request("GET", path, params={"dir": dir, **params})

    def context(self, room_id: str, event_id: str, **params: Any) -> JsonDict:
        """An event with what is around it."""
        path = f"/_matrix/client/v3/rooms/{quote(room_id)}/context/{quote(event_id)}"
        return self.request("GET", path, params=params)

    def relations(
        self,
        room_id: str,
        event_id: str,
        rel_type: str | None = None,
        event_type: str | None = None,
        **params: Any,
    ) -> JsonDict:
        """The events that relate to an event."""
        parts = [room_id, "relations", event_id, rel_type, event_type]
        path = "/".join(quote(part) for part in parts if part is not None)
        return self.request("GET", f"/_matrix/client/v1/rooms/{path}", params=params)

    def threads(self, room_id: str, **params: Any) -> JsonDict:
        """The threads of a room."""
        path = f"/_matrix/client/v1/rooms/{quote(room_id)}/threads"
        return self.request("GET", path, params=params)

    def search(self, term: str, **criteria: Any) -> JsonDict:
        """Search all rooms for a term. Returns the `room_events` part of the answer."""
        answer = self.request(
            "POST",
            "/_matrix/client/v3/search",
            json={"search_categories": {"room_events": {"search_term": term, **criteria}}},
        )
        found: JsonDict = answer["search_categories"]["room_events"]
        return found

    # The account

    def set_ignored_users(self, user_ids: Iterable[str]) -> None:
        """Ignore these users, and no others."""
        self.request(
            "PUT",
            f"/_matrix/client/v3/user/{quote(self.user_id)}/account_data/m.ignored_user_list",
            json={"ignored_users": {user_id: {} for user_id in user_ids}},
        )

    def set_display_name(self, display_name: str) -> None:
        """Change the display name, which also sends a membership event to every room."""
        self.request(
            "PUT",
            f"/_matrix/client/v3/profile/{quote(self.user_id)}/displayname",
            json={"displayname": display_name},
        )

    def deactivate(self, erase: bool) -> None:
        """Close the account, and ask for its messages to be erased or not."""
        self.request(
            "POST",
            "/_matrix/client/v3/account/deactivate",
            json={"erase": erase, "auth": self._password_proof()},
        )

    def second_device(self) -> "Client":
        """Log in once more, as another device of the same user."""
        answer = self.request("POST", "/_matrix/client/v3/login", json=self._password_proof())
        return Client(
            self.homeserver,
            answer["user_id"],
            answer["access_token"],
            answer["device_id"],
            self.password,
        )

    def _password_proof(self) -> JsonDict:
        return {
            "type": "m.login.password",
            "identifier": {"type": "m.id.user", "user": self.user_id},
            "password": self.password,
        }
