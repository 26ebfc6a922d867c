"""Metrics belong to the process, in which there may be several servers."""

from prometheus_client import REGISTRY

from synapse_sticky.seams.metrics import OVER_CAPACITY, REFUSED_SENDS, TIME_TO_DELIVERABLE, Metrics


def _value(name: str, server_name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {**labels, "server_name": server_name})


def test_each_server_counts_for_itself() -> None:
    one, other = Metrics("one.example", True), Metrics("other.example", True)
    one.count(REFUSED_SENDS, 2, reason="over_rate")
    other.count(REFUSED_SENDS, reason="over_rate")
    name = "synapse_sticky_refused_sends_total"
    assert _value(name, "one.example", reason="over_rate") == 2
    assert _value(name, "other.example", reason="over_rate") == 1


def test_a_server_that_is_made_twice_goes_on_counting() -> None:
    for _ in range(2):
        Metrics("twice.example", False).count(OVER_CAPACITY)
    assert _value("synapse_sticky_over_capacity_total", "twice.example") == 2


def test_clocks_may_differ() -> None:
    """A duration below 0 would make Prometheus see a counter that was reset."""
    Metrics("late.example", True).observe(TIME_TO_DELIVERABLE, (-5, 1_500))
    name = "synapse_sticky_time_to_deliverable_seconds"
    assert _value(f"{name}_sum", "late.example") == 1.5
    assert _value(f"{name}_count", "late.example") == 2
    assert _value(f"{name}_bucket", "late.example", le="1.0") == 1
