"""The command `synapse-sticky`, as an admin runs it, and installations with faults."""

import contextlib
import http.client
import io
import itertools
import json
import os
import pwd
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from harness.client import JsonDict
from harness.homeserver import Homeserver
from harness.processes import free_port
from synapse_sticky.command.main import main

ME = pwd.getpwuid(os.geteuid()).pw_name

# The options that an admin sets for calls.
FOR_CALLS: JsonDict = {
    "max_event_delay_duration": "24h",
    "experimental_features": {"msc4143_enabled": True},
    "matrix_rtc": {
        "transports": [{"type": "livekit", "livekit_service_url": "https://rtc.example.com"}]
    },
    "rc_message": {"per_second": 0.5, "burst_count": 30},
    "rc_delayed_event_mgmt": {"per_second": 1, "burst_count": 20},
}


@dataclass
class Answer:
    """The output of the command, and its exit code."""

    code: int
    output: str
    errors: str

    @property
    def document(self) -> JsonDict:
        """The findings as JSON."""
        document: JsonDict = json.loads(self.output)
        return document

    def levels(self, check_id: str) -> list[str]:
        """The levels of the findings of a check, in their order."""
        return [f["level"] for f in self.document["findings"] if f["id"] == check_id]

    def finding(self, check_id: str, level: str) -> JsonDict:
        """The one finding of a check that has this level."""
        (found,) = [
            f for f in self.document["findings"] if f["id"] == check_id and f["level"] == level
        ]
        result: JsonDict = found
        return result


def run(*arguments: str) -> Answer:
    """Run the command within this process."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = main(arguments)
        except SystemExit as error:
            code = int(error.code or 0)
    return Answer(code, output.getvalue(), errors.getvalue())


def started(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """Start the command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "synapse_sticky.command", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@dataclass
class Installation:
    """Configuration files that an admin has written, of a homeserver or none that ever ran.

    Attributes:
        directory: of the files.
        options: those of `homeserver.yaml`; a test changes them.
        more: other files that are given with `-c` after it, in their order.
        workers: the files of workers.
    """

    directory: Path
    options: JsonDict
    more: dict[str, JsonDict | str] = field(default_factory=dict)
    workers: dict[str, JsonDict | str] = field(default_factory=dict)

    @classmethod
    def of(cls, homeserver: Homeserver, directory: Path) -> "Installation":
        """The files of a homeserver, with the options that calls need."""
        files = homeserver.directory
        options = yaml.safe_load((files / "homeserver.yaml").read_text())
        features = {**options.get("experimental_features", {}), "msc4143_enabled": True}
        workers = {
            f"{name}.yaml": yaml.safe_load((files / f"{name}.yaml").read_text())
            for name in homeserver.processes
            if name != "main"
        }
        options.update({**FOR_CALLS, "experimental_features": features})
        return cls(directory, options, workers=workers)

    def doctor(self, *arguments: str, trial: bool = False) -> Answer:
        """Run `doctor` on these files."""
        options = [] if trial else ["--skip", "seams"]
        for flag, files in (
            ("-c", {"homeserver.yaml": self.options, **self.more}),
            ("--worker-config", self.workers),
        ):
            for name, content in files.items():
                path = self.directory / name
                if content != "absent":
                    text = content if isinstance(content, str) else yaml.safe_dump(content)
                    path.write_text(text)
                options += [flag, str(path)]
        if "--service-user" not in arguments:
            options += ["--service-user", ME]
        return run("doctor", "--json", "--quiet", *options, *arguments)


# Decides on a request: to answer with a status, or to pass it on, perhaps to another URL.
Rule = Callable[[str, str], int | str | None]


class Gateway:
    """A reverse proxy in front of real servers, whose admin has made a mistake."""

    def __init__(self, url: str, rule: Rule) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.let_go = threading.Event()
        self.paths: list[str] = []
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def _pass_on(self) -> None:
                gateway.paths.append(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                decided = rule(self.command, self.path)
                if decided == "hang":
                    gateway.let_go.wait(60)
                    return
                if isinstance(decided, int):
                    self._answer(decided, b"", {"Location": "http://127.0.0.1:9/"})
                    return
                self._answer(
                    *_exchange(decided or url, self.command, self.path, self.headers, body)
                )

            do_GET = do_POST = do_PUT = _pass_on

            def _answer(
                self, status: int, body: bytes, headers: Mapping[str, str] | None = None
            ) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> "Gateway":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.let_go.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _exchange(url: str, method: str, path: str, headers: Any, body: bytes) -> tuple[int, bytes]:
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    try:
        kept = {n: v for n, v in headers.items() if n in ("Authorization", "Content-Type")}
        connection.request(method, path, body, kept)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def failing(part: str, status: int | str = 502) -> Rule:
    """A rule for the requests whose path has some part."""
    return lambda method, path: status if part in path else None


def alternating(other: str) -> Rule:
    """A rule that gives each second request to another server."""
    requests = itertools.count()
    return lambda method, path: other if next(requests) % 2 else None
