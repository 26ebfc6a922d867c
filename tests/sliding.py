"""A client that asks for sticky events over Sliding Sync, and what its answers say."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from harness.client import Client, JsonDict
from harness.wait import eventually
from tests.support import HOUR_MS, ids, unique

EXTENSION = "org.matrix.msc4354.sticky_events"

# Unlike a message, an event of this type does not move its room to the top of a list.
MEMBER = "org.example.member"

# Before anything that a test sends, and still a token.
BEGINNING = "sticky_0"

# For a client without other wishes.
LONG_MS = 20_000

Result = TypeVar("Result")


def window(first: int = 0, timeline_limit: int = 0, **filters: Any) -> JsonDict:
    """A list whose window shows one room, the most recently active; it may match more."""
    return {
        "ranges": [[first, first]],
        "required_state": [],
        "timeline_limit": timeline_limit,
        "filters": filters,
    }


def no_window() -> JsonDict:
    """A list that matches all rooms and shows none."""
    return window(first=90)


def subscription(timeline_limit: int = 0) -> JsonDict:
    """A room subscription."""
    return {"required_state": [], "timeline_limit": timeline_limit}


@dataclass(frozen=True)
class Answer:
    """One answer of Sliding Sync."""

    body: JsonDict

    @property
    def pos(self) -> str:
        """The connection's position."""
        pos: str = self.body["pos"]
        return pos

    @property
    def extension(self) -> JsonDict | None:
        """What the answer says of sticky events; None if nothing."""
        extension: JsonDict | None = self.body.get("extensions", {}).get(EXTENSION)
        return extension

    @property
    def next_batch(self) -> str | None:
        """The `since` of the next request; None if it stays."""
        return (self.extension or {}).get("next_batch")

    @property
    def sections(self) -> dict[str, list[JsonDict]]:
        """The sticky events of every room that has any."""
        rooms = (self.extension or {}).get("rooms", {})
        return {room_id: room["events"] for room_id, room in rooms.items()}

    def sticky(self, room_id: str) -> list[str]:
        """The ids of the sticky events of a room, in their order."""
        return ids(self.sections.get(room_id, []))

    def timeline(self, room_id: str) -> list[str]:
        """The ids in a room's timeline."""
        return ids(self.body.get("rooms", {}).get(room_id, {}).get("timeline", []))

    @property
    def initial(self) -> set[str]:
        """The rooms that the answer sends as if for the first time."""
        return {r for r, room in self.body.get("rooms", {}).items() if room.get("initial")}

    def listed(self, name: str = "all") -> list[str]:
        """The rooms that are in a list's window."""
        return [
            room_id
            for operation in self.body["lists"][name]["ops"]
            for room_id in operation["room_ids"]
        ]

    def count(self, name: str = "all") -> int:
        """How many rooms a list matches."""
        count: int = self.body["lists"][name]["count"]
        return count


