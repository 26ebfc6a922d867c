# SPDX-License-Identifier: AGPL-3.0-or-later
"""All SQL. What it means is told by ``indexer.py`` and ``reader.py``."""

import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Final

import attr
from synapse.module_api import LoggingTransaction, ModuleApi

from synapse_sticky import stickiness
from synapse_sticky.deliverable.index import EventChange, JoinChange, StickyIndex
from synapse_sticky.protocol import EVENT_KEY
from synapse_sticky.seams.bounds import Bounds, Range, Stream
from synapse_sticky.servers.watermarks import WatermarkRow

logger = logging.getLogger(__name__)

# Synapse stores events as JSON with plain ASCII keys. Whether the key really
# stands at the top level is looked at afterwards.
_EVENT_KEY_PATTERN: Final = f'%"{EVENT_KEY}"%'

_EVENT_COLUMNS: Final = """
    e.event_id, e.room_id, e.sender, e.stream_ordering, e.received_ts,
    e.origin_server_ts, ej.json, ej.internal_metadata
"""
# Backfilled events: Synapse does not check them for soft failure.
_BACKFILLED: Final = "e.stream_ordering < 0"
_COULD_BE_STICKY: Final = """
    e.origin_server_ts > ? AND NOT e.outlier AND e.rejection_reason IS NULL AND ej.json LIKE ?
"""


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Candidate:
    """A sticky event found in Synapse's tables.

    Attributes:
        stream_ordering: where the stream that it was found in has it.
        soft_failed: Synapse has marked it so.
        refused: by a policy server or a spam checker.
        unchecked: Synapse never checked it against the room's current state.
        sent_out: Synapse sends it to other servers if it is by a user of this one,
            and the module was there when it was stored.
    """

    event_id: str
    room_id: str
    sender: str
    stream_ordering: int
    expires_ts: int
    soft_failed: bool
    refused: bool
    unchecked: bool
    sent_out: bool


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Join:
    """A user's join to a room, found in Synapse's tables, or what it means: a server's.

    Attributes:
        is_new: the membership event came in then. Else it is an old one that the
            current state has only now, for example at the end of a faster join.
    """

    member: str
    room_id: str
    stream_ordering: int
    instance_name: str | None
    is_new: bool = True


@attr.s(slots=True, frozen=True, auto_attribs=True)
class StateChange:
    """A change of a room's current state, found in Synapse's tables."""

    room_id: str
    type: str
    state_key: str


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Found:
    """What lies in some ranges of Synapse's streams."""

    candidates: list[Candidate]
    joins: list[Join]
    state_changes: list[StateChange]


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Held:
    """A recorded event that is held, and may become deliverable."""

    event_id: str
    room_id: str
    stream_ordering: int
    expires_ts: int


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Admitted:
    """A candidate and why it is held, or None if it is deliverable.

    Attributes:
        owed: whether other servers are owed it.
    """

    candidate: Candidate
    held_reason: str | None
    owed: bool


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Changes:
    """What changed in our tables, oldest first, and the last position given out."""

    events: list[EventChange]
    joins: list[JoinChange]
    position: int


class LostRace(Exception):
    """Another process has given out positions since ours were read."""


ServerOf = Callable[[str], str]
"""The server name in a user ID."""

Signal = Callable[[LoggingTransaction], None]
"""Called within a transaction that changed our tables: tells the other processes."""


