"""Everything that `make` does, each in a virtual environment of its own."""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")

# `OLDEST_SYNAPSE` of synapse_sticky/seams/checks.py.
OLDEST = "1.148.0"
# Whatever pip finds.
NEWEST = "newest"

# Older releases of Synapse allow a later one, and then do not start with Redis. Not for the newest:
# if that needed a later one, pip would quietly choose an older Synapse.
FOR_OLDER_RELEASES = ["txredisapi<1.6"]

# What the oldest Synapse runs by default. `make test-all` runs everything there.
# On workers, where processes tell each other most.
OLDEST_ON_WORKERS = ["test_federated_events", "test_sync"]
# Of the tests in `unit`, those that look into Synapse.
OLDEST_IN_UNIT = [
    "test_config",
    "test_default_rates",
    "test_folders",
    "test_guard",
    "test_own_implementation",
    "test_sharing",
]
# Others say by a mark that they say nothing of Synapse.
OLDEST_BY_MARK = "not any_synapse"

CLIENTS = "tests/clients"
ELEMENT_CALL = "tests/element_call"
JAVASCRIPT = "tests/javascript"
RELEASES = "tests/releases"
MONITORING = "tests/monitoring"
BROWSER = "tests/browser"

# Synapse needs a while to end in an orderly way.
PATIENCE_S = 60

nox.options.sessions = ["lint", "docs", "tests"]
nox.options.reuse_venv = "yes"


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types, against the newest Synapse."""
    _install(session, "matrix-synapse", *_group("lint", "test", "bench"))
    failed = []
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        try:
            session.run(*command)
        except nox.command.CommandFailed:
            failed.append(" ".join(command))
    if failed:
        session.error(f"failed: {', '.join(failed)}")


@nox.session
@nox.parametrize("synapse", [NEWEST, OLDEST], ids=["newest", "oldest"])
def tests(session: nox.Session, synapse: str) -> None:
    """Run the whole suite on the newest and on the oldest supported Synapse."""
    arguments = session.posargs
    if synapse == OLDEST:
        # Workers use PostgreSQL too.
        arguments = ["--deployments", "sqlite,workers", *arguments]
        if "--repeats" not in arguments:
            selected = " and ".join(
                [
                    f"(not workers or {' or '.join(OLDEST_ON_WORKERS)})",
                    f"(not unit or {' or '.join(OLDEST_IN_UNIT)})",
                ]
            )
            arguments = ["--kills=5", "-k", selected, "-m", OLDEST_BY_MARK, *arguments]
    _run_suite(session, synapse, arguments)


@nox.session
def tests_on(session: nox.Session) -> None:
    """Run the suite on any Synapse: the first argument is its version."""
    if not session.posargs:
        session.error("say which Synapse, for example: nox -s tests_on -- 1.155.0")
    synapse, *arguments = session.posargs
    _run_suite(session, synapse, arguments)


@nox.session
def test_upstream(session: nox.Session) -> None:
    """Run Synapse's own tests with the module: the first argument is the version of Synapse."""
    synapse, *arguments = session.posargs or [NEWEST]
    # For psycopg2, which is compiled, and for the tests of several processes.
    _install_servers(session)
    _install(session, *_synapse(synapse, "all,test"), ".")
    session.run("python", "-m", "upstream", *arguments, interrupt_timeout=PATIENCE_S)


@nox.session
def javascript(session: nox.Session) -> None:
    """Compare the ephemeral map with matrix-js-sdk's, in Node; without any Synapse."""
    _install(session, *_group("javascript"), ".")
    _install_from_npm(session, JAVASCRIPT)
    # The fixtures of the other tests start Synapse.
    _pytest(session, "--noconftest", JAVASCRIPT)


@nox.session
@nox.parametrize("synapse", [NEWEST, OLDEST], ids=["newest", "oldest"])
def clients(session: nox.Session, synapse: str) -> None:
    """Let real clients talk to real Synapses, on the newest and on the oldest supported one."""
    # For the bindings of the Rust SDK on older systems.
    _install_packages(session, _missing_compiler)
    _install(session, *_synapse(synapse), *_group("test", "clients"), ".")
    _install_from_npm(session, CLIENTS)
    session.run("python", "-m", "tests.clients.bindings")
    peer = _python_with(session, _other_end(synapse))
    _pytest(session, "--deployments", "sqlite", f"--peer-python={peer}", CLIENTS)


