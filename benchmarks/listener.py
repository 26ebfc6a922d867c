# SPDX-License-Identifier: AGPL-3.0-or-later
"""Clients whose every request is timed: one connection each, and a thread that long-polls."""

import contextlib
import http.client
import json
import threading
import time
import urllib.parse
from typing import Any, Final

from harness.client import Client, JsonDict

_POLL_MS: Final = 30_000


class Wire:
    """One connection of a client to one process, kept open."""

    def __init__(self, client: Client, url: str) -> None:
        self._headers = {"Authorization": f"Bearer {client.access_token}"}
        address = urllib.parse.urlsplit(url).netloc
        self._connection = http.client.HTTPConnection(address, timeout=_POLL_MS / 1e3 + 30)

    def exchange(self, method: str, path: str, body: Any = None) -> Any:
        """One request and its parsed answer."""
        content = None if body is None else json.dumps(body).encode()
        self._connection.request(method, path, content, self._headers)
        response = self._connection.getresponse()
        answer = response.read()
        assert response.status == 200, f"{method} {path}: {response.status} {answer!r}"
        return json.loads(answer)

    def close(self) -> None:
        """Let go of the connection."""
        self._connection.close()


class Listener:
    """A client that long-polls `/sync`, and notes when each event arrived. Use it with `with`."""

    def __init__(self, client: Client, url: str, timeline: JsonDict) -> None:
        self._wire = Wire(client, url)
        self._arrivals: dict[str, float] = {}
        self._arrived = threading.Condition()
        self._ended = False
        self._filter = json.dumps({"room": {"timeline": timeline}})
        self._since = self._sync(timeout_ms=0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Listener":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        # The thread ends with the answer to its last request, which nobody waits for.
        self._ended = True

    def arrival(self, event_id: str, patience_s: float = 20) -> float:
        """When an event arrived; waits for it."""
        with self._arrived:
            arrived = self._arrived.wait_for(lambda: event_id in self._arrivals, patience_s)
        assert arrived, f"{event_id} has not arrived within {patience_s} s"
        return self._arrivals[event_id]

    @property
    def arrived(self) -> list[str]:
        """The IDs of the events that have arrived, in their order."""
        with self._arrived:
            return list(self._arrivals)

    def _run(self) -> None:
        with contextlib.suppress(http.client.HTTPException, OSError):
            while not self._ended:
                self._since = self._sync(_POLL_MS, self._since)

    def _sync(self, timeout_ms: int, since: str | None = None) -> str:
        parameters = {"timeout": str(timeout_ms), "filter": self._filter}
        if since is not None:
            parameters["since"] = since
        path = f"/_matrix/client/v3/sync?{urllib.parse.urlencode(parameters)}"
        answer = self._wire.exchange("GET", path)
        now = time.perf_counter()
        with self._arrived:
            for room in answer.get("rooms", {}).get("join", {}).values():
                sections = (room.get("timeline", {}), room.get("msc4354_sticky", {}))
                for event in [e for section in sections for e in section.get("events", ())]:
                    self._arrivals.setdefault(event["event_id"], now)
            self._arrived.notify_all()
        next_batch: str = answer["next_batch"]
        return next_batch
