# SPDX-License-Identifier: AGPL-3.0-or-later
"""What sticky events cost that go to many servers, each of which takes them at once."""

import contextlib
import random
import statistics
import time
from pathlib import Path
from typing import Final

from benchmarks.clock import cpu_ns
from benchmarks.measure import Measurement, Scenario
from benchmarks.peers import Peers
from benchmarks.progress import Progress
from benchmarks.results import Section, at_most
from benchmarks.scenarios import STICKY_MS
from benchmarks.server import CONTROL, PLAIN, STICKY, Server

KEY: Final = "watermarks"
_SERVERS: Final = 100
_EVENTS: Final = 10
"""In one go."""
# What the module does for an event it does within the grace period, after the
# acknowledgements and when the period ends. Until then costs are still rising.
_WARM_UP_S: Final = 25
# By which a plain event is made as long as a sticky one.
_PADDING: Final = "." * len(f'"msc4354_sticky":{{"duration_ms":{STICKY_MS}}},')
_MILLION: Final = 1e6


class _Sends(Scenario):
    key = KEY
    title = f"{_EVENTS} sticky sends to a room with {_SERVERS} servers, per event"


def measure_watermarks(
    directory: Path, rounds: int, budget_s: float, progress: Progress
) -> tuple[Measurement, Section]:
    """Send the same to the same servers, from Synapse with and without the module."""
    result = Measurement(_Sends())
    with contextlib.ExitStack() as stack:
        peers = stack.enter_context(Peers(directory / "peers", _SERVERS))
        senders = []
        for kind in (PLAIN, CONTROL, STICKY):
            progress.step(f"{KEY}: {kind} joins a room with {_SERVERS} servers")
            server = Server(kind, kind, directory / kind, federation=True)
            stack.callback(server.close)
            senders.append(_Sender(server, peers))
        _take_turns(result, senders, rounds, budget_s, progress)
        peers_s = cpu_ns(peers.pid) / 1e9
        received = {s.server.name: peers.received(s.server.server_name) for s in senders}
    progress.line(f"{KEY}: the other servers together used {peers_s:.1f} s CPU: {received}")
    repeats = received[STICKY]["repeats"]
    return result, _section(result, repeats)


class _Sender:
    """A homeserver, and its room."""

    def __init__(self, server: Server, peers: Peers) -> None:
        self.server = server
        self._peers = peers
        self._sent = 0
        server.start()
        self._user = server.register("user")
        self._room_id = peers.meet(server, self._user)

    def send(self) -> float:
        """Send, and wait until everybody has everything; returns how long it took."""
        start = time.perf_counter()
        for _ in range(_EVENTS):
            if self.server.kind == STICKY:
                self.server.send(self._user, self._room_id, STICKY_MS)
            else:
                self.server.send(self._user, self._room_id, padding=_PADDING)
        self._sent += _EVENTS
        self._peers.received(self.server.server_name, self._sent * _SERVERS)
        return time.perf_counter() - start


def _take_turns(
    result: Measurement,
    senders: list[_Sender],
    rounds: int,
    budget_s: float,
    progress: Progress,
) -> None:
    """Let the servers take turns. What one does in the others' turns counts too."""
    order = random.Random(KEY)
    start = time.monotonic()
    number = 0
    before = {s.server.name: cpu_ns(s.server.pid) for s in senders}
    while number < rounds and time.monotonic() < start + _WARM_UP_S + budget_s:
        wall = {s.server.name: s.send() for s in order.sample(senders, len(senders))}
        now = {s.server.name: cpu_ns(s.server.pid) for s in senders}
        if time.monotonic() < start + _WARM_UP_S:
            progress.step(f"{KEY}: warming up")
        else:
            number += 1
            for name, seconds in wall.items():
                used_ms = (now[name] - before[name]) / _MILLION
                result.cpu_ms.setdefault(name, []).append(used_ms / _EVENTS)
                result.wall_ms.setdefault(name, []).append(seconds * 1e3 / _EVENTS)
            progress.step(f"{KEY}: round {number} of at most {rounds}")
        before = now


def _section(result: Measurement, repeats: int) -> Section:
    ratio, wall = result.cpu_ratio(STICKY, PLAIN), result.wall_ratio(STICKY, PLAIN)
    control = result.cpu_ratio(CONTROL, PLAIN), result.wall_ratio(CONTROL, PLAIN)
    milliseconds = {name: statistics.median(values) for name, values in result.cpu_ms.items()}
    text = f"""\
A user sends {_EVENTS} events right after each other to a room with {_SERVERS} other servers, which
all acknowledge at once. With the module they are sticky; without, they are plain ones of the same
size. The servers under test take turns, {len(result.wall_ms[STICKY])} rounds of them. CPU time is
that of the sending process from one of its turns to the next: what the module does later, when it
stores watermarks and when the grace period of an event ends, falls into later rounds. The target is
for CPU time; the time until all servers have everything is noisier, with all on one machine.

| | Module / without | Without / without |
| --- | --- | --- |
| CPU time of the sender | {ratio} | {control[0]} |
| Time from the first send until all have received all | {wall} | {control[1]} |

An event to {_SERVERS} servers takes {milliseconds[PLAIN]:.0f} ms of CPU time without the module and
{milliseconds[STICKY]:.0f} ms with it. The module sent {repeats} of them twice."""
    return Section(
        KEY,
        f"Sticky events in a room with {_SERVERS} servers",
        text,
        [
            at_most(
                f"Sticky sends to a room with {_SERVERS} servers, to Synapse without", ratio, 1.05
            )
        ],
    )
