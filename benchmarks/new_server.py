# SPDX-License-Identifier: AGPL-3.0-or-later
"""How long it takes until a server that joins a room has the sticky events from before.

Two real homeservers: one with the module, which has the room, and Synapse without it.
"""

import contextlib
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.clock import cpu_ns
from benchmarks.progress import Progress
from benchmarks.ratio import ratio_of
from benchmarks.results import Section, Target, at_most
from benchmarks.scenarios import STICKY_MS
from benchmarks.server import PLAIN, STICKY, Server, parsed
from harness.client import Client
from harness.wait import eventually

KEY: Final = "new_server"
_USERS: Final = 10
_EVENTS_PER_TRANSACTION: Final = 50
_STOPPED_S: Final = 8
_MIN_ROUNDS: Final = 2
_POLL_S: Final = 0.1
# Longer than any pause after which something is tried again.
_PATIENCE_S: Final = 75
# While the receiver is stopped a transaction is on its way to it.
_CONFIGURATION: Final = {"federation": {"client_timeout": "300s"}}
_PAYMENT: Final = '"PUT /_matrix/federation/v1/send/sticky'
_NEW: Final = "SELECT count(*) FROM events WHERE stream_ordering > ? AND NOT outlier"
# What the receiver has, and shows to its users.
_ARRIVED: Final = """
    SELECT event_id FROM events JOIN event_json USING (event_id)
    WHERE events.room_id = ? AND NOT outlier AND rejection_reason IS NULL
    AND internal_metadata NOT LIKE '%"soft_failed":true%'
"""

_PAID: Final = "paid"
_SENT: Final = "sent"
_QUEUED: Final = "queued"


@dataclass(frozen=True)
class Transfer:
    """What arrived.

    Attributes:
        seconds: until the last that arrived.
        cpu_s: what the receiver used of its processors until then.
        missing: how many events did not.
        join_s: how long the join took that it began with.
        payments: how many transactions of the module's it took.
    """

    seconds: float
    cpu_s: float
    missing: int
    join_s: float = 0
    payments: int = 0

    def __str__(self) -> str:
        text = f"{self.seconds:.1f} s, receiver's CPU {self.cpu_s:.1f} s, {self.missing} missing"
        if self.payments:
            text += f", join {self.join_s:.1f} s, {self.payments} transactions"
        return text


@dataclass(frozen=True)
class _Start:
    """When a measurement began, and what the receiver had and had used by then."""

    monotonic_s: float
    position: int
    cpu_ns: int


