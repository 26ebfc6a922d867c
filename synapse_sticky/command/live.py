# SPDX-License-Identifier: AGPL-3.0-or-later
"""Checks on a running server: a sticky event is sent, received, and all is left as it was."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TextIO

import attr

from synapse_sticky._version import __version__
from synapse_sticky.command import progress
from synapse_sticky.command.checks import ERROR, LONGEST_DELAY_MS, NOTE, OK, WARNING
from synapse_sticky.command.http import Client, JsonDict, Refused, Unreachable, new_name, quoted
from synapse_sticky.command.report import Report, sentence
from synapse_sticky.command.text import counted
from synapse_sticky.protocol import (
    ADMIN_API_PATH,
    DURATION_PARAMETER,
    EVENT_KEY,
    REMAINING_KEY,
    SLIDING_SYNC_EXTENSION,
    SYNC_SECTION,
    VERSIONS_FLAG,
)

_SLIDING_SYNC: Final = "/_matrix/client/unstable/org.matrix.simplified_msc3575/sync"
_TRANSPORTS: Final = "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports"
_DELAYED_EVENTS_FLAG: Final = "org.matrix.msc4140"
_DELAYED_EVENTS: Final = "/_matrix/client/unstable/org.matrix.msc4140"
# How often a URL is asked to find a worker that differs.
_ASKED: Final = 12
_STICKY_MS: Final = 5 * 60_000
_CLEAN_UP_S: Final = 10
# A sync waits on the server for that long.
_POLL_MS: Final = 1_000
_CONTENT: Final = {"msgtype": "m.text", "body": "A test of sticky events by synapse-sticky doctor"}

_FAILURES: Final = (Unreachable, Refused)


class _Stop(Exception):
    """No further live check has a chance."""


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Live:
    """Checks a running server.

    Attributes:
        timeout_s: the longest time for one step.
        output: where to show the progress; None for nowhere.
    """

    report: Report
    client: Client
    timeout_s: float
    output: TextIO | None
    peer: Client | None = None

    def run(self) -> None:
        """Run all of the checks, and leave the room that was made whatever happens."""
        try:
            self._check_url()
            if self.client.token is None:
                return
            user_id = self._check_token()
            self._check_admin_api()
            self._check_calls()
            peer_id = self._check_peer()
            self._check_exchange(user_id, peer_id)
        except _Stop:
            pass

    # Without a room

    def _check_url(self) -> None:
        # Synapse refuses a token that is not valid here too.
        nobody = Client(self.client.place, None, self.timeout_s)
        with self._step(f"Asking {self.client.place}, {_ASKED} times"):
            try:
                answer = nobody.get("/_matrix/client/versions")
            except _FAILURES as error:
                self.report.add(
                    ERROR,
                    "url",
                    _sentence(error),
                    "Check the URL: it is the base URL of the client API, as in "
                    "`.well-known/matrix/client`. Check that Synapse runs.",
                )
                raise _Stop from error
            has_flag = [_has_flag(answer, VERSIONS_FLAG)]
            failures = self._ask_again(nobody, has_flag)
        if not any(has_flag):
            self.report.add(
                ERROR,
                "url",
                f"{self.client.place} does not have sticky events.",
                "Put the module into `modules`, restart all of Synapse's processes, and look for "
                "synapse_sticky in their logs.",
            )
            raise _Stop
        self.report.add(OK, "url", f"{self.client.place} has sticky events.")
        self._report_processes(has_flag.count(False), failures)
        if not _has_flag(answer, _DELAYED_EVENTS_FLAG):
            self._miss_delayed_events("The server does not have delayed events.")

    def _ask_again(self, nobody: Client, has_flag: list[bool]) -> int:
        """Ask more often, since a load balancer may choose another process each time.

        Returns:
            how often there was no answer.
        """
        failures = 0
        deadline = time.monotonic() + self.timeout_s
        while len(has_flag) + failures < _ASKED and time.monotonic() < deadline:
            try:
                answer = nobody.get("/_matrix/client/versions")
            except _FAILURES:
                failures += 1
            else:
                has_flag.append(_has_flag(answer, VERSIONS_FLAG))
        return failures

    def _report_processes(self, without: int, failures: int) -> None:
        if without:
            self.report.add(
                ERROR,
                "processes",
                f"{without} of {_ASKED} times a process without the module answered.",
                "Look for a worker whose own file has a list `modules`, or that was not "
                "restarted; `--worker-config` checks their files.",
            )
        elif failures:
            self.report.add(
                ERROR,
                "processes",
                f"{failures} of {_ASKED} times no process answered.",
                "Check that all workers run, and that the reverse proxy reaches each of them.",
            )
        else:
            self.report.add(OK, "processes", f"Each of {_ASKED} answers says so.")

    def _check_token(self) -> str:
        try:
            user_id: str = self.client.get("/_matrix/client/v3/account/whoami")["user_id"]
        except _FAILURES as error:
            self.report.add(
                ERROR,
                "token",
                f"The token is not accepted: {_sentence(error)}",
                "Log in again, and use the new access token.",
            )
            raise _Stop from error
        self.report.add(OK, "token", f"The token is that of {user_id}.")
        return user_id

    def _check_admin_api(self) -> None:
        try:
            status = self.client.get(f"{ADMIN_API_PATH}/status")
        except Refused as error:
            forbidden = error.status == 403
            self.report.add(
                NOTE if forbidden else WARNING,
                "admin-api",
                "The token is not that of a server admin, so the admin API was not asked."
                if forbidden
                else f"The admin API answers {_sentence(error)}",
                "Use the token of a server admin to check more."
                if forbidden
                else "Let the reverse proxy pass /_synapse/client on, at least from here.",
            )
            return
        except Unreachable as error:
            self.report.add(WARNING, "admin-api", str(error), "Try again; look into the log.")
            return
        self._report_status(status)
        self._check_indexer(status)

    def _report_status(self, status: JsonDict) -> None:
        held = sum(status["held"].values())
        counts = (
            f"{counted(status['live'], 'sticky event')} live, {held} held, {status['owed']} owed "
            "to other servers"
        )
        if status["version"] != __version__:
            self.report.add(
                WARNING,
                "admin-api",
                f"Version {status['version']} of the module answers, and {__version__} is "
                f"installed here. {counts}.",
                "Restart all of Synapse's processes, or run this command where they run.",
            )
            return
        self.report.add(
            OK,
            "admin-api",
            f"Version {status['version']} on Synapse {status['synapse_version']} answers. It has "
            f"{counts}.",
        )

    def _check_indexer(self, status: JsonDict) -> None:
        name, behind = status["indexer"]["instance_name"], status["indexer"]["behind"]
        deadline = time.monotonic() + min(self.timeout_s, 10)
        with self._step(f"Watching {name} notice sticky events"):
            # A moment behind is nothing.
            while behind and time.monotonic() < deadline:
                time.sleep(1)
                try:
                    behind = self.client.get(f"{ADMIN_API_PATH}/status")["indexer"]["behind"]
                except _FAILURES as error:
                    self.report.add(NOTE, "indexer", f"It is not known: {_sentence(error)}")
                    return
        if behind:
            self.report.add(
                WARNING,
                "indexer",
                f"{name} has not noticed {behind} sticky events yet.",
                f"Check that {name} runs, loads the module, and is not overloaded.",
            )
        else:
            self.report.add(OK, "indexer", f"{name} has noticed all sticky events.")

    def _check_calls(self) -> None:
        try:
            count = len(self.client.get(_TRANSPORTS).get("rtc_transports", []))
        except _FAILURES:
            count = 0
        if count:
            self.report.add(
                OK, "live-transports", f"The server names {counted(count, 'media server')}."
            )
            return
        self.report.add(
            WARNING,
            "live-transports",
            "The server does not tell where the media server is.",
            "Set `msc4143_enabled: true` in `experimental_features`, and `matrix_rtc.transports`; "
            "restart Synapse, and route this path to it: " + _TRANSPORTS,
        )

    def _check_peer(self) -> str | None:
        """Return the user on the other server, if there is one to exchange events with."""
        if self.peer is None:
            return None
        try:
            user_id: str = self.peer.get("/_matrix/client/v3/account/whoami")["user_id"]
        except _FAILURES as error:
            self.report.add(
                ERROR,
                "peer",
                f"The other server: {_sentence(error)}",
                "Check the URL and the token of the other server.",
            )
            return None
        if _has_sticky_events(self.peer):
            self.report.add(OK, "peer", f"{user_id} is on a server that has sticky events.")
        else:
            self.report.add(
                NOTE,
                "peer",
                f"{user_id} is on a server without sticky events: it is checked whether the "
                "events arrive there.",
            )
        return user_id

    # In a room

    def _check_exchange(self, user_id: str, peer_id: str | None) -> None:
        """Send and receive in a new room, and leave it."""
        room: list[str] = []
        try:
            self._exchange(room, user_id, peer_id)
        finally:
            if room:
                self._clean_up(room[0], joined=peer_id)

    def _exchange(self, room: list[str], user_id: str, peer_id: str | None) -> None:
        with self._step("Making a room, and sending a sticky event there"):
            try:
                self._make_room(room)
                sent = self._send(self.client, room[0])
                event = self.client.get(_event_path(room[0], sent))
            except _FAILURES as error:
                self._cannot_send(error)
                return
        if REMAINING_KEY not in event.get("unsigned", {}):
            self.report.add(
                ERROR,
                "send",
                "The event was sent, and is an ordinary one.",
                "Route /send and /versions to processes that load the module.",
            )
            return
        self.report.add(OK, "send", "A sticky event was sent.")
        self._check_delayed_events(room[0])
        self._check_sync(self.client, room[0], sent, "sync")
        self._check_sliding_sync(room[0], sent)
        if self.peer is not None and peer_id is not None:
            self._check_federation(self.peer, room[0], sent, user_id, peer_id)

    def _make_room(self, room: list[str]) -> None:
        # A second Ctrl-C must not come between the room and our knowing of it.
        with _uninterrupted():
            answer = self.client.post(
                "/_matrix/client/v3/createRoom",
                {
                    "preset": "private_chat",
                    "name": "synapse-sticky doctor",
                    "topic": "A test, which is left at its end.",
                },
            )
            room.append(answer["room_id"])

    def _cannot_send(self, error: Exception) -> None:
        advice = "Look into Synapse's log."
        if isinstance(error, Refused) and error.status == 403:
            advice = (
                "Check whether sticky events are switched off (`enabled_by_default`, "
                "`new_rooms`), whether the user is blocked, and whether other modules refuse it."
            )
        elif isinstance(error, Refused) and error.status == 429:
            advice = "Wait, or use the token of another user: this one has reached a limit."
        self.report.add(ERROR, "send", _sentence(error), advice)

    def _send(self, client: Client, room_id: str) -> str:
        path = f"/_matrix/client/v3/rooms/{quoted(room_id)}/send/m.room.message/{new_name()}"
        event_id: str = client.put(path, dict(_CONTENT), **{DURATION_PARAMETER: _STICKY_MS})[
            "event_id"
        ]
        return event_id

    def _check_delayed_events(self, room_id: str) -> None:
        """Schedule a sticky event for an hour from now, and cancel it."""
        if any(finding.id == "live-delayed-events" for finding in self.report.findings):
            return
        with self._step("Scheduling a delayed event, and cancelling it"), _uninterrupted():
            try:
                delay_id = _schedule(self.client, room_id)
                path = f"{_DELAYED_EVENTS}/delayed_events/{quoted(delay_id)}"
                self.client.post(path, {"action": "cancel"})
            except _FAILURES as error:
                self._miss_delayed_events(f"An event cannot be delayed: {_sentence(error)}")
                return
        self.report.add(OK, "live-delayed-events", "A sticky event can be delayed by an hour.")

    def _miss_delayed_events(self, text: str) -> None:
        self.report.add(
            WARNING,
            "live-delayed-events",
            text,
            "Set `max_event_delay_duration: 24h`, and restart Synapse. Route /delayed_events to "
            "the main process, or to workers that serve it.",
        )

    def _check_sync(self, client: Client, room_id: str, event_id: str, check_id: str) -> None:
        with self._step("Waiting for it in /sync"):
            problem = self._wait(_Syncs(client, room_id).has, event_id)
        if problem is None:
            self.report.add(OK, check_id, "It came in the sticky section of /sync.")
        else:
            self.report.add(
                ERROR,
                check_id,
                f"It did not come in the sticky section of /sync{problem}.",
                "Check that the workers that answer /sync load the module, that Redis connects "
                "all processes, and that the process runs that notices sticky events.",
            )

    def _check_sliding_sync(self, room_id: str, event_id: str) -> None:
        sliding_syncs = _SlidingSyncs(self.client, room_id)
        with self._step("Waiting for it in Sliding Sync"):
            problem = self._wait(sliding_syncs.has, event_id)
        if not sliding_syncs.is_there:
            self.report.add(
                NOTE,
                "sliding-sync",
                "The server does not answer Sliding Sync.",
                "Route this path to Synapse if clients use Sliding Sync: " + _SLIDING_SYNC,
            )
        elif problem is None:
            self.report.add(OK, "sliding-sync", "It came in the extension of Sliding Sync.")
        else:
            self.report.add(
                ERROR,
                "sliding-sync",
                f"It did not come in the extension of Sliding Sync{problem}.",
                "Check that the workers that answer Sliding Sync load the module.",
            )

    def _check_federation(
        self, peer: Client, room_id: str, early: str, user_id: str, peer_id: str
    ) -> None:
        with self._step(f"Letting {peer_id} join"):
            try:
                self.client.post(
                    f"/_matrix/client/v3/rooms/{quoted(room_id)}/invite", {"user_id": peer_id}
                )
                self._join(peer, room_id, user_id)
            except _FAILURES as error:
                self.report.add(
                    ERROR,
                    "federation-join",
                    _sentence(error),
                    "Check the federation between the two servers, for example with the "
                    "federation tester, and with `POST "
                    "/_synapse/admin/v1/federation/destinations/<server>/reset_connection`.",
                )
                return
        self.report.add(OK, "federation-join", f"{peer_id} joined.")
        self._check_arrival(peer, room_id, early, "federation-late")
        with self._step("Sending one more"):
            try:
                late = self._send(self.client, room_id)
            except _FAILURES as error:
                self.report.add(ERROR, "federation-out", _sentence(error), "Look into the log.")
                return
        self._check_arrival(peer, room_id, late, "federation-out")
        self._check_return(peer, room_id)

    def _join(self, peer: Client, room_id: str, user_id: str) -> None:
        """Join as soon as the invitation has come."""
        deadline = time.monotonic() + self.timeout_s
        server_name = user_id.split(":", 1)[1]
        path = f"/_matrix/client/v3/join/{quoted(room_id)}?via={server_name}"
        path += f"&server_name={server_name}"
        while True:
            try:
                peer.post(path, {}, timeout_s=max(1, deadline - time.monotonic()))
                return
            except Refused as error:
                if error.status not in (403, 404, 429) or time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def _check_arrival(self, peer: Client, room_id: str, event_id: str, check_id: str) -> None:
        """Check that the other server gets an event; in its /sync if it has sticky events."""
        has_section = _has_sticky_events(peer)
        has = _Syncs(peer, room_id).has if has_section else _Events(peer, room_id).has
        where = "in /sync of the other server" if has_section else "at the other server"
        with self._step(f"Waiting for it {where}"):
            problem = self._wait(has, event_id)
        if problem is None:
            self.report.add(OK, check_id, f"It arrived {where}.")
        else:
            self.report.add(
                ERROR,
                check_id,
                f"It did not arrive {where}{problem}.",
                "Ask the admin API why: `/servers` names each server that is owed events, and "
                "why the last try came to nothing.",
            )

    def _check_return(self, peer: Client, room_id: str) -> None:
        if not _has_sticky_events(peer):
            self.report.add(
                NOTE,
                "federation-in",
                "The other server cannot send sticky events, so none was sent from there.",
            )
            return
        with self._step("Sending one from the other server"):
            try:
                event_id = self._send(peer, room_id)
            except _FAILURES as error:
                self.report.add(
                    ERROR,
                    "federation-in",
                    f"The other server does not send it: {_sentence(error)}",
                    "Run this command for the other server too.",
                )
                return
        with self._step("Waiting for it in /sync"):
            problem = self._wait(_Syncs(self.client, room_id).has, event_id)
        if problem is None:
            self.report.add(OK, "federation-in", "It came in the sticky section of /sync.")
        else:
            self.report.add(
                ERROR,
                "federation-in",
                f"It did not come in the sticky section of /sync{problem}.",
                "Check whether the other server is blocked, and whether the admin API shows the "
                "event as held. Check that the other server reaches this one.",
            )

    def _wait(self, has: Callable[[str], bool], event_id: str) -> str | None:
        """Wait until a client has an event; return the end of a sentence that says why not."""
        deadline = time.monotonic() + self.timeout_s
        problem = ""
        while time.monotonic() < deadline:
            try:
                if has(event_id):
                    return None
                problem = ""
            except Unreachable as error:
                problem = f": {str(error).rstrip('.')}"
            except Refused as error:
                problem = f": {error}"
                if error.status != 429 and error.status < 500:
                    return problem
            time.sleep(0.2)
        return f" within {self.timeout_s:g} s{problem}"

    def _clean_up(self, room_id: str, joined: str | None) -> None:
        clients = [self.client]
        if joined is not None and self.peer is not None:
            clients.append(self.peer)
        left_over = []
        with _uninterrupted(), self._step("Leaving and forgetting the room"):
            for client in clients:
                for action in ("leave", "forget"):
                    try:
                        path = f"/_matrix/client/v3/rooms/{quoted(room_id)}/{action}"
                        client.post(path, {}, timeout_s=_CLEAN_UP_S)
                    except _FAILURES as error:
                        # The other user may never have got there.
                        if client is self.client or not _is_not_there(error):
                            left_over.append(f"{action} at {client.place}: {_sentence(error)}")
        if left_over:
            self.report.add(
                WARNING,
                "clean-up",
                f"The room {room_id} is left over: {' '.join(left_over)}",
                "Leave the room named `synapse-sticky doctor` by hand.",
            )
        else:
            self.report.add(OK, "clean-up", "The room was left and forgotten.")

    def _step(self, text: str) -> Any:
        return progress.step(self.output, text)


@attr.s(slots=True, auto_attribs=True)
class _Syncs:
    """Reads the sticky section of `/sync`, and nothing else of the account."""

    _client: Client
    _room_id: str
    _since: str | None = None
    _seen: set[str] = attr.Factory(set)

    def has(self, event_id: str) -> bool:
        """Whether the event has come by now, with its remaining time."""
        nothing: JsonDict = {"types": []}
        answer = self._client.get(
            "/_matrix/client/v3/sync",
            filter=json.dumps(
                {
                    "presence": nothing,
                    "account_data": nothing,
                    "room": {
                        "rooms": [self._room_id],
                        "timeline": {"types": ["io.github.synapse_sticky.nothing"]},
                        "account_data": nothing,
                        "ephemeral": nothing,
                    },
                }
            ),
            since=self._since,
            timeout=_POLL_MS if self._since is not None else 0,
        )
        self._since = answer["next_batch"]
        room = answer.get("rooms", {}).get("join", {}).get(self._room_id, {})
        self._seen |= _sticky_ids(room.get(SYNC_SECTION, {}))
        return event_id in self._seen


@attr.s(slots=True, auto_attribs=True)
class _SlidingSyncs:
    """Reads the extension of Sliding Sync."""

    _client: Client
    _room_id: str
    is_there: bool = True
    _since: str | None = None
    _seen: set[str] = attr.Factory(set)
    _conn_id: str = attr.Factory(new_name)

    def has(self, event_id: str) -> bool:
        """Whether the event has come by now, with its remaining time."""
        extension: JsonDict = {"enabled": True}
        if self._since is not None:
            extension["since"] = self._since
        body = {
            "conn_id": self._conn_id,
            "room_subscriptions": {self._room_id: {"required_state": [], "timeline_limit": 0}},
            "extensions": {SLIDING_SYNC_EXTENSION: extension},
        }
        try:
            answer = self._client.post(f"{_SLIDING_SYNC}?timeout=0", body)
        except Refused as error:
            self.is_there = error.status != 404
            raise
        found = answer.get("extensions", {}).get(SLIDING_SYNC_EXTENSION) or {}
        self._since = found.get("next_batch", self._since)
        self._seen |= _sticky_ids(found.get("rooms", {}).get(self._room_id, {}))
        return event_id in self._seen


@attr.s(slots=True, auto_attribs=True)
class _Events:
    """Reads single events, of a server that does not have sticky events."""

    _client: Client
    _room_id: str

    def has(self, event_id: str) -> bool:
        """Whether the server has the event by now."""
        try:
            self._client.get(_event_path(self._room_id, event_id))
        except Refused as error:
            if error.status in (403, 404):
                return False
            raise
        return True


def _sticky_ids(section: JsonDict) -> set[str]:
    return {
        event["event_id"]
        for event in section.get("events", [])
        if EVENT_KEY in event and REMAINING_KEY in event.get("unsigned", {})
    }


def _event_path(room_id: str, event_id: str) -> str:
    return f"/_matrix/client/v3/rooms/{quoted(room_id)}/event/{quoted(event_id)}"


def _schedule(client: Client, room_id: str) -> str:
    """Schedule a sticky event for an hour from now, and return the ID of the delayed event."""
    where = quoted(room_id), f"m.room.message/{new_name()}"
    try:
        answer = client.put(
            f"{_DELAYED_EVENTS}/rooms/{where[0]}/delayed_event/{where[1]}",
            {"delay_ms": LONGEST_DELAY_MS, "content": dict(_CONTENT)},
            **{DURATION_PARAMETER: _STICKY_MS},
        )
    except Refused as error:
        # Synapse has the endpoint from 1.164 on.
        if error.errcode != "M_UNRECOGNIZED":
            raise
        answer = client.put(
            f"/_matrix/client/v3/rooms/{where[0]}/send/{where[1]}",
            dict(_CONTENT),
            **{DURATION_PARAMETER: _STICKY_MS, "org.matrix.msc4140.delay": LONGEST_DELAY_MS},
        )
    delay_id: str = answer["delay_id"]
    return delay_id


def _has_flag(versions: JsonDict, name: str) -> bool:
    return versions.get("unstable_features", {}).get(name) is True


def _has_sticky_events(client: Client) -> bool:
    try:
        return _has_flag(client.get("/_matrix/client/versions"), VERSIONS_FLAG)
    except _FAILURES:
        return False


def _is_not_there(error: Exception) -> bool:
    return isinstance(error, Refused) and error.status in (400, 403, 404)


def _sentence(error: Exception) -> str:
    return sentence(error)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off until something short is done."""
    waiting: list[int] = []
    try:
        before = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    except ValueError:
        # Not the main thread, which alone is interrupted.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt
