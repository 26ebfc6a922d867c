# SPDX-License-Identifier: AGPL-3.0-or-later
"""SQL on the table of why servers were not paid. ``servers/`` tells the meaning."""

from collections.abc import Collection

import attr
from synapse.module_api import LoggingTransaction, ModuleApi


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Obstacle:
    """Why a server was not paid at the last try.

    Attributes:
        obstacle: a few words for the admin.
        retry_ts: until when the server is left alone, in ms since the epoch; it may be over.
    """

    server_name: str
    obstacle: str
    retry_ts: int


class ObstacleStore:
    """Reads and writes the table."""

    def __init__(self, api: ModuleApi) -> None:
        self._api = api

    async def get_all(self) -> dict[str, Obstacle]:
        """Return all rows, by the names of the servers."""

        def get_all_txn(txn: LoggingTransaction) -> dict[str, Obstacle]:
            txn.execute("SELECT server_name, obstacle, retry_ts FROM synapse_sticky_obstacles")
            return {row[0]: Obstacle(*row) for row in txn}

        return await self._api.run_db_interaction("sticky_get_obstacles", get_all_txn)

    async def replace(self, changed: Collection[Obstacle], gone: Collection[str]) -> None:
        """Store rows in place of those that are there, and delete those of other servers."""

        def replace_txn(txn: LoggingTransaction) -> None:
            txn.execute_batch(
                "INSERT INTO synapse_sticky_obstacles (server_name, obstacle, retry_ts) "
                "VALUES (?, ?, ?) ON CONFLICT (server_name) DO UPDATE SET "
                "obstacle = excluded.obstacle, retry_ts = excluded.retry_ts",
                [attr.astuple(row) for row in changed],
            )
            txn.execute_batch(
                "DELETE FROM synapse_sticky_obstacles WHERE server_name = ?",
                [(name,) for name in gone],
            )

        await self._api.run_db_interaction("sticky_replace_obstacles", replace_txn)
