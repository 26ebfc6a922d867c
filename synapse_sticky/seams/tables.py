# SPDX-License-Identifier: AGPL-3.0-or-later
"""SQL on Synapse's own tables."""

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import attr
from synapse.module_api import LoggingTransaction, ModuleApi
from synapse.storage.database import make_in_list_sql_clause
from synapse.storage.types import Cursor
from synapse.util.iterutils import batch_iter

from synapse_sticky import stickiness
from synapse_sticky.protocol import EVENT_KEY
from synapse_sticky.seams.bounds import Range, Stream
from synapse_sticky.seams.checks import misfit
from synapse_sticky.seams.contents import (
    Candidate,
    RedactedState,
    SeenJoin,
    ServerInRoom,
    StateChange,
    StreamContents,
    Unknown,
    Watched,
)

logger = logging.getLogger(__name__)

_COLUMNS: Final[Mapping[str, str]] = {
    "current_state_delta_stream": (
        "stream_id, instance_name, room_id, type, state_key, event_id, prev_event_id"
    ),
    "current_state_events": "event_id, room_id, type, state_key, membership",
    "destination_rooms": "destination, room_id",
    "destinations": "destination, last_successful_stream_ordering",
    "redactions": "event_id, redacts",
    "event_backward_extremities": "event_id, room_id",
    "event_edges": "event_id, prev_event_id",
    "event_json": "event_id, json, internal_metadata",
    "events": (
        "event_id, room_id, sender, stream_ordering, instance_name, received_ts, "
        "origin_server_ts, outlier, rejection_reason, type"
    ),
    "ex_outlier_stream": "event_id, event_stream_ordering, instance_name",
    "room_memberships": "event_id, membership",
    "sticky_events": "event_id, expires_at",
    "un_partial_stated_event_stream": (
        "stream_id, instance_name, event_id, rejection_status_changed"
    ),
}

_ROOMS_AT_A_TIME: Final = 100
"""How many rooms one statement names: SQLite limits the arguments."""

# What numbers the streams, on PostgreSQL.
_SEQUENCES: Final = (
    "events_stream_seq",
    "events_backfill_stream_seq",
    "un_partial_stated_event_stream_sequence",
)

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


ServerOf = Callable[[str], str]
"""The server name in a user ID."""

Row = tuple[Any, ...]


def check_tables(txn: Cursor) -> None:
    """Refuse to start if Synapse's tables lack anything that is read here.

    Raises:
        ConfigError: naming the table.
    """
    for table, columns in _COLUMNS.items():
        txn.execute("SAVEPOINT synapse_sticky_check")
        try:
            txn.execute(f"SELECT {columns} FROM {table} LIMIT 0")
        except Exception as error:
            raise misfit(
                f"the table {table} cannot be read with the columns {columns} ({error})"
            ) from error
        txn.execute("RELEASE SAVEPOINT synapse_sticky_check")


def begin_sequences(txn: Cursor) -> None:
    """Take the first number of each sequence on PostgreSQL that none was taken from yet.

    Synapse takes it for one that was written already: after ``synapse_port_db`` as in a new
    database. An event with that number would be passed over.
    """
    for sequence in _SEQUENCES:
        txn.execute(f"SELECT nextval('{sequence}') FROM {sequence} WHERE NOT is_called")


