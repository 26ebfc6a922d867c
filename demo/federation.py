"""Sticky events between three homeservers: to a server that joins, and to one that was away."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from demo.printing import (
    NO_TIMELINE,
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
from harness.client import Client, JsonDict
from harness.homeserver import Homeserver

# Long enough to look around afterwards.
LIFETIME_MS: Final = 30 * 60_000
GRACE_PERIOD: Final = "2s"
MESSAGES_BEFORE_THE_JOIN: Final = 30
STICKY_IN_THE_OUTAGE: Final = 5
# Before each of the sticky ones, and once more at the end.
MESSAGES_BETWEEN: Final = 20
TIMELINE_LIMIT: Final = 100

# As Synapse has it by default; the tests' homeservers are less patient.
BACK_OFF: Final = {"destination_min_retry_interval": "10m", "destination_max_retry_interval": "7d"}

# By when something must have happened. All of it takes seconds, on a busy machine too.
DEADLINE_S: Final = 60


class FederationShow(Show):
    """What is shown, step by step."""

    def __init__(self, directory: Path) -> None:
        self._a, self._b, self._c = (
            Homeserver(
                directory=directory / name,
                federation=True,
                module_config={"federation_grace_period": GRACE_PERIOD},
                extra_config={"federation": BACK_OFF},
            )
            for name in ("a", "b", "c")
        )
        self._summary: list[tuple[str, float | None]] = []
        super().__init__([self._a, self._b, self._c])

    def run(self) -> None:
        """Everything, from the start of three homeservers to the end of the outage."""
        self._start()
        self._show_ordinary_sending()
        self._show_late_joiner()
        self._show_outage()
        print("\nHow long it took:")
        for what, took_s in self._summary:
            took = "NEVER SEEN" if took_s is None else f"{took_s:.1f} s"
            print(f"  {took:>10}  {what}")

    def wait_for_the_reader(self) -> None:
        """Tell how to go on, and wait for Ctrl-C."""
        print(
            f"""
All three go on running. Send an event as Alice on A that is sticky for a minute:

{send_command(self._alice, self._room_id)}

See it as Bob on B, and as Carol on C:

{sync_command(self._bob)}

{sync_command(self._carol)}

