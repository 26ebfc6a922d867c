# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which servers have the events that were sent while the module was away. No Synapse, no clock.

So before the first start, and between two. Synapse has sent them to the servers that were
in the room, as far as it got. Others are owed them: those that joined later, and those that
Synapse had not reached any more.
"""

from collections.abc import Callable, Iterable

from synapse_sticky.seams.contents import SeenJoin, ServerInRoom
from synapse_sticky.storage.rows import Admitted, Item, WatermarkRow


def settled_before(
    items: Iterable[tuple[int, Item]],
    servers: Iterable[ServerInRoom],
    joined_if_settled: Callable[[str, str], int | None],
) -> list[WatermarkRow]:
    """Return the watermarks of the servers that have any of the events.

    Args:
        items: each behind its position, in the order of the stream; the joins by which
            servers came into rooms among them.
        joined_if_settled: the position at which a server joined a room before, 0 if that
            is long ago; None if it is owed earlier events there, which a watermark
            cannot say beside the others.
    """
    sent: dict[str, list[tuple[int, int, int]]] = {}
    joined: dict[tuple[str, str], int] = {}
    for position, item in items:
        if isinstance(item, SeenJoin):
            joined[item.member, item.room_id] = position
        elif isinstance(item, Admitted) and item.owed and not item.reasons:
            event = item.candidate
            sent.setdefault(event.room_id, []).append(
                (position, event.stream_ordering, event.expires_ts)
            )
    rows = []
    for server in servers:
        key = server.server_name, server.room_id
        if key in joined:
            joined_position: int | None = joined[key]
        elif server.join is None:
            joined_position = joined_if_settled(*key)
        else:
            # Not noticed yet: the server is owed everything.
            continue
        if joined_position is None:
            continue
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
                    settled_from=joined.get(key, 0),
                )
            )
    return rows
