# SPDX-License-Identifier: AGPL-3.0-or-later
"""Create and upgrade our tables, before anything reads them.

Every process does this when it loads the module; a lock in the database makes
the others wait for the first. Each file of ``schema/`` is one version, applied
once and in order; where the engines differ, each has a file of its own. Beside
the version the database stores the oldest version of this code that can still
work with it, so that during a rolling upgrade the processes not yet restarted
keep working.
"""

from importlib.resources import files
from typing import Final

from synapse.module_api.errors import ConfigError

from synapse_sticky.seams.database import MigrationConnection

COMPATIBLE_VERSION: Final = 3
"""The oldest schema version whose code can work with the newest schema, if it made the tables."""

# As the first version made it. Version 7 makes the column a primary key.
VERSION_TABLE = """
CREATE TABLE IF NOT EXISTS synapse_sticky_schema (
    lock CHAR(1) NOT NULL DEFAULT 'X' UNIQUE,
    version INTEGER NOT NULL,
    compatible_version INTEGER NOT NULL,
    CHECK (lock = 'X')
)
"""


def migrate(connection: MigrationConnection) -> int:
    """Bring our tables to the newest version, in one transaction, and return their version.

    Raises:
        ConfigError: if they were written by a later version of this module
            that this one cannot work with. Nothing is changed then.
    """
    scripts = scripts_for(is_postgres=connection.is_postgres)
    newest = max(scripts)
    with connection.locked_transaction() as txn:
        txn.execute(VERSION_TABLE)
        txn.execute("SELECT version, compatible_version FROM synapse_sticky_schema")
        # Older code has not made the tables then, and need not fit the types that ours chooses.
        version, compatible_version = txn.fetchone() or (0, newest)
        check_compatible(version, compatible_version, newest)
        if version >= newest:
            return int(version)
        if version and connection.is_postgres:
            # As the writer's transactions do, take this table first: or both wait for each other.
            txn.execute("LOCK TABLE synapse_sticky_progress IN ACCESS EXCLUSIVE MODE")
        for number in range(version + 1, newest + 1):
            connection.run_script(txn, scripts[number])
        txn.execute("DELETE FROM synapse_sticky_schema")
        txn.execute(
            "INSERT INTO synapse_sticky_schema (version, compatible_version) VALUES (?, ?)",
            (newest, max(compatible_version, COMPATIBLE_VERSION)),
        )
    return newest


def check_compatible(version: int, compatible_version: int, newest: int) -> None:
    """Refuse tables that a later version of this module has made unfit for this one.

    Args:
        newest: the newest version of the tables that this module knows.

    Raises:
        ConfigError: saying what to do.
    """
    if compatible_version > newest:
        raise ConfigError(
            f"The tables synapse_sticky_* in the database have version {version} and need a "
            f"synapse_sticky that knows version {compatible_version} or later; this one knows "
            f"{newest}. Install the newer synapse_sticky again, or drop the tables: what is "
            "lost then is only who has seen which unexpired sticky event."
        )


def scripts_for(*, is_postgres: bool) -> dict[int, str]:
    """Return the SQL of each version, in their order."""
    suffix = ".sql.postgres" if is_postgres else ".sql.sqlite"
    return {
        int(entry.name.split("_")[0]): entry.read_text(encoding="utf-8")
        for entry in sorted(
            files("synapse_sticky.storage").joinpath("schema").iterdir(), key=lambda e: e.name
        )
        if entry.name.endswith((".sql", suffix))
    }
