# SPDX-License-Identifier: AGPL-3.0-or-later
"""Stores why servers were not paid, so that an admin can ask any process."""

from synapse.module_api import ModuleApi

from synapse_sticky.config import StickyEventsConfig
from synapse_sticky.seams.failures import shielded
from synapse_sticky.seams.federation import Federation
from synapse_sticky.servers.looper import Looper
from synapse_sticky.storage.obstacles import Obstacle, ObstacleStore


class Obstacles:
    """Stores the obstacles that this process has met. Costs nothing while nothing changes."""

    def __init__(
        self, api: ModuleApi, store: ObstacleStore, federation: Federation, looper: Looper
    ) -> None:
        self._api = api
        self._store = store
        self._federation = federation
        self._looper = looper
        # Of the servers that this process sends to; None before they are read.
        self._stored: dict[str, Obstacle] | None = None

    def start(self, config: StickyEventsConfig) -> None:
        """Begin to store them, every few seconds."""
        self._api.looping_background_call(
            self._store_safely,
            config.poll_interval_ms,
            desc="sticky_obstacles",
            run_on_all_instances=True,
        )

    async def _store_safely(self) -> None:
        with shielded("Cannot store why servers were not paid; trying again"):
            await self._store_changes()

    async def _store_changes(self) -> None:
        if self._stored is None:
            # This process may have ended while there were some.
            rows = (await self._store.get_all()).values()
            self._stored = {
                row.server_name: row for row in rows if self._federation.sends_to(row.server_name)
            }
        found = {row.server_name: row for row in self._looper.obstacles()}
        changed = [row for name, row in found.items() if self._stored.get(name) != row]
        gone = self._stored.keys() - found.keys()
        if changed or gone:
            await self._store.replace(changed, gone)
            self._stored = found
