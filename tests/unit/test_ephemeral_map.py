"""The ephemeral map against a naive model: any order, copies of all kinds, expiry."""

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeVar

import attr
import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutabledict import immutabledict

from synapse_sticky import _version
from synapse_sticky.ephemeral_map import MAX_REDACTED, Change, Entry, EphemeralMap
from tests.javascript.histories import play_here, values_of, without_removals
from tests.javascript.sdk import RECORDED

GUIDE = Path(__file__).parents[2] / "docs" / "ephemeral-map.md"

HOUR_MS = 3_600_000
NOW_TS = 1_700_000_000_000
ROOM = "!room:example.org"
ALICE = "@alice:example.org"
TYPE = "org.example.seat"
KEY = "msc4354_sticky_key"
REMAINING = "msc4354_sticky_duration_ttl_ms"

JsonDict = dict[str, Any]
T = TypeVar("T")


def sticky(
    event_id: str, key: object = "k", at: int = 0, duration_ms: object = 60_000, **content: object
) -> JsonDict:
    """A sticky event of Alice, sent some milliseconds after the beginning."""
    return {
        "event_id": event_id,
        "type": TYPE,
        "sender": ALICE,
        "origin_server_ts": NOW_TS + at,
        "content": {KEY: key, **content},
        "msc4354_sticky": {"duration_ms": duration_ms},
    }


def ids(entries: list[Entry]) -> list[str]:
    return [entry.event_id for entry in entries]


def changed(changes: list[Change]) -> list[tuple[str | None, str | None]]:
    """The IDs of the events before and after each change."""
    return [
        (
            change.previous.event_id if change.previous else None,
            change.current.event_id if change.current else None,
        )
        for change in changes
    ]


# A naive model


@attr.s(frozen=True, auto_attribs=True)
class Sent:
    """An event as its sender made it, and as one server has it."""

    number: int
    sender: str
    type: str
    content: JsonDict
    origin_server_ts: int
    duration_ms: int
    encrypted: bool
    redacted: bool

    @property
    def event_id(self) -> str:
        return f"${self.number}"

    @property
    def expires_ts(self) -> int:
        return min(NOW_TS, self.origin_server_ts) + min(self.duration_ms, HOUR_MS)

    def copy(self, now_ts: int, opaque: bool, told: bool) -> JsonDict:
        """The event as a client gets it at some time."""
        event: JsonDict = {
            "event_id": self.event_id,
            "type": "m.room.encrypted" if opaque else self.type,
            "sender": self.sender,
            "origin_server_ts": self.origin_server_ts,
            "content": {"ciphertext": "?", KEY: "not the real one"} if opaque else self.content,
            "msc4354_sticky": {"duration_ms": self.duration_ms},
        }
        if told and now_ts < self.expires_ts:
            event["unsigned"] = {REMAINING: self.expires_ts - now_ts}
        return event


@attr.s(frozen=True, auto_attribs=True)
class Delivery:
    """A client gets a copy of an event, or learns that it is redacted."""

    now_ts: int
    sent: Sent
    form: str


def expected(sent: list[Sent], now_ts: int, prefer_encrypted: bool) -> list[tuple[object, ...]]:
    """The values by the rules, from all events at once."""
    values = []
    for event in sent:
        key = event.content.get(KEY)
        rivals = [
            other
            for other in sent
            if not other.redacted
            and other.expires_ts > now_ts
            and (other.sender, other.type) == (event.sender, event.type)
            and isinstance(key, str)
            and other.content.get(KEY) == key
        ]
        if prefer_encrypted and any(rival.encrypted for rival in rivals):
            rivals = [rival for rival in rivals if rival.encrypted]
        beaten = any(
            (other.origin_server_ts + other.duration_ms, other.event_id)
            > (event.origin_server_ts + event.duration_ms, event.event_id)
            for other in rivals
        )
        outranked = bool(rivals) and event not in rivals
        live = not event.redacted and event.expires_ts > now_ts
        text = key if isinstance(key, str) else None
        removes = text is not None and event.content == {KEY: key}
        if live and not beaten and not outranked and not removes:
            values.append((event.sender, event.type, text, event.event_id, event.encrypted))
    return sorted(values, key=repr)


def shown(entries: list[Entry]) -> list[tuple[object, ...]]:
    return sorted(
        ((e.sender, e.type, e.sticky_key, e.event_id, e.encrypted) for e in entries), key=repr
    )


