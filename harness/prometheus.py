"""A temporary Prometheus that scrapes a deployment."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml

from harness.homeserver import Homeserver
from harness.processes import ManagedProcess, free_port, temporary_directory
from harness.wait import eventually

SCRAPE_INTERVAL_S = 2


class Prometheus:
    """One Prometheus, with the labels that Synapse's documentation gives to processes.

    Args:
        rules: a file of rules for it to evaluate.
    """

    def __init__(self, homeserver: Homeserver, rules: Path) -> None:
        self._port = free_port()
        self._process: ManagedProcess | None = None
        self._directory = temporary_directory("prometheus-")
        self._http = httpx.Client(trust_env=False, timeout=60)
        (self._directory / "prometheus.yml").write_text(
            yaml.safe_dump(_configuration(homeserver, rules))
        )
        self.start()

    def __enter__(self) -> "Prometheus":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        binary = shutil.which("prometheus")
        assert binary is not None, "Prometheus is missing (Debian: prometheus)"
        process = self._process = ManagedProcess(
            [
                binary,
                f"--config.file={self._directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={self._directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
            ],
            self._directory / "output",
            directory=self._directory,
        )

        def started() -> bool:
            if process.exit_code is not None:
                raise RuntimeError(f"Prometheus did not start: {process.read_output()}")
            try:
                return self._http.get(self._url("/-/ready")).status_code == 200
            except httpx.TransportError:
                return False

        eventually(started, timeout_s=60, what="Prometheus answering")

    def stop(self) -> None:
        """End it, and remove everything that it kept."""
        if self._process is not None:
            self._process.stop()
            self._process = None
        self._http.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def get(self, path: str, **parameters: Any) -> Any:
        """Ask its API, below `/api/v1/`, and return the data of the answer."""
        response = self._http.get(self._url(f"/api/v1/{path}"), params=parameters)
        answer = json.loads(response.text)
        assert answer["status"] == "success", answer
        return answer["data"]

    def now(self, expression: str) -> list[Mapping[str, Any]]:
        """Return what an expression says now: each with its `metric` and `value`."""
        return list(self.get("query", query=expression)["result"])

    def since(self, began_ts: float, now_ts: float, expression: str) -> list[Mapping[str, Any]]:
        """Return what an expression said between these times, in seconds."""
        data = self.get(
            "query_range", query=expression, start=began_ts, end=now_ts, step=SCRAPE_INTERVAL_S
        )
        return list(data["result"])

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._port}{path}"


def _configuration(homeserver: Homeserver, rules: Path) -> dict[str, Any]:
    # A job for each kind of process, and an index where there are several.
    processes = [
        {
            "targets": [homeserver.metrics_address(process)],
            "labels": {
                "instance": "matrix.example.com",
                "job": process.rstrip("0123456789"),
                "index": process[len(process.rstrip("0123456789")) :] or "1",
            },
        }
        for process in homeserver.processes
    ]
    return {
        "global": {
            "scrape_interval": f"{SCRAPE_INTERVAL_S}s",
            "evaluation_interval": f"{SCRAPE_INTERVAL_S}s",
        },
        "rule_files": [str(rules)],
        "scrape_configs": [
            {
                "job_name": "synapse",
                "metrics_path": "/_synapse/metrics",
                "static_configs": processes,
            }
        ],
    }
