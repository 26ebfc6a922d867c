"""What processes tell each other may get lost or come late: nothing else does."""

import threading
import time
from pathlib import Path

import pytest

from harness.client import Client, JsonDict
from tests.support import HOUR_MS, MakeHomeserver, ids, quiet_token, sabotage, sticky_in

pytestmark = [
    pytest.mark.slow,
    pytest.mark.deployments("workers"),
    pytest.mark.any_synapse,
]

HIDDEN = "org.example.hidden"
HIDING: JsonDict = {"room": {"timeline": {"not_types": [HIDDEN]}}}

# What is lost, or how many seconds it is late.
LOST: dict[str, dict[str, str]] = {
    "nothing": {},
    "the record": {"recorded": ""},
    "both messages": {"stored": "", "recorded": ""},
    "that it is stored": {"stored": ""},
    "nothing, but Synapse's own news are first": {"stored": "0.1", "recorded": "0.3"},
}


def test_lost_messages(make_homeserver: MakeHomeserver, tmp_path: Path) -> None:
    # C6, C11: clients that wait are told at the latest when the signal is there
    sender, reader, room = _deaf_processes(make_homeserver, tmp_path)
    assert _arrives_within_s(sender, reader, room) < 10
    took_s = {}
    for name, lost in LOST.items():
        for message, seconds in lost.items():
            (tmp_path / message).write_text(seconds)
        took_s[name] = _arrives_within_s(sender, reader, room)
        time.sleep(1.5)
        for message in lost:
            (tmp_path / message).unlink()
    assert all(seconds < 4 for seconds in took_s.values()), took_s


def test_the_next_message_brings_what_was_lost(
    make_homeserver: MakeHomeserver, tmp_path: Path
) -> None:
    # C6: it does not go on where the index of the process ends
    sender, reader, room = _deaf_processes(make_homeserver, tmp_path)
    since = quiet_token(reader)
    for message in ("stored", "recorded", "signal"):
        (tmp_path / message).touch()
    lost = _send(sender, room)
    time.sleep(1.5)
    assert ids(sticky_in(reader.sync(since, filter=HIDING), room)) == []
    for message in ("stored", "recorded"):
        (tmp_path / message).unlink()
    found = _send(sender, room)
    began = time.monotonic()
    seen: list[str] = []
    while found not in seen and time.monotonic() < began + 20:
        seen = ids(sticky_in(reader.sync(since, timeout_ms=1_000, filter=HIDING), room))
    assert seen == [lost, found]


def _deaf_processes(make_homeserver: MakeHomeserver, directory: Path) -> tuple[Client, Client, str]:
    """Two users in a room, each with a process of their own; files make the processes deaf."""
    homeserver = make_homeserver("workers")
    sabotage(homeserver, "Deaf", {"directory": str(directory)}, {"poll_interval": "60s"})
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    sender, reader = (c.via(u) for c, u in zip((alice, bob), homeserver.client_urls, strict=True))
    return sender, reader, room


def _send(client: Client, room: str) -> str:
    return client.send(room, {"n": 1}, HIDDEN, sticky_ms=HOUR_MS)


def _arrives_within_s(sender: Client, reader: Client, room: str) -> float:
    """How long an event takes to somebody who waits for it, and whose timeline hides it."""
    since: str = quiet_token(reader)
    sent: list[tuple[str, float]] = []

    def send() -> None:
        time.sleep(0.5)
        sent.append((_send(sender, room), time.monotonic()))

    sending = threading.Thread(target=send)
    sending.start()
    seen: list[str] = []
    deadline = time.monotonic() + 20
    while not seen and time.monotonic() < deadline:
        answer = reader.sync(since, timeout_ms=20_000, filter=HIDING)
        since = answer["next_batch"]
        seen = ids(sticky_in(answer, room))
    arrived = time.monotonic()
    # The reader may have the event before the sender has its answer.
    sending.join()
    ((event_id, sent_at),) = sent
    assert seen == [event_id]
    return arrived - sent_at
