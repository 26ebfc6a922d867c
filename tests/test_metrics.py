"""What Synapse tells its operator of itself: with the module as without."""

import re
from dataclasses import dataclass

import pytest

from harness.client import quote
from harness.homeserver import Homeserver
from harness.wait import eventually
from tests.sliding import Connection
from tests.support import MakeHomeserver, send_plain, send_sticky, timeline_in

pytestmark = pytest.mark.slow

_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? \S+(?: \d+)?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def observable(homeserver: Homeserver) -> None:
    """Let it serve its metrics, beside what it serves to clients."""
    listener = {
        "type": "http",
        "bind_addresses": ["127.0.0.1"],
        "port": int(homeserver.main_url.rpartition(":")[2]),
        "resources": [{"names": ["client", "metrics"]}],
    }
    homeserver.reconfigure(extra_config={"enable_metrics": True, "listeners": [listener]})


def work(homeserver: Homeserver) -> None:
    """Use every endpoint that the module has a part in."""
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    send_sticky(alice, room)
    (last,) = send_plain(alice, room, 1)
    alice.send(room, delay_ms=86_000_000)
    alice.redact(room, last)
    eventually(lambda: timeline_in(bob.sync(timeout_ms=100), room), what="the events")
    connection = Connection(bob)
    connection.ask()
    connection.ask(timeout_ms=100)
    bob.event(room, last)
    bob.messages(room)
    bob.request("GET", f"/_matrix/client/v3/rooms/{quote(room)}/context/{quote(last)}")
    bob.request("GET", "/_matrix/client/versions")


@dataclass
class Metrics:
    """What a homeserver measures."""

    # Each name, with the names of its labels.
    names: set[tuple[str, ...]]
    servlets: set[str]

    @classmethod
    def of(cls, homeserver: Homeserver) -> "Metrics":
        """Scrape it."""
        lines = homeserver.http.get(f"{homeserver.main_url}/_synapse/metrics").text.splitlines()
        samples = [_SAMPLE.fullmatch(line) for line in lines if not line.startswith("#")]
        found = cls(set(), set())
        for sample in samples:
            assert sample is not None
            labels = dict(_LABEL.findall(sample[2] or ""))
            found.names.add((sample[1], *sorted(labels)))
            if "servlet" in labels:
                found.servlets.add(labels["servlet"])
        return found


def test_names_and_labels_are_what_they_are_without_the_module(
    make_homeserver: MakeHomeserver,
) -> None:
    """Dashboards go by them. Servlets above all, which are known by the names of their classes."""
    # O1
    homeserver = make_homeserver(module=False)
    observable(homeserver)
    measured = []
    # Some are only there once there are users when it starts.
    for module in (False, False, True):
        homeserver.reconfigure(module=module)
        homeserver.start()
        work(homeserver)
        measured.append(Metrics.of(homeserver))
        homeserver.stop()
    _, without, with_module = measured
    used = {"RoomSendEventRestServlet", "SyncRestServlet", "SlidingSyncRestServlet"}
    assert used | {"VersionsRestServlet"} <= without.servlets
    assert with_module.servlets == without.servlets
    assert with_module.names == without.names