def often(value: T) -> list[T]:
    """For most events to meet in one place of the map."""
    return [value] * 6


contents = st.builds(
    lambda key, value: {**({} if key is None else {KEY: key}), **value},
    st.sampled_from(["", 5, None, *often("k")]),
    st.sampled_from([{"seat": 1}, {"leave_reason": "left"}, {}]),
)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Sent], list[Delivery], int]:
    """Events, their copies as one client gets them until some time, and that time."""
    sent = [
        Sent(
            number=number,
            sender=draw(st.sampled_from([*often(ALICE), "@bob:example.org"])),
            type=draw(st.sampled_from([*often(TYPE), "org.example.other"])),
            content=draw(contents),
            # Dated in the future too: then they count from when the server received them.
            origin_server_ts=NOW_TS + draw(st.integers(-6, 3)),
            duration_ms=draw(st.sampled_from([HOUR_MS, 9 * HOUR_MS, 2**70, 20, 10, 5, 0])),
            encrypted=draw(st.booleans()),
            redacted=draw(st.sampled_from([*often(False), True])),
        )
        for number in range(draw(st.integers(3, 7)))
    ]
    copies = []
    for event in sent:
        forms = ["clear told", "opaque told"] if event.encrypted else ["clear told"]
        if event.origin_server_ts <= NOW_TS:
            # Without the remaining time, a client can tell the same from the event itself.
            forms += [form.replace("told", "untold") for form in forms]
        copies.append((event, draw(st.sampled_from([f for f in forms if "clear" in f]))))
        forms.append("decrypted")
        copies += [(event, form) for form in draw(st.lists(st.sampled_from(forms), max_size=3))]
        if event.redacted:
            forms = ["redaction", "redacted copy", "redacted by ID"]
            copies.append((event, draw(st.sampled_from(forms))))
    copies = draw(st.permutations(copies))
    waits = st.lists(st.sampled_from([*often(0), 1, 4]), min_size=len(copies), max_size=len(copies))
    deliveries, now_ts = [], NOW_TS
    for (event, form), wait in zip(copies, draw(waits), strict=True):
        now_ts += wait
        if now_ts >= event.expires_ts and event.origin_server_ts > NOW_TS:
            # The client could not tell that this has expired.
            continue
        deliveries.append(Delivery(now_ts, event, form))
    return sent, deliveries, now_ts + draw(st.sampled_from([0, 1, 4, HOUR_MS - 9]))


def deliver(map_: EphemeralMap, delivery: Delivery) -> list[Change]:
    now_ts, sent, form = delivery.now_ts, delivery.sent, delivery.form
    if form == "redacted by ID":
        return map_.redact(ROOM, sent.event_id, now_ts)
    if form == "redaction":
        redaction = {"type": "m.room.redaction", "event_id": "$r", "content": {}}
        return map_.add(ROOM, {**redaction, "redacts": sent.event_id}, now_ts)
    if form == "redacted copy":
        copy = {"type": sent.type, "event_id": sent.event_id, "content": {}}
        return map_.add(ROOM, {**copy, "unsigned": {"redacted_because": {}}}, now_ts)
    if form == "decrypted":
        return map_.decrypt(ROOM, sent.event_id, sent.type, sent.content, now_ts)
    opaque = form.startswith("opaque")
    event = sent.copy(now_ts, opaque, told=form.endswith(" told"))
    return map_.add(ROOM, event, now_ts, was_encrypted=sent.encrypted and not opaque)


@given(histories(), st.booleans())
def test_any_order_gives_the_same(
    history: tuple[list[Sent], list[Delivery], int], prefer_encrypted: bool
) -> None:
    """Whatever order, copies and time, the values are those of all events at once."""
    # M1, M2, M3, M4
    sent, deliveries, now_ts = history
    map_ = EphemeralMap(prefer_encrypted=prefer_encrypted)
    for delivery in deliveries:
        deliver(map_, delivery)
    values = expected(sent, now_ts, prefer_encrypted)
    assert shown(map_.entries(ROOM, now_ts)) == values
    map_.expire(now_ts)
    assert shown(map_.entries(ROOM, now_ts)) == values
    for entry in map_.entries(ROOM, now_ts):
        if entry.sticky_key is not None:
            key = (entry.sender, entry.type, entry.sticky_key)
            assert map_.get(ROOM, *key, now_ts) == entry


