# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which of Synapse's tests fail with the module on purpose; docs/compatibility.md says so too."""

from typing import Final

_SLIDING: Final = (
    "tests.rest.client.sliding_sync.test_extension_sticky_events."
    "SlidingSyncStickyEventsExtensionTestCase."
)
_POSITION: Final = "the module says its position, where Synapse leaves an empty answer out"
_INITIAL: Final = "a room that a response sends as `initial` brings all its live events again"

KNOWN: Final = {
    "tests.rest.client.test_sticky_events.StickyEventsDisabledClientTestCase."
    "test_sticky_event_via_event_endpoint": "it wants no remaining time without Synapse's flag",
    "tests.federation.test_federation_server.UnstableGetExtremitiesTests."
    "test_get_extremities_unstable_not_enabled": "it wants no MSC4370 without Synapse's flag",
    "tests.federation.test_federation_catch_up.FederationStickyEventCatchUpTestCase.": (
        "it reads how Synapse's own sends what a server missed"
    ),
    "tests.storage.test_sticky_events.": "it reads the tables of Synapse's own sticky events",
    "tests.rest.client.test_sync_sticky_events.SyncStickyEventsTestCase."
    "test_pagination_with_many_sticky_events": "it changes the page size of Synapse's own",
    f"{_SLIDING}test_expired_events_not_returned": _POSITION,
    f"{_SLIDING}test_ignored_users_sticky_events": _POSITION,
    f"{_SLIDING}test_wait_for_new_data_timeout": _POSITION,
    f"{_SLIDING}test_initial_sync": _INITIAL,
    f"{_SLIDING}test_sticky_event_pagination": _INITIAL,
    f"{_SLIDING}test_sticky_event_limit_zero_does_not_advance": "it wants a `limit` of 0",
}
"""The beginning of tests' names, and why these fail."""


def reason_of(test: str) -> str | None:
    """Return why a test is to fail with the module, None if it is not to."""
    return next((reason for start, reason in KNOWN.items() if test.startswith(start)), None)
