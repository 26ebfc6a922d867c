# SPDX-License-Identifier: AGPL-3.0-or-later
"""Many servers that take whatever they are sent, at once, and only count it.

Run as a program this is all of them: one process that listens on a port for each.
They share a signing key and a certificate.
"""

import asyncio
import contextlib
import json
import ssl
import sys
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import httpx
from canonicaljson import encode_canonical_json
from signedjson.key import (
    generate_signing_key,
    get_verify_key,
    read_signing_keys,
    write_signing_keys,
)
from signedjson.sign import sign_json
from signedjson.types import SigningKey
from unpaddedbase64 import encode_base64

from benchmarks.server import Server
from harness.certificate import write_certificate
from harness.client import Client, JsonDict
from harness.event_format import Event, event_from_pdu, sign_event
from harness.processes import ManagedProcess, accepts_connections, free_port
from harness.remote import RemoteServer
from harness.wait import eventually

_ROOM_VERSION: Final = "11"
_KEYS_LAST_S: Final = 24 * 60 * 60
_PATIENCE_S: Final = 120


class Peers:
    """The process of the servers. Use it with `with`."""

    def __init__(self, directory: Path, count: int) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._ports = [free_port() for _ in range(count)]
        self._key = generate_signing_key("peers")
        with (directory / "signing.key").open("w") as stream:
            write_signing_keys(stream, [self._key])
        write_certificate(directory / "tls.crt", directory / "tls.key")
        self._http = httpx.Client(verify=False, trust_env=False, timeout=_PATIENCE_S + 10)

    def __enter__(self) -> "Peers":
        command = [sys.executable, "-m", "benchmarks.peers", str(self._directory)]
        self._process = ManagedProcess(
            [*command, *map(str, self._ports)], self._directory / "peers.log"
        )
        last = self._ports[-1]
        eventually(lambda: accepts_connections(last), 30, "the other servers listening")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()
        self._process.stop()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def meet(self, server: Server, client: Client) -> str:
        """Let a user of a homeserver join a room that all of the servers are in already."""
        with RemoteServer() as host:
            room_id = host.create_room("host", _ROOM_VERSION)
            for port in self._ports:
                host.remember(self._membership(host, room_id, port))
            client.join(room_id, via=[host.server_name])
            leave = host.leave(room_id, host.user_id("host"))
            eventually(
                lambda: server.query(
                    "SELECT 1 FROM current_state_events WHERE event_id = ?", leave.event_id
                ),
                what="the room without its creator",
            )
        return room_id

    def received(self, origin: str, at_least: int = 0) -> JsonDict:
        """What they have received from a server, once that is as many messages or more.

        A message that all of them have received counts as many times.
        """
        url = f"https://127.0.0.1:{self._ports[0]}/received/{origin}?at_least={at_least}"
        answer: JsonDict = self._http.get(url).json()
        assert answer["messages"] >= at_least, f"{answer} of {at_least} in {_PATIENCE_S} s"
        return answer

    def _membership(self, host: RemoteServer, room_id: str, port: int) -> Event:
        name = f"127.0.0.1:{port}"
        user_id = f"@user:{name}"
        join = host.create_event(
            room_id, "m.room.member", {"membership": "join"}, user_id, user_id, origin=name
        )
        unsigned = {k: v for k, v in join.pdu.items() if k not in ("hashes", "signatures")}
        return sign_event(_ROOM_VERSION, unsigned, name, self._key)


class _Stub:
    """Answers for all of the servers."""

    def __init__(self, key: SigningKey) -> None:
        self._key = key
        self._received: dict[str, set[tuple[int, str]]] = {}
        self._repeats: Counter[str] = Counter()
        self._transactions: Counter[str] = Counter()
        self._news = asyncio.Condition()
        # Each event comes many times: its ID is worked out once.
        self._ids: dict[str, str] = {}

    async def serve(
        self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer the requests of one connection."""
        with contextlib.suppress(asyncio.IncompleteReadError, OSError), contextlib.closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first_line, *lines = head.lower().split("\r\n")
                headers = dict(line.split(": ", 1) for line in lines if line)
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                target = head.split(" ", 2)[1]
                status, answer = await self._answer(port, first_line[:3], target, content)
                body = encode_canonical_json(answer)
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\n\r\n".encode()
                )
                writer.write(body)
                await writer.drain()

    async def _answer(
        self, port: int, method: str, target: str, content: bytes
    ) -> tuple[str, JsonDict]:
        url = urlsplit(target)
        match method, url.path.strip("/").split("/"):
            case "put", ["_matrix", "federation", "v1", "send", _]:
                return "200 OK", await self._take(port, json.loads(content))
            case "get", ["_matrix", "key", "v2", "server", *_]:
                return "200 OK", self._keys(f"127.0.0.1:{port}")
            case "get", ["received", origin]:
                return "200 OK", await self._count(origin, int(parse_qs(url.query)["at_least"][0]))
        return "404 Not Found", {"errcode": "M_NOT_FOUND", "error": "Nothing here"}

    async def _take(self, port: int, transaction: JsonDict) -> JsonDict:
        origin = transaction["origin"]
        self._transactions[origin] += 1
        answer: dict[str, Any] = {}
        for pdu in transaction.get("pdus", ()):
            event_id = self._id(pdu)
            answer[event_id] = {}
            if pdu["type"] == "m.room.message":
                received = self._received.setdefault(origin, set())
                self._repeats[origin] += (port, event_id) in received
                received.add((port, event_id))
        async with self._news:
            self._news.notify_all()
        return {"pdus": answer}

    def _id(self, pdu: JsonDict) -> str:
        content_hash = pdu["hashes"]["sha256"]
        if content_hash not in self._ids:
            self._ids[content_hash] = event_from_pdu(_ROOM_VERSION, pdu).event_id
        return self._ids[content_hash]

    async def _count(self, origin: str, at_least: int) -> JsonDict:
        received = self._received.setdefault(origin, set())
        with contextlib.suppress(asyncio.TimeoutError):
            async with self._news:
                enough = self._news.wait_for(lambda: len(received) >= at_least)
                await asyncio.wait_for(enough, _PATIENCE_S)
        return {
            "messages": len(received),
            "repeats": self._repeats[origin],
            "transactions": self._transactions[origin],
        }

    def _keys(self, name: str) -> JsonDict:
        key = get_verify_key(self._key)
        keys: JsonDict = sign_json(
            {
                "server_name": name,
                "verify_keys": {f"{key.alg}:{key.version}": {"key": encode_base64(key.encode())}},
                "old_verify_keys": {},
                "valid_until_ts": int((time.time() + _KEYS_LAST_S) * 1000),
            },
            name,
            self._key,
        )
        return keys


async def _serve(directory: Path, ports: list[int]) -> None:
    with (directory / "signing.key").open() as stream:
        (key,) = read_signing_keys(stream)
    stub = _Stub(key)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    for port in ports:

        async def serve(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int = port
        ) -> None:
            await stub.serve(port, reader, writer)

        await asyncio.start_server(serve, "127.0.0.1", port, ssl=tls)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), [int(port) for port in sys.argv[2:]]))
