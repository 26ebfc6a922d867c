"""With the module, every answer is what it is without it, plus the sticky events.

Two servers have the same database, one of them the module: whatever a client asks for, both
answer the same.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from harness.client import SLIDING_SYNC_PATH, Client, JsonDict, MatrixError, quote
from harness.homeserver import Homeserver
from harness.wait import eventually
from tests.support import (
    REMAINING_KEY,
    SYNC_SECTION,
    all_sticky_in,
    ids,
    send_plain,
    send_sticky,
    sticky_in,
    timeline_in,
)

pytestmark = [pytest.mark.slow, pytest.mark.deployments("sqlite")]

AS_TOKEN = "token-of-the-bridge"
EXTENSION = "org.matrix.msc4354.sticky_events"
# The slot of stream tokens that the module uses.
SLOT = 8


class World:
    """Users, rooms and events, and two servers that have them, one of them with the module."""

    def __init__(self, directory: Path) -> None:
        self.ours = Homeserver(directory=directory / "ours")
        self.plain = Homeserver(directory=directory / "plain", module=False)
        self.ours.directory.mkdir()
        self._allow_guests_and_a_bridge()
        self.ours.start()
        self.alice, carol, dave, bob = (self.ours.register() for _ in range(4))
        self.readers = {
            "bob": bob,
            "his tablet": bob.second_device(),
            "ignoring": self.ours.register(),
            "guest": self._guest(),
            "bridge": self._bridge("bridge"),
            "bridged": self._bridge("bridged"),
        }
        # Who the client is when it says no more than its token.
        self.parameters: dict[str, JsonDict] = {name: {} for name in self.readers}
        self.parameters["bridged"] = {"user_id": self.readers["bridged"].user_id}
        self.parameters["bridged device"] = {
            **self.parameters["bridged"],
            "org.matrix.msc3202.device_id": "BRIDGED",
            "device_id": "BRIDGED",
        }
        self.readers["bridged device"] = self.readers["bridged"]
        self.senders = {carol.user_id, dave.user_id}
        self.readers["ignoring"].set_ignored_users([dave.user_id])
        # What each reader is to get, in order.
        self.sticky: dict[str, list[tuple[str, str]]] = {}
        self.tokens: dict[str, list[str | None]] = {name: [None] for name in self.readers}
        self._fill(carol, dave)
        eventually(self._are_counts_right, 90, "the counts of unread messages")
        self.ours.stop()
        shutil.copytree(self.ours.directory, self.plain.directory, dirs_exist_ok=True)
        self.plain.reconfigure(extra_config=self._extra_config)
        for homeserver in (self.ours, self.plain):
            homeserver.start()

    def _are_counts_right(self) -> bool:
        """Whether Synapse will not correct them on one server before it does on the other.

        It sums them up every half minute. Receipts after the first time count from the next on.
        """
        summed = self.ours.query("SELECT stream_ordering FROM event_push_summary_stream_ordering")
        unread = self.ours.query(
            "SELECT 1 FROM receipts_linearized WHERE stream_id > "
            "(SELECT stream_id FROM event_push_summary_last_receipt_stream_id)"
        )
        return summed == [(0,)] or not unread

    def close(self) -> None:
        """Stop both."""
        self.ours.close()
        self.plain.close()

    def _allow_guests_and_a_bridge(self) -> None:
        registration = self.ours.directory / "bridge.yaml"
        registration.write_text(
            yaml.safe_dump(
                {
                    "id": "bridge",
                    "url": None,
                    "as_token": AS_TOKEN,
                    "hs_token": "token of the homeserver",
                    "sender_localpart": "bridge",
                    "namespaces": {"users": [{"exclusive": True, "regex": "@bridge.*"}]},
                    "rate_limited": False,
                    "io.element.msc4190": True,
                }
            )
        )
        self._extra_config = {
            "allow_guest_access": True,
            "app_service_config_files": [str(registration)],
            "experimental_features": {"msc3202_device_masquerading": True, "msc4222_enabled": True},
        }
        self.ours.reconfigure(extra_config=self._extra_config)

    def _guest(self) -> Client:
        answer = self.ours.http.post(
            f"{self.ours.main_url}/_matrix/client/v3/register", params={"kind": "guest"}, json={}
        ).json()
        return Client(self.ours, answer["user_id"], answer["access_token"], answer["device_id"], "")

    def _bridge(self, localpart: str) -> Client:
        user_id = f"@{localpart}:{self.ours.server_name}"
        bridge = Client(self.ours, user_id, AS_TOKEN, "", "")
        if localpart != "bridge":
            body = {
                "type": "m.login.application_service",
                "username": localpart,
                "inhibit_login": True,
            }
            bridge.request("POST", "/_matrix/client/v3/register", json=body)
            bridge.request(
                "PUT",
                "/_matrix/client/v3/devices/BRIDGED",
                json={},
                params={"user_id": user_id},
            )
        return bridge

    def ask(
        self, homeserver: Homeserver, name: str, method: str, path: str, **request: Any
    ) -> JsonDict:
        """What a server answers a reader."""
        reader = self.readers[name].via(homeserver.main_url)
        params = {**self.parameters[name], **request.pop("params", {})}
        return reader.request(method, path, params=params, **request)

    def sync(self, homeserver: Homeserver, name: str, **params: Any) -> JsonDict:
        """A server's answer of `/sync` to a reader."""
        return self.ask(homeserver, name, "GET", "/_matrix/client/v3/sync", params=params)

    def _join(self, room_id: str) -> None:
        for name in self.readers:
            path = f"/_matrix/client/v3/join/{quote(room_id)}"
            self.ask(self.ours, name, "POST", path, json={})

    def _remember_tokens(self) -> None:
        for name, tokens in self.tokens.items():
            # Synapse refuses the bridge itself, whatever it asks for.
            is_refused = name == "bridge"
            tokens.append(None if is_refused else self.sync(self.ours, name)["next_batch"])

    def _room(self, **arguments: Any) -> str:
        can_join = {
            "type": "m.room.guest_access",
            "state_key": "",
            "content": {"guest_access": "can_join"},
        }
        return self.alice.create_room(
            preset="public_chat", initial_state=[can_join], settle=False, **arguments
        )

    def _fill(self, carol: Client, dave: Client) -> None:
        busy, quiet, late, plain, left = rooms = [
            self._room(**({"name": "Busy"} if number == 0 else {})) for number in range(5)
        ]
        self.rooms = rooms[:3]
        for room_id in rooms:
            for sender in (carol, dave):
                sender.join(room_id)
            if room_id != late:
                self._join(room_id)
        # Somebody else's membership is the newest event nowhere.
        for room_id in rooms:
            send_plain(self.alice, room_id, 2)
        self._remember_tokens()
        sent = [(busy, *send_sticky(carol, busy)), (late, *send_sticky(carol, late))]
        send_plain(self.alice, busy, 3)
        self.alice.send(busy, {"v": 1}, type="org.example.plain")
        self.alice.send_state(busy, "org.example.state", {"v": 1})
        sent += [(busy, *send_sticky(dave, busy)), (quiet, *send_sticky(carol, quiet))]
        self._remember_tokens()
        self._join(late)
        send_plain(self.alice, late, 1)
        for name in self.readers:
            path = f"/_matrix/client/v3/rooms/{quote(left)}/leave"
            if name in ("bob", "ignoring", "guest", "bridge", "bridged"):
                self.ask(self.ours, name, "POST", path, json={})
        send_sticky(carol, left)
        sent += [(busy, *send_sticky(carol, busy))]
        (last,) = send_plain(self.alice, busy, 1)
        user = quote(self.readers["bob"].user_id)
        self.readers["bob"].request(
            "PUT", f"/_matrix/client/v3/user/{user}/rooms/{quote(quiet)}/tags/m.favourite", json={}
        )
        self.readers["bob"].request(
            "POST", f"/_matrix/client/v3/rooms/{quote(plain)}/receipt/m.read/{quote(last)}", json={}
        )
        for name in self.readers:
            ignored = [event_id for _, event_id in sent if event_id == sent[2][1]]
            self.sticky[name] = [
                (room_id, event_id)
                for room_id, event_id in sent
                if name != "ignoring" or event_id not in ignored
            ]
        self._remember_tokens()


