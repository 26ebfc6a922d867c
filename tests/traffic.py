"""Many senders and a reader that follows its tokens, as clients do."""

import random
import secrets
import threading
import time
from collections import Counter
from types import TracebackType

import httpx

from harness.client import Client, JsonDict, MatrixError

DURATION_MS = 1_800_000
SECTION = "msc4354_sticky"


class Traffic:
    """Sends sticky events from several threads until told to stop.

    A send is repeated with its transaction ID until it is acknowledged, whatever happens to
    the server meanwhile.

    Attributes:
        acknowledged: the event IDs that the server has confirmed.
    """

    def __init__(self, senders: list[Client], room_ids: list[str], pause_s: float = 0) -> None:
        self.acknowledged: list[str] = []
        self.errors: list[BaseException] = []
        self._room_ids = room_ids
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(s,)) for s in senders]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _send(self, sender: Client) -> None:
        try:
            number = 0
            while not self._stop.is_set():
                number += 1
                room_id = self._room_ids[number % len(self._room_ids)]
                self.acknowledged.append(send_until_acknowledged(sender, room_id, number))
                time.sleep(self._pause_s)
        except BaseException as error:
            self.errors.append(error)


def send_until_acknowledged(sender: Client, room_id: str, number: int) -> str:
    """Sends one sticky event, whatever happens to the server meanwhile."""
    txn_id = secrets.token_hex(8)
    deadline = time.monotonic() + 90
    while True:
        try:
            return sender.send(
                room_id,
                {"number": number},
                type="org.example.member",
                sticky_ms=DURATION_MS,
                txn_id=txn_id,
            )
        except (httpx.TransportError, MatrixError) as error:
            broken = isinstance(error, httpx.TransportError) or error.status >= 500
            if not broken or time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.02, 0.2))


class Reader:
    """Follows `/sync` like a client: repeats what failed, and goes on from each answer.

    Attributes:
        seen: how often each sticky event came, in timelines and sections.
        order: the IDs of the events of sections, as they came.
    """

    def __init__(self, client: Client, timeline_limit: int = 1) -> None:
        self.client = client
        self.seen: Counter[str] = Counter()
        self.order: list[str] = []
        self.since: str | None = None
        self._filter = {"room": {"timeline": {"limit": timeline_limit}}}

    def read(self, timeout_ms: int = 0) -> int:
        """One request and what it brought; 0 as well if it failed."""
        try:
            answer = self.client.sync(self.since, timeout_ms=timeout_ms, filter=self._filter)
        except (httpx.TransportError, MatrixError) as error:
            if isinstance(error, MatrixError) and error.status < 500:
                raise
            time.sleep(0.05)
            return 0
        before = self.seen.total()
        for room in answer.get("rooms", {}).get("join", {}).values():
            for event in room["timeline"]["events"]:
                self._note(event)
            for event in room.get(SECTION, {}).get("events", []):
                self._note(event)
                self.order.append(event["event_id"])
        self.since = answer["next_batch"]
        return self.seen.total() - before

    def read_all(self, wanted: list[str], timeout_s: float) -> set[str]:
        """Reads on until everything wanted has come; returns what has not."""
        deadline = time.monotonic() + timeout_s
        while (missing := set(wanted) - self.seen.keys()) and time.monotonic() < deadline:
            self.read(timeout_ms=1000)
        return missing

    def _note(self, event: JsonDict) -> None:
        if SECTION in event:
            self.seen[event["event_id"]] += 1
