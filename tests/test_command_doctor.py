"""`synapse-sticky doctor`: each check finds its fault, and is content where there is none."""

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version
from synapse.config.experimental import ExperimentalConfig
from synapse.handlers.delayed_events import DelayedEventsHandler

from harness.client import Client
from harness.homeserver import BACKGROUND_WORKER, MODULE, Homeserver
from harness.proxy import Fault
from harness.wait import eventually
from synapse_sticky.command import live
from synapse_sticky.command.checks import CHECKS
from synapse_sticky.seams import configured
from synapse_sticky.seams.checks import synapse_version
from tests.command import FOR_CALLS, ME, Gateway, Installation, alternating, failing, run, started
from tests.support import MakeHomeserver

# Of a server that runs, and of two.
LIVE = {c.id for c in CHECKS[[c.id for c in CHECKS].index("url") :]}
FEDERATED = {c.id for c in CHECKS[[c.id for c in CHECKS].index("peer") :]}
WORKERS = {"worker-modules", "worker-files"}
SECRET = "hunter2-and-more"

sqlite_only = pytest.mark.deployments("sqlite")


@pytest.fixture
def installation(homeserver: Homeserver, tmp_path: Path) -> Installation:
    """The files of the shared deployment, which a test may change."""
    return Installation.of(homeserver, tmp_path)


@pytest.fixture
def admin(homeserver: Homeserver) -> Client:
    """An admin of the shared deployment."""
    return homeserver.register(admin=True)


# An installation without faults


@pytest.mark.slow
def test_sound_installation(installation: Installation, homeserver: Homeserver) -> None:
    """Nothing is found, and nothing is changed."""
    # It starts one with SQLite, whatever the installation has.
    trial = installation.options["database"]["name"] == "sqlite3"
    answer = installation.doctor(trial=trial)
    expected = {c.id for c in CHECKS} - LIVE - (set() if trial else {"seams"})
    if not installation.workers:
        expected -= WORKERS
    found = {finding["id"] for finding in answer.document["findings"]}
    assert found == expected
    notes = {"calls-delayed-event-owner"} if _needs_owner() else set()
    if homeserver._own_flag:
        notes.add("own-sticky-events")
    levels = {f["id"]: f["level"] for f in answer.document["findings"]}
    assert {name for name, level in levels.items() if level != "ok"} == notes
    assert answer.code == 0
    assert answer.document["version"] == 1


def _needs_owner() -> bool:
    return "requester" in DelayedEventsHandler.restart.__code__.co_varnames


def test_running_server(homeserver: Homeserver, admin: Client, stock_peer: Homeserver) -> None:
    """A real event is exchanged with itself, and with a server that has no sticky events."""
    other = stock_peer.register()
    before = joined_rooms(admin), joined_rooms(other)
    answer = run(
        *("doctor", "--json", "--quiet", "--url", homeserver.main_url),
        *("--token", admin.access_token, "--peer", stock_peer.main_url),
        *("--peer-token", other.access_token),
    )
    levels = {f["id"]: f["level"] for f in answer.document["findings"]}
    assert set(levels) == LIVE
    assert {name for name, level in levels.items() if level != "ok"} == {
        # The harness names no media server.
        "live-transports",
        "peer",
        "federation-in",
    }
    assert (levels["peer"], levels["federation-in"]) == ("note", "note")
    assert answer.code == 1
    pending = admin.request("GET", "/_matrix/client/unstable/org.matrix.msc4140/delayed_events")
    assert pending["delayed_events"] == []
    assert (joined_rooms(admin), joined_rooms(other)) == before
    assert admin.access_token not in answer.output


@pytest.mark.slow
@sqlite_only
def test_two_servers_with_the_module(
    homeserver: Homeserver, admin: Client, mixed_peer: Homeserver
) -> None:
    """Events go both ways, between two releases of Synapse; the token is that of no admin."""
    user = mixed_peer.register()
    answer = run(
        *("doctor", "--json", "--quiet", "--skip", "live-transports"),
        *("--url", mixed_peer.main_url, "--token", user.access_token),
        *("--peer", homeserver.main_url, "--peer-token", admin.access_token),
    )
    levels = {f["id"]: f["level"] for f in answer.document["findings"]}
    # Not without an answer of the admin API, and not if it is skipped.
    assert set(levels) == LIVE - {"indexer", "live-transports"}
    assert {name for name, level in levels.items() if level != "ok"} == {"admin-api"}
    assert levels["admin-api"] == "note"
    assert answer.code == 0
    assert joined_rooms(user) == joined_rooms(admin) == []