@given(histories(), st.booleans())
def test_changes_are_complete(
    history: tuple[list[Sent], list[Delivery], int], prefer_encrypted: bool
) -> None:
    """Who follows the changes alone has the values at every moment."""
    # M2
    _, deliveries, end_ts = history
    map_ = EphemeralMap(prefer_encrypted=prefer_encrypted)
    followed: dict[str, Entry] = {}
    for delivery in [*deliveries, None]:
        now_ts = delivery.now_ts if delivery else end_ts
        changes = deliver(map_, delivery) if delivery else map_.expire(end_ts)
        for change in changes:
            if change.previous:
                del followed[change.previous.event_id]
            if change.current:
                assert change.current.event_id not in followed
                followed[change.current.event_id] = change.current
        assert followed.keys() == set(ids(map_.entries(ROOM, now_ts)))


@given(histories())
def test_nothing_is_kept_for_ever(history: tuple[list[Sent], list[Delivery], int]) -> None:
    # M2
    _, deliveries, _ = history
    map_ = EphemeralMap()
    for delivery in deliveries:
        deliver(map_, delivery)
    map_.expire(NOW_TS + 2 * HOUR_MS)
    assert map_.next_expiry_ts is None
    assert not any(
        getattr(map_, name) for name in ("_events", "_places", "_redacted", "_deadlines")
    )


# Malformed events

