"""`synapse-sticky check-release`, as far as no package index is needed.

`tests/releases` has the rest.
"""

import sys
from pathlib import Path

import pytest

from tests.command import run

pytestmark = pytest.mark.any_synapse


@pytest.fixture(autouse=True)
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let pip find nobody who answers, and no settings of this machine."""
    for name, value in (
        ("PIP_CONFIG_FILE", "/dev/null"),
        ("PIP_INDEX_URL", "http://127.0.0.1:9/simple"),
        ("PIP_EXTRA_INDEX_URL", ""),
        ("PIP_FIND_LINKS", ""),
        ("PIP_RETRIES", "0"),
    ):
        monkeypatch.setenv(name, value)


def test_no_network() -> None:
    answer = run("check-release", "1.164.0")
    assert answer.code == 3
    assert "The package index cannot be reached" in answer.errors
    assert answer.output == ""


def test_too_old() -> None:
    answer = run("check-release", "1.147.1")
    assert answer.code == 2
    assert "needs Synapse 1.148.0 or later, and 1.147.1 is older." in answer.output


def test_no_virtual_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a Debian without python3-venv."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ensurepip is not available'\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    answer = run("check-release", "1.164.0")
    assert answer.code == 3
    assert "On Debian, install python3-venv. It said: ensurepip is not available." in answer.errors


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = run("check-release", "1.164.0", "--keep", str(tmp_path / "file"))
    assert answer.code == 3
    assert "cannot be made: Not a directory" in answer.errors
