# SPDX-License-Identifier: AGPL-3.0-or-later
"""Fetches the events that nobody sends again after an outage.

A server whose transaction did not reach us sends the newest event of each room later on, or
nothing at all if it has gone itself. So in rooms that had sticky events we ask what is newest.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
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
from synapse_sticky.seams.tables import SynapseTables
from synapse_sticky.servers.outages import Outages, rooms_by_importance, servers_to_ask
from synapse_sticky.servers.walk import Receipt, Walk
from synapse_sticky.storage.store import StickyStore

logger = logging.getLogger(__name__)

T = TypeVar("T")

# After a start Synapse has other things to do, and servers may send by themselves.
_START_AFTER_MS: Final = 3_000
# The servers that come back after an outage of the network do so one after the other.
_GATHER_MS: Final = 5_000
# Servers may come and go all the time. Each time all recorded events are looked at.
_GATHER_AGAIN_MS: Final = 15_000
# Between two requests.
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
    """Asks other servers, one at a time. Costs nothing while there was no outage."""

    def __init__(
        self,
        api: ModuleApi,
        clock: Clock,
        config: PullConfig,
        store: StickyStore,
        reader: IndexReader,
        settings: Settings,
        tables: SynapseTables,
        pulling: Pulling,
    ) -> None:
        self._api = api
        self._clock = clock
        self._config = config
        self._store = store
        self._reader = reader
        self._settings = settings
        self._tables = tables
        self._pulling = pulling
        self._outages = Outages(config.max_rooms)
        # When the last sticky event of a server in a room expires, by room and server.
        self._live_until: dict[tuple[str, str], int] = {}
        self._back: set[str] = set()
        self._gathered_ms = -_GATHER_AGAIN_MS
        self._is_pulling = False
        # How long a server has let us wait in one room, for answers to us and to Synapse.
        self._waited_ms = 0
        # When the next pull is to begin, None if nothing waits.
        self._wakes_ms: int | None = None

    def start(self) -> None:
        """Take this start for the end of an outage."""
        self._run(self._after_start)

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
        next_ms = self._outages.next_ms
        if next_ms is None:
            self._live_until = {}
            self._pulling.forget_servers()
        elif not self._is_pulling and (self._wakes_ms is None or next_ms < self._wakes_ms):
            self._wakes_ms = next_ms
            wait_ms = max(0, next_ms - self._clock.monotonic_ms())
            self._clock.call_later(wait_ms, lambda: self._on_time(next_ms))

    def _on_time(self, wakes_ms: int) -> None:
        if wakes_ms == self._wakes_ms:
            self._wakes_ms = None
            self._run(self._pull)

    async def _after_start(self) -> None:
        # At once: the rows of events that have expired meanwhile are deleted soon.
        self._live_until = await self._read()
        rooms = rooms_by_importance(self._config.rooms, self._live_until)
        self._outages.add(rooms, self._clock.monotonic_ms() + _START_AFTER_MS)

    async def _after_return(self) -> None:
        back, self._back = self._back, set()
        now_ts, now_ms = self._clock.now_ts(), self._clock.monotonic_ms()
        self._gathered_ms = now_ms
        self._outages.on_back(back, now_ms)
        if not self._reader.index.rooms:
            return
        read = await self._read()
        self._live_until.update(read)
        live = {key: ts for key, ts in read.items() if key[1] in back and ts > now_ts}
        self._outages.add(rooms_by_importance((), live), now_ms)

    async def _read(self) -> dict[tuple[str, str], int]:
        live_until: dict[tuple[str, str], int] = {}
        for room_id, sender, expires_ts in await self._store.get_expiry_by_sender():
            key = room_id, get_domain_from_id(sender)
            live_until[key] = max(expires_ts, live_until.get(key, expires_ts))
        return live_until

    async def _pull(self) -> None:
        if self._is_pulling:
            return
        self._is_pulling = True
        counts: Counter[Receipt] = Counter()
        try:
            while (room_id := self._outages.due(self._clock.monotonic_ms())) is not None:
                failed: set[str] = set()
                was_answered = False
                try:
                    was_answered = await self._pull_room(room_id, counts, failed)
                finally:
                    self._outages.ended(room_id, was_answered, self._clock.monotonic_ms(), failed)
        finally:
            self._is_pulling = False
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
        servers = servers_to_ask(room_id, in_room, self._live_until)
        wanted = self._config.servers_per_room
        answered = asked_in_vain = 0
        for server_name in servers[: wanted * _CONSIDERED]:
            if max(answered, asked_in_vain) == wanted:
                break
            if not await self._may_ask(server_name, room_id):
                continue
            failed.add(server_name)
            if self._outages.avoids(server_name, self._clock.monotonic_ms()):
                continue
            try:
                counts += await self._pull_from(server_name, room_id)
                failed.discard(server_name)
                answered += 1
            except BackingOff:
                continue
            except PullFailed as error:
                asked_in_vain += 1
                if not isinstance(error, HasNothingToTell):
                    self._outages.avoid(server_name, self._clock.monotonic_ms())
            if self._waited_ms > _SLOW_MS:
                self._outages.avoid(server_name, self._clock.monotonic_ms())
        return bool(answered) or not servers

    async def _may_ask(self, server_name: str, room_id: str) -> bool:
        if self._settings.block_of_server(server_name) is not None:
            return False
        return await self._pulling.may_send(server_name, room_id)

    async def _pull_from(self, server_name: str, room_id: str) -> Counter[Receipt]:
        """Fetch from a server the events of a room that are not known here.

        Raises:
            PullFailed: if it does not answer, or too slowly.
        """
        self._waited_ms = 0
        until_ms = self._clock.monotonic_ms() + _TIME_MS
        newest = await self._timed(self._pulling.newest(server_name, room_id))
        now_ts = self._clock.now_ts()
        # A server may have sent its newest event by now, and not those before it.
        since_ts = now_ts - _GAPS_MS
        unknown = await self._tables.find_unknown(room_id, since_ts, get_domain_from_id)
        oldest_ts = max(unknown.begins_ts, now_ts - stickiness.MAX_DURATION_MS)
        walk = Walk([*newest, *unknown.gaps], oldest_ts, unknown.history)
        walk.know(await self._pulling.known_among(walk.to_look_up()))
        while wanted := walk.wanted():
            await self._pause(until_ms)
            page = self._pulling.page(server_name, room_id, wanted)
            walk.take(await self._timed(page))
            walk.know(await self._pulling.known_among(walk.to_look_up()))
        while (event := walk.next()) is not None:
            if await self._pulling.known_among([event.event_id]):
                walk.know([event.event_id])
            else:
                received = self._pulling.receive(server_name, event)
                walk.took(event, await self._timed(received))
            self._check_time(until_ms)
        await self._pause(until_ms)
        return walk.counts

    async def _timed(self, work: Awaitable[T]) -> T:
        began_ms = self._clock.monotonic_ms()
        try:
            return await work
        finally:
            took_ms = self._clock.monotonic_ms() - began_ms
            if took_ms > _WAITING_MS:
                self._waited_ms += took_ms

    async def _pause(self, until_ms: int) -> None:
        await self._clock.sleep(_PAUSE_MS)
        self._check_time(until_ms)

    def _check_time(self, until_ms: int) -> None:
        if self._clock.monotonic_ms() > until_ms:
            raise PullFailed("it takes long")
