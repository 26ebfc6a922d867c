# SPDX-License-Identifier: AGPL-3.0-or-later
"""Looks at our tables without changing them, for who checks a database from outside."""

import contextlib
import sqlite3
from typing import Final

from synapse.module_api import LoggingTransaction

from synapse_sticky.storage.migrations import VERSION_TABLE, scripts_for

SCHEMA_TABLE: Final = "synapse_sticky_schema"


def expected_columns() -> dict[str, list[str]]:
    """Return the tables of the newest version with their columns, which both engines share."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(VERSION_TABLE)
        for script in scripts_for(is_postgres=False).values():
            connection.executescript(script)
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        return {
            name: [row[1] for row in connection.execute(f"PRAGMA table_info({name})")]
            for (name,) in tables.fetchall()
        }


def has_table(txn: LoggingTransaction, name: str, *, is_postgres: bool) -> bool:
    """Whether there is a table, ours or Synapse's."""
    if is_postgres:
        txn.execute("SELECT to_regclass(?) IS NOT NULL", (name,))
    else:
        txn.execute("SELECT count(*) FROM sqlite_master WHERE name = ?", (name,))
    (found,) = txn.fetchone() or (False,)
    return bool(found)


def read_version(txn: LoggingTransaction) -> tuple[int, int] | None:
    """Return the version of the tables, and the oldest that can work with them, if it is stored."""
    txn.execute(f"SELECT version, compatible_version FROM {SCHEMA_TABLE}")
    row = txn.fetchone()
    return (int(row[0]), int(row[1])) if row is not None else None


def missing(txn: LoggingTransaction) -> list[str]:
    """Return the tables and columns of the newest version that cannot be read."""
    return [
        name
        for table, columns in expected_columns().items()
        for name in (
            [f"{table}.{column}" for column in columns if not _can_read(txn, table, column)]
            if _can_read(txn, table, "*")
            else [table]
        )
    ]


def _can_read(txn: LoggingTransaction, table: str, column: str) -> bool:
    txn.execute("SAVEPOINT synapse_sticky_inspection")
    try:
        txn.execute(f"SELECT {column} FROM {table} LIMIT 0")
    except Exception:
        # Each driver has errors of its own for it.
        txn.execute("ROLLBACK TO SAVEPOINT synapse_sticky_inspection")
        return False
    return True
