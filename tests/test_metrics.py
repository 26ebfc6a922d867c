"""What Synapse tells its operator of itself, with the module as without, and of the module."""

import importlib.metadata
import re
import time
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

import synapse_sticky
from harness.client import Client, MatrixError, quote
from harness.homeserver import BACKGROUND_WORKER, READERS, SENDERS, Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.federation import wait_until_received
from tests.sliding import Connection, in_background, no_window
from tests.support import (
    MakeHomeserver,
    is_recorded,
    now_ms,
    quiet_token,
    section_ids,
    send_plain,
    send_sticky,
    sleep_until,
    sticky,
    timeline_in,
)

pytestmark = pytest.mark.slow

ENABLED = {"enable_metrics": True}
OURS = "synapse_sticky_"
SETTINGS = "io.github.synapse_sticky.settings"

_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? \S+(?: \d+)?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def observable(homeserver: Homeserver) -> None:
    """Let it serve its metrics, beside what it serves to clients."""
    homeserver.reconfigure(extra_config=ENABLED)


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
    since = quiet_token(bob)
    with in_background(lambda: bob.sync(since, timeout_ms=20_000)) as poll:
        # To be woken has a metric of its own.
        send_plain(alice, room, 1)
        poll.result()
    connection = Connection(bob)
    connection.ask()
    connection.ask(timeout_ms=100)
    bob.event(room, last)
    bob.messages(room)
    bob.request("GET", f"/_matrix/client/v3/rooms/{quote(room)}/context/{quote(last)}")
    bob.request("GET", "/_matrix/client/versions")


@dataclass
class Metrics:
    """What a process measures, or several that do the same."""

    # Each name, with the names of its labels.
    names: set[tuple[str, ...]]
    servlets: set[str]

    @classmethod
    def by_role(cls, homeserver: Homeserver) -> dict[str, "Metrics"]:
        """Scrape all processes. Which of those with the same name does what is chance."""
        found: dict[str, Metrics] = {}
        for process in homeserver.processes:
            measured = found.setdefault(process.rstrip("0123456789"), cls(set(), set()))
            measured.add(homeserver.metrics(process))
        return found

    def add(self, text: str) -> None:
        """Add what a process says."""
        lines = text.splitlines()
        samples = [_SAMPLE.fullmatch(line) for line in lines if not line.startswith("#")]
        for sample in samples:
            assert sample is not None
            labels = dict(_LABEL.findall(sample[2] or ""))
            self.names.add((sample[1], *sorted(labels)))
            if "servlet" in labels:
                self.servlets.add(labels["servlet"])


