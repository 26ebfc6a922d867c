"""A temporary PostgreSQL server."""

import contextlib
import glob
import os
import pwd
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.processes import (
    ManagedProcess,
    accepts_connections,
    free_port,
    temporary_directory,
)
from harness.wait import eventually


def find_binaries() -> Path:
    """The directory with `initdb` and `postgres`, of the newest version found."""
    candidates = []
    on_path = shutil.which("initdb")
    if on_path is not None:
        candidates.append(Path(on_path).resolve().parent)
    packaged = [Path(path) for path in glob.glob("/usr/lib/postgresql/*/bin")]
    candidates += sorted(packaged, key=lambda path: _version(path.parent.name), reverse=True)
    configuration = shutil.which("pg_config")
    if configuration is not None:
        answer = subprocess.run(
            [configuration, "--bindir"], capture_output=True, text=True, check=False
        )
        candidates.append(Path(answer.stdout.strip()))
    for candidate in candidates:
        if all((candidate / name).exists() for name in ("initdb", "postgres")):
            return candidate
    raise FileNotFoundError(
        "No PostgreSQL server found (initdb, postgres). Install it, for example with"
        " `apt-get install postgresql`, or run the tests with `--deployments sqlite`."
    )


def _version(name: str) -> float:
    try:
        return float(name)
    except ValueError:
        return 0


class PostgresServer:
    """One temporary PostgreSQL cluster. Starts when it is made, or entered with `with`."""

    def __init__(self) -> None:
        self.port = free_port()
        self._lock = threading.Lock()
        self._databases = 0
        self._process: ManagedProcess | None = None
        self._directory = temporary_directory("postgres-")
        try:
            self._binaries = find_binaries()
            self._user = self._unprivileged_user()
            self._make_cluster()
            self.come_back()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> "PostgresServer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _make_cluster(self) -> None:
        initialised = subprocess.run(
            [
                str(self._binaries / "initdb"),
                f"--pgdata={self._directory / 'data'}",
                "--username=synapse",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
            ],
            user=self._user,
            extra_groups=[] if self._user is not None else None,
            cwd=self._directory,
            capture_output=True,
            text=True,
            check=False,
        )
        if initialised.returncode != 0:
            raise RuntimeError(f"initdb failed: {initialised.stdout}{initialised.stderr}")

    def go_away(self) -> None:
        """End the server as a restart does, in the middle of whatever its clients do."""
        if self._process is not None:
            # SIGINT: disconnect the clients, do not wait for them.
            self._process.stop(signal.SIGINT)
            self._process = None

    def come_back(self) -> None:
        """Start the server on its port, with what it has stored."""
        process = self._process = ManagedProcess(
            [
                self._binaries / "postgres",
                "-D",
                self._directory / "data",
                *("-c", "listen_addresses=127.0.0.1"),
                *("-c", f"port={self.port}"),
                *("-c", "unix_socket_directories="),
                *("-c", "fsync=off"),
                *("-c", "synchronous_commit=off"),
                *("-c", "full_page_writes=off"),
                *("-c", "max_connections=300"),
            ],
            self._directory / "output",
            user=self._user,
            directory=self._directory,
        )

        def started() -> bool:
            if process.exit_code is not None:
                raise RuntimeError(f"PostgreSQL did not start: {process.read_output()}")
            return (
                accepts_connections(self.port)
                and "ready to accept connections" in process.read_output()
            )

        eventually(started, timeout_s=60, what="PostgreSQL accepting connections")

    def _unprivileged_user(self) -> str | None:
        """The user to run PostgreSQL as: it refuses to run as root."""
        if os.geteuid() != 0:
            return None
        for name in ("postgres", "nobody"):
            with contextlib.suppress(KeyError):
                user = pwd.getpwnam(name)
                os.chown(self._directory, user.pw_uid, user.pw_gid)
                return name
        raise RuntimeError("PostgreSQL refuses to run as root, and there is no other user")

    def create_database(self) -> dict[str, Any]:
        """Make an empty database, and return the arguments to connect to it with."""
        import psycopg2

        with self._lock:
            self._databases += 1
            name = f"deployment{self._databases}"
        arguments: dict[str, Any] = {"user": "synapse", "host": "127.0.0.1", "port": self.port}
        with contextlib.closing(psycopg2.connect(dbname="postgres", **arguments)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(
                    f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'"
                    " LC_COLLATE 'C' LC_CTYPE 'C'"
                )
        return {"dbname": name, **arguments}

    def dump(self, database: Mapping[str, Any], dump: Path, *options: str) -> None:
        """Back a database up with `pg_dump`. `options` may leave tables out."""
        self._run("pg_dump", database, "--format=custom", f"--file={dump}", *options)

    def restore(self, database: Mapping[str, Any], dump: Path) -> None:
        """Replace all tables that a dump has with `pg_restore`, and leave others alone."""
        options = ("--clean", "--if-exists", "--single-transaction", "--exit-on-error")
        self._run("pg_restore", database, *options, str(dump))

    def _run(self, program: str, database: Mapping[str, Any], *arguments: str) -> None:
        command = [str(self._binaries / program), "--host", database["host"]]
        command += ["--port", str(database["port"]), "--username", database["user"]]
        command += ["--dbname", database["dbname"], *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{done.stderr[-8000:]}")

    @contextlib.contextmanager
    def failing_over(self) -> Iterator[None]:
        """Lose what is stored within this context: afterwards an older copy takes over."""
        data, copy = self._directory / "data", self._directory / "copy"
        self.go_away()
        # PostgreSQL starts on its own user's files only.
        subprocess.run(["cp", "--archive", data, copy], check=True)
        self.come_back()
        yield
        self.go_away()
        shutil.rmtree(data)
        copy.rename(data)
        self.come_back()

    def stop(self) -> None:
        """End the server, and remove everything it kept."""
        self.go_away()
        shutil.rmtree(self._directory, ignore_errors=True)
