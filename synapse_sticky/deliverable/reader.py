# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every process knows what is deliverable.

The reader keeps the in-memory index up to date with what the one process that
gives out positions has stored. That one tells what it is, in a message. A lost message is
noticed when the next one does not go on where the index ends, or by the signal that follows
within a second; a lost signal by a slow poll.

Sticky events that are stored and not recorded yet are *expected*: every process knows of
them from the one that stored them, so that requests that should show them can wait, for a
bounded time.
"""

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

import attr
from synapse.module_api import ModuleApi
from synapse.types import PersistedEventPosition

from synapse_sticky import stickiness
from synapse_sticky.clients.since import Since
from synapse_sticky.config import StickyEventsConfig
from synapse_sticky.deliverable.index import StickyIndex
from synapse_sticky.deliverable.messages import Recorded, Stored, StoredEvent
from synapse_sticky.seams.background import Broadcast, Clock
from synapse_sticky.seams.bounds import Bounds
from synapse_sticky.seams.events import EventSource
from synapse_sticky.seams.failures import shielded
from synapse_sticky.seams.signal import Messenger
from synapse_sticky.seams.streams import StreamBounds, Waker
from synapse_sticky.seams.tables import SynapseTables
from synapse_sticky.storage.rows import Changes
from synapse_sticky.storage.store import (
    StickyStore,
    iter_event_changes,
    read_joins,
    read_progress,
)

logger = logging.getLogger(__name__)

MAX_WAIT_MS: Final = 500
"""How long a request waits for this process to catch up, at most."""

# How many times of receipt are remembered of events that the index does not know.
_MAX_RECEIVED: Final = 10_000

STORED: Final = "stored"
"""The kind of the message :class:`Stored`."""

RECORDED: Final = "recorded"
"""The kind of the message :class:`Recorded`."""


@attr.s(slots=True, frozen=True, auto_attribs=True)
class _Expected:
    """A sticky event that is stored and not recorded yet, as far as this process knows.

    Attributes:
        writer: the name of the process that stored it.
        until_ts: how long requests wait for it.
        is_late: whether clients may have been answered before this process expected it.
    """

    event: StoredEvent
    writer: str
    until_ts: int
    is_late: bool


class IndexReader:
    """Keeps a :class:`StickyIndex` up to date, and wakes clients for its news.

    Attributes:
        index: what is deliverable, as far as this process knows.
        refreshed_ts: when this process last compared it with what is stored, in ms since the
            epoch.
    """

    def __init__(
        self,
        api: ModuleApi,
        store: StickyStore,
        tables: SynapseTables,
        events: EventSource,
        clock: Clock,
        broadcast: Broadcast,
        messenger: Messenger,
        bounds: StreamBounds,
        waker: Waker,
        index: StickyIndex,
    ) -> None:
        self._api = api
        self._store = store
        self._tables = tables
        self._events = events
        self._clock = clock
        self._broadcast = broadcast
        self._messenger = messenger
        self._bounds = bounds
        self._waker = waker
        self.index = index
        self.refreshed_ts = clock.now_ts()
        self._listeners: list[Callable[[Changes], None]] = []
        self._wait_listeners: list[Callable[[], None]] = []
        self._stored_listeners: list[Callable[[Stored], None]] = []
        self._expected: dict[str, _Expected] = {}
        self._received: dict[str, int] = {}
        self._reset_listeners: list[Callable[[], None]] = []
        # How far Synapse's streams were read, as it is stored.
        self._stored_read = index.read

    def subscribe(self, listener: Callable[[Changes], None]) -> None:
        """Call this with the changes that the index has just taken over. It must not raise."""
        self._listeners.append(listener)

    def subscribe_to_waits(self, listener: Callable[[], None]) -> None:
        """Call this when a request waits for something to be noticed. It must not raise."""
        self._wait_listeners.append(listener)

    def subscribe_to_stored(self, listener: Callable[[Stored], None]) -> None:
        """Call this when any process has stored sticky events. It must not raise."""
        self._stored_listeners.append(listener)

    def subscribe_to_resets(self, listener: Callable[[], None]) -> None:
        """Call this when the tables were restored or dropped. It must not raise."""
        self._reset_listeners.append(listener)

    def start(self, config: StickyEventsConfig) -> None:
        """Begins to look for lost signals and to forget what has expired."""
        self._api.looping_background_call(
            self._poll, config.poll_interval_ms, desc="sticky_poll", run_on_all_instances=True
        )

    def on_signal(self, position: int | None) -> None:
        """Another process has changed the tables. Never raises.

        Args:
            position: the last position given out, if that is known.
        """
        if position is None or position > self.index.position:
            self._refresh_soon()

    def on_stored(self, stored: Stored) -> None:
        """This process has stored sticky events: tell all processes, this one too."""
        self._messenger.send(STORED, stored.encode)
        # Its clients are woken next.
        self._expect(stored, is_late=lambda event: False)

    def on_stored_elsewhere(self, message: str) -> None:
        """Another process has stored sticky events."""
        stored = Stored.decode(message)
        # Usually that comes here before Synapse's own news of these events, which wakes clients.
        seen = self._bounds.known_from(stored.writer)
        self._expect(stored, is_late=lambda event: event.stream_ordering <= seen)

    async def on_recorded(self, recorded: Recorded) -> None:
        """This process has recorded events."""
        if not self._go_on_with(recorded):
            await self.refresh()

    def on_recorded_elsewhere(self, message: str) -> None:
        """Another process has recorded events."""
        recorded = Recorded.decode(message)
        if not self._go_on_with(recorded) and recorded.position > self.index.position:
            # What came before did not arrive here.
            self._refresh_soon()

    def _go_on_with(self, recorded: Recorded) -> bool:
        """Take over events that were recorded right after those that are known here."""
        if self.index.position != recorded.after:
            return False
        self._take_over(Changes([*recorded.events], [], recorded.position, recorded.read))
        return True

    async def refresh(self) -> None:
        """Brings the index to what is stored now."""
        while True:
            index, after, read = self.index, self.index.position, self._stored_read
            changes = await self._store.get_changes(after, self._clock.now_ts())
            self.refreshed_ts = self._clock.now_ts()
            if self.index is index and index.position == after:
                break
            # Somebody else was faster, and what was read is no continuation.
            if changes.position <= self.index.position:
                return
        is_restored = changes.position < after
        if is_restored:
            logger.warning(
                "The tables synapse_sticky_* were restored or dropped while Synapse was running: "
                "every unexpired sticky event is delivered again"
            )
        if is_restored or read.is_beyond(changes.read):
            # The process that gives out positions says why it has started over.
            changes = await self._store.get_changes(0, self._clock.now_ts())
            # Not before: clients are told positions of the index.
            self.index = StickyIndex()
        self._take_over(changes)
        if is_restored:
            for listener in self._reset_listeners:
                listener()

    def _take_over(self, changes: Changes) -> None:
        released = [
            e.event_id
            for e in changes.events
            if e.position is not None and (e.held_reason or self.index.knows(e.event_id))
        ]
        self._events.forget_cached(released)
        self.index.apply(changes.events, changes.joins, changes.position, changes.read)
        self._stored_read = changes.read
        self._broadcast.notify_all()
        if not changes.events and not changes.joins:
            return
        for listener in self._listeners:
            listener(changes)
        rooms = {
            change.room_id
            for change in changes.events
            if not self._waits_for(change.event_id) and change.position is not None
        }
        users = {join.member for join in changes.joins if not join.is_of_server}
        if rooms or users:
            # Waking pokes whoever watches the streams, this process included:
            # not while one of those is calling us.
            self._api.delayed_background_call(0, self._wake, users, rooms, desc="sticky_wake")

    def note_read(self, read: Bounds) -> None:
        """This process has read Synapse's streams as far as that, and stored what matters."""
        self.index.note_read(read)
        self._broadcast.notify_all()

    def noticed_until_ts(self, event_id: str) -> int | None:
        """See :meth:`StickyIndex.sticky_until_ts`."""
        return self.index.sticky_until_ts(event_id)

    def has_passed(self, instance_name: str | None, stream_ordering: int) -> bool:
        """See :meth:`StickyIndex.has_passed`."""
        return self.index.has_passed(instance_name, stream_ordering)

    def live_among(self, event_ids: Iterable[str]) -> set[str]:
        """Return those of these IDs whose events are deliverable and unexpired."""
        return self.index.live_among(event_ids, self._clock.now_ts())

    @property
    def expects_events(self) -> bool:
        """Whether there are stored events that may not be noticed yet."""
        return bool(self._expected)

    async def wait_for_expected(self, is_wanted: Callable[[StoredEvent, str], bool]) -> None:
        """Wait, for a bounded time, until such expected events are noticed.

        Nobody waits for an event that was stored longer ago than a request waits.

        Args:
            is_wanted: called with an event and the name of the process that stored it.
        """
        while self._expected:
            self._forget_noticed()
            ends = [e.until_ts for e in self._expected.values() if is_wanted(e.event, e.writer)]
            if not ends:
                return
            self._hurry()
            await self._broadcast.wait(max(ends))

    def is_join_noticed(self, user_id: str, room_id: str, written: PersistedEventPosition) -> bool:
        """Whether a join is known here, or was found not to matter.

        A join matters if the room had something deliverable when it was read. What became
        deliverable later is due at a later position anyway.
        """
        join = self.index.join(user_id, room_id)
        return (join is not None and join.stream_ordering >= written.stream) or (
            self.index.has_passed(written.instance_name, written.stream)
        )

    async def resolve_since(self, since: Since) -> Since:
        """From where to read, for a client that says how far it has read.

        Usually that. If it is further than what is stored, the tables were
        restored or dropped since: then from the start, which delivers everything
        again rather than nothing.
        """
        if since.position > self.index.position:
            await self.refresh()
        return since if since.position <= self.index.position else Since(0)

    async def sticky_until_ts(self, event_id: str, duration_ms: int, origin_server_ts: int) -> int:
        """Until when an event is sticky, noticed or not, in ms since the epoch; 0 while held."""
        noticed = self.index.sticky_until_ts(event_id)
        if noticed is not None:
            return noticed
        expected = self._expected.get(event_id)
        if expected is not None:
            return expected.event.expires_ts
        latest = stickiness.expires_ts(duration_ms, self._clock.now_ts(), origin_server_ts)
        if latest <= self._clock.now_ts():
            return latest
        # It never changes, and whoever shows such an event does so again and again.
        received_ts = self._received.get(event_id)
        if received_ts is None:
            received_ts = await self._tables.get_received_ts(event_id)
            if received_ts is None:
                return latest
            if len(self._received) >= _MAX_RECEIVED:
                self._received.clear()
            self._received[event_id] = received_ts
        return stickiness.expires_ts(duration_ms, received_ts, origin_server_ts)

    async def wait_until(self, is_there: Callable[[], bool]) -> None:
        """Wait until that is true, for a bounded time."""
        until_ts = self._clock.now_ts() + MAX_WAIT_MS
        while not is_there():
            self._hurry()
            if not await self._broadcast.wait(until_ts):
                return

    def _hurry(self) -> None:
        for listener in self._wait_listeners:
            listener()

    def _forget_noticed(self) -> None:
        now_ts, index = self._clock.now_ts(), self.index
        self._expected = {
            event_id: expected
            for event_id, expected in self._expected.items()
            if expected.until_ts > now_ts
            and not index.has_passed(expected.writer, expected.event.stream_ordering)
        }

    def _expect(self, stored: Stored, is_late: Callable[[StoredEvent], bool]) -> None:
        until_ts = self._clock.now_ts() + MAX_WAIT_MS
        for event in stored.events:
            if not self.index.knows(event.event_id):
                expected = _Expected(event, stored.writer, until_ts, is_late(event))
                self._expected[event.event_id] = expected
        for listener in self._stored_listeners:
            listener(stored)

    def _waits_for(self, event_id: str) -> bool:
        """Whether all clients that Synapse wakes for this event wait for it; not any more now."""
        expected = self._expected.pop(event_id, None)
        return (
            expected is not None
            and not expected.is_late
            and expected.until_ts > self._clock.now_ts()
        )

    async def _wake(self, users: Collection[str], rooms: Collection[str]) -> None:
        self._waker.wake(users, rooms)

    def _refresh_soon(self) -> None:
        self._api.run_as_background_process("sticky_refresh", self._refresh_safely)

    async def _poll(self) -> None:
        self.index.expire(self._clock.now_ts())
        self._forget_noticed()
        await self._refresh_safely()

    async def _refresh_safely(self) -> None:
        with shielded(
            "Cannot read the tables synapse_sticky_*; clients get new sticky events late, "
            "trying again"
        ):
            await self.refresh()


def load_index(txn: Any, now_ts: int) -> StickyIndex:
    """Read everything unexpired, row by row: at start-up that may be a lot."""
    index = StickyIndex()
    # First: what comes in while the rest is read comes again with the next changes.
    progress = read_progress(txn)
    if progress is None:
        # Whatever there is, it is deleted at the first start.
        return index
    read, position = progress
    joins = read_joins(txn, 0, now_ts)
    index.apply(iter_event_changes(txn, 0, now_ts), joins, position, read)
    return index