def of_synapse(names: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Those of metrics that are not the module's."""
    return {name for name in names if not name[0].startswith(OURS)}


def everywhere(found: Mapping[str, Metrics]) -> set[tuple[str, ...]]:
    """The names of Synapse's metrics that any process has."""
    return of_synapse(set().union(*(metrics.names for metrics in found.values())))


def measure(
    homeserver: Homeserver,
    *,
    module: bool,
    at_least: Mapping[str, Metrics] = types.MappingProxyType({}),
    anywhere: Collection[tuple[str, ...]] = (),
) -> dict[str, Metrics]:
    """Start it, use it, and return what its processes measure.

    What Synapse measures every half minute has no name before that, and some of what it counts
    happens by chance. So the server is used until the names of `at_least` are there, each in its
    role, and those of `anywhere`.
    """
    homeserver.reconfigure(module=module)
    homeserver.start()

    def complete() -> dict[str, Metrics]:
        work(homeserver)
        found = Metrics.by_role(homeserver)
        missing = [metrics.names - found[role].names for role, metrics in at_least.items()]
        missing.append(set(anywhere) - everywhere(found))
        assert not any(missing), missing
        return found

    found = eventually(complete, 120, "the metrics", interval_s=1)
    homeserver.stop()
    return found


@pytest.mark.parametrize("kind", ["sqlite", "workers"])
@pytest.mark.repeats("workers")
def test_names_and_labels_are_what_they_are_without_the_module(
    make_homeserver: MakeHomeserver, kind: str
) -> None:
    """Dashboards go by them. Servlets above all, which are known by the names of their classes."""
    # O1
    homeserver = make_homeserver(kind, module=False)
    observable(homeserver)
    # Some are only there once there are users when it starts.
    measure(homeserver, module=False)
    without = measure(homeserver, module=False)
    with_module = measure(homeserver, module=True, at_least=without)
    # The process that gives out positions tells the others by a stream that it may not use itself.
    anywhere = everywhere(without)
    if not everywhere(with_module) <= anywhere:
        # This time it may have run for half a minute, and not before.
        anywhere = everywhere(measure(homeserver, module=False, anywhere=everywhere(with_module)))
    for role, found in with_module.items():
        assert found.servlets == without[role].servlets, role
        names = of_synapse(found.names)
        assert without[role].names <= names <= anywhere, role
        assert len(found.names) > len(names), role
    servlets = set().union(*(found.servlets for found in without.values()))
    used = {"RoomSendEventRestServlet", "SyncRestServlet", "SlidingSyncRestServlet"}
    assert used | {"VersionsRestServlet"} <= servlets


JOBS = {
    "main": [],
    "event_persister1": ["stores events"],
    "event_persister2": ["stores events"],
    "federation_sender1": ["sends to other servers"],
    "federation_sender2": ["sends to other servers"],
    BACKGROUND_WORKER: ["notices sticky events for all processes"],
}
ALL_JOBS = ["stores events", "notices sticky events for all processes", "sends to other servers"]
_START = re.compile(
    r" INFO synapse_sticky\.admin\.start \S+ synapse_sticky (\S+) on Synapse (\S+), with tables of "
    r"version (\d+)\. This process: (.*)$",
    re.MULTILINE,
)


def test_what_runs_is_said_at_start(homeserver: Homeserver) -> None:
    """Once for each start of a process: the versions, and which jobs it has."""
    # O3
    ((tables,),) = homeserver.query("SELECT version FROM synapse_sticky_schema")
    for process in homeserver.processes:
        log = homeserver.log(process)
        assert len(_START.findall(log)) == log.count("STARTING SERVER"), process
        version, synapse, of_tables, jobs = _START.findall(log)[-1]
        assert version == synapse_sticky.__version__
        assert synapse == importlib.metadata.version("matrix-synapse")
        assert int(of_tables) == tables
        expected = JOBS.get(process, []) if homeserver.workers else ALL_JOBS
        assert jobs.split(", ") == [*expected, "answers requests"], process


# The module's own


PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
# Name, type, labels.
_ROW = re.compile(r"^\| `(\w+)` \| (\w+) \|([^|]*)\|", re.MULTILINE)
# Longer than it takes until a process measures again.
SOON_S = 60


def ours(homeserver: Homeserver, process: str = "main") -> Iterator[Metric]:
    """The module's metrics that a process shows."""
    for metric in text_string_to_metric_families(homeserver.metrics(process)):
        if metric.name.startswith(OURS):
            yield metric


def values(homeserver: Homeserver, process: str = "main") -> dict[str, float]:
    """What the module's metrics say, as `name value value`, with the values of their labels,
    in the order of the labels' names.
    """
    found = {}
    for metric in ours(homeserver, process):
        for sample in metric.samples:
            labels = dict(sample.labels)
            assert labels.pop("server_name") == homeserver.server_name
            words = [sample.name.removeprefix(OURS), *(v for _, v in sorted(labels.items()))]
            found[" ".join(words)] = sample.value
    return found


def wait_for_values(
    homeserver: Homeserver, expected: Mapping[str, float], process: str = "main"
) -> None:
    """Wait until metrics of a process have these values."""

    def are_there() -> bool:
        now = values(homeserver, process)
        found = {name: now.get(name) for name in expected}
        assert found == expected
        return True

    eventually(are_there, SOON_S, "the values")


def test_the_page_lists_them_all(make_homeserver: MakeHomeserver) -> None:
    """Each with its type, its labels and their values; and each explains itself."""
    homeserver = make_homeserver(federation=True, extra_config=ENABLED)
    homeserver.start()
    eventually(lambda: "live_events" in values(homeserver), SOON_S, "gauges")
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", page))
    shown = {}
    for metric in ours(homeserver):
        assert len(metric.documentation) > 30
        labels: set[str] = set()
        for sample in metric.samples:
            own = {k: v for k, v in sample.labels.items() if k not in ("server_name", "le")}
            labels |= own.keys()
            assert set(own.values()) <= named
        suffix = "_total" if metric.type == "counter" else ""
        shown[metric.name + suffix] = (metric.type, labels)
    listed = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in _ROW.findall(page)
    }
    assert shown == listed
    # The rules for alerts use these too.
    assert set(re.findall(rf"{OURS}\w+", page)) == set(listed)


