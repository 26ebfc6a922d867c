"""`synapse-sticky watch`: the view of an admin in a terminal."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from harness.client import Client
from harness.homeserver import Homeserver
from harness.wait import eventually
from synapse_sticky.command.watch import REASONS
from synapse_sticky.noticing.admission import HeldReason
from tests.command import Gateway, failing, run
from tests.support import HOUR_MS, send_sticky, text

# It reads the admin API only, which has tests of its own on each Synapse.
pytestmark = [pytest.mark.deployments("sqlite"), pytest.mark.any_synapse]

# Ends the title of a window, turns the text around, and takes a line of its own.
HOSTILE = "a\x1b]0;evil\x07\x1b[2J\u202eb\nc\x9b31m"
ROWS, COLUMNS = 24, 80


@pytest.fixture
def admin(homeserver: Homeserver) -> Client:
    """An admin of the shared deployment."""
    return homeserver.register(admin=True)


def watch(homeserver: Homeserver, admin: Client, *arguments: str) -> str:
    """The view, shown once."""
    answer = run(
        *("watch", "--once", "--url", homeserver.main_url, "--token", admin.access_token),
        *arguments,
    )
    assert (answer.code, answer.errors) == (0, "")
    return answer.output


def send_keyed(client: Client, room: str, key: str, sticky_ms: int = HOUR_MS) -> str:
    """Send a sticky event that has its own place in the map."""
    return client.send(room, {**text("x"), "msc4354_sticky_key": key}, sticky_ms=sticky_ms)


def test_rooms(homeserver: Homeserver, admin: Client, room: str) -> None:
    """Each has its counts and its switch, the busiest first, within 80 columns."""
    send_sticky(admin, admin.create_room(), 2)
    alone = admin.create_room()
    send_sticky(admin, alone, 3)
    eventually(lambda: "all noticed" in watch(homeserver, admin), what="the events")
    lines = watch(homeserver, admin).splitlines()
    (mine,) = [line for line in lines if line.startswith(alone)]
    assert mine.split()[1:] == ["3", "0", "0", "on", "(default)"]
    assert re.search(r": \d+ live, \d+ held, \d+ owed; all noticed$", lines[0])
    counts = [int(line.split()[1]) for line in lines[2:] if line.startswith("!")]
    assert counts == sorted(counts, reverse=True)
    assert max(map(len, lines)) <= COLUMNS


def test_room(homeserver: Homeserver, admin: Client) -> None:
    """Entries with the time that is left, held events with the reason in words."""
    room = admin.create_room()
    send_keyed(admin, room, "one")
    send_keyed(admin, room, "two", sticky_ms=59_000)
    eventually(lambda: "of the map: 2" in watch(homeserver, admin, room), what="the events")
    shown = watch(homeserver, admin, room)
    assert f"{room}\nSticky events are on, by default\n" in shown
    assert re.search(rf"{re.escape(admin.user_id)} +m\.room\.message +one +(59:5\d|1:00:00)", shown)
    assert re.search(r"two +0:5\d", shown)
    path = f"/_synapse/client/synapse_sticky/admin/v1/rooms/{room}/settings"
    admin.request("PUT", path, json={"enabled": False})
    eventually(lambda: "Held: 2" in watch(homeserver, admin, room), what="the switch")
    shown = watch(homeserver, admin, room)
    assert "Sticky events are off, decided by a server admin" in shown
    assert "Entries of the map: 0" in shown
    assert shown.count("sticky events are off in the room") == 2


def test_every_reason_has_words() -> None:
    assert set(REASONS) == {reason.value for reason in HeldReason}


def test_hostile_names(homeserver: Homeserver, admin: Client) -> None:
    """Nothing that others have named reaches the terminal as anything but text."""
    room = admin.create_room()
    send_keyed(admin, room, HOSTILE)
    eventually(lambda: "of the map: 1" in watch(homeserver, admin, room), what="the event")
    shown = watch(homeserver, admin, room)
    assert r" a\x1b]0;evil" in shown
    for character in "\x1b\x07\x9b\u202e":
        assert character not in shown
    with terminal(homeserver.main_url, admin.access_token, room) as screen:
        screen.wait_for("evil")
        assert "\x1b]0;" not in screen.output
        assert "\x07" not in screen.output


@dataclass
class Screen:
    """A terminal in which the command runs."""

    process: "subprocess.Popen[bytes]"
    descriptor: int
    output: str = ""

    def wait_for(self, pattern: str, timeout_s: float = 30) -> None:
        """Read until something is shown."""
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, self.output):
            assert time.monotonic() < deadline, f"{pattern!r} is not in {self.output!r}"
            self.read()

    def read(self) -> None:
        """Read the output since then."""
        try:
            self.output += os.read(self.descriptor, 65536).decode()
        except OSError:
            assert self.process.wait(10) == 0, self.output

    @property
    def plain(self) -> str:
        """The output without colours and moves of the cursor; each frame on lines of its own."""
        frames = self.output.replace("\x1b[H", "\n")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frames)


@contextmanager
def terminal(url: str, token: str, *arguments: str) -> Iterator[Screen]:
    """Watch in a terminal of 80 columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [*(sys.executable, "-m", "synapse_sticky.command", "watch", "--url", url), *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        env={**environment, "TERM": "xterm", "SYNAPSE_STICKY_TOKEN": token},
    )
    os.close(follower)
    try:
        yield Screen(process, leader)
    finally:
        process.kill()
        process.wait()
        os.close(leader)


