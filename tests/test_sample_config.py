"""`sample_config.yaml`: what an admin copies must be right."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from synapse.module_api.errors import ConfigError
from synapse.util.module_loader import load_module

from synapse_sticky import StickyEventsModule
from synapse_sticky.config import StickyEventsConfig

SAMPLE = Path(__file__).parent.parent / "sample_config.yaml"


@pytest.fixture
def entry() -> dict[str, Any]:
    """The module's entry in the sample."""
    homeserver_yaml = yaml.safe_load(SAMPLE.read_text(encoding="utf-8"))
    assert list(homeserver_yaml) == ["modules"]
    (only,) = homeserver_yaml["modules"]
    assert isinstance(only, dict)
    return only


def test_it_loads_as_synapse_loads_it(entry: dict[str, Any]) -> None:
    """Synapse finds the class by the name in the sample, and the class takes the options."""
    loaded, config = load_module(entry, ("modules", "<item 0>"))
    assert loaded is StickyEventsModule
    assert config == StickyEventsConfig.parse(entry["config"])


def test_it_shows_the_defaults(entry: dict[str, Any]) -> None:
    """To paste it changes nothing."""
    assert StickyEventsConfig.parse(entry["config"]) == StickyEventsConfig.parse(None)


def test_it_names_every_option(entry: dict[str, Any]) -> None:
    """No option is missing, as the parser itself lists them."""
    with pytest.raises(ConfigError) as caught:
        StickyEventsConfig.parse({"no such option": 1})
    _, _, known = caught.value.msg.partition("known options are ")
    assert set(known.split(", ")) == set(entry["config"])


def test_it_explains_every_option() -> None:
    """Right above each option stands a comment, with the range the parser allows."""
    lines = [line.strip() for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    options = lines[lines.index("config:") + 1 :]
    explained = [
        line.partition(":")[0]
        for above, line in itertools.pairwise(options)
        if above.startswith("#") and ":" in line and not line.startswith("#")
    ]
    assert explained == list(yaml.safe_load(SAMPLE.read_text())["modules"][0]["config"])


@pytest.mark.parametrize(
    ("option", "smallest", "largest", "beyond"),
    [
        ("max_events_per_sync", 1, 100, [0, 101]),
        ("cleanup_interval", "1s", "1h", ["999ms", "61m"]),
        ("poll_interval", "500ms", "1m", ["499ms", "61s"]),
        ("federation_grace_period", "0s", "10m", ["-1s", "601s"]),
        ("max_servers_at_once", 1, 10000, [0, 10001]),
    ],
)
def test_the_ranges_it_gives_are_right(
    option: str, smallest: object, largest: object, beyond: list[object]
) -> None:
    """What the sample calls the smallest and the largest value is that."""
    assert f"from {smallest} to {largest}" in " ".join(
        SAMPLE.read_text(encoding="utf-8").replace("#", "").split()
    )
    StickyEventsConfig.parse({option: smallest})
    StickyEventsConfig.parse({option: largest})
    for value in beyond:
        with pytest.raises(ConfigError):
            StickyEventsConfig.parse({option: value})
