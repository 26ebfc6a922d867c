"""With the module, a server in Synapse's own configuration answers as it does without it.

The other tests switch off much of what operators have: presence, limits, remembered responses,
push, application services. Here everything is on that is on by default, and more.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from harness.homeserver import Homeserver
from harness.wait import eventually
from tests.everyday import Everyday, everyday, shape
from tests.support import EVENT_KEY, REMAINING_KEY, SYNC_SECTION, VERSIONS_FLAG

pytestmark = pytest.mark.deployments("sqlite")

EXTENSION = "org.matrix.msc4354.sticky_events"
# What sticky events add to answers.
ADDED = {EVENT_KEY, REMAINING_KEY, SYNC_SECTION, VERSIONS_FLAG, EXTENSION}


def test_everything_is_answered_as_without_the_module(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    # C2a
    directory = tmp_path_factory.mktemp("default")
    with (
        everyday(directory / "ours", module=True) as ours,
        everyday(directory / "plain", module=False) as plain,
        ThreadPoolExecutor() as pool,
    ):
        list(pool.map(Everyday.walk, (ours, plain)))
        found = differences(answers(ours), answers(plain))
        assert not found, "\n".join(found)
        assert added(ours) == ADDED
        eventually(lambda: pushes(ours) == pushes(plain), what="the same keys in pushes")
        assert errors(ours.hs) - errors(plain.hs) == set()
        assert names_of_metrics(plain.hs) - names_of_metrics(ours.hs) == set()
        new = names_of_metrics(ours.hs) - names_of_metrics(plain.hs)
        assert {name for name in new if not name.startswith("synapse_sticky_")} == set()


def differences(
    ours: dict[str, tuple[int, set[str]]], plain: dict[str, tuple[int, set[str]]]
) -> list[str]:
    """Where answers differ, and how."""
    return [
        f"{name}: {ours[name][0]} {sorted(ours[name][1] - plain[name][1])} instead of "
        f"{plain[name][0]} {sorted(plain[name][1] - ours[name][1])}"
        for name in plain
        if ours[name] != plain[name]
    ]


def answers(day: Everyday) -> dict[str, tuple[int, set[str]]]:
    """The status of each answer, and which keys it has."""
    return {name: (status, set(keys(shape(body)))) for name, status, body in day.answers}


def keys(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all that an answer has, but for what sticky events add to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in ADDED:
                yield f"{path}/{key}"
                yield from keys(item, f"{path}/{key}")
    elif isinstance(value, list):
        for item in value:
            yield from keys(item, path)


def added(day: Everyday) -> set[str]:
    """Which of the keys that sticky events add are in any answer."""

    def find(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from ADDED & value.keys()
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from find(item)

    return {key for _, _, body in day.answers for key in find(body)}


def pushes(day: Everyday) -> set[str]:
    """The keys of what the push gateway was sent."""
    return {
        key
        for _, path, body in day.elsewhere.asked
        if path.endswith("/notify")
        for key in keys(body)
    }


def errors(homeserver: Homeserver) -> set[str]:
    """What kinds of errors a server has logged. On a busy machine there are warnings of its own."""
    pattern = re.compile(r" (ERROR|CRITICAL) (\S+) \S+ (\w+ ?\w*)")
    return {" ".join(found) for found in pattern.findall(homeserver.problems_since({}))}


def names_of_metrics(homeserver: Homeserver) -> set[str]:
    """The names of all that a server can measure: some is only measured every few minutes."""
    return set(re.findall(r"^# TYPE (\S+)", homeserver.metrics(), re.MULTILINE))
