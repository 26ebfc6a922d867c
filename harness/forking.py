"""Starts processes of Synapse that have their imports behind them already.

To import Synapse takes a process most of the time until it serves requests. One process for each
Python and environment does that once, and forks the others, in the way of Synapse's own launcher
that forks. What a process does when it starts, the module included, it does after that, as ever.
"""

import atexit
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_PROGRAM = """
import json, os, random, sys

from synapse.app.complement_fork_starter import ProxiedReactor, _worker_entrypoint
from twisted.internet.main import installReactor

# Each process is to have a reactor of its own.
reactor = ProxiedReactor()
installReactor(reactor)

from synapse.app import generic_worker, homeserver

applications = {module.__name__: module for module in (generic_worker, homeserver)}

def fork(request):
    '''True in the new process. Here, the answer is written: its ID.'''
    reading, writing = os.pipe()
    between = os.fork()
    if between:
        os.close(writing)
        os.waitpid(between, 0)
        with open(reading) as stream:
            answers.write(stream.read() + chr(10))
        answers.flush()
        return False
    # Once this process has ended, the new one is a child of the tests.
    pid = os.fork()
    if pid:
        os.write(writing, str(pid).encode())
        os._exit(0)
    os.close(reading)
    os.close(writing)
    return True

def become(request):
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)
    answers.close()
    os.chdir(request["directory"])
    random.seed()

# Whatever is printed meanwhile is no answer.
answers = open(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    request = json.loads(line)
    if fork(request):
        become(request)
        application, *arguments = request["command"]
        main = applications[application].main
        _worker_entrypoint(main, reactor, [application, *arguments])
        break
"""

_PR_SET_CHILD_SUBREAPER = 36

_lock = threading.Lock()
# By the interpreter, and the environment: that of a process decides what it imports.
_launchers: "dict[tuple[str, frozenset[tuple[str, str]]], subprocess.Popen[str]]" = {}

CAN_FORK = sys.platform == "linux" and "coverage" not in sys.modules
"""Whether processes can be started like this: not elsewhere, nor what coverage measures."""


class ForkedProcess:
    """A process that was forked, with the face of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """The exit code, or None while the process runs."""
        with self._lock:
            if self._code is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self._code = os.waitstatus_to_exitcode(status)
            return self._code

    def wait(self, timeout: float) -> int:
        """Wait for the process to end, and return its exit code."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to the process if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL to the process if it still runs."""
        self.send_signal(signal.SIGKILL)


def fork(
    command: Sequence[str],
    *,
    output: Path,
    environment: Mapping[str, str],
    directory: Path,
) -> ForkedProcess:
    """Start one of Synapse's applications.

    Args:
        command: a Python, `-m`, the name of the application, and arguments.
        output: the file to append its output to; it must exist.
    """
    python, _, *application = command
    request = {
        "command": application,
        "output": str(output),
        "directory": str(directory),
    }
    with _lock:
        key = python, frozenset(environment.items())
        if key not in _launchers:
            _launchers[key] = _start_launcher(python, environment)
        launcher = _launchers[key]
        requests: IO[str] | None = launcher.stdin
        answers: IO[str] | None = launcher.stdout
        assert requests is not None
        assert answers is not None
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        answer = answers.readline()
        if not answer:
            raise RuntimeError(f"{python} cannot import Synapse; what it said is above")
        return ForkedProcess(int(answer))


def _start_launcher(python: str, environment: Mapping[str, str]) -> "subprocess.Popen[str]":
    # Whatever it forks is a child of ours then, whose exit code we are told.
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError("prctl")
    # It ends once its standard input closes, however the test run ends.
    return subprocess.Popen(
        [python, "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
        start_new_session=True,
        text=True,
    )


@atexit.register
def _end_launchers() -> None:
    for launcher in _launchers.values():
        if launcher.stdin is not None:
            launcher.stdin.close()
        launcher.wait(30)