@pytest.mark.any_synapse
def test_they_follow_what_users_do(make_homeserver: MakeHomeserver) -> None:
    # A1, A3, A4
    homeserver = make_homeserver(
        extra_config=ENABLED,
        module_config={
            "cleanup_interval": "1s",
            "local_rate_limit": {"per_second": 0.001, "burst_count": 5},
        },
    )
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room()
    began = time.monotonic()
    sent = send_sticky(alice, room, 3)
    eventually(lambda: is_recorded(homeserver, sent[-1]), what="the last event")
    took_s = time.monotonic() - began
    assert section_ids(alice, room) == sent
    assert section_ids(alice, room) == sent
    assert Connection(alice, {"all": no_window()}).ask().sticky(room) == sent
    wait_for_values(
        homeserver,
        {
            "live_events": 3,
            "indexer_lag_events": 0,
            "sent_to_clients_total sync": 6,
            "sent_to_clients_total sliding_sync": 3,
            "time_to_deliverable_seconds_count": 3,
        },
    )
    assert values(homeserver)["time_to_deliverable_seconds_sum"] < 3 * (took_s + 1)
    # Idle syncs and plain events are none of it.
    since = alice.sync()["next_batch"]
    before = values(homeserver)
    send_plain(alice, room, 1)
    alice.sync(since)
    alice.sync(alice.sync()["next_batch"])
    after = values(homeserver)
    assert after["sent_to_clients_total sync"] == before["sent_to_clients_total sync"]
    assert after["time_to_deliverable_seconds_count"] == 3

    send_sticky(alice, room, sticky_ms=30_000)
    refused = [_status_of_send(alice, room) for _ in range(3)]
    assert refused == [200, 429, 429]
    alice.send_state(room, SETTINGS, {"enabled": False})
    assert _status_of_send(alice, room) == 403
    wait_for_values(
        homeserver,
        {
            "live_events": 0,
            "held_events switched_off": 5,
            "held_events over_rate": 0,
            "refused_sends_total over_rate": 2,
            "refused_sends_total switched_off": 1,
            "refused_sends_total user_blocked": 0,
        },
    )
    # One expires meanwhile.
    wait_for_values(
        homeserver, {"expired_while_held_total switched_off": 1, "held_events switched_off": 4}
    )
    alice.send_state(room, SETTINGS, {"enabled": True})
    wait_for_values(homeserver, {"live_events": 4, "held_events switched_off": 0})
    # Those that were held do not count.
    assert values(homeserver)["time_to_deliverable_seconds_count"] == 5

    # The server's admin decides, and a new process begins at 0.
    homeserver.execute(
        "INSERT INTO synapse_sticky_overrides (kind, subject, enabled) VALUES ('user', ?, 0)",
        alice.user_id,
    )
    homeserver.restart()
    assert _status_of_send(alice, room) == 403
    wait_for_values(
        homeserver,
        {
            "live_events": 0,
            "held_events user_blocked": 4,
            "refused_sends_total user_blocked": 1,
            "refused_sends_total switched_off": 0,
        },
    )


@pytest.mark.any_synapse
def test_they_tell_that_the_indexer_is_behind(make_homeserver: MakeHomeserver) -> None:
    """While it cannot store anything, and afterwards how long that took."""
    homeserver = make_homeserver(extra_config=ENABLED)
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room()
    (first,) = send_sticky(alice, room)
    eventually(lambda: is_recorded(homeserver, first), what="recorded")
    homeserver.execute("ALTER TABLE synapse_sticky_events RENAME TO moved")
    sent_ts = now_ms()
    (late,) = send_sticky(alice, room)
    send_plain(alice, room, 2)
    wait_for_values(homeserver, {"indexer_lag_events": 3, "live_events": 1})
    sleep_until(sent_ts + 5_500)
    homeserver.execute("ALTER TABLE moved RENAME TO synapse_sticky_events")
    wait_for_values(homeserver, {"indexer_lag_events": 0, "live_events": 2})
    assert section_ids(alice, room) == [first, late]
    measured = values(homeserver)
    assert measured["time_to_deliverable_seconds_count"] == 2
    # The first was faster.
    assert measured["time_to_deliverable_seconds_bucket 5.0"] == 1
    assert 5 < measured["time_to_deliverable_seconds_sum"] < 2 * SOON_S


