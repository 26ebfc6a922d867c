# SPDX-License-Identifier: AGPL-3.0-or-later
"""The Synapse processes that are compared, and the requests made to them."""

import http.client
import itertools
import json
import secrets
import urllib.parse
from pathlib import Path
from typing import Any, Final

from harness.client import STICKY_PARAMETER, Client, JsonDict
from harness.homeserver import Homeserver

PLAIN: Final = "plain"
"""Synapse without sticky events."""
CONTROL: Final = "control"
"""The same once more: what two processes differ by that do not differ."""
OWN: Final = "own"
"""Synapse with its own implementation of sticky events."""
STICKY: Final = "sticky"
"""Synapse with this module."""

_TIMEOUT_S: Final = 120


class RequestFailed(Exception):
    """A server answered with an error: the run is worth nothing."""


class Server(Homeserver):
    """One Synapse process with SQLite, and one connection to it that is kept open."""

    # What is measured is to begin as it does at an operator's.
    forks = False

    def __init__(
        self,
        name: str,
        kind: str,
        directory: Path,
        *,
        federation: bool = False,
        extra_config: JsonDict | None = None,
        **options: Any,
    ) -> None:
        own = {"experimental_features": {"msc4354_enabled": True}} if kind == OWN else {}
        super().__init__(
            directory=directory,
            module=kind == STICKY,
            extra_config={**own, **(extra_config or {})},
            federation=federation,
            **options,
        )
        self.name = name
        self.kind = kind
        self._transactions = itertools.count()
        self._run = secrets.token_hex(4)
        self._connection: http.client.HTTPConnection | None = None

    @property
    def has_sticky_events(self) -> bool:
        """Whether it knows sticky events, by whichever implementation."""
        return self.kind in (OWN, STICKY)

    def stop(self) -> None:
        """End the process in an orderly way."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        super().stop()

    def as_client(self, client: Client) -> Client:
        """The same device, on this server: its database is a copy of the other's."""
        return Client(self, client.user_id, client.access_token, client.device_id, client.password)

    def exchange(self, method: str, path: str, client: Client, body: bytes | None = None) -> bytes:
        """One request and its whole answer."""
        headers = {"Authorization": f"Bearer {client.access_token}"}
        for attempt in itertools.count():
            if self._connection is None:
                url = urllib.parse.urlsplit(self.main_url)
                self._connection = http.client.HTTPConnection(url.netloc, timeout=_TIMEOUT_S)
            try:
                self._connection.request(method, path, body, headers)
                response = self._connection.getresponse()
                answer = response.read()
                break
            except (http.client.RemoteDisconnected, ConnectionError):
                # Synapse closes connections that were not used for a while.
                self._connection.close()
                self._connection = None
                if attempt:
                    raise
        if response.status != 200:
            raise RequestFailed(f"{self.name}: {method} {path}: {response.status} {answer!r}")
        return answer

    def send(
        self, client: Client, room_id: str, sticky_ms: int | None = None, padding: str = ""
    ) -> bytes:
        """Send a message, sticky if that is asked for."""
        number = next(self._transactions)
        path = (
            f"/_matrix/client/v3/rooms/{urllib.parse.quote(room_id)}"
            f"/send/m.room.message/{self._run}-{number}"
        )
        if sticky_ms is not None:
            path += f"?{STICKY_PARAMETER}={sticky_ms}"
        text = f"This is message number {number} of the benchmark{padding}"
        body = {"msgtype": "m.text", "body": text}
        return self.exchange("PUT", path, client, json.dumps(body).encode())

    def sync(self, client: Client, since: str, filter: str | None = None) -> bytes:
        """One `/sync` that does not wait."""
        parameters = {"since": since, "timeout": "0"} | ({"filter": filter} if filter else {})
        path = f"/_matrix/client/v3/sync?{urllib.parse.urlencode(parameters)}"
        return self.exchange("GET", path, client)

    def current_token(self, client: Client) -> str:
        """Where a `/sync` is to begin that is to show what happens from now on."""
        nothing: JsonDict = {"room": {"rooms": []}}
        token: str = self.as_client(client).sync(filter=nothing)["next_batch"]
        return token


def parsed(body: bytes) -> Any:
    """The content of an answer."""
    return json.loads(body)
