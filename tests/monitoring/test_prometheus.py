"""The dashboard and the alerts, with a real Prometheus that scrapes a real deployment."""

import json
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from harness.client import Client, MatrixError
from harness.homeserver import BACKGROUND_WORKER, Homeserver
from harness.prometheus import SCRAPE_INTERVAL_S, Prometheus
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.federation import wait_until_received
from tests.sliding import Connection, no_window
from tests.support import MakeHomeserver, section_ids, send_plain, send_sticky, sticky, switch

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "contrib" / "grafana" / "synapse_sticky.json"
RULES = ROOT / "contrib" / "prometheus" / "synapse_sticky.rules.yml"

# A reader that does not load the module, and one that serves all clients here.
LACKING, SERVING = "client_reader2", "client_reader1"


def dashboard() -> dict[str, Any]:
    """Return the dashboard, as it is imported."""
    return dict(json.loads(DASHBOARD.read_text(encoding="utf-8")))


def alerts() -> dict[str, str]:
    """Return the alerts' expressions, by their names."""
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def queries() -> Iterator[tuple[str, str]]:
    """Yield the queries of all panels, each behind the panel's title and its own letter."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target["expr"]


def _lost(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield where a JSON value has something that another has not."""
    if isinstance(before, dict):
        for key, value in before.items():
            if key in after:
                yield from _lost(value, after[key], f"{path}.{key}")
            elif value not in (None, {}, []):
                yield f"{path}.{key}"
    elif isinstance(before, list):
        assert len(before) == len(after), path
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _lost(one, other, f"{path}[{number}]")
    elif before != after:
        yield path


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    """By the types that Grafana publishes of its dashboards and panels."""
    plugins.register_default_plugins()
    known = json.loads(json.dumps(Dashboard.from_json(dashboard()), cls=JSONEncoder))
    lost = set(_lost(dashboard(), known))
    # What Grafana itself writes in an export, beside what it reads.
    allowed = re.compile(r"\.__requires|\.templating\.list\[\d+\]\.definition")
    assert [path for path in lost if not allowed.fullmatch(path)] == []


def test_alerts_fire_when_they_should() -> None:
    """And not otherwise: on gaps, when counters begin again, with several workers."""
    tests = Path(__file__).parent / "rules.test.yml"
    subprocess.run(["promtool", "check", "rules", str(RULES)], check=True)
    subprocess.run(["promtool", "test", "rules", str(tests)], check=True)
    cases = yaml.safe_load(tests.read_text(encoding="utf-8"))["tests"]
    fire, do_not = set[str](), set[str]()
    for case in cases:
        for expected in case["alert_rule_test"]:
            (fire if expected["exp_alerts"] else do_not).add(expected["alertname"])
    assert fire == do_not == set(alerts())


# An event that a server refuses is given up after four tries, each two minutes or more after the
# one before; and servers have to wait for longer than five minutes.
@pytest.mark.timeout(1800)
def test_every_query_has_data(make_homeserver: MakeHomeserver) -> None:
    """Each panel's, each variable's and each alert's; and without any trouble no alert's."""
    homeserver = make_homeserver(
        "workers",
        federation=True,
        lacking=(LACKING,),
        extra_config={"enable_metrics": True},
        module_config={
            "cleanup_interval": "1s",
            "federation_grace_period": "6s",
            "local_rate_limit": {"per_second": 0.001, "burst_count": 20},
            "max_held_per_server": 3,
            "remote_rate_limit": {"per_second": 0.001, "burst_count": 2},
        },
    )
    homeserver.start()
    with Prometheus(homeserver, RULES) as prometheus:
        began_ts = time.time()
        alice = homeserver.register().via(homeserver.main_url)
        room = alice.create_room(preset="public_chat")
        _wait_until_scraped(homeserver, prometheus)
        _serve_clients(alice, room)
        time.sleep(10 * SCRAPE_INTERVAL_S)
        quiet = {alert["metric"]["alertname"] for alert in prometheus.now("ALERTS")}
        assert quiet == {"StickyEventsProcessWithoutModule"}

        with RemoteServer() as early, RemoteServer() as reluctant, RemoteServer() as refusing:
            _serve_servers(homeserver, prometheus, alice, room, early)
            # One takes what Synapse sends, and fails what the module sends.
            reluctant.harm = lambda txn_id, body: 500 if txn_id.startswith("sticky") else None
            reluctant.join(homeserver, room, "carol")
            # One refuses every event of the module.
            refusing.judge = lambda event: {"error": "no"} if _is_sticky(event.pdu) else {}
            refusing.join(homeserver, room, "carol")
            down = RemoteServer()
            with down:
                down.join(homeserver, room, "carol")
            # Synapse itself sends something, and finds it down.
            send_plain(alice, room, 1)
            send_sticky(alice, room, sticky_ms=3_600_000)
            _limit(alice, room)
            _stop_reading(homeserver, prometheus, room)
            long = [
                "StickyEventsServerWaits",
                "StickyEventsServerUnreachable",
                "StickyEventsGivenUp",
            ]

            def are_raised() -> bool:
                # Synapse tries the server again only if there is something for it.
                send_plain(alice, room, 1)
                missing = set(long) - {
                    alert for alert in long if prometheus.since(began_ts, time.time(), _of(alert))
                }
                assert not missing
                return True

            eventually(are_raised, 1200, "servers that wait", interval_s=5)

        # The process that gives out positions is down.
        homeserver.stop_process(BACKGROUND_WORKER)
        eventually(
            lambda: prometheus.now(_of("StickyEventsNotNoticed")), 60, "no indexer", interval_s=2
        )
        assert _raised(prometheus, began_ts) == set(alerts())
        _look_at_rules(prometheus)
        _look_at_panels(prometheus, began_ts)
        _look_at_variables(prometheus)


