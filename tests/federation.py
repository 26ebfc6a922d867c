"""What the tests between servers need: rooms that all can join, and what each server has."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from harness.client import Client, MatrixError, quote
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually


def create_room(creator: Client, visibility: str = "shared", **arguments: Any) -> str:
    """A public room that all of the servers can join, whatever their release."""
    event = {
        "type": "m.room.history_visibility",
        "state_key": "",
        "content": {"history_visibility": visibility},
    }
    return creator.create_room(
        preset="public_chat", room_version="10", initial_state=[event], **arguments
    )


def join_via(user: Client, room_id: str, homeserver: Homeserver) -> None:
    """Join through a server, once this one no longer backs off from it after an earlier test."""

    def joined() -> bool:
        try:
            user.join(room_id, via=[homeserver.server_name])
        except MatrixError as error:
            if error.status in (404, 502):
                return False
            raise
        return True

    eventually(joined, 30, f"{user.user_id} joining", interval_s=0.5)


def stored(homeserver: Homeserver, room_id: str) -> set[str]:
    """The events of a room that a server has, other than as outliers or soft-failed."""
    rows = homeserver.query(
        "SELECT e.event_id FROM events AS e INNER JOIN event_json AS j USING (event_id) "
        "WHERE e.room_id = ? AND NOT e.outlier AND e.rejection_reason IS NULL "
        "AND j.internal_metadata NOT LIKE ?",
        room_id,
        "%soft_failed%",
    )
    return {event_id for (event_id,) in rows}


def wait_until_stored(
    homeserver: Homeserver, room_id: str, event_ids: Iterable[str], timeout_s: float = 30
) -> None:
    """Wait until a server has these events."""
    wanted = set(event_ids)

    def has_all() -> bool:
        missing = wanted - stored(homeserver, room_id)
        assert not missing, f"{len(missing)} of {len(wanted)} are missing"
        return True

    eventually(has_all, timeout_s, f"{homeserver.server_name} having the events", interval_s=0.2)


def wait_until_joined(homeserver: Homeserver, room_id: str, user_id: str) -> None:
    """Wait until a server knows that somebody is joined."""
    eventually(
        lambda: homeserver.query(
            "SELECT 1 FROM current_state_events WHERE room_id = ? AND state_key = ? "
            "AND membership = 'join'",
            room_id,
            user_id,
        ),
        20,
        f"{user_id} joined on {homeserver.server_name}",
    )


def receipts(remote: RemoteServer, event_ids: Iterable[str]) -> dict[str, int]:
    """How often the server was sent each of these events, taken or not."""
    wanted = set(event_ids)
    return dict(
        Counter(e.event_id for pdus in remote.transactions for e in pdus if e.event_id in wanted)
    )


def wait_until_received(
    remote: RemoteServer, event_ids: Iterable[str], times: int = 1, timeout_s: float = 30
) -> None:
    """Wait until the tests' own server took each of these that often."""
    wanted = list(event_ids)

    def all_came() -> bool:
        came = Counter(event.event_id for event in remote.received)
        missing = [event_id for event_id in wanted if came[event_id] < times]
        assert not missing, f"{len(missing)} of {len(wanted)} did not come"
        return True

    eventually(all_came, timeout_s, "events at the tests' own server")


def purge_room(homeserver: Homeserver, admin: Client, room: str) -> None:
    """Delete a room, and wait until nothing of it is left in Synapse's tables."""
    path = f"/_synapse/admin/v2/rooms/{quote(room)}"
    deletion = admin.request("DELETE", path, json={"purge": True})["delete_id"]
    status = f"/_synapse/admin/v2/rooms/delete_status/{deletion}"
    eventually(lambda: admin.request("GET", status)["status"] == "complete", what="the deletion")
    assert not homeserver.query("SELECT 1 FROM events WHERE room_id = ?", room)