class SynapseTables:
    """Read Synapse's tables."""

    def __init__(self, api: ModuleApi) -> None:
        self._api = api

    async def find(
        self, ranges: Collection[Range], now_ts: int, watched: Watched
    ) -> StreamContents:
        """Return the sticky events, joins and changes of state in these ranges, each once.

        Args:
            watched: the changes of state that are looked for, and the redactions.
        """

        def find_txn(txn: LoggingTransaction) -> StreamContents:
            found: list[Row] = []
            joins: list[SeenJoin] = []
            state_changes: list[StateChange] = []
            redacted: list[RedactedState] = []
            for part in ranges:
                if part.stream is Stream.UN_PARTIAL_STATED:
                    found += _find_un_partial_stated(txn, part, now_ts)
                    continue
                found += _find_events(txn, part, now_ts)
                found += _find_ex_outliers(txn, part, now_ts)
                if part.stream is Stream.EVENTS:
                    has_state_changes, has_redactions = _look_ahead(txn, part)
                    if watched.redactions and has_redactions:
                        redacted += _find_redacted(txn, part, watched)
                    if not has_state_changes:
                        continue
                    joins += _find_joins(
                        txn,
                        f"{_in_range('d.stream_id', part)} AND {_of_writer('d', part)}",
                        _range_arguments(part),
                    )
                    state_changes += _find_state_changes(txn, part, watched)
            candidates, has_others = _candidates(found, now_ts)
            # An event that was found twice is unchecked if it was in either place.
            each: dict[str, Candidate] = {}
            for candidate in candidates:
                if candidate.event_id not in each or candidate.unchecked:
                    each[candidate.event_id] = candidate
            found_candidates = list(each.values())
            return StreamContents(found_candidates, joins, state_changes, redacted, has_others)

        return await self._api.run_db_interaction("sticky_find", find_txn)

    async def find_server_joins(
        self, joins: Collection[SeenJoin], server_of: ServerOf
    ) -> list[SeenJoin]:
        """Return the servers that were not in a room before these joins, each with its first."""

        def find_server_joins_txn(txn: LoggingTransaction) -> list[SeenJoin]:
            found: dict[tuple[str, str], SeenJoin] = {}
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

    async def find_unknown(self, room_id: str, since_ts: int, server_of: ServerOf) -> Unknown:
        """Return the events of a room that are not known here, though known ones refer to them.

        Args:
            since_ts: how long ago an outage may have ended.
        """

        def find_unknown_txn(txn: LoggingTransaction) -> Unknown:
            txn.execute(
                "SELECT b.event_id, e.sender, e.stream_ordering, e.received_ts "
                "FROM event_backward_extremities AS b "
                "INNER JOIN event_edges AS g ON g.prev_event_id = b.event_id "
                "INNER JOIN events AS e ON e.event_id = g.event_id "
                "WHERE b.room_id = ? AND NOT e.outlier",
                (room_id,),
            )
            gaps: set[str] = set()
            history: set[str] = set()
            for event_id, sender, stream_ordering, received_ts in txn:
                # Backfilled events have history before them, and so have our own: those are joins.
                is_new = stream_ordering > 0 and (received_ts or 0) >= since_ts
                is_gap = is_new and server_of(sender) != self._api.server_name
                (gaps if is_gap else history).add(event_id)
            txn.execute(
                "SELECT received_ts FROM events WHERE room_id = ? AND stream_ordering > 0 "
                "AND NOT outlier ORDER BY stream_ordering LIMIT 1",
                (room_id,),
            )
            (begins_ts,) = txn.fetchone() or (0,)
            return Unknown(gaps - history, history, begins_ts or 0)

        return await self._api.run_db_interaction("sticky_find_unknown", find_unknown_txn)

    async def find_gaps(self, after: int, up_to: int) -> list[tuple[str, str, int]]:
        """Return the rooms of new events before which others are missing, sender and time of each.

        Args:
            after, up_to: the stream orderings of the events that are looked at.
        """

        def find_gaps_txn(txn: LoggingTransaction) -> list[tuple[str, str, int]]:
            txn.execute(
                "SELECT e.room_id, e.sender, e.received_ts FROM events AS e "
                "INNER JOIN event_edges AS g USING (event_id) "
                "INNER JOIN event_backward_extremities AS b ON b.event_id = g.prev_event_id "
                "WHERE e.stream_ordering > ? AND e.stream_ordering <= ? AND NOT e.outlier",
                (after, up_to),
            )
            return [(room_id, sender, received_ts or 0) for room_id, sender, received_ts in txn]

        return await self._api.run_db_interaction("sticky_find_gaps", find_gaps_txn)

    async def find_recent_candidates(self, now_ts: int) -> list[Candidate]:
        """Return all events in the database that are sticky now, in stream order."""

        def find_recent_candidates_txn(txn: LoggingTransaction) -> list[Candidate]:
            txn.execute(
                f"SELECT {_EVENT_COLUMNS}, {_BACKFILLED} OR o.event_id IS NOT NULL, NULL, NULL "
                "FROM events AS e INNER JOIN event_json AS ej USING (event_id) "
                "LEFT JOIN ex_outlier_stream AS o USING (event_id) "
                f"WHERE {_COULD_BE_STICKY} ORDER BY e.stream_ordering",
                _could_be_sticky_arguments(now_ts),
            )
            candidates, _ = _candidates(txn.fetchall(), now_ts)
            txn.execute("SELECT event_id FROM sticky_events WHERE expires_at > ?", (now_ts,))
            delivered = {event_id for (event_id,) in txn}
            return [
                attr.evolve(candidate, was_accepted=candidate.event_id in delivered)
                for candidate in candidates
            ]

        return await self._api.run_db_interaction(
            "sticky_find_recent_candidates", find_recent_candidates_txn
        )

    async def find_servers(
        self, since: Mapping[str, int], server_of: ServerOf
    ) -> list[ServerInRoom]:
        """Return the servers in these rooms, this one included.

        Args:
            since: for each room the stream ordering after which joins count.
        """

        def find_servers_txn(txn: LoggingTransaction) -> list[ServerInRoom]:
            servers: list[ServerInRoom] = []
            for room_id, stream_ordering in since.items():
                servers += _find_servers_in_room(txn, room_id, stream_ordering, server_of)
            return servers

        return await self._api.run_db_interaction("sticky_find_servers", find_servers_txn)

    async def get_state_ids(
        self, room_id: str, keys: Collection[tuple[str, str]]
    ) -> dict[tuple[str, str], str]:
        """Return the events of a room's current state that have one of these types and keys."""

        def get_state_ids_txn(txn: LoggingTransaction) -> dict[tuple[str, str], str]:
            condition = " OR ".join(["(type = ? AND state_key = ?)"] * len(keys))
            arguments = [part for key in keys for part in key]
            txn.execute(
                "SELECT type, state_key, event_id FROM current_state_events "
                f"WHERE room_id = ? AND ({condition})",
                (room_id, *arguments),
            )
            return {(kind, state_key): event_id for kind, state_key, event_id in txn}

        return await self._api.run_db_interaction("sticky_get_state_ids", get_state_ids_txn)

    async def get_state_of_rooms(
        self, room_ids: Collection[str], keys: Collection[tuple[str, str]]
    ) -> list[tuple[str, str, str]]:
        """Return room, type and event ID of the current state that has these types and keys."""

        def get_state_of_rooms_txn(txn: LoggingTransaction) -> list[tuple[str, str, str]]:
            found: list[tuple[str, str, str]] = []
            for batch in batch_iter(room_ids, _ROOMS_AT_A_TIME):
                rooms, arguments = make_in_list_sql_clause(txn.database_engine, "room_id", batch)
                for key in keys:
                    txn.execute(
                        "SELECT room_id, type, event_id FROM current_state_events "
                        f"WHERE {rooms} AND type = ? AND state_key = ?",
                        (*arguments, *key),
                    )
                    found += txn.fetchall()
            return found

        return await self._api.run_db_interaction(
            "sticky_get_state_of_rooms", get_state_of_rooms_txn
        )

    async def get_received_ts(self, event_id: str) -> int | None:
        """Return when this server received an event, in ms since the epoch."""

        def get_received_ts_txn(txn: LoggingTransaction) -> int | None:
            txn.execute("SELECT received_ts FROM events WHERE event_id = ?", (event_id,))
            row = txn.fetchone()
            return row[0] if row else None

        return await self._api.run_db_interaction("sticky_get_received_ts", get_received_ts_txn)


