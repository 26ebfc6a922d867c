# SPDX-License-Identifier: AGPL-3.0-or-later
"""SQL that counts and lists the rows of our tables, for the server's admin. It only reads."""

import attr
from synapse.module_api import LoggingTransaction, ModuleApi


@attr.s(slots=True, auto_attribs=True)
class RoomCounts:
    """How many unexpired sticky events a room has.

    Attributes:
        live: the deliverable ones.
        held: the others, by the reason; an event may have several.
    """

    live: int = 0
    held: dict[str, int] = attr.Factory(dict)


@attr.s(slots=True, frozen=True, auto_attribs=True)
class EventReport:
    """An unexpired sticky event, deliverable or held."""

    event_id: str
    sender: str
    expires_ts: int
    position: int | None
    held_reasons: list[str] = attr.Factory(list)


_UNEXPIRED = "FROM synapse_sticky_events WHERE expires_ts > ?"
_HELD = (
    "FROM synapse_sticky_held AS h INNER JOIN synapse_sticky_events AS e USING (event_id) "
    "WHERE e.position IS NULL AND e.expires_ts > ?"
)


class Reports:
    """Reads our tables."""

    def __init__(self, api: ModuleApi) -> None:
        self._api = api

    async def get_schema_version(self) -> int:
        """Return the version that our tables have."""

        def get_schema_version_txn(txn: LoggingTransaction) -> int:
            txn.execute("SELECT version FROM synapse_sticky_schema")
            (version,) = txn.fetchall()[0]
            return int(version)

        return await self._api.run_db_interaction(
            "sticky_get_schema_version", get_schema_version_txn
        )

    async def count(self, now_ts: int, room_id: str | None = None) -> dict[str, RoomCounts]:
        """Count the unexpired events of one room or of all, by room."""
        condition = "" if room_id is None else " AND room_id = ?"
        arguments = (now_ts,) if room_id is None else (now_ts, room_id)

        def count_txn(txn: LoggingTransaction) -> dict[str, RoomCounts]:
            txn.execute(
                f"SELECT room_id, COUNT(position) {_UNEXPIRED}{condition} GROUP BY room_id",
                arguments,
            )
            rooms = {name: RoomCounts(live) for name, live in txn}
            txn.execute(
                f"SELECT e.room_id, h.reason, COUNT(*) {_HELD}{condition} "
                "GROUP BY e.room_id, h.reason ORDER BY h.reason",
                arguments,
            )
            for name, reason, count in txn:
                rooms[name].held[reason] = count
            return rooms

        return await self._api.run_db_interaction("sticky_count", count_txn)

    async def count_held(self, now_ts: int) -> dict[str, int]:
        """Return how many unexpired events are held for each reason, over all rooms."""

        def count_held_txn(txn: LoggingTransaction) -> dict[str, int]:
            txn.execute(f"SELECT h.reason, COUNT(*) {_HELD} GROUP BY h.reason", (now_ts,))
            return dict(txn.fetchall())

        return await self._api.run_db_interaction("sticky_count_held", count_held_txn)

    async def list_events(
        self, room_id: str, now_ts: int, start: int, limit: int, held: bool | None = None
    ) -> tuple[list[EventReport], int]:
        """Return a page of a room's unexpired events, oldest first, and how many there are.

        Args:
            held: which events: those that are held, those that are not, or all (None).
        """
        chosen = {None: "", True: " AND position IS NULL", False: " AND position IS NOT NULL"}
        listed = f"{_UNEXPIRED} AND room_id = ?{chosen[held]}"
        page = f"{listed} ORDER BY stream_ordering LIMIT ? OFFSET ?"
        arguments = (now_ts, room_id, limit, start)

        def list_events_txn(txn: LoggingTransaction) -> tuple[list[EventReport], int]:
            txn.execute(f"SELECT COUNT(*) {listed}", (now_ts, room_id))
            (total,) = txn.fetchall()[0]
            txn.execute(f"SELECT event_id, sender, expires_ts, position {page}", arguments)
            events = [EventReport(*row) for row in txn]
            txn.execute(
                f"SELECT event_id, h.reason {_HELD} "
                f"AND event_id IN (SELECT event_id {page}) ORDER BY h.reason",
                (now_ts, *arguments),
            )
            by_id = {event.event_id: event for event in events}
            for event_id, reason in txn:
                by_id[event_id].held_reasons.append(reason)
            return events, total

        return await self._api.run_db_interaction("sticky_list_events", list_events_txn)

    async def get_live(self, room_id: str, now_ts: int) -> dict[str, int]:
        """Return when the deliverable events of a room expire, by their IDs, oldest first."""

        def get_live_txn(txn: LoggingTransaction) -> dict[str, int]:
            txn.execute(
                f"SELECT event_id, expires_ts {_UNEXPIRED} AND room_id = ? "
                "AND position IS NOT NULL ORDER BY position",
                (now_ts, room_id),
            )
            return dict(txn.fetchall())

        return await self._api.run_db_interaction("sticky_get_live", get_live_txn)
