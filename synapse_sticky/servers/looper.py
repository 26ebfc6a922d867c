# SPDX-License-Identifier: AGPL-3.0-or-later
"""Out to servers: pays what Synapse's own queue did not deliver.

Fresh events are left to Synapse's queue for a grace period. What a server still
has not acknowledged then, and all that one is owed which has just joined, is sent
by us: one room at a time, oldest first, at most 50 events in a transaction, one
transaction at a time to each server, and several servers at once.

A server that took events has not read them yet: Synapse stages them, throws most
away if too many are staged, and ignores all while its join is still under way. So
after a join we wait until the server is ready, and after each transaction of ours we
ask how much of it has arrived, before the next one. And if Synapse's queue has sent a
server a lot at once, as after an outage, we wait until that is read, and send what is
sticky of it again.

A server that has an event need not have it in the room's history. It may have refused
it, because it could not make out at that moment what came before, and have fetched it as
a mere outlier, which no client sees. So what we sent is checked: a moment later, without
haste, and so that nothing else waits for it.

Cost follows what is owed. Where nothing is owed, nothing is looked at.
"""

import logging
from collections.abc import Collection, Iterable
from typing import Final

import attr
from synapse.module_api import ModuleApi

from synapse_sticky.config import StickyEventsConfig
from synapse_sticky.deliverable.index import StickyEvent
from synapse_sticky.deliverable.reader import IndexReader
from synapse_sticky.seams.background import Broadcast, Clock
from synapse_sticky.seams.failures import log_failure
from synapse_sticky.seams.federation import Accepted, CannotReach, Federation
from synapse_sticky.seams.metrics import PAYMENTS, Metrics
from synapse_sticky.servers.ledger import Ledger
from synapse_sticky.storage.obstacles import Obstacle
from synapse_sticky.storage.rows import Changes

logger = logging.getLogger(__name__)

RETRY: Final = "retry"
"""The kind of the message that names a server to pay now."""

MAX_EVENTS_PER_TRANSACTION: Final = 50

# How many events may be staged at the server when it is sent more of them.
_MAX_STAGED: Final = 40
# After that many we look anew what is owed, and whether the server is still in the room.
_MAX_EVENTS_PER_VISIT: Final = 10 * MAX_EVENTS_PER_TRANSACTION

_TICK_MS: Final = 500
# How long Synapse's queue waits while a server that was away is paid.
_MAX_PRECEDENCE_MS: Final = 10_000
# How often Synapse's queue is let go first that does not get rid of what it has.
_MAX_REMINDERS: Final = 60
# How often something is tried that a server took but did not name in its answer
# (it does not know the room yet), or took and does not have afterwards.
_MAX_TRIES: Final = 6
# How often a server is asked whether its join is finished, for ten seconds each time:
# joining a large room may take minutes. Then it is sent the events all the same, for not
# every server can be asked.
_MAX_JOIN_LOOKS: Final = 12
# How often something is tried that a server refused: Synapse reports passing faults
# so too.
_MAX_REFUSALS: Final = 4
_FIRST_PAUSE_MS: Final = 1_000
_LONGEST_PAUSE_MS: Final = 60_000
# How long it may take this process to learn who is in the room, after a join was noticed.
_JOIN_SETTLES_MS: Final = 300_000
# How long to wait until a server has read what it took.
_MAX_DIGESTION_MS: Final = 10_000
# How long, if it may not tell: then it is believed.
_MAX_SILENCE_MS: Final = 2_000
_FIRST_LOOK_MS: Final = 40
_LONGEST_LOOK_MS: Final = 320
# Hardly any server reads an event in less, and every question keeps it from reading.
_READ_MS_PER_EVENT: Final = 10
# How many events are checked at a time, with one question or two for each, and how often.
# A receiving Synapse answers ten requests a second before it slows a server down.
_MAX_CHECKS: Final = 5
_CHECK_PAUSE_MS: Final = 1_000
# How long to wait with that, if the server does not tell; and how often in a row, if it
# does not even answer.
_CHECK_SILENCE_MS: Final = 10_000
_MAX_UNANSWERED: Final = 3

_DOES_NOT_HAVE: Final = "it took the events and does not have them"


@attr.s(slots=True, auto_attribs=True)
class _Tries:
    count: int = 0
    refusals: int = 0
    next_ts: int = 0


