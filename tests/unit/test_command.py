"""The parts of the command that need no server."""

import io
import json
import re
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synapse_sticky.command.checks import BY_ID, CHECKS, ERROR, NOTE, OK, WARNING, table
from synapse_sticky.command.http import place_of
from synapse_sticky.command.report import EXIT_CODES, Report
from synapse_sticky.command.text import HIDDEN, Secrets, clean, clean_line
from synapse_sticky.command.watch import Snapshot, view

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "synapse_sticky").rglob("*.py"))


def test_documentation_has_the_checks() -> None:
    """`python -m synapse_sticky.command.checks` prints what has to stand there."""
    assert table() in (ROOT / "docs" / "command.md").read_text(encoding="utf-8")


def test_every_check_has_a_test() -> None:
    """By its ID in the tests of the doctor, beside those that a sound installation passes."""
    tests = (ROOT / "tests" / "test_command_doctor.py").read_text(encoding="utf-8")
    missing = [c.id for c in CHECKS if set(c.levels) - {OK} and f'"{c.id}"' not in tests]
    assert missing == []


def test_checks_are_sentences() -> None:
    assert len(BY_ID) == len(CHECKS)
    for check in CHECKS:
        assert re.fullmatch(r"[a-z-]+", check.id)
        assert "?" in check.question
        assert check.why.endswith(".")


def test_only_the_command_imports_what_only_it_needs() -> None:
    for path in SOURCES:
        if path.parent.name != "command":
            assert not re.search(r"^\s*(import|from) (rich|yaml)\b", path.read_text(), re.M), path


def test_report() -> None:
    """The worst comes last; a check that is skipped leaves nothing."""
    report = Report(skipped=["files"])
    assert report.worst is OK
    report.add(ERROR, "files", "Broken.", "Mend.")
    report.add(WARNING, "clean-up", "Left over.", "Leave it.")
    report.add(OK, "url", "It answers.")
    assert report.worst is WARNING
    assert EXIT_CODES[report.worst] == 1
    stream = io.StringIO()
    report.write(stream)
    assert stream.getvalue().startswith("ok       url: It answers.\n\nwarning  clean-up\n")
    assert stream.getvalue().endswith("\n0 errors, 1 warning, 0 notes; 1 ok.\n")
    document = json.loads(report.as_json({"synapse": None}))
    assert document["level"] == "warning"
    assert [f["do"] for f in document["findings"]] == ["Leave it.", None]
    with pytest.raises(ValueError, match="url has no findings that are note"):
        report.add(NOTE, "url", "x")


@given(st.text())
def test_cleaned_text_holds_nothing_but_text(text: str) -> None:
    """No control characters, no change of direction, nothing that cannot be written."""
    for cleaned in (clean(text), clean_line(text)):
        assert all(c.isprintable() or c == "\n" for c in cleaned)
        cleaned.encode()
    assert "\n" not in clean_line(text)


@given(st.text(string.printable.strip()))
def test_plain_text_stays(text: str) -> None:
    assert clean_line(text) == text


def test_secrets() -> None:
    """Those of every kind are hidden, and what only has a name like one is not."""
    secrets = Secrets()
    secrets.add_from(
        {
            "registration_shared_secret": "secret-1",
            "database": {"args": {"password": "secret-2", "host": "db.example.com"}},
            "redis": {"password": 12345678},
            "modules": [{"config": {"api_token": "secret-3"}}],
            "email": {"smtp_pass": "secret-4", "smtp_user": "someone"},
            "macaroon_secret_key_path": "/etc/key",
            "rc_registration_token_validity": {"burst_count": 100000},
            "registration_requires_token": True,
        }
    )
    shown = secrets.hide(
        "secret-1 secret-2 12345678 secret-3 secret-4 /etc/key 100000 True someone"
    )
    assert shown == f"{f'{HIDDEN} ' * 5}/etc/key 100000 True someone"


@pytest.mark.parametrize(
    "url", ["", "example.com", "ftp://x", "https://", "https://x:y", "https://a:b@c", "http://x?y"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        place_of(url)


def test_path_of_a_url_is_kept() -> None:
    assert place_of("https://example.com/matrix/").prefix == "/matrix"


def test_view_of_a_crowded_room() -> None:
    """What does not fit is counted, the states of servers are words, and an age is subtracted."""
    from rich.console import Console

    status = {"live": 9, "held": {}, "owed": 3, "indexer": {"behind": 2}}
    entry = {"sender": "@a:x", "type": "t", "sticky_key": None, "opaque": False}
    server = {"owed": 3, "oldest_owed_ms": 400_000, "obstacle": None}
    room = {
        "room_id": "!r:x",
        "enabled": True,
        "enabled_by": "room",
        "held": {},
        "events": [],
    }
    snapshot = Snapshot(
        status,
        taken_s=100,
        room=room,
        entries=[{**entry, "remaining_ms": n * 10_000} for n in range(1, 10)],
        servers=[
            {**server, "server_name": "a", "reason": "backing_off"},
            {**server, "server_name": "b", "reason": "trying", "obstacle": "it says no"},
        ],
    )
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    console.print(view(snapshot, 110, "https://x", height=22, problem="Nobody."))
    shown = stream.getvalue()
    assert "2 not noticed yet" in shown
    assert "No new answer for 10 s: Nobody." in shown
    assert "and 6 more" in shown
    assert re.search(r"@a:x +t +over\s", shown)
    assert re.search(r"@a:x +t +0:20\s", shown)
    assert re.search(r"a +3 +6:40 +does not answer", shown)
    assert re.search(r"b +3 +6:40 +is being sent them: it says no", shown)
    assert len(shown.splitlines()) <= 22