class StickyStore:
    """Reads Synapse's tables, and reads and writes ours."""

    def __init__(self, api: ModuleApi, signal: Signal) -> None:
        self._api = api
        self._signal = signal

    # Ours.

    async def get_progress(self) -> tuple[Bounds, int] | None:
        """The scalar bounds read so far and the last position; None at first."""

        def get_progress_txn(txn: LoggingTransaction) -> tuple[Bounds, int] | None:
            txn.execute(
                "SELECT events_stream, backfill_stream, un_partial_stated_stream, last_position "
                "FROM synapse_sticky_progress"
            )
            row = txn.fetchone()
            return (Bounds(*row[:3]), row[3]) if row else None

        return await self._api.run_db_interaction("sticky_get_progress", get_progress_txn)

    async def get_held(self, reason: str, now_ts: int) -> list[Held]:
        """The unexpired events that are held for this reason, in stream order."""

        def get_held_txn(txn: LoggingTransaction) -> list[Held]:
            txn.execute(
                "SELECT event_id, room_id, stream_ordering, expires_ts "
                "FROM synapse_sticky_events WHERE position IS NULL AND held_reason = ? "
                "AND expires_ts > ? ORDER BY stream_ordering",
                (reason, now_ts),
            )
            return [Held(*row) for row in txn]

        return await self._api.run_db_interaction("sticky_get_held", get_held_txn)

    async def record(
        self,
        items: Iterable[Admitted | Held | Join],
        read: Bounds,
        last_position: int | None,
        now_ts: int,
    ) -> int:
        """Stores what was found and how far was read, together.

        Args:
            items: in the order in which they get their positions. What is held
                becomes deliverable, and stops being soft-failed for Synapse too.
            read: how far Synapse's streams were read to find them.
            last_position: the last position given out, as known here; None if
                nothing was stored yet.

        Returns:
            The last position given out now.

        Raises:
            LostRace: if it is not what was said. Nothing is stored then.
        """
        position = now_ts if last_position is None else last_position
        event_rows, released, join_rows = [], [], []
        for item in items:
            position = max(position + 1, now_ts)
            if isinstance(item, Admitted):
                found = item.candidate
                event_rows.append(
                    (
                        found.event_id,
                        found.room_id,
                        found.sender,
                        found.expires_ts,
                        found.stream_ordering,
                        position,
                        position if item.held_reason is None else None,
                        item.held_reason,
                        item.owed,
                    )
                )
            elif isinstance(item, Held):
                released.append((position, position, item.event_id))
            else:
                join_rows.append(
                    (
                        item.member,
                        item.room_id,
                        item.stream_ordering,
                        item.instance_name,
                        position,
                        now_ts + stickiness.MAX_DURATION_MS,
                    )
                )

        def record_txn(txn: LoggingTransaction) -> None:
            progress = (read.events, read.backfill, read.un_partial_stated, position)
            if last_position is None:
                txn.execute(
                    "INSERT INTO synapse_sticky_progress (events_stream, backfill_stream, "
                    "un_partial_stated_stream, last_position) VALUES (?, ?, ?, ?) "
                    "ON CONFLICT (lock) DO NOTHING",
                    progress,
                )
            else:
                txn.execute(
                    "UPDATE synapse_sticky_progress SET events_stream = ?, backfill_stream = ?, "
                    "un_partial_stated_stream = ?, last_position = ? WHERE last_position = ?",
                    (*progress, last_position),
                )
            if txn.rowcount != 1:
                raise LostRace()
            txn.execute_batch(
                "INSERT INTO synapse_sticky_events "
                "(event_id, room_id, sender, expires_ts, stream_ordering, revision, position, "
                "held_reason, owed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (event_id) DO NOTHING",
                event_rows,
            )
            txn.execute_batch(
                "UPDATE synapse_sticky_events SET revision = ?, position = ? "
                "WHERE event_id = ? AND position IS NULL",
                released,
            )
            for _, _, event_id in released:
                _unset_soft_failed(txn, event_id)
            txn.execute_batch(
                "INSERT INTO synapse_sticky_joins "
                "(member, room_id, stream_ordering, instance_name, position, expires_ts) "
                "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (member, room_id) DO UPDATE SET "
                "stream_ordering = excluded.stream_ordering, "
                "instance_name = excluded.instance_name, position = excluded.position, "
                "expires_ts = excluded.expires_ts "
                "WHERE synapse_sticky_joins.stream_ordering < excluded.stream_ordering",
                join_rows,
            )
            if event_rows or released or join_rows:
                self._signal(txn)

        await self._api.run_db_interaction("sticky_record", record_txn)
        return position

    async def get_changes(self, after: int, now_ts: int) -> Changes:
        """What changed after this position. See :func:`read_changes`."""
        return await self._api.run_db_interaction("sticky_get_changes", read_changes, after, now_ts)

    async def get_watermarks(self, now_ts: int) -> list[WatermarkRow]:
        """All watermarks that speak of something that may still be sticky."""

        def get_watermarks_txn(txn: LoggingTransaction) -> list[WatermarkRow]:
            txn.execute(
                "SELECT server_name, room_id, joined_position, settled_position, expires_ts "
                "FROM synapse_sticky_watermarks WHERE expires_ts > ?",
                (now_ts,),
            )
            return [WatermarkRow(*row) for row in txn]

        return await self._api.run_db_interaction("sticky_get_watermarks", get_watermarks_txn)

    async def store_watermarks(self, rows: Iterable[WatermarkRow], now_ts: int) -> None:
        """Stores watermarks. One never goes back, but with a newer join, or once it has expired."""

        def store_watermarks_txn(txn: LoggingTransaction) -> None:
            txn.execute_batch(
                "INSERT INTO synapse_sticky_watermarks AS w "
                "(server_name, room_id, joined_position, settled_position, expires_ts) "
                "VALUES (?, ?, ?, ?, ?) ON CONFLICT (server_name, room_id) DO UPDATE SET "
                "joined_position = excluded.joined_position, "
                "settled_position = excluded.settled_position, expires_ts = excluded.expires_ts "
                "WHERE w.joined_position < excluded.joined_position OR "
                "(w.joined_position = excluded.joined_position "
                "AND w.settled_position < excluded.settled_position) OR w.expires_ts <= ?",
                [(*attr.astuple(row), now_ts) for row in rows],
            )

        await self._api.run_db_interaction("sticky_store_watermarks", store_watermarks_txn)

    async def delete_expired(self, now_ts: int) -> int:
        """Deletes what has expired and returns how many events that were."""

        def delete_expired_txn(txn: LoggingTransaction) -> int:
            for table in ("synapse_sticky_joins", "synapse_sticky_watermarks"):
                txn.execute(f"DELETE FROM {table} WHERE expires_ts <= ?", (now_ts,))
            txn.execute("DELETE FROM synapse_sticky_events WHERE expires_ts <= ?", (now_ts,))
            return txn.rowcount

        return await self._api.run_db_interaction("sticky_delete_expired", delete_expired_txn)

    # Synapse's.

    async def find(
        self, ranges: Collection[Range], now_ts: int, watched_rooms: Collection[str]
    ) -> Found:
        """The sticky events and the joins in these ranges, each once.

        Args:
            watched_rooms: the changes of state are looked for in these rooms.
        """

        def find_txn(txn: LoggingTransaction) -> Found:
            found: list[Candidate] = []
            joins: list[Join] = []
            state_changes: list[StateChange] = []
            for part in ranges:
                if part.stream is Stream.UN_PARTIAL_STATED:
                    found += _find_un_partial_stated(txn, part, now_ts)
                    continue
                found += _find_events(txn, part, now_ts)
                found += _find_ex_outliers(txn, part, now_ts)
                if part.stream is Stream.EVENTS:
                    joins += _find_joins(txn, part)
                    if watched_rooms:
                        state_changes += _find_state_changes(txn, part, watched_rooms)
            # What was found twice is unchecked if it was in either place.
            candidates: dict[str, Candidate] = {}
            for candidate in found:
                if candidate.event_id not in candidates or candidate.unchecked:
                    candidates[candidate.event_id] = candidate
            return Found(list(candidates.values()), joins, state_changes)

        return await self._api.run_db_interaction("sticky_find", find_txn)

    async def find_server_joins(self, joins: Collection[Join], server_of: ServerOf) -> list[Join]:
        """The servers that were not in the room before these joins, with the first of them."""

        def find_server_joins_txn(txn: LoggingTransaction) -> list[Join]:
            found: dict[tuple[str, str], Join] = {}
            joined_now = {(join.room_id, join.member) for join in joins}
            for join in joins:
                server, room_id = server_of(join.member), join.room_id
                if (server, room_id) in found:
                    continue
                # Who joined later may be one whose join is still to be read.
                txn.execute(
                    "SELECT c.state_key FROM current_state_events AS c "
                    "INNER JOIN events AS e USING (event_id) WHERE c.room_id = ? "
                    "AND c.type = 'm.room.member' AND c.membership = 'join' "
                    "AND c.state_key LIKE ? AND e.stream_ordering < ?",
                    (room_id, f"%:{server}", join.stream_ordering),
                )
                if all(
                    (room_id, user_id) in joined_now or server_of(user_id) != server
                    for (user_id,) in txn
                ):
                    found[server, room_id] = attr.evolve(join, member=server)
            return list(found.values())

        if not joins:
            return []
        return await self._api.run_db_interaction("sticky_find_server_joins", find_server_joins_txn)

    async def find_recent_candidates(self, now_ts: int) -> list[Candidate]:
        """All events in the database that are sticky now, in stream order."""

        def find_recent_candidates_txn(txn: LoggingTransaction) -> list[Candidate]:
            txn.execute(
                f"SELECT {_EVENT_COLUMNS}, {_BACKFILLED} OR o.event_id IS NOT NULL "
                "FROM events AS e INNER JOIN event_json AS ej USING (event_id) "
                "LEFT JOIN ex_outlier_stream AS o USING (event_id) "
                f"WHERE {_COULD_BE_STICKY} ORDER BY e.stream_ordering",
                _could_be_sticky_arguments(now_ts),
            )
            # What was stored before the module was there was sent out without it.
            return [attr.evolve(c, sent_out=False) for c in _candidates(txn.fetchall(), now_ts)]

        return await self._api.run_db_interaction(
            "sticky_find_recent_candidates", find_recent_candidates_txn
        )

    async def get_received_ts(self, event_id: str) -> int | None:
        """When this server received an event, in ms since the epoch."""

        def get_received_ts_txn(txn: LoggingTransaction) -> int | None:
            txn.execute("SELECT received_ts FROM events WHERE event_id = ?", (event_id,))
            row = txn.fetchone()
            return row[0] if row else None

        return await self._api.run_db_interaction("sticky_get_received_ts", get_received_ts_txn)