def _is_sticky(pdu: Mapping[str, Any]) -> bool:
    return "msc4354_sticky" in pdu


def _of(alert: str) -> str:
    """Return the expression by which Prometheus says that an alert is pending or fires."""
    return f'ALERTS{{alertname="{alert}"}}'


def _raised(prometheus: Prometheus, began_ts: float) -> set[str]:
    found = prometheus.since(began_ts, time.time(), "ALERTS")
    return {series["metric"]["alertname"] for series in found}


def _wait_until_scraped(homeserver: Homeserver, prometheus: Prometheus) -> None:
    expected = len(homeserver.processes)
    eventually(lambda: len(prometheus.now("up == 1")) == expected, 60, "scrapes")
    eventually(
        lambda: len(prometheus.now("synapse_sticky_index_age_seconds")) == expected - 1,
        60,
        "gauges",
    )


def _serve_clients(alice: Client, room: str) -> None:
    sent = send_sticky(alice, room, 3)
    eventually(lambda: section_ids(alice, room) == sent, what="the section")
    assert Connection(alice, {"all": no_window()}).ask().sticky(room) == sent


def _serve_servers(
    homeserver: Homeserver, prometheus: Prometheus, alice: Client, room: str, early: RemoteServer
) -> None:
    """Send to a server from Synapse's queue and from the module, and take too much from it."""
    carol = early.join(homeserver, room, "carol")
    # From before the join, by the module.
    eventually(
        lambda: prometheus.now('synapse_sticky_payments_total{outcome="confirmed"} > 0'),
        60,
        "payments",
    )
    wait_until_received(early, send_sticky(alice, room, 1))
    # Two are let through, three are held and expire, two are above that.
    for _ in range(7):
        early.send_event(room, carol, **sticky(30_000))
    for name in ("over_capacity_total", 'expired_while_held_total{reason="over_rate"}'):
        metric = f"synapse_sticky_{name} > 0"
        eventually(lambda m=metric: prometheus.now(m), 90, metric, interval_s=1)  # type: ignore[misc]
    send_plain(alice, room, 1)


def _limit(alice: Client, room: str) -> None:
    """Send more than allowed, and where sticky events are off."""
    off = alice.create_room()
    send_sticky(alice, off, 1)
    switch(alice, off, {"enabled": False})
    statuses = set()
    for where in [off] + 40 * [room]:
        try:
            send_sticky(alice, where)
        except MatrixError as error:
            statuses.add(error.status)
    assert statuses == {403, 429}


def _stop_reading(homeserver: Homeserver, prometheus: Prometheus, room: str) -> None:
    """Let no process read the module's tables, that of the indexer included, for two minutes."""
    bob = homeserver.register().via(homeserver.main_url)
    bob.join(room)
    homeserver.execute("ALTER TABLE synapse_sticky_progress RENAME TO synapse_sticky_away")
    send_sticky(bob, room)
    for alert in ("StickyEventsLate", "StickyEventsProcessBehind"):
        eventually(lambda a=alert: prometheus.now(_of(a)), 300, alert, interval_s=2)  # type: ignore[misc]
    homeserver.execute("ALTER TABLE synapse_sticky_away RENAME TO synapse_sticky_progress")


def _look_at_rules(prometheus: Prometheus) -> None:
    """Each was evaluated without an error."""
    (group,) = prometheus.get("rules")["groups"]
    assert {rule["name"] for rule in group["rules"]} == set(alerts())
    assert {(rule["health"], rule.get("lastError", "")) for rule in group["rules"]} == {("ok", "")}
    for alert in prometheus.get("alerts")["alerts"]:
        annotations = alert["annotations"]
        assert (
            "matrix.example.com" in annotations["summary"] or "127.0.0.1" in annotations["summary"]
        )
        assert "<no value>" not in "".join(annotations.values())
        assert "error" not in annotations["description"].split()


def _look_at_panels(prometheus: Prometheus, began_ts: float) -> None:
    """Each query has had values, and not only zeros."""
    without = []
    for title, expression in queries():
        expression = expression.replace("$__rate_interval", f"{10 * SCRAPE_INTERVAL_S}s")
        expression = re.sub(r"\$(server_name|instance|job|index)", ".*", expression)
        assert "$" not in expression
        found = prometheus.since(began_ts, time.time(), expression)
        if not any(float(value) > 0 for series in found for _, value in series["values"]):
            without.append(title)
    assert without == []


def _look_at_variables(prometheus: Prometheus) -> None:
    """Each variable has values to choose from, also for what was chosen of those before."""
    chosen: dict[str, str] = {}
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "datasource":
            continue
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
        assert match is not None
        assert variable["query"]["query"] == variable["definition"]
        selector = re.sub(r"\$(\w+)", lambda m: re.escape(chosen[m[1]]), match[1])
        values = prometheus.get(
            f"label/{match[2]}/values", **{"match[]": selector.replace("\\", "\\\\")}
        )
        assert values, variable["name"]
        assert variable["name"] == match[2]
        chosen[match[2]] = values[-1]
    assert chosen.keys() == {"server_name", "instance", "job", "index"}
