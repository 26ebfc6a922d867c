# SPDX-License-Identifier: AGPL-3.0-or-later
"""Tells other processes that our tables changed, and what is new, by Synapse's replication."""

from collections.abc import Callable
from typing import Final

from synapse.module_api import LoggingTransaction
from synapse.replication.tcp.handler import ReplicationCommandHandler
from synapse.server import HomeServer

from synapse_sticky.seams.checks import require

MESSAGE_PREFIX: Final = "synapse_sticky."
"""What the names of messages begin with, where Synapse has the names of locks."""


class Signal:
    """An object with the face of one of Synapse's cached functions, of the given name.

    So Synapse carries its "invalidation" to all processes. Listeners must not raise.
    """

    __module__ = "synapse_sticky"

    def __init__(self, hs: HomeServer, name: str) -> None:
        self.__name__ = name
        self._full_name = f"{self.__module__}.{name}"
        store = hs.get_datastores().main
        require(store, "_send_invalidation_to_replication", "txn", "cache_name", "keys")
        self._send = store._send_invalidation_to_replication
        self._has_other_processes = hs.config.redis.redis_enabled
        self._listeners: list[Callable[[int | None], None]] = []
        hs.get_module_api().register_cached_function(self)  # type: ignore[arg-type]

    def subscribe(self, listener: Callable[[int | None], None]) -> None:
        """Call this whenever another process has changed our tables, or may have.

        With the position up to which, if that is known.
        """
        self._listeners.append(listener)

    def send(self, txn: LoggingTransaction, position: int | None) -> None:
        """Tell all other processes once this transaction is committed.

        Args:
            position: a process that has read up to it need not look; None if each must.
        """
        if self._has_other_processes:
            self._send(
                txn,
                self._full_name,
                ("changed", "" if position is None else str(position)),
            )

    def invalidate(self, keys: tuple[str, ...]) -> None:
        """Called by Synapse when another process has sent a signal."""
        position = keys[1] if len(keys) > 1 else ""
        self._tell(int(position) if position.isdecimal() else None)

    def invalidate_all(self) -> None:
        """Called by Synapse when it does not know what changed."""
        self._tell(None)

    def _tell(self, position: int | None) -> None:
        for listener in self._listeners:
            listener(position)


class Messenger:
    """Sends small messages to all other processes, at once and without the database.

    They travel as Synapse's news of released locks, which every process passes over that
    does not know the lock, with the module or without. A message may get lost.
    """

    def __init__(self, hs: HomeServer) -> None:
        self._hs = hs
        self._notifier = hs.get_notifier()
        require(self._notifier, "notify_lock_released", "instance_name", "lock_name", "lock_key")
        require(ReplicationCommandHandler, "connected")
        self._instance_name = hs.get_instance_name()
        self.has_other_processes = hs.config.redis.redis_enabled

    @property
    def is_connected(self) -> bool:
        """Whether there are other processes, and messages reach them."""
        # Synapse's handler is not built yet when modules load.
        return self.has_other_processes and self._hs.get_replication_command_handler().connected()

    def send(self, kind: str, message: Callable[[], str]) -> None:
        """Send a message, if there are other processes to take it."""
        if self.is_connected:
            self._notifier.notify_lock_released(
                self._instance_name, f"{MESSAGE_PREFIX}{kind}", message()
            )
