# SPDX-License-Identifier: AGPL-3.0-or-later
"""A connection of our own for start-up, and the signal to other processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from synapse.server import HomeServer
from synapse.storage import database, prepare_database
from synapse.storage.engines import BaseDatabaseEngine, PostgresEngine
from synapse.storage.engines._base import IsolationLevel
from synapse.storage.types import Cursor

from synapse_sticky.seams.checks import require

# Any number that nobody else uses: it names our lock among PostgreSQL's.
_ADVISORY_LOCK: Final = 4354_5953


class MigrationConnection:
    """A connection outside of Synapse's pool, for the time that a module loads.

    Synapse's transactions are REPEATABLE READ on PostgreSQL, where a process
    that waited for a lock still does not see what the holder created. Ours are
    READ COMMITTED.
    """

    def __init__(self, hs: HomeServer) -> None:
        require(database, "make_conn", "db_config", "engine", "default_txn_name", "server_name")
        require(prepare_database, "get_statements", "f")
        require(BaseDatabaseEngine, "attempt_to_set_isolation_level", "conn", "isolation_level")
        pool = hs.get_datastores().main.db_pool
        require(pool, "_database_config")
        self._engine = pool.engine
        self._connection = database.make_conn(
            db_config=pool._database_config,
            engine=self._engine,
            default_txn_name="synapse_sticky_startup",
            server_name=hs.hostname,
        )
        # SQLite's engine has nothing to set.
        self._engine.attempt_to_set_isolation_level(
            self._connection.conn, IsolationLevel.READ_COMMITTED
        )

    @property
    def is_postgres(self) -> bool:
        """Whether the database is PostgreSQL, not SQLite."""
        return isinstance(self._engine, PostgresEngine)

    @contextmanager
    def locked_transaction(self) -> Iterator[Cursor]:
        """A transaction that no other process has at the same time."""
        cursor = self._connection.cursor()
        try:
            if self.is_postgres:
                cursor.execute("SELECT pg_advisory_xact_lock(?)", (_ADVISORY_LOCK,))
            else:
                cursor.execute("BEGIN IMMEDIATE")
            yield cursor
            self._connection.commit()
        except BaseException:
            self._connection.rollback()
            raise
        finally:
            cursor.close()

    def run_script(self, cursor: Cursor, script: str) -> None:
        """Runs the statements of an SQL file within the transaction."""
        for statement in prepare_database.get_statements(script.splitlines(keepends=True)):
            cursor.execute(statement)

    def close(self) -> None:
        """Gives the connection back."""
        self._connection.close()