def normal(value: Any, is_ordered: bool = False) -> Any:
    """An answer without times, without the module's part of tokens, and in one order."""
    if isinstance(value, list):
        items = [normal(item, is_ordered) for item in value]
        return items if is_ordered else sorted(items, key=lambda item: json.dumps(item))
    if not isinstance(value, dict):
        return value
    result: JsonDict = {}
    for key, item in value.items():
        if key in ("next_batch", "prev_batch", "pos"):
            parts = item.split("_")
            parts[SLOT : SLOT + 1] = ["0"] if len(parts) > SLOT else []
            result[key] = "_".join(parts)
        elif key not in ("age", "age_ts", REMAINING_KEY):
            result[key] = normal(item, is_ordered or key == "timeline")
    if result.get("unsigned") == {}:
        del result["unsigned"]
    return result


def without_senders(answer: JsonDict, senders: set[str]) -> JsonDict:
    """An answer without the memberships of these, which are loaded for the section."""
    answer = copy.deepcopy(answer)
    for room in answer.get("rooms", {}).get("join", {}).values():
        for name in ("state", "state_after", "org.matrix.msc4222.state_after"):
            if name in room:
                events = room[name]["events"]
                events[:] = [e for e in events if e.get("state_key") not in senders]
    # As Synapse does for those that it loads itself.
    changed = [u for u in answer.get("device_lists", {}).get("changed", []) if u not in senders]
    if changed:
        answer["device_lists"]["changed"] = sorted(changed)
    else:
        answer.pop("device_lists", None)
    return answer


