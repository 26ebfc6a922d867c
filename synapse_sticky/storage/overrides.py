# SPDX-License-Identifier: AGPL-3.0-or-later
"""SQL on the table of what the server's admin has decided. ``control/`` tells the meaning."""

from collections.abc import Callable
from typing import Any

import attr
from synapse.module_api import LoggingTransaction, ModuleApi


@attr.s(slots=True, frozen=True, auto_attribs=True)
class OverrideRow:
    """A row as it is stored. ``enabled`` is 0 or 1."""

    kind: str
    subject: str
    enabled: int
    reason: str | None
    until_ts: int | None


_COLUMNS = ", ".join(field.name for field in attr.fields(OverrideRow))


class OverrideStore:
    """Reads and writes the table."""

    def __init__(self, api: ModuleApi, signal: Callable[[LoggingTransaction], None]) -> None:
        self._api = api
        self._signal = signal

    async def get_all(self) -> list[OverrideRow]:
        """Return all rows."""
        return await self._api.run_db_interaction("sticky_get_overrides", read_overrides)

    async def put(self, row: OverrideRow) -> None:
        """Store a row in place of the one that is there."""

        def put_txn(txn: LoggingTransaction) -> None:
            txn.execute(
                f"INSERT INTO synapse_sticky_overrides ({_COLUMNS}) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (kind, subject) DO UPDATE SET enabled = excluded.enabled, "
                "reason = excluded.reason, until_ts = excluded.until_ts",
                attr.astuple(row),
            )
            self._signal(txn)

        await self._api.run_db_interaction("sticky_put_override", put_txn)

    async def delete(self, kind: str, subject: str) -> None:
        """Delete a row, if it is there."""

        def delete_txn(txn: LoggingTransaction) -> None:
            txn.execute(
                "DELETE FROM synapse_sticky_overrides WHERE kind = ? AND subject = ?",
                (kind, subject),
            )
            self._signal(txn)

        await self._api.run_db_interaction("sticky_delete_override", delete_txn)


def read_overrides(txn: Any) -> list[OverrideRow]:
    """Read all rows."""
    txn.execute(f"SELECT {_COLUMNS} FROM synapse_sticky_overrides")
    return [OverrideRow(*row) for row in txn.fetchall()]