def read_changes(txn: Any, after: int, now_ts: int) -> Changes:
    """What changed after a position, without what has expired.

    Everything, with ``after`` = 0. If the stored position is smaller than
    ``after``, the tables were restored or dropped: the caller compares.
    """
    position, joins = _read_position_and_joins(txn, after, now_ts)
    return Changes(list(_event_changes(txn, after, now_ts)), joins, position)


def load_index(txn: Any, now_ts: int) -> StickyIndex:
    """Everything unexpired, row by row: at start-up that may be a lot."""
    index = StickyIndex()
    position, joins = _read_position_and_joins(txn, 0, now_ts)
    index.apply(_event_changes(txn, 0, now_ts), joins, position)
    return index


def _read_position_and_joins(txn: Any, after: int, now_ts: int) -> tuple[int, list[JoinChange]]:
    txn.execute("SELECT last_position FROM synapse_sticky_progress")
    row = txn.fetchone()
    txn.execute(
        "SELECT member, room_id, position, expires_ts, stream_ordering, instance_name "
        "FROM synapse_sticky_joins "
        "WHERE position > ? AND expires_ts > ? ORDER BY position",
        (after, now_ts),
    )
    return row[0] if row else 0, [JoinChange(*row) for row in txn]


def _event_changes(txn: Any, after: int, now_ts: int) -> Iterator[EventChange]:
    txn.execute(
        "SELECT event_id, room_id, sender, position, expires_ts, stream_ordering, owed, "
        "held_reason "
        "FROM synapse_sticky_events "
        "WHERE revision > ? AND expires_ts > ? ORDER BY revision",
        (after, now_ts),
    )
    return (EventChange(*row) for row in txn)


