# SPDX-License-Identifier: AGPL-3.0-or-later
"""The command line."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from synapse_sticky._version import __version__
from synapse_sticky.command.checks import BY_ID
from synapse_sticky.command.http import Client, place_of
from synapse_sticky.command.report import COULD_NOT_RUN, EXIT_CODES, CouldNotRun, Report

TOKEN_VARIABLE = "SYNAPSE_STICKY_TOKEN"
PEER_TOKEN_VARIABLE = "SYNAPSE_STICKY_PEER_TOKEN"

_EPILOG = """\
exit codes: 0 nothing to do, 1 warnings, 2 errors, 3 the command could not do its work.
A token on the command line can be seen by other users of the machine: put it into the environment
variable, or into a file.
"""


class _Parser(argparse.ArgumentParser):
    """Ends with our own exit code."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake in the arguments, and end."""
        self.print_usage(sys.stderr)
        self.exit(COULD_NOT_RUN, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    arguments = _parser().parse_args(argv)
    # Synapse logs while it reads a configuration; the findings say it better.
    logging.getLogger().addHandler(logging.NullHandler())
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except CouldNotRun as error:
        print(f"synapse-sticky: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nsynapse-sticky: interrupted", file=sys.stderr)
    except BrokenPipeError:
        # As `| head` does it. Python would complain about it once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return COULD_NOT_RUN


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="synapse-sticky",
        description="Looks after sticky events on a Synapse.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"synapse-sticky {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_doctor(commands)
    _add_watch(commands)
    _add_check_release(commands)
    return parser


def _add_doctor(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "doctor",
        help="check an installation, before and after a restart",
        description="Checks an installation, before and after a restart. It changes nothing but "
        "with --url and --token, where it makes a room, and leaves and forgets it again.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_doctor)
    files = parser.add_argument_group("the configuration")
    files.add_argument(
        "-c",
        "--config-path",
        action="append",
        default=[],
        metavar="FILE",
        help="a configuration file of Synapse, or a folder of such files; give all of them in "
        "Synapse's own order",
    )
    files.add_argument(
        "--worker-config",
        action="append",
        default=[],
        metavar="FILE",
        help="the file of one worker, for each worker once",
    )
    files.add_argument(
        "--service-user",
        metavar="NAME",
        help="the user that runs Synapse (default: matrix-synapse or synapse, if there is one)",
    )
    files.add_argument(
        "--directory", metavar="DIRECTORY", help="where Synapse runs (default: here)"
    )
    server = parser.add_argument_group("the running server")
    _add_server(server, required=False)
    server.add_argument("--peer", metavar="URL", help="the base URL of another server")
    server.add_argument(
        "--peer-token",
        metavar="TOKEN",
        help=f"the access token of a user there; or in {PEER_TOKEN_VARIABLE}",
    )
    server.add_argument("--peer-token-file", metavar="FILE", help="a file with that token")
    server.add_argument(
        "--timeout",
        type=_seconds,
        default=30,
        metavar="SECONDS",
        help="the longest time for one step (default: 30)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        choices=sorted(BY_ID),
        metavar="CHECK",
        help="leave a check out; its ID is in each finding",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="do not show the progress")


def _add_watch(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "watch",
        help="show the rooms with sticky events, or one of them, live",
        description="Shows the rooms with sticky events, or one of them, until Ctrl-C.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_watch)
    parser.add_argument("room", nargs="?", metavar="ROOM", help="the ID of a room")
    _add_server(parser, required=True)
    parser.add_argument(
        "--interval",
        type=_interval,
        default=2,
        metavar="SECONDS",
        help="how often the server is asked, at least 1 (default: 2)",
    )
    parser.add_argument("--once", action="store_true", help="show it once, and end")
    parser.add_argument("--no-color", action="store_true", help="use no colours")


def _add_check_release(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "check-release",
        help="try a release of Synapse before the server is upgraded",
        description="Installs a release of Synapse into a virtual environment of its own, starts "
        "it with this module, and sends a sticky event. The server is not touched.",
        epilog="exit codes: 0 it fits, 2 it does not fit, 3 that could not be found out.",
    )
    parser.set_defaults(run=_check_release)
    parser.add_argument("release", metavar="VERSION", help="for example 1.164.0")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIRECTORY",
        help="keep the virtual environment there for the next time (default: remove it)",
    )


def _add_server(group: argparse._ActionsContainer, *, required: bool) -> None:
    group.add_argument(
        "--url",
        metavar="URL",
        required=required,
        help="the base URL of the client API, for example https://matrix.example.com",
    )
    group.add_argument(
        "--token",
        metavar="TOKEN",
        help=f"an access token, best that of a server admin; or in {TOKEN_VARIABLE}",
    )
    group.add_argument("--token-file", metavar="FILE", help="a file with that token")


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 3600:
        raise argparse.ArgumentTypeError("must be from 1 to 3600")
    return value


def _interval(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 3600:
        raise argparse.ArgumentTypeError("must be from 1 to 3600")
    return value


# The commands


def _doctor(arguments: argparse.Namespace) -> int:
    client, peer = _clients(arguments)
    if not arguments.config_path and client is None:
        raise CouldNotRun("give a configuration file with -c, or a server with --url")
    if arguments.worker_config and not arguments.config_path:
        raise CouldNotRun("--worker-config goes with -c")
    output = None if arguments.quiet else sys.stderr
    report = Report(arguments.skip)
    for each in (client, peer):
        report.secrets.add(each.token if each is not None else None)
    try:
        _examine(arguments, report, client, peer, output)
    except KeyboardInterrupt:
        # The findings so far say whether a room is left over.
        _print(report, as_json=arguments.json)
        raise
    _print(report, as_json=arguments.json)
    return EXIT_CODES[report.worst]


def _examine(
    arguments: argparse.Namespace,
    report: Report,
    client: Client | None,
    peer: Client | None,
    output: TextIO | None,
) -> None:
    from synapse_sticky.command import installation

    paths = [str(Path(path).absolute()) for path in arguments.config_path]
    worker_paths = [str(Path(path).absolute()) for path in arguments.worker_config]
    if arguments.directory is not None:
        _enter(arguments.directory)
    if paths and installation.check_version(report):
        _examine_files(report, paths, worker_paths, arguments.service_user, output)
    if client is not None:
        from synapse_sticky.command.live import Live

        Live(report, client, arguments.timeout, output, peer).run()


def _examine_files(
    report: Report,
    paths: Sequence[str],
    worker_paths: Sequence[str],
    service_user: str | None,
    output: TextIO | None,
) -> None:
    from synapse_sticky.command.installation import report_misfit

    try:
        from synapse_sticky.command.doctor import Doctor
    except ImportError as error:
        # A Synapse in which something has another name.
        report_misfit(report, "synapse-version", f"The command does not fit it: {error}.")
        return
    Doctor(report, paths, worker_paths, Path.cwd(), service_user, output).run()


def _enter(directory: str) -> None:
    try:
        os.chdir(directory)
    except OSError as error:
        raise CouldNotRun(f"{directory} cannot be entered: {error.strerror}") from error


def _print(report: Report, *, as_json: bool) -> None:
    if not as_json:
        report.write(sys.stdout)
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        synapse: str | None = version("matrix-synapse")
    except PackageNotFoundError:
        synapse = None
    print(report.as_json({"synapse_sticky": __version__, "synapse": synapse}))


def _watch(arguments: argparse.Namespace) -> int:
    client, _ = _clients(arguments)
    assert client is not None
    if client.token is None:
        raise CouldNotRun(f"give the token of a server admin, in {TOKEN_VARIABLE} or --token-file")
    try:
        import rich  # noqa: F401
    except ImportError:
        raise CouldNotRun(
            "watch needs the Python package rich: pip install 'synapse-sticky[watch]', or "
            "pip install rich"
        ) from None
    from synapse_sticky.command.watch import Watch

    room_id = arguments.room
    if room_id is not None and not room_id.startswith("!"):
        raise CouldNotRun(f"{room_id!r} is no ID of a room: it begins with !")
    return Watch(client, room_id, arguments.interval).run(
        once=arguments.once, colours=not arguments.no_color
    )


def _check_release(arguments: argparse.Namespace) -> int:
    from synapse_sticky.command.installation import parse_version
    from synapse_sticky.command.release import check_release

    try:
        from synapse_sticky.seams.checks import OLDEST_SYNAPSE
    except ImportError:
        raise CouldNotRun(
            "there is no Synapse in this Python environment: run check-release from Synapse's own"
        ) from None
    try:
        version = parse_version(arguments.release)
    except ValueError as error:
        raise CouldNotRun(str(error)) from None
    fits, text = check_release(version, OLDEST_SYNAPSE, arguments.keep, sys.stderr)
    print(text)
    return 0 if fits else 2


def _clients(arguments: argparse.Namespace) -> tuple[Client | None, Client | None]:
    """Return whom to ask: the server, and the other server if there is one."""
    client = _client(arguments, "url", "token", TOKEN_VARIABLE)
    peer = None
    if getattr(arguments, "peer", None) is not None:
        if client is None or client.token is None:
            raise CouldNotRun("--peer goes with --url and its token")
        peer = _client(arguments, "peer", "peer_token", PEER_TOKEN_VARIABLE)
        if peer is None or peer.token is None:
            raise CouldNotRun(
                f"give the token of a user of the other server, in {PEER_TOKEN_VARIABLE} or "
                "--peer-token-file"
            )
    return client, peer


def _client(
    arguments: argparse.Namespace, url_name: str, token_name: str, variable: str
) -> Client | None:
    url = getattr(arguments, url_name)
    if url is None:
        return None
    token = getattr(arguments, token_name) or os.environ.get(variable)
    path = getattr(arguments, f"{token_name}_file")
    if path is not None:
        try:
            token = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CouldNotRun(f"the token in {path} cannot be read: {error}") from error
    if token is not None and (not token.isascii() or not token.isprintable() or " " in token):
        raise CouldNotRun("a token is ASCII text without spaces")
    try:
        return Client(place_of(url), token or None, getattr(arguments, "timeout", 30))
    except ValueError as error:
        raise CouldNotRun(str(error)) from None
