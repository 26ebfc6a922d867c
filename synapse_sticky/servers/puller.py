# SPDX-License-Identifier: AGPL-3.0-or-later
"""Fetches the events that nobody sends again after an outage.

A server whose transaction did not reach us sends the newest event of each room later on, or
nothing at all if it has gone itself. So in rooms that had sticky events we ask what is newest.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from typing import Final, TypeVar

from synapse.module_api import ModuleApi
from synapse.types import get_domain_from_id

from synapse_sticky import stickiness
from synapse_sticky.config import PullConfig
from synapse_sticky.control.settings import Settings
from synapse_sticky.deliverable.reader import IndexReader
from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.failures import shielded
from synapse_sticky.seams.pulling import BackingOff, HasNothingToTell, PullFailed, Pulling
from synapse_sticky.seams.streams import StreamBounds
from synapse_sticky.seams.tables import SynapseTables
from synapse_sticky.servers.outages import Outages, rooms_by_importance, servers_to_ask
from synapse_sticky.servers.walk import Receipt, Walk
from synapse_sticky.storage.rows import Changes
from synapse_sticky.storage.store import StickyStore

logger = logging.getLogger(__name__)

T = TypeVar("T")

# After a start Synapse has other things to do, and servers may send by themselves.
_START_AFTER_MS: Final = 3_000
# The servers that come back after an outage of the network do so one after the other.
_GATHER_MS: Final = 5_000
# Servers may come and go all the time. Each time all recorded events are looked at.
_GATHER_AGAIN_MS: Final = 15_000
# Rooms that are asked about at the same time, each server about one of them: those that hang do
# not hold up all rooms.
_AT_ONCE: Final = 3
# How often to look for events that have come with a gap before them.
_LOOK_INTERVAL_MS: Final = 20_000
# How long a room and a server are remembered after their last sticky event.
_REMEMBER_MS: Final = 3_600_000
# Between two requests in one room.
_PAUSE_MS: Final = 200
# For one server in one room; a request that has begun by then may take longer.
_TIME_MS: Final = 60_000
# A server that lets us wait longer in one room is left alone for a while, for others to be asked.
# What takes less than a second is not waiting.
_SLOW_MS: Final = 5_000
_WAITING_MS: Final = 1_000
# How long ago the end of an outage may be when a room is asked about.
_GAPS_MS: Final = 300_000
# Of a room's servers that are many times as many as are to answer, the others are not looked at.
_CONSIDERED: Final = 10


class Puller:
    """Asks other servers. Costs next to nothing while there was no outage."""

    def __init__(
        self,
        api: ModuleApi,
        clock: Clock,
        config: PullConfig,
        store: StickyStore,
        reader: IndexReader,
        settings: Settings,
        tables: SynapseTables,
        bounds: StreamBounds,
        pulling: Pulling,
    ) -> None:
        self._api = api
        self._clock = clock
        self._config = config
        self._store = store
        self._reader = reader
        self._settings = settings
        self._tables = tables
        self._bounds = bounds
        self._pulling = pulling
        self._outages = Outages(config.max_rooms)
        # When the last sticky event of a server in a room expires or has expired, by room and
        # server.
        self._live_until: dict[tuple[str, str], int] = {}
        self._has_begun = False
        # Up to where events were looked at for gaps before them.
        self._looked_up_to = bounds.current().events
        self._back: set[str] = set()
        self._gathered_ms = -_GATHER_AGAIN_MS
        # How many rooms are asked about now, and which servers are asked.
        self._asking = 0
        self._asked: set[str] = set()
        # When the next pull is to begin, None if nothing waits.
        self._wakes_ms: int | None = None

    def start(self) -> None:
        """Take this start for the end of an outage."""
        self._reader.subscribe(self._on_changes)
        self._api.looping_background_call(self._look, _LOOK_INTERVAL_MS, desc="sticky_pull_look")
        self._run(self._after_start)

    def _on_changes(self, changes: Changes) -> None:
        for event in changes.events:
            self._remember(event.room_id, event.sender, event.expires_ts)

    def _remember(self, room_id: str, sender: str, expires_ts: int) -> None:
        key = room_id, get_domain_from_id(sender)
        self._live_until[key] = max(expires_ts, self._live_until.get(key, expires_ts))

    async def _look(self) -> None:
        """Look whether an outage was noticed by nothing else."""
        since_ts = self._clock.now_ts() - _REMEMBER_MS
        for key in [key for key, until_ts in self._live_until.items() if until_ts < since_ts]:
            del self._live_until[key]
        await self._run_safely(self._after_gaps if self._has_begun else self._after_start)

    def on_server_back(self, server_name: str) -> None:
        """A server is back that could not be reached: it may not have reached us either.

        Never raises.
        """
        if not self._back:
            now_ms = self._clock.monotonic_ms()
            wait_ms = max(_GATHER_MS, self._gathered_ms + _GATHER_AGAIN_MS - now_ms)
            self._clock.call_later(wait_ms, lambda: self._run(self._after_return))
        self._back.add(server_name)

    def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        self._api.run_as_background_process("sticky_pull", self._run_safely, work)

    async def _run_safely(self, work: Callable[[], Awaitable[None]]) -> None:
        with shielded("Cannot fetch the events that were missed in an outage"):
            await work()
        self._wake()

    def _wake(self) -> None:
        """Let the next pull begin when a room is due."""
        next_ms = self._outages.next_ms
        if next_ms is None:
            if not self._asking:
                self._pulling.forget_servers()
            return
        if self._asking < _AT_ONCE and (self._wakes_ms is None or next_ms < self._wakes_ms):
            self._wakes_ms = next_ms
            wait_ms = max(0, next_ms - self._clock.monotonic_ms())
            self._clock.call_later(wait_ms, lambda: self._on_time(next_ms))

    def _on_time(self, wakes_ms: int) -> None:
        if wakes_ms == self._wakes_ms:
            self._wakes_ms = None
            self._run(self._pull)

    async def _after_start(self) -> None:
        # At once: the rows of events that have expired meanwhile are deleted soon.
        for recorded in await self._store.get_expiry_by_sender():
            self._remember(*recorded)
        self._has_begun = True
        rooms = rooms_by_importance(self._config.rooms, self._live_until)
        self._outages.add(rooms, self._clock.monotonic_ms() + _START_AFTER_MS)

    async def _after_return(self) -> None:
        back, self._back = self._back, set()
        self._gathered_ms = now_ms = self._clock.monotonic_ms()
        self._outages.on_back(back, now_ms)
        live = {key: ts for key, ts in self._live_until.items() if key[1] in back}
        configured = [room_id for room_id in self._config.rooms if await self._is_in(room_id, back)]
        self._outages.add(rooms_by_importance(configured, live), now_ms)

    async def _is_in(self, room_id: str, server_names: Collection[str]) -> bool:
        in_room = await self._pulling.servers_in_room(room_id)
        return not set(server_names).isdisjoint(in_room)

    async def _after_gaps(self) -> None:
        """Ask about the rooms in which another server's new event has a gap before it.

        If only requests to us fail, nothing else tells.
        """
        after, up_to = self._looked_up_to, self._bounds.current().events
        rooms = {room_id for room_id, _ in self._live_until} | set(self._config.rooms)
        found = await self._tables.find_gaps(after, up_to) if rooms and after < up_to else []
        self._looked_up_to = up_to
        now_ts, now_ms = self._clock.now_ts(), self._clock.monotonic_ms()
        gaps: dict[str, int] = {}
        for room_id, sender, received_ts in found:
            if room_id in rooms and not self._api.is_mine(sender):
                came_ms = now_ms - (now_ts - received_ts)
                gaps[room_id] = max(came_ms, gaps.get(room_id, came_ms))
        self._outages.add_gaps(gaps, now_ms)

    async def _pull(self) -> None:
        if self._asking == _AT_ONCE:
            return
        self._asking += 1
        counts: Counter[Receipt] = Counter()
        try:
            while (room_id := self._outages.due(self._clock.monotonic_ms())) is not None:
                # The next room, while this one is asked about.
                self._wake()
                failed: set[str] = set()
                was_answered = False
                try:
                    was_answered = await self._pull_room(room_id, counts, failed)
                finally:
                    self._outages.ended(room_id, was_answered, self._clock.monotonic_ms(), failed)
        finally:
            self._asking -= 1
            if counts[Receipt.ACCEPTED]:
                logger.info(
                    "Fetched %d events from other servers, in rooms with sticky events, that were "
                    "missed while this server was not reachable",
                    counts[Receipt.ACCEPTED],
                )

    async def _pull_room(self, room_id: str, counts: Counter[Receipt], failed: set[str]) -> bool:
        """Ask the servers of a room; whether any has answered, or there is none to ask.

        Args:
            failed: takes those that have not answered, or were not asked for now.
        """
        if not (await self._settings.of_room(room_id)).enabled:
            return True
        if await self._pulling.is_joining(room_id):
            return False
        in_room = await self._pulling.servers_in_room(room_id)
        by_importance = servers_to_ask(room_id, in_room, self._live_until)
        servers = self._outages.failed_last(room_id, by_importance)
        wanted = self._config.servers_per_room
        answered = asked_in_vain = 0
        del servers[wanted * _CONSIDERED :]
        while servers and max(answered, asked_in_vain) < wanted:
            # Rather one that is not asked about another room at the moment.
            server_name = min(servers, key=self._asked.__contains__)
            servers.remove(server_name)
            if not await self._may_ask(server_name, room_id):
                continue
            while server_name in self._asked:
                await self._clock.sleep(_PAUSE_MS)
            failed.add(server_name)
            if self._outages.avoids(server_name, self._clock.monotonic_ms()):
                continue
            visit = _Visit(self._clock)
            self._asked.add(server_name)
            try:
                counts += await self._pull_from(server_name, room_id, visit)
                failed.discard(server_name)
                answered += 1
            except BackingOff:
                continue
            except PullFailed as error:
                asked_in_vain += 1
                if not isinstance(error, HasNothingToTell):
                    self._outages.avoid(server_name, self._clock.monotonic_ms())
            finally:
                self._asked.remove(server_name)
            if visit.is_slow:
                self._outages.avoid(server_name, self._clock.monotonic_ms(), has_failed=False)
        return bool(answered) or not in_room

    async def _may_ask(self, server_name: str, room_id: str) -> bool:
        if self._settings.block_of_server(server_name) is not None:
            return False
        return await self._pulling.may_send(server_name, room_id)

    async def _pull_from(self, server_name: str, room_id: str, visit: "_Visit") -> Counter[Receipt]:
        """Fetch from a server the events of a room that are not known here.

        Raises:
            PullFailed: if it does not answer, or too slowly.
        """
        newest = await visit.timed(self._pulling.newest(server_name, room_id))
        now_ts = self._clock.now_ts()
        # A server may have sent its newest event by now, and not those before it.
        waited_ms = self._clock.monotonic_ms() - self._outages.waits_since_ms(room_id)
        since_ts = now_ts - waited_ms - _GAPS_MS
        unknown = await self._tables.find_unknown(room_id, since_ts, get_domain_from_id)
        oldest_ts = max(unknown.begins_ts, now_ts - stickiness.MAX_DURATION_MS)
        walk = Walk([*newest, *unknown.gaps], oldest_ts, unknown.history)
        walk.know(await self._pulling.known_among(walk.to_look_up()))
        while wanted := walk.wanted():
            await visit.pause()
            page = self._pulling.page(server_name, room_id, wanted)
            walk.take(await visit.timed(page))
            walk.know(await self._pulling.known_among(walk.to_look_up()))
        while (event := walk.next()) is not None:
            # It may have come by itself, and Synapse may have fetched those before it.
            named = [event.event_id, *event.prev_event_ids]
            walk.know(await self._pulling.known_among(named))
            if not walk.choose(event):
                continue
            if not await self._may_ask(server_name, room_id):
                break
            received = self._pulling.receive(server_name, event)
            walk.took(event, await visit.timed(received))
            visit.check_time()
        await visit.pause()
        return walk.counts


class _Visit:
    """The time that one server takes in one room."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until_ms = clock.monotonic_ms() + _TIME_MS
        self._waited_ms = 0

    @property
    def is_slow(self) -> bool:
        """Whether the server lets us wait for long, for answers to us and to Synapse."""
        return self._waited_ms > _SLOW_MS

    async def timed(self, work: Awaitable[T]) -> T:
        """Wait for an answer."""
        began_ms = self._clock.monotonic_ms()
        try:
            return await work
        finally:
            took_ms = self._clock.monotonic_ms() - began_ms
            if took_ms > _WAITING_MS:
                self._waited_ms += took_ms

    async def pause(self) -> None:
        """Wait between two requests.

        Raises:
            PullFailed: if there is no time left.
        """
        await self._clock.sleep(_PAUSE_MS)
        self.check_time()

    def check_time(self) -> None:
        """Raise :exc:`PullFailed` if there is no time left."""
        if self._clock.monotonic_ms() > self._until_ms:
            raise PullFailed("it takes long")