@pytest.mark.any_synapse
@sqlite_only
def test_running_server_and_calls(make_homeserver: MakeHomeserver) -> None:
    """Media servers are found where they are named, and delayed events missed."""
    options = {**FOR_CALLS, "max_event_delay_duration": None}
    homeserver = make_homeserver(extra_config=options)
    homeserver.start()
    token = homeserver.register().access_token
    answer = run("doctor", "--json", "-q", "--url", homeserver.main_url, "--token", token)
    assert answer.levels("live-transports") == ["ok"]
    assert "does not have" in answer.finding("live-delayed-events", "warning")["what"]
    assert answer.code == 1
    homeserver.stop()
    homeserver.reconfigure(extra_config={**FOR_CALLS, "max_event_delay_duration": "30m"})
    homeserver.start()
    answer = run("doctor", "--json", "-q", "--url", homeserver.main_url, "--token", token)
    assert "1800000" in answer.finding("live-delayed-events", "warning")["what"]


def joined_rooms(client: Client) -> list[str]:
    """The rooms that a user is joined to."""
    rooms: list[str] = client.request("GET", "/_matrix/client/v3/joined_rooms")["joined_rooms"]
    return rooms


# Faults of the configuration


def _set(**options: Any) -> Callable[[Installation], None]:
    return lambda installation: installation.options.update(options)


def _features(**features: Any) -> Callable[[Installation], None]:
    return lambda installation: installation.options["experimental_features"].update(features)


def _ours(config: Any, **more: Any) -> Callable[[Installation], None]:
    return _set(modules=[{"module": MODULE, "config": config, **more}])


def _file(content: Any) -> Callable[[Installation], None]:
    return lambda installation: installation.more.update({"more.yaml": content})


ENTRY = {"module": MODULE, "config": {}}
OTHER = {"module": "json.JSONDecoder", "config": {}}

FAULTS: list[tuple[str, str, Callable[[Installation], None], str]] = [
    ("modules", "error", _set(modules=[]), "not in the list"),
    ("modules", "error", _set(modules="synapse_sticky"), "not a list"),
    ("modules", "error", _set(modules=[ENTRY, ENTRY]), "listed 2 times"),
    (
        "modules",
        "error",
        _set(modules=[{"module": "synapse_sticky.StickyModule"}]),
        "names 'synapse_sticky.StickyModule'",
    ),
    (
        "modules",
        "error",
        lambda i: i.options.update(modules=None, experimental_features={"modules": [ENTRY]}),
        "but in `experimental_features`",
    ),
    ("modules-replaced", "error", _file({"modules": []}), "are not loaded: synapse_sticky."),
    ("modules-replaced", "warning", _file({"modules": [ENTRY]}), "more.yaml replaces that in"),
    ("module-options", "error", _ours({"max_events": 3}), "unknown option 'max_events'"),
    ("module-options", "error", _ours({"poll_interval": 5}), "`config.poll_interval`: expected"),
    ("module-options", "error", _ours({}, poll_interval="5s"), "stands beside `config`"),
    ("files", "error", _file("absent"), "more.yaml cannot be read: No such file"),
    ("files", "error", _file(f"password: [{SECRET}\nother: 'x"), "is not YAML"),
    ("files", "warning", _file("# nothing\n"), "Synapse ignores it"),
    (
        "synapse-configuration",
        "error",
        _set(max_event_delay_duration="-1s"),
        "max_event_delay_duration",
    ),
    (
        "synapse-configuration",
        "error",
        _set(modules=[ENTRY, {"module": "no_such_package.Module"}]),
        "No module named 'no_such_package'",
    ),
    ("own-sticky-events", "note", _features(msc4354_enabled=True), "takes the place"),
    ("default-switch", "note", _ours({"enabled_by_default": "none"}), "is none"),
    ("calls-delayed-events", "warning", _set(max_event_delay_duration=None), "is not set"),
    ("calls-delayed-events", "warning", _set(max_event_delay_duration="59m"), "3540000 ms only"),
    ("calls-transports", "warning", _features(msc4143_enabled=False), "msc4143_enabled"),
    ("calls-transports", "warning", _set(matrix_rtc={}), "transports` is empty"),
    ("calls-message-rate", "warning", _set(rc_message={}), "0.2 per second, with a burst of 10"),
    (
        "calls-delayed-event-rate",
        "warning",
        _set(rc_delayed_event_mgmt={"per_second": 2}),
        "2 per second, with a burst of 5",
    ),
]