class _Pair:
    """The two servers."""

    def __init__(self, directory: Path, events: int) -> None:
        self._events = events
        self.sender = Server("sender", STICKY, directory / "sender", **_options())
        self.receiver = Server("receiver", PLAIN, directory / "receiver", **_options())

    def start(self) -> None:
        """Start them, and make what all rounds use."""
        self.sender.start()
        self.receiver.start()
        self._users = [self.sender.register(f"user{number}") for number in range(_USERS)]
        self._joiner = self.receiver.register("joiner")
        rooms = -(-self._events // _EVENTS_PER_TRANSACTION)
        self._rooms = [self._new_room() for _ in range(rooms)]
        for room_id in self._rooms:
            self._join(room_id)
            start = self._start()
            self._until_arrived({room_id: self._send(room_id, 1)}, start)

    def close(self) -> None:
        """Stop them."""
        self.sender.close()
        self.receiver.close()

    def pay(self, *, state_events: int = 0, stopped_s: float = 0) -> Transfer:
        """Join a new room that has sticky events; measured from the request to join.

        Args:
            state_events: how many more the room has, so that a join takes longer.
            stopped_s: for how long the joining server stands still, as soon as the
                other one has taken its join.
        """
        room_id = self._new_room()
        for number in range(state_events):
            self._users[0].send_state(room_id, "org.example.benchmark", {}, str(number))
        sticky = {room_id: self._send(room_id, self._events, STICKY_MS)}
        log, start = self.receiver.log_position(), self._start()
        with ThreadPoolExecutor() as pool:
            joining = pool.submit(self._join, room_id)
            if stopped_s:
                eventually(lambda: self._has_joined(room_id), interval_s=0.002)
                with self._stopped():
                    assert not joining.done(), "stopped too late"
                    time.sleep(stopped_s)
            join_s = joining.result() - start.monotonic_s
        result = self._until_arrived(sticky, start)
        payments = self.receiver.log_since(log).count(_PAYMENT)
        return replace(result, join_s=join_s, payments=payments)

    def send(self) -> Transfer:
        """Send plain events to a room that both are in; measured from the first send."""
        room_id, start = self._rooms[0], self._start()
        sent = {room_id: self._send(room_id, self._events)}
        return self._until_arrived(sent, start)

    def drain(self) -> Transfer:
        """Let plain events pile up in Synapse's queue; measured from when they may flow.

        They are in many rooms: of more than 100 in one the receiver would throw away most.
        """
        per_room = self._events // len(self._rooms)
        with self._stopped():
            queued = {room_id: self._send(room_id, per_room) for room_id in self._rooms}
            start = self._start()
        return self._until_arrived(queued, start)

    def _new_room(self) -> str:
        creator, *others = self._users
        room_id = creator.create_room(preset="public_chat")
        for user in others:
            user.join(room_id)
        return room_id

    def _join(self, room_id: str) -> float:
        self._joiner.join(room_id, via=[self.sender.server_name])
        return time.monotonic()

    def _has_joined(self, room_id: str) -> bool:
        return bool(
            self.sender.query(
                "SELECT 1 FROM current_state_events WHERE room_id = ? AND state_key = ?",
                room_id,
                self._joiner.user_id,
            )
        )

    def _send(self, room_id: str, count: int, sticky_ms: int | None = None) -> set[str]:
        def send(user: Client) -> str:
            event_id: str = parsed(self.sender.send(user, room_id, sticky_ms))["event_id"]
            return event_id

        return {send(self._users[number % _USERS]) for number in range(count)}

    @contextlib.contextmanager
    def _stopped(self) -> Iterator[None]:
        os.kill(self.receiver.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.receiver.pid, signal.SIGCONT)

    def _start(self) -> _Start:
        ((position,),) = self.receiver.query("SELECT max(stream_ordering) FROM events")
        return _Start(time.monotonic(), position, cpu_ns(self.receiver.pid))

    def _until_arrived(self, sent: dict[str, set[str]], start: _Start) -> Transfer:
        """Wait until the receiver has everything, or nothing has come for a long time."""
        total, known = sum(map(len, sent.values())), 0
        last, cpu_s = start.monotonic_s, 0.0
        while time.monotonic() < last + _PATIENCE_S:
            time.sleep(_POLL_S)
            # Cheap, however many there are.
            ((count,),) = self.receiver.query(_NEW, start.position)
            if count != known:
                known, last = count, time.monotonic()
                cpu_s = (cpu_ns(self.receiver.pid) - start.cpu_ns) / 1e9
            if count >= total and not self._missing(sent):
                break
        return Transfer(last - start.monotonic_s, cpu_s, self._missing(sent))

    def _missing(self, sent: dict[str, set[str]]) -> int:
        return sum(
            len(event_ids - {row[0] for row in self.receiver.query(_ARRIVED, room_id)})
            for room_id, event_ids in sent.items()
        )


def _options() -> dict[str, Any]:
    return {"federation": True, "extra_config": _CONFIGURATION}


def measure_new_server(
    directory: Path, rounds: int, events: int, budget_s: float, progress: Progress
) -> Section:
    """Pay, send and drain in turns; then pay a server that is slow to join.

    No round begins after the budget, except for the first few.
    """
    pair = _Pair(directory, events)
    try:
        progress.line(f"{KEY}: making rooms")
        pair.start()
        kinds = {_PAID: pair.pay, _SENT: pair.send, _QUEUED: pair.drain}
        measured: dict[str, list[Transfer]] = {kind: [] for kind in kinds}
        order = random.Random(KEY)
        start = time.monotonic()
        for number in range(rounds):
            if number >= _MIN_ROUNDS and time.monotonic() > start + budget_s:
                break
            for kind in order.sample(list(kinds), len(kinds)):
                transfer = kinds[kind]()
                measured[kind].append(transfer)
                progress.line(f"{KEY}: round {number + 1} of {rounds}: {kind}: {transfer}")
        slow = [
            (f"stands still for {_STOPPED_S} s after `send_join`", pair.pay(stopped_s=_STOPPED_S)),
            (
                f"joins a room with {2 * events:,} more state events",
                pair.pay(state_events=2 * events),
            ),
        ]
        for what, transfer in slow:
            progress.line(f"{KEY}: a server that {what}: {transfer}")
    finally:
        pair.close()
    return _section(events, measured, slow)


def _section(
    events: int, measured: dict[str, list[Transfer]], slow: list[tuple[str, Transfer]]
) -> Section:
    seconds = {kind: [t.seconds for t in transfers] for kind, transfers in measured.items()}
    to_sent = ratio_of(seconds[_PAID], seconds[_SENT])
    to_queued = ratio_of(seconds[_PAID], seconds[_QUEUED])
    missing = {kind: sum(t.missing for t in transfers) for kind, transfers in measured.items()}
    took = {kind: f"{statistics.median(values):.1f} s" for kind, values in seconds.items()}
    cpu_s = {kind: [t.cpu_s for t in transfers] for kind, transfers in measured.items()}
    used = {kind: f"{statistics.median(values):.1f} s" for kind, values in cpu_s.items()}
    rounds, rooms = len(measured[_PAID]), -(-events // _EVENTS_PER_TRANSACTION)
    slow_rows = "\n".join(
        f"| A server that {what} | {t.join_s:.1f} s | {t.seconds:.1f} s | {t.missing} "
        f"| {t.payments} |"
        for what, t in slow
    )
    joins = statistics.median(t.join_s for t in measured[_PAID])
    payments = statistics.median(t.payments for t in measured[_PAID])
    lost = missing[_PAID] + sum(t.missing for _, t in slow)
    text = f"""\
A room on a server with the module has {events:,} sticky events of {_USERS} users. A server without
the module joins: measured is the time from its request to join until its database has all of them,
neither rejected nor soft-failed, nor as outliers. It is compared with two ways in which Synapse's
own queue sends {events:,} new plain events between the same servers, {rounds} rounds of each in
random order:

- *sent*: to one room that both are in, one after another, as fast as the server takes them from its
  users. From the first send until the other server has all.
- *queued*: as many wait in the queue, in {rooms} rooms, because the other server was stopped
  (SIGSTOP). From when it goes on until it has all: the time to create the events does not count.
  They could not be in one room: of 100 events or more that wait to be read in a room, the receiving
  Synapse throws most away.

| | Time | Time of the payment, as a ratio | CPU time of the receiver | Events that never arrived |
| --- | --- | --- | --- | --- |
| Sticky events from before the join | {took[_PAID]} | - | {used[_PAID]} | {missing[_PAID]} |
| New events, sent | {took[_SENT]} | {to_sent} | {used[_SENT]} | {missing[_SENT]} |
| New events, queued | {took[_QUEUED]} | {to_queued} | {used[_QUEUED]} | {missing[_QUEUED]} |

The receiver reads the events of a room one after another, which is what the time goes into. To read
one from before its join is more work than to read a new one: it has to find out whether the state
of the room since the join allows the event too (soft failure).

Nothing may be lost either if the join takes long, and the first events come while it is under way:

| {events:,} sticky events for | Join | Until it has all | Never arrived | Transactions |
| --- | --- | --- | --- | --- |
| A server that joins at once (medians) | {joins:.1f} s | {took[_PAID]} | {missing[_PAID]} \
| {payments:.0f} |
{slow_rows}"""
    return Section(
        KEY,
        "A server that joins",
        text,
        [
            at_most(
                f"{events:,} sticky events for a server that joins, to as many new ones, sent",
                to_sent,
                1.0,
            ),
            at_most(
                f"{events:,} sticky events for a server that joins, to as many new ones, queued",
                to_queued,
                1.0,
            ),
            Target(
                f"Of {events:,} sticky events, lost for a server that joins, slow ones included",
                "0",
                str(lost),
                lost == 0,
            ),
        ],
    )
