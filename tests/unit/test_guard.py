"""What the seams require of Synapse, and what keeps our errors from it."""

import logging
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from synapse.module_api.errors import ConfigError
from synapse.server import HomeServer
from twisted.enterprise.adbapi import ConnectionLost
from twisted.internet.defer import CancelledError, ensureDeferred

from synapse_sticky.hooks.guard import run_within, wrap
from synapse_sticky.seams.checks import TESTED_RANGE, require, synapse_version
from synapse_sticky.seams.failures import shielded


class Owner:
    """Stands for a class of Synapse's."""

    limit = 5

    def fetch(self, room_id: str, *, limit: int) -> str:
        """Fetch it."""
        return f"{room_id} {limit}"


def test_what_is_there_is_enough() -> None:
    require(Owner, "limit")
    require(Owner, "fetch", "room_id", "limit")
    require(Owner(), "fetch", "limit")
    require(logging, "getLogger", "name")
    # Somebody else may have put a function around it.
    require(SimpleNamespace(fetch=lambda *args, **kwargs: None), "fetch", "room_id")


@pytest.mark.parametrize(
    ("owner", "name", "parameters", "complaint"),
    [
        (Owner, "gone", (), "Owner.gone is not there"),
        (Owner(), "gone", (), "Owner.gone is not there"),
        (logging, "gone", ("name",), "logging.gone is not there"),
        (Owner, "fetch", ("limit", "user_id", "since"), "Owner.fetch does not take user_id, since"),
    ],
)
def test_what_does_not_fit_is_named(
    owner: object, name: str, parameters: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        require(owner, name, *parameters)
    for part in (complaint, str(synapse_version()), TESTED_RANGE, "homeserver.yaml"):
        assert part in str(caught.value)


def test_an_error_of_ours_is_logged_and_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    with shielded("The section is left out"):
        raise ValueError("ours")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "The section is left out"
    assert record.exc_info is not None


def test_it_is_logged_once_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    for _ in range(30):
        for consequence in ("One section is left out", "Another section is left out"):
            with shielded(consequence):
                raise ValueError("ours")
        now += 3
    messages = [record.getMessage() for record in caplog.records]
    assert messages == 2 * ["One section is left out", "Another section is left out"]


def test_a_database_that_is_away_is_one_line_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails for it, and however often; other failures are told beside it."""
    psycopg2 = pytest.importorskip("psycopg2")
    errors = pytest.importorskip("psycopg2.errors")
    now = 1_000_000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    away = [
        psycopg2.OperationalError("connection refused\nIs the server running?"),
        psycopg2.InterfaceError("connection already closed"),
        errors.AdminShutdown("terminating connection"),
        ConnectionLost(),
    ]
    for _ in range(30):
        for error in (*away, errors.UndefinedTable("no such table")):
            with shielded(f"Cannot read after {type(error).__name__}"):
                raise error
        now += 3
    refused = "The database does not answer (connection refused). Sticky events wait until it does"
    assert [(record.getMessage(), record.exc_info is None) for record in caplog.records] == 2 * [
        (refused, True),
        ("Cannot read after UndefinedTable", False),
    ]


@pytest.mark.parametrize("error", [CancelledError, KeyboardInterrupt, GeneratorExit])
def test_what_ends_a_request_or_the_process_is_passed_on(error: type[BaseException]) -> None:
    with pytest.raises(error), shielded("The section is left out"):
        raise error


def test_what_is_replaced_keeps_its_name() -> None:
    def ours(room_id: str, *, limit: int) -> str:
        return "ours"

    module: Any = ModuleType("where_synapse_looks")
    module.fetch = Owner.fetch
    wrap(module, "fetch", ours, "room_id")
    assert module.fetch("!a", limit=1) == "ours"
    assert (module.fetch.__name__, module.fetch.__doc__) == ("fetch", "Fetch it.")
    with pytest.raises(ConfigError):
        wrap(module, "gone", ours)
    with pytest.raises(ConfigError):
        wrap(module, "fetch", ours, "user_id")


def test_a_homeserver_that_is_shut_down_starts_nothing() -> None:
    """Synapse refuses to, and its queue goes on."""
    is_started = False

    async def start() -> None:
        nonlocal is_started
        is_started = True

    class ShutDown:
        """As Synapse's, once it has been shut down."""

        _is_shutdown = True
        run_as_background_process = HomeServer.run_as_background_process

    hs: Any = ShutDown()
    with pytest.raises(Exception, match="shutdown"):
        hs.run_as_background_process("test", start)
    results: list[None] = []
    ensureDeferred(run_within(hs, 1_000, "Not done", start)).addCallback(results.append)
    assert results == [None]
    assert not is_started
