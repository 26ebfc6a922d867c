# SPDX-License-Identifier: AGPL-3.0-or-later
"""SQL on our own tables. The meaning is told by ``noticing/`` and ``deliverable/``."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import attr
from synapse.module_api import LoggingTransaction, ModuleApi

from synapse_sticky import stickiness
from synapse_sticky.seams.bounds import NOTHING_READ, Bounds
from synapse_sticky.seams.tables import unset_soft_failed
from synapse_sticky.storage.rows import (
    Admitted,
    Changes,
    EventChange,
    Item,
    JoinChange,
    RecordedEvent,
    Rejudged,
    WatermarkRow,
)


class LostRace(Exception):
    """Another process has given out positions since ours were read."""


SOFT_FAILED: Final = "soft_failed"
"""The reason that Synapse itself stores as well, with the event."""

Signal = Callable[[LoggingTransaction, int | None], None]
"""Called within a transaction that changed our tables: tells the other processes."""


class StickyStore:
    """Reads and writes our tables."""

    def __init__(self, api: ModuleApi, signal: Signal) -> None:
        self._api = api
        self._signal = signal

    async def get_progress(self) -> tuple[Bounds, int] | None:
        """Return how far Synapse's streams were read, and the last position; None at first."""
        return await self._api.run_db_interaction("sticky_get_progress", read_progress)

    async def get_recorded(
        self,
        now_ts: int,
        condition: str = "TRUE",
        arguments: Sequence[object] = (),
        limit: int | None = None,
    ) -> list[RecordedEvent]:
        """Return recorded, unexpired events in stream order, deliverable or held.

        Args:
            condition: SQL on the table ``e`` of events, and its arguments.
            limit: how many at most; None for all.
        """
        limited, limits = ("", ()) if limit is None else ("LIMIT ?", (limit,))

        def get_recorded_txn(txn: LoggingTransaction) -> list[RecordedEvent]:
            txn.execute(
                "SELECT f.event_id, f.room_id, f.sender, f.stream_ordering, f.expires_ts, h.reason "
                "FROM (SELECT * FROM synapse_sticky_events AS e "
                f"WHERE e.expires_ts > ? AND ({condition}) "
                f"ORDER BY e.stream_ordering, e.event_id {limited}) AS f "
                "LEFT JOIN synapse_sticky_held AS h ON h.event_id = f.event_id "
                "ORDER BY f.stream_ordering, f.event_id",
                (now_ts, *arguments, *limits),
            )
            return [
                RecordedEvent(*(*row, frozenset(r for *_, r in same if r is not None)))
                for row, same in itertools.groupby(txn, key=lambda row: row[:5])
            ]

        return await self._api.run_db_interaction("sticky_get_recorded", get_recorded_txn)

    async def count_held(self, now_ts: int, reason: str) -> list[tuple[str, str, int]]:
        """Return how many events of each sender in each room are held for a reason."""

        def count_held_txn(txn: LoggingTransaction) -> list[tuple[str, str, int]]:
            txn.execute(
                "SELECT e.room_id, e.sender, COUNT(*) FROM synapse_sticky_held AS h "
                "INNER JOIN synapse_sticky_events AS e USING (event_id) "
                "WHERE h.reason = ? AND e.expires_ts > ? GROUP BY e.room_id, e.sender",
                (reason, now_ts),
            )
            return [(room_id, sender, count) for room_id, sender, count in txn]

        return await self._api.run_db_interaction("sticky_count_held", count_held_txn)

    async def get_expiry_by_room(self, now_ts: int) -> list[tuple[str, int]]:
        """Return the rooms of recorded, unexpired events, and when the last of them expires."""

        def get_expiry_by_room_txn(txn: LoggingTransaction) -> list[tuple[str, int]]:
            txn.execute(
                "SELECT room_id, MAX(expires_ts) FROM synapse_sticky_events "
                "WHERE expires_ts > ? GROUP BY room_id",
                (now_ts,),
            )
            return [(room_id, expires_ts) for room_id, expires_ts in txn]

        return await self._api.run_db_interaction(
            "sticky_get_expiry_by_room", get_expiry_by_room_txn
        )

    async def get_expiry_by_sender(self) -> list[tuple[str, str, int]]:
        """Return rooms, each with the senders of events recorded there, and when those expire.

        Also of events that have expired and are not deleted yet.
        """

        def get_expiry_by_sender_txn(txn: LoggingTransaction) -> list[tuple[str, str, int]]:
            txn.execute(
                "SELECT room_id, sender, MAX(expires_ts) FROM synapse_sticky_events "
                "GROUP BY room_id, sender"
            )
            return [(room_id, sender, expires_ts) for room_id, sender, expires_ts in txn]

        return await self._api.run_db_interaction(
            "sticky_get_expiry_by_sender", get_expiry_by_sender_txn
        )

    async def get_rooms(
        self, now_ts: int, condition: str, arguments: Sequence[object]
    ) -> list[str]:
        """Return the rooms of recorded, unexpired events. See :meth:`get_recorded`."""

        def get_rooms_txn(txn: LoggingTransaction) -> list[str]:
            txn.execute(
                "SELECT DISTINCT e.room_id FROM synapse_sticky_events AS e "
                f"WHERE e.expires_ts > ? AND ({condition}) ORDER BY e.room_id",
                (now_ts, *arguments),
            )
            return [room_id for (room_id,) in txn]

        return await self._api.run_db_interaction("sticky_get_rooms", get_rooms_txn)

    async def mend_reasons(self) -> None:
        """Make reasons agree with positions, where an older version has moved events.

        That may be, while processes are restarted one by one for a new version.
        """

        def mend_reasons_txn(txn: LoggingTransaction) -> None:
            txn.execute(
                "DELETE FROM synapse_sticky_held WHERE event_id NOT IN "
                "(SELECT event_id FROM synapse_sticky_events WHERE position IS NULL)"
            )
            txn.execute(
                "INSERT INTO synapse_sticky_held (event_id, reason) "
                "SELECT event_id, held_reason FROM synapse_sticky_events WHERE position IS NULL "
                "AND held_reason IS NOT NULL "
                "AND event_id NOT IN (SELECT event_id FROM synapse_sticky_held)"
            )

        await self._api.run_db_interaction("sticky_mend_reasons", mend_reasons_txn)

    async def record(
        self,
        items: Sequence[tuple[int, Item]],
        read: Bounds,
        last_position: int | None,
        position: int,
        now_ts: int,
        watermarks: Sequence[WatermarkRow] = (),
        signals: bool = True,
        begins: bool = False,
    ) -> None:
        """Store the events and joins that were found, and how far was read, together.

        Args:
            items: each behind its position. Events that are no longer soft-failed stop
                being so for Synapse too.
            read: how far Synapse's streams were read to find them.
            last_position: the last position given out before, as known here; None if
                nothing was stored yet.
            position: the last position given out now.
            watermarks: of servers that have some of the events.
            signals: whether to signal it to the other processes.
            begins: whether this is the first record: what older ones have left is deleted.

        Raises:
            LostRace: if it is not what was said. Nothing is stored then.
        """
        event_rows, rejudged, join_rows = [], [], []
        reason_rows: list[tuple[str, str]] = []
        accepted: list[str] = []
        again: list[tuple[str]] = []
        for item_position, item in items:
            if isinstance(item, Admitted):
                found = item.candidate
                event_rows.append(
                    (
                        found.event_id,
                        found.room_id,
                        found.sender,
                        found.expires_ts,
                        found.stream_ordering,
                        item_position,
                        None if item.reasons else item_position,
                        min(item.reasons, default=None),
                        # Text, which PostgreSQL takes as a BOOLEAN too: see 0003_servers.sql.
                        "1" if item.owed else "0",
                    )
                )
                reason_rows += [(found.event_id, reason) for reason in sorted(item.reasons)]
                if found.soft_failed and SOFT_FAILED not in item.reasons:
                    accepted.append(found.event_id)
                if found.was_recorded:
                    again.append((found.event_id,))
            elif isinstance(item, Rejudged):
                event_id, before = item.event.event_id, item.event.reasons
                rejudged.append(
                    (
                        item_position,
                        None if item.reasons else item_position,
                        min(item.reasons or before, default=None),
                        event_id,
                    )
                )
                reason_rows += [(event_id, reason) for reason in sorted(item.reasons)]
                if SOFT_FAILED in before - item.reasons:
                    accepted.append(event_id)
            else:
                join_rows.append(
                    (
                        item.member,
                        item.room_id,
                        item.stream_ordering,
                        item.instance_name,
                        item_position,
                        now_ts + stickiness.MAX_DURATION_MS,
                    )
                )

        def record_txn(txn: LoggingTransaction) -> None:
            by_writer = json.dumps([read.events_by_writer, read.backfill_by_writer])
            progress = (read.events, read.backfill, read.un_partial_stated, by_writer, position)
            if begins:
                _forget_all(txn, last_position)
                txn.execute(
                    "INSERT INTO synapse_sticky_progress (events_stream, backfill_stream, "
                    "un_partial_stated_stream, by_writer, last_position) VALUES (?, ?, ?, ?, ?) "
                    "ON CONFLICT (lock) DO NOTHING",
                    progress,
                )
            else:
                txn.execute(
                    "UPDATE synapse_sticky_progress SET events_stream = ?, backfill_stream = ?, "
                    "un_partial_stated_stream = ?, by_writer = ?, last_position = ? "
                    "WHERE last_position = ?",
                    (*progress, last_position),
                )
            if txn.rowcount != 1:
                raise LostRace()
            _execute_batch(
                txn,
                "INSERT INTO synapse_sticky_events "
                "(event_id, room_id, sender, expires_ts, stream_ordering, revision, position, "
                "held_reason, owed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) "
                # There is a row if the event was purged, and stored once more.
                "ON CONFLICT (event_id) DO UPDATE SET room_id = excluded.room_id, "
                "sender = excluded.sender, expires_ts = excluded.expires_ts, "
                "stream_ordering = excluded.stream_ordering, revision = excluded.revision, "
                "position = excluded.position, held_reason = excluded.held_reason, "
                "owed = excluded.owed",
                event_rows,
            )
            _execute_batch(
                txn,
                "UPDATE synapse_sticky_events SET revision = ?, position = ?, held_reason = ? "
                "WHERE event_id = ?",
                rejudged,
            )
            _execute_batch(
                txn,
                "DELETE FROM synapse_sticky_held WHERE event_id = ?",
                [*again, *((event_id,) for *_, event_id in rejudged)],
            )
            _execute_batch(
                txn,
                "INSERT INTO synapse_sticky_held (event_id, reason) VALUES (?, ?) "
                "ON CONFLICT (event_id, reason) DO NOTHING",
                reason_rows,
            )
            for event_id in accepted:
                unset_soft_failed(txn, event_id)
            _execute_batch(
                txn,
                "INSERT INTO synapse_sticky_joins "
                "(member, room_id, stream_ordering, instance_name, position, expires_ts) "
                "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (member, room_id) DO UPDATE SET "
                "stream_ordering = excluded.stream_ordering, "
                "instance_name = excluded.instance_name, position = excluded.position, "
                "expires_ts = excluded.expires_ts "
                "WHERE synapse_sticky_joins.stream_ordering < excluded.stream_ordering",
                join_rows,
            )
            _store_watermarks(txn, watermarks, now_ts)
            if signals:
                # Who has this position already need not read it, unless only bounds moved.
                self._signal(txn, position if items else None)

        await self._api.run_db_interaction("sticky_record", record_txn)

    async def signal(self) -> None:
        """Signal the other processes to read what they lack of what is stored now."""

        def signal_txn(txn: LoggingTransaction) -> None:
            progress = read_progress(txn)
            if progress is not None:
                self._signal(txn, progress[1])

        await self._api.run_db_interaction("sticky_signal", signal_txn)

    async def get_changes(self, after: int, now_ts: int) -> Changes:
        """What changed after this position. See :func:`read_changes`."""
        return await self._api.run_db_interaction("sticky_get_changes", read_changes, after, now_ts)

    async def get_watermarks(self, now_ts: int) -> list[WatermarkRow]:
        """All watermarks that speak of something that may still be sticky."""

        def get_watermarks_txn(txn: LoggingTransaction) -> list[WatermarkRow]:
            txn.execute(
                "SELECT server_name, room_id, joined_position, settled_position, expires_ts, "
                "settled_from FROM synapse_sticky_watermarks WHERE expires_ts > ?",
                (now_ts,),
            )
            return [WatermarkRow(*row) for row in txn]

        return await self._api.run_db_interaction("sticky_get_watermarks", get_watermarks_txn)

    async def store_watermarks(self, rows: Iterable[WatermarkRow], now_ts: int) -> None:
        """Store watermarks. One never goes back, but with a newer join, or once it has expired."""
        await self._api.run_db_interaction(
            "sticky_store_watermarks", _store_watermarks, rows, now_ts
        )

    async def delete_expired(self, now_ts: int) -> tuple[int, dict[str, int]]:
        """Delete what has expired, and the decisions of admins that have ended.

        Returns:
            How many events that were, and how many of them were still held, by reason.
        """

        def delete_expired_txn(txn: LoggingTransaction) -> tuple[int, dict[str, int]]:
            txn.execute(
                "SELECT h.reason, COUNT(*) FROM synapse_sticky_held AS h "
                "INNER JOIN synapse_sticky_events AS e USING (event_id) "
                "WHERE e.expires_ts <= ? GROUP BY h.reason",
                (now_ts,),
            )
            held = dict(txn.fetchall())
            for table in ("synapse_sticky_joins", "synapse_sticky_watermarks"):
                txn.execute(f"DELETE FROM {table} WHERE expires_ts <= ?", (now_ts,))
            txn.execute("DELETE FROM synapse_sticky_overrides WHERE until_ts <= ?", (now_ts,))
            txn.execute(
                "DELETE FROM synapse_sticky_held WHERE event_id IN "
                "(SELECT event_id FROM synapse_sticky_events WHERE expires_ts <= ?)",
                (now_ts,),
            )
            txn.execute("DELETE FROM synapse_sticky_events WHERE expires_ts <= ?", (now_ts,))
            return txn.rowcount, held

        return await self._api.run_db_interaction("sticky_delete_expired", delete_expired_txn)


