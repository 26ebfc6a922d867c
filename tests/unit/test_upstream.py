"""What `make test-upstream` compares: the run itself takes Synapse's tests, and long."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from upstream.__main__ import conclude, modules_of
from upstream.known import KNOWN
from upstream.source import source_of

ROOT = Path(__file__).parents[2]
TESTS = {
    "tests/__init__.py": "",
    "tests/push/__init__.py": "",
    "tests/push/test_rules.py": (
        "import unittest\n"
        "class Rules(unittest.TestCase):\n"
        "    def test_good(self): pass\n"
        "    def test_bad(self): self.fail('bad')\n"
        "    def test_error(self): raise ValueError('worse')\n"
        "    @unittest.skip('no time')\n"
        "    def test_later(self): pass\n"
    ),
    "tests/test_rest.py": "",
    "tests/unittest.py": "",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Stands for Synapse's tests."""
    for name, text in TESTS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("names", "modules"),
    [
        (["tests"], ["tests.push.test_rules", "tests.test_rest"]),
        (["tests.push"], ["tests.push.test_rules"]),
        (["tests.pu"], []),
        (["tests.push.test_rules.Rules"], ["tests.push.test_rules.Rules"]),
    ],
)
def test_names_of_tests(source: Path, names: list[str], modules: list[str]) -> None:
    assert modules_of(source, names) == modules


def test_each_outcome_is_said(source: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "upstream.trial", "without", "tests"],
        cwd=source,
        env={"PYTHONPATH": f"{source}:{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(run.stdout.splitlines()) == [
        f"{outcome} tests.push.test_rules.Rules.test_{name}"
        for outcome, name in (
            ("failed", "bad"),
            ("failed", "error"),
            ("passed", "good"),
            ("skipped", "later"),
        )
    ]
    assert "ValueError: worse" in run.stderr


def test_the_source_of_a_release() -> None:
    files: list[Any] = [
        {"filename": name}
        for name in (
            "matrix_synapse-1.148.0-cp310-abi3-manylinux_2_28_x86_64.whl",
            "matrix_synapse-1.148.0rc1.tar.gz",
            "matrix_synapse-1.148.0.tar.gz",
            "matrix-synapse-1.9.0.tar.gz",
        )
    ]
    assert source_of(files, "1.148.0") is files[2]
    assert source_of(files, "1.9.0") is files[3]
    with pytest.raises(LookupError):
        source_of(files, "1.148")


def test_what_fails_on_purpose_is_documented() -> None:
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    for name in KNOWN:
        *_, case, test = name.split(".")
        assert f"`{case}`" in page
        assert f"`{test}`" in page


A, B = list(KNOWN)[:2]


@pytest.mark.parametrize(
    ("outcomes", "without", "status", "line"),
    [
        ({"x": "passed", "y": "skipped"}, {}, 0, "0 of these for no known reason"),
        ({"x": "passed", "process": "broken off"}, {}, 1, "1 processes have broken off"),
        ({"x": "failed"}, {"x": "failed"}, 0, "1 failed as they do without it, 0 only with"),
        ({"x": "failed"}, {"x": "passed"}, 1, "x: NOT KNOWN"),
        # One that begins like a known one is not known.
        ({f"{A}_too": "failed"}, {}, 1, f"{A}_too: NOT KNOWN"),
        ({A: "failed", B: "failed"}, {A: "passed", B: "passed"}, 0, f"{A}: {KNOWN[A]}"),
        ({A: "failed", B: "skipped"}, {A: "passed"}, 0, f"{A}: {KNOWN[A]}"),
        ({A: "failed", B: "passed"}, {A: "passed"}, 1, f"{B}: is listed, and passes"),
        ({A: "failed"}, {A: "failed"}, 1, f"{A}: is listed, and fails without the module too"),
    ],
)
def test_conclusion(
    outcomes: dict[str, str],
    without: dict[str, str],
    status: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert conclude(outcomes, without) == status
    assert line in capsys.readouterr().out