def _find_events(txn: LoggingTransaction, part: Range, now_ts: int) -> list[Row]:
    return _find_by(txn, part, now_ts, "events AS e", "e.stream_ordering", unchecked=_BACKFILLED)


def _find_ex_outliers(txn: LoggingTransaction, part: Range, now_ts: int) -> list[Row]:
    joined = "ex_outlier_stream AS o INNER JOIN events AS e USING (event_id)"
    return _find_by(txn, part, now_ts, joined, "o.event_stream_ordering")


def _find_un_partial_stated(txn: LoggingTransaction, part: Range, now_ts: int) -> list[Row]:
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
) -> list[Row]:
    """Find events that may be sticky, by their place in a stream, in ``column``."""
    txn.execute(
        f"SELECT {_EVENT_COLUMNS}, {unchecked}, {column[0]}.instance_name, "
        f"{'NULL' if part.stream is Stream.UN_PARTIAL_STATED else column} FROM {joined} "
        "INNER JOIN event_json AS ej USING (event_id) "
        f"WHERE {_in_range(column, part)} AND {_of_writer(column[0], part)} AND {condition} "
        f"AND {_COULD_BE_STICKY} ORDER BY {column}",
        (*_range_arguments(part), *_could_be_sticky_arguments(now_ts)),
    )
    return txn.fetchall()


