# SPDX-License-Identifier: AGPL-3.0-or-later
"""Tells every process that our tables changed, by Synapse's own cache invalidation."""

from collections.abc import Callable
from typing import Final

from synapse.module_api import LoggingTransaction
from synapse.server import HomeServer

from synapse_sticky.seams.checks import require

_NAME: Final = "synapse_sticky.signal"


class Signal:
    """An object with the face of one of Synapse's cached functions.

    So Synapse carries its "invalidation" to all processes. Listeners must not raise.
    """

    __module__ = _NAME.split(".")[0]
    __name__ = _NAME.split(".")[1]

    def __init__(self, hs: HomeServer) -> None:
        store = hs.get_datastores().main
        require(store, "_send_invalidation_to_replication", "txn", "cache_name", "keys")
        self._send = store._send_invalidation_to_replication
        self._has_other_processes = hs.config.redis.redis_enabled
        self._listeners: list[Callable[[], None]] = []
        hs.get_module_api().register_cached_function(self)  # type: ignore[arg-type]

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call this whenever another process has changed our tables, or may have."""
        self._listeners.append(listener)

    def send(self, txn: LoggingTransaction) -> None:
        """Tell all other processes once this transaction is committed."""
        if self._has_other_processes:
            self._send(txn, _NAME, ("changed",))

    def invalidate(self, keys: tuple[str, ...]) -> None:
        """Called by Synapse when another process has sent a signal."""
        self.invalidate_all()

    def invalidate_all(self) -> None:
        """Called by Synapse when it does not know what changed."""
        for listener in self._listeners:
            listener()
