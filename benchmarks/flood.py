# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether others notice that a server floods a room with sticky events.

The flood's server is the tests' own: it sends transactions as fast as Synapse reads them.
To store so many events is work for Synapse, sticky or not: so it is compared with a flood
of plain events, and with no flood.
"""

import contextlib
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.clock import cpu_ns
from benchmarks.listener import Listener
from benchmarks.progress import Progress
from benchmarks.results import Section, Target
from benchmarks.scenarios import STICKY_MS
from benchmarks.server import STICKY, Server
from harness.client import JsonDict
from harness.event_format import Event
from harness.remote import RemoteServer
from harness.wait import eventually

KEY: Final = "flood"
_PER_TRANSACTION: Final = 50
_STAGED: Final = 50
"""How many events Synapse has yet to read before it gets more: of 100 it throws most away."""
_PAUSE_S: Final = 0.1
_PART: Final = 500
"""How many events of one flood are sent before it is the other's turn."""
_WARM_UP_ROUNDS: Final = 3
_QUIET_ROUNDS: Final = 3
_AFTERWARDS_ROUNDS: Final = 40
_BOUND: Final = 1.2
_PATIENCE_S: Final = 300
# A hundredth of the default: one process stores hardly more than the default lets through.
_SLOW: Final[JsonDict] = {"remote_rate_limit": {"per_second": 0.2, "burst_count": 10}}
_RELEASED_AT_ONCE: Final = 2_500
"""So many may be released by the default rate before others have been measured."""
_STICKY: Final[JsonDict] = {"msc4354_sticky": {"duration_ms": STICKY_MS}}
_TIMELINE: Final[JsonDict] = {"limit": 100}
_NO_TIMELINE: Final[JsonDict] = {"types": []}

_NO_FLOOD: Final = "no flood"
_PLAIN_FLOOD: Final = "plain flood"
_STICKY_FLOOD: Final = "sticky flood"
_AFTERWARDS: Final = "afterwards"


@dataclass
class _Phase:
    """How long the others' events took, in ms, by kind; and what the flood took."""

    took_ms: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0
    cpu_s: float = 0

    def median(self, kind: str) -> float:
        """The median of a kind."""
        return statistics.median(self.took_ms[kind])


def measure_flood(directory: Path, events: int, progress: Progress) -> Section:
    """Measure others without a flood, with a plain and a sticky one, and after that one."""
    phases = {name: _Phase() for name in (_NO_FLOOD, _PLAIN_FLOOD, _STICKY_FLOOD, _AFTERWARDS)}
    with contextlib.ExitStack() as stack:
        server = Server(STICKY, STICKY, directory, federation=True, module_config=_SLOW)
        stack.callback(server.close)
        server.start()
        place = _Place(server, stack)
        plain, sticky = place.prepare(events, {}), place.prepare(events, _STICKY)
        place.listen(plain.room_id)
        place.measure(_Phase(), _WARM_UP_ROUNDS)
        for start in range(0, events, _PART):
            # In turn, so that whatever else the machine does hits all alike.
            place.listen(plain.room_id)
            place.measure(phases[_NO_FLOOD], _QUIET_ROUNDS)
            place.flood(plain.events[start : start + _PART], phases[_PLAIN_FLOOD])
            place.listen(sticky.room_id)
            place.flood(sticky.events[start : start + _PART], phases[_STICKY_FLOOD])
            progress.step(f"{KEY}: {start + _PART} of {events}")
        held = place.held()
        for name in (_PLAIN_FLOOD, _STICKY_FLOOD):
            progress.line(f"{KEY}: {_describe(phases, name)}")
        place.restart({})
        place.listen(sticky.room_id)
        place.measure(phases[_AFTERWARDS], _AFTERWARDS_ROUNDS)
        progress.line(f"{KEY}: {_describe(phases, _AFTERWARDS)}; {held} held, {place.held()} left")
        if events > _RELEASED_AT_ONCE:
            assert place.held(), "all were released before others were measured"
        place.restart({"remote_rate_limit": None})
        lost = place.missing_or_out_of_order([event.event_id for event in sticky.events])
    return _section(phases, events, held, lost)