Or log in with a client of your own, with a base URL as the homeserver. Ctrl-C ends it all."""
        )
        wait_for_ctrl_c()

    def _start(self) -> None:
        print(
            f"Starting Synapse {version('matrix-synapse')} with synapse_sticky three times, on "
            "SQLite.\nThey talk to each other over TLS, each with a certificate of its own.\n"
            f"federation_grace_period is {GRACE_PERIOD} (15s by default): so long a fresh sticky "
            "event is left to\nSynapse's own sending, before the module sends it."
        )
        users: list[Client] = []
        for letter, homeserver, localpart in (
            ("A", self._a, "alice"),
            ("B", self._b, "bob"),
            ("C", self._c, "carol"),
        ):
            print(f"\n{letter} ...")
            homeserver.start()
            user = homeserver.register(localpart)
            users.append(user)
            print(f"  base URL      {homeserver.main_url}")
            print(f"  server name   {homeserver.server_name}")
            print_user(user)
        self._alice, self._bob, self._carol = users

    # Ordinary sending

    def _show_ordinary_sending(self) -> None:
        print("\n1. A sticky event between two servers\n")
        print("Alice on A makes a room, in which nobody reads what was before they joined:")
        with requests_shown(self._a):
            self._room_id = self._alice.create_room(
                preset="public_chat",
                name="Demo",
                settle=False,
                initial_state=[
                    {
                        "type": "m.room.history_visibility",
                        "state_key": "",
                        "content": {"history_visibility": "joined"},
                    }
                ],
            )
        print(f"  -> {self._room_id}")
        print("\nBob on B joins it through A:")
        with requests_shown(self._b):
            self._bob.join(self._room_id, via=[self._a.server_name])
        since = self._position(self._bob)
        print(f"\nAlice sends an event that is sticky for {LIFETIME_MS // 60_000} minutes:")
        with requests_shown(self._a):
            self._early_id = self._send_sticky("I am raising my hand")
        print(f"  -> {self._early_id}")
        print("\nSynapse itself sends it to B, as any event, and Bob's next /sync has it:")
        found: list[JsonDict] = []

        def arrived() -> bool:
            room = _joined(self._bob.sync(since, timeout_ms=1000), self._room_id)
            events = [*room.get("timeline", {}).get("events", []), *in_section(room)]
            found[:] = [event for event in events if event["event_id"] == self._early_id]
            return bool(found)

        self._note(
            "from Alice to Bob, by Synapse's own sending",
            self.promise_within(DEADLINE_S, arrived, "Bob has the event"),
        )
        left_ms = remaining_ms(found)
        self.promise(left_ms is not None, f"it is sticky for Bob too, {seconds(left_ms)} are left")

    # Joining late

    def _show_late_joiner(self) -> None:
        print("\n2. A server that joins later\n")
        print(f"Alice sends {MESSAGES_BEFORE_THE_JOIN} ordinary messages.")
        before = self._send_ordinary(MESSAGES_BEFORE_THE_JOIN)
        print("Carol on C joins the room through B, whereas the sticky event is of A:")
        with requests_shown(self._c):
            self._carol.join(self._room_id, via=[self._b.server_name])
        print(
            f"\nSynapse sends nothing from before a join. The module on A does, as soon as A "
            f"knows of\nthe join. {SECTION} of Carol's /sync:"
        )
        found: list[JsonDict] = []

        def arrived() -> bool:
            found[:] = self._sticky(self._carol)
            return [event["event_id"] for event in found] == [self._early_id]

        took_s = self.promise_within(
            DEADLINE_S, arrived, "Carol has the sticky event from before she joined"
        )
        self._note("from Carol's join to her having the sticky event", took_s)
        for event in found:
            print(f"  -> {_described(event)}")
        page = self._carol.messages(self._room_id, limit=TIMELINE_LIMIT)
        readable = {event["event_id"] for event in page["chunk"]}
        self.promise(
            readable.isdisjoint(before), "she can read none of the ordinary messages before it"
        )

    # An outage

    def _show_outage(self) -> None:
        print("\n3. A server that was away\n")
        since = self._position(self._bob)
        print("Stopping B ...")
        self._b.stop()
        count = MESSAGES_BETWEEN * (STICKY_IN_THE_OUTAGE + 1)
        print(f"Alice sends {STICKY_IN_THE_OUTAGE} sticky events among {count} ordinary messages:")
        sticky: list[str] = []
        ordinary: list[str] = []
        for number in range(1, STICKY_IN_THE_OUTAGE + 1):
            ordinary += self._send_ordinary(MESSAGES_BETWEEN)
            sticky.append(self._send_sticky(f"missed {number}"))
            print(f"  {len(ordinary):3} ordinary, {number} sticky")
        ordinary += self._send_ordinary(MESSAGES_BETWEEN)
        print(f"  {len(ordinary):3} ordinary, {len(sticky)} sticky")

        print("\nB does not answer, so Synapse on A backs off from it:")
        self.promise_within(
            DEADLINE_S,
            lambda: self._backs_off_for_ms() >= 60_000,
            "A leaves B alone, for minutes",
        )
        print(f"  -> {self._backs_off_for_ms() / 60_000:.0f} minutes, and longer the next time")
        print("\nStarting B again ...")
        self._b.start()
        print(f"  Bob has {len(self._sticky(self._bob, since))} of the sticky events he missed.")
        print(
            "\nA waits for its time, unless it hears from B: any request of B tells A that B is "
            "back, and\nwakes Synapse's sender and the module. On a server that people use that "
            "takes seconds. Here\nBob has to say something:"
        )
        with requests_shown(self._b):
            self._bob.send(self._room_id, message("I am back"))
        found: list[JsonDict] = []

        def arrived() -> bool:
            found[:] = self._sticky(self._bob, since)
            return {event["event_id"] for event in found} == set(sticky)

        what = f"Bob has exactly the {len(sticky)} sticky events he missed"
        self._note(
            f"from B's first words to its having the {len(sticky)} sticky events it missed",
            self.promise_within(DEADLINE_S, arrived, what),
        )
        for event in found:
            print(f"  -> {_described(event)}")
        fetched = len(self._stored_at_b() & set(ordinary))
        print(
            f"  Of the {count} ordinary messages B has {fetched}: those that Synapse fetched "
            "along\n  with what came after them. It fetches others when Bob scrolls back."
        )
        self.promise(fetched < count, "the sticky events did not have to wait for all of them")

    def _backs_off_for_ms(self) -> int:
        query = "SELECT retry_interval FROM destinations WHERE destination = ?"
        return sum(int(ms or 0) for (ms,) in self._a.query(query, self._b.server_name))

    def _stored_at_b(self) -> set[str]:
        query = "SELECT event_id FROM events WHERE room_id = ? AND NOT outlier"
        return {event_id for (event_id,) in self._b.query(query, self._room_id)}

    # What each of them is made of

    def _send_sticky(self, body: str) -> str:
        return self._alice.send(self._room_id, message(body), sticky_ms=LIFETIME_MS)

    def _send_ordinary(self, count: int) -> Sequence[str]:
        return [
            self._alice.send(self._room_id, message(f"ordinary message {number + 1}"))
            for number in range(count)
        ]

    def _position(self, user: Client) -> str:
        next_batch: str = user.sync()["next_batch"]
        return next_batch

    def _sticky(self, user: Client, since: str | None = None) -> list[JsonDict]:
        """The section alone, since some position."""
        return in_section(_joined(user.sync(since, filter=NO_TIMELINE), self._room_id))

    def _note(self, what: str, took_s: float | None) -> None:
        self._summary.append((what, took_s))


def _joined(answer: JsonDict, room_id: str) -> JsonDict:
    """A joined room in `/sync`; empty as long as it is not there."""
    room: JsonDict = answer.get("rooms", {}).get("join", {}).get(room_id, {})
    return room


def _described(event: JsonDict) -> str:
    left = seconds(remaining_ms([event]))
    return f'{event["event_id"]} "{event["content"].get("body")}", {left} left'
