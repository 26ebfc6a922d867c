# SPDX-License-Identifier: AGPL-3.0-or-later
"""Out to servers: pays what Synapse's own queue did not deliver.

Fresh events are left to Synapse's queue for a grace period. What a server still has not
acknowledged then, and all that a server is owed which has just joined, is sent by us: one room
at a time, oldest first, one transaction at a time to each server, and several servers at once.

What comes next for a server is decided in pure code: ``payment.py`` says which step, ``turns.py``
whose turn it is, ``slots.py`` how many at once, ``confirmation.py`` what answers mean. Here the
steps are performed, in time. Cost follows what is owed: where nothing is owed nothing is looked at.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from itertools import takewhile
from typing import Final

import attr
from synapse.module_api import ModuleApi

from synapse_sticky.config import StickyEventsConfig
from synapse_sticky.deliverable.index import StickyEvent
from synapse_sticky.deliverable.reader import IndexReader
from synapse_sticky.seams.background import Broadcast, Clock
from synapse_sticky.seams.failures import log_failure
from synapse_sticky.seams.federation import Accepted, Federation, RequestFailed
from synapse_sticky.seams.metrics import PAYMENTS, Metrics
from synapse_sticky.servers.confirmation import Reply
from synapse_sticky.servers.ledger import Ledger
from synapse_sticky.servers.payment import (
    MAX_DEFERRAL_MS,
    NEVER,
    Ask,
    Debtor,
    Found,
    Look,
    Outcome,
    Send,
    Sent,
    State,
)
from synapse_sticky.servers.slots import Slots
from synapse_sticky.servers.turns import MAX_WAIT_MS, Ending, Turn
from synapse_sticky.storage.obstacles import Obstacle
from synapse_sticky.storage.rows import Changes

logger = logging.getLogger(__name__)

RETRY: Final = "retry"
"""The kind of the message that names a server to pay now."""

_TICK_MS: Final = 500
# What is to be done within that time is not left to the ticks.
_SOON_MS: Final = 1_000
_ERROR_PAUSE_MS: Final = 60_000
_FIRST_LOOK_PAUSE_MS: Final = 500
_LONGEST_LOOK_PAUSE_MS: Final = 10_000
_TOO_MANY_REQUESTS: Final = 429
# How long a server has a slot at most: servers that do not answer do not take them all.
_SLOT_MS: Final = 250
# A pause of that length is told: it is stored.
_TOLD_PAUSE_MS: Final = 5_000
# How many servers are asked at once whether they have kept events, beside payments.
_MAX_CHECKS: Final = 20
# How long it may take this process to learn who is in the room, after a join was noticed.
_JOIN_SETTLES_MS: Final = 300_000


@attr.s(slots=True, auto_attribs=True)
class _Pause:
    """Until when not to try again, ever longer."""

    until: int = 0
    _next_ms: int = _FIRST_LOOK_PAUSE_MS

    def extend(self, now: int) -> None:
        """It has failed once more."""
        self.until = now + self._next_ms
        self._next_ms = min(2 * self._next_ms, _ERROR_PAUSE_MS)


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
        new_broadcast: Callable[[], Broadcast],
    ) -> None:
        self._api = api
        self._metrics = metrics
        self._reader = reader
        self._federation = federation
        self._ledger = ledger
        self._clock = clock
        self._now = clock.monotonic_ms
        self._new_broadcast = new_broadcast
        # Of the servers whose next transaction of Synapse's queue waits for us.
        self._turn_over: dict[str, Broadcast] = {}
        self._slots = Slots(config.max_servers_at_once)
        self._debtors: dict[str, Debtor] = {}
        self._turns: dict[str, Turn] = {}
        # The servers for which steps are performed now.
        self._running: set[str] = set()
        self._checks = 0
        self._rooms_to_look_into: set[str] = set()
        # Those of them that hold what is from before this process; None before the first look.
        self._rooms_from_before: set[str] | None = None
        # Until when not to look into some of them again, after that has failed.
        self._room_pauses: dict[str, _Pause] = {}
        self._is_looking = False
        self._is_first_look_over = False
        self._first_look_over = new_broadcast()
        self._next_look = 0
        self._failed_looks = 0

    def start(self, config: StickyEventsConfig) -> None:
        """Begin to follow what is owed."""
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
                debtor = self._debtor(join.member)
                debtor.payment(join.room_id).join(self._now())
                debtor.wake()
            elif not join.is_of_server:
                # While none of our users was in the room nobody could be sent anything there.
                self._rooms_to_look_into.add(join.room_id)
        if has_joined:
            self._api.run_as_background_process("sticky_pay", self._tick)

    def on_accepted(self, server_name: str, accepted: Iterable[Accepted]) -> None:
        """A server has accepted events from Synapse's own queue."""
        debtor = self._debtors.get(server_name)
        for part in accepted:
            self._ledger.note_accepted(server_name, part)
            if debtor is not None and part.room_id in debtor.rooms:
                debtor.rooms[part.room_id].took_beside(len(part.event_ids))
        self.on_back(server_name)

    def on_back(self, server_name: str) -> None:
        """A server seems to be back."""
        debtor = self._debtors.get(server_name)
        if debtor is not None:
            debtor.wake()
            self._start(debtor)

    def makes_wait(self, server_name: str) -> bool:
        """Return whether a transaction of Synapse's queue has anything to wait for."""
        if not self._is_first_look_over:
            return True
        turn = self._turns.get(server_name)
        return turn is not None and turn.synapse_waits_ms > 0

    async def before_transaction(self, server_name: str, counts: Mapping[str, int]) -> None:
        """Synapse's own queue is about to send to a server: let it wait as long as it has to.

        Args:
            counts: how many events it is about to send, by room.

        If the server or this process was away it is first paid what it missed, so that it
        gets that in order: Synapse begins with the newest event of a room, or sends more at
        once than the server can read.
        """
        began = self._now()
        if not self._is_first_look_over:
            await self._wait_for_first_look(began)
        turn, debtor = self._turn(server_name), self._debtors.get(server_name)
        turn.synapse_comes()
        if debtor is not None and turn.is_ahead:
            # What Synapse may try we may too.
            debtor.not_before = 0
            self._start(debtor)
        turn_over = self._turn_over[server_name] = self._new_broadcast()
        try:
            while self._blocks(turn, debtor, counts):
                # The first look is a part of it.
                left_ms = turn.synapse_waits_ms - (self._now() - began)
                await turn_over.wait_for(left_ms)
                turn.synapse_waited(self._now() - began)
                began = self._now()
        finally:
            if self._turn_over.get(server_name) is turn_over:
                del self._turn_over[server_name]

    async def _wait_for_first_look(self, began: int) -> None:
        """Wait until it is known who is owed what; once after a start, and for a bounded time.

        A look that fails ends nothing: it is repeated meanwhile, and may succeed.
        """
        if not self._is_looking:
            self._api.run_as_background_process("sticky_pay", self._tick)
        while not self._is_first_look_over:
            if not await self._first_look_over.wait_for(MAX_WAIT_MS - (self._now() - began)):
                self._is_first_look_over = True

    def transaction_begins(self, server_name: str) -> None:
        """A transaction of Synapse's own queue is sent now."""
        self._turn(server_name).synapse_begins(self._now())

    def transaction_ended(self, server_name: str, arrived: bool) -> None:
        """The transaction of Synapse's own queue has ended."""
        turn = self._turn(server_name)
        turn.synapse_ended(self._now(), arrived=arrived)
        debtor = self._debtors.get(server_name)
        if debtor is None:
            del self._turns[server_name]
        else:
            if self._now() >= turn.rests_until:
                debtor.synapse_ended(self._now())
            if not self._start(debtor):
                # It can do nothing with its turn now.
                turn.give_way()

    def retry(self, server_name: str) -> None:
        """Pay a server now, whatever pause it or its events are in."""
        debtor = self._debtors.get(server_name)
        if debtor is not None:
            debtor.retry(self._now())
            self._start(debtor)

    def debts(self) -> list[tuple[str, str]]:
        """Return the servers, and the rooms in which they may be owed events."""
        return [(d.server_name, room_id) for d in self._debtors.values() for room_id in d.rooms]

    def obstacle(self, server_name: str) -> str:
        """Return why a server that is owed something was not paid; empty if it was not tried."""
        debtor = self._debtors.get(server_name)
        return debtor.obstacle if debtor else ""

    def obstacles(self) -> list[Obstacle]:
        """Return why servers that are owed something were not paid, as far as they were tried."""
        now = self._now()
        offset_ms = self._clock.now_ts() - now
        found = []
        for debtor in self._debtors.values():
            if debtor.obstacle:
                has_pause = now + _TOLD_PAUSE_MS < debtor.next_ts < NEVER
                # In whole seconds: it is stored whenever it changes.
                retry_ts = round((debtor.next_ts + offset_ms) / 1000) * 1000 if has_pause else 0
                found.append(Obstacle(debtor.server_name, debtor.obstacle, retry_ts))
        return found

    # The loop.

    async def _tick(self) -> None:
        if not self._is_looking and self._now() >= self._next_look:
            await self._look_for_debtors()
        debtors = list(self._debtors.values())
        for debtor in debtors:
            self._start(debtor)
        for debtor in sorted(debtors, key=lambda debtor: debtor.history.next_ts):
            self._start_check(debtor)

    async def _look_for_debtors(self) -> None:
        self._is_looking = True
        try:
            await self._find_debtors()
        except Exception as error:
            log_failure("Cannot look for servers that are owed sticky events; trying again", error)
            pause_ms = _FIRST_LOOK_PAUSE_MS << min(self._failed_looks, 6)
            self._failed_looks += 1
            self._next_look = self._now() + min(pause_ms, _LONGEST_LOOK_PAUSE_MS)
        else:
            self._failed_looks = 0
            if not self._is_first_look_over:
                self._is_first_look_over = True
                self._first_look_over.notify_all()
        finally:
            self._is_looking = False

    async def _find_debtors(self) -> None:
        if not self._ledger.has_begun:
            await self._ledger.begin(self._federation.sends_to)
        await self._ledger.reload(self._federation.sends_to)
        if self._ledger.has_grace_period_ended:
            synapse_at = await self._federation.queued_up_to()
            self._rooms_to_look_into |= self._ledger.end_grace_periods(synapse_at)
        if self._rooms_from_before is None:
            self._rooms_from_before = set(self._rooms_to_look_into)
        for room_id in list(self._rooms_to_look_into):
            if self._room_pauses.get(room_id, _Pause()).until <= self._now():
                await self._look_into(room_id)

    async def _look_into(self, room_id: str) -> None:
        """Find the servers that are owed something in a room."""
        try:
            server_names = await self._federation.servers_in_room(room_id)
        except Exception as error:
            log_failure(f"Cannot find out who is in room {room_id!r}; trying again", error)
            self._room_pauses.setdefault(room_id, _Pause()).extend(self._now())
            return
        self._room_pauses.pop(room_id, None)
        self._rooms_to_look_into.discard(room_id)
        is_from_before = room_id in (self._rooms_from_before or ())
        for server_name in server_names:
            if self._federation.sends_to(server_name) and any(
                self._ledger.due(server_name, room_id)
            ):
                self._debtor(server_name).payment(room_id).owe(self._now())
                if is_from_before:
                    # Synapse's queue has forgotten the events.
                    self._turn(server_name).go_ahead()
        (self._rooms_from_before or set()).discard(room_id)

    def _debtor(self, server_name: str) -> Debtor:
        debtor = self._debtors.get(server_name)
        if debtor is None:
            debtor = self._debtors[server_name] = Debtor(server_name)
        return debtor

    def _turn(self, server_name: str) -> Turn:
        return self._turns.setdefault(server_name, Turn())

    def _blocks(self, turn: Turn, debtor: Debtor | None, counts: Mapping[str, int]) -> bool:
        """Whether Synapse's next transaction, with so many events by room, is to wait for us."""
        if turn.synapse_waits_ms == 0 or turn.is_ours or debtor is None:
            return turn.synapse_waits_ms > 0 and turn.is_ours
        # After an outage: until what was missed is sent, and does not get lost.
        return debtor.is_busy(self._now()) or debtor.would_lose(counts)

    # One server.

    def _start(self, debtor: Debtor) -> bool:
        """Go on with a server, if it is time and nobody does; return whether we do now."""
        name = debtor.server_name
        if (
            name in self._running
            or self._slots.is_waiting(name)
            or debtor.next_ts > self._now()
            or not self._ledger.is_up_to_date
            or self._debtors.get(name) is not debtor
            or self._turn(name).is_after_this
        ):
            return False
        self._running.add(name)
        try:
            self._api.run_as_background_process("sticky_pay_server", self._run, debtor)
        except Exception as error:
            self._running.discard(name)
            log_failure(f"Cannot send sticky events to {name}; trying again", error)
            return False
        return True

    async def _run(self, debtor: Debtor) -> None:
        """Perform steps as long as there are any."""
        step: Look | Ask | Send | None = None
        try:
            # One server that rests starts the next one: not within each other.
            await self._clock.sleep(0)
            while (step := self._next_step(debtor)) is not None:
                if isinstance(step, Look):
                    await self._look(debtor, step)
                elif isinstance(step, Ask):
                    await self._ask(debtor, step)
                elif self._may_send(debtor, step):
                    await self._send(debtor, step)
                else:
                    break
                debtor.worked(step)
        except Exception as error:
            log_failure(f"Cannot send sticky events to {debtor.server_name}; trying again", error)
            debtor.broke(step, self._now(), "an error, which the log shows")
        finally:
            self._running.discard(debtor.server_name)
            self._rest(debtor)

    def _next_step(self, debtor: Debtor) -> Look | Ask | Send | None:
        """Return what to do next for a server, and leave the turn to Synapse if we do not send."""
        turn = self._turn(debtor.server_name)
        if turn.is_after_this:
            # Nothing is begun that could miss our turn.
            return None
        step = debtor.next(self._now())
        if not isinstance(step, Send) and (step is None or not step.payment.is_deferred):
            turn.give_way()
            self._let_synapse_go_on(debtor.server_name)
        return step

    def _rest(self, debtor: Debtor) -> None:
        """There is nothing to do for a server now: leave turn and slot to others, and wait."""
        name, turn = debtor.server_name, self._turn(debtor.server_name)
        if debtor.has_unsent:
            turn.give_way()
        else:
            turn.finish()
        self._let_synapse_go_on(name)
        self._free_slot(name)
        if debtor.is_settled:
            self._forget(debtor)
            return
        left_ms = debtor.next_ts - self._now()
        if left_ms < _SOON_MS and not self._slots.is_waiting(name):
            self._clock.call_later(max(0, left_ms), partial(self._start, debtor))

    def _forget(self, debtor: Debtor) -> None:
        """Nothing is owed to a server any more."""
        name = debtor.server_name
        del self._debtors[name]
        if name not in self._turn_over and not self._turns[name].synapse_sends:
            del self._turns[name]
        if debtor.paid:
            logger.info(
                "%s has caught up with sticky events: %d sent, the oldest after %.1f s",
                name,
                debtor.paid,
                debtor.oldest_age_ms / 1000,
            )

    def _let_synapse_go_on(self, server_name: str) -> None:
        """Let Synapse's queue see whether it still has to wait for us."""
        if server_name in self._turn_over:
            self._turn_over[server_name].notify_all()

    async def _look(self, debtor: Debtor, step: Look) -> None:
        """Find out what a server is owed in a room, and whether it can be sent that."""
        server_name, room_id = debtor.server_name, step.payment.room_id
        is_member: bool | None = None
        joining_id: str | None = None
        if any(self._ledger.due(server_name, room_id)):
            if await self._is_backing_off(debtor):
                return
            is_member = await self._is_member(server_name, room_id)
            if self._ledger.is_joining(server_name, room_id):
                joining_id = await self._federation.first_event_id(room_id)
        due = list(self._ledger.due(server_name, room_id))
        undigested_id = self._ledger.newest_unread(server_name, room_id)
        join = self._reader.index.join(server_name, room_id)
        found = Found(
            due, is_member, joining_id, undigested_id, join.position if join is not None else 0
        )
        step.payment.found(found, self._now())
        if step.payment.state is State.DIGESTING:
            self._ledger.note_asked(server_name, room_id)
        debtor.forget_settled()

    async def _is_backing_off(self, debtor: Debtor) -> bool:
        """Pause as long as Synapse backs off from a server."""
        retry_ts = await self._federation.backing_off_until_ts(debtor.server_name)
        if retry_ts:
            self._turn(debtor.server_name).go_ahead()
        left_ms = retry_ts - self._clock.now_ts()
        if left_ms > 0:
            now = self._now()
            debtor.pause(now + left_ms, now, "Synapse is backing off from it")
        return left_ms > 0

    async def _is_member(self, server_name: str, room_id: str) -> bool | None:
        """Whether a server is in a room; None if that may not be known here yet."""
        if server_name in await self._federation.servers_in_room(room_id):
            return True
        join = self._reader.index.join(server_name, room_id)
        if join is not None and join.position + _JOIN_SETTLES_MS > self._clock.now_ts():
            return None
        return False

    async def _ask(self, debtor: Debtor, step: Ask) -> None:
        """Ask whether a join is finished, or events have arrived."""
        server_name, room_id = debtor.server_name, step.payment.room_id
        if await self._is_backing_off(debtor):
            return
        state, awaited = step.payment.state, step.payment.awaited
        began, reply = self._now(), Reply.SILENT
        before: Collection[str] = ()
        if not debtor.silence.is_on(began):
            reply, before = await self._question(debtor, step)
            debtor.silence.took(reply, self._now())
        outcome = step.payment.heard(reply, self._now(), self._now() - began, before)
        settled, step.payment.settled = step.payment.settled, []
        self._settle(debtor, room_id, settled)
        if outcome is Outcome.LOST:
            # It may have them, and not say so.
            debtor.tells_history &= not step.with_history
            retried = sum(e.event_id not in debtor.history and e not in settled for e in awaited)
            self._metrics.count(PAYMENTS, retried, outcome="retried")
        elif outcome in (Outcome.READY, Outcome.ARRIVED, Outcome.ROOM_LEFT):
            if state is not State.JOINING:
                self._ledger.note_read(server_name, room_id, step.event_id)
            if reply in (Reply.HAS, Reply.MAY_NOT_TELL):
                self._ledger.note_joined(server_name, room_id)

    async def _question(self, debtor: Debtor, step: Ask) -> tuple[Reply, Collection[str]]:
        """Ask for an event, and maybe for those before it; return which of these it has."""
        server_name = debtor.server_name
        if step.in_history:
            return await self._federation.has_in_history(server_name, step.event_id), ()
        if step.with_history:
            awaited = [event.event_id for event in step.payment.awaited]
            # If the server has joined again meanwhile it is not there any more.
            before = takewhile(lambda event_id: event_id != step.event_id, awaited)
            event_ids, room_id = [*before, step.event_id], step.payment.room_id
            answer = await self._federation.has_with_history(server_name, room_id, event_ids)
            if answer is not None:
                return answer
            debtor.tells_history = False
        return await self._federation.has_event(server_name, step.event_id), ()

    def _settle(self, debtor: Debtor, room_id: str, events: list[StickyEvent]) -> None:
        """The server has these."""
        event_ids = [event.event_id for event in events]
        self._ledger.settle(debtor.server_name, room_id, event_ids)
        self._metrics.count(PAYMENTS, len(events), outcome="confirmed")
        debtor.paid += len(events)

    def _may_send(self, debtor: Debtor, step: Send) -> bool:
        """Take the turn and a slot; or else wait for them, without holding either."""
        name, turn, now = debtor.server_name, self._turn(debtor.server_name), self._now()
        is_from_before_join = all(
            self._ledger.is_from_before_join(name, event) for event in step.events
        )
        if now < turn.rests_until and not turn.is_ahead:
            step.payment.deferred(now, turn.rests_until)
            return False
        if turn.is_second(is_from_before_join=is_from_before_join):
            if not self._federation.remind_queue(name):
                debtor.stop_deferring()
            elif debtor.may_defer(now):
                step.payment.deferred(now, now + _TICK_MS)
                return False
        if not turn.claim():
            step.payment.deferred(now, now + MAX_DEFERRAL_MS)
            return False
        self._slots.request(name, is_failing=debtor.failures > 0)
        self._give_slots()
        return self._slots.has(name)

    async def _send(self, debtor: Debtor, step: Send) -> None:
        """Send one transaction."""
        name, turn = debtor.server_name, self._turn(debtor.server_name)
        step.payment.began(step.events)
        turn.began(self._now())
        self._slots.began()
        try:
            sent = await self._transmit(debtor, step)
        except RequestFailed as error:
            ending = Ending.of(error.status)
            turn.ended(ending, self._now())
            was_there = ending is Ending.FAILED and error.status != _TOO_MANY_REQUESTS
            debtor.failed(
                step,
                self._now(),
                str(error),
                is_alone=was_there or turn.is_alone,
                pause_ms=error.retry_after_ms,
            )
        else:
            if sent is not None:
                turn.ended(Ending.ARRIVED, self._now())
            self._take_note(debtor, step, sent or Sent())
        finally:
            self._slots.ended()
            turn.finish_sending()
            self._free_slot(name)
            self._let_synapse_go_on(name)

    async def _transmit(self, debtor: Debtor, step: Send) -> Sent | None:
        """Send those of the events that are still to be sent; None if there are none.

        Raises:
            RequestFailed: if the server did not take them.
        """
        server_name, room_id = debtor.server_name, step.payment.room_id
        # While we waited Synapse's queue may have sent some.
        due = self._ledger.still_due(server_name, room_id, step.events)
        events = await self._federation.to_send([event.event_id for event in due])
        wanted = {event.event_id for event in events}
        # Nobody is owed any more what was redacted, or is by somebody erased.
        gone = [event.event_id for event in due if event.event_id not in wanted]
        self._ledger.settle(server_name, room_id, gone)
        if not events:
            return None
        fitting = self._federation.fitting(events)
        answer = await self._federation.send(server_name, fitting)
        due_in_order = [event for event in due if event.event_id in wanted]
        sent = due_in_order[: len(fitting)]
        return Sent(
            left=due_in_order[len(sent) :],
            accepted=[event for event in sent if event.event_id in answer.accepted],
            refused=[event for event in sent if event.event_id in answer.refused],
            missing=[e for e in sent if e.event_id not in answer.accepted | answer.refused],
        )

    def _take_note(self, debtor: Debtor, step: Send, sent: Sent) -> None:
        """Take note of how a server answered a transaction."""
        server_name, room_id = debtor.server_name, step.payment.room_id
        given_up = step.payment.sent(sent, self._now())
        if sent.accepted:
            newest_id, oldest = sent.accepted[-1].event_id, sent.accepted[0]
            self._ledger.note_sent(server_name, room_id, len(sent.accepted), newest_id)
            age_ms = self._clock.now_ts() - oldest.position
            debtor.oldest_age_ms = max(debtor.oldest_age_ms, age_ms)
        retried = len(sent.refused) + len(sent.missing) - len(given_up)
        self._metrics.count(PAYMENTS, retried, outcome="retried")
        if given_up:
            self._metrics.count(PAYMENTS, len(given_up), outcome="given_up")
            self._ledger.settle(server_name, room_id, [event.event_id for event in given_up])
            logger.warning(
                "Giving up on sending %d sticky events in %r to %s, which refuses them",
                len(given_up),
                room_id,
                server_name,
            )

    def _give_slots(self) -> None:
        """Give the slots that are free to the servers that wait longest."""
        while (given := self._slots.give()) is not None:
            name, number = given
            self._clock.call_later(_SLOT_MS, partial(self._free_slot, name, number))
            debtor = self._debtors.get(name)
            if name not in self._running and (debtor is None or not self._start(debtor)):
                # It asks for a slot again when it comes to that.
                self._slots.take_back(name)

    def _free_slot(self, server_name: str, number: int | None = None) -> None:
        """Give a server's slot, if it is still the one with this number, to others."""
        self._slots.take_back(server_name, number)
        self._give_slots()

    # Checking one server.

    def _start_check(self, debtor: Debtor) -> None:
        """Check the events that have arrived, if it is time; beside payments."""
        history = debtor.history
        if (
            history
            and not history.is_checking
            and history.next_ts <= self._now()
            and not debtor.silence.is_on(self._now())
            and self._checks < _MAX_CHECKS
        ):
            history.is_checking = True
            self._checks += 1
            self._api.run_as_background_process("sticky_check_server", self._check, debtor)

    async def _check(self, debtor: Debtor) -> None:
        """Settle the events that are in their room's history; others are to be sent again."""
        history = debtor.history
        try:
            events = history.batch()
            room_id = events[0].room_id
            due = self._ledger.still_due(
                debtor.server_name, room_id, sorted(events, key=lambda event: event.position)
            )
            # Nobody is owed any more what has expired.
            history.forget(event for event in events if event not in due)
            lost = await self._find_lost(debtor, due)
            self._metrics.count(PAYMENTS, len(lost), outcome="retried")
            payment = debtor.rooms.get(room_id)
            if payment is not None and (lost or not history.has_room(room_id)):
                payment.confirmed(lost, self._now())
        except Exception as error:
            log_failure(f"Cannot check what {debtor.server_name} has; trying again", error)
            history.next_ts = self._now() + _ERROR_PAUSE_MS
        finally:
            history.is_checking = False
            self._checks -= 1
            self._start(debtor)

    async def _find_lost(self, debtor: Debtor, events: list[StickyEvent]) -> list[StickyEvent]:
        """Return those of these events that a server has lost, and settle those that it has."""
        history, lost = debtor.history, []
        for event in events:
            reply = Reply.SILENT
            if history.must_ask:
                reply = await self._federation.has_in_history(debtor.server_name, event.event_id)
                debtor.silence.took(reply, self._now())
            kept = history.took(event, reply, self._now())
            if kept is None:
                break
            if kept:
                self._settle(debtor, event.room_id, [event])
            else:
                lost.append(event)
        return lost
