"""A deployment of real Synapse processes."""

import contextlib
import copy
import hashlib
import hmac
import itertools
import re
import secrets
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from harness.certificate import write_certificate
from harness.client import Client, JsonDict, MatrixError
from harness.forking import CAN_FORK
from harness.processes import ManagedProcess, free_port
from harness.proxy import FaultyProxy
from harness.wait import eventually

MODULE = "synapse_sticky.StickyEventsModule"
STARTUP_TIMEOUT_S = 180
READERS = ("client_reader1", "client_reader2")
PERSISTERS = ("event_persister1", "event_persister2")
SENDERS = ("federation_sender1", "federation_sender2")
BACKGROUND_WORKER = "background1"

# The start of a log entry, as opposed to its further lines.
_LOG_ENTRY = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", re.MULTILINE)
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(request)s %(message)s"

# What Synapse logs as a warning whenever it starts.
_BANNER = " synapse.config.logger "

_open: "list[Homeserver]" = []

# Synapse keeps who is in a room in Redis, by numbers that two deployments may share.
_redis_databases = itertools.count()


def open_homeservers() -> "list[Homeserver]":
    """The deployments that have not been closed."""
    return list(_open)


@dataclass(frozen=True)
class _Plan:
    """How one process is started."""

    name: str
    application: str
    configuration: tuple[Path, ...]
    # Where it answers /health.
    port: int