@sqlite_only
@pytest.mark.parametrize(
    ("check", "level", "make", "text"), FAULTS, ids=[f"{f[0]}-{n}" for n, f in enumerate(FAULTS)]
)
def test_faults_of_the_configuration(
    installation: Installation,
    check: str,
    level: str,
    make: Callable[[Installation], None],
    text: str,
) -> None:
    """Each is found by its check, with words and something to do; the exit code says how bad."""
    make(installation)
    answer = installation.doctor()
    finding = answer.finding(check, level)
    assert text in finding["what"]
    assert finding["why"]
    assert finding["do"]
    assert SECRET not in answer.output
    assert answer.code >= {"note": 0, "warning": 1, "error": 2}[level]


@sqlite_only
@pytest.mark.skipif(
    "msc4370" not in str(ExperimentalConfig.read_config.__code__.co_consts),
    reason="Synapse has the endpoint from 1.150",
)
def test_synapses_own_extremities(installation: Installation) -> None:
    _features(msc4370_enabled=True)(installation)
    assert "endpoint" in installation.doctor().finding("own-extremities", "note")["what"]


@pytest.mark.skipif(
    synapse_version() < Version("1.157"), reason="Synapse has the option from 1.157"
)
@sqlite_only
def test_no_delayed_events_at_all(installation: Installation) -> None:
    """They can be switched off by another option too."""
    _features(msc4140_max_delayed_events_per_user=0)(installation)
    finding = installation.doctor().finding("calls-delayed-events", "warning")
    assert "msc4140_max_delayed_events_per_user` is 0" in finding["what"]


@pytest.mark.any_synapse
@sqlite_only
def test_secrets_are_not_shown(installation: Installation) -> None:
    """Not even where Synapse itself would show the value."""
    installation.options.update(
        database={
            "name": "psycopg2",
            "args": {"user": "x", "password": SECRET, "options": f"-c {SECRET}", "host": SECRET},
        }
    )
    answer = installation.doctor()
    assert "cannot be read" in answer.finding("database", "error")["what"]
    assert SECRET not in answer.output + answer.errors
    assert "[hidden]" in answer.output


# Files


@pytest.mark.any_synapse
@sqlite_only
def test_files_that_the_service_user_cannot_read(installation: Installation) -> None:
    """They are named; a user that does not exist is told too."""
    key = Path(installation.options["signing_key_path"])
    others = "nobody" if os.geteuid() == 0 else ME
    mode = key.stat().st_mode
    key.chmod(0o600 if os.geteuid() == 0 else 0)
    try:
        finding = installation.doctor("--service-user", others).finding("service-user", "error")
    finally:
        key.chmod(mode)
    assert f"{others} cannot read " in finding["what"]
    answer = installation.doctor("--service-user", "no-such-user")
    assert "no user 'no-such-user'" in answer.finding("service-user", "error")["what"]


# Workers


@pytest.mark.any_synapse
def test_workers(installation: Installation) -> None:
    """Those that lack the module are named, those whose files are missing too."""
    worker = {"worker_app": "synapse.app.generic_worker", "worker_name": "reader", "modules": []}
    installation.options["instance_map"] = {"main": {}, "persister": {}}
    installation.options["federation_sender_instances"] = ["sender"]
    installation.options["stream_writers"] = {"typing": "typist", "events": ["persister"]}
    installation.workers = {"reader.yaml": dict(worker), "other.yaml": {"presence": {}}}
    answer = installation.doctor()
    finding = answer.finding("worker-modules", "error")
    assert finding["what"].startswith("reader does not load the module: `modules` in")
    assert "persister, sender, typist." in answer.finding("worker-files", "note")["what"]
    assert "other.yaml has no `worker_app`" in answer.finding("worker-files", "warning")["what"]
    installation.options["run_background_tasks_on"] = "reader"
    finding = installation.doctor().finding("worker-modules", "error")
    assert "so no sticky event is noticed" in finding["what"]
    del worker["modules"]
    installation.workers = {"reader.yaml": worker}
    assert installation.doctor().levels("worker-modules") == ["ok"]
    installation.options["modules"] = []
    finding = installation.doctor().finding("worker-modules", "error")
    assert "not in the shared list either" in finding["what"]