@nox.session
@nox.parametrize("synapse", [NEWEST, OLDEST], ids=["newest", "oldest"])
def element_call(session: nox.Session, synapse: str) -> None:
    """Hold calls with Element Call in a headless Chromium, on the newest and the oldest Synapse."""
    _install_chromium(session)
    _install(session, *_synapse(synapse), *_group("test", "clients", "browser"), ".")
    _install_from_npm(session, ELEMENT_CALL)
    peer = _python_with(session, _other_end(synapse))
    _pytest(session, "--deployments", "sqlite", f"--peer-python={peer}", ELEMENT_CALL)


@nox.session
def releases(session: nox.Session) -> None:
    """Try releases of Synapse from the package index, as `synapse-sticky check-release` does."""
    _install(session, "matrix-synapse", *_group("test"), ".")
    # The fixtures of the other tests start Synapse.
    _pytest(session, "--noconftest", RELEASES)


@nox.session
def monitoring(session: nox.Session) -> None:
    """Let a real Prometheus scrape a worker deployment, for the alerts and the dashboard."""
    _install_servers(session, "prometheus")
    packages = _group("test", "monitoring")
    _install(session, "matrix-synapse[postgres,redis]", *packages, "-e", ".")
    _pytest(session, "--deployments", "workers", MONITORING)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site of the documentation, into build/site; a broken link fails."""
    _install(session, *_group("docs"))
    # What it has to say of its own next version is not about this site.
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def browser(session: nox.Session) -> None:
    """Look at the page for admins in a headless Chromium, beside a real Synapse."""
    _install_chromium(session)
    _install(session, "matrix-synapse", *_group("test", "browser"), ".")
    _pytest(session, BROWSER, *session.posargs)


@nox.session
def quick(session: nox.Session) -> None:
    """Run what is quick on the newest Synapse, with SQLite."""
    _install(session, "matrix-synapse", *_group("test"), "-e", ".")
    _pytest(session, "-m", "not slow", "--deployments", "sqlite", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Measure which lines and branches the quick tests run, in Synapse's processes too."""
    _install(session, "matrix-synapse", *_group("test", "coverage"), "-e", ".")
    session.run("coverage", "erase")
    selection = ["-m", "not slow", "--deployments", "sqlite", *session.posargs]
    try:
        session.run("coverage", "run", "-m", "pytest", *selection, interrupt_timeout=PATIENCE_S)
    finally:
        session.run("coverage", "combine", "--quiet")
        session.run("coverage", "report")


@nox.session
def demo(session: nox.Session) -> None:
    """Show sticky events on a real Synapse, or between three with --federation."""
    # What the demo prints comes first, except where there is a lot to install.
    quietly = Path(session.bin, "synapse_homeserver").exists()
    _install(session, "matrix-synapse", *_group("test"), "-e", ".", quietly=quietly)
    session.run("python", "-m", "demo", *session.posargs, interrupt_timeout=PATIENCE_S)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what the module costs."""
    _install_servers(session)
    _install(session, "matrix-synapse[postgres,redis]", *_group("test", "bench"), ".")
    session.run("python", "-m", "benchmarks", *session.posargs, interrupt_timeout=PATIENCE_S)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel and the source distribution, into dist/."""
    _install(session, "build")
    session.run("python", "-m", "build", *session.posargs)


def _group(*names: str) -> tuple[str, ...]:
    return nox.project.dependency_groups(PYPROJECT, *names)


def _install(session: nox.Session, *what: str, quietly: bool = False) -> None:
    """Install with pip; what is named here as new as it may be."""
    session.install("--upgrade", *what, silent=quietly)


def _run_suite(session: nox.Session, synapse: str, arguments: list[str]) -> None:
    if _deployments(arguments) != {"sqlite"}:
        _install_servers(session)
    _install(session, *_synapse(synapse, "postgres,redis"), *_group("test"), ".")
    # A federation has servers of different releases in it.
    peer = _python_with(session, _other_end(synapse))
    # Tests wait for servers, or for time to pass, most of the time: more than there are cores.
    in_parallel = ["-n", "4"]
    # In one part: pytest takes a path of its own for tests, before it knows of the option.
    options = [f"--peer-python={peer}"]
    if synapse != OLDEST:
        # Once with Synapse's own sticky events switched on: the newer, the more there is of them.
        options.append("--own-flag=sqlite")
    _pytest(session, *in_parallel, *options, *arguments)


