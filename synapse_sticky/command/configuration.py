# SPDX-License-Identifier: AGPL-3.0-or-later
"""Checks on the configuration: the files, the list of modules, the workers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from synapse.module_api.errors import ConfigError

from synapse_sticky.command import files
from synapse_sticky.command.checks import ERROR, NOTE, OK, WARNING
from synapse_sticky.command.files import MODULE, ConfigFile
from synapse_sticky.command.report import Report, sentence
from synapse_sticky.command.text import counted
from synapse_sticky.config import Default, StickyEventsConfig
from synapse_sticky.seams.configured import Configured

_ENTRY: Final = f"modules:\n  - module: {MODULE}\n    config: {{}}"
_MAIN: Final = ("main", "master")


def check_files(report: Report, config_files: Sequence[ConfigFile]) -> bool:
    """Check that files can be read; return whether Synapse can go on with them."""
    broken = [file for file in config_files if file.problem is not None]
    for file in broken:
        report.add(
            WARNING if file.is_ignored else ERROR,
            "files",
            file.problem or "",
            "Remove the file if it is not needed."
            if file.is_ignored
            else "Correct the path, its permissions or its text.",
        )
    if not broken:
        report.add(OK, "files", f"{counted(len(config_files), 'configuration file')} can be read.")
    return all(file.is_ignored for file in broken)


def check_modules(report: Report, config_files: Sequence[ConfigFile]) -> None:
    """Check the list of modules, file by file and as it counts."""
    options = files.merged(config_files)
    _check_replaced(report, config_files)
    ours = files.our_entries(options)
    if len(ours) > 1:
        report.add(
            ERROR,
            "modules",
            f"The module is listed {len(ours)} times.",
            "Remove all of its entries but one.",
        )
    elif not ours:
        report.add(ERROR, "modules", _why_missing(options), f"Add the entry:\n{_ENTRY}")
    else:
        report.add(OK, "modules", "The module is in `modules`.")
    for entry in ours:
        _check_options(report, entry)


def _why_missing(options: Mapping[str, Any]) -> str:
    listed = options.get("modules")
    if listed is not None and not isinstance(listed, list):
        return "`modules` is not a list."
    for entry in files.entries(options):
        name = entry.get("module")
        if isinstance(name, str) and name.lower().replace("-", "_").startswith("synapse_sticky"):
            return f"`modules` names {name!r}, where it must be {MODULE!r}."
    experimental = options.get("experimental_features")
    if isinstance(experimental, Mapping) and MODULE in str(experimental):
        return "The module is not in `modules`, but in `experimental_features`."
    return "The module is not in the list `modules`."


def _check_options(report: Report, entry: Mapping[str, Any]) -> None:
    unknown = sorted(str(key) for key in entry if key not in ("module", "config"))
    if unknown:
        report.add(
            ERROR,
            "module-options",
            f"{', '.join(unknown)} stands beside `config`, where nothing reads it.",
            "Indent the options, so that they stand below `config`.",
        )
        return
    try:
        config = StickyEventsConfig.parse(entry.get("config") or {})
    except ConfigError as error:
        path = ".".join(str(part) for part in error.path or ())
        report.add(
            ERROR,
            "module-options",
            f"`config.{path}`: {sentence(error.msg)}" if path else sentence(error.msg),
            "Correct the option; sample_config.yaml explains each.",
        )
        return
    report.add(OK, "module-options", "The module's options are allowed.")
    if config.enabled_by_default is Default.ALL:
        report.add(OK, "default-switch", "Sticky events are on in all rooms by default.")
    else:
        report.add(
            NOTE,
            "default-switch",
            f"`enabled_by_default` is {config.enabled_by_default.value}.",
            "Nothing, if that is intended. The admin API and room settings switch rooms on.",
        )


def _check_replaced(report: Report, config_files: Sequence[ConfigFile]) -> None:
    listing = [file for file in config_files if "modules" in file.options]
    if len(listing) < 2:
        report.add(OK, "modules-replaced", "No file replaces `modules` of another.")
        return
    last = listing[-1]
    kept = [entry.get("module") for entry in files.entries(last.options)]
    for file in listing[:-1]:
        lost = [
            str(entry.get("module"))
            for entry in files.entries(file.options)
            if entry.get("module") not in kept
        ]
        report.add(
            ERROR if MODULE in lost else WARNING,
            "modules-replaced",
            f"`modules` in {last.path} replaces that in {file.path}"
            + (f", so these are not loaded: {', '.join(lost)}." if lost else "."),
            f"Keep one list `modules`, with all entries, in {last.path}.",
        )


def check_described(report: Report, described: Configured) -> None:
    """Check whether features of Synapse are on that the module replaces, or leaves alone."""
    if described.own_sticky_events:
        report.add(
            NOTE,
            "own-sticky-events",
            "`msc4354_enabled` is true: the module takes the place of Synapse's own sticky "
            "events, and they are back if the module is removed.",
            "Nothing; or set it to false, if they are not to be back.",
        )
    else:
        report.add(OK, "own-sticky-events", "Synapse's own sticky events are off.")
    if described.own_extremities:
        report.add(
            NOTE,
            "own-extremities",
            "`msc4370_enabled` is true: Synapse's own endpoint answers other servers.",
            "Nothing; or set it to false, to have the module's.",
        )
    else:
        report.add(OK, "own-extremities", "Synapse's own MSC4370 endpoint is off.")


# Workers


def check_workers(
    report: Report, shared: Sequence[ConfigFile], workers: Sequence[ConfigFile]
) -> None:
    """Check that each worker loads the module, as far as their files are given."""
    options = files.merged(shared)
    background = options.get("run_background_tasks_on")
    names = set()
    for worker in workers:
        name = str(worker.options.get("worker_name") or worker.path.name)
        names.add(name)
        _check_worker(report, name, worker, [*shared, worker], is_background=name == background)
    missing = sorted(_named_workers(options) - names - set(_MAIN))
    if missing:
        report.add(
            NOTE,
            "worker-files",
            f"The configuration names workers whose files were not given: {', '.join(missing)}.",
            "Give each file: `--worker-config FILE`.",
        )
    elif workers:
        report.add(
            OK, "worker-files", f"The files of {counted(len(workers), 'worker')} were given."
        )


def _check_worker(
    report: Report,
    name: str,
    worker: ConfigFile,
    layers: Sequence[ConfigFile],
    *,
    is_background: bool,
) -> None:
    if "worker_app" not in worker.options:
        report.add(
            WARNING,
            "worker-files",
            f"{worker.path} has no `worker_app`, so it is not the file of a worker.",
            "Give the files of workers only; all others with `-c`.",
        )
        return
    ours = files.our_entries(files.merged(layers))
    if len(ours) == 1:
        report.add(OK, "worker-modules", f"{name} loads the module.")
        return
    role = "; it runs the background tasks, so no sticky event is noticed" if is_background else ""
    report.add(
        ERROR,
        "worker-modules",
        f"{name} does not load the module{role}: `modules` in {worker.path} replaces the shared "
        "list."
        if "modules" in worker.options
        else f"{name} does not load the module{role}: it is not in the shared list either.",
        f"Remove `modules` from {worker.path}."
        if "modules" in worker.options
        else "Add the module to `modules` in the shared configuration.",
    )


def _named_workers(options: Mapping[str, Any]) -> set[str]:
    """Return the names of workers in the shared configuration."""
    names: set[str] = set()
    for option in ("instance_map", "federation_sender_instances", "pusher_instances"):
        names |= set(_texts(options.get(option) or ()))
    writers = options.get("stream_writers")
    for value in writers.values() if isinstance(writers, Mapping) else ():
        names |= set(_texts([value] if isinstance(value, str) else value or ()))
    for option, value in options.items():
        if option in ("run_background_tasks_on", "media_instance_running_background_jobs") or (
            option.endswith("_from_worker")
        ):
            names |= set(_texts([value]))
    return names


def _texts(values: Iterable[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


def readable_files(layers: Iterable[ConfigFile], directory: Path) -> list[Path]:
    """Return the files that Synapse's user must be able to read."""
    paths: dict[Path, None] = {}
    for file in layers:
        paths[file.path.absolute()] = None
        for path in files.named_files(file.options, directory):
            paths[path] = None
    for path in files.package_files():
        paths[path] = None
    return list(paths)