# The database


def copy_of(installation: Installation, homeserver: Homeserver) -> Path:
    """Give an installation a database of its own, closed in an orderly way."""
    path = installation.directory / "copy.db"
    source = sqlite3.connect(homeserver.directory / "homeserver.db")
    target = sqlite3.connect(path)
    source.backup(target)
    source.close()
    target.close()
    installation.options["database"] = {"name": "sqlite3", "args": {"database": str(path)}}
    return path


NEWEST = "UPDATE synapse_sticky_schema SET version = 99, compatible_version = 99"
DROP_ALL = "; ".join(
    f"DROP TABLE synapse_sticky_{name}"
    for name in (
        *("events", "held", "joins", "obstacles", "overrides", "progress", "schema"),
        "watermarks",
    )
)


@pytest.mark.any_synapse
@sqlite_only
@pytest.mark.parametrize(
    ("script", "check", "level", "text"),
    [
        ("", "tables", "ok", "have version"),
        (DROP_ALL, "tables", "note", "no tables yet"),
        ("DROP TABLE synapse_sticky_held", "tables", "error", "lack synapse_sticky_held."),
        (
            "ALTER TABLE synapse_sticky_events RENAME COLUMN owed TO due",
            "tables",
            "error",
            "lack synapse_sticky_events.owed.",
        ),
        ("DROP TABLE synapse_sticky_schema", "tables", "error", "schema is missing or empty"),
        ("UPDATE synapse_sticky_schema SET version = 4", "tables", "note", "have version 4;"),
        (NEWEST, "tables", "error", "knows version 99 or later"),
        ("DROP TABLE ex_outlier_stream", "synapse-tables", "error", "table ex_outlier_stream"),
    ],
)
def test_tables(
    installation: Installation,
    homeserver: Homeserver,
    script: str,
    check: str,
    level: str,
    text: str,
) -> None:
    """Their faults are found, and nothing is changed, not even beside the database."""
    path = copy_of(installation, homeserver)
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    before = hashlib.sha256(path.read_bytes()).digest()
    answer = installation.doctor()
    assert text in answer.finding(check, level)["what"]
    assert answer.levels("database") == ["ok"]
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert [p.name for p in path.parent.glob("copy.db*")] == ["copy.db"]


@pytest.mark.any_synapse
@sqlite_only
def test_databases_that_cannot_be_opened(
    installation: Installation, homeserver: Homeserver
) -> None:
    """One that is not there, one that a crash has left, and one that is none."""
    path = copy_of(installation, homeserver)
    Path(f"{path}-wal").write_bytes(b"x")
    finding = installation.doctor().finding("database", "note")
    assert "was not closed in an orderly way" in finding["what"]
    Path(f"{path}-wal").unlink()
    path.write_bytes(b"no database at all" * 1000)
    finding = installation.doctor().finding("database", "error")
    assert "file is not a database" in finding["what"]
    path.unlink()
    path.touch()
    assert "none yet" in installation.doctor().finding("synapse-tables", "note")["what"]
    path.unlink()
    finding = installation.doctor().finding("database", "note")
    assert f"There is no file {path}." in finding["what"]
    assert not path.exists()


def test_database_is_only_read(installation: Installation, homeserver: Homeserver) -> None:
    """The database itself refuses everything else."""
    path = installation.directory / "homeserver.yaml"
    path.write_text(yaml.safe_dump(installation.options))
    config = configured.load([str(path)])
    with configured.reading(config) as (txn, is_postgres):
        assert is_postgres == (installation.options["database"]["name"] == "psycopg2")
        with pytest.raises(Exception, match=r"(?i)read.?only"):
            txn.execute("DELETE FROM synapse_sticky_held")


