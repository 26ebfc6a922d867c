"""A server with a bit of everything on it, for the page to show."""

from dataclasses import dataclass
from urllib.parse import quote

from harness.client import Client, JsonDict
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.federation import create_room, join_via, wait_until_stored
from tests.support import HOUR_MS, SETTINGS

API = "/_synapse/client/synapse_sticky/admin/v1"
MEMBER = "org.matrix.msc4143.rtc.member"
MINUTE_MS = 60_000


@dataclass
class World:
    """Users and rooms of a server that is in a federation.

    Attributes:
        admin: whose token signs in.
        peer: another Synapse, which is sent everything.
        owed: a server that takes nothing any more.
        away: a server that does not answer any more.
        call: a room of all four servers, in which three users are in a call.
    """

    homeserver: Homeserver
    peer: Homeserver
    admin: Client
    alice: Client
    bob: Client
    carol: Client
    owed: RemoteServer
    away: RemoteServer
    call: str

    @property
    def page_url(self) -> str:
        """The address of the page."""
        return f"{self.homeserver.main_url}{API}/page"

    def get(self, path: str, **params: object) -> JsonDict:
        """The answer of the API."""
        return self.admin.request("GET", f"{API}/{path}", params=params)

    def put(self, path: str, body: JsonDict) -> JsonDict:
        """The answer of the API to a decision."""
        return self.admin.request("PUT", f"{API}/{path}", json=body)

    def settle(self) -> None:
        """Take every decision of a test back."""
        for block in self.get("blocks")["blocks"]:
            subject = quote(block["subject"], safe="")
            self.put(f"{block['kind']}s/{subject}/settings", {"enabled": None})
        for room in self.get("rooms", limit=1000)["rooms"]:
            if room["enabled_by"] == "admin":
                self.put(room_path(room["room_id"], "/settings"), {"enabled": None})


def room_path(room_id: str, rest: str = "") -> str:
    """The path of a room in the API."""
    return f"rooms/{quote(room_id, safe='')}{rest}"


def named_room(creator: Client, name: str, **arguments: str) -> str:
    """A public room with a name."""
    room_id = create_room(creator, **arguments)
    creator.send_state(room_id, "m.room.name", {"name": name})
    return room_id


def be_in_call(client: Client, room_id: str, device: str, minutes: float = 60) -> str:
    """Send a membership of a call, as Element Call does."""
    content = {
        "msc4354_sticky_key": f"{device}",
        "application": {"type": "m.call"},
        "slot_id": "m.call#ROOM",
        "member": {"claimed_user_id": client.user_id, "claimed_device_id": device},
    }
    return client.send(room_id, content, type=MEMBER, sticky_ms=int(minutes * MINUTE_MS))


def make_world(
    homeserver: Homeserver, peer: Homeserver, owed: RemoteServer, away: RemoteServer
) -> World:
    """Register the users, create the rooms, and wait until everything is as it is to be shown."""
    admin = homeserver.register("root", admin=True)
    alice, bob = homeserver.register("alice"), homeserver.register("bob")
    carol = peer.register("carol")
    call = named_room(alice, "Friday stand-up", room_alias_name="standup")
    bob.join(call)
    join_via(carol, call, homeserver)
    world = World(homeserver, peer, admin, alice, bob, carol, owed, away, call)
    owed.join(homeserver, call, "dave")
    away.join(homeserver, call, "erin")
    sent = [be_in_call(alice, call, "LAPTOP"), be_in_call(bob, call, "PHONE", 52)]
    wait_until_stored(peer, call, sent)
    for remote in (owed, away):
        for event_id in sent:
            remote.wait_for(event_id)
    owed.judge = lambda event: None
    away.online = False
    be_in_call(alice, call, "TABLET", 40)
    of_carol = be_in_call(carol, call, "DESKTOP", 46)
    wait_until_stored(homeserver, call, [of_carol])
    _other_rooms(world)

    def as_shown() -> bool:
        # Synapse backs off from a server that its own sending does not reach.
        alice.send(call)
        listed = world.get(room_path(call, "/servers"))["servers"]
        servers = {server["server_name"]: server for server in listed}
        assert servers[away.server_name]["failing_since_ts"] is not None
        assert servers[owed.server_name]["reason"] == "trying"
        assert servers[owed.server_name]["obstacle"]
        assert peer.server_name not in servers
        return True

    eventually(as_shown, 90, "the states of the servers", interval_s=1)
    return world


def _other_rooms(world: World) -> None:
    alice, bob = world.alice, world.bob
    games = named_room(bob, "Board games")
    for key in ("white", "black"):
        content = {"msc4354_sticky_key": key, "ready": key == "white"}
        bob.send(games, content, type="org.example.seat", sticky_ms=HOUR_MS // 2)
    quiet = named_room(alice, "Announcements")
    be_in_call(alice, quiet, "LAPTOP")
    alice.send_state(quiet, SETTINGS, {"enabled": False})
    secret = named_room(bob, "Works council")
    bob.send(secret, {"ciphertext": "x"}, type="m.room.encrypted", sticky_ms=HOUR_MS)
    plain = alice.create_room()
    alice.send(plain, sticky_ms=HOUR_MS // 3)
