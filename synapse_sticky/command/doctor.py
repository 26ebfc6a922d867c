# SPDX-License-Identifier: AGPL-3.0-or-later
"""``doctor``: runs the checks in the order in which an admin would mend the faults."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import attr
from synapse.module_api.errors import ConfigError

from synapse_sticky.command import (
    calls,
    configuration,
    database,
    files,
    installation,
    progress,
    trial,
)
from synapse_sticky.command.checks import ERROR, OK
from synapse_sticky.command.files import ConfigFile
from synapse_sticky.command.report import Report, sentence
from synapse_sticky.seams import configured
from synapse_sticky.seams.checks import fitting


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Doctor:
    """Checks an installation, running or not.

    Attributes:
        directory: where Synapse runs, for relative paths.
        service_user: the user that runs Synapse, if the admin has said so.
        output: where to show the progress; None for nowhere.
    """

    report: Report
    config_paths: Sequence[str]
    worker_paths: Sequence[str]
    directory: Path
    service_user: str | None
    output: TextIO | None

    def run(self) -> None:
        """Run all checks that need no running server."""
        self._check_seams()
        if not self.config_paths:
            return
        shared = [files.read(Path(p)) for p in configured.find_files(self.config_paths)]
        workers = [files.read(Path(p)) for p in configured.find_files(self.worker_paths)]
        for file in (*shared, *workers):
            self.report.secrets.add_from(file.options)
        can_be_read = configuration.check_files(self.report, [*shared, *workers])
        self._check_service_user(shared, workers)
        if can_be_read:
            configuration.check_modules(self.report, shared)
            configuration.check_workers(self.report, shared, workers)
            self._check_as_synapse_reads_it(shared, workers)

    def _check_seams(self) -> None:
        if not self.report.wants("seams"):
            return
        try:
            with progress.step(self.output, "Starting a new Synapse with the module, to try it"):
                trial.try_module(sys.executable, os.environ)
        except trial.DoesNotFit as error:
            installation.report_misfit(self.report, "seams", str(error))
        else:
            self.report.add(OK, "seams", "A Synapse starts with the module, and delivers.")

    def _check_service_user(
        self, shared: Sequence[ConfigFile], workers: Sequence[ConfigFile]
    ) -> None:
        readable = configuration.readable_files([*shared, *workers], self.directory)
        path = files.sqlite_path(files.merged(shared), self.directory)
        writable = []
        if path is not None:
            # SQLite makes files beside its own.
            writable = [each for each in (path, path.parent) if each.exists()]
        installation.check_service_user(self.report, self.service_user, readable, writable)

    def _check_as_synapse_reads_it(
        self, shared: Sequence[ConfigFile], workers: Sequence[ConfigFile]
    ) -> None:
        with progress.step(self.output, "Reading the configuration as Synapse does"):
            config = self._load(shared)
            for worker in workers:
                self._load([*shared, worker])
        if config is None:
            return
        self.report.add(OK, "synapse-configuration", "Synapse accepts the configuration.")
        try:
            with fitting():
                described = configured.describe(config)
        except ConfigError as error:
            installation.report_misfit(self.report, "synapse-version", error.msg)
            return
        configuration.check_described(self.report, described)
        calls.check_calls(
            self.report, described, need_owner=configured.only_owners_manage_delayed_events()
        )
        with progress.step(self.output, "Looking into the database"):
            database.check_database(self.report, config)

    def _load(self, layers: Sequence[ConfigFile]) -> Any:
        """Return the configuration, or None after adding the mistake to the report."""
        try:
            return configured.load([str(file.path.absolute()) for file in layers])
        except (Exception, SystemExit) as error:
            # Synapse loads the code of other modules too, which may do anything.
            self.report.add(
                ERROR,
                "synapse-configuration",
                _describe_error(error, layers[-1].path),
                "Correct it, and run this again: some checks need a configuration that can be "
                "read. Synapse's documentation describes each option.",
            )
            return None


def _describe_error(error: BaseException, path: Path) -> str:
    place = ".".join(str(part) for part in getattr(error, "path", None) or ())
    text = getattr(error, "msg", None) or str(error) or type(error).__name__
    cause = error.__cause__
    if cause is not None and str(cause) and str(cause) not in str(text):
        text = f"{text}: {cause}"
    where = f"`{place}`: " if place else ""
    return f"Synapse refuses the configuration that ends with {path}. {where}{sentence(text)}"