@attr.s(slots=True, auto_attribs=True)
class _Debtor:
    """A server that is owed something, as far as we know.

    Attributes:
        rooms: in which it may be; used as a set in order.
        next_ts: not to be tried before.
        obstacle: why the last try came to nothing.
        goes_first: whether we go before Synapse's queue: it could not be reached when it
            was tried, or is owed what is from before this process started.
        precedence_ends_ts: until when Synapse's queue waits for us, since it has
            something for the server; 0 before.
        wakes: how often there was a reason to try at once.
        reminders: how often in a row Synapse's queue was asked to go first.
        tries: of events that were sent in vain.
        unchecked: events, by ID, that arrived and are still to be found in the history of
            their rooms; in the order in which that is asked.
        next_check_ts: not to be checked before.
        unanswered_checks: how often in a row there was no answer to that.
    """

    server_name: str
    rooms: dict[str, None] = attr.Factory(dict)
    next_ts: int = 0
    paying: bool = False
    goes_first: bool = False
    precedence_ends_ts: int = 0
    wakes: int = 0
    reminders: int = 0
    obstacle: str = ""
    tries: dict[str, _Tries] = attr.Factory(dict)
    unchecked: dict[str, StickyEvent] = attr.Factory(dict)
    checking: bool = False
    next_check_ts: int = 0
    unanswered_checks: int = 0
    # For the log.
    paid: int = 0
    oldest_age_ms: int = 0

    def come_back(self, at_ts: int, obstacle: str) -> None:
        """To be tried again then."""
        self.next_ts = at_ts
        self.obstacle = obstacle

    def take_unchecked(self, room_id: str) -> dict[str, StickyEvent]:
        """The unchecked events of a room, which are so no more."""
        taken = {e.event_id: e for e in self.unchecked.values() if e.room_id == room_id}
        for event_id in taken:
            del self.unchecked[event_id]
        return taken

    def wake(self) -> None:
        """To be tried at once, also if a try is under way that will fail."""
        self.wakes += 1
        self.next_ts = 0