# Synapse's code


@sqlite_only
def test_seams_that_do_not_fit(
    installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Synapse whose insides have changed is found before it is started for real."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'synapse.app.homeserver' in sys.orig_argv:\n"
        "    from synapse.handlers.sync import SyncHandler\n"
        "    del SyncHandler._generate_sync_entry_for_rooms\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    finding = installation.doctor(trial=True).finding("seams", "error")
    assert "SyncHandler._generate_sync_entry_for_rooms is not there" in finding["what"]
    assert "Do not restart the server before" in finding["do"]


@pytest.mark.any_synapse
@sqlite_only
@pytest.mark.parametrize(
    ("version", "level", "text"),
    [("1.147.1", "error", "needs 1.148.0 or later"), ("1.199.0", "warning", "is tested with")],
)
def test_versions(
    installation: Installation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    level: str,
    text: str,
) -> None:
    """One that is too old is told before anything of it is used; one that is too new as well."""
    metadata = tmp_path / f"matrix_synapse-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Name: matrix-synapse\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    answer = installation.doctor()
    assert text in answer.finding("synapse-version", level)["what"]
    if level == "error":
        assert len(answer.document["findings"]) == 1


def altered(alteration: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in a Python in which something was altered before."""
    script = f"import sys\n{alteration}\nfrom synapse_sticky.command.main import main\n"
    return subprocess.run(
        [sys.executable, "-c", f"{script}sys.exit(main(sys.argv[1:]))", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.any_synapse
@sqlite_only
def test_python_without_synapse(homeserver: Homeserver, admin: Client, tmp_path: Path) -> None:
    """It is told; a running server can be checked, and watched, from anywhere."""
    nothing = "sys.modules['synapse'] = None"
    (tmp_path / "x.yaml").touch()
    answer = altered(nothing, "doctor", "-c", str(tmp_path / "x.yaml"))
    assert answer.returncode == 2
    assert "There is no Synapse in this Python environment" in answer.stdout
    answer = altered(nothing, "check-release", "1.164.0")
    assert answer.returncode == 3
    assert "there is no Synapse in this Python environment" in answer.stderr
    server = ["--url", homeserver.main_url, "--token", admin.access_token]
    answer = altered(nothing, "doctor", *server, "--skip", "live-transports")
    assert (answer.returncode, "sync: It came" in answer.stdout) == (0, True)
    assert altered(nothing, "watch", "--once", *server).returncode == 0


@sqlite_only
@pytest.mark.any_synapse
@pytest.mark.parametrize(
    ("alteration", "text"),
    [
        (
            "import synapse.storage.database as d; del d.LoggingDatabaseConnection",
            "cannot import name 'LoggingDatabaseConnection'",
        ),
        (
            (
                "from synapse.config.ratelimiting import RatelimitConfig as r\n"
                "before = r.read_config\n"
                "def after(self, *a, **k): before(self, *a, **k); del self.rc_delayed_event_mgmt\n"
                "r.read_config = after"
            ),
            "no attribute 'rc_delayed_event_mgmt'",
        ),
    ],
)
def test_synapse_that_the_command_does_not_know(
    installation: Installation, alteration: str, text: str
) -> None:
    """It is a finding, and no crash of the command."""
    installation.doctor()
    path = str(installation.directory / "homeserver.yaml")
    answer = altered(alteration, "doctor", "-c", path, "--skip", "seams", "--service-user", ME)
    assert answer.returncode == 2
    assert text in " ".join(answer.stdout.split())
    assert "Traceback" not in answer.stderr


# Faults of a running server


@pytest.mark.any_synapse
@sqlite_only
def test_server_that_was_not_restarted(
    homeserver: Homeserver, admin: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an upgrade of the module the old one answers until then."""
    monkeypatch.setattr(live, "__version__", "99.0")
    answer = run(
        *("doctor", "--json", "-q", "--url", homeserver.main_url),
        *("--token", admin.access_token, "--skip", "send"),
    )
    finding = answer.finding("admin-api", "warning")
    assert "and 99.0 is installed here" in finding["what"]
    assert "Restart all" in finding["do"]


def examine(url: str, client: Client, *arguments: str) -> Any:
    """Run the checks of a running server, without much patience."""
    options = ["--url", url, "--token", client.access_token, "--timeout", "2", *arguments]
    return run("doctor", "--json", "--quiet", *options)


@pytest.mark.any_synapse
@sqlite_only
@pytest.mark.parametrize(
    ("part", "status", "check", "level", "text"),
    [
        ("/versions", 404, "url", "error", "404"),
        ("/versions", 302, "url", "error", "302"),
        ("/status", 502, "admin-api", "warning", "502"),
        ("/createRoom", 403, "send", "error", "403"),
        ("/v3/sync", 502, "sync", "error", "within 2 s: 502"),
        ("simplified_msc3575", 502, "sliding-sync", "error", "within 2 s: 502"),
        ("simplified_msc3575", 404, "sliding-sync", "note", "does not answer Sliding Sync"),
        ("/leave", 502, "clean-up", "warning", "is left over: leave at"),
    ],
)
def test_faults_on_the_way(
    homeserver: Homeserver,
    admin: Client,
    part: str,
    status: int,
    check: str,
    level: str,
    text: str,
) -> None:
    """A reverse proxy that does not pass some requests on is noticed by the check of each."""
    with Gateway(homeserver.main_url, failing(part, status)) as gateway:
        answer = examine(gateway.url, admin)
    assert text in answer.finding(check, level)["what"]


@pytest.mark.any_synapse
@sqlite_only
def test_processes_without_the_module(
    homeserver: Homeserver, admin: Client, stock_peer: Homeserver
) -> None:
    """One of two that answer in turns lacks the module."""
    with Gateway(homeserver.main_url, alternating(stock_peer.main_url)) as gateway:
        answer = run("doctor", "--json", "--quiet", "--url", gateway.url)
    assert "6 of 12 times a process without" in answer.finding("processes", "error")["what"]
    with Gateway(homeserver.main_url, failing("/versions", "hang")) as gateway:
        began = time.monotonic()
        answer = examine(gateway.url, admin)
        assert time.monotonic() - began < 10
    assert "has not answered for 2 s" in answer.finding("url", "error")["what"]
    answer = examine(stock_peer.main_url, stock_peer.register())
    assert "does not have sticky events" in answer.finding("url", "error")["what"]
    assert answer.code == 2


@pytest.mark.any_synapse
@sqlite_only
def test_tokens_and_urls(homeserver: Homeserver, admin: Client) -> None:
    """Wrong ones are told, of both servers; whoever may not send is told too."""
    answer = run(
        "doctor", "--json", "-q", "--url", homeserver.main_url, "--token", "syt_no_such_token"
    )
    assert "401" in answer.finding("token", "error")["what"]
    answer = run("doctor", "--json", "-q", "--url", "http://127.0.0.1:9", "--timeout", "2")
    assert "cannot be reached" in answer.finding("url", "error")["what"]
    answer = examine(
        homeserver.main_url, admin, "--peer", homeserver.main_url, "--peer-token", "syt_x"
    )
    assert "401" in answer.finding("peer", "error")["what"]
    user = homeserver.register()
    path = f"/_synapse/client/synapse_sticky/admin/v1/users/{user.user_id}/settings"
    admin.request("PUT", path, json={"enabled": False})
    finding = examine(homeserver.main_url, user).finding("send", "error")
    assert "403" in finding["what"]
    assert "blocked" in finding["do"]
    assert joined_rooms(user) == []


@pytest.mark.slow
@pytest.mark.any_synapse
@sqlite_only
def test_federation_that_does_not_work(
    homeserver: Homeserver, admin: Client, stock_peer: Homeserver, mixed_peer: Homeserver
) -> None:
    """A user who cannot join, and events that do not arrive, here or there, are reported."""
    other, user = stock_peer.register(), mixed_peer.register()
    homeserver.proxy.set_fault(Fault.CLOSE)
    answer = examine(
        homeserver.main_url,
        admin,
        *("--peer", stock_peer.main_url, "--peer-token", other.access_token),
    )
    homeserver.proxy.set_fault(Fault.NONE)
    assert answer.levels("federation-join") == ["error"]
    assert answer.levels("clean-up") == ["ok"]
    with (
        Gateway(homeserver.main_url, failing("/v3/sync")) as here,
        Gateway(mixed_peer.main_url, failing("/v3/sync")) as there,
    ):
        answer = examine(here.url, admin, "--peer", there.url, "--peer-token", user.access_token)
    for check in ("sync", "federation-late", "federation-out", "federation-in"):
        assert answer.levels(check) == ["error"], check
    assert joined_rooms(user) == joined_rooms(admin) == []


@pytest.mark.deployments("workers")
def test_process_that_does_not_notice(homeserver: Homeserver, admin: Client) -> None:
    """Events are sent and do not come while the process that notices them is down."""
    room = admin.create_room()
    homeserver.kill(BACKGROUND_WORKER)
    try:
        admin.send(room, sticky_ms=60_000)
        options = ["--token", admin.access_token, "--timeout", "3"]
        with Gateway(
            homeserver.main_url,
            lambda method, path: homeserver.client_urls[0] if "/sync" in path else None,
        ) as gateway:
            answer = run("doctor", "--json", "-q", "--url", gateway.url, *options)
    finally:
        homeserver.start_process(BACKGROUND_WORKER)
    assert BACKGROUND_WORKER in answer.finding("indexer", "warning")["what"]
    assert answer.levels("sync") == ["error"]


@sqlite_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c(homeserver: Homeserver, admin: Client, number: int) -> None:
    """The room is left and forgotten, the findings are shown, and the exit code is 3."""
    with Gateway(homeserver.main_url, failing("/v3/sync", "hang")) as gateway:
        command = started(
            *("doctor", "--url", gateway.url), SYNAPSE_STICKY_TOKEN=admin.access_token
        )
        eventually(lambda: any("/v3/sync" in path for path in gateway.paths), what="the wait")
        assert joined_rooms(admin) != []
        command.send_signal(number)
        output, errors = command.communicate(timeout=30)
    assert command.returncode == 3
    assert "clean-up: The room was left and forgotten." in output
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert joined_rooms(admin) == []


# The command line


@pytest.mark.any_synapse
@sqlite_only
def test_words(installation: Installation, tmp_path: Path) -> None:
    """Without --json people read it: the worst at the end, no line too long, all of it told."""
    installation.options["modules"] = []
    installation.doctor()
    answer = subprocess.run(
        [
            *(sys.executable, "-m", "synapse_sticky.command", "doctor", "--skip", "seams"),
            *("-c", str(tmp_path / "homeserver.yaml"), "--service-user", ME),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = answer.stdout.splitlines()
    assert answer.returncode == 2
    assert lines[-1].startswith("1 error, 0 warnings, ")
    assert max(map(len, lines)) <= 80 or str(tmp_path) in answer.stdout
    assert "error    modules" in lines
    assert "why: Synapse loads the module only if" in answer.stdout
    assert "- module: synapse_sticky.StickyEventsModule" in answer.stdout
    assert "Looking into the database ... " in answer.stderr


@pytest.mark.any_synapse
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "required: COMMAND"),
        (["doctor"], "give a configuration file with -c"),
        (["doctor", "--url", "matrix.example.com"], "is no base URL"),
        (["doctor", "--url", "https://x", "--token-file", "/absent"], "cannot be read"),
        (["doctor", "--url", "https://x", "--token", "two words"], "ASCII"),
        (["doctor", "--url", "https://x", "--peer", "https://y"], "--peer goes with"),
        (["doctor", "--url", "https://x", "--timeout", "0"], "must be from 1 to 3600"),
        (["doctor", "-c", "x", "--skip", "nothing"], "invalid choice"),
        (["doctor", "-c", "x", "--directory", "/absent"], "cannot be entered"),
        (["watch", "--url", "https://x"], "give the token"),
        (["watch", "--url", "https://x", "--token", "x", "#room:y"], "is no ID of a room"),
        (["check-release", "newest"], "is no version of Synapse"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], text: str) -> None:
    """They are told in a sentence, and the exit code is neither a warning's nor an error's."""
    answer = run(*arguments)
    assert answer.code == 3
    assert text in answer.errors
    assert "Traceback" not in answer.errors
