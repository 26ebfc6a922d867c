# SPDX-License-Identifier: AGPL-3.0-or-later
"""Out to servers: pays what Synapse's own queue did not deliver.

Fresh events are left to Synapse's queue for a grace period. What a server still
has not acknowledged then, and all that one is owed which has just joined, is sent
by us: one room at a time, oldest first, at most 50 events in a transaction, one
transaction at a time to each server, and several servers at once.

A server that took events has not read them yet: Synapse stages them, throws some
away if too many are staged, and ignores all while its join is still under way. So
after each transaction of ours we ask whether it has arrived, before the next one.
And of a server that was sent a lot by Synapse's queue, as after an outage, we ask
for each sticky event whether it is there, once the server has read what it took.

Cost follows what is owed. Where nothing is owed, nothing is looked at.
"""

import heapq
import logging
from collections.abc import Collection, Iterable, Iterator
from typing import Final

import attr
from synapse.module_api import ModuleApi

from synapse_sticky.config import StickyEventsConfig
from synapse_sticky.index import StickyEvent
from synapse_sticky.reader import IndexReader
from synapse_sticky.seams.federation import Accepted, Answer, CannotReach, Federation
from synapse_sticky.staging import Staging
from synapse_sticky.stickiness import MAX_DURATION_MS
from synapse_sticky.storage.store import Changes, StickyStore
from synapse_sticky.watermarks import Watermarks

logger = logging.getLogger(__name__)

MAX_EVENTS_PER_TRANSACTION: Final = 50

_TICK_MS: Final = 500
# How often something is tried that a server took but did not name in its answer
# (it does not know the room yet), or took and does not have afterwards.
_MAX_TRIES: Final = 6
# The same for a server that has just joined: joining a large room may take minutes.
_MAX_TRIES_AFTER_JOIN: Final = 20
# How often something is tried that a server refused: Synapse reports passing faults
# so too.
_MAX_REFUSALS: Final = 4
_FIRST_PAUSE_MS: Final = 1_000
_LONGEST_PAUSE_MS: Final = 60_000
# How long it may take this process to learn who is in the room, after a join was noticed.
_JOIN_SETTLES_MS: Final = 10_000
# How long to wait until a server has read what it took.
_MAX_DIGESTION_MS: Final = 10_000
_FIRST_LOOK_MS: Final = 20
_LONGEST_LOOK_MS: Final = 1_000
_WATERMARKS_PER_WRITE: Final = 500


@attr.s(slots=True, auto_attribs=True)
class _Tries:
    count: int = 0
    refusals: int = 0
    next_ts: int = 0


@attr.s(slots=True, auto_attribs=True)
class _Debtor:
    """A server that is owed something, as far as we know.

    Attributes:
        rooms: in which it may be.
        next_ts: not to be tried before.
        obstacle: why the last try came to nothing.
    """

    rooms: dict[str, None] = attr.Factory(dict)
    next_ts: int = 0
    paying: bool = False
    obstacle: str = ""
    tries: dict[str, _Tries] = attr.Factory(dict)
    # For the log.
    paid: int = 0
    oldest_ts: int = 0


