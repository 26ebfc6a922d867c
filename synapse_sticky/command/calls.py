# SPDX-License-Identifier: AGPL-3.0-or-later
"""Checks on the options of Synapse that calls need, beside sticky events."""

from typing import Final

from synapse_sticky.command.checks import LONGEST_DELAY_MS, NOTE, OK, WARNING
from synapse_sticky.command.report import Report
from synapse_sticky.command.text import counted
from synapse_sticky.config import RateLimit
from synapse_sticky.seams.configured import Configured

# As Element Call's documentation asks for them.
_MESSAGES: Final = RateLimit(per_second=0.5, burst_count=30)
_DELAYED_EVENTS: Final = RateLimit(per_second=1, burst_count=20)


def check_calls(report: Report, described: Configured, *, need_owner: bool) -> None:
    """Check the options that calls need.

    Args:
        need_owner: whether only the owner of a delayed event can manage it.
    """
    _check_delay(report, described)
    if described.tells_transports and described.transports:
        report.add(
            OK,
            "calls-transports",
            f"The configuration names {counted(described.transports, 'media server')}.",
        )
    else:
        missing = [
            *([] if described.tells_transports else ["`msc4143_enabled` is not true"]),
            *([] if described.transports else ["`matrix_rtc.transports` is empty"]),
        ]
        report.add(
            WARNING,
            "calls-transports",
            f"{' and '.join(missing)}.",
            "Add, with the address of your own service:\n"
            "experimental_features:\n  msc4143_enabled: true\nmatrix_rtc:\n  transports:\n"
            "    - type: livekit\n      livekit_service_url: https://matrix-rtc.example.com/jwt",
        )
    _check_rate(report, "calls-message-rate", "rc_message", described.message_rate, _MESSAGES)
    _check_rate(
        report,
        "calls-delayed-event-rate",
        "rc_delayed_event_mgmt",
        described.delayed_event_rate,
        _DELAYED_EVENTS,
    )
    if need_owner:
        report.add(
            NOTE,
            "calls-delayed-event-owner",
            "This Synapse lets only the user who scheduled a delayed event restart, send or "
            "cancel it, with an access token.",
            "Upgrade Element Call and the service that it leaves delayed events to "
            "(lk-jwt-service) together with Synapse.",
        )
    else:
        report.add(
            OK,
            "calls-delayed-event-owner",
            "Whoever knows the ID of a delayed event can restart it.",
        )


def _check_delay(report: Report, described: Configured) -> None:
    advice = "Set `max_event_delay_duration: 24h`."
    if described.max_event_delay_ms == 0:
        text = "`max_event_delay_duration` is not set, so events cannot be delayed."
    elif described.max_delayed_events == 0:
        text = "`msc4140_max_delayed_events_per_user` is 0, so events cannot be delayed."
        advice = "Remove it from `experimental_features`."
    elif described.max_event_delay_ms < LONGEST_DELAY_MS:
        text = f"Events can be delayed by {described.max_event_delay_ms} ms only."
    else:
        hours = described.max_event_delay_ms / 3_600_000
        report.add(OK, "calls-delayed-events", f"Events can be delayed by {hours:g} h.")
        return
    report.add(WARNING, "calls-delayed-events", text, advice)


def _check_rate(
    report: Report, check_id: str, option: str, found: RateLimit, needed: RateLimit
) -> None:
    text = f"`{option}` is {found.per_second:g} per second, with a burst of {found.burst_count:g}."
    if found.per_second >= needed.per_second and found.burst_count >= needed.burst_count:
        report.add(OK, check_id, text)
        return
    report.add(
        WARNING,
        check_id,
        text,
        f"Set at least:\n{option}:\n  per_second: {needed.per_second:g}\n"
        f"  burst_count: {needed.burst_count}",
    )