def _look_ahead(txn: LoggingTransaction, part: Range) -> tuple[bool, bool]:
    """Whether any current state has changed, and whether there are redactions.

    Mostly there is neither, and no more to ask.
    """
    txn.execute(
        "SELECT EXISTS (SELECT 1 FROM current_state_delta_stream AS d "
        f"WHERE {_in_range('d.stream_id', part)} AND {_of_writer('d', part)}), "
        "EXISTS (SELECT 1 FROM events AS e WHERE e.type = 'm.room.redaction' "
        f"AND {_in_range('e.stream_ordering', part)} AND {_of_writer('e', part)})",
        (*_range_arguments(part), *_range_arguments(part)),
    )
    has_state_changes, has_redactions = txn.fetchone() or (True, True)
    return bool(has_state_changes), bool(has_redactions)


def _find_joins(txn: LoggingTransaction, where: str, arguments: Sequence[object]) -> list[SeenJoin]:
    txn.execute(
        "SELECT d.state_key, d.room_id, d.stream_id, d.instance_name, "
        "e.stream_ordering >= d.stream_id FROM current_state_delta_stream AS d "
        "INNER JOIN events AS e ON e.event_id = d.event_id "
        "INNER JOIN room_memberships AS m ON m.event_id = d.event_id "
        "LEFT JOIN room_memberships AS previous ON previous.event_id = d.prev_event_id "
        f"WHERE {where} AND d.type = 'm.room.member' AND m.membership = 'join' "
        "AND (previous.membership IS NULL OR previous.membership <> 'join') ORDER BY d.stream_id",
        arguments,
    )
    return [SeenJoin(*row) for row in txn.fetchall()]


def _find_servers_in_room(
    txn: LoggingTransaction, room_id: str, since: int, server_of: ServerOf
) -> list[ServerInRoom]:
    joins = {
        join.member: join
        for join in _find_joins(txn, "d.room_id = ? AND d.stream_id > ?", (room_id, since))
        # At the end of a faster join everybody seems to have joined just now.
        if join.is_new
    }
    txn.execute(
        "SELECT d.destination, d.last_successful_stream_ordering FROM destination_rooms AS r "
        "INNER JOIN destinations AS d USING (destination) WHERE r.room_id = ?",
        (room_id,),
    )
    sent_up_to = dict(txn.fetchall())
    txn.execute(
        "SELECT state_key FROM current_state_events "
        "WHERE room_id = ? AND type = 'm.room.member' AND membership = 'join'",
        (room_id,),
    )
    # A server has joined since if all of its users have.
    by_server: dict[str, list[SeenJoin | None]] = {}
    for (user_id,) in txn:
        by_server.setdefault(server_of(user_id), []).append(joins.get(user_id))
    servers = []
    for server, seen in by_server.items():
        first = min(filter(None, seen), key=lambda join: join.stream_ordering, default=None)
        join = None if first is None or None in seen else attr.evolve(first, member=server)
        servers.append(ServerInRoom(server, room_id, join, sent_up_to.get(server) or 0))
    return servers