def _synapse(version: str, extras: str = "") -> list[str]:
    """Requirements for a release of Synapse."""
    name = f"matrix-synapse[{extras}]" if extras else "matrix-synapse"
    return [name] if version == NEWEST else [f"{name}=={version}", *FOR_OLDER_RELEASES]


def _other_end(synapse: str) -> str:
    """The oldest supported Synapse, or the newest if it is the oldest."""
    return NEWEST if synapse == OLDEST else OLDEST


def _python_with(session: nox.Session, synapse: str) -> str:
    """A Python that has this Synapse and the module, beside that of the session."""
    directory = ROOT / ".nox" / f"peer-{synapse}"
    python = str(directory / "bin" / "python")
    if not Path(python).exists():
        session.run("python", "-m", "venv", str(directory))
    session.run(
        *(python, "-m", "pip", "install", "--quiet", "--upgrade", *_synapse(synapse), "."),
        external=True,
    )
    return python


def _install_from_npm(session: nox.Session, directory: str) -> None:
    """Install exactly what package-lock.json says; nothing of it may run anything of its own."""
    session.run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", directory)


def _pytest(session: nox.Session, *arguments: str) -> None:
    session.run("python", "-m", "pytest", "-v", *arguments, interrupt_timeout=PATIENCE_S)


def _deployments(arguments: list[str]) -> set[str]:
    """Those that pytest's arguments choose, as in tests/conftest.py."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deployments", default="sqlite,postgres,workers")
    return set(parser.parse_known_args(arguments)[0].deployments.split(","))


def _install_servers(session: nox.Session, *programs: str) -> None:
    """Install the servers that the tests start, and what psycopg2 is compiled with, if missing.

    Args:
        programs: others that are needed, of which Debian's packages have the same names.
    """
    advice = "; or leave out what needs them, with the argument --deployments sqlite"
    _install_packages(session, lambda: _missing_packages(*programs), advice)


def _install_chromium(session: nox.Session) -> None:
    """Install Chromium, if it is missing."""
    # Without a font of the system it shows no text.
    _install_packages(
        session, lambda: [] if shutil.which("chromium") else ["chromium", "fonts-dejavu-core"]
    )


def _install_packages(
    session: nox.Session, find_missing: Callable[[], list[str]], advice: str = ""
) -> None:
    """Install Debian packages that are missing, as far as that is possible here."""
    packages = find_missing()
    if not packages:
        return
    session.log(f"Not found on this machine: {', '.join(packages)}")
    apt_get = shutil.which("apt-get")
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    if apt_get is not None and (not sudo or shutil.which("sudo") is not None):
        # Not in our own environment: sudo does not pass that on.
        run = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", apt_get]
        install = ["install", "--yes", "--no-install-recommends", *packages]
        for command in ([*run, "update"], [*run, *install]):
            session.log(" ".join(command))
            subprocess.run(command, check=False)
    packages = find_missing()
    if packages:
        names = " ".join(packages)
        session.error(f"install these first (the names are Debian's): {names}{advice}")


def _missing_packages(*programs: str) -> list[str]:
    """Names of the Debian packages for what is not there."""
    sys.path.insert(0, str(ROOT))
    from harness import postgres, redis

    missing = [program for program in programs if shutil.which(program) is None]
    servers = {"postgresql": postgres.find_binaries, "redis-server": redis.find_binary}
    for package, find in servers.items():
        try:
            find()
        except FileNotFoundError:
            missing.append(package)
    missing += _missing_compiler()
    if not _libpq_headers_exist():
        missing.append("libpq-dev")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("python3-dev")
    return missing


def _missing_compiler() -> list[str]:
    return [] if shutil.which("cc") else ["gcc", "libc6-dev"]


def _libpq_headers_exist() -> bool:
    # Debian has a pg_config without them that only says so.
    if shutil.which("pg_config") is None:
        return False
    answer = subprocess.run(
        ["pg_config", "--includedir"], capture_output=True, text=True, check=False
    )
    return answer.returncode == 0 and Path(answer.stdout.strip(), "libpq-fe.h").exists()
