# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the server's admin has decided on rooms, users and servers, in memory on every process.

The process that is asked stores a decision, and tells all others, before it answers.
"""

import enum
from collections.abc import Callable, Iterator
from typing import Final

import attr
from synapse.module_api import ModuleApi

from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.failures import shielded
from synapse_sticky.storage.overrides import OverrideRow, OverrideStore

_END_INTERVAL_MS: Final = 1_000
_POLL_INTERVAL_MS: Final = 60_000


class Kind(enum.Enum):
    """What a decision is about. The values are stored."""

    ROOM = "room"
    USER = "user"
    SERVER = "server"


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Override:
    """A decision of the server's admin.

    Attributes:
        enabled: whether sticky events are on. For users and servers only off is decided.
        reason: a text for whom it concerns, if there is one.
        until_ts: when it ends, in ms since the epoch; None if it does not.
    """

    enabled: bool
    reason: str | None = None
    until_ts: int | None = None


Subject = tuple[Kind, str]
"""What a decision is about, and its ID or name."""


class Overrides:
    """All decisions."""

    def __init__(self, api: ModuleApi, clock: Clock, store: OverrideStore) -> None:
        self._api = api
        self._clock = clock
        self._store = store
        self._by_subject: dict[Subject, Override] = {}
        self._listeners: list[Callable[[set[Subject]], None]] = []
        # How many times the table was begun to be read, and which of them counts.
        self._begun = 0
        self._newest = 0

    def subscribe(self, listener: Callable[[set[Subject]], None]) -> None:
        """Call this with what has been decided anew, or not any more. It must not raise."""
        self._listeners.append(listener)

    def get(self, kind: Kind, subject: str) -> Override | None:
        """Return what is decided now, None if nothing is."""
        override = self._by_subject.get((kind, subject))
        return override if override is not None and self._is_valid(override) else None

    def all(self, kind: Kind) -> Iterator[tuple[str, Override]]:
        """All decisions of a kind that count now."""
        for (its_kind, subject), override in self._by_subject.items():
            if its_kind is kind and self._is_valid(override):
                yield subject, override

    async def decide(self, kind: Kind, subject: str, override: Override | None) -> None:
        """Decide, or take a decision back. It is stored, and known here, on return."""
        if override is None:
            await self._store.delete(kind.value, subject)
        else:
            await self._store.put(
                OverrideRow(
                    kind.value,
                    subject,
                    int(override.enabled),
                    override.reason,
                    override.until_ts,
                )
            )
        await self.refresh()

    def load(self, rows: list[OverrideRow]) -> None:
        """Take over what is stored, at start-up."""
        self._take_over(rows)

    async def refresh(self) -> None:
        """Take over what is stored now."""
        self._begun = number = self._begun + 1
        rows = await self._store.get_all()
        # One that began before may end later, and not know the newest decision.
        if number > self._newest:
            self._newest = number
            self._take_over(rows)

    def on_signal(self, _: object = None) -> None:
        """Another process has stored a decision. Never raises."""
        self._api.run_as_background_process("sticky_overrides", self._refresh_safely)

    async def _refresh_safely(self) -> None:
        with shielded(
            "Cannot read the table synapse_sticky_overrides; the decisions of admins from "
            "before count, trying again"
        ):
            await self.refresh()

    def start(self) -> None:
        """Begin to look for decisions that have ended, and for signals that were lost."""
        call = self._api.looping_background_call
        if self._api.should_run_background_tasks():
            call(self._end, _END_INTERVAL_MS, desc="sticky_overrides_end")
        call(
            self._refresh_safely,
            _POLL_INTERVAL_MS,
            desc="sticky_overrides_poll",
            run_on_all_instances=True,
        )

    async def _end(self) -> None:
        """Tell listeners of the decisions that have ended by now."""
        ended = {s for s, o in self._by_subject.items() if not self._is_valid(o)}
        for subject in ended:
            del self._by_subject[subject]
        self._tell(ended)

    def _take_over(self, rows: list[OverrideRow]) -> None:
        before = self._by_subject
        found = {
            (Kind(row.kind), row.subject): Override(bool(row.enabled), row.reason, row.until_ts)
            for row in rows
        }
        self._by_subject = {
            s: override for s, override in found.items() if self._is_valid(override)
        }
        after = self._by_subject
        self._tell({s for s in before.keys() | after.keys() if before.get(s) != after.get(s)})

    def _is_valid(self, override: Override) -> bool:
        return override.until_ts is None or override.until_ts > self._clock.now_ts()

    def _tell(self, changed: set[Subject]) -> None:
        if changed:
            for listener in self._listeners:
                listener(changed)
