# SPDX-License-Identifier: AGPL-3.0-or-later
"""Synapse's own sticky events, which are off where the module is."""

import logging
from typing import Any

from synapse.server import HomeServer
from synapse.storage.engines import PostgresEngine
from synapse.types.rest import client as rest_types

from synapse_sticky.seams.checks import require

logger = logging.getLogger(__name__)


def take_the_place_of_synapses_own(hs: HomeServer) -> None:
    """Switch Synapse's own implementation off in this process, and say so if it was on.

    To be called before anything that is built after the modules reads the flag. What
    writes events is built before them, and has stored it; everything else asks the
    configuration at the time of use.
    """
    experimental = hs.config.experimental
    require(experimental, "msc4354_enabled")
    # None on a process that writes no events.
    persist_events = hs.get_datastores().persist_events
    if persist_events is not None:
        require(persist_events, "_msc4354_enabled")
        persist_events._msc4354_enabled = False
    if experimental.msc4354_enabled:
        experimental.msc4354_enabled = False
        logger.info(
            "synapse_sticky takes the place of Synapse's own sticky events, which "
            "`msc4354_enabled: true` in `experimental_features` switches on. They are back "
            "as soon as synapse_sticky is removed from `modules`."
        )


class OwnTokens:
    """The tokens of Synapse's own Sliding Sync extension, which clients may give to either."""

    def __init__(self, hs: HomeServer) -> None:
        self._store: Any = hs.get_datastores().main
        # Before 1.156 there are no such tokens, before 1.163 they are plain numbers. With SQLite
        # there is one writer, and Synapse has no table of them.
        token: Any = getattr(rest_types, "SlidingSyncStickyEventsToken", None)
        self._name_writers = (
            token is not None
            and token.PATTERN.match("sticky_m0~1.2") is not None
            and isinstance(self._store.database_engine, PostgresEngine)
        )
        if self._name_writers:
            require(self._store, "get_id_for_instance", "instance_name")
        # Any writer of events will do. Synapse numbers these itself, for its own tokens.
        self._writer = hs.config.worker.writers.events[0]

    async def writer_id(self) -> int | None:
        """Return the number of a writer of events; None if tokens do not name any."""
        if not self._name_writers:
            return None
        # Synapse remembers it.
        number: int = await self._store.get_id_for_instance(self._writer)
        return number
