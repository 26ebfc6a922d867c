# SPDX-License-Identifier: AGPL-3.0-or-later
"""``watch``: the rooms with sticky events, or one of them, live in a terminal."""

import contextlib
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

import attr
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from synapse_sticky.command.http import Client, JsonDict, Refused, Unreachable, quoted
from synapse_sticky.command.report import CouldNotRun, sentence
from synapse_sticky.command.text import clean_line
from synapse_sticky.protocol import ADMIN_API_PATH

_TIMEOUT_S: Final = 10
_LARGEST_PAGE: Final = 1000
# Lines beside the rows: headings, and one for the number of rows that do not fit.
_LINES_BESIDE_ROOMS: Final = 4
_LINES_BESIDE_ROOM: Final = 13
_TABLES_OF_ROOM: Final = 3

REASONS: Final[Mapping[str, str]] = {
    "soft_failed": "the room does not allow it now",
    "refused": "a policy server or spam checker refused it",
    "switched_off": "sticky events are off in the room",
    "over_rate": "its server sends too many",
    "server_blocked": "its server is blocked",
    "user_blocked": "its sender is blocked",
}
"""Why events are held, by the reason that the admin API gives."""

_SERVER_STATES: Final[Mapping[str, str]] = {
    "fresh": "new: left to Synapse for now",
    "backing_off": "does not answer",
    "trying": "is being sent them",
}
_DECIDED_BY: Final[Mapping[str, str]] = {
    "admin": "decided by a server admin",
    "room": "decided by the room's admins",
    "default": "by default",
}


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Snapshot:
    """Answers of the admin API, of one moment.

    Attributes:
        room: with its `events`; None if all rooms are watched.
        taken_s: when, by a clock that never jumps.
    """

    status: JsonDict
    taken_s: float
    rooms: list[JsonDict] = attr.Factory(list)
    total_rooms: int = 0
    room: JsonDict | None = None
    entries: list[JsonDict] = attr.Factory(list)
    servers: list[JsonDict] = attr.Factory(list)


@attr.s(slots=True, auto_attribs=True)
class Watch:
    """Asks the admin API again and again, and shows its answers."""

    _client: Client
    _room_id: str | None
    _interval_s: float
    _problem: str | None = None

    def run(self, *, once: bool, colours: bool) -> int:
        """Show the view until Ctrl-C, and return the exit code."""
        console = Console(no_color=not colours, highlight=False, emoji=False, markup=False)
        snapshot = self._first()
        if once or not console.is_terminal:
            # Nobody looks: all rows, and no control characters.
            console.print(view(snapshot, snapshot.taken_s, self._client.place.url))
            return 0
        with contextlib.suppress(KeyboardInterrupt):
            self._follow(console, snapshot)
        return 0

    def _follow(self, console: Console, snapshot: Snapshot) -> None:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            asked_s = snapshot.taken_s
            while True:
                now_s = time.monotonic()
                if now_s - asked_s >= self._interval_s:
                    snapshot = self._next(snapshot)
                    asked_s = now_s = time.monotonic()
                url = self._client.place.url
                shown = view(snapshot, now_s, url, console.height, self._problem)
                live.update(shown, refresh=True)
                time.sleep(min(1, self._interval_s))

    def _first(self) -> Snapshot:
        try:
            return self._take()
        except (Unreachable, Refused) as error:
            raise CouldNotRun(_explain(error)) from error

    def _next(self, last: Snapshot) -> Snapshot:
        """Return a new snapshot, or the last one with a problem noted beside it."""
        try:
            snapshot = self._take()
        except Refused as error:
            if error.status in (401, 403, 404):
                raise CouldNotRun(_explain(error)) from error
            self._problem = _explain(error)
            return last
        except Unreachable as error:
            self._problem = str(error)
            return last
        self._problem = None
        return snapshot

    def _take(self) -> Snapshot:
        status = self._get("status")
        if self._room_id is None:
            answer = self._get("rooms", limit=_LARGEST_PAGE)
            return Snapshot(
                status, time.monotonic(), rooms=answer["rooms"], total_rooms=answer["total"]
            )
        path = f"rooms/{quoted(self._room_id)}"
        return Snapshot(
            status,
            room=self._get(path, limit=_LARGEST_PAGE),
            entries=self._get(f"{path}/map", limit=_LARGEST_PAGE)["entries"],
            servers=self._get(f"{path}/servers", limit=_LARGEST_PAGE)["servers"],
            taken_s=time.monotonic(),
        )

    def _get(self, path: str, **params: object) -> JsonDict:
        return self._client.get(f"{ADMIN_API_PATH}/{path}", timeout_s=_TIMEOUT_S, **params)


def _explain(error: Exception) -> str:
    if isinstance(error, Refused):
        if error.status == 401:
            return "The token is not valid, or not any more."
        if error.status == 403:
            return "The token is not that of a server admin."
        if error.status == 404 and error.errcode == "M_UNRECOGNIZED":
            return "The server has no admin API of sticky events: it runs without the module."
    return clean_line(sentence(error))


# The view


