"""A sticky event from sending to expiry, on a real Synapse. `make demo` runs this."""

import argparse
import contextlib
import io
import json
import shlex
import signal
import sys
import time
import urllib.parse
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import httpx

from tests.harness.client import STICKY_PARAMETER, JsonDict
from tests.harness.homeserver import Homeserver
from tests.harness.processes import temporary_directory

LIFETIME_MS = 20_000
ORDINARY_EVENTS = 30
TIMELINE_LIMIT = 10
READING_INTERVAL_S = 4
# How far two clocks, or a slow answer, may put a reading off.
TOLERANCE_MS = 1_500

SECTION = "msc4354_sticky"
EXTENSION = "org.matrix.msc4354.sticky_events"
REMAINING = "msc4354_sticky_duration_ttl_ms"

SYNC_FILTER: JsonDict = {"room": {"timeline": {"limit": TIMELINE_LIMIT}}}
SLIDING_SYNC_BODY: JsonDict = {
    "lists": {
        "all": {"ranges": [[0, 9]], "required_state": [], "timeline_limit": TIMELINE_LIMIT},
    },
    "extensions": {EXTENSION: {"enabled": True}},
}


def main() -> int:
    """Show it, and return the exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end when all is shown")
    once = parser.parse_args().once
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    homeserver = Homeserver(directory=temporary_directory("demo-") / "synapse")
    show = Show(homeserver)
    try:
        show.run()
        if not once:
            show.wait_for_the_reader()
    except KeyboardInterrupt:
        print()
        if once:
            return 130
    finally:
        # Not twice: the first Ctrl-C is heard, and this takes a moment.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("Stopping Synapse.")
        homeserver.close()
    return 1 if show.broken_promises else 0


class Show:
    """What is shown, step by step.

    Attributes:
        broken_promises: how many things were not as they should have been.
    """

    def __init__(self, homeserver: Homeserver) -> None:
        self.broken_promises = 0
        self._homeserver = homeserver

    def run(self) -> None:
        """Everything, from the start of Synapse to the expiry of the event."""
        print(f"Starting Synapse {version('matrix-synapse')} with synapse_sticky, on SQLite ...")
        self._homeserver.start()
        self._alice = self._homeserver.register("alice")
        self._bob = self._homeserver.register("bob")
        self._room_id = self._alice.create_room(preset="public_chat", name="Demo")
        self._bob.join(self._room_id)
        print(f"  base URL      {self._homeserver.main_url}")
        print(f"  room          {self._room_id}")
        for user in (self._alice, self._bob):
            print(f"  user          {user.user_id}")
            print(f"  password      {user.password}")
            print(f"  access token  {user.access_token}")

        print(f"\nAlice sends an event that is sticky for {LIFETIME_MS // 1000} seconds:")
        with self._requests_shown():
            self._event_id = self._alice.send(
                self._room_id,
                {"msgtype": "m.text", "body": "I am raising my hand"},
                sticky_ms=LIFETIME_MS,
            )
        self._sent_at = time.monotonic()
        print(f"  -> {self._event_id}")
        print(f"\nThen she sends {ORDINARY_EVENTS} ordinary messages, which bury it.")
        for number in range(ORDINARY_EVENTS):
            body = {"msgtype": "m.text", "body": f"ordinary message {number + 1}"}
            self._alice.send(self._room_id, body)

        self._show_sync()
        self._show_sliding_sync()
        self._show_countdown()
        self._show_expiry()
        print(
            f"\nNOT AS PROMISED: {self.broken_promises} of the above."
            if self.broken_promises
            else "\nAll as promised."
        )

    def wait_for_the_reader(self) -> None:
        """Tell how to go on, and wait for Ctrl-C."""
        url = f"{self._homeserver.main_url}/_matrix/client/v3"
        room = urllib.parse.quote(self._room_id)
        alice, bob = (
            shlex.quote(f"Authorization: Bearer {user.access_token}")
            for user in (self._alice, self._bob)
        )
        message = shlex.quote('{"msgtype": "m.text", "body": "hello"}')
        send_url = f"{url}/rooms/{room}/send/m.room.message/$RANDOM?{STICKY_PARAMETER}=60000"
        # No timeline at all: what a timeline shows is not repeated in the section.
        sync_filter = shlex.quote('filter={"room": {"timeline": {"types": []}}}')
        pretty = f"python3 -m json.tool | grep -A 20 {SECTION}"
        print(
            f"""
Synapse goes on running. Send an event as Alice that is sticky for a minute, and see it as Bob:

curl -X PUT -H {alice} -d {message} "{send_url}"

curl -sG -H {bob} --data-urlencode {sync_filter} {url}/sync | {pretty}