def _find_state_changes(
    txn: LoggingTransaction, part: Range, watched: Watched
) -> list[StateChange]:
    if not watched.rooms and not watched.rooms_for_types:
        return []
    condition, arguments = "TRUE", list(_range_arguments(part))
    if not watched.rooms:
        condition = f"d.type IN ({', '.join('?' * len(watched.types))})"
        arguments += watched.types
    txn.execute(
        "SELECT d.room_id, d.type, d.state_key FROM current_state_delta_stream AS d "
        f"WHERE {_in_range('d.stream_id', part)} AND {_of_writer('d', part)} AND {condition}",
        arguments,
    )
    return [
        StateChange(room_id, kind, state_key)
        for room_id, kind, state_key in txn.fetchall()
        if room_id in watched.rooms
        or (room_id in watched.rooms_for_types and kind in watched.types)
    ]


def _find_redacted(txn: LoggingTransaction, part: Range, watched: Watched) -> list[RedactedState]:
    txn.execute(
        "SELECT c.room_id, c.event_id, c.type FROM events AS e "
        "INNER JOIN redactions AS r ON r.event_id = e.event_id "
        "INNER JOIN current_state_events AS c ON c.event_id = r.redacts "
        f"WHERE {_in_range('e.stream_ordering', part)} AND {_of_writer('e', part)}",
        _range_arguments(part),
    )
    return [
        RedactedState(room_id, event_id)
        for room_id, event_id, kind in txn.fetchall()
        if room_id in watched.rooms_for_types and kind in watched.types
    ]


def unset_soft_failed(txn: LoggingTransaction, event_id: str) -> None:
    """Make Synapse treat a soft-failed event as any other."""
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


def _candidates(rows: Sequence[Row], now_ts: int) -> tuple[list[Candidate], bool]:
    """Return the sticky events among rows, and whether others may pass for such."""
    found: list[Candidate] = []
    has_others = False
    for row in rows:
        event_id, room_id, sender, stream_ordering, received_ts, origin_ts, text, metadata = row[:8]
        try:
            sticky = json.loads(text).get(EVENT_KEY)
            flags = json.loads(metadata)
        except ValueError:
            # What Synapse itself cannot read is no sticky event.
            logger.warning("Cannot read the JSON of event %r; treating it as ordinary", event_id)
            continue
        duration_ms = stickiness.effective_duration_ms(sticky)
        if duration_ms is None:
            continue
        expires_ts = stickiness.expires_ts(duration_ms, received_ts, origin_ts)
        if expires_ts <= now_ts:
            # Over already, and dated ahead: a response that shows it cannot know.
            has_others = has_others or origin_ts + duration_ms > now_ts
            continue
        found.append(
            Candidate(
                event_id=event_id,
                room_id=room_id,
                sender=sender,
                stream_ordering=stream_ordering,
                expires_ts=expires_ts,
                received_ts=received_ts,
                soft_failed=bool(flags.get("soft_failed")),
                refused=bool(flags.get("policy_server_spammy") or flags.get("spam_checker_spammy")),
                unchecked=bool(row[8]),
                sent_out=(
                    stream_ordering > 0
                    and flags.get("proactively_send", True)
                    and not flags.get("out_of_band_membership")
                ),
                found_at=None if row[10] is None else (row[9], row[10]),
            )
        )
    return found, has_others
