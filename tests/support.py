"""What several test files need: to read answers, and to follow tokens as a client does."""

import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from synapse.rest.client import room as room_servlets

from harness.client import Client, JsonDict, MatrixError
from harness.event_format import Event
from harness.homeserver import MODULE, Homeserver, generous
from harness.wait import eventually
from tests import saboteurs

# As on the wire. Spelled out once more on purpose: the tests are to notice if the package's
# own list of names changes.
EVENT_KEY = "msc4354_sticky"
SYNC_SECTION = "msc4354_sticky"
REMAINING_KEY = "msc4354_sticky_duration_ttl_ms"
VERSIONS_FLAG = "org.matrix.msc4354"
DELAY_ID_KEY = "org.matrix.msc4140.delay_id"
SETTINGS = "io.github.synapse_sticky.settings"

HOUR_MS = 3_600_000

# Why the module holds an event, and its position.
ROWS = "SELECT held_reason, position FROM synapse_sticky_events WHERE event_id = ?"
# Their names, by kind of database.
OUR_TABLES = {
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE ?",
    "postgres": "SELECT tablename FROM pg_tables WHERE tablename LIKE ?",
}

DEPLOYMENTS = ("sqlite", "postgres", "workers")

# Long enough for Synapse's own sending on a busy machine, and no longer.
GRACE_PERIOD_S = 3
GRACE_PERIOD = f"{GRACE_PERIOD_S}s"

has_endpoint_for_delayed_events = pytest.mark.skipif(
    not hasattr(room_servlets, "RoomDelayedEventRestServlet"),
    reason="Synapse has the endpoint from 1.164",
)

# What the fixture `make_homeserver` gives.
MakeHomeserver = Callable[..., Homeserver]

# No timelines: what is delivered is in the section.
NO_TIMELINE = {"room": {"timeline": {"types": ["org.example.nothing"]}}}


def text(body: str) -> JsonDict:
    """The content of a text message."""
    return {"msgtype": "m.text", "body": body}


def now_ms() -> int:
    """The time in ms since the epoch; servers and tests share a clock."""
    return int(time.time() * 1000)


# Reading answers


