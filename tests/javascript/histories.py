"""Histories to play to the ephemeral map and to matrix-js-sdk's store of sticky events.

What matrix-js-sdk 43 defines too is compared, after each step: which events are the values.

Its map differs from MSC4354's on purpose or by mistake in what the histories leave out:

- It orders events by `origin_server_ts` alone. That is the same order if all events with one key
  have the same duration, as MSC4354 recommends: so in these histories they have.
- A key that is there and not a text makes it ignore the event. Here the event stands alone.
- When a value expires it forgets the earlier events with that key too. One of them can outlive the
  value only if their senders dated them in the future, or with durations of more than an hour.
- A redaction brings the event before back, as here, but not once anything has expired, and one that
  has come before its target is not remembered: histories redact only what came once, and has its
  key for itself. An example shows the rest.

And what is said in another way:

- A removal (nothing but the key in its content) is a value there, and left to the application. Both
  maps agree that it is the newest.
- An encrypted event is not in that map before it is decrypted; here it is an opaque entry.
- An event without a key is listed as often as it came.

It has a clock and timers of its own: Node's are replaced by ones that the histories move.
"""

import json
from typing import Any

import attr
from hypothesis import strategies as st

from synapse_sticky.ephemeral_map import EphemeralMap

HOUR_MS = 3_600_000
NOW_TS = 1_700_000_000_000
ROOM = "!room:example.org"
KEY = "msc4354_sticky_key"
REMAINING = "msc4354_sticky_duration_ttl_ms"
USERS = ["@alice:example.org", "@alice:example.org", "@bob:example.org"]
TYPES = ["org.example.seat", "org.example.seat", "org.example.other"]

JsonDict = dict[str, Any]
# Sender, type, content and ID of an event.
Value = tuple[str, str, str, str]


def values_of(answer: list[list[list[Any]]]) -> list[set[Value]]:
    """What the SDK's process prints: the values after each step."""
    return [
        {(sender, type_, json.dumps(content), id_) for sender, type_, content, id_ in values}
        for values in answer
    ]


def play_here(steps: list[JsonDict]) -> list[set[Value]]:
    """The values after each step in the ephemeral map, but for the opaque ones."""
    map_ = EphemeralMap()
    outcome = []
    for step in steps:
        now_ts = step["now_ts"]
        if "add" in step:
            map_.add(ROOM, step["add"], now_ts)
        if "decrypt" in step:
            clear = step["decrypt"]
            map_.decrypt(ROOM, clear["event_id"], clear["type"], clear["content"], now_ts)
        if "redact" in step:
            map_.redact(ROOM, step["redact"], now_ts)
        outcome.append(
            {
                (entry.sender, entry.type, json.dumps(entry.content), entry.event_id)
                for entry in map_.entries(ROOM, now_ts)
                if not entry.opaque
            }
        )
    return outcome


def without_removals(values: set[Value]) -> set[Value]:
    return {value for value in values if json.loads(value[2]).keys() != {KEY}}


@attr.s(frozen=True, auto_attribs=True)
class Sent:
    """An event as its sender made it."""

    event: JsonDict
    encrypted: bool
    redacted: bool

    @property
    def expires_ts(self) -> int:
        duration_ms: int = self.event["msc4354_sticky"]["duration_ms"]
        origin_server_ts: int = self.event["origin_server_ts"]
        return origin_server_ts + min(duration_ms, HOUR_MS)

    @property
    def place(self) -> tuple[str, str, str | None]:
        return (self.event["sender"], self.event["type"], self.event["content"].get(KEY))


@st.composite
def senders_of_events(draw: st.DrawFn) -> list[Sent]:
    """Events, several with one key, in the order in which they were sent."""
    durations: dict[tuple[str, str, str | None], int] = {}
    sent = []
    for number in range(draw(st.integers(2, 8))):
        key = draw(st.sampled_from(["k", "k", "k", "k", "", "k@bob:example.org", None]))
        value: JsonDict = draw(st.sampled_from([{"seat": 1}, {"leave_reason": "left"}, {}]))
        sender, type_ = draw(st.sampled_from(USERS)), draw(st.sampled_from(TYPES))
        duration_ms = durations.setdefault(
            (sender, type_, key), draw(st.sampled_from([30, 50, HOUR_MS, 9 * HOUR_MS, 0]))
        )
        event = {
            # Not in the order in which they are sent.
            "event_id": f"${draw(st.sampled_from('abc'))}{number}",
            "room_id": ROOM,
            "sender": sender,
            "type": type_,
            "origin_server_ts": NOW_TS + draw(st.integers(-20, 0)),
            "content": {**value} if key is None else {KEY: key, **value},
            "msc4354_sticky": {"duration_ms": duration_ms},
        }
        sent.append(
            Sent(event, draw(st.booleans()), redacted=draw(st.sampled_from([True, False, False])))
        )
    return sent


@st.composite
def histories(draw: st.DrawFn) -> list[JsonDict]:
    """The steps in which one client gets to know events: in any order, some of them twice."""
    sent = draw(senders_of_events())
    places = [one.place for one in sent]
    pending: list[tuple[Sent, str]] = []
    for one in sent:
        chain = ["add", "decrypt"] if one.encrypted else ["add"]
        alone = one.place[2] is None or places.count(one.place) == 1
        if one.redacted and alone:
            chain.append("redact")
        elif one.encrypted:
            chain += ["copy"] * draw(st.integers(0, 1))
        else:
            chain += ["copy"] * draw(st.integers(0, 2))
        pending += [(one, kind) for kind in chain]
    # Shuffled; what belongs to one event is done in its order all the same.
    order = draw(st.permutations([one for one, _ in pending]))
    chains = {id(one): [kind for other, kind in pending if other is one] for one in sent}
    now_ts, steps = NOW_TS, []
    for one in order:
        now_ts += draw(st.sampled_from([0, 0, 0, 1, 7]))
        step = _step(one, chains[id(one)].pop(0), now_ts, told=draw(st.booleans()))
        steps.append({"now_ts": now_ts, **step})
    return [*steps, {"now_ts": now_ts + draw(st.sampled_from([10, 30, HOUR_MS]))}]


def _step(sent: Sent, kind: str, now_ts: int, told: bool) -> JsonDict:
    event = sent.event
    if kind == "redact":
        return {"redact": event["event_id"]}
    if kind == "decrypt":
        return {"decrypt": {key: event[key] for key in ("event_id", "type", "content")}}
    if sent.encrypted:
        event = {**event, "type": "m.room.encrypted", "content": {"ciphertext": "?"}}
    if told and now_ts < sent.expires_ts:
        event = {**event, "unsigned": {REMAINING: sent.expires_ts - now_ts}}
    return {"add": event}