@dataclass
class Connection:
    """A connection of a client, that goes on from each answer as a client does.

    `since` outlives `pos`: a client that lost the latter goes on with `Connection.anew`.
    """

    client: Client
    lists: Mapping[str, JsonDict] = field(default_factory=lambda: {"all": window()})
    subscriptions: Mapping[str, JsonDict] = field(default_factory=dict)
    pos: str | None = None
    since: str | None = None
    conn_id: str = field(default_factory=unique)
    answers: list[Answer] = field(default_factory=list)

    def body(self, **extension: Any) -> JsonDict:
        """The body of the next request, with more to say in the extension."""
        asked = {"enabled": True, **extension}
        if self.since is not None:
            asked.setdefault("since", self.since)
        return {
            "conn_id": self.conn_id,
            "lists": dict(self.lists),
            "room_subscriptions": dict(self.subscriptions),
            "extensions": {EXTENSION: asked},
        }

    def ask(self, timeout_ms: int = 0, **extension: Any) -> Answer:
        """One request, whose answer the connection goes on from."""
        answer = self.peek(timeout_ms, **extension)
        self.pos = answer.pos
        self.since = answer.next_batch or self.since
        self.answers.append(answer)
        return answer

    def peek(self, timeout_ms: int = 0, **extension: Any) -> Answer:
        """One request, as if its answer got lost."""
        return Answer(self.client.sliding_sync(self.body(**extension), self.pos, timeout_ms))

    def anew(self) -> "Connection":
        """The connection begun anew without `pos`, but still with `since`."""
        return replace(self, pos=None, answers=[])

    def without_pos(self) -> "Connection":
        """Another connection, which has read as far as this one."""
        return replace(self.anew(), conn_id=unique())

    def drain(self, **extension: Any) -> list[Answer]:
        """Ask until there is nothing more, and return the answers that had something."""
        answers: list[Answer] = []
        while True:
            answer = self.ask(**extension)
            if not answer.sections and answer.next_batch is None:
                return answers
            answers.append(answer)
            assert len(answers) < 200, "the position advances and advances"

    def collect(self, room_id: str, event_ids: list[str], **extension: Any) -> list[Answer]:
        """Ask until all of these came in a section, and then until there is nothing more.

        Returns the answers that had something.
        """
        answers: list[Answer] = []

        def complete() -> bool:
            answers.extend(self.drain(**extension))
            return set(event_ids) <= set(drained(answers, room_id))

        eventually(complete, what=f"{event_ids} over Sliding Sync")
        return answers + self.drain(**extension)

    def seen(self, room_id: str) -> list[str]:
        """What came of a room, in its section or timeline, as often as it did."""
        return [
            name
            for answer in self.answers
            for name in answer.sticky(room_id) + answer.timeline(room_id)
        ]

    def kept(self, room_id: str) -> list[str]:
        """Return what a client has of a room if it drops events of rooms that it does not know yet.

        It learns of a room from an answer that sends the room as `initial`, as matrix-js-sdk 43
        does. Each ID is listed as often as it came.
        """
        known_from = [n for n, answer in enumerate(self.answers) if room_id in answer.initial]
        kept = self.answers[known_from[0] :] if known_from else []
        return [name for a in kept for name in a.sticky(room_id) + a.timeline(room_id)]


def drained(answers: list[Answer], room_id: str) -> list[str]:
    """The ids in a room's sections in these answers, in their order."""
    return [name for answer in answers for name in answer.sticky(room_id)]


def send_known(client: Client, room_id: str, count: int = 1, **arguments: Any) -> list[str]:
    """Send sticky events, and wait until every client reader can hand them out.

    Returns their ids, oldest first. The sender must stay joined.
    """
    arguments = {"type": MEMBER, "sticky_ms": HOUR_MS, **arguments}
    event_ids = [client.send(room_id, **{"content": {"n": n}, **arguments}) for n in range(count)]
    until_known(client, room_id, event_ids[-1:])
    return event_ids


def until_known(client: Client, room_id: str, event_ids: list[str]) -> None:
    """Wait until every client reader can hand these out to somebody joined."""

    def known_by(reader: Client) -> bool:
        connection = Connection(reader, {}, {room_id: subscription()})
        return set(event_ids) <= set(drained(connection.drain(), room_id))

    for url in client.homeserver.client_urls:
        reader = client.via(url)
        eventually(
            lambda reader=reader: known_by(reader),  # type: ignore[misc]
            what=f"{event_ids} handed out by {url}",
        )


@contextmanager
def in_background(action: Callable[[], Result], head_start_s: float = 0.7) -> "Iterator[Waiting]":
    """Run something that waits, such as a long-poll, while the test goes on.

    The head start is for it to have begun to wait. Were it too short, the test would prove
    less, and pass all the same.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting = Waiting(pool.submit(_timed, action))
        time.sleep(head_start_s)
        yield waiting


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    began = time.monotonic()
    return action(), time.monotonic() - began


@dataclass
class Waiting:
    """Something that runs in the background."""

    future: "Future[tuple[Any, float]]"

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.future.done()

    def result(self, timeout_s: float = 60) -> Any:
        """What it returned."""
        return self.future.result(timeout_s)[0]

    def duration_s(self, timeout_s: float = 60) -> float:
        """How long it took."""
        return self.future.result(timeout_s)[1]
