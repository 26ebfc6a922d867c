"""Which test proves which requirement, and the page that says so.

A test names the requirements it proves in a comment such as `# S3, C2`, above it or inside.
`python -m tests.conformance` writes their lists into `docs/conformance.md`; everything else
there is written by hand.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "conformance.md"

_COMMENT = re.compile(r"\s*# ((?:[A-Z]\d+[a-z]?)(?:, [A-Z]\d+[a-z]?)*)(?=$|[\s:;,.(])")
_HEADING = re.compile(r"^\*\*([A-Z]\d+[a-z]?)\*\* ", re.MULTILINE)
_LIST = re.compile(r"^- `(tests/[^`]+)`: (.+)$")


def named_by_tests() -> dict[str, set[str]]:
    """For each requirement that any test names, those tests, as `tests/file.py::name`."""
    named: dict[str, set[str]] = defaultdict(set)
    for path in sorted(TESTS.rglob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            for line in lines[max(first - 2, 0) : node.end_lineno]:
                if match := _COMMENT.match(line):
                    for requirement in match.group(1).split(", "):
                        named[requirement].add(f"{path.relative_to(TESTS.parent)}::{node.name}")
    return named


def listed_on_page() -> dict[str, set[str]]:
    """For each requirement on the page, the tests that it lists."""
    listed: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if match := _HEADING.match(line):
            current = listed[match.group(1)] = set()
        elif match := _LIST.match(line):
            current |= {
                f"{match.group(1)}::{name.strip('`')}" for name in match.group(2).split(", ")
            }
    return listed


def write_lists() -> None:
    """Replaces the lists of tests on the page."""
    named = named_by_tests()
    written: list[str] = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if _LIST.match(line):
            continue
        if written and written[-1] == "" and line == "":
            continue
        written.append(line)
        if match := _HEADING.match(line):
            by_file: dict[str, list[str]] = defaultdict(list)
            for test in sorted(named.get(match.group(1), ())):
                file, name = test.split("::")
                by_file[file].append(f"`{name}`")
            written += ["", *(f"- `{file}`: {', '.join(names)}" for file, names in by_file.items())]
            written.append("")
    PAGE.write_text("\n".join(written).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_lists()