def without_sections(answer: JsonDict, plain: JsonDict) -> JsonDict:
    """An answer without sections, and without rooms that are there for the section only."""
    answer = copy.deepcopy(answer)
    rooms = answer.get("rooms", {}).get("join", {})
    for room_id, room in list(rooms.items()):
        section = room.pop(SYNC_SECTION, None)
        if section is None or room_id in plain.get("rooms", {}).get("join", {}):
            continue
        assert section["events"]
        assert set(room["unread_notifications"]) == {"notification_count", "highlight_count"}
        for name in set(room) - {"timeline", "unread_notifications", "summary"}:
            assert room[name] in ({"events": []}, {}, 0), (name, room)
        assert room["timeline"]["events"] == []
        assert room["timeline"]["prev_batch"]
        del rooms[room_id]
    if "join" in answer.get("rooms", {}) and not rooms:
        del answer["rooms"]["join"]
    if "rooms" in answer and not answer["rooms"]:
        del answer["rooms"]
    return answer


def filters(rooms: list[str], senders: list[str]) -> st.SearchStrategy[JsonDict | None]:
    """Filters, many of which leave nothing but the section."""
    types = st.sampled_from([[], ["m.room.message"], ["org.example.*"], ["m.room.*"], ["*"]])
    events = {
        "types": types,
        "not_types": types,
        "senders": st.sampled_from([[], senders[:1], senders]),
        "not_senders": st.sampled_from([[], senders[:1]]),
        "rooms": st.sampled_from([[], rooms[:1], rooms]),
        "not_rooms": st.sampled_from([[], rooms[:1]]),
        "contains_url": st.booleans(),
    }
    lazy = {"lazy_load_members": st.booleans(), "include_redundant_members": st.booleans()}
    limit = {"limit": st.sampled_from([0, 1, 2, 10])}
    threads = {"unread_thread_notifications": st.booleans()}
    nothing = st.sampled_from([{"types": []}, {"not_types": ["*"]}, {"limit": 0, "types": []}])
    room = st.fixed_dictionaries(
        {},
        optional={
            "rooms": st.sampled_from([rooms, rooms[:1], rooms[1:], []]),
            "not_rooms": events["not_rooms"],
            "timeline": nothing
            | st.fixed_dictionaries({}, optional={**events, **limit, **threads, **lazy}),
            "state": nothing | st.fixed_dictionaries({}, optional={**events, **lazy}),
            "ephemeral": nothing | st.fixed_dictionaries({}, optional=events),
            "account_data": nothing | st.fixed_dictionaries({}, optional=events),
            "include_leave": st.booleans(),
        },
    )
    fields = [["event_id"], ["event_id", "content.body"], ["type", "unsigned"], ["room_id"]]
    return st.none() | st.fixed_dictionaries(
        {"room": room},
        optional={
            "event_format": st.sampled_from(["client", "federation"]),
            "event_fields": st.sampled_from(fields),
            "account_data": nothing,
        },
    )


