# SPDX-License-Identifier: AGPL-3.0-or-later
"""Up to where each server has settled what it is owed. No Synapse, no clock.

What a server is owed is not queued but derived: the sticky events of our own
users above its watermark in a room. A watermark moves over what is settled
without a gap. What was settled above it waits in memory; if that is lost,
something is sent again, and nothing is skipped.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

import attr

from synapse_sticky.deliverable.index import StickyEvent, StickyIndex
from synapse_sticky.storage.rows import WatermarkRow

_NOTHING_SETTLED: Final = -1
# How many events of a room that are settled ahead of the watermark, and are not in the index, are
# remembered, and for how long: nobody is owed them, or they come there late.
_MAX_UNKNOWN: Final = 5_000
_MAX_UNKNOWN_MS: Final = 600_000


@attr.s(slots=True, auto_attribs=True)
class _Watermark:
    joined_position: int = 0
    settled_position: int = _NOTHING_SETTLED
    expires_ts: int = 0
    # Settled events that it has not come to yet, and when to forget them.
    ahead: dict[str, int] = attr.Factory(dict)
    # With how many of them to look for those that are not in the index.
    limit: int = _MAX_UNKNOWN


class Watermarks:
    """The watermarks of the servers that this process sends to."""

    def __init__(self) -> None:
        self._by_room: dict[str, dict[str, _Watermark]] = {}
        # By server and room.
        self._changed: dict[tuple[str, str], None] = {}

    def load(self, rows: Iterable[WatermarkRow], index: StickyIndex, now_ts: int) -> None:
        """Take over watermarks as they are stored, where they say more than is known."""
        for row in rows:
            in_room = self._by_room.setdefault(row.room_id, {})
            known = in_room.get(row.server_name)
            if known is None or known.joined_position < row.joined_position:
                settled = _NOTHING_SETTLED if row.settled_from else row.settled_position
                known = _Watermark(row.joined_position, settled, row.expires_ts)
                in_room[row.server_name] = known
            if known.joined_position == row.joined_position:
                known.ahead.update(
                    (event.event_id, event.expires_ts)
                    for event in index.owed_after(
                        row.room_id, max(row.settled_from, known.settled_position), now_ts
                    )
                    if event.position <= row.settled_position
                )
                self._advance(index, row.server_name, row.room_id, known, now_ts)

    def owed(
        self, index: StickyIndex, server_name: str, room_id: str, now_ts: int
    ) -> Iterator[StickyEvent]:
        """What a server that is joined to a room is owed there, oldest first.

        To be used up before the index or the watermarks change.
        """
        watermark = self._get(index, server_name, room_id)
        settled = _NOTHING_SETTLED if watermark is None else watermark.settled_position
        for event in index.owed_after(room_id, settled, now_ts):
            if watermark is None or event.event_id not in watermark.ahead:
                yield event

    def settle(
        self,
        index: StickyIndex,
        server_name: str,
        room_id: str,
        event_ids: Iterable[str],
        now_ts: int,
    ) -> None:
        """These events of a room are settled for a server, in whatever order.

        They need not be known to the index yet.
        """
        watermark = self._get(index, server_name, room_id)
        if watermark is None:
            join = index.join(server_name, room_id)
            watermark = _Watermark(join.position if join else 0)
            self._by_room.setdefault(room_id, {})[server_name] = watermark
        for event_id in event_ids:
            event = index.get(event_id)
            watermark.ahead[event_id] = event.expires_ts if event else now_ts + _MAX_UNKNOWN_MS
        self._advance(index, server_name, room_id, watermark, now_ts)
        if len(watermark.ahead) > watermark.limit:
            _forget_unknown(index, watermark, now_ts)

    def advance(self, index: StickyIndex, room_id: str, now_ts: int) -> None:
        """The index has learned of events of this room, which may be settled already."""
        for server_name, watermark in self._by_room.get(room_id, {}).items():
            if watermark.ahead:
                self._advance(index, server_name, room_id, watermark, now_ts)

    def take_changed(self, limit: int) -> list[WatermarkRow]:
        """Watermarks that have moved and are to be stored."""
        keys = list(islice(self._changed, limit))
        rows = []
        for key in keys:
            del self._changed[key]
            watermark = self._by_room.get(key[1], {}).get(key[0])
            if watermark is not None:
                rows.append(
                    WatermarkRow(
                        *key,
                        watermark.joined_position,
                        watermark.settled_position,
                        watermark.expires_ts,
                    )
                )
        return rows

    def put_back(self, rows: Iterable[WatermarkRow]) -> None:
        """These could not be stored: they are still to be."""
        self._changed.update(((row.server_name, row.room_id), None) for row in rows)

    def expire(self, index: StickyIndex, now_ts: int) -> None:
        """Forgets watermarks that speak of nothing that is still sticky."""
        for room_id, servers in list(self._by_room.items()):
            for server_name, watermark in list(servers.items()):
                for event_id in [e for e, ts in watermark.ahead.items() if ts <= now_ts]:
                    event = index.get(event_id)
                    if event is not None and event.expires_ts > now_ts:
                        # It was settled before it was in the index.
                        watermark.ahead[event_id] = event.expires_ts
                    else:
                        del watermark.ahead[event_id]
                if watermark.expires_ts <= now_ts and not watermark.ahead:
                    del servers[server_name]
            if not servers:
                del self._by_room[room_id]

    def _get(self, index: StickyIndex, server_name: str, room_id: str) -> _Watermark | None:
        """The watermark, unless it is from before the server joined."""
        watermark = self._by_room.get(room_id, {}).get(server_name)
        if watermark is None:
            return None
        join = index.join(server_name, room_id)
        return watermark if join is None or join.position <= watermark.joined_position else None

    def _advance(
        self,
        index: StickyIndex,
        server_name: str,
        room_id: str,
        watermark: _Watermark,
        now_ts: int,
    ) -> None:
        before = watermark.settled_position
        for event in index.owed_after(room_id, before, now_ts):
            if watermark.ahead.pop(event.event_id, None) is None:
                break
            watermark.settled_position = event.position
            watermark.expires_ts = max(watermark.expires_ts, event.expires_ts)
        if watermark.settled_position != before:
            self._changed[server_name, room_id] = None


def _forget_unknown(index: StickyIndex, watermark: _Watermark, now_ts: int) -> None:
    """Forget the older half of the events that are not in the index: the others would be owed."""
    live = index.live_among(watermark.ahead, now_ts)
    unknown = [event_id for event_id in watermark.ahead if event_id not in live]
    for event_id in unknown[: -_MAX_UNKNOWN // 2]:
        del watermark.ahead[event_id]
    # Twice as many, so that it is not looked for them each time.
    watermark.limit = _MAX_UNKNOWN + 2 * len(live)
