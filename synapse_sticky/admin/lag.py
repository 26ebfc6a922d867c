# SPDX-License-Identifier: AGPL-3.0-or-later
"""How far the indexer is behind, as every process can tell."""

from typing import Final

import attr

from synapse_sticky.deliverable.reader import IndexReader
from synapse_sticky.noticing.ranges import in_steps, pending_ranges
from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.contents import Watched
from synapse_sticky.seams.streams import StreamBounds
from synapse_sticky.seams.tables import SynapseTables
from synapse_sticky.storage.store import StickyStore

_STEP: Final = 5_000
"""How much of a stream one transaction reads."""

_NOTHING_ELSE: Final = Watched(frozenset(), (), frozenset(), False)


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Lag:
    """Counts the sticky events that Synapse has stored and that are not noticed yet."""

    _clock: Clock
    _store: StickyStore
    _tables: SynapseTables
    _bounds: StreamBounds
    _reader: IndexReader

    async def count_unnoticed(self) -> int:
        """Return how many there are, without those that have expired."""
        written = self._bounds.current()
        progress = await self._store.get_progress()
        if progress is None:
            return 0
        # The indexer stores how far it has read less often than it reads.
        read, unnoticed = progress[0], set()
        for bounds in in_steps(read, written, _STEP):
            ranges = list(pending_ranges(read, bounds))
            found = await self._tables.find(ranges, self._clock.now_ts(), _NOTHING_ELSE)
            unnoticed |= {candidate.event_id for candidate in found.candidates}
            read = bounds
        return sum(not self._reader.index.knows(event_id) for event_id in unnoticed)
