# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every check of ``synapse-sticky doctor``: its question, and why that matters.

``python -m synapse_sticky.command.checks`` prints the table of ``docs/command.md``.
"""

import enum
from typing import Final

import attr


class Level(enum.Enum):
    """How bad a finding is. The values are those of the JSON output."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


LONGEST_DELAY_MS: Final = 3_600_000
"""By how much Element Call delays the leaving that it leaves to a service."""

OK, NOTE, WARNING, ERROR = Level.OK, Level.NOTE, Level.WARNING, Level.ERROR


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Check:
    """A check. Its findings have its ID, and one of its levels."""

    id: str
    question: str
    why: str
    levels: tuple[Level, ...]


CHECKS: Final = (
    # The installation
    Check(
        "synapse-version",
        "Is Synapse installed in this Python environment, in a supported release?",
        "The module relies on parts of Synapse that change between releases.",
        (OK, WARNING, ERROR),
    ),
    Check(
        "seams",
        "Does a Synapse start with the module, and deliver a sticky event? It is a new one in a "
        "temporary directory, with the installed code and an empty SQLite database.",
        "Synapse does not start if a part that the module relies on is missing or different.",
        (OK, ERROR),
    ),
    # The configuration
    Check(
        "files",
        "Can the configuration files be read, and are they YAML?",
        "Synapse does not start without them.",
        (OK, WARNING, ERROR),
    ),
    Check(
        "service-user",
        "Can the user that runs Synapse read the configuration, the files that it names, the "
        "SQLite database and the module's own code?",
        "A file that only root can read stops Synapse when it starts as its own user.",
        (OK, NOTE, ERROR),
    ),
    Check(
        "modules",
        "Is the module in the list `modules`, once, under its right name?",
        "Synapse loads the module only if it is in that list.",
        (OK, ERROR),
    ),
    Check(
        "modules-replaced",
        "Does a later configuration file replace the list `modules` of an earlier one?",
        "Synapse does not join such lists: the list in the last file is the only one that counts.",
        (OK, WARNING, ERROR),
    ),
    Check(
        "module-options",
        "Are the module's options known, and their values allowed?",
        "Synapse does not start with a mistake in them.",
        (OK, ERROR),
    ),
    Check(
        "synapse-configuration",
        "Does Synapse itself accept the whole configuration?",
        "Synapse does not start with a mistake in it.",
        (OK, ERROR),
    ),
    Check(
        "own-sticky-events",
        "Are Synapse's own sticky events switched on too (`msc4354_enabled`)?",
        "Both cannot deliver the same events, so the module takes their place.",
        (OK, NOTE),
    ),
    Check(
        "own-extremities",
        "Is Synapse's own MSC4370 endpoint switched on too (`msc4370_enabled`)?",
        "Both answer the same path, so the module leaves it to Synapse.",
        (OK, NOTE),
    ),
    Check(
        "default-switch",
        "Are sticky events on where neither an admin of the server nor of the room has decided?",
        "Where they are off, sending a sticky event is refused.",
        (OK, NOTE),
    ),
    # Workers
    Check(
        "worker-modules",
        "Does each worker whose file is given load the module?",
        "A worker without the module neither takes nor delivers sticky events. If it runs the "
        "background tasks, no process notices any.",
        (OK, ERROR),
    ),
    Check(
        "worker-files",
        "Are the files of all workers given that the configuration names?",
        "A worker's file may have a list `modules` of its own, which replaces the shared one.",
        (OK, NOTE, WARNING),
    ),
    # The database
    Check(
        "database",
        "Can the database be opened, to read only?",
        "Without the database neither Synapse nor the module can start.",
        (OK, NOTE, ERROR),
    ),
    Check(
        "synapse-tables",
        "Do Synapse's tables have the columns that the module reads?",
        "The module finds sticky events, joins and servers in Synapse's own tables.",
        (OK, NOTE, ERROR),
    ),
    Check(
        "tables",
        "Are the module's tables there, complete, and of a version that it can work with?",
        "The module creates and upgrades its tables when Synapse starts, and needs all of them.",
        (OK, NOTE, ERROR),
    ),
    # The needs of calls
    Check(
        "calls-delayed-events",
        "May events be delayed by an hour (`max_event_delay_duration`)?",
        "MatrixRTC clients schedule their own leaving, for the case that they crash. Element Call "
        "delays it by up to an hour when a service does that for it.",
        (OK, WARNING),
    ),
    Check(
        "calls-transports",
        "Does Synapse tell clients where the media server is (`msc4143_enabled` and "
        "`matrix_rtc.transports`)?",
        "Clients ask their homeserver for it. Some find it in `.well-known` too, others do not.",
        (OK, WARNING),
    ),
    Check(
        "calls-message-rate",
        "Does `rc_message` allow the messages of a call?",
        "Keys of encrypted calls are sent in bursts. Element Call's documentation asks for 0.5 "
        "per second and a burst of 30; Synapse's default is lower.",
        (OK, WARNING),
    ),
    Check(
        "calls-delayed-event-rate",
        "Does `rc_delayed_event_mgmt` allow the restarts of delayed events?",
        "Clients restart their delayed leaving every few seconds. Element Call's documentation "
        "asks for 1 per second and a burst of 20; Synapse's default has a burst of 5.",
        (OK, WARNING),
    ),
    Check(
        "calls-delayed-event-owner",
        "May only the owner of a delayed event manage it, as from Synapse 1.164 on?",
        "A service that restarts the delayed leaving of a user without that user's access token "
        "is refused then, and the user is shown as gone once the delay is over.",
        (OK, NOTE),
    ),
    # The running server: with --url and --token
    Check(
        "url",
        "Does the server answer, and does it say that it has sticky events?",
        "Clients read `/versions` to know whether they may send sticky events.",
        (OK, ERROR),
    ),
    Check(
        "processes",
        "Does it say so each time, whichever process answers?",
        "Behind one URL there may be many workers. One that lacks the module is found by asking "
        "again.",
        (OK, ERROR),
    ),
    Check(
        "token",
        "Is the access token valid?",
        "The checks below act as the user whose token it is.",
        (OK, ERROR),
    ),
    Check(
        "admin-api",
        "Does the module's admin API answer, with the version that is installed here?",
        "An older version that answers has not been restarted since the upgrade.",
        (OK, NOTE, WARNING),
    ),
    Check(
        "indexer",
        "Does the process that notices sticky events keep up?",
        "An event that is not noticed is not delivered.",
        (OK, NOTE, WARNING),
    ),
    Check(
        "live-delayed-events",
        "Can a sticky event be delayed by an hour, and the delayed event be cancelled?",
        "The configuration counts only after a restart.",
        (OK, WARNING),
    ),
    Check(
        "live-transports",
        "Does the running server tell where the media server is?",
        "The configuration counts only after a restart, and a reverse proxy may not pass the "
        "request on.",
        (OK, WARNING),
    ),
    Check(
        "send",
        "Can a sticky event be sent, in a new private room?",
        "A client does this first in a call.",
        (OK, ERROR),
    ),
    Check(
        "sync",
        "Does the event come in the sticky section of `/sync`?",
        "Clients that use `/sync` learn of participants there.",
        (OK, ERROR),
    ),
    Check(
        "sliding-sync",
        "Does it come in the extension of Sliding Sync?",
        "Clients that use Sliding Sync learn of participants there.",
        (OK, NOTE, ERROR),
    ),
    Check(
        "clean-up",
        "Was the room left and forgotten again?",
        "A room that is not left stays in the room list of the user.",
        (OK, WARNING),
    ),
    # Between two servers: with --peer and --peer-token
    Check(
        "peer",
        "Does the other server answer, and is its token valid?",
        "The checks below act on the other server too.",
        (OK, NOTE, ERROR),
    ),
    Check(
        "federation-join",
        "Can a user of the other server join the room?",
        "Without federation no event of any kind is exchanged.",
        (OK, ERROR),
    ),
    Check(
        "federation-late",
        "Does the other server get the sticky event that was sent before it joined?",
        "Who joins a call late must see who is in it already.",
        (OK, ERROR),
    ),
    Check(
        "federation-out",
        "Does a sticky event from here reach the other server?",
        "Its users learn of participants here by that.",
        (OK, ERROR),
    ),
    Check(
        "federation-in",
        "Does a sticky event from the other server come in `/sync` here?",
        "The users here learn of participants there by that.",
        (OK, NOTE, ERROR),
    ),
)

BY_ID: Final = {check.id: check for check in CHECKS}


def table() -> str:
    """Return the checks as a table in Markdown."""
    lines = ["| check | it asks | why that matters | levels |", "|---|---|---|---|"]
    for check in CHECKS:
        levels = ", ".join(level.value for level in check.levels)
        lines.append(f"| `{check.id}` | {check.question} | {check.why} | {levels} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