@pytest.mark.any_synapse
def test_they_follow_what_servers_do(make_homeserver: MakeHomeserver) -> None:
    # A1, A2, F1, F2
    homeserver = make_homeserver(
        federation=True,
        extra_config=ENABLED,
        module_config={
            # For Synapse's own sending to be faster on a busy machine too.
            "federation_grace_period": "6s",
            "max_held_per_server": 3,
            "remote_rate_limit": {"per_second": 0.001, "burst_count": 2},
        },
    )
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room(preset="public_chat")
    with RemoteServer() as early, RemoteServer() as late:
        carol = early.join(homeserver, room, "carol")
        sent = send_sticky(alice, room, 2)
        wait_until_received(early, sent)
        late.join(homeserver, room, "dave")
        wait_until_received(late, sent)
        wait_for_values(
            homeserver,
            {
                "owed_events": 0,
                "accepted_by_servers_total synapse": 2,
                "accepted_by_servers_total module": 2,
                "payments_total confirmed": 2,
                "payments_total given_up": 0,
                "requests_to_servers_total ok send": 1,
            },
        )
        assert values(homeserver)["requests_to_servers_total ok event"] > 0

        came = [early.send_event(room, carol, **sticky()).event_id for _ in range(7)]
        eventually(lambda: is_recorded(homeserver, came[4]), what="what is recorded")
        wait_for_values(
            homeserver,
            {
                "live_events": 4,
                "held_events over_rate": 3,
                "over_capacity_total": 2,
                "time_to_deliverable_seconds_count": 4,
            },
        )
    # Now both are down.
    send_sticky(alice, room, 3)
    wait_for_values(homeserver, {"owed_events": 6})
    assert values(homeserver)["accepted_by_servers_total module"] == 2


@pytest.mark.any_synapse
def test_how_long_servers_wait(make_homeserver: MakeHomeserver) -> None:
    """From when they are owed something: not from before they joined."""
    # A2
    homeserver = make_homeserver(federation=True, extra_config=ENABLED)
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room(preset="public_chat")
    (sent,) = send_sticky(alice, room)
    sent_ts = now_ms()
    wait_for_values(
        homeserver,
        {
            "owed_servers trying": 0,
            "owed_servers backing_off": 0,
            "longest_owed_seconds trying": 0,
            "longest_owed_seconds backing_off": 0,
        },
    )
    sleep_until(sent_ts + 8_000)
    with RemoteServer() as reluctant:
        # What Synapse itself sends arrives, so Synapse does not back off.
        reluctant.harm = lambda txn_id, body: 500 if txn_id.startswith("sticky") else None
        joined_ts = now_ms()
        reluctant.join(homeserver, room, "carol")
        wait_for_values(homeserver, {"owed_events": 1, "owed_servers trying": 1})
        waited_s = values(homeserver)["longest_owed_seconds trying"]
        assert 0 < waited_s <= (now_ms() - joined_ts) / 1000

        def has_grown() -> bool:
            return values(homeserver)["longest_owed_seconds trying"] > waited_s + 5

        eventually(has_grown, SOON_S, "more of a wait")
        assert values(homeserver)["longest_owed_seconds trying"] < (now_ms() - sent_ts) / 1000 - 7
        reluctant.harm = lambda txn_id, body: None
        wait_until_received(reluctant, [sent])
        wait_for_values(homeserver, {"owed_servers trying": 0, "longest_owed_seconds trying": 0})
    # Now it is down, and Synapse leaves it alone for a while after its own transaction failed.
    send_plain(alice, room, 1)
    send_sticky(alice, room)
    eventually(lambda: values(homeserver)["owed_servers backing_off"] == 1, SOON_S, "a back-off")
    assert values(homeserver)["owed_servers trying"] == 0
    assert values(homeserver)["longest_owed_seconds backing_off"] > 0