class Looper:
    """Pays the servers that this process sends to."""

    def __init__(
        self,
        api: ModuleApi,
        clock: Clock,
        reader: IndexReader,
        federation: Federation,
        ledger: Ledger,
        config: StickyEventsConfig,
        metrics: Metrics,
        looked: Broadcast,
    ) -> None:
        self._api = api
        self._metrics = metrics
        self._reader = reader
        self._federation = federation
        self._ledger = ledger
        self._now_ts = clock.now_ts
        self._max_servers = config.max_servers_at_once
        self._debtors: dict[str, _Debtor] = {}
        self._rooms_to_look_into: set[str] = set()
        self._ticking = False
        # Whether it is known who is owed what is from before this process started.
        self._has_looked = False
        self._looked = looked

    def start(self, config: StickyEventsConfig) -> None:
        """Begins to follow what is owed."""
        self._reader.subscribe(self.on_changes)
        for work, interval_ms in (
            (self._tick, _TICK_MS),
            (self._ledger.store, config.poll_interval_ms),
        ):
            self._api.looping_background_call(
                work, interval_ms, desc="sticky_looper", run_on_all_instances=True
            )

    # What happens elsewhere. None of these raises.

    def on_changes(self, changes: Changes) -> None:
        """The index has taken over these changes."""
        for event in changes.events:
            self._ledger.note_event(event)
        has_joined = False
        for join in changes.joins:
            if join.is_of_server and self._federation.sends_to(join.member):
                has_joined = True
                self._ledger.note_join(join.member, join.room_id)
                debtor = self._owe(join.member, join.room_id)
                # What it did not want before it may want now.
                debtor.tries.clear()
                debtor.take_unchecked(join.room_id)
                debtor.wake()
        if has_joined:
            self._api.run_as_background_process("sticky_pay", self._tick)

    def on_accepted(self, server_name: str, accepted: Iterable[Accepted]) -> None:
        """A server has accepted events from Synapse's own queue."""
        for part in accepted:
            self._ledger.note_accepted(server_name, part)
        self.on_back(server_name)

    def goes_first(self, server_name: str) -> bool:
        """Whether Synapse's queue for a server has anything to wait for."""
        debtor = self._debtors.get(server_name)
        return not self._has_looked or (debtor is not None and debtor.goes_first)

    async def before_transaction(self, server_name: str) -> None:
        """Synapse's own queue is about to send something to a server.

        If the server or this process was away it is first paid what it missed, so that it
        gets that in order: Synapse begins with the newest event of a room, or sends more at
        once than the server can read.
        """
        until_ts = self._now_ts() + _MAX_PRECEDENCE_MS
        while not self._has_looked and self._now_ts() < until_ts:
            # Queues go on in the order in which they came.
            self._api.run_as_background_process("sticky_pay", self._tick)
            if not self._has_looked:
                await self._looked.wait(self._now_ts() + _FIRST_LOOK_MS)
        debtor = self._debtors.get(server_name)
        if debtor is None or not debtor.goes_first:
            return
        debtor.precedence_ends_ts = debtor.precedence_ends_ts or until_ts
        # What Synapse may try we may too.
        debtor.next_ts = 0
        self._start_payments()
        while debtor.paying and self._now_ts() < debtor.precedence_ends_ts:
            await self._api.sleep(_FIRST_LOOK_MS / 1000)

    def on_back(self, server_name: str) -> None:
        """A server seems to be back."""
        debtor = self._debtors.get(server_name)
        if debtor is not None:
            debtor.wake()

    def retry(self, server_name: str) -> None:
        """Pay a server now, whatever pause it or its events are in."""
        debtor = self._debtors.get(server_name)
        if debtor is not None:
            for tries in debtor.tries.values():
                tries.next_ts = 0
            debtor.wake()
            self._api.run_as_background_process("sticky_pay", self._tick)

    def debts(self) -> list[tuple[str, str]]:
        """Return the servers, and the rooms in which they may be owed events."""
        return [(d.server_name, room_id) for d in self._debtors.values() for room_id in d.rooms]

    def obstacle(self, server_name: str) -> str:
        """Why a server that is owed something was not paid; empty if it was not tried."""
        debtor = self._debtors.get(server_name)
        return debtor.obstacle if debtor else ""

    def obstacles(self) -> list[Obstacle]:
        """Return why servers that are owed something were not paid, as far as they were tried."""
        return [
            Obstacle(debtor.server_name, debtor.obstacle, debtor.next_ts)
            for debtor in self._debtors.values()
            if debtor.obstacle
        ]

    # The loop.

    async def _tick(self) -> None:
        if self._ticking:
            return
        self._ticking = True
        try:
            if not self._ledger.has_begun:
                await self._ledger.begin(self._federation.sends_to)
            await self._ledger.reload(self._federation.sends_to)
            if self._ledger.has_grace_period_ended:
                synapse_at = await self._federation.queued_up_to()
                self._rooms_to_look_into |= self._ledger.end_grace_periods(synapse_at)
            for room_id in list(self._rooms_to_look_into):
                await self._look_into(room_id)
            self._has_looked = True
            self._start_payments()
            self._start_checks()
            # Only now: after a failure the queues try again, and not at once.
            self._looked.notify_all()
        except Exception as error:
            log_failure("Cannot look for servers that are owed sticky events; trying again", error)
        finally:
            self._ticking = False

    async def _look_into(self, room_id: str) -> None:
        """Finds the servers that are owed something in a room."""
        try:
            server_names = await self._federation.servers_in_room(room_id)
        except Exception as error:
            log_failure(f"Cannot find out who is in room {room_id!r}; trying again", error)
            return
        self._rooms_to_look_into.discard(room_id)
        for server_name in server_names:
            if self._federation.sends_to(server_name) and any(
                self._ledger.due(server_name, room_id)
            ):
                debtor = self._owe(server_name, room_id)
                debtor.goes_first |= not self._has_looked

    def _owe(self, server_name: str, room_id: str) -> _Debtor:
        debtor = self._debtors.setdefault(server_name, _Debtor(server_name))
        if room_id not in debtor.rooms:
            debtor.rooms[room_id] = None
            # What it waits for in other rooms is no reason to wait in this one.
            debtor.next_ts = min(debtor.next_ts, self._now_ts() + _FIRST_PAUSE_MS)
        return debtor

    def _start_payments(self) -> None:
        now_ts = self._now_ts()
        paying = sum(debtor.paying for debtor in self._debtors.values())
        for debtor in list(self._debtors.values()):
            if paying >= self._max_servers:
                return
            if not debtor.paying and debtor.next_ts <= now_ts:
                debtor.paying = True
                paying += 1
                self._api.run_as_background_process("sticky_pay_server", self._pay, debtor)

    def _start_checks(self) -> None:
        now_ts = self._now_ts()
        checking = sum(debtor.checking for debtor in self._debtors.values())
        for debtor in self._debtors.values():
            if checking >= self._max_servers:
                return
            if debtor.unchecked and not debtor.checking and debtor.next_check_ts <= now_ts:
                debtor.checking = True
                checking += 1
                self._api.run_as_background_process("sticky_check_server", self._check, debtor)

    # Paying one server.

    async def _pay(self, debtor: _Debtor) -> None:
        wakes = debtor.wakes
        try:
            while payment := await self._next_payment(debtor):
                if not await self._pay_in_room(debtor, *payment):
                    break
        except CannotReach as error:
            debtor.goes_first, debtor.precedence_ends_ts = True, 0
            retry_ts = self._now_ts() + _FIRST_PAUSE_MS
            if debtor.wakes == wakes:
                retry_ts = max(error.retry_ts or 0, retry_ts)
            debtor.come_back(retry_ts, str(error))
        except Exception as error:
            log_failure(f"Cannot send sticky events to {debtor.server_name}; trying again", error)
            debtor.come_back(self._now_ts() + _LONGEST_PAUSE_MS, "an error, which the log shows")
        finally:
            debtor.paying = False

    async def _next_payment(self, debtor: _Debtor) -> tuple[str, list[StickyEvent]] | None:
        """A room and what to pay there; None if there is nothing, or nothing yet."""
        now_ts, server_name = self._now_ts(), debtor.server_name
        later_ts: list[int] = []
        for room_id in list(debtor.rooms):
            due = list(self._ledger.due(server_name, room_id))
            if due and server_name not in await self._federation.servers_in_room(room_id):
                join = self._reader.index.join(server_name, room_id)
                if join is not None and join.position + _JOIN_SETTLES_MS > now_ts:
                    later_ts.append(now_ts + _FIRST_PAUSE_MS)
                    continue
                due = []
            if not due:
                del debtor.rooms[room_id]
                debtor.take_unchecked(room_id)
                continue
            unpaid = [event for event in due if event.event_id not in debtor.unchecked]
            waiting = {
                event.event_id: tries.next_ts
                for event in unpaid
                if (tries := debtor.tries.get(event.event_id)) and tries.next_ts > now_ts
            }
            payable = [event for event in unpaid if event.event_id not in waiting]
            if payable:
                return room_id, payable[:_MAX_EVENTS_PER_VISIT]
            later_ts += waiting.values()
        if later_ts:
            debtor.next_ts = min(later_ts)
        elif debtor.unchecked:
            debtor.come_back(now_ts + _CHECK_PAUSE_MS, "it is asked whether it kept the events")
            debtor.goes_first, debtor.precedence_ends_ts = False, 0
        elif not debtor.rooms:
            self._debtors.pop(server_name)
            if debtor.paid:
                logger.info(
                    "%s has caught up with sticky events: %d sent, the oldest after %.1f s",
                    server_name,
                    debtor.paid,
                    debtor.oldest_age_ms / 1000,
                )
        return None

    async def _pay_in_room(self, debtor: _Debtor, room_id: str, due: list[StickyEvent]) -> bool:
        """Sends what is due, or finds out that it need not; whether to go on at once."""
        server_name = debtor.server_name
        retry_ts = await self._federation.backing_off_until_ts(server_name)
        debtor.goes_first |= retry_ts > 0
        if retry_ts > self._now_ts():
            raise CannotReach("Synapse is backing off from it", retry_ts)
        if self._goes_second(debtor, due) and self._remind_queue(debtor):
            now_ts = self._now_ts()
            debtor.come_back(now_ts + _TICK_MS, "Synapse's own queue is sending to it")
            return False
        if not await self._has_read(server_name, room_id):
            now_ts = self._now_ts()
            debtor.come_back(now_ts + _FIRST_PAUSE_MS, "it has not read yet what it was sent")
            return False
        if self._ledger.is_joining(server_name, room_id) and not await self._is_ready(
            debtor, room_id
        ):
            return False
        unread: list[StickyEvent] = []
        for start in range(0, len(due), MAX_EVENTS_PER_TRANSACTION):
            events = due[start : start + MAX_EVENTS_PER_TRANSACTION]
            accepted = await self._send(debtor, room_id, events)
            if not accepted:
                break
            # The next transaction must find room beside what is staged now.
            unread += accepted
            read, unread = unread[:-_MAX_STAGED], unread[-_MAX_STAGED:]
            if read and not await self._arrive(debtor, room_id, read):
                return True
        if debtor.goes_first:
            # Synapse's queue need not wait until its own next try.
            self._federation.remind_queue(server_name)
        if unread:
            await self._arrive(debtor, room_id, unread)
        return True

    def _goes_second(self, debtor: _Debtor, due: list[StickyEvent]) -> bool:
        """Whether Synapse's queue, if it has something for the server, is to send that first."""
        # What is from before a join it does not have.
        return not debtor.goes_first and not all(
            self._ledger.is_from_before_join(debtor.server_name, event) for event in due
        )

    def _remind_queue(self, debtor: _Debtor) -> bool:
        """Whether Synapse's queue is to go first; not for ever, if it gets nowhere."""
        debtor.reminders += 1
        if debtor.reminders > _MAX_REMINDERS or not self._federation.remind_queue(
            debtor.server_name
        ):
            debtor.reminders = 0
            return False
        return True

    async def _send(
        self, debtor: _Debtor, room_id: str, due: list[StickyEvent]
    ) -> list[StickyEvent]:
        """Sends one transaction; what of it the server took."""
        server_name = debtor.server_name
        async with self._federation.turn(server_name):
            # While we waited Synapse's queue may have sent it.
            due = self._ledger.still_due(server_name, room_id, due)
            events = await self._federation.to_send([event.event_id for event in due])
            wanted_ids = {event.event_id for event in events}
            # Nobody is owed any more what was redacted, or is by somebody erased.
            gone = [event.event_id for event in due if event.event_id not in wanted_ids]
            self._ledger.settle(server_name, room_id, gone)
            if not events:
                return []
            answer = await self._federation.send(server_name, events)
        sent = [event for event in due if event.event_id in wanted_ids]
        accepted = [event for event in sent if event.event_id in answer.accepted]
        if accepted:
            self._ledger.note_sent(server_name, room_id, len(accepted), accepted[-1].event_id)
        refused = [event for event in sent if event.event_id in answer.refused]
        self._note_failures(debtor, room_id, refused, "it refuses some of the events", refusal=1)
        missing = [e for e in sent if e.event_id not in answer.accepted | answer.refused]
        self._note_failures(debtor, room_id, missing, "it does not know the room yet")
        return accepted

    async def _has_read(self, server_name: str, room_id: str) -> bool:
        """Waits, for a bounded time, until a server has read most of what it took."""
        newest_id = self._ledger.newest_unread(server_name, room_id)
        if newest_id is None:
            return True
        self._ledger.note_asked(server_name, room_id)
        if not await self._has(server_name, newest_id):
            return False
        self._ledger.note_read(server_name, room_id, newest_id)
        return True

    async def _is_ready(self, debtor: _Debtor, room_id: str) -> bool:
        """Waits, for a bounded time, until a server has finished its join.

        Until then it does not tell us even of the room's first event, for it does not
        know that we are in the room.
        """
        server_name = debtor.server_name
        first_id = await self._federation.first_event_id(room_id)
        try:
            is_ready = first_id is None or await self._has(server_name, first_id)
        except CannotReach:
            # Sending will tell, and makes Synapse back off from it.
            return True
        if not is_ready:
            tries = debtor.tries.setdefault(room_id, _Tries())
            tries.count += 1
            if tries.count < _MAX_JOIN_LOOKS:
                now_ts = self._now_ts()
                debtor.come_back(now_ts + _FIRST_PAUSE_MS, "its join is not finished yet")
                return False
        debtor.tries.pop(room_id, None)
        self._ledger.note_joined(server_name, room_id)
        return True

    async def _arrive(self, debtor: _Debtor, room_id: str, accepted: list[StickyEvent]) -> bool:
        """Waits until a server has what it took, in the order sent; whether it has it.

        It reads them in order: if it has the last one it had its chance with all.
        """
        server_name, last_id = debtor.server_name, accepted[-1].event_id
        try:
            has_arrived = await self._has(server_name, last_id, len(accepted))
        except CannotReach as error:
            self._note_failures(debtor, room_id, accepted, str(error))
            raise
        if not has_arrived:
            self._note_failures(debtor, room_id, accepted, _DOES_NOT_HAVE)
            return False
        self._ledger.note_read(server_name, room_id, last_id)
        now_ts = self._now_ts()
        debtor.unchecked.update((event.event_id, event) for event in accepted)
        debtor.next_check_ts = max(debtor.next_check_ts, now_ts + _CHECK_PAUSE_MS)
        debtor.oldest_age_ms = max(debtor.oldest_age_ms, now_ts - accepted[0].position)
        return True

    # Checking one server.

    async def _check(self, debtor: _Debtor) -> None:
        """Settles events that are in their room's history; others are to be sent again."""
        pause_ms = _CHECK_PAUSE_MS
        try:
            room_id = next(iter(debtor.unchecked.values())).room_id
            events = [event for event in debtor.unchecked.values() if event.room_id == room_id]
            missing = []
            for event in events[:_MAX_CHECKS]:
                in_history = await self._is_in_history(debtor, event.event_id)
                if event.event_id not in debtor.unchecked:
                    # The server has joined again: it is owed it again.
                    continue
                if in_history is None:
                    # The other rooms come first next time.
                    debtor.unchecked.update(debtor.take_unchecked(room_id))
                    pause_ms = _CHECK_SILENCE_MS
                    break
                del debtor.unchecked[event.event_id]
                if not in_history:
                    missing.append(event)
                    continue
                self._ledger.settle(debtor.server_name, room_id, [event.event_id])
                debtor.tries.pop(event.event_id, None)
                debtor.paid += 1
                self._metrics.count(PAYMENTS, outcome="confirmed")
            self._note_failures(debtor, room_id, missing, _DOES_NOT_HAVE)
        except Exception as error:
            log_failure(f"Cannot check what {debtor.server_name} has; trying again", error)
            pause_ms = _LONGEST_PAUSE_MS
        finally:
            debtor.checking = False
            debtor.next_check_ts = self._now_ts() + pause_ms
            if not debtor.unchecked:
                debtor.next_ts = 0

    async def _is_in_history(self, debtor: _Debtor, event_id: str) -> bool | None:
        """Asks a server; one that does not answer is believed after some time. None until then."""
        if debtor.unanswered_checks >= _MAX_UNANSWERED:
            return True
        try:
            in_history = await self._federation.has_in_history(debtor.server_name, event_id)
        except CannotReach:
            debtor.unanswered_checks += 1
            return None
        debtor.unanswered_checks = 0
        return in_history

    async def _has(self, server_name: str, event_id: str, unread: int = 0) -> bool:
        """Asks a server for an event until it has it, for a bounded time.

        Not before it can have read as many events as are unread, up to this one.

        One that has joined but does not know all members yet reads what it is sent,
        and may not tell: it is given the time, and believed.
        """
        await self._api.sleep(unread * _READ_MS_PER_EVENT / 1000)
        started_ts, pause_ms = self._now_ts(), _FIRST_LOOK_MS
        while True:
            answer = await self._federation.has_event(server_name, event_id)
            waited_ms = self._now_ts() - started_ts
            if answer or (answer is None and waited_ms >= _MAX_SILENCE_MS):
                return True
            if waited_ms >= _MAX_DIGESTION_MS:
                return False
            await self._api.sleep(pause_ms / 1000)
            pause_ms = min(2 * pause_ms, _LONGEST_LOOK_MS)

    def _note_failures(
        self,
        debtor: _Debtor,
        room_id: str,
        events: Collection[StickyEvent],
        obstacle: str,
        refusal: int = 0,
    ) -> None:
        """These are tried again after a pause, or given up if they were tried often enough."""
        if not events:
            return
        debtor.obstacle = obstacle
        now_ts, server_name = self._now_ts(), debtor.server_name
        given_up = []
        for event in events:
            tries = debtor.tries.setdefault(event.event_id, _Tries())
            tries.count += 1
            tries.refusals += refusal
            if tries.count >= _MAX_TRIES or tries.refusals >= _MAX_REFUSALS:
                given_up.append(event.event_id)
                del debtor.tries[event.event_id]
            else:
                pause_ms = min(_FIRST_PAUSE_MS << (tries.count - 1), _LONGEST_PAUSE_MS)
                tries.next_ts = now_ts + pause_ms
        self._metrics.count(PAYMENTS, len(events) - len(given_up), outcome="retried")
        if given_up:
            self._metrics.count(PAYMENTS, len(given_up), outcome="given_up")
            self._ledger.settle(server_name, room_id, given_up)
            logger.warning(
                "%s does not get %d sticky events of room %r and is not sent them again: %s",
                server_name,
                len(given_up),
                room_id,
                obstacle,
            )
