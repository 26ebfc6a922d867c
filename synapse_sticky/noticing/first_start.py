# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which servers have the events that were sent before the first start. No Synapse, no clock.

Synapse has sent them to the servers that were in the room, as far as it got. Others are
owed them: those that joined later, and those that Synapse had not reached any more.
"""

from collections.abc import Iterable

from synapse_sticky.seams.contents import SeenJoin, ServerInRoom
from synapse_sticky.storage.rows import Admitted, HeldEvent, WatermarkRow


def settled_before(
    items: Iterable[tuple[int, Admitted | HeldEvent | SeenJoin]], servers: Iterable[ServerInRoom]
) -> list[WatermarkRow]:
    """Return the watermarks of the servers that have any of the events.

    Args:
        items: each behind its position, in the order of the stream; the joins by which
            servers came into rooms among them.
    """
    sent: dict[str, list[tuple[int, int, int]]] = {}
    joined: dict[tuple[str, str], int] = {}
    for position, item in items:
        if isinstance(item, SeenJoin):
            joined[item.member, item.room_id] = position
        elif isinstance(item, Admitted) and item.owed and item.held_reason is None:
            event = item.candidate
            sent.setdefault(event.room_id, []).append(
                (position, event.stream_ordering, event.expires_ts)
            )
    rows = []
    for server in servers:
        joined_position = joined.get((server.server_name, server.room_id), 0)
        settled = [
            (position, expires_ts)
            for position, stream_ordering, expires_ts in sent.get(server.room_id, ())
            if position > joined_position and stream_ordering <= server.sent_up_to
        ]
        if settled:
            rows.append(
                WatermarkRow(
                    server_name=server.server_name,
                    room_id=server.room_id,
                    joined_position=joined_position,
                    settled_position=settled[-1][0],
                    expires_ts=max(expires_ts for _, expires_ts in settled),
                    settled_from=joined_position,
                )
            )
    return rows
