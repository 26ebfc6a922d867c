# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which of Synapse's tests fail with the module on purpose; docs/compatibility.md says so too."""

from typing import Final

_STORAGE: Final = "tests.storage.test_sticky_events."
_SLIDING: Final = (
    "tests.rest.client.sliding_sync.test_extension_sticky_events."
    "SlidingSyncStickyEventsExtensionTestCase"
)
_POSITION: Final = "the module says its position, where Synapse leaves an empty answer out"

_GROUPS: Final = [
    (
        "tests.rest.client.test_sticky_events.StickyEventsDisabledClientTestCase",
        "it wants no remaining time without Synapse's flag",
        ["sticky_event_via_event_endpoint"],
    ),
    (
        "tests.federation.test_federation_server.UnstableGetExtremitiesTests",
        "it wants no MSC4370 without Synapse's flag",
        ["get_extremities_unstable_not_enabled"],
    ),
    (
        f"{_STORAGE}StickyEventsTestCase",
        "it reads the tables of Synapse's own",
        [
            "delete_expired_sticky_events",
            "get_sticky_events_in_rooms_token_does_not_go_backwards",
            "get_updated_sticky_events",
            "get_updated_sticky_events_with_limit",
            "outlier_events_not_in_table",
            "policy_server_spammy_events_are_not_tracked",
            "soft_failed_events_are_tracked",
            "soft_failure_cleared_when_sender_membership_changes",
            "soft_failure_cleared_when_state_changes",
            "spam_checker_spammy_events_are_not_tracked",
        ],
    ),
    (
        f"{_STORAGE}StickyEventsFederationBacklogTestCase",
        "it reads what Synapse's own notes of events that a server missed",
        [
            "get_backlogged_sticky_events_cleans_up_stale_backlog",
            "get_backlogged_sticky_events_excludes_remote_senders",
            "get_backlogged_sticky_events_respects_limit",
            "get_backlogged_sticky_events_returns_local_events_in_stream_order",
            "mark_backlogged_after_catchup_keeps_earliest_position",
            "mark_backlogged_after_catchup_records_earliest_unsent_per_room",
            "mark_backlogged_sticky_events_sent_advances_position",
        ],
    ),
    (
        "tests.federation.test_federation_catch_up.FederationStickyEventCatchUpTestCase",
        "the module sends the events that a server missed in its own way",
        [
            "backlogged_sticky_events_are_drained_by_the_same_loop",
            "backlogged_sticky_events_are_sent_in_dedicated_transactions",
            "backlogged_sticky_events_do_not_delay_pending_pdus",
            "catch_up_records_skipped_sticky_events_as_backlogged",
        ],
    ),
    (
        "tests.rest.client.test_sync_sticky_events.SyncStickyEventsTestCase",
        "it changes the page size of Synapse's own",
        ["pagination_with_many_sticky_events"],
    ),
    (
        _SLIDING,
        _POSITION,
        ["expired_events_not_returned", "ignored_users_sticky_events", "wait_for_new_data_timeout"],
    ),
    (
        "tests.replication.test_sharded_sticky_events.ShardedStickyEventsTestCase",
        _POSITION,
        ["torn_sliding_sync"],
    ),
    (
        _SLIDING,
        "a room that a response sends as `initial` brings all its live events again",
        ["initial_sync", "sticky_event_pagination"],
    ),
    (
        _SLIDING,
        "it wants a `limit` of 0",
        ["sticky_event_limit_zero_does_not_advance"],
    ),
]

KNOWN: Final = {f"{case}.test_{name}": reason for case, reason, names in _GROUPS for name in names}
"""Tests by their full names, and why these fail. A run complains of those that do not."""
