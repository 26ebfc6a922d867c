"""Child processes that never outlive the tests."""

import atexit
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from harness.forking import ForkedProcess, fork

# Ends every process it was told of, and removes the directories, once its standard input
# closes. The kernel sees to that however the test run ends, even by SIGKILL.
_WATCHDOG_PROGRAM = """
import os, shutil, signal, sys, time
pids, directories = set(), []
for line in sys.stdin:
    action, argument = line[0], line[1:-1]
    if action == "+":
        pids.add(int(argument))
    elif action == "-":
        pids.discard(int(argument))
    else:
        directories.append(argument)
def send(number):
    for pid in sorted(pids):
        try:
            os.kill(pid, number)
        except OSError:
            pids.discard(pid)
send(signal.SIGTERM)
deadline = time.monotonic() + 5
while pids and time.monotonic() < deadline:
    time.sleep(0.1)
    send(0)
send(signal.SIGKILL)
for directory in directories:
    shutil.rmtree(directory, ignore_errors=True)
"""

# Below the range the kernel picks ports for outgoing connections from, so that a port stays
# free while the process that owns it is being restarted.
# The two or more processes that tests run in have a part of it each.
_FIRST_PORT = 12000 + 2000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = range(_FIRST_PORT, _FIRST_PORT + 2000)

_lock = threading.Lock()
_ports_handed_out: set[int] = set()
_watchdog: "subprocess.Popen[str] | None" = None
_running: "set[ManagedProcess]" = set()


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on, never the same one twice."""
    with _lock:
        while True:
            port = random.choice(_PORTS)
            if port in _ports_handed_out:
                continue
            with socket.socket() as probe:
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
            _ports_handed_out.add(port)
            return port


def accepts_connections(port: int) -> bool:
    """Whether something listens on that port of 127.0.0.1."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def temporary_directory(prefix: str) -> Path:
    """A new directory, removed when the test run is over if it was not before."""
    # Not one of pytest's own, which other users may not enter.
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    with _lock:
        _tell_watchdog(f"d{directory}")
    return directory


class ManagedProcess:
    """A child process in a session of its own, whose output goes to a file.

    With `forked` the command is one that runs an application of Synapse's, which begins with its
    imports behind it.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        output: Path,
        *,
        user: str | None = None,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        forked: bool = False,
    ) -> None:
        arguments = [str(part) for part in command]
        self.output = output
        with output.open("ab") as stream:
            self.output_start = stream.tell()
            # _lock keeps the new process known to the watchdog from its first moment.
            with _lock:
                if forked:
                    assert directory is not None
                    self._process: subprocess.Popen[bytes] | ForkedProcess = fork(
                        arguments,
                        output=output,
                        environment=environment or {},
                        directory=directory,
                    )
                else:
                    self._process = subprocess.Popen(
                        arguments,
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, **(environment or {})},
                        cwd=directory,
                        user=user,
                        # An empty list: with another user, drop root's groups as well.
                        extra_groups=[] if user is not None else None,
                        start_new_session=True,
                    )
                _running.add(self)
                _tell_watchdog(f"+{self._process.pid}")

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, or None while the process runs."""
        code = self._process.poll()
        if code is not None:
            self._forget()
        return code

    def read_output(self) -> str:
        """Everything this process (not an earlier one with the same file) has written."""
        with self.output.open("rb") as stream:
            stream.seek(self.output_start)
            return stream.read().decode("utf-8", errors="replace")

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process if it still runs."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Wait for the process to end, and return its exit code."""
        code = self._process.wait(timeout_s)
        self._forget()
        return code

    def kill(self) -> None:
        """End the process with SIGKILL, and wait until it is gone."""
        self._process.kill()
        self.wait(30)

    def stop(self, number: signal.Signals = signal.SIGTERM, patience_s: float = 20) -> None:
        """End the process with a signal, with SIGKILL once the patience is over."""
        self.send_signal(number)
        self.wait_or_kill(patience_s)

    def wait_or_kill(self, patience_s: float = 20) -> None:
        """Wait for a process that was told to end, and kill it once the patience is over."""
        try:
            self.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def _forget(self) -> None:
        with _lock:
            if self in _running:
                _running.remove(self)
                _tell_watchdog(f"-{self._process.pid}")


def _tell_watchdog(line: str) -> None:
    """Write to the watchdog, starting it if needed. The caller holds `_lock`."""
    global _watchdog
    if _watchdog is None:
        _watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCHDOG_PROGRAM],
            stdin=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
    stream: IO[str] | None = _watchdog.stdin
    assert stream is not None
    # A watchdog that somebody ended must not keep the tests from cleaning up.
    with contextlib.suppress(BrokenPipeError):
        stream.write(line + "\n")
        stream.flush()


@atexit.register
def _end_everything() -> None:
    """The last resort for what no fixture has ended."""
    for process in list(_running):
        process.stop(patience_s=5)
    if _watchdog is not None and _watchdog.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            _watchdog.stdin.close()
        _watchdog.wait(30)
