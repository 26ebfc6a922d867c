# SPDX-License-Identifier: AGPL-3.0-or-later
"""Tells the other processes what was recorded.

A message is there at once, costs little, and may get lost. So a signal follows that does not:
it is a row that Synapse writes for all processes. One a second is enough, however many the
messages were.
"""

from collections.abc import Sequence
from typing import Final

from synapse.module_api import ModuleApi

from synapse_sticky.deliverable.messages import MAX_EVENTS, Recorded
from synapse_sticky.deliverable.reader import RECORDED
from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.failures import log_failure
from synapse_sticky.seams.signal import Messenger
from synapse_sticky.storage.rows import EventChange
from synapse_sticky.storage.store import StickyStore

_SIGNAL_AFTER_MS: Final = 1_000


class Announcements:
    """Sends messages of what was recorded, and the signals that follow them."""

    def __init__(
        self, api: ModuleApi, clock: Clock, store: StickyStore, messenger: Messenger
    ) -> None:
        self._api = api
        self._clock = clock
        self._store = store
        self._messenger = messenger
        self._signal_scheduled = False

    def fit_in_message(self, changes: Sequence[EventChange]) -> bool:
        """Whether :meth:`send` can tell of these; otherwise the record itself has to signal."""
        return len(changes) <= MAX_EVENTS and self._messenger.is_connected

    def send(self, recorded: Recorded) -> None:
        """Tell at once what was recorded, and signal it later."""
        self._messenger.send(RECORDED, recorded.encode)
        self.signal_later()

    def signal_later(self) -> None:
        """Signal within a second that other processes may lack something."""
        if self._messenger.has_other_processes and not self._signal_scheduled:
            self._signal_scheduled = True
            self._clock.call_later(_SIGNAL_AFTER_MS, self._on_time)

    def _on_time(self) -> None:
        self._signal_scheduled = False
        self._api.run_as_background_process("sticky_signal", self._signal)

    async def _signal(self) -> None:
        try:
            await self._store.signal()
        except Exception as error:
            log_failure(
                "Cannot signal other processes, trying again; "
                "if one missed a message, its clients get sticky events late",
                error,
            )
            self.signal_later()
