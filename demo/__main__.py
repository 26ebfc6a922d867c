"""Shows sticky events on a real Synapse, or between three. `make demo` runs this."""

import argparse
import io
import signal
import sys

from demo.federation import FederationShow
from demo.printing import Show
from demo.single import SingleShow
from harness.processes import temporary_directory


def main() -> int:
    """Show it, and return the exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end when all is shown")
    parser.add_argument(
        "--federation", action="store_true", help="show three homeservers, and what one missed"
    )
    arguments = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    directory = temporary_directory("demo-")
    show: Show = FederationShow(directory) if arguments.federation else SingleShow(directory)
    try:
        show.run()
        show.print_verdict()
        if not arguments.once:
            show.wait_for_the_reader()
    except KeyboardInterrupt:
        print()
        if arguments.once:
            return 130
    finally:
        # Not twice: the first Ctrl-C is heard, and this takes a moment.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("Stopping Synapse.")
        for homeserver in show.homeservers:
            homeserver.close()
    return 1 if show.broken_promises else 0


if __name__ == "__main__":
    sys.exit(main())
