# SPDX-License-Identifier: AGPL-3.0-or-later
"""Checks on the installed code, and on who can read the files."""

import json
import os
import pwd
from collections.abc import Collection
from pathlib import Path
from typing import Final

from packaging.version import InvalidVersion, Version

from synapse_sticky.command.checks import ERROR, NOTE, OK, WARNING
from synapse_sticky.command.report import Report

# As the packages of Debian and Fedora, and the playbook, call it.
_USUAL_USERS: Final = ("matrix-synapse", "synapse")
_MOST_NAMED: Final = 5


def check_version(report: Report) -> bool:
    """Check the release of Synapse; return whether anything of it can be used."""
    try:
        from synapse_sticky.seams import checks
    except ImportError:
        report.add(
            ERROR,
            "synapse-version",
            "There is no Synapse in this Python environment.",
            "Install synapse-sticky into the environment that Synapse runs in, and run the "
            "command from there, for example /opt/venvs/matrix-synapse/bin/synapse-sticky.",
        )
        return False
    found = checks.synapse_version()
    if found < checks.OLDEST_SYNAPSE:
        report.add(
            ERROR,
            "synapse-version",
            f"This is Synapse {found}, and the module needs {checks.OLDEST_SYNAPSE} or later.",
            "Upgrade Synapse.",
        )
        return False
    tested = f"The module is tested with {checks.TESTED_RANGE}."
    if checks.is_untested(found):
        report.add(
            WARNING,
            "synapse-version",
            f"This is Synapse {found}. {tested}",
            "Look for a newer synapse-sticky. The module works if the seams fit.",
        )
    else:
        report.add(OK, "synapse-version", f"This is Synapse {found}. {tested}")
    return True


def report_misfit(report: Report, check_id: str, text: str) -> None:
    """Report that this Synapse is not as the module, or this command, expects it."""
    report.add(
        ERROR,
        check_id,
        text,
        "Install a synapse-sticky made for this Synapse, or go back to a Synapse that was tested. "
        "Do not restart the server before.",
    )


def parse_version(text: str) -> Version:
    """Return a version that an admin has given.

    Raises:
        ValueError: if it is none.
    """
    try:
        return Version(text)
    except InvalidVersion:
        raise ValueError(f"{text!r} is no version of Synapse, such as 1.164.0") from None


def check_service_user(
    report: Report, user: str | None, readable: Collection[Path], writable: Collection[Path]
) -> None:
    """Check that Synapse's user can read files, and write to others.

    Args:
        user: its name; None for the usual one, or the one who runs this.
    """
    entry = _entry(user)
    if entry is None:
        report.add(
            ERROR if user is not None else NOTE,
            "service-user",
            f"This machine has no user {user!r}."
            if user is not None
            else "It is not known which user runs Synapse, so it was not checked which files "
            "that user can read.",
            "Name the user: `--service-user NAME`.",
        )
        return
    if os.geteuid() not in (0, entry.pw_uid):
        report.add(
            NOTE,
            "service-user",
            f"Only root and {entry.pw_name} can tell which files {entry.pw_name} can read.",
            f"Run this as {entry.pw_name} or as root to check it.",
        )
        return
    wrong = _forbidden(entry, readable, writable)
    if not wrong:
        report.add(OK, "service-user", f"{entry.pw_name} can read all {len(readable)} files.")
        return
    named = ", ".join(wrong[:_MOST_NAMED])
    more = f", and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
    report.add(
        ERROR,
        "service-user",
        f"{entry.pw_name} cannot {named}{more}.",
        f"Give the files to {entry.pw_name} or its group, and let it enter the folders above "
        "them. If they are those of synapse_sticky, install it again with `umask 022`.",
    )


def _entry(user: str | None) -> pwd.struct_passwd | None:
    names = [user] if user is not None else list(_USUAL_USERS)
    for name in names:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    if user is None and os.geteuid() != 0:
        try:
            return pwd.getpwuid(os.geteuid())
        except KeyError:
            # As in a container.
            return None
    return None


def _forbidden(
    entry: pwd.struct_passwd, readable: Collection[Path], writable: Collection[Path]
) -> list[str]:
    """Return the accesses that a user is denied, tried as that user if this is root."""
    if os.geteuid() == entry.pw_uid:
        return _forbidden_here(readable, writable)
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        # Whatever happens here must not go on as the command.
        try:
            groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
            os.setgroups(groups)
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
            with os.fdopen(sender, "w") as stream:
                json.dump(_forbidden_here(readable, writable), stream)
        finally:
            os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    wrong: list[str] = json.loads(text) if text else [f"become user {entry.pw_name}"]
    return wrong


def _forbidden_here(readable: Collection[Path], writable: Collection[Path]) -> list[str]:
    wrong = [f"read {path}" for path in readable if not os.access(path, _mode(path))]
    return wrong + [f"write to {path}" for path in writable if not os.access(path, os.W_OK)]


def _mode(path: Path) -> int:
    try:
        return os.R_OK | (os.X_OK if path.is_dir() else 0)
    except PermissionError:
        # In a folder that cannot be entered.
        return os.R_OK
