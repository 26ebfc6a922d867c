# SPDX-License-Identifier: AGPL-3.0-or-later
"""A connection of our own for start-up, and the lock that processes take in turns."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from synapse.module_api.errors import ConfigError
from synapse.server import HomeServer
from synapse.storage import database, prepare_database
from synapse.storage.engines import BaseDatabaseEngine, PostgresEngine
from synapse.storage.engines._base import IsolationLevel
from synapse.storage.types import Cursor

from synapse_sticky.seams.checks import require

logger = logging.getLogger(__name__)

# Any number that nobody else uses: it names our lock among PostgreSQL's.
_ADVISORY_LOCK: Final = 4354_5953

LOCK_TIMEOUT_S: Final = 60
"""How long to wait for a process that holds the lock: systemd by default gives Synapse 90 s."""

# A process that waits longer says so. A migration takes less.
_TELL_AFTER_S: Final = 2
_TELL_EVERY_S: Final = 15
_TRY_EVERY_S: Final = 0.05

# PostgreSQL keeps the number of a lock in two parts.
_HOLDER: Final = f"""
    SELECT a.pid, a.application_name, a.client_addr, a.state, a.xact_start
    FROM pg_locks AS l INNER JOIN pg_stat_activity AS a USING (pid)
    WHERE l.granted AND a.pid != pg_backend_pid()
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND (
            l.locktype = 'advisory' AND l.objsubid = 1
            AND l.classid = {_ADVISORY_LOCK >> 32} AND l.objid = {_ADVISORY_LOCK & 0xFFFF_FFFF}
            OR l.relation IN (SELECT oid FROM pg_class WHERE relname ~ '^synapse_sticky_')
        )
    ORDER BY l.locktype != 'advisory', a.xact_start LIMIT 1
"""
# The code of PostgreSQL's error for a statement that has waited too long for a lock.
_LOCK_NOT_AVAILABLE: Final = "55P03"


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
    def transaction(self) -> Iterator[Cursor]:
        """A transaction that other processes may have at the same time."""
        cursor = self._connection.cursor()
        try:
            yield cursor
            self._connection.commit()
        except BaseException:
            self._connection.rollback()
            raise
        finally:
            cursor.close()

    @contextmanager
    def locked_transaction(self) -> Iterator[Cursor]:
        """A transaction that no other process has at the same time.

        Raises:
            ConfigError: saying who holds the lock, after waiting for some time.
        """
        try:
            with self.transaction() as cursor:
                self._wait_for_lock(cursor)
                yield cursor
        except Exception as error:
            if getattr(error, "pgcode", None) != _LOCK_NOT_AVAILABLE:
                raise
            with self.transaction() as cursor:
                raise self._too_long(cursor) from None

    def _wait_for_lock(self, cursor: Cursor) -> None:
        started = time.monotonic()
        tell_after_s: float = _TELL_AFTER_S
        while not self._take_lock(cursor):
            waited_s = time.monotonic() - started
            if waited_s >= LOCK_TIMEOUT_S:
                raise self._too_long(cursor)
            if waited_s >= tell_after_s:
                tell_after_s += _TELL_EVERY_S
                logger.warning(
                    "Waiting, for %d s at most, for the lock of the tables synapse_sticky_*, which "
                    "is held by %s",
                    LOCK_TIMEOUT_S,
                    self._holder(cursor),
                )
            time.sleep(_TRY_EVERY_S)

    def _too_long(self, cursor: Cursor) -> ConfigError:
        return ConfigError(
            f"synapse_sticky cannot check or change its tables: for {LOCK_TIMEOUT_S} s they have "
            f"been locked by {self._holder(cursor)}. End the Synapse process behind it, or use "
            "pg_terminate_backend(), and start this one again."
        )

    def _take_lock(self, cursor: Cursor) -> bool:
        if not self.is_postgres:
            # It waits a little, and then raises an error that says enough.
            cursor.execute("BEGIN IMMEDIATE")
            return True
        cursor.execute("SELECT pg_try_advisory_xact_lock(?)", (_ADVISORY_LOCK,))
        (is_taken,) = cursor.fetchone() or (False,)
        # For those who use the tables without the lock.
        cursor.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'")
        return bool(is_taken)

    def _holder(self, cursor: Cursor) -> str:
        """Describe which process holds PostgreSQL's lock now."""
        cursor.execute(_HOLDER)
        row = cursor.fetchone()
        if row is None:
            return "a process that has just let go of it"
        pid, application, address, state, since = row
        return (
            f"PostgreSQL's process {pid} (application {application!r}, client "
            f"{address or 'on the same machine'}, {state}, in this transaction since {since})"
        )

    def run_script(self, cursor: Cursor, script: str) -> None:
        """Runs the statements of an SQL file within the transaction."""
        for statement in prepare_database.get_statements(script.splitlines(keepends=True)):
            cursor.execute(statement)

    def close(self) -> None:
        """Gives the connection back."""
        self._connection.close()