def _execute_batch(txn: LoggingTransaction, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Execute a statement for each row. Without rows, Synapse's own makes a query all the same."""
    if rows:
        txn.execute_batch(sql, rows)


def _forget_all(txn: LoggingTransaction, last_position: int | None) -> None:
    """Delete all that follows from Synapse's streams. What admins have decided stays."""
    txn.execute("DELETE FROM synapse_sticky_progress WHERE last_position = ?", (last_position,))
    for table in ("events", "held", "joins", "watermarks"):
        txn.execute(f"DELETE FROM synapse_sticky_{table}")


def _store_watermarks(txn: LoggingTransaction, rows: Iterable[WatermarkRow], now_ts: int) -> None:
    _execute_batch(
        txn,
        "INSERT INTO synapse_sticky_watermarks AS w (server_name, room_id, joined_position, "
        "settled_position, expires_ts, settled_from) "
        "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (server_name, room_id) DO UPDATE SET "
        "joined_position = excluded.joined_position, "
        "settled_position = excluded.settled_position, expires_ts = excluded.expires_ts, "
        "settled_from = excluded.settled_from "
        "WHERE w.joined_position < excluded.joined_position "
        "OR (w.joined_position = excluded.joined_position "
        "AND (w.settled_position < excluded.settled_position "
        "OR (w.settled_position = excluded.settled_position "
        "AND w.settled_from > excluded.settled_from))) OR w.expires_ts <= ?",
        [(*attr.astuple(row), now_ts) for row in rows],
    )


def read_changes(txn: Any, after: int, now_ts: int) -> Changes:
    """What changed after a position, without what has expired.

    Everything, with ``after`` = 0. If the stored position is smaller than
    ``after``, the tables were restored or dropped: the caller compares.
    """
    # First: what comes in while the rest is read comes again with the next changes.
    read, position = read_progress(txn) or (NOTHING_READ, 0)
    joins = read_joins(txn, after, now_ts)
    return Changes(list(iter_event_changes(txn, after, now_ts)), joins, position, read)


def read_progress(txn: Any) -> tuple[Bounds, int] | None:
    """Read how far Synapse's streams were read, and the last position; None at first."""
    txn.execute(
        "SELECT events_stream, backfill_stream, un_partial_stated_stream, by_writer, "
        "last_position FROM synapse_sticky_progress"
    )
    row = txn.fetchone()
    return (Bounds(*row[:3], *json.loads(row[3])), row[4]) if row else None


def read_joins(txn: Any, after: int, now_ts: int) -> list[JoinChange]:
    """Read the joins after a position."""
    txn.execute(
        "SELECT member, room_id, position, expires_ts, stream_ordering, instance_name "
        "FROM synapse_sticky_joins "
        "WHERE position > ? AND expires_ts > ? ORDER BY position",
        (after, now_ts),
    )
    return [JoinChange(*row) for row in txn]


def iter_event_changes(txn: Any, after: int, now_ts: int) -> Iterator[EventChange]:
    """Read the events that changed after a position, row by row."""
    txn.execute(
        "SELECT event_id, room_id, sender, position, expires_ts, stream_ordering, owed, "
        "held_reason "
        "FROM synapse_sticky_events "
        "WHERE revision > ? AND expires_ts > ? ORDER BY revision",
        (after, now_ts),
    )
    return (EventChange(*row) for row in txn)
