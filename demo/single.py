"""A sticky event from sending to expiry, on one homeserver."""

import json
import time
from importlib.metadata import version
from pathlib import Path

from demo.printing import (
    SECTION,
    Show,
    in_section,
    message,
    print_user,
    remaining_ms,
    requests_shown,
    seconds,
    send_command,
    sync_command,
    wait_for_ctrl_c,
)
from harness.client import JsonDict
from harness.homeserver import Homeserver

LIFETIME_MS = 20_000
ORDINARY_EVENTS = 30
TIMELINE_LIMIT = 10
READING_INTERVAL_S = 4
# How far two clocks, or a slow answer, may put a reading off.
TOLERANCE_MS = 1_500

EXTENSION = "org.matrix.msc4354.sticky_events"

SYNC_FILTER: JsonDict = {"room": {"timeline": {"limit": TIMELINE_LIMIT}}}
SLIDING_SYNC_BODY: JsonDict = {
    "lists": {
        "all": {"ranges": [[0, 9]], "required_state": [], "timeline_limit": TIMELINE_LIMIT},
    },
    "extensions": {EXTENSION: {"enabled": True}},
}


class SingleShow(Show):
    """What is shown, step by step."""

    def __init__(self, directory: Path) -> None:
        self._homeserver = Homeserver(directory=directory / "synapse")
        super().__init__([self._homeserver])

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
            print_user(user)

        print(f"\nAlice sends an event that is sticky for {LIFETIME_MS // 1000} seconds:")
        with requests_shown(self._homeserver):
            self._event_id = self._alice.send(
                self._room_id,
                message("I am raising my hand"),
                sticky_ms=LIFETIME_MS,
            )
        self._sent_at = time.monotonic()
        print(f"  -> {self._event_id}")
        print(f"\nThen she sends {ORDINARY_EVENTS} ordinary messages, which bury it.")
        for number in range(ORDINARY_EVENTS):
            self._alice.send(self._room_id, message(f"ordinary message {number + 1}"))

        self._show_sync()
        self._show_sliding_sync()
        self._show_countdown()
        self._show_expiry()

    def wait_for_the_reader(self) -> None:
        """Tell how to go on, and wait for Ctrl-C."""
        print(
            f"""
Synapse goes on running. Send an event as Alice that is sticky for a minute, and see it as Bob:

{send_command(self._alice, self._room_id)}

{sync_command(self._bob)}

Or log in with a client of your own, with the base URL as the homeserver. Ctrl-C ends it all."""
        )
        wait_for_ctrl_c()

    def _show_sync(self) -> None:
        print(f"\nBob syncs for the first time. His timelines end after {TIMELINE_LIMIT} events:")
        with requests_shown(self._homeserver):
            room = self._sync()
        timeline = room["timeline"]["events"]
        found = room.get(SECTION, {}).get("events", [])
        print(f"  -> timeline: {_bodies(timeline)}")
        print(f"  -> {SECTION}: {json.dumps(found, indent=2)}".replace("\n", "\n     "))
        self._check_delivery(timeline, found)

    def _show_sliding_sync(self) -> None:
        print("\nThe same with Sliding Sync:")
        with requests_shown(self._homeserver):
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
                "/sync": in_section(self._sync()),
                "Sliding Sync": self._in_extension(self._bob.sliding_sync(SLIDING_SYNC_BODY)),
                "/event": [self._bob.event(self._room_id, self._event_id)],
            }
            left_ms = {name: remaining_ms(events) for name, events in readings.items()}
            print(
                f"  after {time.monotonic() - self._sent_at:4.1f} s: "
                + ", ".join(f"{name} {seconds(left)}" for name, left in left_ms.items())
            )
            good &= all(
                left is not None and abs(left - self._left_ms()) <= TOLERANCE_MS
                for left in left_ms.values()
            )
            time.sleep(READING_INTERVAL_S)
        self.promise(good, "each is what is left of the lifetime")

    def _show_expiry(self) -> None:
        time.sleep(max(0.0, self._left_ms() / 1000) + 0.1)
        print(f"\nAfter {time.monotonic() - self._sent_at:.1f} s it is an ordinary event again:")
        with requests_shown(self._homeserver):
            room = self._sync()
        self.promise(SECTION not in room, f"a fresh /sync has no {SECTION}")
        with requests_shown(self._homeserver):
            answer = self._bob.sliding_sync(SLIDING_SYNC_BODY)
        self.promise(not self._in_extension(answer), "neither has a fresh Sliding Sync")
        with requests_shown(self._homeserver):
            event = self._bob.event(self._room_id, self._event_id)
        print(f"  -> {json.dumps(event)}")
        self.promise(
            event["content"]["body"] == "I am raising my hand" and remaining_ms([event]) is None,
            "the event itself is still in the room, without a remaining time",
        )

    def _sync(self) -> JsonDict:
        room: JsonDict = self._bob.sync(filter=SYNC_FILTER)["rooms"]["join"][self._room_id]
        return room

    def _in_extension(self, answer: JsonDict) -> list[JsonDict]:
        rooms = answer.get("extensions", {}).get(EXTENSION, {}).get("rooms", {})
        events: list[JsonDict] = rooms.get(self._room_id, {}).get("events", [])
        return events

    def _check_delivery(self, timeline: list[JsonDict], found: list[JsonDict]) -> None:
        ids = [event["event_id"] for event in timeline]
        self.promise(
            len(ids) == TIMELINE_LIMIT and self._event_id not in ids,
            "the timeline does not reach back to the sticky event",
        )
        self.promise(
            [event["event_id"] for event in found] == [self._event_id],
            "the sticky event is there all the same",
        )

    def _left_ms(self) -> float:
        return LIFETIME_MS - (time.monotonic() - self._sent_at) * 1000


def _bodies(events: list[JsonDict]) -> str:
    bodies = [str(event["content"].get("body", event["type"])) for event in events]
    return f'{len(bodies)} events, "{bodies[0]}" to "{bodies[-1]}"' if bodies else "no events"