def _find_events(txn: LoggingTransaction, part: Range, now_ts: int) -> list[Candidate]:
    return _find_by(txn, part, now_ts, "events AS e", "e.stream_ordering", unchecked=_BACKFILLED)


def _find_ex_outliers(txn: LoggingTransaction, part: Range, now_ts: int) -> list[Candidate]:
    joined = "ex_outlier_stream AS o INNER JOIN events AS e USING (event_id)"
    return _find_by(txn, part, now_ts, joined, "o.event_stream_ordering")


def _find_un_partial_stated(txn: LoggingTransaction, part: Range, now_ts: int) -> list[Candidate]:
    joined = "un_partial_stated_event_stream AS u INNER JOIN events AS e USING (event_id)"
    return _find_by(
        txn, part, now_ts, joined, "u.stream_id", condition="u.rejection_status_changed"
    )


def _find_by(
    txn: LoggingTransaction,
    part: Range,
    now_ts: int,
    joined: str,
    column: str,
    unchecked: str = "TRUE",
    condition: str = "TRUE",
) -> list[Candidate]:
    """Candidates whose place in a stream, in ``column``, is in a range."""
    txn.execute(
        f"SELECT {_EVENT_COLUMNS}, {unchecked} FROM {joined} "
        "INNER JOIN event_json AS ej USING (event_id) "
        f"WHERE {_in_range(column, part)} AND {_of_writer(column[0], part)} AND {condition} "
        f"AND {_COULD_BE_STICKY} ORDER BY {column}",
        (*_range_arguments(part), *_could_be_sticky_arguments(now_ts)),
    )
    return _candidates(txn.fetchall(), now_ts)