@dataclass
class _Flood:
    """A room, and the events that are to flood it."""

    room_id: str
    events: list[Event]


class _Place:
    """A server, the users, and the servers that they hear from."""

    def __init__(self, server: Server, stack: contextlib.ExitStack) -> None:
        self._server = server
        self._stack = stack
        self._alice, self._bob, self._dora = (server.register() for _ in range(3))
        self._flooder, self._other = (stack.enter_context(RemoteServer()) for _ in range(2))
        self._calm = self._alice.create_room(preset="public_chat")
        self._dora.join(self._calm)
        self._order = random.Random(KEY)
        self._listening = contextlib.ExitStack()

    def prepare(self, events: int, keys: JsonDict) -> _Flood:
        """Make a room, and what is to flood it."""
        room_id = self._alice.create_room(preset="public_chat")
        self._bob.join(room_id)
        flooder = self._flooder.join(self._server, room_id, "flooder")
        self._other_user = self._other.join(self._server, room_id, "other")
        created = []
        for number in range(events):
            content = {"msgtype": "m.text", "body": f"This is message number {number}"}
            event = self._flooder.create_event(room_id, "m.room.message", content, flooder, **keys)
            self._flooder.remember(event)
            created.append(event)
        return _Flood(room_id, created)

    def listen(self, room_id: str) -> None:
        """Let users wait for news, and measure events that are sent to this room."""
        self._room = room_id
        self._listening.close()
        self._listening = contextlib.ExitStack()
        enter, url = self._listening.enter_context, self._server.main_url
        self._elsewhere = enter(Listener(self._dora, url, _TIMELINE))
        self._inside = enter(Listener(self._bob, url, _TIMELINE))

    def restart(self, config: JsonDict) -> None:
        """Restart the server with another configuration of the module."""
        self._server.stop()
        self._server.reconfigure(module_config=config)
        self._server.start()

    def measure(self, phase: _Phase, rounds: int) -> None:
        """Measure the others."""
        for _ in range(rounds):
            self._measure(phase)

    def flood(self, events: Sequence[Event], phase: _Phase) -> None:
        """Measure the others while these events are sent."""
        sending = threading.Thread(target=self._send, args=(events,))
        began, cpu_before = time.monotonic(), cpu_ns(self._server.pid)
        sending.start()
        while sending.is_alive():
            self._measure(phase)
        sending.join()
        phase.seconds += time.monotonic() - began
        eventually(lambda: not self._staged(), _PATIENCE_S, "all read")
        phase.cpu_s += (cpu_ns(self._server.pid) - cpu_before) / 1e9

    def held(self) -> int:
        """How many events are held for their rate."""
        query = "SELECT COUNT(*) FROM synapse_sticky_held WHERE reason = 'over_rate'"
        ((count,),) = self._server.query(query)
        return int(count)

    def missing_or_out_of_order(self, sent: Sequence[str]) -> int:
        """How many of the flood do not arrive in their turn, in the sections of a user."""
        eventually(lambda: not self.held(), 600, "all released")
        with Listener(self._bob, self._server.main_url, _NO_TIMELINE) as listener:
            eventually(lambda: sent[-1] in listener.arrived, 120, "the last one")
            ours = set(sent)
            arrived = [event_id for event_id in listener.arrived if event_id in ours]
        return sum(a != b for a, b in zip(sent, arrived, strict=False)) + len(sent) - len(arrived)

    def _staged(self) -> int:
        ((count,),) = self._server.query("SELECT COUNT(*) FROM federation_inbound_events_staging")
        return int(count)

    def _send(self, events: Sequence[Event]) -> None:
        for start in range(0, len(events), _PER_TRANSACTION):
            while self._staged() > _STAGED:
                time.sleep(0.02)
            self._flooder.send(events[start : start + _PER_TRANSACTION], remember=False)

    def _measure(self, phase: _Phase) -> None:
        kinds: dict[str, tuple[Callable[[], str], Listener]] = {
            "A sticky event of another server, same room": (
                lambda: self._other.send_event(self._room, self._other_user, **_STICKY).event_id,
                self._inside,
            ),
            "A plain message, same room": (lambda: self._alice.send(self._room), self._inside),
            "A sticky event, other room": (
                lambda: self._alice.send(self._calm, sticky_ms=STICKY_MS),
                self._elsewhere,
            ),
            "A plain message, other room": (lambda: self._alice.send(self._calm), self._elsewhere),
        }
        for kind in self._order.sample([*kinds], len(kinds)):
            time.sleep(_PAUSE_S)
            send, listener = kinds[kind]
            began = time.perf_counter()
            took_ms = (listener.arrival(send(), _PATIENCE_S) - began) * 1e3
            phase.took_ms.setdefault(kind, []).append(took_ms)


