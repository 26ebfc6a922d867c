# SPDX-License-Identifier: AGPL-3.0-or-later
"""Who is owed what, and why it is not paid yet: for the admin to see."""

import enum
from collections.abc import Collection

import attr

from synapse_sticky.deliverable.index import StickyEvent
from synapse_sticky.deliverable.reader import IndexReader
from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.federation import Federation
from synapse_sticky.servers.ledger import Ledger
from synapse_sticky.servers.looper import Looper
from synapse_sticky.servers.watermarks import Watermarks
from synapse_sticky.storage.obstacles import Obstacle, ObstacleStore
from synapse_sticky.storage.store import StickyStore


class Reason(enum.Enum):
    """Why a server was not paid yet."""

    FRESH = "fresh"
    """Everything is so new that it is left to Synapse's own queue."""

    BACKING_OFF = "backing_off"
    """The server does not answer, and Synapse leaves it alone for a while."""

    TRYING = "trying"
    """It is being paid, or will be in a moment; ``obstacle`` says what went wrong."""


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Debt:
    """What one server is owed in one room.

    Attributes:
        event_ids: oldest first.
        since_ts: when the oldest of them became deliverable, in ms since the epoch.
        retry_ts: until when the server is left alone, if it is.
        obstacle: why the last try came to nothing, as far as this process knows.
    """

    server_name: str
    room_id: str
    event_ids: list[str]
    since_ts: int
    reason: Reason
    retry_ts: int | None
    obstacle: str


@attr.s(slots=True, frozen=True, auto_attribs=True)
class StoredDebt:
    """A debt as every process can tell.

    Attributes:
        owed: how many events.
        since_ts: when the oldest of them became deliverable, in ms since the epoch.
        obstacle: why the last try came to nothing, if there was one.
        retry_ts: until when the server is left alone, if it is.
    """

    server_name: str
    room_id: str
    owed: int
    since_ts: int
    reason: Reason
    obstacle: str | None
    retry_ts: int | None


class Debts:
    """Answers on any process; of servers that others send to, from what is stored."""

    def __init__(
        self,
        clock: Clock,
        store: StickyStore,
        obstacles: ObstacleStore,
        reader: IndexReader,
        federation: Federation,
        ledger: Ledger | None,
        looper: Looper | None,
        grace_period_ms: int,
    ) -> None:
        self._clock = clock
        self._store = store
        self._obstacles = obstacles
        self._reader = reader
        self._federation = federation
        self._ledger = ledger
        self._looper = looper
        self._grace_period_ms = grace_period_ms

    async def all(self) -> list[Debt]:
        """Everything that any server is owed, by server and room."""
        index, now_ts = self._reader.index, self._clock.now_ts()
        stored = Watermarks()
        stored.load(await self._store.get_watermarks(now_ts), index, now_ts)
        debts = []
        for room_id in list(index.rooms):
            for server_name in await self._federation.servers_in_room(room_id):
                ledger = self._ledger
                if ledger and ledger.has_begun and self._federation.sends_to(server_name):
                    # It knows better than what is stored.
                    owed = ledger.owed(server_name, room_id)
                elif self._federation.is_other(server_name):
                    owed = list(stored.owed(index, server_name, room_id, now_ts))
                else:
                    continue
                if owed:
                    debts.append(await self._describe(server_name, room_id, owed, now_ts))
        return sorted(debts, key=lambda debt: (debt.server_name, debt.room_id))

    async def stored(self, room_id: str | None = None) -> list[StoredDebt]:
        """Return the debts in one room or in all, the same on every process.

        They are those that are stored, so they lag a few seconds behind what the processes
        that send know.
        """
        index, now_ts = self._reader.index, self._clock.now_ts()
        rows = await self._store.get_watermarks(now_ts)
        obstacles = await self._obstacles.get_all()
        stored = Watermarks()
        stored.load((row for row in rows if room_id in (None, row.room_id)), index, now_ts)
        debts: list[StoredDebt] = []
        for name in list(index.rooms) if room_id is None else [room_id]:
            if not any(index.owed_after(name, 0, now_ts)):
                continue
            for server_name in await self._federation.servers_in_room(name):
                if self._federation.is_other(server_name):
                    owed = list(stored.owed(index, server_name, name, now_ts))
                    if owed:
                        obstacle = obstacles.get(server_name)
                        debts.append(
                            await self._describe_stored(server_name, owed, obstacle, now_ts)
                        )
            # Other requests need not wait until all rooms are looked at.
            await self._clock.sleep(0)
        return debts

    async def _describe_stored(
        self, server_name: str, owed: list[StickyEvent], obstacle: Obstacle | None, now_ts: int
    ) -> StoredDebt:
        oldest = owed[0]
        retry_ts = await self.backing_off_until_ts(server_name)
        join = self._reader.index.join(server_name, oldest.room_id)
        reason = Reason.TRYING
        if retry_ts is not None:
            reason = Reason.BACKING_OFF
        elif oldest.position + self._grace_period_ms > now_ts and (
            join is None or oldest.position >= join.position
        ):
            reason = Reason.FRESH
        elif obstacle is not None and obstacle.retry_ts > now_ts:
            retry_ts = obstacle.retry_ts
        return StoredDebt(
            server_name,
            oldest.room_id,
            len(owed),
            oldest.position,
            reason,
            obstacle.obstacle if obstacle is not None else None,
            retry_ts,
        )

    async def other_servers_in(self, room_id: str) -> set[str]:
        """Return the other servers in a room that this one may federate with."""
        servers = await self._federation.servers_in_room(room_id)
        return {name for name in servers if self._federation.is_other(name)}

    async def failing_since_ts(self, server_names: Collection[str]) -> dict[str, int]:
        """Return since when Synapse cannot reach servers, without those that it can reach."""
        return await self._federation.failing_since_ts(server_names)

    async def backing_off_until_ts(self, server_name: str) -> int | None:
        """Return until when Synapse leaves a server alone, None if it does not."""
        retry_ts = await self._federation.backing_off_until_ts(server_name)
        return retry_ts if retry_ts > self._clock.now_ts() else None

    async def _describe(
        self, server_name: str, room_id: str, owed: list[StickyEvent], now_ts: int
    ) -> Debt:
        retry_ts = await self._federation.backing_off_until_ts(server_name)
        reason = Reason.TRYING
        if retry_ts > now_ts:
            reason = Reason.BACKING_OFF
        elif self._ledger is not None and all(map(self._ledger.is_fresh, owed)):
            reason = Reason.FRESH
        return Debt(
            server_name=server_name,
            room_id=room_id,
            event_ids=[event.event_id for event in owed],
            since_ts=owed[0].position,
            reason=reason,
            retry_ts=retry_ts if reason is Reason.BACKING_OFF else None,
            obstacle=self._looper.obstacle(server_name) if self._looper is not None else "",
        )