class Homeserver:
    """One Synapse deployment: a single process, or a main process with seven workers.

    `python` is an interpreter that has another Synapse. With `proxied` other servers reach this
    one through `proxy`, which can be told to misbehave. With `own_flag` Synapse's own sticky
    events are switched on as long as the module is there, which then takes their place.
    `lacking` names workers whose own configuration leaves the module out. `environment` is what
    the processes have beside the environment of this one. With `as_shipped` the configuration
    is what Synapse generates: nothing is switched off, and nothing made generous or fast.
    """

    forks = CAN_FORK

    def __init__(
        self,
        *,
        directory: Path,
        database: str | Mapping[str, Any] = "sqlite",
        workers: bool = False,
        redis_port: int | None = None,
        module: bool = True,
        module_config: Mapping[str, Any] | None = None,
        extra_config: Mapping[str, Any] | None = None,
        own_flag: bool = False,
        lacking: Collection[str] = (),
        federation: bool = False,
        proxied: bool = False,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        as_shipped: bool = False,
    ) -> None:
        if workers and (database == "sqlite" or redis_port is None):
            raise ValueError("workers need PostgreSQL and Redis")
        self.directory = directory
        self.workers = workers
        self.federation = federation
        self._database = database
        self._redis_port = redis_port
        self._redis_database = next(_redis_databases)
        self._module = module
        self._module_config: Mapping[str, Any] = module_config or {}
        self._extra_config: Mapping[str, Any] = extra_config or {}
        self._own_flag = own_flag
        self._as_shipped = as_shipped
        self._lacking = lacking
        self._registration_secret = secrets.token_hex(16)
        self._python = python
        self._environment = environment or {}
        self._prepared = False
        self._processes: dict[str, ManagedProcess] = {}
        self._ports = {name: free_port() for name in ("main", "federation", "replication")}
        address_port = self._ports["federation"]
        self._proxy: FaultyProxy | None = None
        if proxied:
            address_port = free_port()
            self._proxy = FaultyProxy(address_port, self._ports["federation"])
        self.server_name = f"127.0.0.1:{address_port}" if federation else "homeserver.test"
        self.main_url = f"http://127.0.0.1:{self._ports['main']}"
        names = (*PERSISTERS, *READERS, *SENDERS, BACKGROUND_WORKER) if workers else ()
        self._ports.update((name, free_port()) for name in names)
        self._plans = {
            "main": _Plan(
                "main",
                "synapse.app.homeserver",
                (directory / "homeserver.yaml",),
                self._ports["main"],
            )
        }
        for name in names:
            self._plans[name] = _Plan(
                name,
                "synapse.app.generic_worker",
                (directory / "homeserver.yaml", directory / f"{name}.yaml"),
                self._ports[name],
            )
        self.client_urls = (
            [f"http://127.0.0.1:{self._ports[name]}" for name in READERS]
            if workers
            else [self.main_url]
        )
        # For all requests of the tests. Certificates are our own and prove nothing.
        self.http = httpx.Client(
            verify=False,
            trust_env=False,
            timeout=60,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        _open.append(self)

    @property
    def proxy(self) -> FaultyProxy:
        """What other servers' connections go through."""
        assert self._proxy is not None, "not proxied"
        return self._proxy

    @property
    def has_module(self) -> bool:
        """Whether it is configured to load the module."""
        return self._module

    # Processes

    @property
    def processes(self) -> list[str]:
        """The names of all processes, running or not."""
        return list(self._plans)

    def start(self) -> None:
        """Start all processes, and wait until they serve requests."""
        self._write_configuration()
        names = [name for name in self._plans if not self._is_running(name)]
        try:
            if not self._prepared:
                # Only the main process makes the tables.
                names.remove("main")
                self.start_process("main")
            for name in names:
                self._launch(name)
            for name in names:
                self._wait_until_ready(name)
            if not self._prepared:
                self._wait_for_background_updates()
                self._prepared = True
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all processes in an orderly way."""
        processes = list(self._processes.values())
        self._processes.clear()
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait_or_kill()

    def ensure_running(self) -> None:
        """Start again what a test has left ended."""
        if not all(self._is_running(name) for name in self._plans):
            self.start()

    def restart(self) -> None:
        """Stop and start all processes."""
        self.stop()
        self.start()

    def kill(self, name: str) -> None:
        """End one process with SIGKILL, and wait until it is gone."""
        self._processes.pop(name).kill()

    def stop_process(self, name: str) -> None:
        """End one process in an orderly way."""
        self._processes.pop(name).stop()

    def start_process(self, name: str) -> None:
        """Start one process that does not run, and wait until it serves requests."""
        if self._is_running(name):
            raise RuntimeError(f"{name} is running already")
        self._launch(name)
        self._wait_until_ready(name)

    def start_expecting_failure(self) -> str:
        """Start the main process, which is to refuse to, and return what it printed."""
        self._write_configuration()
        # Whatever it says must not depend on what is imported before.
        self._launch("main", forked=False)
        process = self._processes["main"]

        def gave_up() -> bool:
            if self._is_healthy("main"):
                raise RuntimeError("Synapse started, where it was expected to refuse to")
            return process.exit_code is not None

        try:
            eventually(gave_up, STARTUP_TIMEOUT_S, "Synapse refusing to start")
        finally:
            self.stop()
        output = process.read_output()
        if process.exit_code == 0:
            raise RuntimeError(f"Synapse ended without an error:\n{output}")
        return output

    def reconfigure(
        self,
        *,
        module: bool | None = None,
        module_config: Mapping[str, Any] | None = None,
        extra_config: Mapping[str, Any] | None = None,
        own_flag: bool | None = None,
        database: Mapping[str, Any] | None = None,
    ) -> None:
        """Change the configuration while stopped. What is not given stays as it is."""
        if self._processes:
            raise RuntimeError("stop the homeserver before changing its configuration")
        if module is not None:
            self._module = module
        if module_config is not None:
            self._module_config = module_config
        if extra_config is not None:
            self._extra_config = extra_config
        if own_flag is not None:
            self._own_flag = own_flag
        if database is not None:
            self._database, self._prepared = database, False

    def close(self) -> None:
        """Stop, and let go of all connections."""
        self.stop()
        if self._proxy is not None:
            self._proxy.close()
        self.http.close()
        if self in _open:
            _open.remove(self)

    @property
    def pid(self) -> int:
        """The ID of the main process, while it runs."""
        return self._processes["main"].pid

    def _is_running(self, name: str) -> bool:
        process = self._processes.get(name)
        return process is not None and process.exit_code is None

    def _launch(self, name: str, *, forked: bool = True) -> None:
        plan = self._plans[name]
        command: list[str | Path] = [self._python, "-m", plan.application]
        for path in plan.configuration:
            command += ["-c", path]
        self._processes[name] = ManagedProcess(
            command,
            self._log_path(name),
            environment={"PYTHONUNBUFFERED": "1", **self._environment},
            directory=self.directory,
            forked=forked and self.forks,
        )

    def _is_healthy(self, name: str) -> bool:
        try:
            url = f"http://127.0.0.1:{self._plans[name].port}/health"
            return self.http.get(url, timeout=5).is_success
        except httpx.TransportError:
            return False

    def _wait_until_ready(self, name: str) -> None:
        process = self._processes[name]

        def ready() -> bool:
            if process.exit_code is not None:
                raise RuntimeError(
                    f"{name} ended with exit code {process.exit_code}:\n"
                    + process.read_output()[-8000:]
                )
            # A worker that is not connected yet would miss what happens from now on.
            return self._is_healthy(name) and (
                not self.workers or "REPLICATE successfully sent" in process.read_output()
            )

        try:
            eventually(ready, STARTUP_TIMEOUT_S, f"{name} serving requests")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{process.read_output()[-8000:]}") from None

    def _wait_for_background_updates(self) -> None:
        """Until they are done some reads take paths meant for old databases only."""
        eventually(
            lambda: self.query("SELECT count(*) FROM background_updates") == [(0,)],
            STARTUP_TIMEOUT_S,
            "the end of the background updates",
        )

    # Configuration

    def _write_configuration(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        signing_key = self.directory / "signing.key"
        if not signing_key.exists():
            from signedjson.key import generate_signing_key, write_signing_keys

            with signing_key.open("w") as stream:
                write_signing_keys(stream, [generate_signing_key("test")])
        if self.federation and not (self.directory / "tls.crt").exists():
            write_certificate(self.directory / "tls.crt", self.directory / "tls.key")
        shared = _merged(self._configuration(), self._extra_config)
        self._write_yaml("homeserver.yaml", shared)
        self._write_yaml(
            "log.yaml",
            {
                "version": 1,
                "formatters": {"plain": {"format": _LOG_FORMAT}},
                "handlers": {
                    "console": {
                        "class": "logging.StreamHandler",
                        "stream": "ext://sys.stdout",
                        "formatter": "plain",
                    }
                },
                "root": {"level": "INFO", "handlers": ["console"]},
                "disable_existing_loggers": False,
            },
        )
        for name in self._plans:
            if name != "main":
                self._write_yaml(f"{name}.yaml", self._worker_configuration(name))

    def _write_yaml(self, name: str, content: Any) -> None:
        (self.directory / name).write_text(yaml.safe_dump(content))

    def _configuration(self) -> JsonDict:
        config: JsonDict = {
            "server_name": self.server_name,
            "report_stats": False,
            "pid_file": str(self.directory / "main.pid"),
            "log_config": str(self.directory / "log.yaml"),
            "media_store_path": str(self.directory / "media"),
            "signing_key_path": str(self.directory / "signing.key"),
            "macaroon_secret_key": "macaroon",
            "form_secret": "form",
            "registration_shared_secret": self._registration_secret,
            "listeners": [_listener(self._ports["main"], "client", *self._metrics_resource)],
            **({} if self._as_shipped else _for_tests()),
        }
        if self._module:
            module_config = self._module_config
            if not self._as_shipped:
                module_config = generous(module_config)
            config["modules"] = [{"module": MODULE, "config": dict(module_config)}]
            if self._own_flag:
                config["experimental_features"] = {"msc4354_enabled": True}
        if self._database == "sqlite":
            config["database"] = {
                "name": "sqlite3",
                "args": {"database": str(self._sqlite_path)},
            }
        else:
            assert not isinstance(self._database, str)
            config["database"] = {
                "name": "psycopg2",
                "args": {**self._database, "cp_min": 2, "cp_max": 10},
            }
        if self.federation:
            config["listeners"].append(
                {**_listener(self._ports["federation"], "federation", "keys"), "tls": True}
            )
            config["tls_certificate_path"] = str(self.directory / "tls.crt")
            config["tls_private_key_path"] = str(self.directory / "tls.key")
            config["federation_verify_certificates"] = False
            config["federation_ip_range_blacklist"] = []
            # So that a remote server that a test has ended does not hold requests up.
            config["federation"] = {
                "client_timeout": "10s",
                "max_short_retries": 2,
                "max_short_retry_delay": "1s",
                "max_long_retries": 1,
                "max_long_retry_delay": "1s",
                "destination_min_retry_interval": "2s",
                "destination_max_retry_interval": "8s",
            }
        else:
            config["federation_domain_whitelist"] = []
        if self.workers:
            config["listeners"].append(_listener(self._ports["replication"], "replication"))
            config["redis"] = {
                "enabled": True,
                "host": "127.0.0.1",
                "port": self._redis_port,
                "dbid": self._redis_database,
            }
            config["worker_replication_secret"] = "replication"
            config["stream_writers"] = {"events": list(PERSISTERS)}
            config["run_background_tasks_on"] = BACKGROUND_WORKER
            config["send_federation"] = False
            config["federation_sender_instances"] = list(SENDERS)
            # Only those that need to be: no more than an administrator has to name.
            config["instance_map"] = {
                "main": {"host": "127.0.0.1", "port": self._ports["replication"]},
                **{name: {"host": "127.0.0.1", "port": self._ports[name]} for name in PERSISTERS},
            }
        return config

    @property
    def _metrics_resource(self) -> tuple[str, ...]:
        return ("metrics",) if self._extra_config.get("enable_metrics") else ()

    def _worker_configuration(self, name: str) -> JsonDict:
        resource = (
            "replication" if name in PERSISTERS else "client" if name in READERS else "health"
        )
        return {
            **({"modules": []} if name in self._lacking else {}),
            "worker_app": "synapse.app.generic_worker",
            "worker_name": name,
            "worker_log_config": str(self.directory / "log.yaml"),
            "worker_pid_file": str(self.directory / f"{name}.pid"),
            "worker_listeners": [_listener(self._ports[name], resource, *self._metrics_resource)],
        }

    # Users

    def register(self, localpart: str | None = None, admin: bool = False) -> Client:
        """Register a user with the shared secret, by default with a name never used before."""
        url = f"{self.main_url}/_synapse/admin/v1/register"
        localpart = localpart or f"user-{secrets.token_hex(5)}"
        password = secrets.token_hex(8)
        nonce = self.http.get(url).json()["nonce"]
        proof = "\0".join((nonce, localpart, password, "admin" if admin else "notadmin"))
        response = self.http.post(
            url,
            json={
                "nonce": nonce,
                "username": localpart,
                "password": password,
                "admin": admin,
                "mac": hmac.new(
                    self._registration_secret.encode(), proof.encode(), hashlib.sha1
                ).hexdigest(),
            },
            timeout=60,
        )
        if not response.is_success:
            raise MatrixError.from_response(response)
        body = response.json()
        return Client(self, body["user_id"], body["access_token"], body["device_id"], password)

    # The database

    @property
    def _sqlite_path(self) -> Path:
        return self.directory / "homeserver.db"

    def port_from_sqlite(self) -> None:
        """Copy the SQLite database that it had into PostgreSQL, with Synapse's own script."""
        self._write_configuration()
        script = [self._python, "-m", "synapse._scripts.synapse_port_db"]
        script += ["--sqlite-database", str(self._sqlite_path)]
        script += ["--postgres-config", str(self.directory / "homeserver.yaml")]
        done = subprocess.run(script, cwd=self.directory, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"synapse_port_db failed:\n{done.stderr[-8000:]}")

    def query(self, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Rows straight from the database. `?` stands for an argument."""
        with self._cursor() as cursor:
            cursor.execute(self._dialect(sql), arguments)
            return list(cursor.fetchall())

    def execute(self, sql: str, *arguments: Any) -> int:
        """Change the database directly, and return how many rows that changed."""
        with self._cursor() as cursor:
            cursor.execute(self._dialect(sql), arguments)
            count: int = cursor.rowcount
            return count

    @contextlib.contextmanager
    def _cursor(self) -> Iterator[Any]:
        connection: Any
        if self._database == "sqlite":
            connection = sqlite3.connect(self._sqlite_path, timeout=30)
        else:
            import psycopg2

            assert not isinstance(self._database, str)
            connection = psycopg2.connect(**self._database)
        with contextlib.closing(connection):
            yield connection.cursor()
            connection.commit()

    def _dialect(self, sql: str) -> str:
        if self._database == "sqlite":
            return sql
        return sql.replace("%", "%%").replace("?", "%s")

    # Metrics

    def metrics_address(self, process: str = "main") -> str:
        """Where a process shows its metrics, at `/_synapse/metrics`."""
        return f"127.0.0.1:{self._ports[process]}"

    def metrics(self, process: str = "main") -> str:
        """What a process measures, if the configuration enables metrics."""
        url = f"http://{self.metrics_address(process)}/_synapse/metrics"
        return self.http.get(url).raise_for_status().text

    # Logs

    def _log_path(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def log(self, process: str | None = None) -> str:
        """What one process, or every one, has logged and printed so far."""
        return self.log_since({}, process)

    def log_position(self) -> dict[str, int]:
        """Where the logs end now, for `log_since`."""
        return {
            name: self._log_path(name).stat().st_size if self._log_path(name).exists() else 0
            for name in self._plans
        }

    def log_since(self, position: Mapping[str, int], process: str | None = None) -> str:
        """What has been logged since that position."""
        parts = []
        for name in self._plans if process is None else [process]:
            if self._log_path(name).exists():
                with self._log_path(name).open("rb") as stream:
                    stream.seek(position.get(name, 0))
                    parts.append(stream.read().decode("utf-8", errors="replace"))
        return "".join(parts)

    def problems_since(self, position: Mapping[str, int]) -> str:
        """The warnings, errors and tracebacks logged since that position."""
        problems = []
        for name in self._plans:
            text = self.log_since(position, name)
            starts = [match.start() for match in _LOG_ENTRY.finditer(text)]
            # What precedes the first entry was printed, not logged.
            edges = [0, *starts, len(text)]
            for start, end in itertools.pairwise(edges):
                entry = text[start:end].strip()
                first_line = entry.partition("\n")[0]
                if _BANNER in first_line:
                    continue
                if re.search(r" (WARNING|ERROR|CRITICAL) ", first_line) or "Traceback" in entry:
                    problems.append(f"[{name}] {entry}")
        return "\n".join(problems)


def _listener(port: int, *resources: str) -> JsonDict:
    return {
        "type": "http",
        "bind_addresses": ["127.0.0.1"],
        "port": port,
        "resources": [{"names": list(resources)}],
    }


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> JsonDict:
    """`base` with `changes` merged into it, mapping by mapping."""
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def generous(module_config: Mapping[str, Any]) -> JsonDict:
    """The configuration of the module, without a limit on what users send unless it has one."""
    return {"local_rate_limit": None, **module_config}


def _for_tests() -> JsonDict:
    """What makes tests fast, and lets them do anything as often as they like."""
    return {
        "enable_registration": False,
        "bcrypt_rounds": 4,
        "trusted_key_servers": [],
        "suppress_key_server_warning": True,
        "url_preview_enabled": False,
        "presence": {"enabled": False},
        "max_event_delay_duration": "24h",
        "caches": {"sync_response_cache_duration": "0s"},
        "background_updates": {"sleep_enabled": False},
        "ip_range_blacklist": [],
        **generous_rate_limits(),
    }


def generous_rate_limits() -> JsonDict:
    """Limits that no test reaches, of every kind either version of Synapse knows."""
    generous = {"per_second": 100_000, "burst_count": 100_000}
    simple = (
        "rc_message",
        "rc_registration",
        "rc_registration_token_validity",
        "rc_admin_redaction",
        "rc_joins_per_room",
        "rc_key_requests",
        "rc_3pid_validation",
        "rc_third_party_invite",
        "rc_media_create",
        "rc_delayed_event_mgmt",
        "rc_room_creation",
        "rc_reports",
        "rc_user_directory",
        "rc_profile",
    )
    return {
        **{name: dict(generous) for name in simple},
        "rc_login": {name: dict(generous) for name in ("address", "account", "failed_attempts")},
        "rc_joins": {name: dict(generous) for name in ("local", "remote")},
        "rc_invites": {name: dict(generous) for name in ("per_room", "per_user", "per_issuer")},
        "rc_presence": {"per_user": dict(generous)},
        "rc_federation": {
            "window_size": 1000,
            "sleep_limit": 100_000,
            "sleep_delay": 0,
            "reject_limit": 100_000,
            "concurrent": 1000,
        },
        "federation_rr_transactions_per_room_per_second": 100_000,
    }