any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from([KEY, REMAINING, "duration_ms", "redacts", "redacted_because", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
FIELDS = [
    *("event_id", "type", "sender", "origin_server_ts", "content", "msc4354_sticky"),
    *("unsigned", "redacts"),
]


@given(st.dictionaries(st.sampled_from(FIELDS), any_json, max_size=3), st.sampled_from(FIELDS))
def test_malformed_events_never_raise(parts: JsonDict, missing: str) -> None:
    # M2
    map_ = EphemeralMap()
    types = ("m.room.redaction", "m.room.encrypted")
    for base in ({}, sticky("$a"), *({**sticky("$a"), "type": type_} for type_ in types)):
        event = {**base, **parts}
        map_.add(ROOM, event, NOW_TS)
        event.pop(missing, None)
        map_.add(ROOM, event, NOW_TS)
        map_.entries(ROOM, NOW_TS)
        map_.decrypt(ROOM, "$a", parts.get("type"), parts.get("content"), NOW_TS)
        map_.entries(ROOM, NOW_TS)
    map_.expire(NOW_TS + HOUR_MS)


@pytest.mark.parametrize(
    "event",
    [
        None,
        [],
        "event",
        {},
        {**sticky("$a"), "event_id": None},
        {**sticky("$a"), "sender": ["@alice:example.org"]},
        {**sticky("$a"), "type": 5},
        {**sticky("$a"), "origin_server_ts": str(NOW_TS)},
        {**sticky("$a"), "origin_server_ts": float(NOW_TS)},
        {**sticky("$a"), "content": [KEY]},
        {**sticky("$a"), "msc4354_sticky": 60_000},
        sticky("$a", duration_ms=True),
        sticky("$a", duration_ms=60_000.0),
        sticky("$a", duration_ms=-1),
        sticky("$a", duration_ms="60000"),
    ],
)
def test_malformed_events_are_not_sticky(event: object) -> None:
    # M2
    map_ = EphemeralMap()
    assert map_.add(ROOM, event, NOW_TS) == []
    assert map_.entries(ROOM, NOW_TS) == []


# By example


def test_the_last_to_end_is_the_value() -> None:
    # M1
    map_ = EphemeralMap()
    assert changed(map_.add(ROOM, sticky("$a", x=1), NOW_TS)) == [(None, "$a")]
    assert changed(map_.add(ROOM, sticky("$b", at=1, x=1), NOW_TS)) == [("$a", "$b")]
    # Sent last, but ends before.
    assert map_.add(ROOM, sticky("$c", at=2, duration_ms=30_000, x=1), NOW_TS + 2) == []
    assert ids(map_.entries(ROOM, NOW_TS)) == ["$b"]


def test_the_highest_event_id_decides_ties() -> None:
    # M1
    for order in (["$a", "$b"], ["$b", "$a"]):
        map_ = EphemeralMap()
        for event_id in order:
            map_.add(ROOM, sticky(event_id, x=1), NOW_TS)
        assert ids(map_.entries(ROOM, NOW_TS)) == ["$b"]


def test_durations_count_as_written() -> None:
    """Clients that do not cut them at an hour agree."""
    # M1
    map_ = EphemeralMap()
    map_.add(ROOM, sticky("$long", duration_ms=HOUR_MS + 2, x=1), NOW_TS)
    map_.add(ROOM, sticky("$later", at=1, duration_ms=HOUR_MS, x=1), NOW_TS + 1)
    assert ids(map_.entries(ROOM, NOW_TS)) == ["$long"]
    assert changed(map_.expire(NOW_TS + HOUR_MS)) == [("$long", "$later")]


def test_each_part_of_the_key_counts() -> None:
    # M1
    map_ = EphemeralMap()
    map_.add("!other:example.org", sticky("$a", x=1), NOW_TS)
    map_.add(ROOM, sticky("$b", x=1), NOW_TS)
    map_.add(ROOM, {**sticky("$c", x=1), "sender": "@bob:example.org"}, NOW_TS)
    map_.add(ROOM, {**sticky("$d", x=1), "type": "org.example.other"}, NOW_TS)
    map_.add(ROOM, sticky("$e", "l", x=1), NOW_TS)
    assert set(ids(map_.entries(ROOM, NOW_TS))) == {"$b", "$c", "$d", "$e"}
    assert ids(map_.entries("!other:example.org", NOW_TS)) == ["$a"]
    assert ids(map_.entries(ROOM, NOW_TS, "org.example.other")) == ["$d"]
    found = map_.get(ROOM, ALICE, TYPE, "l", NOW_TS)
    assert found is not None
    assert (found.event_id, found.content) == ("$e", {KEY: "l", "x": 1})


@pytest.mark.parametrize("key", [None, 5, True, ["k"], {"k": "k"}])
def test_events_without_a_text_key_stand_alone(key: object) -> None:
    # M1
    map_ = EphemeralMap()
    map_.add(ROOM, sticky("$a", key), NOW_TS)
    map_.add(ROOM, sticky("$b", key, at=1), NOW_TS)
    assert ids(map_.entries(ROOM, NOW_TS)) == ["$a", "$b"]
    assert {entry.sticky_key for entry in map_.entries(ROOM, NOW_TS)} == {None}


def test_an_older_event_does_not_revive_what_was_removed() -> None:
    # M3
    map_ = EphemeralMap()
    map_.add(ROOM, sticky("$a", at=-10, x=1), NOW_TS)
    assert changed(map_.add(ROOM, sticky("$gone"), NOW_TS)) == [("$a", None)]
    assert map_.add(ROOM, sticky("$late", at=-5, x=1), NOW_TS + 1) == []
    assert map_.entries(ROOM, NOW_TS) == []
    assert map_.get(ROOM, ALICE, TYPE, "k", NOW_TS) is None


def test_a_removal_that_does_not_win() -> None:
    # M3
    map_ = EphemeralMap()
    map_.add(ROOM, sticky("$a", x=1), NOW_TS)
    assert map_.add(ROOM, sticky("$gone", at=-1), NOW_TS) == []
    assert ids(map_.entries(ROOM, NOW_TS)) == ["$a"]


def test_leaves_of_matrixrtc_are_values() -> None:
    # M3
    map_ = EphemeralMap()
    map_.add(ROOM, sticky("$joined", member={"id": "1"}), NOW_TS)
    leave = sticky("$left", at=1, leave_reason="")
    assert changed(map_.add(ROOM, leave, NOW_TS + 1)) == [("$joined", "$left")]


def test_encrypted_events_are_opaque_until_decrypted() -> None:
    # M3
    map_ = EphemeralMap()
    clear = sticky("$a", x=1)
    # What can be read of its content is not what was encrypted.
    opaque = {**clear, "type": "m.room.encrypted", "content": {"ciphertext": "?", KEY: "k"}}
    map_.add(ROOM, opaque, NOW_TS)
    map_.add(ROOM, {**opaque, "event_id": "$b"}, NOW_TS)
    entries = map_.entries(ROOM, NOW_TS)
    assert [(e.event_id, e.opaque, e.sticky_key) for e in entries] == [
        ("$a", True, None),
        ("$b", True, None),
    ]
    assert changed(map_.add(ROOM, clear, NOW_TS)) == [("$a", None), (None, "$a")]
    for _ in range(2):
        assert [(e.event_id, e.opaque, e.encrypted) for e in map_.entries(ROOM, NOW_TS)] == [
            ("$b", True, True),
            ("$a", False, True),
        ]
        assert map_.add(ROOM, opaque, NOW_TS) == []


def test_an_event_is_decrypted_later() -> None:
    # M3
    map_ = EphemeralMap()
    opaque = {**sticky("$a"), "type": "m.room.encrypted", "content": {"ciphertext": "?"}}
    remaining = {"unsigned": {REMAINING: 1000}}
    map_.add(ROOM, {**opaque, **remaining}, NOW_TS)
    map_.add(ROOM, sticky("$before", at=-1, x=1), NOW_TS)
    assert map_.decrypt(ROOM, "$before", TYPE, {KEY: "l"}, NOW_TS + 1) == []
    assert map_.decrypt(ROOM, "$unknown", TYPE, {KEY: "k"}, NOW_TS + 1) == []
    # A sender can encrypt anything.
    assert map_.decrypt(ROOM, "$a", 5, {KEY: "k", "x": 2}, NOW_TS + 1) == []
    assert map_.decrypt(ROOM, "$a", TYPE, [KEY], NOW_TS + 1) == []
    changes = map_.decrypt(ROOM, "$a", TYPE, {KEY: "k", "x": 2}, NOW_TS + 999)
    assert changed(changes) == [("$a", None), ("$before", "$a")]
    entry = map_.get(ROOM, ALICE, TYPE, "k", NOW_TS + 999)
    assert entry is not None
    assert (entry.content, entry.encrypted, entry.opaque) == ({KEY: "k", "x": 2}, True, False)


def test_an_event_is_decrypted_too_late() -> None:
    # M3
    map_ = EphemeralMap()
    opaque = {**sticky("$a"), "type": "m.room.encrypted", "content": {"ciphertext": "?"}}
    map_.add(ROOM, {**opaque, "unsigned": {REMAINING: 1000}}, NOW_TS)
    changes = map_.decrypt(ROOM, "$a", TYPE, {KEY: "k", "x": 1}, NOW_TS + 1000)
    assert changed(changes) == [("$a", None)]
    assert map_.entries(ROOM, NOW_TS + 1000) == []


def test_unencrypted_events_replace_encrypted_ones_unless_told_otherwise() -> None:
    # M4
    for prefer_encrypted, value in ((False, "$plain"), (True, "$encrypted")):
        map_ = EphemeralMap(prefer_encrypted=prefer_encrypted)
        map_.add(ROOM, sticky("$encrypted", x=1), NOW_TS, was_encrypted=True)
        map_.add(ROOM, sticky("$plain", at=1, x=1), NOW_TS + 1)
        assert ids(map_.entries(ROOM, NOW_TS + 1)) == [value]


def test_a_redacted_value_makes_way_for_the_one_before() -> None:
    """As for a client that never got the redacted one."""
    # M2
    map_ = EphemeralMap()
    map_.add(ROOM, sticky("$a", x=1), NOW_TS)
    map_.add(ROOM, sticky("$b", at=1, x=1), NOW_TS + 1)
    redaction = {"type": "m.room.redaction", "event_id": "$r", "content": {"redacts": "$b"}}
    # Of another room.
    assert map_.add("!other:example.org", redaction, NOW_TS + 2) == []
    assert changed(map_.add(ROOM, redaction, NOW_TS + 2)) == [("$b", "$a")]
    assert map_.add(ROOM, sticky("$b", at=1, x=1), NOW_TS + 3) == []
    assert changed(map_.redact(ROOM, "$a", NOW_TS + 3)) == [("$a", None)]


def test_a_sticky_redaction_is_an_event_of_its_own() -> None:
    # M1
    map_ = EphemeralMap()
    map_.add(ROOM, sticky("$a", x=1), NOW_TS)
    redaction = {**sticky("$r", None), "type": "m.room.redaction", "redacts": "$a"}
    assert changed(map_.add(ROOM, redaction, NOW_TS)) == [("$a", None), (None, "$r")]


def test_expiry_as_the_server_tells_it() -> None:
    # M2
    map_ = EphemeralMap()
    # A client whose clock is ten minutes fast.
    now_ts = NOW_TS + 600_000
    map_.add(ROOM, {**sticky("$a", x=1), "unsigned": {REMAINING: 50_000}}, now_ts)
    # Without the remaining time it seems to have expired long ago.
    assert map_.add(ROOM, sticky("$a", x=1), now_ts + 1) == []
    assert map_.entries(ROOM, now_ts + 49_999) != []
    assert map_.entries(ROOM, now_ts + 50_000) == []
    assert map_.next_expiry_ts == now_ts + 50_000
    assert map_.expire(now_ts + 49_999) == []
    assert changed(map_.expire(now_ts + 50_000)) == [("$a", None)]


def test_no_server_makes_an_event_last_longer() -> None:
    # M2
    map_ = EphemeralMap()
    map_.add(ROOM, {**sticky("$a", x=1), "unsigned": {REMAINING: HOUR_MS}}, NOW_TS)
    assert map_.entries(ROOM, NOW_TS + 60_000) == []


def test_what_a_server_has() -> None:
    """A server knows when an event expires, and its events are immutable."""
    # M1
    map_ = EphemeralMap()
    event = immutabledict({**sticky("$a"), "content": immutabledict({KEY: "k", "x": 1})})
    map_.add(ROOM, event, NOW_TS, expires_ts=NOW_TS + 7)
    assert ids(map_.entries(ROOM, NOW_TS + 6)) == ["$a"]
    assert map_.entries(ROOM, NOW_TS + 7) == []


# For those who have no Synapse


def run_python(source: str) -> str:
    """Run a fresh interpreter, and return what it prints."""
    answer = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


WITHOUT_SYNAPSE = """
import sys

sys.modules["synapse"] = sys.modules["twisted"] = None
before = set(sys.modules)
from synapse_sticky.ephemeral_map import EphemeralMap

map_ = EphemeralMap()
map_.add("!room:example.org", {}, 0)
loaded = {name.split(".")[0] for name in sys.modules.keys() - before}
print(sorted(loaded - sys.stdlib_module_names))
"""


def test_it_needs_no_synapse() -> None:
    # M1
    assert run_python(WITHOUT_SYNAPSE) == "['attr', 'synapse_sticky']\n"


def test_the_version_needs_no_synapse() -> None:
    source = (
        "import sys; sys.modules['synapse'] = sys.modules['twisted'] = None; "
        "import synapse_sticky; print(synapse_sticky.__version__)"
    )
    assert run_python(source).strip() == _version.__version__


def test_what_synapse_loads_is_there() -> None:
    """As Synapse loads it: the class by its name, and no other name."""
    source = (
        "import synapse_sticky; print(synapse_sticky.StickyEventsModule.__name__); "
        "print(hasattr(synapse_sticky, 'Other'))"
    )
    assert run_python(source) == "StickyEventsModule\nFalse\n"


def test_the_examples_of_the_guide() -> None:
    # M1, M3
    text = GUIDE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```pycon\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    example = parser.get_doctest("\n".join(blocks), {}, GUIDE.name, str(GUIDE), 0)
    runner.run(example)
    assert runner.tries > 10
    assert runner.failures == 0


def test_the_same_values_as_matrix_js_sdk() -> None:
    """As recorded; `nox -s javascript` compares with the SDK itself, and many more."""
    # M1, M2, M3
    lines = RECORDED.read_text().splitlines()
    assert len(lines) > 10
    for line in lines:
        history, answer = json.loads(line)
        theirs = [without_removals(values) for values in values_of(answer)]
        assert play_here(history) == theirs


def kept(map_: EphemeralMap) -> int:
    """How many things the map remembers."""
    return sum(len(getattr(map_, name)) for name in ("_events", "_redacted", "_deadlines"))


def test_a_redaction_is_remembered_once() -> None:
    # M2: a client may get each of them again and again
    map_ = EphemeralMap()
    for number in range(1_000):
        map_.redact(ROOM, "$a", NOW_TS + number)
    assert kept(map_) == 1
    assert map_.next_expiry_ts == NOW_TS + HOUR_MS
    assert map_.add(ROOM, sticky("$a"), NOW_TS + 1_000) == []


def test_so_many_redactions_are_remembered() -> None:
    # M2
    map_ = EphemeralMap()
    for number in range(MAX_REDACTED + 500):
        map_.redact(ROOM, f"${number}", NOW_TS)
    assert kept(map_) == MAX_REDACTED
    for number in (500, MAX_REDACTED + 499):
        assert map_.add(ROOM, sticky(f"${number}"), NOW_TS) == []
    map_.expire(NOW_TS + HOUR_MS)
    assert kept(map_) == 0