@pytest.mark.any_synapse
def test_a_process_that_does_not_follow(make_homeserver: MakeHomeserver) -> None:
    """Its age grows for as long as it cannot read what is recorded."""
    homeserver = make_homeserver(extra_config=ENABLED, module_config={"poll_interval": "1s"})
    homeserver.start()

    def age_s() -> float:
        return values(homeserver).get("index_age_seconds", -1)

    eventually(lambda: 0 <= age_s() < 8, SOON_S, "an age")
    homeserver.execute("ALTER TABLE synapse_sticky_progress RENAME TO synapse_sticky_away")
    eventually(lambda: age_s() > 12, SOON_S, "a higher age")
    homeserver.execute("ALTER TABLE synapse_sticky_away RENAME TO synapse_sticky_progress")
    eventually(lambda: 0 <= age_s() < 8, SOON_S, "a low age")


@pytest.mark.any_synapse
def test_events_beyond_capacity_are_counted_once(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    # A1: with several writers, events are read twice
    homeserver = make_homeserver(
        "workers",
        federation=True,
        extra_config=ENABLED,
        module_config={
            "max_held_per_server": 3,
            "remote_rate_limit": {"per_second": 0.001, "burst_count": 2},
        },
    )
    homeserver.start()
    alice = homeserver.register()
    rooms = [alice.create_room(preset="public_chat") for _ in range(4)]
    for room in rooms:
        carol = remote.join(homeserver, room, "carol")
        came = [remote.send_event(room, carol, **sticky()).event_id for _ in range(9)]
        eventually(lambda e=came[-1]: _has(homeserver, e), what="the last one")  # type: ignore[misc]
        eventually(lambda e=came[4]: is_recorded(homeserver, e), what="what is recorded")  # type: ignore[misc]
    # Both writers go on, so that what lies before is read once more.
    for room in rooms:
        (last,) = send_sticky(alice, room)
        eventually(lambda e=last: is_recorded(homeserver, e), what="more")  # type: ignore[misc]
    expected = {"over_capacity_total": 16, "held_events over_rate": 12}
    wait_for_values(homeserver, expected, BACKGROUND_WORKER)


def _has(homeserver: Homeserver, event_id: str) -> bool:
    return bool(homeserver.query("SELECT 1 FROM events WHERE event_id = ?", event_id))


def _status_of_send(client: Client, room: str) -> int:
    try:
        send_sticky(client, room)
    except MatrixError as error:
        return error.status
    return 200


@pytest.mark.any_synapse
def test_sums_over_processes_are_right(make_homeserver: MakeHomeserver) -> None:
    """What all share comes from one process, and what each does from each."""
    homeserver = make_homeserver("workers", extra_config=ENABLED)
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room()
    sent = send_sticky(alice, room, 3)
    for url in homeserver.client_urls:
        reader = alice.via(url)
        eventually(lambda r=reader: section_ids(r, room) == sent, 20, "sections")  # type: ignore[misc]

    def are_measured() -> bool:
        assert values(homeserver, BACKGROUND_WORKER).get("live_events") == 3
        assert all("index_age_seconds" in values(homeserver, p) for p in homeserver.processes)
        return all("owed_events" in values(homeserver, name) for name in SENDERS)

    eventually(are_measured, SOON_S, "gauges")
    by_process = {name: values(homeserver, name) for name in homeserver.processes}

    def processes_with(name: str) -> set[str]:
        return {p for p, found in by_process.items() if any(n.startswith(name) for n in found)}

    for shared in ("live", "held", "indexer_lag", "time_to_deliverable"):
        assert processes_with(shared) == {BACKGROUND_WORKER}
    assert processes_with("owed") == processes_with("longest_owed") == set(SENDERS)
    assert processes_with("index_age") == set(homeserver.processes)
    sections = {name: found["sent_to_clients_total sync"] for name, found in by_process.items()}
    assert {name for name, count in sections.items() if count >= 3} == set(READERS)
    assert sum(found.get("live_events", 0) for found in by_process.values()) == 3
