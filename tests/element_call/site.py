"""All that Element Call is given but Synapse: its files, a page around it, and no media server."""

import base64
import json
import shutil
import socket
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.client import JsonDict
from harness.processes import free_port

HERE = Path(__file__).parent
MODULES = HERE / "node_modules"

# How long somebody who fell silent takes part, and how often one says that it is there.
LEAVE_DELAY_S = 6
RESTART_S = 1.5


class Site:
    """A web server with the host page, Element Call, and an endpoint that gives tokens for media.

    The media server that the tokens are for takes connections, and never says anything.

    Attributes:
        url: the address of the host page.
        other_service: where it gives such tokens too, other than Element Call's configuration says.
        token_requests: the bodies of the requests for a token.
    """

    def __init__(self, directory: Path) -> None:
        node = shutil.which("node")
        assert node is not None, "there is no Node"
        assert MODULES.is_dir(), "`make test-element-call` installs Element Call"
        bundle = directory / "host.js"
        # What is in host.mjs, with all that it imports.
        esbuild = [node, str(MODULES / "esbuild" / "bin" / "esbuild")]
        options = ["--bundle", "--format=esm", "--log-level=error", f"--outfile={bundle}"]
        subprocess.run([*esbuild, "host.mjs", *options], cwd=HERE, check=True)
        self.token_requests: list[JsonDict] = []
        self._media = socket.create_server(("127.0.0.1", free_port()))
        port = free_port()
        root = f"http://127.0.0.1:{port}"
        self.url = f"{root}/host.html"
        self.other_service = f"{root}/other-livekit"
        config = {
            "matrix_rtc_mode": "matrix_2_0",
            "livekit": {"livekit_service_url": f"{root}/livekit"},
            "matrix_rtc_session": {
                "delayed_leave": {
                    "delay_ms": LEAVE_DELAY_S * 1000,
                    "restart_ms": int(RESTART_S * 1000),
                }
            },
        }
        site = self
        places = {
            "/host.html": HERE / "host.html",
            "/host.js": bundle,
            "/element-call": MODULES / "@element-hq" / "element-call-embedded" / "dist",
            # The SDK's encryption asks for its WebAssembly next to the script.
            "/pkg": MODULES / "@matrix-org" / "matrix-sdk-crypto-wasm" / "pkg",
        }

        class Handler(SimpleHTTPRequestHandler):
            def translate_path(self, path: str) -> str:
                path = path.partition("?")[0]
                for start, place in places.items():
                    if path == start or path.startswith(f"{start}/"):
                        return f"{place}{path.removeprefix(start)}"
                return str(directory / "nothing")

            def do_GET(self) -> None:
                if self.path == "/element-call/config.json":
                    self._answer(200, config)
                else:
                    super().do_GET()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path.endswith("/get_token"):
                    site.token_requests.append(json.loads(body))
                    self._answer(200, {"url": site._media_url, "jwt": _token()})
                else:
                    # That it cannot manage delayed leaves, for example.
                    self._answer(404, {"errcode": "M_UNRECOGNIZED", "error": "Not here"})

            def _answer(self, status: int, content: JsonDict) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def _media_url(self) -> str:
        host, port = self._media.getsockname()
        return f"ws://{host}:{port}"

    def __enter__(self) -> "Site":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._media.close()


def _token() -> str:
    """A token for nothing, that has what Element Call reads in it."""
    parts = [{"alg": "none"}, {"sub": "somebody", "video": {"room": "a-room", "roomJoin": True}}]
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode() for part in parts]
    return ".".join([*(part.rstrip("=") for part in encoded), "signature"])