Or log in with a client of your own, with the base URL as the homeserver. Ctrl-C ends it all."""
        )
        while True:
            signal.pause()

    def _show_sync(self) -> None:
        print(f"\nBob syncs for the first time. His timelines end after {TIMELINE_LIMIT} events:")
        with self._requests_shown():
            room = self._sync()
        timeline = room["timeline"]["events"]
        found = room.get(SECTION, {}).get("events", [])
        print(f"  -> timeline: {_bodies(timeline)}")
        print(f"  -> {SECTION}: {json.dumps(found, indent=2)}".replace("\n", "\n     "))
        self._check_delivery(timeline, found)

    def _show_sliding_sync(self) -> None:
        print("\nThe same with Sliding Sync:")
        with self._requests_shown():
            answer = self._bob.sliding_sync(SLIDING_SYNC_BODY)
        timeline = answer["rooms"][self._room_id]["timeline"]
        extension = answer["extensions"].get(EXTENSION, {})
        print(f"  -> timeline: {_bodies(timeline)}")
        print(f"  -> {EXTENSION}: {json.dumps(extension, indent=2)}".replace("\n", "\n     "))
        self._check_delivery(timeline, self._in_extension(answer))

    def _show_countdown(self) -> None:
        print("\nThe remaining time counts down, wherever the event is read:")
        good = True
        while self._left_ms() > READING_INTERVAL_S * 1000:
            readings = {
                "/sync": self._in_section(self._sync()),
                "Sliding Sync": self._in_extension(self._bob.sliding_sync(SLIDING_SYNC_BODY)),
                "/event": [self._bob.event(self._room_id, self._event_id)],
            }
            left_ms = {name: _remaining_ms(events) for name, events in readings.items()}
            print(
                f"  after {time.monotonic() - self._sent_at:4.1f} s: "
                + ", ".join(f"{name} {_seconds(left)}" for name, left in left_ms.items())
            )
            good &= all(
                left is not None and abs(left - self._left_ms()) <= TOLERANCE_MS
                for left in left_ms.values()
            )
            time.sleep(READING_INTERVAL_S)
        self._promise(good, "each is what is left of the lifetime")

    def _show_expiry(self) -> None:
        time.sleep(max(0.0, self._left_ms() / 1000) + 0.1)
        print(f"\nAfter {time.monotonic() - self._sent_at:.1f} s it is an ordinary event again:")
        with self._requests_shown():
            room = self._sync()
        self._promise(SECTION not in room, f"a fresh /sync has no {SECTION}")
        with self._requests_shown():
            answer = self._bob.sliding_sync(SLIDING_SYNC_BODY)
        self._promise(not self._in_extension(answer), "neither has a fresh Sliding Sync")
        with self._requests_shown():
            event = self._bob.event(self._room_id, self._event_id)
        print(f"  -> {json.dumps(event)}")
        self._promise(
            event["content"]["body"] == "I am raising my hand" and _remaining_ms([event]) is None,
            "the event itself is still in the room, without a remaining time",
        )

    def _sync(self) -> JsonDict:
        room: JsonDict = self._bob.sync(filter=SYNC_FILTER)["rooms"]["join"][self._room_id]
        return room

    def _in_section(self, room: JsonDict) -> list[JsonDict]:
        events: list[JsonDict] = room.get(SECTION, {}).get("events", [])
        return events

    def _in_extension(self, answer: JsonDict) -> list[JsonDict]:
        rooms = answer.get("extensions", {}).get(EXTENSION, {}).get("rooms", {})
        events: list[JsonDict] = rooms.get(self._room_id, {}).get("events", [])
        return events

    def _check_delivery(self, timeline: list[JsonDict], found: list[JsonDict]) -> None:
        ids = [event["event_id"] for event in timeline]
        self._promise(
            len(ids) == TIMELINE_LIMIT and self._event_id not in ids,
            "the timeline does not reach back to the sticky event",
        )
        self._promise(
            [event["event_id"] for event in found] == [self._event_id],
            "the sticky event is there all the same",
        )

    def _left_ms(self) -> float:
        return LIFETIME_MS - (time.monotonic() - self._sent_at) * 1000

    def _promise(self, kept: bool, what: str) -> None:
        print(f"  {'ok' if kept else 'NOT AS PROMISED'}: {what}")
        self.broken_promises += not kept

    @contextlib.contextmanager
    def _requests_shown(self) -> Iterator[None]:
        http = self._homeserver.http
        http.event_hooks = {"request": [_print_request]}
        try:
            yield
        finally:
            http.event_hooks = {}


def _print_request(request: httpx.Request) -> None:
    print(f"  {request.method} {urllib.parse.unquote_plus(request.url.raw_path.decode())}")
    if request.content:
        print(f"      {request.content.decode()}")


def _bodies(events: list[JsonDict]) -> str:
    bodies = [str(event["content"].get("body", event["type"])) for event in events]
    return f'{len(bodies)} events, "{bodies[0]}" to "{bodies[-1]}"' if bodies else "no events"


def _remaining_ms(events: list[JsonDict]) -> int | None:
    """The remaining time of the one event, None if there is no event or it has none."""
    unsigned: dict[str, Any] = events[0].get("unsigned", {}) if events else {}
    return unsigned.get(REMAINING)


def _seconds(duration_ms: int | None) -> str:
    return "none" if duration_ms is None else f"{duration_ms / 1000:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
