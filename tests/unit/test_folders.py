"""What the folders around the package may import of each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "harness": {"harness"},
    "demo": {"demo", "harness"},
    "benchmarks": {"benchmarks", "harness", "synapse_sticky"},
    "upstream": {"upstream", "harness", "synapse_sticky"},
    "tests": {"tests", "harness", "synapse_sticky", "upstream"},
}
OURS = {*MAY_IMPORT, "synapse_sticky"}
SOURCES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imported(source: str) -> Iterator[str]:
    """The names that are imported, in full: `from a import b` gives `a.b`, a module or not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _out_of_bounds(folder: str, source: str) -> set[str]:
    """What a file in a folder imports of another one that it may not know."""
    unknown = OURS - MAY_IMPORT[folder]
    return {name for name in _imported(source) if name.split(".")[0] in unknown}


def _test_files(source: str) -> set[str]:
    """What is imported from files that are for pytest alone."""
    return {
        name
        for name in _imported(source)
        if name.startswith("tests.")
        and any(part == "conftest" or part.startswith("test_") for part in name.split("."))
    }


def test_there_is_something_to_look_at() -> None:
    names = {_name(path) for path in SOURCES}
    assert {"harness/homeserver.py", "tests/conftest.py", "demo/single.py"} <= names


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_folders_know_the_ones_below_only(path: Path) -> None:
    assert _out_of_bounds(_name(path).split("/")[0], path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_nothing_imports_from_test_files(path: Path) -> None:
    assert _test_files(path.read_text(encoding="utf-8")) == set()


# The checks themselves


@pytest.mark.parametrize(
    ("folder", "source", "expected"),
    [
        ("harness", "from tests.support import ids", {"tests.support.ids"}),
        ("harness", "import synapse_sticky", {"synapse_sticky"}),
        ("demo", "from tests import support", {"tests.support"}),
        ("benchmarks", "def f():\n    import demo.printing", {"demo.printing"}),
        ("demo", "from harness.wait import eventually\nimport demo.single", set()),
        ("tests", "from harness import wait\nimport synapse_sticky.config, json", set()),
    ],
)
def test_what_counts_as_out_of_bounds(folder: str, source: str, expected: set[str]) -> None:
    assert _out_of_bounds(folder, source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from tests.test_sync import f", {"tests.test_sync.f"}),
        ("from tests import test_sync", {"tests.test_sync"}),
        ("from tests.conftest import X", {"tests.conftest.X"}),
        ("def f():\n    import tests.unit.test_index", {"tests.unit.test_index"}),
        ("from tests.support import text\nfrom synapse.x import test_y", set()),
    ],
)
def test_what_counts_as_a_test_file(source: str, expected: set[str]) -> None:
    assert _test_files(source) == expected