def view(
    snapshot: Snapshot,
    now_s: float,
    url: str,
    height: int | None = None,
    problem: str | None = None,
) -> RenderableType:
    """Return all that is shown.

    Args:
        height: how many lines there are; None for any number.
        problem: why there is no newer answer.
    """
    age_s = now_s - snapshot.taken_s
    parts: list[RenderableType] = [_head(snapshot, url)]
    if problem is not None:
        parts.append(_plain(f"No new answer for {age_s:.0f} s: {problem}", "bold red"))
    if snapshot.room is None:
        rows = None if height is None else max(1, height - _LINES_BESIDE_ROOMS)
        parts.append(_rooms(snapshot, rows))
    else:
        rows = None if height is None else (height - _LINES_BESIDE_ROOM) // _TABLES_OF_ROOM
        parts += _room(
            snapshot, snapshot.room, int(age_s * 1000), None if rows is None else max(1, rows)
        )
    return Group(*parts)


def _head(snapshot: Snapshot, url: str) -> Text:
    status = snapshot.status
    behind = status["indexer"]["behind"]
    pace = f"{behind} not noticed yet" if behind else "all noticed"
    held = sum(status["held"].values())
    return _plain(
        f"{url}: {status['live']} live, {held} held, {status['owed']} owed; {pace}", "bold"
    )


def _rooms(snapshot: Snapshot, rows: int | None) -> RenderableType:
    table = _table()
    table.add_column("room")
    for name in ("live", "held", "owed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("sticky events", no_wrap=True)
    busiest = sorted(snapshot.rooms, key=lambda room: (-_count(room), room["room_id"]))
    for room in busiest[:rows]:
        table.add_row(
            _plain(room["room_id"]),
            str(room["live"]),
            _plain(str(_held(room)), "yellow" if _held(room) else ""),
            str(room["owed"]),
            _switch(room),
        )
    return _with_rest(table, snapshot.total_rooms, "no room has sticky events")


def _room(
    snapshot: Snapshot, room: JsonDict, age_ms: int, rows: int | None
) -> Iterable[RenderableType]:
    yield _plain(room["room_id"])
    yield Text.assemble("Sticky events are ", _switch(room, in_words=True))
    yield _plain(f"Entries of the map: {len(snapshot.entries)}", "bold")
    yield _entries(snapshot.entries, age_ms, rows)
    held = [event for event in room["events"] if event["held_reasons"]]
    yield _plain(f"Held: {_held(room)}", "bold")
    yield _held_events(held, _held(room), age_ms, rows)
    yield _plain(f"Servers that are owed events: {len(snapshot.servers)}", "bold")
    yield _servers(snapshot.servers, rows)


def _entries(entries: list[JsonDict], age_ms: int, rows: int | None) -> RenderableType:
    table = _table()
    table.add_column("sender")
    table.add_column("type")
    table.add_column("key")
    table.add_column("left", justify="right", no_wrap=True)
    for entry in entries[:rows]:
        table.add_row(
            _plain(entry["sender"]),
            _plain("encrypted" if entry["opaque"] else entry["type"]),
            _plain(entry["sticky_key"] or ""),
            _left(entry["remaining_ms"] - age_ms),
        )
    return _with_rest(table, len(entries), "none")


def _held_events(
    events: list[JsonDict], total: int, age_ms: int, rows: int | None
) -> RenderableType:
    table = _table()
    table.add_column("sender")
    table.add_column("held because")
    table.add_column("left", justify="right", no_wrap=True)
    for event in events[:rows]:
        reasons = "; ".join(REASONS.get(name, name) for name in event["held_reasons"])
        table.add_row(
            _plain(event["sender"]),
            Text(clean_line(reasons)),
            _left(event["remaining_ms"] - age_ms),
        )
    return _with_rest(table, max(total, len(events)), "none")


def _servers(servers: list[JsonDict], rows: int | None) -> RenderableType:
    table = _table()
    table.add_column("server")
    table.add_column("owed", justify="right", no_wrap=True)
    table.add_column("for", justify="right", no_wrap=True)
    table.add_column("why")
    for server in servers[:rows]:
        why = _SERVER_STATES.get(server["reason"], server["reason"])
        if server["obstacle"]:
            why += f": {server['obstacle']}"
        style = "red" if server["reason"] == "backing_off" else ""
        table.add_row(
            _plain(server["server_name"]),
            str(server["owed"]),
            _left(server["oldest_owed_ms"]),
            Text(clean_line(why), style=style),
        )
    return _with_rest(table, len(servers), "none: all have received theirs")


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="dim")


def _with_rest(table: Table, total: int, none: str) -> RenderableType:
    if not table.row_count:
        return _plain(none, "dim")
    if total > table.row_count:
        return Group(table, _plain(f"and {total - table.row_count} more", "dim"))
    return table


def _switch(room: JsonDict, *, in_words: bool = False) -> Text:
    by = room["enabled_by"]
    state = "on" if room["enabled"] else "off"
    reason = f", {_DECIDED_BY.get(by, by)}" if in_words else f" ({by})"
    return _plain(state + reason, "green" if room["enabled"] else "yellow")


def _left(duration_ms: int) -> Text:
    seconds = max(0, duration_ms) // 1000
    hours, minutes = seconds // 3600, seconds // 60 % 60
    text = f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
    return _plain(text if duration_ms > 0 else "over", "" if duration_ms > 0 else "dim")


def _held(room: JsonDict) -> int:
    """Return how many events are held, at least; one with two reasons counts under both."""
    return sum(room["held"].values())


def _count(room: JsonDict) -> int:
    live: int = room["live"]
    return live + _held(room)


def _plain(text: Any, style: str = "") -> Text:
    """Return a text that a terminal takes for nothing else, in one line."""
    return Text(clean_line(str(text)), style=style, no_wrap=True, overflow="ellipsis")
