"""What the package may import, and where it spells things out."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import synapse_sticky

PACKAGE = Path(synapse_sticky.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
PUBLIC = {
    "synapse.module_api",
    "synapse.module_api.errors",
    "synapse.api.errors",
    "synapse.types",
}
# Wire names that say nothing of MSC4354 by themselves.
PLAIN_NAMES = {"duration_ms"}


# Highest first: what stands in one line may import from the lines below it.
RANKS: list[set[str]] = [
    {"__init__"},
    # Beside the module, never in it.
    {"module", "command"},
    {"hooks", "admin"},
    {"clients", "servers", "noticing"},
    {"control"},
    {"deliverable"},
    {"storage"},
    {"seams"},
]
# Decided by arguments alone. `config` only takes Synapse's class of errors.
PURE = {
    "_version",
    "admin.decisions",
    "clients.page",
    "command.checks",
    "command.text",
    "clients.since",
    "deliverable.index",
    "deliverable.messages",
    "deliverable.positions",
    "ephemeral_map",
    "noticing.absence",
    "noticing.ranges",
    "noticing.reviews",
    "protocol",
    "room_settings",
    "seams.bounds",
    "seams.contents",
    "servers.confirmation",
    "servers.outages",
    "servers.payment",
    "servers.slots",
    "servers.staging",
    "servers.turns",
    "servers.walk",
    "servers.watermarks",
    "stickiness",
    "storage.rows",
}
# May be imported from anywhere too, and imports pure files only.
SHARED = {"config"}
# Sources of time, chance and I/O.
IMPURE = {
    "_version",
    "admin.decisions",
    "asyncio",
    "datetime",
    "io",
    "os",
    "random",
    "secrets",
    "socket",
    "synapse",
    "threading",
    "time",
    "twisted",
}


def _module(path: Path) -> str:
    """The name of a file of the package, such as `seams.checks`."""
    return _name(path).removesuffix(".py").replace("/", ".")


def _folder(module: str) -> str:
    return module.split(".")[0]


def _rank(module: str) -> int:
    """The larger, the higher."""
    if module in PURE | SHARED:
        return -1
    (rank,) = [n for n, folders in enumerate(RANKS) if _folder(module) in folders]
    return len(RANKS) - rank


def _imported_files(path: Path) -> set[str]:
    """The files of the package that a file of it imports."""
    files = {_module(other) for other in SOURCES}
    found = set()
    for name in _imported(_tree(path)):
        name = name.removeprefix("synapse_sticky.")
        if name in files:
            found.add(name)
    return found


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _imported(tree: ast.AST) -> Iterator[str]:
    """The modules that are imported, and what might be one: `from a import b` gives `a.b` too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield node.module or ""
            if node.module and node.module.split(".")[0] == "synapse_sticky":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and node.args
        ):
            yield ast.literal_eval(node.args[0])


def _internals(tree: ast.AST) -> set[str]:
    """What is imported of Synapse that it does not offer to modules."""
    return {
        name for name in _imported(tree) if name.split(".")[0] == "synapse" and name not in PUBLIC
    }


def _texts(tree: ast.AST) -> Iterator[str]:
    """All text constants but docstrings, those within f-strings included."""
    # What stands by itself is a docstring, of a module down to a single constant.
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            if isinstance(node.value, bytes):
                yield node.value.decode("latin-1")
            elif isinstance(node.value, str):
                yield node.value


def _wire_names() -> set[str]:
    tree = ast.parse((PACKAGE / "protocol.py").read_text(encoding="utf-8"))
    return set(_texts(tree))


def _spelled_out(tree: ast.AST) -> set[str]:
    """The wire names that a file spells out itself."""
    return {
        name
        for text in _texts(tree)
        for name in _wire_names()
        if (text == name if name in PLAIN_NAMES else name in text)
    }


