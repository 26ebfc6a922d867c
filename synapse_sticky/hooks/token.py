# SPDX-License-Identifier: AGPL-3.0-or-later
"""The slot of Synapse's stream token that carries a client's position: ``groups_key``.

Synapse has kept it without use since 2022; every supported release parses it, hands it
on unchanged, and orders no stream by it.
"""

from collections.abc import Callable

import attr
from synapse.server import HomeServer
from synapse.types import StreamToken

from synapse_sticky.clients.since import Since
from synapse_sticky.seams.checks import require


def carry_position(hs: HomeServer, position: Callable[[], int]) -> None:
    """Make Synapse's current stream token carry our current position.

    Synapse's notifier compares whole tokens: so a client that was given a
    position that lies behind is answered at once, and others stay asleep.
    """
    event_sources = hs.get_event_sources()
    require(event_sources, "get_current_token")
    require(StreamToken, "groups_key")
    require(StreamToken, "account_data_key")
    original = event_sources.get_current_token

    def get_current_token() -> StreamToken:
        token = original()
        # The token was made for this call and is in nobody else's hands yet.
        # Making a second one would cost more than all else that we do to an
        # idle /sync.
        object.__setattr__(token, "groups_key", position())
        return token

    event_sources.get_current_token = get_current_token  # type: ignore[method-assign]


def since_of(token: StreamToken | None) -> Since:
    """Return how far the client has read, from a stream token; nothing without a token."""
    return Since.from_number(token.groups_key) if token else Since(0)


def account_data_position(token: StreamToken | None) -> int:
    """Return how far a token has read Synapse's stream of account data; 0 without a token."""
    return token.account_data_key if token else 0


def timelines_up_to(token: StreamToken) -> Callable[[str | None, int], bool]:
    """Return whether timelines up to a token reach what one writer has written."""

    def timeline_reaches(instance_name: str | None, stream_ordering: int) -> bool:
        # What was written before there were several writers has no name.
        written_by = instance_name or "master"
        return stream_ordering <= token.room_key.get_stream_pos_for_instance(written_by)

    return timeline_reaches


def with_since(token: StreamToken, since: Since) -> StreamToken:
    """Return the token of a client that has read so far."""
    if token.groups_key == since.number:
        return token
    return attr.evolve(token, groups_key=since.number)