def _find_joins(txn: LoggingTransaction, part: Range) -> list[Join]:
    txn.execute(
        "SELECT d.state_key, d.room_id, d.stream_id, d.instance_name, "
        "e.stream_ordering >= d.stream_id FROM current_state_delta_stream AS d "
        "INNER JOIN events AS e ON e.event_id = d.event_id "
        "INNER JOIN room_memberships AS m ON m.event_id = d.event_id "
        "LEFT JOIN room_memberships AS previous ON previous.event_id = d.prev_event_id "
        f"WHERE {_in_range('d.stream_id', part)} AND {_of_writer('d', part)} "
        "AND d.type = 'm.room.member' AND m.membership = 'join' "
        "AND (previous.membership IS NULL OR previous.membership <> 'join') ORDER BY d.stream_id",
        _range_arguments(part),
    )
    return [Join(*row) for row in txn.fetchall()]


def _find_state_changes(
    txn: LoggingTransaction, part: Range, rooms: Collection[str]
) -> list[StateChange]:
    txn.execute(
        "SELECT d.room_id, d.type, d.state_key FROM current_state_delta_stream AS d "
        f"WHERE {_in_range('d.stream_id', part)} AND {_of_writer('d', part)}",
        _range_arguments(part),
    )
    return [StateChange(*row) for row in txn.fetchall() if row[0] in rooms]


def _unset_soft_failed(txn: LoggingTransaction, event_id: str) -> None:
    """Makes Synapse treat a soft-failed event as any other."""
    txn.execute("SELECT internal_metadata FROM event_json WHERE event_id = ?", (event_id,))
    row = txn.fetchone()
    flags = json.loads(row[0]) if row else {}
    if flags.pop("soft_failed", None):
        txn.execute(
            "UPDATE event_json SET internal_metadata = ? WHERE event_id = ?",
            (json.dumps(flags), event_id),
        )


def _in_range(column: str, part: Range) -> str:
    # Streams that count downwards have their newest row at the low end.
    if part.end < part.start:
        return f"{column} >= ? AND {column} < ?"
    return f"{column} > ? AND {column} <= ?"


def _of_writer(table: str, part: Range) -> str:
    return "TRUE" if part.writer is None else f"{table}.instance_name = ?"


def _range_arguments(part: Range) -> tuple[object, ...]:
    return (part.low, part.high) if part.writer is None else (part.low, part.high, part.writer)


def _could_be_sticky_arguments(now_ts: int) -> tuple[object, ...]:
    return (now_ts - stickiness.MAX_DURATION_MS, _EVENT_KEY_PATTERN)


def _candidates(rows: Sequence[tuple[Any, ...]], now_ts: int) -> list[Candidate]:
    found = []
    for row in rows:
        event_id, room_id, sender, stream_ordering, received_ts, origin_ts, text, metadata = row[:8]
        try:
            sticky = json.loads(text).get(EVENT_KEY)
            flags = json.loads(metadata)
        except ValueError:
            # What Synapse itself cannot read is no sticky event.
            logger.warning("Cannot read the JSON of event %s; treating it as ordinary", event_id)
            continue
        duration_ms = stickiness.effective_duration_ms(sticky)
        if duration_ms is None:
            continue
        expires_ts = stickiness.expires_ts(duration_ms, received_ts, origin_ts)
        if expires_ts <= now_ts:
            continue
        found.append(
            Candidate(
                event_id=event_id,
                room_id=room_id,
                sender=sender,
                stream_ordering=stream_ordering,
                expires_ts=expires_ts,
                soft_failed=bool(flags.get("soft_failed")),
                refused=bool(flags.get("policy_server_spammy") or flags.get("spam_checker_spammy")),
                unchecked=bool(row[8]),
                sent_out=(
                    stream_ordering > 0
                    and flags.get("proactively_send", True)
                    and not flags.get("out_of_band_membership")
                ),
            )
        )
    return found