def _tree(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_there_is_something_to_look_at() -> None:
    names = [_name(path) for path in SOURCES]
    assert len(names) > 15
    assert "hooks/sync.py" in names


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_only_hooks_and_seams_import_internals(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[0] not in ("hooks", "seams"):
        assert _internals(_tree(path)) == set()


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_wire_names_have_one_place(path: Path) -> None:
    if _name(path) != "protocol.py":
        assert _spelled_out(_tree(path)) == set()


def test_wire_names_are_not_in_the_schema() -> None:
    scripts = sorted(PACKAGE.rglob("*.sql*"))
    assert scripts
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        assert not [name for name in _wire_names() if name in text], path.name


def test_the_wire_names() -> None:
    # S7: what other programs are to find there, as of the newest text of MSC4354
    assert _wire_names() >= {
        "org.matrix.msc4354",
        "org.matrix.msc4354.sticky_duration_ms",
        "org.matrix.msc4354.sticky_events",
        "msc4354_sticky",
        "msc4354_sticky_key",
        "msc4354_sticky_duration_ttl_ms",
        "duration_ms",
    }


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_go_one_way(path: Path) -> None:
    """A file imports from folders of a lower rank, from its own folder, and pure files."""
    importer = _module(path)
    for imported in _imported_files(path):
        if imported in PURE or _folder(imported) == _folder(importer):
            continue
        assert _rank(importer) > _rank(imported), f"{importer} imports {imported}"


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_files_reach_nothing_impure(name: str) -> None:
    """What is called pure imports no Synapse, no clock and no I/O, nor anything that does."""
    tree = _tree(PACKAGE / f"{name.replace('.', '/')}.py")
    assert not {i for i in _imported(tree) if i.split(".")[0] in IMPURE}
    assert _imported_files(PACKAGE / f"{name.replace('.', '/')}.py") <= PURE


def test_no_test_helpers_are_imported() -> None:
    for path in SOURCES:
        for name in _imported(_tree(path)):
            top_level = name.split(".")[0]
            assert top_level not in ("tests", "harness", "pytest", "hypothesis"), _name(path)


# The checks themselves


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import synapse.handlers.sync", {"synapse.handlers.sync"}),
        ("import synapse", {"synapse"}),
        ("from synapse import visibility", {"synapse"}),
        ("from synapse.api import errors", {"synapse.api"}),
        ("from synapse.types.state import StateFilter", {"synapse.types.state"}),
        ("def f():\n    from synapse.server import HomeServer", {"synapse.server"}),
        ("import importlib\nimportlib.import_module('synapse.x')", {"synapse.x"}),
        ("from synapse.types import JsonDict\nfrom synapse.module_api import ModuleApi", set()),
        ("from synapse.api.errors import Codes", set()),
        ("import synapse_sticky.hooks.sync", set()),
    ],
)
def test_what_counts_as_internal(source: str, expected: set[str]) -> None:
    assert _internals(ast.parse(source)) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 'msc4354_sticky'", {"msc4354_sticky"}),
        ("x = {'duration_ms': 5}", {"duration_ms"}),
        ("x = f'{a}.msc4354_sticky'", {"msc4354_sticky"}),
        ("x = b'org.matrix.msc4354'", {"org.matrix.msc4354"}),
        ("f('cleanup_duration_ms', 'msc4354_enabled')", set()),
        ("'''About msc4354_sticky.'''", set()),
        ("x = 1\n'''As msc4354_sticky.'''", set()),
    ],
)
def test_what_counts_as_spelled_out(source: str, expected: set[str]) -> None:
    assert _spelled_out(ast.parse(source)) == expected


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_one_line_of_the_log_stays_one(path: Path) -> None:
    """IDs of rooms and events are what other servers like: ``%r`` shows the end of a line."""
    for call in ast.walk(_tree(path)):
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and getattr(call.func.value, "id", "") == "logger"
            and isinstance(call.args[0], ast.Constant)
        ):
            formats = re.findall(r"%[-.0-9]*([a-z])", str(call.args[0].value))
            for conversion, argument in zip(formats, call.args[1:], strict=True):
                if re.search(r"(room_id|event_id|subject)$", ast.unparse(argument)):
                    assert conversion == "r", ast.unparse(call)
