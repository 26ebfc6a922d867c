# SPDX-License-Identifier: AGPL-3.0-or-later
"""The module's metrics, which Synapse's own metrics listener shows beside Synapse's own.

As in Synapse, a metric belongs to the process, and a label says for which server it counts.
Every label has few values, which are known beforehand.
"""

from collections.abc import Iterable
from itertools import product
from typing import Final

import attr
from prometheus_client import Counter, Gauge, Histogram
from synapse.metrics import SERVER_NAME_LABEL
from synapse.server import HomeServer

from synapse_sticky.seams.checks import require

# How things are now.

LIVE_EVENTS: Final = Gauge(
    "synapse_sticky_live_events",
    "Sticky events that are delivered to clients and servers now, until they expire",
    [SERVER_NAME_LABEL],
)
HELD_EVENTS: Final = Gauge(
    "synapse_sticky_held_events",
    "Sticky events that are held back now; one that is held for two reasons counts for both",
    ["reason", SERVER_NAME_LABEL],
)
OWED_EVENTS: Final = Gauge(
    "synapse_sticky_owed_events",
    "Sticky events that Synapse's own queue did not deliver to servers and that are still to be "
    "sent, once for each server",
    [SERVER_NAME_LABEL],
)
OWED_SERVERS: Final = Gauge(
    "synapse_sticky_owed_servers",
    "Servers that such events are still to be sent to",
    ["reason", SERVER_NAME_LABEL],
)
LONGEST_OWED: Final = Gauge(
    "synapse_sticky_longest_owed_seconds",
    "How long the server that has waited longest has been owed such an event; 0 if none waits",
    ["reason", SERVER_NAME_LABEL],
)
INDEX_AGE: Final = Gauge(
    "synapse_sticky_index_age_seconds",
    "How long ago this process last made sure that it knows all sticky events",
    [SERVER_NAME_LABEL],
)
INDEXER_LAG: Final = Gauge(
    "synapse_sticky_indexer_lag_events",
    "How many events of Synapse's stream have not been searched for sticky ones yet",
    [SERVER_NAME_LABEL],
)

# What has happened.

TIME_TO_DELIVERABLE: Final = Histogram(
    "synapse_sticky_time_to_deliverable_seconds",
    "Time from when Synapse stored a sticky event until it was recorded as deliverable, for "
    "events that were never held",
    [SERVER_NAME_LABEL],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 300, 1800, 3600),
)
SENT_TO_CLIENTS: Final = Counter(
    "synapse_sticky_sent_to_clients",
    "Sticky events in the sections of responses, once for each response",
    ["endpoint", SERVER_NAME_LABEL],
)
ACCEPTED_BY_SERVERS: Final = Counter(
    "synapse_sticky_accepted_by_servers",
    "Sticky events that servers accepted in a transaction, once for each server; from Synapse's "
    "own queue or from the module",
    ["sender", SERVER_NAME_LABEL],
)
REFUSED_SENDS: Final = Counter(
    "synapse_sticky_refused_sends",
    "Sticky events that local users were not allowed to send or to schedule",
    ["reason", SERVER_NAME_LABEL],
)
EXPIRED_WHILE_HELD: Final = Counter(
    "synapse_sticky_expired_while_held",
    "Sticky events that expired while they were held back; one that was held for two reasons "
    "counts for both",
    ["reason", SERVER_NAME_LABEL],
)
OVER_CAPACITY: Final = Counter(
    "synapse_sticky_over_capacity",
    "Sticky events of other servers that stayed ordinary events, since as many as allowed were "
    "held of their server in their room",
    [SERVER_NAME_LABEL],
)
PAYMENTS: Final = Counter(
    "synapse_sticky_payments",
    "Sticky events that the module sent to servers, by the outcome",
    ["outcome", SERVER_NAME_LABEL],
)
REQUESTS_TO_SERVERS: Final = Counter(
    "synapse_sticky_requests_to_servers",
    "Requests of the module to other servers, by the outcome",
    ["request", "outcome", SERVER_NAME_LABEL],
)

LABELS: Final[dict[Counter, dict[str, tuple[str, ...]]]] = {
    SENT_TO_CLIENTS: {"endpoint": ("sync", "sliding_sync")},
    ACCEPTED_BY_SERVERS: {"sender": ("synapse", "module")},
    REFUSED_SENDS: {"reason": ("switched_off", "user_blocked", "over_rate")},
    OVER_CAPACITY: {},
    PAYMENTS: {"outcome": ("confirmed", "retried", "given_up")},
    REQUESTS_TO_SERVERS: {
        "request": (
            "send",
            "event",
            "timestamp_to_event",
            "extremities",
            "make_leave",
            "backfill",
        ),
        "outcome": ("ok", "error", "failed", "backing_off"),
    },
}
"""The values of the labels of counters, but for the server and the reasons of held events."""


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Metrics:
    """Measures one server.

    Attributes:
        are_served: whether this process shows its metrics to anybody.
    """

    _server_name: str
    are_served: bool

    @classmethod
    def of(cls, hs: HomeServer) -> "Metrics":
        """Return the metrics of a homeserver, with its counters at 0: not just once they move."""
        require(hs.config.metrics, "enable_metrics")
        found = cls(hs.hostname, hs.config.metrics.enable_metrics)
        for counter, labels in LABELS.items():
            for values in product(*labels.values()):
                found.count(counter, 0, **dict(zip(labels, values, strict=True)))
        return found

    def count(self, counter: Counter, amount: int = 1, **labels: str) -> None:
        """Add to a counter. Cheap, and never raises."""
        counter.labels(**labels, **{SERVER_NAME_LABEL: self._server_name}).inc(amount)

    def set(self, gauge: Gauge, value: float, **labels: str) -> None:
        """Set a gauge."""
        gauge.labels(**labels, **{SERVER_NAME_LABEL: self._server_name}).set(value)

    def observe(self, histogram: Histogram, durations_ms: Iterable[int]) -> None:
        """Add durations to a histogram. Clocks may differ between processes."""
        observer = histogram.labels(**{SERVER_NAME_LABEL: self._server_name})
        for duration_ms in durations_ms:
            observer.observe(max(0, duration_ms) / 1000)
