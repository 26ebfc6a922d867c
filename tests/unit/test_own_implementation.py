"""Where Synapse's own sticky events are, in the Synapse that is installed.

The module switches them off, and puts its own in their place. A place that it does not know
would go on by itself, or would have to be replaced: so every place is listed here.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import synapse

SYNAPSE = Path(synapse.__file__).parent

# What switches Synapse's own on, and what its wire names have in common.
MENTION = "msc4354"

NAMES_ONLY = "names, and decides nothing"
AT_USE = "reads the configuration when used, which says off by then"
STORED = "has stored the flag before modules load, and is told that it is off"
BUILT_LATER = "stores the flag, and is built after modules are loaded"
REPLACED = "our subclass takes its place, with the flag on where that is how it takes a duration"
NOTHING_TO_SHOW = "writes what Synapse's own has found, which is nothing"
SQLITE_ONLY = "refuses an SQLite that is too old, before modules load"

# From 1.148.0 to 1.164.0rc3. Not every release has all of them.
KNOWN_PLACES: Mapping[str, Mapping[str, str]] = {
    "api/constants.py": {
        "EventUnsignedContentFields": NAMES_ONLY,
        "StickyEvent": NAMES_ONLY,
    },
    "config/experimental.py": {"ExperimentalConfig.read_config": STORED},
    "events/utils.py": {
        "EventClientSerializer.create_config": AT_USE,
        "EventClientSerializer.serialize_event": AT_USE,
        "SerializeEventConfig": NAMES_ONLY,
        "_serialize_event": AT_USE,
    },
    "federation/sender/__init__.py": {"FederationSender.notify_new_server_joined": AT_USE},
    "federation/sender/per_destination_queue.py": {
        "PerDestinationQueue.__init__": BUILT_LATER,
        "StickyEventBacklogTracker.__init__": BUILT_LATER,
        "StickyEventBacklogTracker.is_backlogged": BUILT_LATER,
        "StickyEventBacklogTracker.prepare_transaction": BUILT_LATER,
    },
    "handlers/sliding_sync/extensions.py": {
        "SlidingSyncExtensionHandler.__init__": BUILT_LATER,
        "SlidingSyncExtensionHandler.get_sticky_events_extension_response": NAMES_ONLY,
    },
    "handlers/sync.py": {"SyncHandler._generate_sync_entry_for_rooms": AT_USE},
    "rest/client/room.py": {
        "RoomDelayedEventRestServlet.__init__": REPLACED,
        "RoomDelayedEventRestServlet._do": REPLACED,
        "RoomSendEventRestServlet.__init__": REPLACED,
        "RoomSendEventRestServlet._do": REPLACED,
        # The newest MSC has no sticky state.
        "RoomStateEventRestServlet.__init__": BUILT_LATER,
        "RoomStateEventRestServlet.on_PUT": BUILT_LATER,
    },
    "rest/client/sync.py": {
        "SlidingSyncRestServlet.encode_extensions": NOTHING_TO_SHOW,
        "SyncRestServlet.encode_room": NOTHING_TO_SHOW,
    },
    "rest/client/versions.py": {"VersionsRestServlet.on_GET": REPLACED},
    "storage/controllers/persist_events.py": {
        "EventsPersistenceStorageController._persist_event_batch": AT_USE,
    },
    "storage/databases/main/events.py": {
        "PersistEventsStore.__init__": STORED,
        "PersistEventsStore._persist_events_and_state_updates": STORED,
        "PersistEventsStore._persist_events_txn": STORED,
        "PersistEventsStore._update_outliers_txn": STORED,
    },
    "storage/databases/main/sticky_events.py": {
        "StickyEventsWorkerStore.__init__": SQLITE_ONLY,
        "StickyEventsWorkerStore.get_updated_sticky_events": AT_USE,
    },
    "types/rest/client/__init__.py": {"SlidingSyncBody.Extensions": NAMES_ONLY},
    "visibility.py": {
        "_check_client_allowed_to_see_event": AT_USE,
        "filter_and_transform_events_for_client.allowed": AT_USE,
    },
}

# In the Rust extension there are strings only, and how often each may stand there: in what formats
# events (given the flag when used), and in what answers `/versions` (replaced).
KNOWN_STRINGS = {
    "msc4354_sticky_duration_ttl_ms": 1,
    "msc4354_sticky": 4,
    "msc4354_enabled": 4,
    "org.matrix.msc4354": 1,
}


def _mentions(node: ast.AST) -> bool:
    """Whether this very piece of code has the name in it, in whatever role."""
    values = (value for _, value in ast.iter_fields(node))
    texts = (item for value in values for item in (value if isinstance(value, list) else [value]))
    return any(
        MENTION in (text.decode("latin-1") if isinstance(text, bytes) else text).lower()
        for text in texts
        if isinstance(text, (str, bytes))
    )


def _places(node: ast.AST, names: tuple[str, ...] = ()) -> Iterator[str]:
    """The functions and classes whose code has the name in it. What is only explained is none."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if _mentions(node):
        yield ".".join(names) or "<module>"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        names = (*names, node.name)
    for child in ast.iter_child_nodes(node):
        yield from _places(child, names)


