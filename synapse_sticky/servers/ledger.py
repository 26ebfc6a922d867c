# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the servers that this process sends to are owed, and what they have settled.

Bookkeeping only: ``looper.py`` pays. Kept in memory; the watermarks are stored
every few seconds. If what came since is lost in a kill, something is sent again.
"""

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final

from synapse_sticky.deliverable.index import StickyEvent
from synapse_sticky.deliverable.reader import IndexReader
from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.failures import log_failure
from synapse_sticky.seams.federation import Accepted
from synapse_sticky.servers.staging import Staging
from synapse_sticky.servers.watermarks import Watermarks
from synapse_sticky.storage.rows import EventChange, WatermarkRow
from synapse_sticky.storage.store import StickyStore

_WATERMARKS_PER_WRITE: Final = 500
# How long an event is left to Synapse at most that Synapse has not come to yet.
_MAX_LAG_MS: Final = 300_000
_LAG_LOOK_MS: Final = 1_000


class Ledger:
    """Who has settled what, and which events are still left to Synapse's own queue.

    Args:
        started_at: the stream ordering of the newest event when this process started.

    """

    def __init__(
        self,
        clock: Clock,
        store: StickyStore,
        reader: IndexReader,
        grace_period_ms: int,
        started_at: int,
    ) -> None:
        self._started_at = started_at
        self._is_outdated = False
        self._store = store
        self._reader = reader
        self._now_ts = clock.now_ts
        self._grace_period_ms = grace_period_ms
        self._watermarks: Watermarks | None = None
        # Settled before the watermarks were read.
        self._early: list[tuple[str, str, list[str]]] = []
        # Until when an event is left to Synapse's queue, and the same in order.
        self._fresh: dict[str, int] = {}
        self._fresh_by_ts: list[tuple[int, str, str]] = []
        self._staging = Staging()
        # By server and room: joined, and perhaps not ready yet.
        self._joining: set[tuple[str, str]] = set()

    @property
    def has_begun(self) -> bool:
        """Whether the watermarks are read: at first they are not."""
        return self._watermarks is not None

    @property
    def is_up_to_date(self) -> bool:
        """Whether the watermarks are read, and nothing makes them old."""
        return self.has_begun and not self._is_outdated

    async def begin(self, sends_to: Callable[[str], bool]) -> None:
        """Read the watermarks, and take note of the events in the index."""
        rows = [
            row
            for row in await self._store.get_watermarks(self._now_ts())
            if sends_to(row.server_name)
        ]
        index, now_ts = self._reader.index, self._now_ts()
        self._watermarks = Watermarks()
        self._watermarks.load(rows, index, now_ts)
        self._find_joining(rows, sends_to)
        early, self._early = self._early, []
        for server_name, room_id, event_ids in early:
            self.settle(server_name, room_id, event_ids)
        for room_id in index.rooms:
            for event in index.owed_after(room_id, 0, now_ts):
                if event.event_id not in self._fresh:
                    # Synapse's queues have forgotten what was in them.
                    self._leave_to_synapse(event.event_id, room_id, now_ts)

    def _find_joining(self, rows: Iterable[WatermarkRow], sends_to: Callable[[str], bool]) -> None:
        """Find the joins that were under way when this process started, as far as can be told.

        A server that has settled anything since its join is ready.
        """
        ready = {(row.server_name, row.room_id): row.joined_position for row in rows}
        for join in self._reader.index.joins:
            key = join.member, join.room_id
            if join.is_of_server and sends_to(join.member) and ready.get(key, 0) < join.position:
                self._joining.add(key)

    async def reload(self, sends_to: Callable[[str], bool]) -> None:
        """Read the watermarks again if events from before this process were noticed since.

        The indexer has stored with them which servers have them already.
        """
        if self._watermarks is None or not self._is_outdated:
            return
        rows = await self._store.get_watermarks(self._now_ts())
        self._is_outdated = False
        index, now_ts = self._reader.index, self._now_ts()
        self._watermarks.load(filter(lambda r: sends_to(r.server_name), rows), index, now_ts)

    # What is owed.

    def owed(self, server_name: str, room_id: str) -> list[StickyEvent]:
        """What a joined server is owed in a room, oldest first, fresh events included."""
        if self._watermarks is None:
            return []
        now_ts = self._now_ts()
        return list(self._watermarks.owed(self._reader.index, server_name, room_id, now_ts))

    def due(self, server_name: str, room_id: str) -> Iterator[StickyEvent]:
        """What is owed and not left to Synapse's queue, oldest first.

        Synapse does not send what is from before the server's join. To be used up
        before anything else happens.
        """
        if self._watermarks is None:
            return
        index, now_ts = self._reader.index, self._now_ts()
        for event in self._watermarks.owed(index, server_name, room_id, now_ts):
            if self.is_from_before_join(server_name, event) or not self.is_fresh(event):
                yield event

    def still_due(
        self, server_name: str, room_id: str, events: list[StickyEvent]
    ) -> list[StickyEvent]:
        """Those of these events of a room, oldest first, that are due even now."""
        due_ids = set()
        for event in self.due(server_name, room_id):
            if event.position > events[-1].position:
                break
            due_ids.add(event.event_id)
        return [event for event in events if event.event_id in due_ids]

    def is_from_before_join(self, server_name: str, event: StickyEvent) -> bool:
        """Whether an event is from before a server's join to the room, as far as that is known."""
        join = self._reader.index.join(server_name, event.room_id)
        return join is not None and event.position < join.position

    def is_fresh(self, event: StickyEvent) -> bool:
        """Whether an event is still left to Synapse's queue."""
        return self._fresh.get(event.event_id, 0) > self._now_ts()

    @property
    def has_grace_period_ended(self) -> bool:
        """Whether there is anything for :meth:`end_grace_periods`."""
        return bool(self._fresh_by_ts) and self._fresh_by_ts[0][0] <= self._now_ts()

    def end_grace_periods(self, synapse_at: int) -> set[str]:
        """The rooms in which an event is not fresh any more since this was last asked.

        Args:
            synapse_at: the stream ordering up to which Synapse has put events into its
                queues. What lies beyond stays fresh for some minutes.
        """
        now_ts, rooms, index = self._now_ts(), set(), self._reader.index
        while self.has_grace_period_ended:
            _, room_id, event_id = heapq.heappop(self._fresh_by_ts)
            if self._fresh.get(event_id, 0) > now_ts:
                continue
            event = index.get(event_id)
            if (
                event is not None
                and event.stream_ordering > synapse_at
                and event.position + self._grace_period_ms + _MAX_LAG_MS > now_ts
            ):
                self._fresh[event_id] = now_ts + _LAG_LOOK_MS
                heapq.heappush(self._fresh_by_ts, (now_ts + _LAG_LOOK_MS, room_id, event_id))
            else:
                self._fresh.pop(event_id, None)
                rooms.add(room_id)
        return rooms

    def _leave_to_synapse(self, event_id: str, room_id: str, until_ts: int) -> None:
        self._fresh[event_id] = until_ts
        heapq.heappush(self._fresh_by_ts, (until_ts, room_id, event_id))

    # What happens.

    def note_event(self, change: EventChange) -> None:
        """The index has taken over this event."""
        if not change.owed or change.position is None:
            return
        self._is_outdated |= change.stream_ordering <= self._started_at
        # A position is the time at which it was given, unless clocks went back.
        until_ts = min(change.position, self._now_ts()) + self._grace_period_ms
        self._leave_to_synapse(change.event_id, change.room_id, until_ts)
        if self._watermarks is not None:
            self._watermarks.advance(self._reader.index, change.room_id, self._now_ts())

    def note_join(self, server_name: str, room_id: str) -> None:
        """A server has joined a room."""
        self._joining.add((server_name, room_id))

    def note_accepted(self, server_name: str, accepted: Accepted) -> None:
        """A server has accepted events from Synapse's own queue.

        If it may throw them away, they are owed all the same.
        """
        room_id, event_ids = accepted.room_id, accepted.event_ids
        self.note_sent(server_name, room_id, len(event_ids), event_ids[-1])
        if not self.is_joining(server_name, room_id) and not self.newest_unread(
            server_name, room_id
        ):
            self.settle(server_name, room_id, accepted.sticky_ids)

    def note_sent(self, server_name: str, room_id: str, count: int, newest_id: str) -> None:
        """A server has accepted that many events, the last of which is this one."""
        self._staging.add(server_name, room_id, count, newest_id, self._now_ts())

    def note_read(self, server_name: str, room_id: str, event_id: str) -> None:
        """A server has read everything up to this event."""
        self._staging.has_read(server_name, room_id, event_id, self._now_ts())

    def newest_unread(self, server_name: str, room_id: str) -> str | None:
        """The newest event of more than a server can be trusted to have read."""
        return self._staging.newest_unread(server_name, room_id, self._now_ts())

    def note_asked(self, server_name: str, room_id: str) -> None:
        """A server is asked now whether it has read the newest event."""
        self._staging.ask(server_name, room_id, self._now_ts())

    def is_joining(self, server_name: str, room_id: str) -> bool:
        """Whether a server has joined, and may not be ready for events yet."""
        return (server_name, room_id) in self._joining

    def note_joined(self, server_name: str, room_id: str) -> None:
        """A server is ready for events since its join."""
        self._joining.discard((server_name, room_id))

    def settle(self, server_name: str, room_id: str, event_ids: Collection[str]) -> None:
        """These events of a room are settled for a server, known to the index or not."""
        if not event_ids:
            return
        if self._watermarks is None:
            self._early.append((server_name, room_id, list(event_ids)))
            return
        index = self._reader.index
        self._watermarks.settle(index, server_name, room_id, event_ids, self._now_ts())

    async def store(self) -> None:
        """Stores the watermarks that have moved, and forgets what is over."""
        now_ts, index = self._now_ts(), self._reader.index
        self._staging.expire(now_ts)
        self._joining = {key for key in self._joining if index.join(*key) is not None}
        if self._watermarks is None:
            return
        self._watermarks.expire(index, now_ts)
        while rows := self._watermarks.take_changed(_WATERMARKS_PER_WRITE):
            try:
                await self._store.store_watermarks(rows, now_ts)
            except Exception as error:
                self._watermarks.put_back(rows)
                log_failure("Cannot store what servers have acknowledged; trying again", error)
                return
