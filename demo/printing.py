"""What the demos have in common: how they print, and keep count of what is promised."""

import abc
import contextlib
import shlex
import signal
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, Final

import httpx

from harness.client import STICKY_PARAMETER, Client, JsonDict
from harness.homeserver import Homeserver
from harness.wait import NeverHappened, eventually

SECTION: Final = "msc4354_sticky"
REMAINING: Final = "msc4354_sticky_duration_ttl_ms"
# No timeline at all: what a timeline shows is not repeated in the section.
NO_TIMELINE: Final = '{"room": {"timeline": {"types": []}}}'

_PROGRESS_INTERVAL_S: Final = 5


class Show(abc.ABC):
    """What is shown, step by step.

    Attributes:
        broken_promises: how many things were not as they should have been.
        homeservers: all that are to be stopped at the end.
    """

    def __init__(self, homeservers: list[Homeserver]) -> None:
        self.broken_promises = 0
        self.homeservers = homeservers

    @abc.abstractmethod
    def run(self) -> None:
        """Everything, from the start of Synapse to the last promise."""

    @abc.abstractmethod
    def wait_for_the_reader(self) -> None:
        """Tell how to go on, and wait for Ctrl-C."""

    def print_verdict(self) -> None:
        """Whether all was as it should have been."""
        print(
            f"\nNOT AS PROMISED: {self.broken_promises} of the above."
            if self.broken_promises
            else "\nAll as promised."
        )

    def promise(self, kept: bool, what: str) -> None:
        """Print whether something is as it should be, and count it if not."""
        print(f"  {'ok' if kept else 'NOT AS PROMISED'}: {what}")
        self.broken_promises += not kept

    def promise_within(
        self, timeout_s: float, attempt: Callable[[], bool], what: str
    ) -> float | None:
        """Wait until something is as it should be, and return how many seconds that took.

        None if it was not by the deadline.
        """
        started = time.monotonic()
        next_print_s = _PROGRESS_INTERVAL_S

        def attempt_with_progress() -> bool:
            nonlocal next_print_s
            if time.monotonic() - started >= next_print_s:
                print(f"  ... waiting for {next_print_s} s, at most {timeout_s:.0f} s")
                next_print_s += _PROGRESS_INTERVAL_S
            return attempt()

        try:
            eventually(attempt_with_progress, timeout_s, what)
        except NeverHappened:
            self.promise(False, f"{what} (not within {timeout_s:.0f} s)")
            return None
        took_s = time.monotonic() - started
        self.promise(True, f"{what}, after {took_s:.1f} s")
        return took_s


def wait_for_ctrl_c() -> None:
    """Wait for it to be raised as KeyboardInterrupt."""
    while True:
        signal.pause()


def print_user(user: Client) -> None:
    """What is needed to log in as a user."""
    print(f"  user          {user.user_id}")
    print(f"  password      {user.password}")
    print(f"  access token  {user.access_token}")


def send_command(user: Client, room_id: str) -> str:
    """A shell command that sends an event that is sticky for a minute."""
    message = shlex.quote('{"msgtype": "m.text", "body": "hello"}')
    room = urllib.parse.quote(room_id)
    url = f"{_base_url(user)}/rooms/{room}/send/m.room.message/$RANDOM?{STICKY_PARAMETER}=60000"
    return f'curl -X PUT -H {_authorization(user)} -d {message} "{url}"'


def sync_command(user: Client) -> str:
    """A shell command that shows the sticky events a user has."""
    sync_filter = shlex.quote(f"filter={NO_TIMELINE}")
    pretty = f"python3 -m json.tool | grep -A 20 {SECTION}"
    url = f"{_base_url(user)}/sync"
    return f"curl -sG -H {_authorization(user)} --data-urlencode {sync_filter} {url} | {pretty}"


def _base_url(user: Client) -> str:
    return f"{user.homeserver.main_url}/_matrix/client/v3"


def _authorization(user: Client) -> str:
    return shlex.quote(f"Authorization: Bearer {user.access_token}")


@contextlib.contextmanager
def requests_shown(homeserver: Homeserver) -> Iterator[None]:
    """Print the requests that are made to a homeserver meanwhile."""
    http = homeserver.http
    http.event_hooks = {"request": [_print_request]}
    try:
        yield
    finally:
        http.event_hooks = {}


def _print_request(request: httpx.Request) -> None:
    print(f"  {request.method} {urllib.parse.unquote_plus(request.url.raw_path.decode())}")
    if request.content:
        print(f"      {request.content.decode()}")


def in_section(room: JsonDict) -> list[JsonDict]:
    """The sticky events of a joined room in `/sync`."""
    events: list[JsonDict] = room.get(SECTION, {}).get("events", [])
    return events


def remaining_ms(events: list[JsonDict]) -> int | None:
    """The remaining time of the one event, None if there is no event or it has none."""
    unsigned: dict[str, Any] = events[0].get("unsigned", {}) if events else {}
    return unsigned.get(REMAINING)


def seconds(duration_ms: int | None) -> str:
    """A duration to be read."""
    return "none" if duration_ms is None else f"{duration_ms / 1000:.1f} s"


def message(body: str) -> JsonDict:
    """The content of a text message."""
    return {"msgtype": "m.text", "body": body}