@pytest.mark.slow
def test_live_view(homeserver: Homeserver, admin: Client) -> None:
    """It follows the room, counts the time down, and ends with Ctrl-C without a word."""
    room = admin.create_room()
    send_keyed(admin, room, "first")
    arguments = (homeserver.main_url, admin.access_token, "--interval", "1", "--no-color", room)
    with terminal(*arguments) as screen:
        screen.wait_for(r"first +59:5[0-9]")
        send_keyed(admin, room, "second")
        screen.wait_for(r"second +59:")
        times = re.findall(r"first +(59:5\d)", screen.plain)
        screen.wait_for(r"first +59:4\d", timeout_s=15)
        assert times[0] > re.findall(r"first +(59:\d\d)", screen.plain)[-1]
        assert "\x1b[3" not in screen.output, "colours"
        assert max(len(line.rstrip("\r")) for line in screen.plain.split("\n")) <= COLUMNS
        screen.process.send_signal(signal.SIGINT)
        while screen.process.poll() is None:
            screen.read()
        assert screen.process.returncode == 0
        assert "Traceback" not in screen.output
        # The screen from before is back, and the cursor.
        assert "\x1b[?1049l" in screen.output
        assert "\x1b[?25h" in screen.output


def test_server_that_goes_away(homeserver: Homeserver, admin: Client) -> None:
    """The last answer stays, with how old it is, until the server is back."""
    is_down: list[bool] = []
    with (
        Gateway(homeserver.main_url, lambda m, p: 502 if is_down else None) as gateway,
        terminal(gateway.url, admin.access_token, "--interval", "1") as screen,
    ):
        screen.wait_for("all noticed")
        is_down.append(True)
        screen.wait_for(r"No new answer for [2-9] s: 502 Bad Gateway\.")
        is_down.clear()
        asked = len(gateway.paths)
        time.sleep(3)
        # Two requests a second at the most: the rate is bounded.
        assert len(gateway.paths) - asked <= 8


def test_refusals(homeserver: Homeserver, admin: Client, alice: Client) -> None:
    """It is told in a sentence."""
    url = homeserver.main_url
    for arguments, said in (
        (["--url", url, "--token", alice.access_token], "not that of a server admin"),
        (["--url", url, "--token", "syt_x"], "not valid"),
        (["--url", url, "--token", admin.access_token, "!absent:x"], "not know this room"),
        (["--url", "http://127.0.0.1:9", "--token", "x"], "cannot be reached"),
    ):
        answer = run("watch", *arguments)
        assert answer.code == 3
        assert said in answer.errors
    with Gateway(url, failing("/_synapse/client", 404)) as gateway:
        answer = run("watch", "--url", gateway.url, "--token", admin.access_token)
    assert answer.errors == "synapse-sticky: 404 Not Found.\n"


def test_without_rich() -> None:
    """The one command that needs it says so; the others do without."""
    script = (
        "import sys; sys.modules['rich'] = None\n"
        "from synapse_sticky.command.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, "watch", "--url", "http://127.0.0.1:9", "--token", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 3
    assert "watch needs the Python package rich: pip install" in answer.stderr
    assert "Traceback" not in answer.stderr
