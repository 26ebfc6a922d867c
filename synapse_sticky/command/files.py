# SPDX-License-Identifier: AGPL-3.0-or-later
"""Configuration files one by one, before Synapse joins them."""

from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import attr
import yaml

MODULE: Final = "synapse_sticky.StickyEventsModule"


@attr.s(slots=True, frozen=True, auto_attribs=True)
class ConfigFile:
    """A configuration file, and its options if it could be read.

    Attributes:
        problem: why there are no options, in a sentence; None if there are.
        is_ignored: whether Synapse goes on without the file.
    """

    path: Path
    options: Mapping[str, Any] = attr.Factory(dict)
    problem: str | None = None
    is_ignored: bool = False


def read(path: Path) -> ConfigFile:
    """Read a configuration file, without showing any of it."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        return ConfigFile(path, problem=f"{path} cannot be read: {error.strerror}.")
    except UnicodeDecodeError:
        return ConfigFile(path, problem=f"{path} is not text in UTF-8.")
    except yaml.YAMLError as error:
        # Its text shows lines of the file, in which a secret may stand.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        return ConfigFile(path, problem=f"{path}{where} is not YAML: {problem}.")
    if not isinstance(options, dict):
        problem = f"{path} has no options, so Synapse ignores it."
        return ConfigFile(path, problem=problem, is_ignored=True)
    return ConfigFile(path, options)


def merged(config_files: Iterable[ConfigFile]) -> dict[str, Any]:
    """Return the options that count: an option in a later file replaces an earlier one whole."""
    options: dict[str, Any] = {}
    for file in config_files:
        options.update(file.options)
    return options


def entries(options: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the entries of `modules`, but those that are malformed."""
    listed = options.get("modules")
    return [e for e in listed if isinstance(e, Mapping)] if isinstance(listed, list) else []


def our_entries(options: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the entries of `modules` that load this module."""
    return [entry for entry in entries(options) if entry.get("module") == MODULE]


def named_files(options: Mapping[str, Any], directory: Path) -> Iterator[Path]:
    """Return the files that a configuration names, such as keys and certificates, if they exist."""
    for value in _paths_in(options):
        path = Path(directory, value)
        if path.is_file():
            yield path


def _paths_in(value: Any, is_path: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            text = str(name)
            yield from _paths_in(
                inner,
                text.endswith(("_path", "_file", "log_config"))
                or text == "app_service_config_files",
            )
    elif isinstance(value, list):
        for inner in value:
            yield from _paths_in(inner, is_path)
    elif is_path and isinstance(value, str):
        yield value


def sqlite_path(options: Mapping[str, Any], directory: Path) -> Path | None:
    """Return where the SQLite database is; None if it is PostgreSQL, or cannot be told."""
    database = options.get("database")
    if not isinstance(database, Mapping) or database.get("name", "sqlite3") != "sqlite3":
        return None
    arguments = database.get("args")
    name = arguments.get("database") if isinstance(arguments, Mapping) else None
    return Path(directory, name) if isinstance(name, str) and name != ":memory:" else None


def package_files() -> list[Path]:
    """Return the files of this package, which Synapse's user must be able to read."""
    package = Path(str(files("synapse_sticky")))
    return [package, *sorted(p for p in package.rglob("*") if "__pycache__" not in p.parts)]
