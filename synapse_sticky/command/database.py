# SPDX-License-Identifier: AGPL-3.0-or-later
"""Checks on the database, which nothing here changes."""

from typing import Any

from synapse.module_api import LoggingTransaction
from synapse.module_api.errors import ConfigError

from synapse_sticky.command.checks import ERROR, NOTE, OK
from synapse_sticky.command.report import Report, sentence
from synapse_sticky.seams.configured import NotClosed, reading
from synapse_sticky.seams.tables import check_tables
from synapse_sticky.storage import inspection, migrations


def check_database(report: Report, config: Any) -> None:
    """Check that the database can be opened, and the tables in it."""
    try:
        with reading(config) as (txn, is_postgres):
            kind = "PostgreSQL" if is_postgres else "SQLite"
            report.add(OK, "database", f"The {kind} database can be opened.")
            _check_tables(report, txn, is_postgres)
    except NotClosed:
        report.add(
            NOTE,
            "database",
            "The SQLite database was not closed in an orderly way, so it was not opened.",
            "Start Synapse, and run this again.",
        )
    except FileNotFoundError as error:
        report.add(
            NOTE,
            "database",
            f"{sentence(error)} Synapse makes it when it starts for the first time.",
            "If there should be one: a relative path counts from where Synapse runs; say where "
            "by `--directory`.",
        )
    except Exception as error:
        # Two drivers have errors of their own, and so have their options.
        report.add(
            ERROR,
            "database",
            # PostgreSQL's goes on with a question, and both may show lines of SQL.
            f"The database cannot be read: {sentence(str(error).strip().partition(chr(10))[0])}",
            "Check that the database server runs, and `database` in the configuration.",
        )


def _check_tables(report: Report, txn: LoggingTransaction, is_postgres: bool) -> None:
    if not inspection.has_table(txn, "events", is_postgres=is_postgres):
        report.add(NOTE, "synapse-tables", "There are none yet.", "Start Synapse once.")
        return
    try:
        check_tables(txn)
    except ConfigError as error:
        report.add(
            ERROR,
            "synapse-tables",
            sentence(error.msg),
            "Check that the database was made by the Synapse that is installed here.",
        )
        return
    report.add(OK, "synapse-tables", "Synapse's tables have all the columns that the module reads.")
    _check_our_tables(report, txn, is_postgres)


def _check_our_tables(report: Report, txn: LoggingTransaction, is_postgres: bool) -> None:
    found = [
        table
        for table in inspection.expected_columns()
        if inspection.has_table(txn, table, is_postgres=is_postgres)
    ]
    newest = max(migrations.scripts_for(is_postgres=is_postgres))
    stored = inspection.read_version(txn) if inspection.SCHEMA_TABLE in found else None
    version, compatible_version = stored or (0, newest)
    try:
        migrations.check_compatible(version, compatible_version, newest)
    except ConfigError as error:
        report.add(ERROR, "tables", sentence(error.msg), "As it says.")
        return
    if version == 0:
        _report_absent(report, [table for table in found if table != inspection.SCHEMA_TABLE])
    elif version < newest:
        report.add(
            NOTE,
            "tables",
            f"The tables have version {version}; this module makes version {newest} of them.",
            "Nothing: they are upgraded when Synapse starts.",
        )
    else:
        _report_complete(report, version, inspection.missing(txn))


def _report_absent(report: Report, left: list[str]) -> None:
    if left:
        report.add(
            ERROR,
            "tables",
            f"{inspection.SCHEMA_TABLE} is missing or empty; others are there: {', '.join(left)}.",
            "Restore it from the same backup, or drop the others too.",
        )
    else:
        report.add(
            NOTE,
            "tables",
            "The module has no tables yet.",
            "Nothing: they are made when Synapse starts with the module.",
        )


def _report_complete(report: Report, version: int, missing: list[str]) -> None:
    if missing:
        report.add(
            ERROR,
            "tables",
            f"The tables have version {version}, and lack {', '.join(missing)}.",
            "Stop Synapse, drop all tables synapse_sticky_*, and start it again: it finds the "
            "events again that are still sticky.",
        )
    else:
        report.add(OK, "tables", f"The module's tables have version {version}.")
