"""The format of events between servers, in every room version.

This is not left to Synapse's own code, whose interfaces differ from version to version, and
which would not sign the malformed events that the tests are to send.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from canonicaljson import encode_canonical_json
from signedjson.sign import sign_json
from signedjson.types import SigningKey
from unpaddedbase64 import encode_base64

from harness.client import JsonDict

ROOM_VERSIONS = tuple(str(number) for number in range(1, 13))

_KEPT_KEYS = {
    "event_id",
    "type",
    "room_id",
    "sender",
    "state_key",
    "content",
    "hashes",
    "signatures",
    "depth",
    "prev_events",
    "auth_events",
    "origin_server_ts",
}
_POWER_LEVELS = (
    "ban",
    "events",
    "events_default",
    "kick",
    "redact",
    "state_default",
    "users",
    "users_default",
)


@dataclass(frozen=True)
class Event:
    """An event as servers exchange it, with its id."""

    event_id: str
    room_version: str
    pdu: JsonDict

    @property
    def type(self) -> str:
        """The type of the event."""
        event_type: str = self.pdu["type"]
        return event_type

    @property
    def room_id(self) -> str:
        """The room of the event, also of those whose room is named after them."""
        room_id: str = self.pdu.get("room_id", "!" + self.event_id[1:])
        return room_id

    @property
    def sender(self) -> str:
        """The user who sent it."""
        sender: str = self.pdu["sender"]
        return sender

    @property
    def content(self) -> JsonDict:
        """The content of the event."""
        content: JsonDict = self.pdu["content"]
        return content

    @property
    def state_slot(self) -> tuple[str, str] | None:
        """The type and state key of a state event."""
        state_key = self.pdu.get("state_key")
        return None if state_key is None else (self.type, state_key)

    @property
    def prev_event_ids(self) -> list[str]:
        """The events this one comes after."""
        return _referenced(self.pdu.get("prev_events", ()))

    @property
    def auth_event_ids(self) -> list[str]:
        """The events that allow this one."""
        return _referenced(self.pdu.get("auth_events", ()))


def names_its_own_events(room_version: str) -> bool:
    """Whether event ids are made up by servers, and part of the event."""
    return room_version in ("1", "2")


def event_from_pdu(room_version: str, pdu: JsonDict) -> Event:
    """An event with the id that a server would give it."""
    if names_its_own_events(room_version):
        return Event(pdu["event_id"], room_version, pdu)
    url_safe = room_version != "3"
    return Event(
        "$" + encode_base64(_reference_hash(room_version, pdu), urlsafe=url_safe),
        room_version,
        pdu,
    )


def sign_event(
    room_version: str, pdu: JsonDict, server_name: str, signing_key: SigningKey
) -> Event:
    """Set the hash and this server's signature, whatever else the event contains."""
    hashed = {
        key: value for key, value in pdu.items() if key not in ("unsigned", "signatures", "hashes")
    }
    digest = hashlib.sha256(encode_canonical_json(hashed)).digest()
    unsigned = {**pdu, "hashes": {"sha256": encode_base64(digest)}}
    signed = sign_json(redact(room_version, unsigned), server_name, signing_key)
    return event_from_pdu(room_version, {**unsigned, "signatures": signed["signatures"]})


def references(room_version: str, events: Iterable[Event | str]) -> list[Any]:
    """The value of `prev_events` or `auth_events` that stands for these events."""
    if not names_its_own_events(room_version):
        return [event if isinstance(event, str) else event.event_id for event in events]
    return [
        [event, {}]
        if isinstance(event, str)
        else [
            event.event_id,
            {"sha256": encode_base64(_reference_hash(room_version, event.pdu))},
        ]
        for event in events
    ]


def redact(room_version: str, pdu: JsonDict) -> JsonDict:
    """The event as it is left by a redaction, without `unsigned`."""
    number = int(room_version)
    keys = set(_KEPT_KEYS)
    if number < 11:
        keys |= {"membership", "origin", "prev_state"}
    if number >= 12 and pdu.get("type") == "m.room.create":
        keys.remove("room_id")
    redacted = {key: value for key, value in pdu.items() if key in keys}
    redacted["content"] = _redacted_content(number, pdu)
    return redacted


def _redacted_content(number: int, pdu: JsonDict) -> JsonDict:
    content = pdu.get("content")
    if not isinstance(content, dict):
        return {}
    kept: tuple[str, ...] = ()
    match pdu.get("type"):
        case "m.room.create":
            if number >= 11:
                return content
            kept = ("creator",)
        case "m.room.member":
            kept = ("membership",)
            if number >= 9:
                kept += ("join_authorised_via_users_server",)
        case "m.room.join_rules":
            kept = ("join_rule", "allow") if number >= 8 else ("join_rule",)
        case "m.room.power_levels":
            kept = (*_POWER_LEVELS, "invite") if number >= 11 else _POWER_LEVELS
        case "m.room.aliases" if number < 6:
            kept = ("aliases",)
        case "m.room.history_visibility":
            kept = ("history_visibility",)
        case "m.room.redaction" if number >= 11:
            kept = ("redacts",)
    redacted = {key: value for key, value in content.items() if key in kept}
    if number >= 11 and pdu.get("type") == "m.room.member":
        invite = content.get("third_party_invite")
        if isinstance(invite, dict):
            redacted["third_party_invite"] = {
                key: value for key, value in invite.items() if key == "signed"
            }
    return redacted


def _reference_hash(room_version: str, pdu: JsonDict) -> bytes:
    redacted = redact(room_version, pdu)
    redacted.pop("signatures", None)
    return hashlib.sha256(encode_canonical_json(redacted)).digest()


def _referenced(value: Any) -> list[str]:
    """The ids in a value of `prev_events` or `auth_events`, which may be malformed."""
    ids = []
    for reference in value if isinstance(value, list) else ():
        if isinstance(reference, list) and reference:
            reference = reference[0]
        if isinstance(reference, str):
            ids.append(reference)
    return ids
