# SPDX-License-Identifier: AGPL-3.0-or-later
"""``check-release``: whether the module fits a release of Synapse, before a server has it."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TextIO

from packaging.version import Version

from synapse_sticky._version import __version__
from synapse_sticky.command import files, progress
from synapse_sticky.command.report import CouldNotRun, sentence
from synapse_sticky.command.trial import DoesNotFit, try_module

_INSTALL_S: Final = 1800
# For releases that are not told from their number: its text ends the search.
_OLD_ENVIRONMENT: Final = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


def check_release(
    version: Version, oldest: Version, kept: Path | None, output: TextIO
) -> tuple[bool, str]:
    """Install a release of Synapse with this package, and try it.

    Args:
        oldest: the oldest release that the module supports.
        kept: where to keep virtual environments for the next time; None for nowhere.

    Returns:
        whether it fits, and a sentence that says so.

    Raises:
        CouldNotRun: if that cannot be found out.
    """
    if version < oldest:
        return False, (
            f"synapse-sticky {__version__} needs Synapse {oldest} or later, and {version} is older."
        )
    with _directory(kept, version) as directory:
        python = _install(version, directory, output)
        library = directory / "module"
        _copy_package(library)
        environment = {k: v for k, v in os.environ.items() if k not in _OLD_ENVIRONMENT}
        environment["PYTHONPATH"] = str(library)
        try:
            with progress.step(output, f"Starting Synapse {version} with the module"):
                try_module(python, environment)
        except DoesNotFit as error:
            return False, (
                f"synapse-sticky {__version__} does not work with Synapse {version}: {error}"
            )
    return True, (
        f"synapse-sticky {__version__} fits Synapse {version}: it starts with the module, and "
        "delivers sticky events."
    )


@contextlib.contextmanager
def _directory(kept: Path | None, version: Version) -> Iterator[Path]:
    if kept is not None:
        directory = kept / f"synapse-{version}-python{sys.version_info[0]}.{sys.version_info[1]}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CouldNotRun(f"{directory} cannot be made: {error.strerror}.") from error
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="synapse-sticky-") as name:
        yield Path(name)


def _install(version: Version, directory: Path, output: TextIO) -> str:
    """Return a Python that has this Synapse."""
    environment = directory / "environment"
    python = environment / "bin" / "python"
    with progress.step(output, "Making a virtual environment"):
        if not python.exists():
            made = _run([sys.executable, "-m", "venv", str(environment)])
            if made.returncode:
                shutil.rmtree(environment, ignore_errors=True)
                raise CouldNotRun(
                    "Python cannot make a virtual environment here. On Debian, install "
                    f"python3-venv. It said: {sentence(_last_line(made))}"
                )
    with progress.step(output, f"Installing Synapse {version}, which takes a minute or two"):
        installed = _run(
            [
                str(python),
                *("-m", "pip", "install", "--disable-pip-version-check", "--no-input"),
                *("--prefer-binary", f"matrix-synapse=={version}"),
            ]
        )
    if installed.returncode:
        raise CouldNotRun(_why_not_installed(version, installed))
    return str(python)


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if k not in _OLD_ENVIRONMENT}
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=_INSTALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CouldNotRun(f"{command[2]} has not ended after {_INSTALL_S // 60} min.") from None


def _why_not_installed(version: Version, installed: "subprocess.CompletedProcess[str]") -> str:
    said = installed.stdout + installed.stderr
    if "No matching distribution found for matrix-synapse" in said:
        # Without an index pip knows of no version at all.
        if "(from versions: none)" in said:
            return (
                "The package index cannot be reached, or has no Synapse. Check the network, and "
                "pip's own settings."
            )
        if "Requires-Python" in said or "requires a different python" in said.lower():
            return f"Synapse {version} does not support Python {sys.version.split()[0]}."
        return f"There is no Synapse {version} on the package index."
    if "No space left" in said:
        return "There is no space left on the device; TMPDIR names another one."
    return f"Synapse {version} cannot be installed: {sentence(_last_line(installed))}"


def _last_line(done: "subprocess.CompletedProcess[str]") -> str:
    lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    return (errors or lines or ["nothing"])[-1]


def _copy_package(library: Path) -> None:
    """Put exactly the installed code of this package where the other Python finds it."""
    shutil.rmtree(library, ignore_errors=True)
    shutil.copytree(
        files.package_files()[0],
        library / "synapse_sticky",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
