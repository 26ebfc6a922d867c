"""What real clients, bridges and admins do every day, and what a server answered to it."""

import base64
import contextlib
import json
import re
import secrets
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from harness.client import JsonDict, quote
from harness.homeserver import Homeserver, generous_rate_limits
from harness.processes import free_port
from harness.wait import eventually

AS_TOKEN, HS_TOKEN = "token-of-the-bridge", "token-of-the-homeserver"
V3 = "/_matrix/client/v3"
V1 = "/_matrix/client/v1"
UNSTABLE = "/_matrix/client/unstable"
ADMIN = "/_synapse/admin"
SLIDING = f"{UNSTABLE}/org.matrix.simplified_msc3575/sync"
# As long as Synapse lets anybody type: nobody stops while others read.
TYPING_MS = 120_000
STICKY: JsonDict = {"org.matrix.msc4354.sticky_duration_ms": 3_600_000}

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Elsewhere:
    """A bridge, a push gateway and a web site, which note what they are asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                raw = self.rfile.read(length)
                try:
                    body = json.loads(raw) if raw else None
                except ValueError:
                    body = "?"
                path = urllib.parse.urlsplit(self.path).path
                outer.asked.append((self.command, path, body))
                kind, answer = "application/json", b"{}"
                if path == "/page":
                    kind = "text/html"
                    answer = (
                        b'<html><head><meta property="og:title" content="A page"></head></html>'
                    )
                elif path.endswith("/notify"):
                    answer = b'{"rejected": []}'
                elif "thirdparty/protocol" in path:
                    answer = (
                        b'{"user_fields":["a"],"location_fields":["b"],"icon":"mxc://a/b",'
                        b'"field_types":{"a":{"regexp":".*","placeholder":"p"},'
                        b'"b":{"regexp":".*","placeholder":"p"}},"instances":[{"desc":"d",'
                        b'"network_id":"n","fields":{}}]}'
                    )
                elif "thirdparty" in path:
                    answer = b"[]"
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PUT = do_POST = _answer

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", free_port()), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self.server.shutdown()
        self.server.server_close()


def configuration(directory: Path, elsewhere: Elsewhere, server_name: str) -> JsonDict:
    """What an operator has beside what Synapse generates."""
    directory.mkdir(parents=True, exist_ok=True)
    registration = directory / "bridge.yaml"
    registration.write_text(
        yaml.safe_dump(
            {
                "id": "bridge",
                "url": elsewhere.url,
                "as_token": AS_TOKEN,
                "hs_token": HS_TOKEN,
                "sender_localpart": "bridge",
                "namespaces": {
                    "users": [{"exclusive": False, "regex": ".*"}],
                    "aliases": [{"exclusive": False, "regex": "#bridge.*"}],
                    "rooms": [],
                },
                "protocols": ["irc"],
                "rate_limited": False,
                "receive_ephemeral": True,
                "de.sorunome.msc2409.push_ephemeral": True,
                "org.matrix.msc3202": True,
                "io.element.msc4190": True,
            }
        )
    )
    limits = generous_rate_limits()
    del limits["rc_message"]
    return {
        **limits,
        "background_updates": {"sleep_enabled": False},
        "enable_metrics": True,
        "enable_registration": True,
        "enable_registration_without_verification": True,
        "allow_guest_access": True,
        "allow_public_rooms_without_auth": True,
        "allow_public_rooms_over_federation": True,
        "refreshable_access_token_lifetime": "1h",
        "max_event_delay_duration": "24h",
        "ip_range_whitelist": ["127.0.0.1"],
        "app_service_config_files": [str(registration)],
        "user_directory": {"enabled": True, "search_all_users": True},
        "server_notices": {"system_mxid_localpart": "notices", "room_name": "Notices"},
        "retention": {
            "enabled": True,
            "default_policy": {"min_lifetime": "1d", "max_lifetime": "1y"},
            "purge_jobs": [{"interval": "5s"}],
        },
        "redaction_retention_period": "1s",
        "forgotten_room_retention_period": "1s",
        "auto_join_rooms": [f"#welcome:{server_name}"],
        "limit_remote_rooms": {"enabled": True, "complexity": 100.0},
        "max_avatar_size": "10M",
        "allowed_avatar_mimetypes": ["image/png"],
        "encryption_enabled_by_default_for_room_type": "off",
        "delete_stale_devices_after": "1y",
        "dummy_events_threshold": 10,
        "media_retention": {"local_media_lifetime": "90d", "remote_media_lifetime": "14d"},
        "experimental_features": dict.fromkeys(
            (
                *("msc2409_to_device_messages_enabled", "msc2654_enabled", "msc2815_enabled"),
                *(
                    "msc3026_enabled",
                    "msc3202_transaction_extensions",
                    "msc3202_device_masquerading",
                ),
                *("msc3266_enabled", "msc3391_enabled", "msc3575_enabled", "msc3664_enabled"),
                *("msc3720_enabled", "msc3773_enabled", "msc3814_enabled", "msc3848_enabled"),
                *("msc3874_enabled", "msc3881_enabled", "msc3890_enabled", "msc3912_enabled"),
                *("msc3983_appservice_otk_claims", "msc3984_appservice_key_query"),
                *("msc4069_profile_inhibit_propagation", "msc4076_enabled", "msc4133_enabled"),
                *("msc4028_push_encrypted_events", "msc4143_enabled", "msc4155_enabled"),
                *("msc4169_enabled", "msc4210_enabled", "msc4222_enabled", "msc4235_enabled"),
                *("msc4267_enabled", "msc4277_enabled", "msc4293_enabled", "msc4306_enabled"),
                *("msc4446_enabled", "msc4450_enabled", "msc4452_enabled", "msc4491_enabled"),
                *("msc3381_polls_enabled", "msc3967_enabled", "msc4151_enabled", "msc4380_enabled"),
            ),
            True,
        ),
    }


_ID = re.compile(r"^[!@#$+][\w\-=./+:]+$")
_OPAQUE = re.compile(
    r"^(syt_|syr_|syl_|mxc:|[A-Za-z0-9_\-]{16,}$|[A-Z]{10}$|s?\d+[_-]|https?://|\d{9,})"
)
_DIGITS = re.compile(r"\d+")
_KEY = re.compile(
    r"[!@#$+]|\w*curve25519:|ed25519:|\d{10,}|.*:\d+$|[A-Z]{10}$|(?=.*[A-Z])[\w-]{16,}$"
)


def shape(value: Any, key: str = "") -> Any:
    """An answer without what differs from one run to the next."""
    if isinstance(value, dict):
        items: dict[str, Any] = {}
        for name, item in value.items():
            plain = f"<{name[0]}>" if _KEY.match(name) else name
            found = shape(item, plain)
            if plain != name:
                found = sorted([*items.get(plain, []), found], key=json.dumps)
                found = [x for n, x in enumerate(found) if n == 0 or x != found[n - 1]]
            items[plain] = found
        return dict(sorted(items.items()))
    if isinstance(value, list):
        each = {json.dumps(shape(item, key)): shape(item, key) for item in value}
        return [each[text] for text in sorted(each)]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return value if key.endswith(("_count", "total")) else "<n>"
    if isinstance(value, str):
        if key in ("next_batch", "prev_batch", "pos", "start", "end", "token", "prev_content"):
            return f"<{key}>"
        if _ID.match(value):
            return f"<{value[0]}>"
        return "<opaque>" if _OPAQUE.match(value) else _DIGITS.sub("#", value)
    return value


class Everyday:
    """Does it all on one server, and notes what it answers."""

    def __init__(self, homeserver: Homeserver, elsewhere: Elsewhere) -> None:
        self.hs = homeserver
        self.elsewhere = elsewhere
        self.answers: list[tuple[str, int, Any]] = []
        self.tokens: dict[str, str] = {}
        self.ids: dict[str, str] = {}
        self.http = homeserver.http

    def user_id(self, name: str) -> str:
        """The ID of a user of this server."""
        return f"@{name}:{self.hs.server_name}"

    def __call__(
        self,
        who: str,
        method: str,
        path: str,
        json: Any = None,
        *,
        note: str = "",
        recorded: bool = True,
        content: bytes | None = None,
        headers: dict[str, str] | None = None,
        **params: Any,
    ) -> Any:
        """Ask for something, and return what was answered."""
        query = {name.replace("__", "."): v for name, v in params.items() if v is not None}
        everything = dict(headers or {})
        if who:
            everything["Authorization"] = f"Bearer {self.tokens.get(who, who)}"
        if json is None and content is None and method in ("POST", "PUT"):
            json = {}
        response = self.http.request(
            method,
            self.hs.main_url + path,
            params=query or None,
            headers=everything,
            timeout=60,
            **({"content": content} if content is not None else {"json": json}),
        )
        try:
            body = response.json()
        except ValueError:
            body = {"text": response.headers.get("Content-Type", "")}
        template = re.sub(r"(?<=/)[^/]*(%21|%40|%23|%24|!|@|#|\$)[^/]*", "{}", path)
        template = re.sub(r"(?<=/)([0-9a-f]{16}|(?=[^/]*[A-Z])\w{12,})|\d{9,}", "{}", template)
        if recorded:
            name = f"{len(self.answers):03} {who} {method} {template} {note}".strip()
            self.answers.append((name, response.status_code, body))
        return body

    # Parts

    def register(self, name: str) -> JsonDict:
        """Register as Element does, in two requests."""
        asked = {"username": name, "password": f"pass word {name}", "refresh_token": True}
        session = self("", "POST", f"{V3}/register", asked).get("session")
        auth = {"type": "m.login.dummy", "session": session}
        made: JsonDict = self("", "POST", f"{V3}/register", {**asked, "auth": auth})
        self.tokens[name] = made.get("access_token", "missing")
        return made

    def lift_limits(self, name: str) -> None:
        """Do not limit how many messages a user sends."""
        path = f"{ADMIN}/v1/users/{quote(self.user_id(name))}/override_ratelimit"
        self("admin", "POST", path, {"messages_per_second": 0, "burst_count": 0})

    def send(self, who: str, room: str, type: str, content: JsonDict, **params: Any) -> str:
        """Send an event."""
        txn = secrets.token_hex(8)
        path = f"{V3}/rooms/{quote(room)}/send/{type}/{txn}"
        return str(self(who, "PUT", path, content, **params).get("event_id", "missing"))

    def wait(self, path: str) -> None:
        """Wait until an admin's task has ended, and note how."""

        def ended() -> bool:
            status = self("admin", "GET", path, recorded=False).get("status")
            return status in ("complete", "failed")

        eventually(ended, 30, path)
        self("admin", "GET", path)

    def walk(self) -> None:
        """All of it."""
        self.accounts()
        self.avatar()
        self.rooms()
        self.conversation()
        self.reading()
        self.presence_and_ephemeral()
        self.encryption()
        self.syncing()
        self.sliding()
        self.media()
        self.membership()
        self.bridge()
        self.profile_and_directory()
        self.upgrade()
        self.administration()
        self.ending()

    def accounts(self) -> None:
        """Register, log in, refresh, ask what the server is and can."""
        self.tokens["admin"] = self.hs.register("admin", admin=True).access_token
        self.lift_limits("admin")
        for name in ("alice", "bob", "carol"):
            made = self.register(name)
            self.lift_limits(name)
        self(
            "", "POST", f"{V3}/refresh", {"refresh_token": made.get("refresh_token")}, note="carol"
        )
        for method, path in (
            ("GET", "/_matrix/client/versions"),
            ("GET", f"{V3}/login"),
            ("GET", f"{V3}/capabilities"),
            ("GET", "/.well-known/matrix/client"),
            ("GET", f"{V1}/auth_metadata"),
            ("GET", f"{UNSTABLE}/org.matrix.msc2965/auth_metadata"),
            ("GET", f"{V3}/register/available?username=alice"),
            ("GET", f"{V3}/register/available?username=nobody"),
            ("GET", f"{V3}/account/whoami"),
            ("GET", f"{V3}/account/3pid"),
            ("GET", f"{V3}/devices"),
            ("GET", f"{V3}/voip/turnServer"),
            ("GET", f"{V3}/pushrules/"),
            ("GET", f"{V3}/password_policy"),
            ("GET", f"{V3}/nonsense"),
            ("GET", f"{UNSTABLE}/org.matrix.msc4143/rtc/transports"),
            ("POST", f"{V1}/login/get_token"),
            ("GET", "/health"),
        ):
            self("alice", method, path)
        for password in ("wrong", "pass word alice"):
            identifier = {"type": "m.id.user", "user": "alice"}
            body = {
                "type": "m.login.password",
                "identifier": identifier,
                "password": password,
                "device_id": "PHONE",
                "refresh_token": True,
            }
            made = self("", "POST", f"{V3}/login", body)
        self.tokens["alice's phone"] = made.get("access_token", "missing")
        made = self("", "POST", f"{V3}/refresh", {"refresh_token": made.get("refresh_token")})
        self.tokens["alice's phone"] = made.get("access_token", "missing")
        guest = self("", "POST", f"{V3}/register", kind="guest")
        self.tokens["guest"] = guest.get("access_token", "missing")
        self.ids["guest"] = guest.get("user_id", "missing")
        user = quote(self.user_id("alice"))
        self("alice", "POST", f"{V3}/user/{user}/openid/request_token")
        self("alice", "PUT", f"{V3}/devices/PHONE", {"display_name": "Phone"})
        self("alice", "GET", f"{V3}/devices/PHONE")
        self("alice", "PUT", f"{V3}/user/{user}/account_data/org.example.a", {"v": 1})
        self("alice", "GET", f"{V3}/user/{user}/account_data/org.example.a")
        self(
            "alice",
            "DELETE",
            f"{UNSTABLE}/org.matrix.msc3391/user/{user}/account_data/org.example.a",
        )
        direct: JsonDict = {self.user_id("bob"): []}
        self("alice", "PUT", f"{V3}/user/{user}/account_data/m.direct", direct)

    def rooms(self) -> None:
        """Create rooms and spaces, join them, read their state, find them."""
        make = f"{V3}/createRoom"
        space = {
            "name": "Space",
            "preset": "public_chat",
            "creation_content": {"type": "m.space"},
            "room_alias_name": f"space-{secrets.token_hex(3)}",
            "visibility": "public",
        }
        made = self("alice", "POST", make, space)
        self.ids["space"] = made.get("room_id", "missing")
        body = {
            "name": "Room",
            "topic": "Everything",
            "preset": "public_chat",
            "visibility": "public",
            "room_alias_name": "everyday",
            "initial_state": [
                {"type": "m.room.guest_access", "content": {"guest_access": "can_join"}},
            ],
        }
        room = self.ids["room"] = self("alice", "POST", make, body).get("room_id", "missing")
        direct = {
            "preset": "trusted_private_chat",
            "is_direct": True,
            "invite": [self.user_id("bob")],
        }
        self.ids["direct"] = self("alice", "POST", make, direct).get("room_id", "missing")
        crypt = {"type": "m.room.encryption", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}
        hidden = {"type": "m.room.history_visibility", "content": {"history_visibility": "joined"}}
        private = {"preset": "private_chat", "name": "Secret", "initial_state": [crypt, hidden]}
        self.ids["secret"] = self("alice", "POST", make, private).get("room_id", "missing")
        knock = {"preset": "private_chat", "name": "Knock"}
        knock["initial_state"] = [{"type": "m.room.join_rules", "content": {"join_rule": "knock"}}]  # type: ignore[assignment]
        self.ids["knock"] = self("alice", "POST", make, knock).get("room_id", "missing")
        for child in ("room", "direct", "secret"):
            path = f"{V3}/rooms/{quote(self.ids['space'])}/state/m.space.child"
            path = f"{path}/{quote(self.ids[child])}"
            self("alice", "PUT", path, {"via": [self.hs.server_name]})
        for who in ("bob", "carol", "guest"):
            self(who, "POST", f"{V3}/join/{quote('#everyday:' + self.hs.server_name)}")
        self("bob", "POST", f"{V3}/join/{quote(self.ids['direct'])}")
        self(
            "alice",
            "POST",
            f"{V3}/rooms/{quote(self.ids['secret'])}/invite",
            {"user_id": self.user_id("bob")},
        )
        self("bob", "POST", f"{V3}/join/{quote(self.ids['secret'])}")
        alias = quote(f"#bridge-room:{self.hs.server_name}")
        self("alice", "PUT", f"{V3}/directory/room/{alias}", {"room_id": room})
        for path in (
            f"{V3}/directory/room/{alias}",
            f"{V3}/directory/list/room/{quote(room)}",
            f"{V3}/rooms/{quote(room)}/aliases",
            f"{V3}/publicRooms",
            f"{V3}/joined_rooms",
            f"{V3}/rooms/{quote(room)}/state",
            f"{V3}/rooms/{quote(room)}/members",
            f"{V3}/rooms/{quote(room)}/joined_members",
            f"{V3}/rooms/{quote(room)}/state/m.room.name/",
            f"{V3}/rooms/{quote(room)}/state/m.room.name/?format=event",
            f"{V1}/rooms/{quote(self.ids['space'])}/hierarchy",
            f"{UNSTABLE}/im.nheko.summary/rooms/{quote(room)}/summary",
            f"{V1}/room_summary/{quote(room)}",
            f"{V3}/rooms/{quote(room)}/initialSync",
            f"{V3}/initialSync",
        ):
            self("bob", "GET", path)
        self("", "GET", f"{V3}/publicRooms")
        self("bob", "POST", f"{V3}/publicRooms", {"filter": {"generic_search_term": "room"}})
        self("bob", "POST", f"{V3}/publicRooms", {"third_party_instance_id": "irc|n"})
        self(
            "bob",
            "GET",
            f"{UNSTABLE}/uk.half-shot.msc2666/user/mutual_rooms",
            user_id=self.user_id("alice"),
        )

    def conversation(self) -> None:
        """Push rules and pushers; messages, relations, delayed events, limits, nonsense."""
        room = self.ids["room"]
        text = {
            "msgtype": "m.text",
            "body": "hello everyday bob",
            "m.mentions": {"user_ids": [self.user_id("bob")]},
        }
        pusher = {
            "kind": "http",
            "app_id": "org.example.app",
            "pushkey": "key",
            "app_display_name": "App",
            "device_display_name": "Phone",
            "lang": "en",
            "data": {"url": f"{self.elsewhere.url}/_matrix/push/v1/notify"},
        }
        self("bob", "POST", f"{V3}/pushers/set", pusher)
        brief = {**pusher, "pushkey": "key2", "data": {**pusher["data"], "format": "event_id_only"}}  # type: ignore[dict-item]
        self("bob", "POST", f"{V3}/pushers/set", brief)
        self("bob", "GET", f"{V3}/pushers")
        self(
            "bob",
            "PUT",
            f"{V3}/pushrules/global/content/greeting",
            {"pattern": "hello", "actions": ["notify", {"set_tweak": "sound", "value": "default"}]},
        )
        self("bob", "GET", f"{V3}/pushrules/global/content/greeting")
        self("bob", "PUT", f"{V3}/pushrules/global/content/greeting/enabled", {"enabled": True})
        before = self.ids["before"] = self.send("alice", room, "m.room.message", text)
        sticky = self.ids["sticky"] = self.send("alice", room, "m.room.message", text, **STICKY)
        self.ids["rtc"] = self.send(
            "alice",
            room,
            "org.matrix.msc4143.rtc.member",
            {"application": {"type": "m.call"}, "msc4354_sticky_key": "k"},
            **STICKY,
        )
        self.ids["secret sticky"] = self.send(
            "alice",
            self.ids["secret"],
            "m.room.encrypted",
            {"algorithm": "m.megolm.v1.aes-sha2", "ciphertext": "x"},
            **STICKY,
        )
        self.ids["direct sticky"] = self.send(
            "bob", self.ids["direct"], "m.room.message", text, **STICKY
        )
        path = f"{V3}/rooms/{quote(room)}/send/m.room.message/same"
        for _ in range(2):
            self("alice", "PUT", path, text, **STICKY)
        thread = {"rel_type": "m.thread", "event_id": before}
        reply = self.send(
            "bob",
            room,
            "m.room.message",
            {"msgtype": "m.text", "body": "in thread", "m.relates_to": thread},
        )
        self.send(
            "bob",
            room,
            "m.room.message",
            {
                "msgtype": "m.text",
                "body": "sticky in thread",
                "m.relates_to": {**thread, "event_id": sticky},
            },
            **STICKY,
        )
        reaction = {"rel_type": "m.annotation", "event_id": sticky, "key": "x"}
        self.send("bob", room, "m.reaction", {"m.relates_to": reaction})
        self.send("bob", room, "m.reaction", {"m.relates_to": reaction}, note="again")
        edit = {"rel_type": "m.replace", "event_id": sticky}
        self.send(
            "alice", room, "m.room.message", {**text, "m.new_content": text, "m.relates_to": edit}
        )
        self.send(
            "alice",
            room,
            "m.reference",
            {"m.relates_to": {"rel_type": "m.reference", "event_id": sticky}},
        )
        gone = self.send("alice", room, "m.room.message", text, **STICKY)
        self("alice", "PUT", f"{V3}/rooms/{quote(room)}/redact/{quote(gone)}/r1", {"reason": "no"})
        self.ids["gone"] = gone
        self(
            "alice",
            "PUT",
            f"{V3}/rooms/{quote(room)}/state/m.room.pinned_events/",
            {"pinned": [before]},
        )
        self(
            "alice",
            "PUT",
            f"{V3}/rooms/{quote(room)}/state/m.room.topic/",
            {"topic": "t"},
            **STICKY,
        )
        for _ in range(2):
            self.send(
                "guest", room, "m.room.message", {"msgtype": "m.text", "body": "guest"}, **STICKY
            )
        for event in (sticky, before):
            self(
                "bob",
                "PUT",
                f"{UNSTABLE}/io.element.msc4306/rooms/{quote(room)}/thread/{quote(event)}/subscription",
                {"automatic": reply},
            )
        self(
            "bob",
            "GET",
            f"{UNSTABLE}/io.element.msc4306/rooms/{quote(room)}/thread/{quote(before)}/subscription",
        )
        # Delayed events, as calls have them.
        path = f"{V3}/rooms/{quote(room)}/send/org.example.delayed/d1"
        made = self("alice", "PUT", path, {"a": 1}, org__matrix__msc4140__delay=60_000)
        delayed = f"{UNSTABLE}/org.matrix.msc4140/delayed_events"
        self("alice", "GET", delayed)
        self("alice", "POST", f"{delayed}/{made.get('delay_id')}", {"action": "restart"})
        self("alice", "POST", f"{delayed}/{made.get('delay_id')}", {"action": "send"})
        path = f"{V3}/rooms/{quote(room)}/send/org.example.delayed/d2"
        made = self("alice", "PUT", path, {"a": 1}, org__matrix__msc4140__delay=60_000, **STICKY)
        self("alice", "POST", f"{delayed}/{made.get('delay_id')}", {"action": "cancel"})
        path = f"{V3}/rooms/{quote(room)}/send/org.example.delayed/d3"
        self("alice", "PUT", path, {"a": 1}, org__matrix__msc4140__delay=200, **STICKY)
        path = f"{V3}/rooms/{quote(room)}/state/org.example.delayed/x"
        made = self("alice", "PUT", path, {"a": 1}, org__matrix__msc4140__delay=60_000)
        self("alice", "POST", f"{delayed}/{made.get('delay_id')}/send")
        path = f"{UNSTABLE}/org.matrix.msc4140/rooms/{quote(room)}"
        path = f"{path}/delayed_event/org.example.delayed/d4"
        self("alice", "PUT", path, {"delay_ms": 200, "content": {}})

        def all_sent() -> bool:
            left = self("alice", "GET", delayed, recorded=False).get("delayed_events", [])
            return all(event.get("delay") != 200 for event in left)

        eventually(all_sent, 30, "the delayed events")
        self("alice", "GET", delayed)
        # Whoever has no exemption from the default limits.
        self.register("dave")
        self("dave", "POST", f"{V3}/join/{quote(room)}")
        path = f"{V3}/rooms/{quote(room)}/send/m.room.message"

        def is_limited() -> bool:
            url = f"{path}/{secrets.token_hex(8)}"
            answer = self("dave", "PUT", url, text, recorded=False, **STICKY)
            return bool(answer.get("errcode") == "M_LIMIT_EXCEEDED")

        eventually(is_limited, 30, "the limit of a user", interval_s=0)
        # Nonsense.
        for type, content in (("m.room.message", {"body": 1}), ("m.room.create", {})):
            self.send("alice", room, type, content, **STICKY)
        self.send("alice", "!none:homeserver.test", "m.room.message", text, **STICKY)
        self(
            "alice", "PUT", f"{V3}/rooms/{quote(room)}/send/m.room.message/t9", content=b"{nonsense"
        )
        self("alice", "PUT", f"{V3}/rooms/{quote(room)}/send/m.room.message/t8", content=b"[]")

    def reading(self) -> None:
        """Each way to read events."""
        room, before, sticky = (
            quote(self.ids["room"]),
            quote(self.ids["before"]),
            quote(self.ids["sticky"]),
        )
        rooms = f"{V3}/rooms/{room}"
        lazy = json.dumps({"lazy_load_members": True})
        for who in ("bob", "guest"):
            self(who, "GET", f"{rooms}/messages", dir="b", limit=100)
            self(who, "GET", f"{rooms}/messages", dir="f", limit=3, filter=lazy)
            for event in (before, sticky, quote(self.ids["gone"])):
                self(who, "GET", f"{rooms}/event/{event}")
                self(who, "GET", f"{rooms}/context/{event}", limit=4, filter=lazy)
                self(who, "GET", f"{V3}/events/{event}")
                for kind in (
                    "",
                    "/m.thread",
                    "/m.annotation/m.reaction",
                    "/m.replace",
                    "/m.reference",
                ):
                    self(who, "GET", f"{V1}/rooms/{room}/relations/{event}{kind}")
            self(who, "GET", f"{V1}/rooms/{room}/relations/{before}", recurse="true", dir="f")
            self(who, "GET", f"{V1}/rooms/{room}/threads")
            self(who, "GET", f"{V1}/rooms/{room}/threads", include="participated")
            shown = self(who, "GET", f"{rooms}/event/{before}", recorded=False)
            for direction in ("f", "b"):
                self(
                    who,
                    "GET",
                    f"{V1}/rooms/{room}/timestamp_to_event",
                    ts=shown.get("origin_server_ts"),
                    dir=direction,
                )
            self(who, "GET", f"{V3}/notifications")
            self(who, "GET", f"{V3}/notifications", only="highlight", limit=2)
            search = {
                "search_categories": {
                    "room_events": {
                        "search_term": "hello",
                        "keys": ["content.body"],
                        "order_by": "recent",
                        "groupings": {"group_by": [{"key": "room_id"}]},
                        "event_context": {
                            "before_limit": 2,
                            "after_limit": 2,
                            "include_profile": True,
                        },
                        "include_state": True,
                    }
                }
            }
            self(who, "POST", f"{V3}/search", search)
            search["search_categories"]["room_events"]["order_by"] = "rank"
            self(who, "POST", f"{V3}/search", search)
            self(who, "GET", f"{V3}/events", timeout=0)
        self("bob", "GET", f"{V3}/rooms/{room}/event/$nothing")
        self(
            "alice",
            "GET",
            f"{rooms}/event/{quote(self.ids['gone'])}?fi.mau.msc2815.include_unredacted_content=true",
        )
        secret = f"{V3}/rooms/{quote(self.ids['secret'])}"
        self("bob", "GET", f"{secret}/messages", dir="b")
        self("bob", "GET", f"{secret}/event/{quote(self.ids['secret sticky'])}")
        self("carol", "GET", f"{secret}/event/{quote(self.ids['secret sticky'])}")
        self("carol", "GET", f"{secret}/messages", dir="b")
        self("bob", "POST", f"{rooms}/report/{sticky}", {"reason": "bad", "score": -1})
        self("bob", "POST", f"{rooms}/report", {"reason": "bad"})
        self("bob", "POST", f"{V3}/users/{quote(self.user_id('carol'))}/report", {"reason": "bad"})

    def presence_and_ephemeral(self) -> None:
        """Presence, typing, receipts, tags."""
        room = quote(self.ids["room"])
        for who in ("alice", "bob"):
            path = f"{V3}/presence/{quote(self.user_id(who))}/status"
            self(who, "PUT", path, {"presence": "online", "status_msg": f"{who} is here"})
            self(who, "GET", path)
        self("carol", "GET", f"{V3}/presence/{quote(self.user_id('alice'))}/status")
        busy = {"presence": "org.matrix.msc3026.busy"}
        self("bob", "PUT", f"{V3}/presence/{quote(self.user_id('bob'))}/status", busy)
        self(
            "alice",
            "PUT",
            f"{V3}/rooms/{room}/typing/{quote(self.user_id('alice'))}",
            {"typing": True, "timeout": TYPING_MS},
        )
        sticky = self.ids["sticky"]
        for kind in ("m.read", "m.read.private", "m.fully_read"):
            self("bob", "POST", f"{V3}/rooms/{room}/receipt/{kind}/{quote(self.ids['before'])}")
        self(
            "carol",
            "POST",
            f"{V3}/rooms/{room}/receipt/m.read/{quote(sticky)}",
            {"thread_id": "main"},
        )
        self(
            "carol",
            "POST",
            f"{V3}/rooms/{room}/receipt/m.read/{quote(sticky)}",
            {"thread_id": self.ids["before"]},
        )
        self(
            "alice",
            "POST",
            f"{V3}/rooms/{room}/read_markers",
            {"m.fully_read": sticky, "m.read": sticky},
        )
        user = quote(self.user_id("alice"))
        self("alice", "PUT", f"{V3}/user/{user}/rooms/{room}/tags/m.favourite", {"order": 0.1})
        self("alice", "GET", f"{V3}/user/{user}/rooms/{room}/tags")
        self("alice", "PUT", f"{V3}/user/{user}/rooms/{room}/account_data/org.example.r", {"v": 1})
        self("alice", "GET", f"{V3}/user/{user}/rooms/{room}/account_data/org.example.r")

    def encryption(self) -> None:
        """Keys, to-device messages, backups."""
        for who, device in (("alice's phone", "PHONE"),):
            name = self.user_id("alice")
            keys = {
                "device_keys": {
                    "user_id": name,
                    "device_id": device,
                    "algorithms": ["m.megolm.v1.aes-sha2"],
                    "keys": {f"ed25519:{device}": "a" * 43, f"curve25519:{device}": "b" * 43},
                    "signatures": {name: {f"ed25519:{device}": "c" * 86}},
                },
                "one_time_keys": {
                    f"signed_curve25519:AAAA{n}": {"key": "d" * 43, "signatures": {}}
                    for n in range(3)
                },
                "fallback_keys": {
                    "signed_curve25519:F": {"key": "e" * 43, "fallback": True, "signatures": {}}
                },
            }
            self(who, "POST", f"{V3}/keys/upload", keys)
        self("bob", "POST", f"{V3}/keys/query", {"device_keys": {name: []}})
        for _ in range(5):
            self(
                "bob",
                "POST",
                f"{V3}/keys/claim",
                {"one_time_keys": {name: {"PHONE": "signed_curve25519"}}},
            )
        self(
            "bob",
            "GET",
            f"{V3}/keys/changes",
            **{
                "from": self("bob", "GET", f"{V3}/sync", recorded=False).get("next_batch"),
                "to": self("bob", "GET", f"{V3}/sync", recorded=False).get("next_batch"),
            },
        )
        messages = {"messages": {name: {"*": {"hello": 1}}}}
        self("bob", "PUT", f"{V3}/sendToDevice/m.room_key_request/t1", messages)
        self("bob", "PUT", f"{V3}/sendToDevice/m.room_key_request/t1", messages)
        backup = self(
            "alice",
            "POST",
            f"{V3}/room_keys/version",
            {"algorithm": "m.megolm_backup.v1", "auth_data": {}},
        )
        session = {
            "first_message_index": 0,
            "forwarded_count": 0,
            "is_verified": False,
            "session_data": {},
        }
        version = backup.get("version")
        self(
            "alice",
            "PUT",
            f"{V3}/room_keys/keys/{quote(self.ids['secret'])}/sess",
            session,
            version=version,
        )
        self("alice", "GET", f"{V3}/room_keys/keys", version=version)
        self("alice", "GET", f"{V3}/room_keys/version")
        master = {"user_id": name, "usage": ["master"], "keys": {"ed25519:" + "m" * 43: "m" * 43}}
        self("alice", "POST", f"{V3}/keys/device_signing/upload", {"master_key": master})
        self("alice", "POST", f"{V3}/keys/signatures/upload", {})
        dehydrated = f"{UNSTABLE}/org.matrix.msc3814.v1/dehydrated_device"
        self("alice", "GET", dehydrated)

    def syncing(self) -> None:
        """/sync, with filters, initial and incremental, and once more."""
        sync = f"{V3}/sync"
        room = self.ids["room"]
        lazy = {
            "room": {
                # Without, it depends on the order of rooms which members Synapse sends again.
                "state": {"lazy_load_members": True, "include_redundant_members": True},
                "timeline": {"limit": 100, "unread_thread_notifications": True},
            }
        }
        user = quote(self.user_id("bob"))
        stored = self("bob", "POST", f"{V3}/user/{user}/filter", lazy).get("filter_id")
        self("bob", "GET", f"{V3}/user/{user}/filter/{stored}")
        first: dict[str, Any] = {}
        lazily: dict[str, Any] = {}
        for who in ("bob", "guest", "alice's phone"):
            first[who] = self(who, "GET", sync, note="initial", timeout=0).get("next_batch")
            self(who, "GET", sync, note="initial, again from the cache", timeout=0)
            answer = self(who, "GET", sync, note="initial, lazily", filter=json.dumps(lazy))
            lazily[who] = answer.get("next_batch")
        kinds: list[JsonDict] = [
            {"room": {"timeline": {"limit": 1}}},
            {"room": {"timeline": {"types": []}, "state": {"types": []}}},
            {"presence": {"types": []}},
            {"presence": {"types": ["m.presence"]}, "room": {"timeline": {"limit": 0}}},
            {"event_fields": ["type", "content.body", "sender"]},
            {"event_format": "federation"},
            {"room": {"include_leave": True, "ephemeral": {"types": ["m.receipt"]}}},
            {"account_data": {"not_types": ["*"]}, "room": {"account_data": {"types": []}}},
        ]
        for number, kind in enumerate(kinds):
            self(
                "bob",
                "GET",
                sync,
                note=f"filter {number}",
                filter=json.dumps(kind),
                set_presence="offline",
            )
        self("bob", "GET", sync, filter=stored, full_state="true", set_presence="unavailable")
        self("bob", "GET", sync, use_state_after="true")
        self("bob", "GET", sync, org__matrix__msc4222__use_state_after="true")
        self(
            "alice",
            "PUT",
            f"{V3}/presence/{quote(self.user_id('alice'))}/status",
            {"presence": "unavailable", "status_msg": "away"},
        )
        self.send("alice", room, "m.room.message", {"msgtype": "m.text", "body": "news"}, **STICKY)
        self(
            "alice",
            "PUT",
            f"{V3}/rooms/{quote(room)}/typing/{quote(self.user_id('alice'))}",
            {"typing": False},
        )
        time.sleep(0.3)
        for who, since in first.items():
            answer = self(who, "GET", sync, note="incremental", since=since, timeout=3000)
            self(who, "GET", sync, note="nothing new", since=answer.get("next_batch"), timeout=0)
            since = lazily[who]
            self(who, "GET", sync, note="incremental, lazily", since=since, filter=json.dumps(lazy))
        for nonsense in ("x", "s1_2", ""):
            self("bob", "GET", sync, note="nonsense", since=nonsense)
        self("", "GET", sync)

    def sliding(self) -> None:
        """Sliding Sync, with every extension and with none."""
        room = self.ids["room"]
        extensions = {
            name: {"enabled": True}
            for name in (
                *("to_device", "e2ee", "account_data", "receipts", "typing"),
                *("io.element.msc4308.thread_subscriptions", "org.matrix.msc4354.sticky_events"),
            )
        }
        window = {
            "ranges": [[0, 20]],
            "timeline_limit": 20,
            "required_state": [
                ["m.room.name", ""],
                ["m.room.member", "$LAZY"],
                ["m.room.member", "$ME"],
                ["m.room.create", ""],
            ],
            "filters": {"is_invite": False, "not_room_types": ["m.space"]},
        }
        for who in ("bob", "alice's phone"):
            for wanted in ({}, extensions):
                conn = f"c{len(wanted)}"
                body: JsonDict = {
                    "conn_id": conn,
                    "lists": {"all": window},
                    "room_subscriptions": {
                        room: {"timeline_limit": 5, "required_state": [["*", "*"]]}
                    },
                    "extensions": wanted,
                }
                answer = self(who, "POST", SLIDING, body, note=f"first {conn}")
                pos, since = (
                    answer.get("pos"),
                    answer.get("extensions", {}).get("to_device", {}).get("next_batch"),
                )
                self.send(
                    "alice",
                    room,
                    "m.room.message",
                    {"msgtype": "m.text", "body": "slide"},
                    **STICKY,
                )
                self(
                    "alice",
                    "PUT",
                    f"{V3}/rooms/{quote(room)}/typing/{quote(self.user_id('alice'))}",
                    {"typing": not wanted, "timeout": TYPING_MS},
                )
                time.sleep(0.2)
                if wanted and since:
                    body["extensions"] = {**wanted, "to_device": {"enabled": True, "since": since}}
                answer = self(
                    who, "POST", SLIDING, body, note=f"next {conn}", pos=pos, timeout=2000
                )
                self(
                    who,
                    "POST",
                    SLIDING,
                    body,
                    note=f"quiet {conn}",
                    pos=answer.get("pos"),
                    timeout=0,
                )
        lists = {
            "lists": {
                "all": {
                    **window,
                    "filters": {"is_dm": True, "is_encrypted": False, "room_types": [None]},
                }
            }
        }
        self("alice", "POST", SLIDING, lists, note="filters")
        for body in (
            {},
            {"lists": {"a": {"ranges": [[0, 1]]}}},
            {"extensions": extensions},
            {"lists": 1},
        ):
            self("alice", "POST", SLIDING, body, note="odd")
        self("alice", "POST", SLIDING, {"extensions": {"unknown": {"enabled": True}}})
        self("alice", "POST", SLIDING, {}, pos="nonsense")

    def avatar(self) -> None:
        """Before there are rooms, since their memberships follow later."""
        png = {"Content-Type": "image/png"}
        upload = "/_matrix/media/v3/upload"
        uploaded = self("alice", "POST", upload, content=PNG, headers=png, filename="a.png")
        uri = self.ids["uri"] = uploaded.get("content_uri", "mxc://a/b")
        path = f"{V3}/profile/{quote(self.user_id('alice'))}/avatar_url"
        self("alice", "PUT", path, {"avatar_url": uri})

    def media(self) -> None:
        """Upload, download, list and quarantine."""
        media = self.ids["uri"].removeprefix("mxc://")
        room, user = quote(self.ids["room"]), quote(self.user_id("alice"))
        content = {"msgtype": "m.image", "body": "a", "url": self.ids["uri"]}
        self.send("alice", self.ids["room"], "m.room.message", content, **STICKY)
        self("alice", "GET", f"{V1}/media/config")
        self("alice", "GET", f"{V1}/media/download/{media}")
        self("alice", "GET", f"{V1}/media/thumbnail/{media}", width=32, height=32)
        self("", "GET", f"/_matrix/media/v3/download/{media}")
        self("alice", "POST", "/_matrix/media/v1/create")
        self("alice", "GET", f"{V1}/media/preview_url", url=f"{self.elsewhere.url}/page")
        self("admin", "GET", f"{ADMIN}/v1/media/{media}")
        self("admin", "GET", f"{ADMIN}/v1/room/{room}/media")
        self("admin", "POST", f"{ADMIN}/v1/room/{room}/media/quarantine")
        self("admin", "GET", f"{ADMIN}/v1/users/{user}/media")

    def membership(self) -> None:
        """Knock, invite, kick, ban, leave, forget, ignore."""
        knock = quote(self.ids["knock"])
        self("bob", "POST", f"{V3}/knock/{knock}", {"reason": "please"})
        self("alice", "POST", f"{V3}/rooms/{knock}/invite", {"user_id": self.user_id("bob")})
        invited = self(
            "bob",
            "GET",
            f"{V3}/sync",
            note="invited",
            filter=json.dumps({"room": {"timeline": {"limit": 1}}}),
        )
        self(
            "bob",
            "POST",
            SLIDING,
            {
                "lists": {
                    "i": {
                        "ranges": [[0, 9]],
                        "timeline_limit": 1,
                        "required_state": [],
                        "filters": {"is_invite": True},
                    }
                }
            },
        )
        sticky = self.send(
            "alice",
            self.ids["knock"],
            "m.room.message",
            {"msgtype": "m.text", "body": "k"},
            **STICKY,
        )
        self("bob", "POST", f"{V3}/join/{knock}")
        self("bob", "GET", f"{V3}/rooms/{knock}/event/{quote(sticky)}")
        self("bob", "GET", f"{V3}/sync", note="joined", since=invited.get("next_batch"))
        self(
            "alice",
            "POST",
            f"{V3}/rooms/{knock}/kick",
            {"user_id": self.user_id("bob"), "reason": "no"},
        )
        self("alice", "POST", f"{V3}/rooms/{knock}/ban", {"user_id": self.user_id("bob")})
        self("bob", "POST", f"{V3}/join/{knock}")
        self("bob", "GET", f"{V3}/sync", note="banned", since=invited.get("next_batch"))
        self("alice", "POST", f"{V3}/rooms/{knock}/unban", {"user_id": self.user_id("bob")})
        room = quote(self.ids["room"])
        self("carol", "POST", f"{V3}/rooms/{room}/leave")
        self("carol", "GET", f"{V3}/rooms/{room}/messages", dir="b")
        self("carol", "POST", f"{V3}/rooms/{room}/forget")
        self("carol", "POST", f"{V3}/rooms/{room}/join")
        user = quote(self.user_id("carol"))
        ignored: JsonDict = {"ignored_users": {self.user_id("alice"): {}}}
        self("carol", "PUT", f"{V3}/user/{user}/account_data/m.ignored_user_list", ignored)
        self("carol", "GET", f"{V3}/sync", note="ignoring")

    def bridge(self) -> None:
        """An application service and a user of its own."""
        self.tokens["bridge"] = AS_TOKEN
        ghost = self.user_id("ghost")
        self(
            "bridge",
            "POST",
            f"{V3}/register",
            {"type": "m.login.application_service", "username": "ghost", "inhibit_login": True},
        )
        self(
            "bridge",
            "POST",
            f"{V3}/login",
            {
                "type": "m.login.application_service",
                "identifier": {"type": "m.id.user", "user": "ghost"},
            },
        )
        room = quote(self.ids["room"])
        self("bridge", "GET", f"{V3}/account/whoami")
        self("bridge", "GET", f"{V3}/account/whoami", user_id=ghost)
        as_ghost: JsonDict = {"user_id": ghost}
        for params in ({}, as_ghost):
            self("bridge", "POST", f"{V3}/join/{room}", **params)
            self(
                "bridge",
                "PUT",
                f"{V3}/rooms/{room}/send/m.room.message/{secrets.token_hex(8)}",
                {"msgtype": "m.text", "body": "from the bridge"},
                **params,
                **STICKY,
            )
            self(
                "bridge",
                "PUT",
                f"{V3}/rooms/{room}/send/m.room.message/{secrets.token_hex(8)}",
                {"msgtype": "m.text", "body": "bridged"},
                ts=1_700_000_000_000,
                **params,
                **STICKY,
            )
            self("bridge", "GET", f"{V3}/rooms/{room}/messages", dir="b", **params)
            self("bridge", "GET", f"{V3}/joined_rooms", **params)
        self("bridge", "GET", f"{V3}/sync", user_id=ghost)
        self("bridge", "GET", f"{V3}/sync")
        self("bridge", "PUT", f"{V3}/devices/GHOST", user_id=ghost)
        self("bridge", "POST", f"{V3}/keys/query", {"device_keys": {ghost: []}}, user_id=ghost)
        self(
            "bridge",
            "PUT",
            f"{V3}/presence/{quote(ghost)}/status",
            {"presence": "online"},
            user_id=ghost,
        )
        self("bridge", "POST", f"{V1}/appservice/bridge/ping", {"transaction_id": "x"})
        self("bridge", "PUT", f"{V3}/directory/list/appservice/n/{room}", {"visibility": "public"})
        self("bob", "GET", f"{V3}/join/{quote('#bridge-unknown:' + self.hs.server_name)}")
        self("bob", "GET", f"{V3}/directory/room/{quote('#bridge-unknown:' + self.hs.server_name)}")
        for path in (
            "protocols",
            "protocol/irc",
            "protocol/none",
            "user/irc",
            "location/irc",
            "user",
            "location",
        ):
            self(
                "bob",
                "GET",
                f"{V3}/thirdparty/{path}",
                userid=ghost,
                alias=f"#bridge-a:{self.hs.server_name}",
            )

    def profile_and_directory(self) -> None:
        """Profiles, and finding users."""
        user = quote(self.user_id("alice"))
        self("alice", "PUT", f"{V3}/profile/{user}/displayname", {"displayname": "Alice A."})
        for path in (
            f"{V3}/profile/{user}",
            f"{V3}/profile/{user}/displayname",
            f"{V3}/profile/{user}/avatar_url",
        ):
            self("bob", "GET", path)
        self(
            "alice",
            "PUT",
            f"{UNSTABLE}/uk.tcpip.msc4133/profile/{user}/m.tz",
            {"m.tz": "Europe/Berlin"},
        )
        self("bob", "GET", f"{V3}/profile/{user}/m.tz")
        for term in ("Alice", "bob", "guest", "nobody"):
            self("bob", "POST", f"{V3}/user_directory/search", {"search_term": term, "limit": 5})
        self(
            "bob",
            "PUT",
            f"{V3}/directory/list/room/{quote(self.ids['room'])}",
            {"visibility": "private"},
        )

    def upgrade(self) -> None:
        """Upgrade the room."""
        room = quote(self.ids["room"])
        self("bob", "POST", f"{V3}/rooms/{room}/upgrade", {"new_version": "10"})
        made = self("alice", "POST", f"{V3}/rooms/{room}/upgrade", {"new_version": "11"})
        new = self.ids["new"] = made.get("replacement_room", "missing")
        self("bob", "POST", f"{V3}/join/{quote(new)}")
        self("alice", "GET", f"{V3}/rooms/{quote(new)}/state")
        self.send("alice", new, "m.room.message", {"msgtype": "m.text", "body": "new"}, **STICKY)
        self(
            "bob",
            "GET",
            f"{V3}/sync",
            note="after the upgrade",
            filter=json.dumps({"room": {"rooms": [new]}}),
        )

    def administration(self) -> None:
        """Synapse's admin API."""
        room, alice = quote(self.ids["room"]), quote(self.user_id("alice"))
        sticky = quote(self.ids["sticky"])
        a1, a2 = f"{ADMIN}/v1", f"{ADMIN}/v2"
        now = int(time.time() * 1000)
        reports = self("admin", "GET", f"{a1}/event_reports", recorded=False)["event_reports"]
        report = reports[0]["id"] if reports else "missing"
        for path in (
            f"{a1}/server_version",
            f"{a1}/rooms",
            f"{a1}/rooms?search_term=room",
            f"{a1}/rooms/{room}",
            f"{a1}/rooms/{room}/members",
            f"{a1}/rooms/{room}/state",
            f"{a1}/rooms/{room}/messages?dir=b&limit=100",
            f"{a1}/rooms/{room}/messages?dir=f",
            f"{a1}/rooms/{room}/context/{sticky}",
            f"{a1}/rooms/{room}/timestamp_to_event?ts={now}&dir=b",
            f"{a1}/rooms/{room}/forward_extremities",
            f"{a1}/rooms/{quote(self.ids['space'])}/hierarchy",
            f"{a1}/rooms/{room}/block",
            f"{a1}/rooms/{quote(self.ids['secret'])}/messages?dir=b",
            f"{a1}/rooms/{quote(self.ids['secret'])}/context/{quote(self.ids['secret sticky'])}",
            f"{a1}/fetch_event/{sticky}",
            f"{a1}/fetch_event/{quote(self.ids['gone'])}",
            f"{a1}/event_reports",
            f"{a1}/event_reports/{report}",
            f"{a1}/user_reports",
            f"{a2}/users",
            f"{ADMIN}/v3/users",
            f"{a2}/users/{alice}",
            f"{a1}/whois/{alice}",
            f"{a1}/users/{alice}/joined_rooms",
            f"{a1}/users/{alice}/memberships",
            f"{a1}/users/{alice}/accountdata",
            f"{a1}/users/{alice}/pushers",
            f"{a2}/users/{alice}/devices",
            f"{a1}/users/{alice}/override_ratelimit",
            f"{a1}/users/{alice}/sent_invite_count?from_ts=0",
            f"{a1}/users/{alice}/cumulative_joined_room_count?from_ts=0",
            f"{a1}/users/{alice}/admin",
            f"{a1}/statistics/users/media",
            f"{a1}/statistics/database/rooms",
            f"{a1}/background_updates/status",
            f"{a1}/background_updates/enabled",
            f"{a1}/federation/destinations",
            f"{a1}/registration_tokens",
            f"{a1}/experimental_features/{alice}",
            f"{a1}/scheduled_tasks",
            f"{a1}/username_available?username=x",
        ):
            self("admin", "GET", path)
        self("alice", "GET", f"{a1}/rooms", note="not an admin")
        self(
            "admin",
            "POST",
            f"{a1}/background_updates/start_job",
            {"job_name": "populate_stats_process_rooms"},
        )
        self("admin", "POST", f"{a1}/registration_tokens/new")
        notice = {
            "user_id": self.user_id("bob"),
            "content": {"msgtype": "m.text", "body": "notice"},
        }
        self("admin", "POST", f"{a1}/send_server_notice", notice)
        self("bob", "GET", f"{V3}/sync", note="with a notice")
        self("admin", "POST", f"{a1}/join/{room}", {"user_id": self.user_id("dave")})
        self(
            "admin",
            "POST",
            f"{a1}/rooms/{quote(self.ids['direct'])}/make_room_admin",
            {"user_id": self.user_id("bob")},
        )
        self(
            "admin",
            "PUT",
            f"{a2}/users/{quote(self.user_id('erin'))}",
            {"password": "x" * 10, "displayname": "Erin"},
        )
        self("admin", "POST", f"{a1}/users/{quote(self.user_id('erin'))}/login")
        self("admin", "POST", f"{a1}/users/{quote(self.user_id('erin'))}/shadow_ban")
        self("admin", "PUT", f"{a1}/suspend/{quote(self.user_id('erin'))}", {"suspend": True})
        self(
            "admin",
            "POST",
            f"{a1}/reset_password/{quote(self.user_id('erin'))}",
            {"new_password": "y" * 10},
        )
        redact = self(
            "admin", "POST", f"{a1}/user/{quote(self.user_id('dave'))}/redact", {"rooms": []}
        )
        self.wait(f"{a1}/user/redact_status/{redact.get('redact_id')}")
        purge = self(
            "admin",
            "POST",
            f"{a1}/purge_history/{room}",
            {"purge_up_to_ts": now, "delete_local_events": True},
        )
        self.wait(f"{a1}/purge_history_status/{purge.get('purge_id')}")
        for who in ("bob", "alice"):
            self(who, "GET", f"{V3}/rooms/{room}/messages", note="after the purge", dir="b")
            self(who, "GET", f"{V3}/sync", note="after the purge")
        self(
            "bob",
            "POST",
            SLIDING,
            {"lists": {"i": {"ranges": [[0, 9]], "timeline_limit": 5, "required_state": []}}},
            note="after the purge",
        )
        self("admin", "GET", f"{a1}/rooms/{room}/forward_extremities")
        deleted = self(
            "admin",
            "DELETE",
            f"{a2}/rooms/{room}",
            {"purge": True, "block": True, "message": "gone"},
        )
        self.wait(f"{a2}/rooms/delete_status/{deleted.get('delete_id')}")
        for who in ("bob", "alice"):
            self(who, "GET", f"{V3}/sync", note="after the deletion")
            self(who, "GET", f"{V3}/rooms/{room}/event/{sticky}")
        self("admin", "DELETE", f"{a1}/rooms/{quote(self.ids['knock'])}", {"purge": False})
        self("admin", "POST", f"{a1}/deactivate/{quote(self.user_id('dave'))}", {"erase": True})

    def ending(self) -> None:
        """Log out and deactivate."""
        self("alice's phone", "POST", f"{V3}/logout")
        self(
            "alice",
            "GET",
            f"{V3}/sync",
            note="after the phone",
            filter=json.dumps({"room": {"rooms": []}}),
        )
        auth = {
            "type": "m.login.password",
            "identifier": {"type": "m.id.user", "user": "carol"},
            "password": "pass word carol",
        }
        self("carol", "POST", f"{V3}/account/deactivate", {"auth": auth, "erase": True})
        self("bob", "POST", f"{V3}/logout/all")
        self("bob", "GET", f"{V3}/sync", note="logged out")


@contextlib.contextmanager
def everyday(directory: Path, *, module: bool, **arguments: Any) -> Iterator[Everyday]:
    """A server in a configuration as operators have it."""
    elsewhere = Elsewhere()
    homeserver = Homeserver(directory=directory, module=module, as_shipped=True, **arguments)
    homeserver.reconfigure(extra_config=configuration(directory, elsewhere, homeserver.server_name))
    try:
        homeserver.start()
        yield Everyday(homeserver, elsewhere)
    finally:
        homeserver.close()
        elsewhere.close()
