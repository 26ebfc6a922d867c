"""A session with matrix-rust-sdk, which knows nothing of sticky events: as without the module."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.client import Client
from harness.homeserver import Homeserver
from harness.wait import eventually
from tests.clients.device import RustDevice
from tests.federation import create_room
from tests.support import HOUR_MS, text

OpenRustDevice = Callable[[Client], RustDevice]


@pytest.fixture
def open_rust_device(tmp_path: Path, sliding: bool) -> Iterator[OpenRustDevice]:
    """Start a device of a user."""
    opened: list[RustDevice] = []

    def open_rust_device(user: Client) -> RustDevice:
        opened.append(RustDevice(user, tmp_path / f"rust{len(opened)}.log", sliding=sliding))
        return opened[-1]

    yield open_rust_device
    for device in opened:
        device.close()


@pytest.fixture(params=["with the module", "without"])
def home(request: pytest.FixtureRequest, homeserver: Homeserver) -> Homeserver:
    """A server with the module, and one without."""
    if request.param == "with the module":
        return homeserver
    stock: Homeserver = request.getfixturevalue("stock_peer")
    return stock


def test_a_session(home: Homeserver, open_rust_device: OpenRustDevice) -> None:
    """A stock server takes no notice of the stickiness; what the SDK shows must be the same."""
    # S5, C2a
    alice, bob = home.register(), home.register()
    room = create_room(alice)
    messages = [(alice, "plain"), (alice, "sticky")]
    alice.send(room, text("plain"))
    alice.send(room, text("sticky"), sticky_ms=HOUR_MS)
    alice.send(room, {"slot_id": "m.call#ROOM"}, "org.example.status", sticky_ms=HOUR_MS)

    device = open_rust_device(bob)
    device.ask("join", room_id=room)
    device.wait_for_messages(room, messages)

    device.ask("send", room_id=room, text="hello")
    device.wait_for_messages(room, messages, "hello")
    eventually(
        lambda: "hello" in [e["content"].get("body") for e in alice.messages(room)["chunk"]],
        what="the message from the SDK",
    )
    for number in range(3):
        alice.send(room, text(f"sticky {number}"), sticky_ms=HOUR_MS)
        alice.send(room, text(f"plain {number}"))
        messages += [(alice, f"sticky {number}"), (alice, f"plain {number}")]
    device.wait_for_messages(room, messages, "hello")
