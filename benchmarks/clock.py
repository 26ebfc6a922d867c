# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a process has used so far: CPU time and memory. Linux only."""

import contextlib
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_CPUCLOCK_SCHED: Final = 2
_TICKS_PER_S: Final = 100
_IDLE_FIELDS: Final = (3, 4)

# A request is over once its server has been idle for this long. It is longer than
# any delay with which either implementation puts off work of a request.
_QUIET_S: Final = 0.03
_QUIET_NS: Final = 150_000
_STEP_S: Final = 0.005
_PATIENCE_S: Final = 0.5


def cpu_ns(pid: int) -> int:
    """CPU time of a process, user and system, of all of its threads, past ones included.

    This is the kernel's CPU clock of the process, as ``clock_getcpuclockid`` would
    name it: it counts nanoseconds, not ticks.
    """
    return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)


def resident_bytes(pid: int) -> int:
    """The memory of a process that is in RAM."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    match = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert match is not None
    return int(match.group(1)) * 1024


def settle(pid: int) -> None:
    """Wait until a process has done what it does after it answered.

    A server that is never quite idle is waited for only so long.
    """
    time.sleep(_QUIET_S)
    deadline = time.monotonic() + _PATIENCE_S
    before = cpu_ns(pid)
    while time.monotonic() < deadline:
        time.sleep(_STEP_S)
        now = cpu_ns(pid)
        if now - before < _QUIET_NS and not _is_working(pid):
            return
        before = now


def _is_working(pid: int) -> bool:
    """Whether a thread wants a processor, even if it gets none, or waits for the disk."""
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # The name before the state may contain anything.
            state = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
            if state in ("R", "D"):
                return True
    return False


def machine_busy_s() -> float:
    """How long the processors of this machine have worked since it started, all together."""
    first_line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    ticks = [int(field) for field in first_line.split()[1:9]]
    return sum(n for i, n in enumerate(ticks) if i not in _IDLE_FIELDS) / _TICKS_PER_S


def own_cpu_s(pids: Iterable[int]) -> float:
    """CPU time of this process and of these."""
    return time.process_time() + sum(cpu_ns(pid) for pid in pids) / 1e9
