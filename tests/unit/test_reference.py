"""The lists of the documentation that are written from the code are those of the code."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tools import reference

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
METRIC = re.compile(r"synapse_sticky_\w+")


@pytest.mark.parametrize("name", reference.GENERATED)
def test_the_page_says_what_the_code_says(name: str) -> None:
    """`python -m tools.reference` writes them."""
    assert (reference.PAGES / name).read_text(encoding="utf-8") == reference.written(name)


def _metrics() -> set[str]:
    """The names that Prometheus shows."""
    defined = re.findall(r"^## `(\w+)`", reference.metric_list(), re.MULTILINE)
    histograms = [name for name in defined if name.endswith("_deliverable_seconds")]
    return {
        *defined,
        *(f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")),
    }


def test_rules_and_dashboard_know_the_metrics() -> None:
    """They use none that does not exist, and the dashboard leaves none out."""
    rules = (ROOT / "contrib/prometheus/synapse_sticky.rules.yml").read_text(encoding="utf-8")
    (group,) = yaml.safe_load(rules)["groups"]
    used = {name for rule in group["rules"] for name in METRIC.findall(rule["expr"])}
    assert used <= _metrics()
    dashboard = json.loads((ROOT / "contrib/grafana/synapse_sticky.json").read_text("utf-8"))
    shown = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            shown |= set(METRIC.findall(target["expr"]))
    assert shown <= _metrics()
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in shown} == {
        re.sub("_(bucket|sum|count)$", "", name) for name in _metrics()
    }


def test_every_alert_says_what_to_do() -> None:
    """It has a sentence, and a link to its own section of the page on alerts."""
    rules = (ROOT / "contrib/prometheus/synapse_sticky.rules.yml").read_text(encoding="utf-8")
    (group,) = yaml.safe_load(rules)["groups"]
    page = (DOCS / "alerts.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (Sticky\w+)$", page, re.MULTILINE)
    assert sections == [rule["alert"] for rule in group["rules"]]
    for rule in group["rules"]:
        annotations = rule["annotations"]
        assert annotations["summary"].endswith(".")
        assert annotations["description"].endswith(".")
        assert annotations["runbook_url"] == f"docs/alerts.md#{rule['alert'].lower()}"
