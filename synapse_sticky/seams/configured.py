# SPDX-License-Identifier: AGPL-3.0-or-later
"""A configuration as Synapse reads it, for who looks at it without starting Synapse."""

import contextlib
import inspect
import io
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import attr
from synapse.config import _base
from synapse.config.homeserver import HomeServerConfig
from synapse.handlers.delayed_events import DelayedEventsHandler
from synapse.module_api import LoggingTransaction
from synapse.storage.database import LoggingDatabaseConnection
from synapse.storage.engines import PostgresEngine, create_engine

from synapse_sticky.config import RateLimit
from synapse_sticky.seams.checks import require

_CONNECT_TIMEOUT_S: Final = 10


class NotClosed(Exception):
    """An SQLite database that was not closed, and that no process has open."""


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Configured:
    """The options of Synapse that matter to sticky events and to calls, with its defaults.

    Attributes:
        max_event_delay_ms: 0 if events cannot be delayed.
        max_delayed_events: how many of a user may wait; None if this Synapse has no limit.
        transports: how many media servers are named.
    """

    max_event_delay_ms: int
    max_delayed_events: int | None
    message_rate: RateLimit
    delayed_event_rate: RateLimit
    tells_transports: bool
    transports: int
    own_sticky_events: bool
    own_extremities: bool


def find_files(paths: Sequence[str]) -> list[str]:
    """Return the configuration files that Synapse reads for these paths, in its order.

    A folder stands for the files in it.
    """
    require(_base, "find_config_files", "search_paths")
    # It prints the files that it leaves out.
    with contextlib.redirect_stdout(io.StringIO()):
        return list(_base.find_config_files(list(paths)))


def load(files: Sequence[str]) -> HomeServerConfig:
    """Let Synapse read its configuration, other modules' included.

    Raises:
        ConfigError: for a mistake, as Synapse reports it.
        Exception: whatever the code of other modules raises; Synapse does not start then.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        return HomeServerConfig.load_config(
            "synapse-sticky", [f"--config-path={path}" for path in files]
        )


def describe(config: HomeServerConfig) -> Configured:
    """Return the options of a configuration that matter here."""
    server: Any = config.server
    experimental: Any = config.experimental
    ratelimiting: Any = config.ratelimiting
    if hasattr(server, "max_event_delay_duration"):
        max_event_delay_ms = server.max_event_delay_duration.as_millis()
    else:
        # Up to some release before 1.163 a plain number, or None.
        require(server, "max_event_delay_ms")
        max_event_delay_ms = server.max_event_delay_ms or 0
    return Configured(
        max_event_delay_ms=max_event_delay_ms,
        max_delayed_events=getattr(server, "max_delayed_events_per_user", None),
        message_rate=_rate(ratelimiting.rc_message),
        delayed_event_rate=_rate(ratelimiting.rc_delayed_event_mgmt),
        tells_transports=bool(experimental.msc4143_enabled),
        transports=len(config.matrix_rtc.transports),
        own_sticky_events=bool(experimental.msc4354_enabled),
        own_extremities=bool(getattr(experimental, "msc4370_enabled", False)),
    )


def _rate(settings: Any) -> RateLimit:
    return RateLimit(settings.per_second, settings.burst_count)


def only_owners_manage_delayed_events() -> bool:
    """Whether this Synapse lets only the user who scheduled a delayed event restart it."""
    return "requester" in inspect.signature(DelayedEventsHandler.restart).parameters


@contextlib.contextmanager
def reading(config: HomeServerConfig) -> Iterator[tuple[LoggingTransaction, bool]]:
    """A cursor on the database that cannot change it, and whether that is PostgreSQL.

    Raises:
        NotClosed: since to open such a database would create files beside it.
        FileNotFoundError: if there is no SQLite database yet.
        Exception: that of the database if it cannot be opened.
    """
    (database,) = (each for each in config.database.databases if "main" in each.databases)
    engine = create_engine(database.config)
    arguments = {
        name: value
        for name, value in database.config.get("args", {}).items()
        if not name.startswith("cp_")
    }
    is_postgres = isinstance(engine, PostgresEngine)
    connection: Any
    if is_postgres:
        connection = engine.module.connect(**{"connect_timeout": _CONNECT_TIMEOUT_S, **arguments})
        connection.set_session(readonly=True)
    else:
        connection = _open_sqlite(Path(arguments["database"]))
    wrapped = LoggingDatabaseConnection(
        conn=connection,
        engine=engine,
        default_txn_name="synapse_sticky_command",
        server_name=config.server.server_name,
    )
    try:
        yield wrapped.cursor(), is_postgres
    finally:
        connection.close()


def _open_sqlite(path: Path) -> sqlite3.Connection:
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path.absolute()}")
    mode = "mode=ro"
    if not Path(f"{path}-wal").exists():
        # SQLite would create files that belong to us, and that Synapse's own user cannot open.
        mode = "immutable=1"
    elif not Path(f"{path}-shm").exists():
        raise NotClosed
    name = f"file:{quote(str(path.absolute()))}?{mode}"
    return sqlite3.connect(name, uri=True, timeout=_CONNECT_TIMEOUT_S)
