"""Devices that run an SDK, in a process of their own."""

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.client import Client, JsonDict
from harness.wait import eventually
from tests.clients import bindings

HERE = Path(__file__).parent

# Longer than any request may take that the SDK does not repeat.
ANSWER_TIMEOUT_S = 60
# Enough of the log to see what went wrong last.
LOG_TAIL = 4000


class DeviceError(Exception):
    """The SDK refused a command, or the server did."""

    def __init__(self, error: JsonDict) -> None:
        super().__init__(f"{error['name']}: {error.get('message')}")
        self.name: str = error["name"]
        self.errcode: str | None = error.get("errcode")


class _Device:
    """A user's device in a process that answers commands, one a line."""

    def __init__(
        self,
        user: Client,
        log: Path,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.user_id = user.user_id
        self._log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                command,
                cwd=HERE,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                # It may have a child that is the Node itself.
                start_new_session=True,
            )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, name: str, **arguments: Any) -> Any:
        """Give a command, and return its result. Raise `DeviceError` if it fails."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": name, **arguments}) + "\n")
        self._process.stdin.flush()
        try:
            line = self._answers.get(timeout=ANSWER_TIMEOUT_S)
        except queue.Empty:
            line = ""
        assert line, f"no answer to {name} from {self.user_id}; it logged:\n{self._log_tail()}"
        answer: JsonDict = json.loads(line)
        if "error" in answer:
            raise DeviceError(answer["error"])
        return answer["result"]

    def crash(self) -> None:
        """End its process with SIGKILL, as if it had crashed."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def close(self) -> None:
        """End its process in an orderly way, unless it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.crash()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-LOG_TAIL:]


class Device(_Device):
    """A device with matrix-js-sdk, whose commands are those of `device.mjs`.

    With `sliding` it uses Sliding Sync in place of `/sync`. `timeline_limit` is how many events of
    a room it wants at first. With `encrypted` it can encrypt and decrypt.
    """

    def __init__(
        self,
        user: Client,
        log: Path,
        *,
        sliding: bool = False,
        timeline_limit: int = 20,
        encrypted: bool = False,
    ) -> None:
        node = shutil.which("node")
        assert node is not None, "there is no Node; `make test-clients` installs it"
        assert (HERE / "node_modules").is_dir(), "`make test-clients` installs matrix-js-sdk"
        super().__init__(user, log, [node, "device.mjs"])
        self.device_id = user.device_id
        self.ask(
            "start",
            base_url=user.homeserver.main_url,
            user_id=user.user_id,
            device_id=user.device_id,
            access_token=user.access_token,
            sliding=sliding,
            timeline_limit=timeline_limit,
            encrypted=encrypted,
        )

    def send(
        self,
        room: str,
        content: JsonDict,
        sticky_ms: int | None = None,
        delay_ms: int | None = None,
        type: str = "org.example.status",
    ) -> str:
        """Send an event. Return its ID, or with `delay_ms` its delay ID."""
        optional = {"sticky_ms": sticky_ms, "delay_ms": delay_ms}
        given = {name: value for name, value in optional.items() if value is not None}
        event_id: str = self.ask("send", room_id=room, type=type, content=content, **given)
        return event_id

    def sticky(self, room: str) -> dict[str, JsonDict]:
        """Return the events of a room that are sticky by the SDK's map, by their IDs."""
        events: list[JsonDict] = self.ask("sticky", room_id=room)
        return {event["event_id"]: event for event in events}

    def wait_until_sticky(self, room: str, *event_ids: str, timeout_s: float = 30) -> None:
        """Wait until just these events of a room are sticky by the SDK's map."""

        def as_wanted() -> bool:
            events = self.sticky(room)
            assert sorted(events) == sorted(event_ids), f"they are {list(events)}"
            return True

        eventually(as_wanted, timeout_s, f"the sticky events of {self.user_id}")

    def wait_until_in_room(self, room: str, *user_ids: str) -> None:
        """Wait until the SDK knows that these users are in a room."""
        eventually(
            lambda: set(user_ids) <= set(self.ask("members", room_id=room)),
            what=f"{self.user_id} knowing the members of {room}",
        )

    def wait_until_keys_known(self, room: str, *others: "Device") -> None:
        """Wait until it could encrypt for these devices, and knows that they are in a room."""
        self.wait_until_in_room(room, *(other.user_id for other in others))
        wanted = {other.device_id for other in others}
        users = [other.user_id for other in others]
        eventually(
            lambda: wanted <= set(self.ask("devices", user_ids=users)),
            what=f"{self.user_id} knowing the keys of {users}",
        )

    def participants(self, room: str) -> list[str]:
        """Return the users who take part in the room's call, as the SDK's session has them."""
        return sorted(self.ask("participants", room_id=room))

    def wait_for_participants(self, room: str, *user_ids: str, timeout_s: float = 30) -> None:
        """Wait until just these users take part in the room's call."""

        def as_wanted() -> bool:
            users = self.participants(room)
            assert users == sorted(user_ids), f"they are {users}"
            return True

        eventually(as_wanted, timeout_s, f"the participants that {self.user_id} sees")


OpenDevice = Callable[..., Device]
"""Starts a device of a user; the other arguments are those of `Device`."""


class RustDevice(_Device):
    """A device with matrix-rust-sdk, whose commands are those of `rust_device.py`.

    It logs in as a new device of the user's.
    """

    def __init__(self, user: Client, log: Path, *, sliding: bool) -> None:
        command = [sys.executable, "rust_device.py"]
        super().__init__(user, log, command, bindings.environment())
        store = log.with_suffix(".store")
        store.mkdir()
        self.ask(
            "start",
            base_url=user.homeserver.main_url,
            user_id=user.user_id,
            password=user.password,
            directory=str(store),
            sliding=sliding,
        )

    def wait_for_messages(self, room: str, others: Sequence[tuple[Client, str]], *own: str) -> None:
        """Wait until others' messages are just these, in this order, and it shows its own.

        Where its own stand is up to the SDK, which for a while may show one twice: as it was sent,
        and as it came back.
        """
        wanted = [[sender.user_id, text] for sender, text in others]

        def as_wanted() -> bool:
            found = self.ask("timeline", room_id=room)
            assert [each for each in found if each[0] != self.user_id] == wanted, (
                f"they are {found}"
            )
            assert {text for sender, text in found if sender == self.user_id} == set(own)
            return True

        eventually(as_wanted, what=f"the messages that {self.user_id} sees")
