"""Releases are installed as an admin would have them tried, without a server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def check(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `check-release`."""
    return subprocess.run(
        [sys.executable, "-m", "synapse_sticky.command", "check-release", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_release_that_fits_and_then_does_not(tmp_path: Path) -> None:
    """A release candidate; once more from what was kept, with a part of Synapse gone."""
    answer = check("1.164.0rc3", "--keep", str(tmp_path))
    assert answer.returncode == 0, answer.stderr
    assert "fits Synapse 1.164.0rc3: it starts with the module, and delivers" in answer.stdout
    for step in ("Making a virtual environment ...", "Installing Synapse", "Starting Synapse"):
        assert step in answer.stderr
    (source,) = tmp_path.rglob("synapse/handlers/sync.py")
    text = source.read_text()
    name = "_generate_sync_entry_for_rooms"
    assert name in text
    source.write_text(text.replace(name, "_renamed"))
    answer = check("1.164.0rc3", "--keep", str(tmp_path))
    assert answer.returncode == 2
    assert f"does not fit Synapse 1.164.0rc3: SyncHandler.{name} is not there" in answer.stdout
    assert len(answer.stdout.splitlines()) == 1


def test_oldest_release() -> None:
    """The other end of the range, and nothing is left behind."""
    answer = check("1.148.0")
    assert answer.returncode == 0, answer.stderr
    assert "fits Synapse 1.148.0" in answer.stdout


def test_release_that_is_not_there() -> None:
    """It is told in a sentence, and is no answer."""
    answer = check("1.999.0")
    assert answer.returncode == 3
    assert "There is no Synapse 1.999.0 on the package index." in answer.stderr


@pytest.mark.parametrize("version", ["1.147.1", "1.148.0rc1"])
def test_release_that_is_too_old(version: str) -> None:
    """It is not even installed."""
    answer = check(version)
    assert answer.returncode == 2
    assert f"needs Synapse 1.148.0 or later, and {version} is older." in answer.stdout
    assert "Installing" not in answer.stderr