def _describe(phases: dict[str, _Phase], name: str) -> str:
    quiet, phase = phases[_NO_FLOOD], phases[name]
    medians = "; ".join(
        f"{kind} {phase.median(kind):.0f} ms ({phase.median(kind) / quiet.median(kind):.2f})"
        for kind in sorted(phase.took_ms)
    )
    rounds = min(len(values) for values in phase.took_ms.values())
    return f"{name}, {phase.seconds:.0f} s, {phase.cpu_s:.1f} s CPU, {rounds} rounds: {medians}"


def _section(phases: dict[str, _Phase], events: int, held: int, lost: int) -> Section:
    quiet, plain = phases[_NO_FLOOD], phases[_PLAIN_FLOOD]
    sticky, afterwards = phases[_STICKY_FLOOD], phases[_AFTERWARDS]
    kinds = sorted(quiet.took_ms)
    rows = "\n".join(
        f"| {kind} | {quiet.median(kind):.0f} ms | {plain.median(kind):.0f} ms | "
        f"{sticky.median(kind):.0f} ms | {sticky.median(kind) / plain.median(kind):.2f} | "
        f"{sticky.median(kind) / quiet.median(kind):.2f} | "
        f"{afterwards.median(kind) / quiet.median(kind):.2f} |"
        for kind in kinds
    )
    text = f"""\
A server sends {events:,} sticky events to one room, in transactions of {_PER_TRANSACTION}, as fast
as Synapse reads them: in {sticky.seconds:.0f} s. That is little more than the default rate lets
through, so it is a hundredth of the default meanwhile, and at the end {held:,} are held. Then,
after a restart, they are released at the default rate. Meanwhile others send, and users wait in
long-polls of `/sync`: the time from the beginning of the send until the whole answer is there.

To store a flood is work for Synapse, whatever is in it, and the more events of a room are yet to be
read, the longer another server's event in that room waits for its turn. So the flood of sticky
events is compared with one of as many plain events ({plain.seconds:.0f} s). "Afterwards" is while
the held events are released, when only the module has something to do.

| Median | No flood | Plain flood | Sticky flood | Sticky / plain flood | \
Sticky / no flood | Afterwards / no flood |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

The process used {sticky.cpu_s:.0f} s of CPU time during the sticky flood and {plain.cpu_s:.0f} s
during the plain one, what it did for the others included.

After the flood {lost:,} of its events did not arrive, or not in their turn."""
    worst = max(sticky.median(kind) / plain.median(kind) for kind in kinds)
    after = max(afterwards.median(kind) / quiet.median(kind) for kind in kinds)
    return Section(
        KEY,
        f"A flood of {events:,} sticky events",
        text,
        [
            _target("Others during a flood of sticky events, to one of plain events", worst),
            _target("Others while a flood is released, to without", after),
            Target(
                f"Of {events:,} flooding events, lost or out of order", "0", f"{lost}", not lost
            ),
        ],
    )


def _target(text: str, ratio: float) -> Target:
    return Target(text, f"≤ {_BOUND:.2f}", f"{ratio:.2f}", ratio <= _BOUND)