def _found_places() -> dict[str, set[str]]:
    """The places in every source file of Synapse that has any."""
    found = {}
    for path in sorted(SYNAPSE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if MENTION in source.lower():
            places = set(_places(ast.parse(source)))
            if places:
                found[path.relative_to(SYNAPSE).as_posix()] = places
    return found


def _unknown(found: Mapping[str, set[str]]) -> list[str]:
    return [
        f"{file}: {place}"
        for file, places in found.items()
        for place in sorted(places - KNOWN_PLACES.get(file, {}).keys())
    ]


def test_every_place_is_known() -> None:
    # O5
    found = _found_places()
    assert "PersistEventsStore.__init__" in found["storage/databases/main/events.py"]
    assert _unknown(found) == []


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("if hs.config.experimental.msc4354_enabled: pass", "<module>"),
        ("def f(msc4354_enabled): pass", "f"),
        ("class A:\n  async def f(self):\n    return self._msc4354_enabled", "A.f"),
        ("class A:\n  def f(self):\n    def g(): h(msc4354_enabled=1)", "A.f.g"),
        ("class A:\n  x = getattr(config, 'msc4354_enabled')", "A"),
        ("from synapse.config import msc4354", "<module>"),
        ("x = b'org.matrix.msc4354'", "<module>"),
        ("def f():\n  global _MSC4354", "f"),
    ],
)
def test_a_new_place_is_found(source: str, place: str) -> None:
    # O5
    assert set(_places(ast.parse(source))) == {place}
    assert _unknown({"handlers/new.py": {place}}) == [f"handlers/new.py: {place}"]


def test_what_is_only_explained_is_no_place() -> None:
    """Comments and docstrings may say what they want."""
    source = '"""msc4354"""\n# msc4354\nclass A:\n  x = 1\n  """msc4354"""\n'
    assert list(_places(ast.parse(source))) == []


_STRING = re.compile(rb"(?:org\.matrix\.)?msc4354")
# The beginning of a comparison with the name, as machine code.
_COMPARISON = re.compile(rb"msc4354_[\x40-\x4f].4_sticky", re.DOTALL)


def _strings(binary: bytes) -> Counter[str]:
    """How often each known string is there; what is unknown is in it as it stands."""
    found: Counter[str] = Counter()
    for match in _STRING.finditer(binary):
        text = binary[match.start() : match.start() + 40]
        if _COMPARISON.match(text):
            found["msc4354_sticky"] += 1
            continue
        known = [name for name in KNOWN_STRINGS if text.startswith(name.encode())]
        # Longer names come first.
        found[known[0] if known else repr(text)] += 1
    return found


def test_every_string_of_the_rust_extension_is_known() -> None:
    # O5
    (path,) = SYNAPSE.glob("synapse_rust*.so")
    found = _strings(path.read_bytes())
    assert {name: n for name, n in found.items() if n > KNOWN_STRINGS.get(name, 0)} == {}


def test_a_new_string_is_found() -> None:
    # O5
    binary = b"msc4354_enabledmsc1234\0org.matrix.msc4354org\0" * 2 + b"\xffmsc4354_new"
    found = _strings(binary)
    assert found["msc4354_enabled"] == found["org.matrix.msc4354"] == 2
    assert len(found) == 3
