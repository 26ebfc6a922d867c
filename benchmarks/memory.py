# SPDX-License-Identifier: AGPL-3.0-or-later
"""How much memory a live sticky event takes.

Run as a program this builds an index, and nothing else, and prints bytes per event.
"""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.clock import resident_bytes
from benchmarks.growth import seed_changes
from benchmarks.server import Server
from synapse_sticky.deliverable.index import StickyIndex


@dataclass(frozen=True)
class Memory:
    """Bytes per live sticky event.

    Attributes:
        server: by which a Synapse process is larger that has them.
        index: of an index that took them one after the other.
        events: how many there were.
    """

    server: float
    index: float
    events: int


def server_bytes(servers: Mapping[int, Server]) -> float:
    """How much larger the process with the most events is than the one with none."""
    most = max(servers)
    larger, smaller = (resident_bytes(servers[size].pid) for size in (most, min(servers)))
    return (larger - smaller) / (most - min(servers))


def index_bytes(events: int) -> float:
    """The same for an index in a Python process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", str(events)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(printed)


def _measure(events: int) -> float:
    index = StickyIndex()
    now_ts = int(time.time() * 1000)
    gc.collect()
    before = resident_bytes(os.getpid())
    for change in seed_changes(events, now_ts):
        index.apply([change], [], change.position or 0)
    gc.collect()
    after = resident_bytes(os.getpid())
    assert len(index) == events
    return (after - before) / events


if __name__ == "__main__":
    print(_measure(int(sys.argv[1])))
