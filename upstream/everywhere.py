# SPDX-License-Identifier: AGPL-3.0-or-later
"""Puts the module into every homeserver that the tests of this process make."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

from synapse.server import HomeServer
from synapse.storage.engines import Sqlite3Engine
from synapse.storage.types import Cursor

from synapse_sticky import StickyEventsModule
from synapse_sticky import module as sticky_module
from synapse_sticky.seams.database import MigrationConnection


def install() -> None:
    """Let each homeserver load the module, as if its configuration said so."""
    setattr(sticky_module, "MigrationConnection", connection_of)  # noqa: B010
    setup: Callable[..., Any] = HomeServer.setup

    def setup_with_module(hs: HomeServer, *args: Any, **kwargs: Any) -> Any:
        modules: list[Any] = hs.config.modules.loaded_modules
        if all(module is not StickyEventsModule for module, _ in modules):
            modules.append((StickyEventsModule, StickyEventsModule.parse_config({})))
        sender = vars(hs).get("_federation_sender")
        if isinstance(sender, Mock) and not hasattr(sender, "_transaction_manager"):
            # A test has replaced the sender by its class's public face.
            sender._transaction_manager = Mock()
        return setup(hs, *args, **kwargs)

    setattr(HomeServer, "setup", setup_with_module)  # noqa: B010


def connection_of(hs: HomeServer) -> MigrationConnection:
    """Return the connection with which the module changes its tables."""
    engine = hs.get_datastores().main.db_pool.engine
    return PooledConnection(hs) if isinstance(engine, Sqlite3Engine) else MigrationConnection(hs)


class PooledConnection(MigrationConnection):
    """The connection of the pool, as the only one: databases of SQLite's are in memory."""

    def __init__(self, hs: HomeServer) -> None:
        # Another connection would find a database of its own.
        pool: Any = hs.get_datastores().main.db_pool
        self._engine = pool.engine
        self._connection: Any = pool._db_pool.connect()

    def _wait_for_lock(self, cursor: Cursor) -> None:
        """Take no lock: there are no other processes."""

    def close(self) -> None:
        """Leave the connection to the pool."""