def ids(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """The ids of events, in their order."""
    return [event["event_id"] for event in events]


def joined_room(answer: JsonDict, room_id: str) -> JsonDict:
    """What `/sync` says of a joined room; empty if it says nothing."""
    room: JsonDict = answer.get("rooms", {}).get("join", {}).get(room_id, {})
    return room


def sticky_in(answer: JsonDict, room_id: str) -> list[JsonDict]:
    """The events in a joined room's section of sticky events in `/sync`."""
    events: list[JsonDict] = joined_room(answer, room_id).get(SYNC_SECTION, {}).get("events", [])
    return events


def timeline_in(answer: JsonDict, room_id: str) -> list[JsonDict]:
    """The events in a joined room's timeline in `/sync`."""
    events: list[JsonDict] = joined_room(answer, room_id).get("timeline", {}).get("events", [])
    return events


def all_sticky_in(answer: JsonDict) -> list[JsonDict]:
    """The events in the sections of all rooms."""
    rooms = answer.get("rooms", {}).get("join", {})
    return [event for room_id in rooms for event in sticky_in(answer, room_id)]


def section_ids(reader: Client, room: str) -> list[str]:
    """The IDs in the section of an initial sync that has no timeline."""
    return ids(sticky_in(reader.sync(filter=NO_TIMELINE), room))


def remaining_ms(event: JsonDict) -> int | None:
    """For how many more ms an answer says that an event is sticky; None if it says nothing."""
    remaining: int | None = event.get("unsigned", {}).get(REMAINING_KEY)
    return remaining


# Following tokens


@dataclass
class Followed:
    """The answers of `/sync` that a client got, each with the token of the one before."""

    next_batch: str | None
    answers: list[JsonDict] = field(default_factory=list)

    @property
    def rooms(self) -> set[str]:
        """The joined rooms that any of the answers had something to say of."""
        return {room_id for a in self.answers for room_id in a.get("rooms", {}).get("join", {})}

    def sticky(self, room_id: str) -> list[str]:
        """The ids in a room's sections, each as often as it was delivered there."""
        return [name for answer in self.answers for name in ids(sticky_in(answer, room_id))]

    def timeline(self, room_id: str) -> list[str]:
        """The ids in a room's timelines, each as often as it was delivered there."""
        return [name for answer in self.answers for name in ids(timeline_in(answer, room_id))]

    def seen(self, room_id: str) -> list[str]:
        """The ids in a room's sections and timelines, each as often as it was delivered."""
        return self.sticky(room_id) + self.timeline(room_id)


def follow(
    client: Client,
    since: str | None = None,
    *,
    until: Callable[[Followed], object],
    afterwards: int = 2,
    timeout_s: float = 60,
    timeout_ms: int = 1000,
    **sync_arguments: Any,
) -> Followed:
    """Sync again and again, each time with the token of the last answer, until that is true.

    Then `afterwards` times more without waiting, which is where an event that is delivered
    twice would come again. `sync_arguments` are those of `Client.sync`.
    """
    followed = Followed(since)
    deadline = time.monotonic() + timeout_s

    def step(wait_ms: int) -> None:
        answer = client.sync(followed.next_batch, timeout_ms=wait_ms, **sync_arguments)
        followed.answers.append(answer)
        followed.next_batch = answer["next_batch"]

    step(0)
    while not until(followed):
        seen = {room_id: followed.seen(room_id) for room_id in followed.rooms}
        assert time.monotonic() < deadline, f"not within {timeout_s} s; delivered were: {seen}"
        step(timeout_ms)
    for _ in range(afterwards):
        step(0)
    return followed


def follow_until_seen(
    client: Client, room_id: str, event_ids: Iterable[str], since: str | None = None, **more: Any
) -> Followed:
    """`follow` until all these events of a room were in a section or a timeline."""
    wanted = set(event_ids)
    return follow(client, since, until=lambda f: wanted <= set(f.seen(room_id)), **more)


def assert_once(followed: Followed, room_id: str, event_ids: Iterable[str]) -> None:
    """Each of these was delivered exactly once, in a section or a timeline."""
    seen = followed.seen(room_id)
    counts = {event_id: seen.count(event_id) for event_id in event_ids}
    wrong = {event_id: count for event_id, count in counts.items() if count != 1}
    assert not wrong, f"not delivered once, of {len(counts)} events: {wrong}"


def wait_for_readers(client: Client, room_id: str, event_id: str) -> None:
    """Wait until this event is the newest one of its room to every client reader."""
    for url in client.homeserver.client_urls:
        reader = client.via(url)
        eventually(
            lambda reader=reader: ids(reader.messages(room_id, limit=1)["chunk"]) == [event_id],  # type: ignore[misc]
            what=f"{event_id} known to {url}",
        )


def until_ignored(client: Client, other: Client, *, ignored: bool = True) -> None:
    """Wait until every client reader knows whether a user is ignored."""
    path = f"/_matrix/client/v3/user/{client.user_id}/account_data/m.ignored_user_list"
    assert (other.user_id in client.request("GET", path)["ignored_users"]) == ignored
    room_id = other.create_room(preset="public_chat")
    client.join(room_id)
    event_id = other.send(room_id)
    for url in client.homeserver.client_urls:
        reader = client.via(url)

        def is_hidden(reader: Client = reader) -> bool:
            try:
                reader.event(room_id, event_id)
            except MatrixError:
                return True
            return False

        eventually(
            lambda is_hidden=is_hidden: is_hidden() == ignored,  # type: ignore[misc]
            what=f"the ignored user known to {url}",
        )
    client.leave(room_id)


def quiet_token(client: Client) -> str:
    """A token after which no client reader has any news for this client."""
    token: str = client.sync()["next_batch"]
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline, "there is always something new"
        before = token
        rooms: list[JsonDict] = []
        for url in client.homeserver.client_urls:
            answer = client.via(url).sync(token)
            token = answer["next_batch"]
            rooms.append(answer.get("rooms", {}))
        if token == before and not any(rooms):
            return token


# Servers that are not as they should be


def sabotage(
    homeserver: Homeserver,
    name: str,
    config: JsonDict | None = None,
    module_config: JsonDict | None = None,
) -> None:
    """Let a saboteur do its work whenever this homeserver starts."""
    shutil.copy(saboteurs.__file__, homeserver.directory / "saboteurs.py")
    modules: list[JsonDict] = [
        {"module": f"saboteurs.{name}", "config": config or {}},
        {"module": MODULE, "config": generous(module_config or {})},
    ]
    homeserver.reconfigure(extra_config={"modules": modules})


def serious_problems(problems: str) -> list[str]:
    """Those of logged problems that are errors, or that the module has something to do with.

    Not that a process waits for another one to make the tables: on a busy machine it may wait so
    long that it says so. And not that two federation senders of Synapse's start at once, and want
    to make the same rows.
    """
    entries = re.split(r"\n(?=\[\w+\] \d{4}-)", problems)
    expected = ("for the lock of the tables", "_reset_federation_positions_txn")
    return [
        entry
        for entry in entries
        if re.search(r" (ERROR|CRITICAL) |synapse_sticky", entry)
        and not any(text in entry for text in expected)
    ]


# Sending and waiting


def sticky(duration_ms: Any = HOUR_MS) -> dict[str, Any]:
    """The top-level key of a sticky event."""
    return {EVENT_KEY: {"duration_ms": duration_ms}}


def send_sticky(client: Client, room_id: str, count: int = 1, **arguments: Any) -> list[str]:
    """Send that many sticky messages, by default for an hour. Returns their ids, oldest first."""
    arguments.setdefault("sticky_ms", HOUR_MS)
    return [client.send(room_id, **arguments) for _ in range(count)]


def until_refused(homeserver: Homeserver, client: Client, room_id: str) -> None:
    """Wait until no process lets a user send sticky events to a room."""

    def is_refused(via: Client) -> bool:
        try:
            # One that was let through must not count later.
            send_sticky(via, room_id, sticky_ms=1)
        except MatrixError as error:
            return error.status == 403
        return False

    for url in homeserver.client_urls:
        via = client.via(url)
        eventually(lambda v=via: is_refused(v), what=f"the refusal at {url}")  # type: ignore[misc]


def within_a_second(holds: Callable[[], object], what: str) -> None:
    """Wait until something holds, for all who ask a second after this call, or later.

    How long an answer takes does not count.
    """
    began = time.monotonic()
    asked_s = [0.0]

    def asked() -> bool:
        asked_s.append(time.monotonic() - began)
        return bool(holds())

    eventually(asked, 20, what, interval_s=0.02)
    assert asked_s[-2] < 1, f"{what}: not yet when asked after {asked_s[-2]:.1f} s"


def send_plain(client: Client, room_id: str, count: int) -> list[str]:
    """Send that many ordinary messages, to push others out of a timeline's window."""
    return [client.send(room_id) for _ in range(count)]


def switch(admin: Client, room: str, content: JsonDict) -> str:
    """What a room's admin sends."""
    return admin.send_state(room, SETTINGS, content)


def reasons(homeserver: Homeserver, event_id: str) -> list[str]:
    """Why an event is held."""
    rows = homeserver.query("SELECT reason FROM synapse_sticky_held WHERE event_id = ?", event_id)
    return sorted(reason for (reason,) in rows)


def is_recorded(homeserver: Homeserver, event_id: str) -> bool:
    """Whether there is a row for the event in the module's table."""
    query = "SELECT event_id FROM synapse_sticky_events WHERE event_id = ?"
    return bool(homeserver.query(query, event_id))


def is_stored(homeserver: Homeserver, event: Event) -> bool:
    """Whether the homeserver has an event, be it as an outlier."""
    return bool(homeserver.query("SELECT 1 FROM events WHERE event_id = ?", event.event_id))


def stored_pdu(homeserver: Homeserver, event_id: str) -> JsonDict:
    """An event as Synapse has stored it; raises `ValueError` if it has not."""
    ((stored,),) = homeserver.query("SELECT json FROM event_json WHERE event_id = ?", event_id)
    pdu: JsonDict = json.loads(stored)
    return pdu


def sleep_until(moment_ms: int) -> None:
    """Sleep until a known moment, such as an expiry, has passed."""
    time.sleep(max(0, moment_ms - now_ms() + 1) / 1000)


def our_tables(homeserver: Homeserver, kind: str) -> set[str]:
    """The names of the module's tables."""
    return {name for (name,) in homeserver.query(OUR_TABLES[kind], "synapse_sticky%")}


def drop_tables(homeserver: Homeserver, kind: str) -> None:
    """Make the database one that has never seen the module."""
    for table in our_tables(homeserver, kind):
        homeserver.execute(f"DROP TABLE {table}")
    assert not our_tables(homeserver, kind)


def unique(prefix: str = "t") -> str:
    """A name that nothing else has."""
    return f"{prefix}{secrets.token_hex(5)}"