def sync_parameters(rooms: list[str], senders: list[str]) -> st.SearchStrategy[JsonDict]:
    """Parameters of `/sync`, but for `since`."""
    flag = st.just("true")
    return st.fixed_dictionaries(
        {"filter": filters(rooms, senders)},
        optional={
            "full_state": flag,
            "use_state_after": flag,
            "org.matrix.msc4222.use_state_after": flag,
            "set_presence": st.sampled_from(["offline", "online"]),
        },
    )


SLIDING = st.fixed_dictionaries(
    {
        "lists": st.dictionaries(
            st.sampled_from(["a", "b"]),
            st.fixed_dictionaries(
                {
                    "ranges": st.sampled_from([[[0, 0]], [[0, 20]], [[90, 90]]]),
                    "timeline_limit": st.sampled_from([0, 1, 10]),
                    "required_state": st.sampled_from(
                        [[], [["m.room.member", "$LAZY"]], [["*", "*"]], [["m.room.name", ""]]]
                    ),
                },
                optional={"filters": st.fixed_dictionaries({"is_encrypted": st.booleans()})},
            ),
        ),
        "extensions": st.fixed_dictionaries(
            {},
            optional={
                EXTENSION: st.fixed_dictionaries(
                    {"enabled": st.booleans()}, optional={"limit": st.integers(1, 3)}
                ),
                "to_device": st.just({"enabled": True}),
                "e2ee": st.just({"enabled": True}),
                "account_data": st.just({"enabled": True}),
                "receipts": st.just({"enabled": True}),
                "typing": st.just({"enabled": True}),
            },
        ),
    },
    optional={"conn_id": st.sampled_from(["one", "two"])},
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two servers that have the same database."""
    with pytest.MonkeyPatch.context() as patch:
        # Some of what Synapse answers depends on the order that sets have.
        patch.setenv("PYTHONHASHSEED", "0")
        world = World(tmp_path_factory.mktemp("same"))
    yield world
    world.close()


def both(world: World, ask: Callable[[Homeserver], JsonDict]) -> tuple[JsonDict, JsonDict]:
    """The answers of the server with the module and of that without it, errors included."""

    def answer(homeserver: Homeserver) -> JsonDict:
        try:
            return ask(homeserver)
        except MatrixError as error:
            note(homeserver.log()[-3000:])
            return {"status": error.status, "body": error.body}

    return answer(world.ours), answer(world.plain)


def differences(ours: Any, plain: Any, path: str = "") -> list[str]:
    """Where two answers differ, and how."""
    if isinstance(ours, dict) and isinstance(plain, dict):
        keys = sorted(ours.keys() | plain.keys())
        return [d for k in keys for d in differences(ours.get(k), plain.get(k), f"{path}/{k}")]
    if isinstance(ours, list) and isinstance(plain, list) and len(ours) == len(plain):
        pairs = enumerate(zip(ours, plain, strict=True))
        return [d for n, (a, b) in pairs for d in differences(a, b, f"{path}/{n}")]
    return [] if ours == plain else [f"{path}: {ours} instead of {plain}"[:500]]


def compare(ours: JsonDict, plain: JsonDict, senders: set[str]) -> None:
    """Compare answers of `/sync`. The memberships of these are loaded for sections."""
    if senders:
        ours, plain = (without_senders(answer, senders) for answer in (ours, plain))
    assert differences(normal(without_sections(ours, plain)), normal(plain)) == []


# Whatever a client asks for, and whoever it is; the same every time the tests run.
ANYTHING = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def test_sync(world: World) -> None:
    # C1, C2, C2a
    sections = 0

    @ANYTHING
    @given(
        name=st.sampled_from(list(world.parameters)),
        # What is sticky is behind the last one.
        which=st.sampled_from([0, 0, 1, 2, 3]),
        params=sync_parameters(world.rooms, sorted(world.senders)),
    )
    def ask(name: str, which: int, params: JsonDict) -> None:
        nonlocal sections
        token = world.tokens[name][which]
        filter_json = params["filter"]
        params = {**params, "filter": filter_json and json.dumps(filter_json)}
        is_lazy = ((filter_json or {})["room"].get("state", {}) if filter_json else {}).get(
            "lazy_load_members", False
        )
        senders = world.senders if is_lazy else set()
        ours, plain = both(world, lambda on: world.sync(on, name, since=token, **params))
        compare(ours, plain, senders)
        if "next_batch" not in ours:
            return
        sections += len(all_sticky_in(ours))
        if token is None:
            fields = (filter_json or {}).get("event_fields", ["event_id"])
            if "event_id" in fields:
                assert_complete(world, name, ours, (filter_json or {}).get("room", {}))
        ours, plain = (
            world.sync(homeserver, name, since=answer["next_batch"], **params)
            for homeserver, answer in ((world.ours, ours), (world.plain, plain))
        )
        compare(ours, plain, senders)
        assert all_sticky_in(ours) == []

    ask()
    assert sections > 10


def assert_complete(world: World, name: str, answer: JsonDict, room_filter: JsonDict) -> None:
    """Every sticky event is in a section or a timeline, and only there where it is not shown."""
    for room_id in world.rooms:
        wanted = [event_id for in_room, event_id in world.sticky[name] if in_room == room_id]
        if room_id not in room_filter.get("rooms", [room_id]):
            wanted = []
        if room_id in room_filter.get("not_rooms", []):
            wanted = []
        shown = ids(timeline_in(answer, room_id))
        assert ids(sticky_in(answer, room_id)) == [e for e in wanted if e not in shown]


def test_sliding_sync(world: World) -> None:
    # C2a, X2
    sections = 0

    @ANYTHING
    @given(name=st.sampled_from(list(world.parameters)), bodies=st.lists(SLIDING, min_size=1))
    def ask(name: str, bodies: list[JsonDict]) -> None:
        nonlocal sections
        pos: tuple[str | None, str | None] = (None, None)
        for body in bodies[:3]:
            answers = both(
                world,
                lambda on, body=body, pos=pos: world.ask(  # type: ignore[misc]
                    *(on, name, "POST", SLIDING_SYNC_PATH),
                    json=body,
                    params={"pos": pos[0] if on is world.ours else pos[1]},
                ),
            )
            sections += len(answers[0].get("extensions", {}).pop(EXTENSION, {}).get("rooms", {}))
            assert differences(*map(normal, answers)) == []
            pos = (answers[0].get("pos"), answers[1].get("pos"))

    ask()
    assert sections > 10
