"""Which process of several runs which test."""

from collections import Counter

import pytest

from tests.scheduling import choose, deployment_of


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ("tests/test_sync.py::test_pages[sqlite]", "sqlite"),
        ("tests/test_sync.py::test_late_join[workers-with pos]", "workers"),
        ("tests/test_federation.py::test_new_server[mixed-postgres-shared]", "postgres"),
        ("tests/test_startup.py::test_synapse_that_is_too_old", ""),
        ("tests/unit/test_config.py::test_workers[not-sqlite-like]", "sqlite"),
        ("tests/unit/test_config.py::test_sqlite[1]", ""),
    ],
)
def test_the_deployment_is_among_the_parameters(test: str, expected: str) -> None:
    assert deployment_of(test) == expected


def shared_out(counts: dict[str, int], seconds: dict[str, int], processes: int) -> list[list[str]]:
    """The deployments of the tests that each process runs, one after the other.

    Args:
        counts: of the tests of each deployment.
        seconds: that a test of each deployment takes.
    """
    waiting = [f"test_{n}[{name}]" for name, count in counts.items() for n in range(count)]
    runs: list[list[str]] = [[] for _ in range(processes)]
    free_at = [0] * processes
    while waiting:
        number = free_at.index(min(free_at))
        begun = {name for run in runs for name in run}
        test = choose(waiting, runs[number][-1] if runs[number] else None, begun)
        waiting.remove(test)
        runs[number].append(deployment_of(test))
        free_at[number] += seconds[deployment_of(test)]
    return runs


def starts(run: list[str]) -> int:
    """How often a process starts a deployment."""
    return sum(1 for n, name in enumerate(run) if n == 0 or name != run[n - 1])


COUNTS = {"sqlite": 40, "postgres": 30, "workers": 30}
SECONDS = {"sqlite": 1, "postgres": 1, "workers": 4}


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 5])
def test_nothing_is_left_out_or_started_in_vain(processes: int) -> None:
    runs = shared_out(COUNTS, SECONDS, processes)
    assert Counter(name for run in runs for name in run) == COUNTS
    # Nobody comes back to a deployment: in between it was stopped.
    assert all(starts(run) == len(set(run)) for run in runs)
    # Each is begun by one process, and others only help to finish it.
    first = [run[0] for run in runs]
    assert set(first) == set(COUNTS) if processes >= 3 else len(set(first)) == processes


def test_all_help_with_what_takes_longest() -> None:
    runs = shared_out(COUNTS, SECONDS, 3)
    assert all(run[-1] == "workers" for run in runs)
    took = [sum(SECONDS[name] for name in run) for run in runs]
    assert max(took) - min(took) <= max(SECONDS.values())