class Looper:
    """Pays the servers that this process sends to."""

    def __init__(
        self,
        api: ModuleApi,
        store: StickyStore,
        reader: IndexReader,
        federation: Federation,
        config: StickyEventsConfig,
    ) -> None:
        self._api = api
        self._store = store
        self._reader = reader
        self._federation = federation
        self._now_ts = reader.now_ts
        self._grace_period_ms = config.federation_grace_period_ms
        self._max_servers = config.max_servers_at_once
        self._poll_interval_ms = config.poll_interval_ms
        self._watermarks: Watermarks | None = None
        self._staging = Staging()
        # By server and event: accepted, but perhaps thrown away. And until when to remember.
        self._claimed: dict[tuple[str, str], int] = {}
        # By server and room: joined, and not seen to have read anything since.
        self._joining: set[tuple[str, str]] = set()
        # Accepted before the watermarks were read.
        self._early: list[tuple[str, str, list[str]]] = []
        # Until when an event is left to Synapse's queue, and the same in order.
        self._fresh: dict[str, int] = {}
        self._fresh_by_ts: list[tuple[int, str, str]] = []
        self._rooms_to_look_into: set[str] = set()
        self._debtors: dict[str, _Debtor] = {}
        self._ticking = False

    def start(self) -> None:
        """Begins to follow what is owed."""
        self._reader.on_changes = self.on_changes
        self._federation.on_accepted(self._reader.has_events_in, self.on_accepted)
        self._federation.on_back(self.on_back)
        every = self._api.looping_background_call
        every(self._tick, _TICK_MS, desc="sticky_pay", run_on_all_instances=True)
        every(
            self._store_watermarks,
            self._poll_interval_ms,
            desc="sticky_watermarks",
            run_on_all_instances=True,
        )

    # What happens elsewhere. None of these raises.

    def on_changes(self, changes: Changes) -> None:
        """The index has taken over these changes."""
        now_ts, index = self._now_ts(), self._reader.index
        for event in changes.events:
            if event.owed and event.position is not None:
                self._leave_to_synapse(event.event_id, event.room_id, event.position, now_ts)
                if self._watermarks is not None:
                    self._watermarks.advance(index, event.room_id, now_ts)
        joined = [
            join
            for join in changes.joins
            if not join.member.startswith("@") and self._federation.sends_to(join.member)
        ]
        for join in joined:
            debtor = self._debtors.setdefault(join.member, _Debtor())
            debtor.rooms[join.room_id] = None
            self._joining.add((join.member, join.room_id))
            # What it did not want before it may want now.
            debtor.tries.clear()
            debtor.next_ts = 0
        if joined:
            self._api.run_as_background_process("sticky_pay", self._tick)

    def on_accepted(self, server_name: str, accepted: Iterable[Accepted]) -> None:
        """A server has accepted events from Synapse's own queue."""
        now_ts = self._now_ts()
        for part in accepted:
            room_id, ids = part.room_id, part.event_ids
            self._staging.add(server_name, room_id, len(ids), ids[-1], now_ts)
            if (server_name, room_id) in self._joining or self._staging.newest_unread(
                server_name, room_id, now_ts
            ):
                until_ts = now_ts + MAX_DURATION_MS
                self._claimed.update(((server_name, e), until_ts) for e in part.sticky_ids)
            else:
                self._settle(server_name, room_id, part.sticky_ids)
        debtor = self._debtors.get(server_name)
        if debtor is not None:
            debtor.next_ts = 0

    def on_back(self, server_name: str) -> None:
        """A server seems to be back."""
        debtor = self._debtors.get(server_name)
        if debtor is not None:
            debtor.next_ts = 0

    # What is owed.

    @property
    def has_begun(self) -> bool:
        """Whether the watermarks are read: at first they are not."""
        return self._watermarks is not None

    def owed(self, server_name: str, room_id: str) -> list[StickyEvent]:
        """What a joined server is owed in a room, oldest first, fresh events included."""
        if self._watermarks is None:
            return []
        now_ts = self._now_ts()
        return list(self._watermarks.owed(self._reader.index, server_name, room_id, now_ts))

    def obstacle(self, server_name: str) -> str:
        """Why a server that is owed something was not paid; empty if it was not tried."""
        debtor = self._debtors.get(server_name)
        return debtor.obstacle if debtor else ""

    def is_fresh(self, event: StickyEvent) -> bool:
        """Whether an event is still left to Synapse's queue."""
        return self._fresh.get(event.event_id, 0) > self._now_ts()

    def _due(self, server_name: str, room_id: str) -> Iterator[StickyEvent]:
        """What is to be paid by us, oldest first."""
        join = self._reader.index.join(server_name, room_id)
        for event in self.owed(server_name, room_id):
            if (join is not None and event.position < join.position) or not self.is_fresh(event):
                yield event

    def _leave_to_synapse(self, event_id: str, room_id: str, position: int, now_ts: int) -> None:
        # A position is the time at which it was given, unless clocks went back.
        until_ts = min(position, now_ts) + self._grace_period_ms
        self._fresh[event_id] = until_ts
        heapq.heappush(self._fresh_by_ts, (until_ts, room_id, event_id))

    # The loop.

    async def _tick(self) -> None:
        if self._ticking:
            return
        self._ticking = True
        try:
            if self._watermarks is None:
                await self._begin()
            self._end_grace_periods()
            while self._rooms_to_look_into:
                await self._look_into(next(iter(self._rooms_to_look_into)))
            self._start_payments()
        except Exception:
            logger.exception("Cannot look for servers that are owed sticky events; trying again")
        finally:
            self._ticking = False

    async def _begin(self) -> None:
        rows = await self._store.get_watermarks(self._now_ts())
        index, now_ts = self._reader.index, self._now_ts()
        self._watermarks = Watermarks(r for r in rows if self._federation.sends_to(r.server_name))
        early, self._early = self._early, []
        for server_name, room_id, event_ids in early:
            self._settle(server_name, room_id, event_ids)
        for room_id in index.rooms:
            for event in index.owed_after(room_id, 0, now_ts):
                if event.event_id not in self._fresh:
                    self._leave_to_synapse(event.event_id, room_id, event.position, now_ts)

    def _end_grace_periods(self) -> None:
        now_ts = self._now_ts()
        while self._fresh_by_ts and self._fresh_by_ts[0][0] <= now_ts:
            _, room_id, event_id = heapq.heappop(self._fresh_by_ts)
            if self._fresh.get(event_id, 0) <= now_ts:
                self._fresh.pop(event_id, None)
                self._rooms_to_look_into.add(room_id)

    async def _look_into(self, room_id: str) -> None:
        """Finds the servers that are owed something in a room."""
        server_names = await self._federation.servers_in_room(room_id)
        self._rooms_to_look_into.discard(room_id)
        for server_name in server_names:
            if self._federation.sends_to(server_name) and any(self._due(server_name, room_id)):
                self._debtors.setdefault(server_name, _Debtor()).rooms[room_id] = None

    def _start_payments(self) -> None:
        now_ts = self._now_ts()
        paying = sum(debtor.paying for debtor in self._debtors.values())
        for server_name, debtor in list(self._debtors.items()):
            if paying >= self._max_servers:
                return
            if not debtor.paying and debtor.next_ts <= now_ts:
                debtor.paying = True
                paying += 1
                self._api.run_as_background_process(
                    "sticky_pay_server", self._pay, server_name, debtor
                )

    async def _pay(self, server_name: str, debtor: _Debtor) -> None:
        try:
            while await self._pay_some(server_name, debtor):
                pass
        except CannotReach as error:
            debtor.obstacle = str(error)
            debtor.next_ts = max(error.retry_ts or 0, self._now_ts() + _FIRST_PAUSE_MS)
        except Exception:
            logger.exception("Cannot send sticky events to %s; trying again", server_name)
            debtor.obstacle = "an error of our own, which the log shows"
            debtor.next_ts = self._now_ts() + _LONGEST_PAUSE_MS
        finally:
            debtor.paying = False

    async def _pay_some(self, server_name: str, debtor: _Debtor) -> bool:
        """Sends one transaction; whether to go on at once."""
        room_id, due = await self._next_payment(server_name, debtor)
        if room_id is None:
            return False
        if self._federation.is_queue_sending(server_name):
            debtor.obstacle = "Synapse's own queue is sending to it"
            debtor.next_ts = self._now_ts() + _TICK_MS
            return False
        if not await self._has_read(server_name, room_id):
            debtor.obstacle = "it has not read yet what it was sent"
            debtor.next_ts = self._now_ts() + _FIRST_PAUSE_MS
            return False
        claimed = [e.event_id for e in due if (server_name, e.event_id) in self._claimed]
        if claimed:
            await self._verify(server_name, room_id, claimed)
            return True
        event_ids = [event.event_id for event in due]
        pdus = await self._federation.to_send(event_ids)
        sent_ids = [pdu.event_id for pdu in pdus]
        # Nobody is owed any more what was redacted, or is by somebody erased.
        self._settle(server_name, room_id, set(event_ids) - set(sent_ids))
        if not pdus:
            return True
        with self._federation.turn(server_name) as is_ours:
            if not is_ours:
                return True
            answer = await self._federation.send(server_name, pdus)
        arrived = await self._arrived(
            server_name, room_id, [e for e in sent_ids if e in answer.accepted]
        )
        self._settle(server_name, room_id, arrived)
        debtor.paid += len(arrived)
        for event in due:
            if event.event_id in arrived:
                debtor.tries.pop(event.event_id, None)
                debtor.oldest_ts = min(debtor.oldest_ts or event.position, event.position)
        self._note_failures(server_name, room_id, debtor, set(sent_ids).difference(arrived), answer)
        return True

    async def _next_payment(
        self, server_name: str, debtor: _Debtor
    ) -> tuple[str | None, list[StickyEvent]]:
        """A room and what to pay there; None if there is nothing, or nothing yet."""
        now_ts = self._now_ts()
        later_ts: list[int] = []
        for room_id in list(debtor.rooms):
            if server_name not in await self._federation.servers_in_room(room_id):
                join = self._reader.index.join(server_name, room_id)
                if join is not None and join.position + _JOIN_SETTLES_MS > now_ts:
                    later_ts.append(now_ts + _TICK_MS)
                else:
                    debtor.rooms.pop(room_id, None)
                continue
            due = list(self._due(server_name, room_id))
            if not due:
                debtor.rooms.pop(room_id, None)
                continue
            waiting = {
                event.event_id: tries.next_ts
                for event in due
                if (tries := debtor.tries.get(event.event_id)) and tries.next_ts > now_ts
            }
            payable = [event for event in due if event.event_id not in waiting]
            if payable:
                return room_id, payable[:MAX_EVENTS_PER_TRANSACTION]
            later_ts += waiting.values()
        if later_ts:
            debtor.next_ts = min(later_ts)
        elif self._debtors.get(server_name) is debtor and not debtor.rooms:
            del self._debtors[server_name]
            if debtor.paid:
                logger.info(
                    "%s has caught up with sticky events: %d sent, the oldest after %.1f s",
                    server_name,
                    debtor.paid,
                    max(0, now_ts - debtor.oldest_ts) / 1000,
                )
        return None, []

    async def _has_read(self, server_name: str, room_id: str) -> bool:
        """Waits, for a bounded time, until a server has read most of what it took."""
        newest_id = self._staging.newest_unread(server_name, room_id, self._now_ts())
        if newest_id is None:
            return True
        until_ts = self._now_ts() + _MAX_DIGESTION_MS
        if not await self._has(server_name, newest_id, until_ts, (True,)):
            return False
        self._staging.has_read(server_name, room_id)
        return True

    async def _verify(self, server_name: str, room_id: str, claimed: Collection[str]) -> None:
        """Asks for each of these events whether a server has kept it."""
        until_ts = self._now_ts() + _MAX_DIGESTION_MS
        for event_id in claimed:
            if await self._has(server_name, event_id, until_ts, (True, False)):
                self._settle(server_name, room_id, [event_id])
                self._joining.discard((server_name, room_id))
            self._claimed.pop((server_name, event_id), None)

    async def _arrived(
        self, server_name: str, room_id: str, accepted: list[str]
    ) -> Collection[str]:
        """Those of the accepted events, in the order sent, that the server has now.

        It reads them in order. So if it has the last one it had its chance with all;
        and if it was not in the room yet at first, it does not have the first one.
        """
        if not accepted:
            return ()
        now_ts = self._now_ts()
        self._staging.add(server_name, room_id, len(accepted), accepted[-1], now_ts)
        until_ts = now_ts + _MAX_DIGESTION_MS
        if not await self._has(server_name, accepted[-1], until_ts, (True,)):
            return ()
        self._staging.has_read(server_name, room_id)
        if (server_name, room_id) in self._joining:
            self._joining.discard((server_name, room_id))
            if not await self._has(server_name, accepted[0], until_ts, (True, False)):
                return accepted[-1:]
        return accepted

    async def _has(
        self, server_name: str, event_id: str, until_ts: int, final: Collection[bool | None]
    ) -> bool:
        """Asks a server until one of the final answers comes, for a bounded time."""
        pause_ms = _FIRST_LOOK_MS
        while (answer := await self._federation.has_event(server_name, event_id)) not in final:
            if self._now_ts() >= until_ts:
                break
            await self._api.sleep(pause_ms / 1000)
            pause_ms = min(2 * pause_ms, _LONGEST_LOOK_MS)
        return bool(answer)

    def _note_failures(
        self,
        server_name: str,
        room_id: str,
        debtor: _Debtor,
        event_ids: Collection[str],
        answer: Answer,
    ) -> None:
        now_ts = self._now_ts()
        has_just_joined = self._reader.index.join(server_name, room_id) is not None
        max_tries = _MAX_TRIES_AFTER_JOIN if has_just_joined else _MAX_TRIES
        given_up = []
        for event_id in event_ids:
            tries = debtor.tries.setdefault(event_id, _Tries())
            tries.count += 1
            tries.refusals += event_id in answer.refused
            if tries.count >= max_tries or tries.refusals >= _MAX_REFUSALS:
                given_up.append(event_id)
                del debtor.tries[event_id]
                continue
            pause_ms = min(_FIRST_PAUSE_MS << (tries.count - 1), _LONGEST_PAUSE_MS)
            tries.next_ts = now_ts + pause_ms
            if event_id in answer.refused:
                debtor.obstacle = "it refuses some of the events"
            elif event_id in answer.accepted:
                debtor.obstacle = "it took the events and does not have them"
            else:
                debtor.obstacle = "it does not know the room yet"
        if given_up:
            self._settle(server_name, room_id, given_up)
            logger.warning(
                "%s does not get %d sticky events of room %s: %s, for the last time. "
                "They are not sent to it again",
                server_name,
                len(given_up),
                room_id,
                debtor.obstacle or "it refuses them",
            )

    def _settle(self, server_name: str, room_id: str, event_ids: Collection[str]) -> None:
        if not event_ids:
            return
        if self._watermarks is None:
            self._early.append((server_name, room_id, list(event_ids)))
            return
        index = self._reader.index
        self._watermarks.settle(index, server_name, room_id, event_ids, self._now_ts())

    async def _store_watermarks(self) -> None:
        now_ts = self._now_ts()
        self._staging.expire(now_ts)
        for key in [key for key, until_ts in self._claimed.items() if until_ts <= now_ts]:
            del self._claimed[key]
        index = self._reader.index
        self._joining = {key for key in self._joining if index.join(*key) is not None}
        if self._watermarks is None:
            return
        self._watermarks.expire(now_ts)
        while rows := self._watermarks.take_changed(_WATERMARKS_PER_WRITE):
            try:
                await self._store.store_watermarks(rows)
            except Exception:
                self._watermarks.put_back(rows)
                logger.exception("Cannot store what servers have acknowledged; trying again")
                return
