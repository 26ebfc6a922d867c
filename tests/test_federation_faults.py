"""Servers that are away, misbehave or are killed get what they missed, and hold nobody up."""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harness.client import Client, JsonDict
from harness.event_format import event_from_pdu
from harness.homeserver import BACKGROUND_WORKER, SENDERS, Homeserver
from harness.proxy import Fault
from harness.remote import FLOOD_BYTES, Harm, RawAnswer, RemoteServer
from harness.wait import eventually
from tests import debts
from tests.federation import (
    create_room,
    join_via,
    receipts,
    stored,
    wait_until_joined,
    wait_until_received,
    wait_until_stored,
)
from tests.support import (
    GRACE_PERIOD,
    HOUR_MS,
    NO_TIMELINE,
    MakeHomeserver,
    assert_once,
    follow_until_seen,
    now_ms,
    send_plain,
    send_sticky,
    sticky_in,
    text,
)

pytestmark = [pytest.mark.slow, pytest.mark.deployments("sqlite", "workers")]


def kill_senders(homeserver: Homeserver) -> None:
    """Kill what sends to other servers and what gives out positions, and start it again."""
    names = [*SENDERS, BACKGROUND_WORKER] if homeserver.workers else ["main"]
    for name in names:
        homeserver.kill(name)
    homeserver.start()


def room_with_reader(
    homeserver: Homeserver, alice: Client, peer: Homeserver
) -> tuple[str, Client, str, str | None]:
    """A room, a user of the other server in it, and the event and token that both have."""
    room = create_room(alice)
    bob = peer.register()
    join_via(bob, room, homeserver)
    (event_id,) = send_sticky(alice, room)
    return room, bob, event_id, follow_until_seen(bob, room, [event_id]).next_batch


def wake(client: Client, room: str) -> None:
    """Let the user's server tell the others that it is back, as it does in real life."""
    client.send(room)


def wait_until_backing_off(
    homeserver: Homeserver, peer: Homeserver, client: Client, room: str
) -> None:
    """Wait until Synapse's own queue has nothing on its way to a server that is away.

    Synapse repeats a transaction that fails before it backs off. If the server comes back just
    then that one is the first that it takes, and Synapse's catch-up begins with the newest event.
    """

    def is_backing_off() -> bool:
        until = "SELECT retry_last_ts + retry_interval FROM destinations WHERE destination = ?"
        if any(until_ts > now_ms() for (until_ts,) in homeserver.query(until, peer.server_name)):
            return True
        client.send(room)
        return False

    eventually(is_backing_off, 60, "Synapse backing off", interval_s=0.5)


# F3, F5, C4
@pytest.mark.parametrize(
    "also_killed",
    # "both" kills the same senders, and what they send then is the same.
    [
        pytest.param("nobody", marks=pytest.mark.repeats("sqlite", "workers")),
        pytest.param("sender", marks=pytest.mark.repeats("sqlite", "workers")),
        "both",
    ],
)
def test_outage(
    homeserver: Homeserver, alice: Client, mixed_peer: Homeserver, also_killed: str
) -> None:
    """A server that was down has exactly the sticky events that it missed, once each.

    Though of hundreds that Synapse's queue sends at once it throws most away. In order too if it
    reads them in the two seconds that this queue waits: its catch-up begins with the newest.
    """
    room, bob, before, since = room_with_reader(homeserver, alice, mixed_peer)
    if also_killed == "both":
        mixed_peer.kill("main")
    else:
        mixed_peer.stop()
    missed = []
    for _ in range(10):
        send_plain(alice, room, 20)
        missed += send_sticky(alice, room)
    if also_killed != "nobody":
        kill_senders(homeserver)
    wait_until_backing_off(homeserver, mixed_peer, alice, room)
    mixed_peer.start()
    wake(bob, room)
    followed = follow_until_seen(
        bob, room, missed, since, timeout_s=120, timeout_ms=500, filter=NO_TIMELINE
    )
    assert sorted(followed.sticky(room)) == sorted(missed)
    section = [e["event_id"] for e in sticky_in(bob.sync(filter=NO_TIMELINE), room)]
    assert sorted(section) == sorted([before, *missed])


# F3, F5
@pytest.mark.repeats("workers")
@pytest.mark.parametrize("fault", [Fault.CLOSE, Fault.CUT_ANSWERS, Fault.HANG, Fault.ERROR])
def test_connections_that_fail(
    homeserver: Homeserver, alice: Client, mixed_peer: Homeserver, fault: Fault
) -> None:
    """Whatever goes wrong on the way, it is tried again until the events are there."""
    room, bob, _, since = room_with_reader(homeserver, alice, mixed_peer)
    mixed_peer.proxy.set_fault(fault)
    missed = send_sticky(alice, room, 3)
    time.sleep(2)
    if fault is not Fault.CUT_ANSWERS:
        assert not set(missed) & stored(mixed_peer, room)
    mixed_peer.proxy.set_fault(Fault.NONE)
    followed = follow_until_seen(bob, room, missed, since, timeout_s=60, timeout_ms=500)
    assert_once(followed, room, missed)


# F5
@pytest.mark.repeats("workers")
def test_one_failure_delays_nobody_else(
    homeserver: Homeserver, alice: Client, mixed_peer: Homeserver, remote: RemoteServer
) -> None:
    """While one server hangs, another one that joins has everything within seconds."""
    room = create_room(alice)
    bob = mixed_peer.register()
    join_via(bob, room, homeserver)
    mixed_peer.proxy.set_fault(Fault.HANG)
    missed = send_sticky(alice, room, 3)
    started = time.monotonic()
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, missed)
    assert time.monotonic() - started < 10
    assert not set(missed) & stored(mixed_peer, room)
    mixed_peer.proxy.set_fault(Fault.NONE)
    wait_until_stored(mixed_peer, room, missed, timeout_s=60)


def fail_ours(remote: RemoteServer, harm: int | Harm) -> None:
    """Fail the module's transactions from now on, and take those of Synapse's queue."""
    remote.harm = lambda txn_id, body: harm if txn_id.startswith("sticky") else None


def has_failed(homeserver: Homeserver, remote: RemoteServer) -> bool:
    """Whether Synapse has noted a failure of a server."""
    row = "SELECT 1 FROM destinations WHERE destination = ? AND failure_ts IS NOT NULL"
    return bool(homeserver.query(row, remote.server_name))


# F5a, F7
@pytest.mark.deployments("sqlite")
def test_our_failures_cost_a_server_none_of_its_ordinary_traffic(
    homeserver: Homeserver, alice: Client
) -> None:
    """Whatever happens to our transactions, Synapse's arrive as at a server that takes both."""
    room = create_room(alice)
    sticky = send_sticky(alice, room, 4)
    harms: list[int | Harm | None] = [None, 500, 400, 413, 429, Harm.HANG, Harm.CLOSE]
    with contextlib.ExitStack() as stack:
        remotes = [stack.enter_context(RemoteServer()) for _ in harms]
        for remote, harm in zip(remotes, harms, strict=True):
            if harm is not None:
                fail_ours(remote, harm)
            remote.join(homeserver, room, "carol")
        unharmed, *harmed = remotes
        wait_until_received(unharmed, sticky)
        for remote in harmed:
            eventually(lambda remote=remote: remote.harmed, what="a failure")  # type: ignore[misc]
        late_s = 0.0
        for _ in range(12):
            event_id = alice.send(room)
            unharmed.wait_for(event_id)
            began = time.monotonic()
            for remote in harmed:
                remote.wait_for(event_id)
            late_s += time.monotonic() - began
        # Two seconds are what Synapse's queue may wait for us, once; a machine may be busy.
        assert late_s < 12
        assert not any(has_failed(homeserver, remote) for remote in remotes)
        for remote in harmed:
            # Each second one, where a connection is closed at once, is the same once more.
            assert len(remote.harmed) < 20
            assert not set(receipts(remote, sticky)) & {e.event_id for e in remote.received}
            remote.harm = lambda txn_id, body: None
        for remote in harmed[:4]:
            alice.send(room)
            # An event that failed alone is tried ever more rarely.
            wait_until_received(remote, sticky, timeout_s=120)


# F5a
@pytest.mark.repeats("workers")
def test_events_that_do_not_fit_together(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """Behind a proxy with nginx's default limit of 1 MB a server gets all, and no failure."""
    room = create_room(alice)
    sticky = [alice.send(room, text("x" * 30_000), sticky_ms=HOUR_MS) for _ in range(40)]
    remote.harm = lambda txn_id, body: 413 if len(json.dumps(body)) > 1_000_000 else None
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, sticky)
    assert not remote.harmed
    # Twice where an answer about so many of this size would be too long.
    assert set(receipts(remote, sticky).values()) <= {1, 2}


# F5a
@pytest.mark.deployments("sqlite")
def test_a_server_says_when_to_try_again(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """With a 429 and the header `Retry-After`; without it, it is tried after a second."""
    room = create_room(alice)
    sticky = send_sticky(alice, room, 2)
    tried_at: list[float] = []

    def harm(txn_id: str, body: JsonDict) -> int | None:
        if "sticky" not in txn_id:
            return None
        tried_at.append(time.monotonic())
        return 429 if len(tried_at) == 1 else None

    remote.harm, remote.retry_after_s = harm, 7
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, sticky)
    assert tried_at[1] - tried_at[0] >= 7


# F5, F7
@pytest.mark.deployments("sqlite")
@pytest.mark.any_synapse
def test_odd_answers_about_history(homeserver: Homeserver, alice: Client) -> None:
    """Whatever a server says of what came before, it is sent everything, and so is the next."""
    room = create_room(alice)
    sticky = send_sticky(alice, room, 12)
    odd_answers: list[RawAnswer] = [
        (200, [b"[]"]),
        (200, [b'{"pdus": []}']),
        (200, [b'{"pdus": 3}']),
        (200, [b'{"pdus": [null, 1, {"hashes": 3}, {"hashes": {"sha256": {}}}]}']),
        (200, [b'{"pdus": ["', b"x" * 2_000_000, b'"]}']),
        (200, [b"[" * 100_000]),
        (404, [b'{"errcode": "M_UNRECOGNIZED"}']),
        (502, [b"<html>"]),
    ]
    with contextlib.ExitStack() as stack:
        remotes = [stack.enter_context(RemoteServer()) for _ in odd_answers]
        for remote, answer in zip(remotes, odd_answers, strict=True):
            remote.answer_instead = lambda path, answer=answer: (  # type: ignore[misc]
                answer if "/backfill/" in path else None
            )
            remote.join(homeserver, room, "carol")
        # Events of others may have the hashes of ours.
        forger = stack.enter_context(RemoteServer())
        forger.answer_backfill = lambda *request: [
            {**pdu, "sender": "@mallory:c.example"} for pdu in forger.backfill(*request)
        ]
        forger.join(homeserver, room, "carol")
        for remote in [*remotes, forger]:
            # Where it says nothing usable all come twice.
            wait_until_received(remote, sticky, times=2, timeout_s=120)
            assert any("/backfill/" in path for _, path in remote.requests)
            assert max(receipts(remote, sticky).values()) == 2


# F5a
@pytest.mark.deployments("sqlite")
def test_long_errors_take_no_memory(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """Of an error to one of our transactions only the beginning is read, and then it is ended."""
    room = create_room(alice)
    sticky = send_sticky(alice, room, 2)
    fail_ours(remote, Harm.FLOOD)
    before = peak_memory(homeserver)
    remote.join(homeserver, room, "carol")
    eventually(lambda: len(remote.flooded) > 1, what="errors")
    assert peak_memory(homeserver) - before < FLOOD_BYTES / 4
    # Of which most is still on the way.
    assert max(remote.flooded) < FLOOD_BYTES / 4
    remote.wait_for(alice.send(room))
    remote.harm = lambda txn_id, body: None
    wait_until_received(remote, sticky, timeout_s=60)


# F5a
@pytest.mark.deployments("sqlite")
@pytest.mark.parametrize("path", ["/event/", "/send/sticky"])
def test_answers_without_end(
    homeserver: Homeserver, alice: Client, remote: RemoteServer, path: str
) -> None:
    """They are ended, and the events are sent again."""
    room = create_room(alice)
    sticky = send_sticky(alice, room, 2)
    written = [0]

    def for_ever() -> Iterator[bytes]:
        yield b'{"pdus": ['
        while True:
            yield b"{}," * 20_000
            written[-1] += 60_000

    def answer_instead(target: str) -> RawAnswer | None:
        if path not in target or len(written) > 2:
            return None
        written.append(0)
        return 200, for_ever()

    remote.answer_instead = answer_instead
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, sticky, timeout_s=60)
    eventually(lambda: len(written) > 2, 30, "the answers")
    # Much more would be read in that time.
    time.sleep(3)
    assert max(written) < FLOOD_BYTES / 4


def peak_memory(homeserver: Homeserver) -> int:
    """How many bytes Synapse's main process has had at most."""
    status = Path(f"/proc/{homeserver.pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


# F5a, F7
@pytest.mark.repeats("sqlite")
@pytest.mark.deployments("sqlite")
def test_event_that_a_server_cannot_take(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """One with which every transaction fails holds up the others for a few seconds only."""
    room = create_room(alice)
    sticky = send_sticky(alice, room, 10)
    poison = sticky.pop(3)

    def harm(txn_id: str, body: Any) -> int | None:
        events = [event_from_pdu("10", pdu) for pdu in body["pdus"]]
        return 400 if poison in {event.event_id for event in events} else None

    remote.harm = harm
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, sticky)
    assert not has_failed(homeserver, remote)
    remote.harm = lambda txn_id, body: None
    wait_until_received(remote, [poison])
    assert receipts(remote, sticky) == dict.fromkeys(sticky, 1)


# F5
def test_dead_servers_take_nobodys_place(make_homeserver: MakeHomeserver) -> None:
    """With twice as many servers that do not answer as slots, a server that joins is paid."""
    homeserver = make_homeserver(
        "sqlite",
        federation=True,
        module_config={"federation_grace_period": "1s", "max_servers_at_once": 3},
    )
    homeserver.start()
    alice = homeserver.register()
    dead_room, room = create_room(alice), create_room(alice)
    missed, sticky = send_sticky(alice, dead_room, 2), send_sticky(alice, room, 2)
    with contextlib.ExitStack() as stack:
        dead = [stack.enter_context(RemoteServer()) for _ in range(6)]
        for remote in dead:
            remote.harm = lambda txn_id, body: Harm.HANG
            remote.join(homeserver, dead_room, "carol")
        for remote in dead:
            eventually(lambda remote=remote: remote.harmed, what="a try")  # type: ignore[misc]
        joiner = stack.enter_context(RemoteServer())
        joiner.join(homeserver, room, "dave")
        began = time.monotonic()
        wait_until_received(joiner, sticky)
        # Each of the others takes twenty seconds to fail.
        assert time.monotonic() - began < 15
        assert not any(receipts(remote, missed) for remote in dead)


# F5a
def test_synapses_own_sending_waits_for_no_failure_of_ours(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """While our tables cannot be read, plain events arrive as ever, and the log is not flooded."""
    homeserver = make_homeserver(
        "sqlite", federation=True, module_config={"federation_grace_period": "1s"}
    )
    homeserver.start()
    alice = homeserver.register()
    room = create_room(alice)
    remote.join(homeserver, room, "carol")
    homeserver.stop()
    table = "ALTER TABLE synapse_sticky_watermarks RENAME TO"
    homeserver.execute(f"{table} elsewhere")
    position = homeserver.log_position()
    homeserver.start()
    started = time.monotonic()
    (sticky,) = send_sticky(alice, room)
    remote.wait_for(sticky)
    began = time.monotonic()
    for _ in range(10):
        remote.wait_for(alice.send(room))
    # Each of them would wait.
    assert time.monotonic() - began < 15
    logged = homeserver.log_since(position).count("Cannot look for servers that are owed")
    assert 1 <= logged <= 1 + (time.monotonic() - started) // 60
    homeserver.execute("ALTER TABLE elsewhere RENAME TO synapse_sticky_watermarks")
    with RemoteServer() as joiner:
        joiner.join(homeserver, room, "dave")
        wait_until_received(joiner, [sticky])


# F3, F5
def test_one_question_for_each_transaction(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """A server that was merely away is asked no more than that."""
    homeserver = make_homeserver(
        "sqlite",
        federation=True,
        # That would ask something of its own.
        module_config={"federation_grace_period": "1s", "pull_after_outage": None},
    )
    homeserver.start()
    alice = homeserver.register()
    room = create_room(alice)
    remote.join(homeserver, room, "carol")
    (before,) = send_sticky(alice, room)
    wait_until_received(remote, [before])
    homeserver.stop()
    remote.harm = lambda txn_id, body: 503
    homeserver.start()
    missed = send_sticky(alice, room, 60)
    # Synapse's own queue forgets them.
    homeserver.restart()
    asked = len(questions(remote))
    tried = sum("/send/sticky" in path for _, path in remote.requests)
    remote.harm = lambda txn_id, body: None
    wait_until_received(remote, missed, timeout_s=40)
    time.sleep(2)
    ours = [path for _, path in remote.requests if "/send/sticky" in path]
    assert 1 < len(ours) - tried <= 5
    # Two more where Synapse's queue comes in between; simulation knows of none.
    assert len(questions(remote)) - asked <= len(ours) - tried + 2
    # Synapse's catch-up sends the newest one too.
    assert receipts(remote, missed[:-1]) == dict.fromkeys(missed[:-1], 1)


# F2, F8
@pytest.mark.deployments("sqlite")
@pytest.mark.parametrize("tells", [True, False], ids=["tells", "does_not_tell"])
def test_many_events_cost_a_joiner_few_requests(
    homeserver: Homeserver, alice: Client, remote: RemoteServer, tells: bool
) -> None:
    """It is sent them twice if it does not tell its history, and asked once a transaction."""
    unknown: RawAnswer = (404, [b'{"errcode": "M_UNRECOGNIZED"}'])
    if not tells:
        remote.answer_instead = lambda path: unknown if "/backfill/" in path else None
    room = create_room(alice)
    sticky = send_sticky(alice, room, 110)
    remote.join(homeserver, room, "carol")
    newest = "SELECT max(position) FROM synapse_sticky_events WHERE room_id = ?"
    settled = (
        "SELECT settled_position FROM synapse_sticky_watermarks "
        "WHERE server_name = ? AND room_id = ?"
    )
    eventually(
        lambda: (
            homeserver.query(settled, remote.server_name, room) == homeserver.query(newest, room)
        ),
        120,
        "the watermark",
    )
    assert receipts(remote, sticky) == dict.fromkeys(sticky, 1 if tells else 2)
    ours = [path for _, path in remote.requests if "/send/sticky" in path]
    # Some more if the first come while the others are still being sent.
    assert len(ours) <= (4 if tells else 10)
    assert len(questions(remote)) <= (10 if tells else 16)


def questions(remote: RemoteServer) -> list[str]:
    """The questions whether the server has an event."""
    kinds = ("/event/", "/timestamp_to_event/", "/backfill/")
    return [path for _, path in remote.requests if any(kind in path for kind in kinds)]


# F2, F7
def test_restart_during_a_join(make_homeserver: MakeHomeserver, remote: RemoteServer) -> None:
    """What a server takes and ignores while it is joining is sent again, though we restarted."""
    homeserver = make_homeserver(
        "sqlite", federation=True, module_config={"federation_grace_period": "1s"}
    )
    homeserver.start()
    alice = homeserver.register()
    room = create_room(alice)
    before = send_sticky(alice, room, 2)
    known_event, is_joining = remote._known_event, True

    def known_once_joined(event_id: str) -> Any:
        return known_event("$unknown" if is_joining else event_id)

    remote._known_event = known_once_joined  # type: ignore[method-assign]
    remote.join(homeserver, room, "carol")
    eventually(lambda: questions(remote), what="the question whether it has joined")
    homeserver.restart()
    fresh = send_sticky(alice, room, 2)
    wait_until_received(remote, fresh)
    time.sleep(2)
    assert not receipts(remote, before)
    is_joining = False
    wait_until_received(remote, before)
    wait_until_received(remote, fresh, times=2)


# F1, F3
def test_user_of_ours_who_comes_back(make_homeserver: MakeHomeserver, remote: RemoteServer) -> None:
    """While none of our users is in a room nobody is paid there, and when one is back, at once."""
    homeserver = make_homeserver(
        "sqlite", federation=True, module_config={"federation_grace_period": "1s"}
    )
    homeserver.start()
    alice = homeserver.register()
    room = create_room(alice)
    remote.join(homeserver, room, "carol")
    remote.harm = lambda txn_id, body: 503
    missed = send_sticky(alice, room, 2)
    alice.leave(room)
    # Synapse's own queue forgets them.
    homeserver.restart()
    remote.harm = lambda txn_id, body: None
    time.sleep(3)
    assert not {e.event_id for e in remote.received} & set(missed)
    alice.join(room, via=[remote.server_name])
    wait_until_received(remote, missed)


# F2, F5
@pytest.mark.repeats("workers")
def test_server_that_is_always_sent_something(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """Its turn comes between two transactions of Synapse's own, and never beside one."""
    busy_room, room = create_room(alice), create_room(alice)
    sticky = send_sticky(alice, room, 3)
    remote.join(homeserver, busy_room, "carol")
    remote.answers_after_s = 0.5
    done = threading.Event()

    def keep_sending() -> None:
        while not done.wait(0.05):
            alice.send(busy_room)

    with ThreadPoolExecutor() as pool:
        sending = pool.submit(keep_sending)
        try:
            eventually(lambda: len(remote.transactions) > 2, what="traffic")
            remote.join(homeserver, room, "carol")
            wait_until_received(remote, sticky, timeout_s=20)
        finally:
            done.set()
        sending.result()
    assert remote.most_transactions_at_once == 1


# F1, F3
@pytest.mark.any_synapse
@pytest.mark.repeats("workers")
def test_killed_while_paying(homeserver: Homeserver, alice: Client, stock_peer: Homeserver) -> None:
    """What was not acknowledged before the kill is sent after it."""
    room = create_room(alice)
    sticky = send_sticky(alice, room, 120)
    carol = stock_peer.register()
    join_via(carol, room, homeserver)
    eventually(lambda: stored(stock_peer, room) & set(sticky), 60, "the first", interval_s=0.01)
    had = len(stored(stock_peer, room) & set(sticky))
    kill_senders(homeserver)
    assert had < len(sticky), "killed too late"
    wait_until_stored(stock_peer, room, sticky, timeout_s=60)


# F3
def test_watermarks_outlive_a_restart(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """What was acknowledged and stored is not sent again after a restart."""
    homeserver = make_homeserver(
        "sqlite",
        federation=True,
        module_config={"federation_grace_period": "1s", "poll_interval": "500ms"},
    )
    homeserver.start()
    alice = homeserver.register()
    room = create_room(alice)
    sticky = send_sticky(alice, room, 3)
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, sticky)
    sticky += send_sticky(alice, room, 2)
    wait_until_received(remote, sticky)
    last_position = "SELECT max(position) FROM synapse_sticky_events"
    eventually(
        lambda: (
            homeserver.query("SELECT settled_position FROM synapse_sticky_watermarks")
            == homeserver.query(last_position)
        ),
        30,
        "the watermark",
    )
    homeserver.kill("main")
    homeserver.start()
    (after,) = send_sticky(alice, room)
    wait_until_received(remote, [after])
    time.sleep(3)
    assert receipts(remote, [*sticky, after]) == dict.fromkeys([*sticky, after], 1)


# K3, F1
def test_what_another_server_fetched_counts(
    homeserver: Homeserver, alice: Client, mixed_peer: Homeserver, own_peer: Homeserver
) -> None:
    """An event that never was sent to us, and came as a missing one, is delivered too."""
    room = create_room(alice)
    bob, olga = mixed_peer.register(), own_peer.register()
    for joiner in (bob, olga):
        join_via(joiner, room, homeserver)
    for server in (homeserver, mixed_peer, own_peer):
        for user in (bob, olga):
            wait_until_joined(server, room, user.user_id)
    since = alice.sync()["next_batch"]
    homeserver.proxy.set_fault(Fault.CLOSE)
    (event_id,) = send_sticky(olga, room)
    follow_until_seen(bob, room, [event_id])
    own_peer.stop()
    homeserver.proxy.set_fault(Fault.NONE)
    plain = bob.send(room)
    followed = follow_until_seen(alice, room, [event_id, plain], since, timeout_s=60)
    assert_once(followed, room, [event_id])
    eventually(
        lambda: (
            {e["event_id"] for e in sticky_in(alice.sync(filter=NO_TIMELINE), room)} == {event_id}
        ),
        what="the event in the section",
    )


def showing_debts(homeserver: Homeserver) -> Callable[[], list[dict[str, Any]]]:
    """Starts a homeserver whose module shows who is owed what; and how to ask it."""
    modules = [
        {
            "module": "debts.ModuleThatShowsDebts",
            "config": {"federation_grace_period": GRACE_PERIOD, "poll_interval": "1s"},
        }
    ]
    homeserver.reconfigure(module=False, extra_config={"modules": modules})
    homeserver.directory.mkdir(exist_ok=True)
    shutil.copy(Path(debts.__file__), homeserver.directory)
    homeserver.start()

    def owed() -> list[dict[str, Any]]:
        answer: list[dict[str, Any]] = homeserver.http.get(homeserver.main_url + debts.PATH).json()
        return answer

    return owed


# F1, F5
def test_who_is_owed_what(make_homeserver: MakeHomeserver, remote: RemoteServer) -> None:
    """For each server: what it is owed, why it is not paid yet, and in the log when it was."""
    homeserver = make_homeserver("sqlite", federation=True)
    owed = showing_debts(homeserver)
    alice = homeserver.register()
    room = create_room(alice)
    remote.join(homeserver, room, "carol")
    (first,) = send_sticky(alice, room)
    wait_until_received(remote, [first])
    eventually(lambda: owed() == [], 30, "nothing owed")
    remote.online = False
    sent = send_sticky(alice, room, 2, sticky_ms=HOUR_MS)

    eventually(lambda: [debt["event_ids"] for debt in owed()] == [sent], 30, "the debt")
    (debt,) = owed()
    assert debt["server_name"] == remote.server_name
    assert debt["room_id"] == room
    assert abs(debt["since_ts"] - now_ms()) < 20_000

    def retry_ts() -> int | None:
        """Until when Synapse backs off from it, if it does."""
        (debt,) = owed()
        return debt["retry_ts"] if debt["reason"] == "backing_off" else None

    assert eventually(retry_ts, 30, "Synapse backing off") > now_ms() - 10_000
    homeserver.restart()
    eventually(lambda: any(debt["obstacle"] for debt in owed()), 30, "a try of our own")
    remote.online = True
    wait_until_received(remote, sent)
    eventually(lambda: owed() == [], 30, "nothing owed")
    caught_up = f"{remote.server_name} has caught up with sticky events"
    eventually(lambda: caught_up in homeserver.log(), what="the line in the log")


# F1
@pytest.mark.any_synapse
def test_who_is_owed_what_by_another_process(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """The main process answers for the workers that send, from what they have stored."""
    homeserver = make_homeserver("workers", federation=True)
    owed = showing_debts(homeserver)
    alice = homeserver.register()
    room = create_room(alice)
    remote.join(homeserver, room, "carol")
    (first,) = send_sticky(alice, room)
    wait_until_received(remote, [first])
    eventually(lambda: owed() == [], 30, "nothing owed")
    remote.online = False
    sent = send_sticky(alice, room, 2)
    eventually(lambda: [debt["event_ids"] for debt in owed()] == [sent], 30, "the debt")
    eventually(
        lambda: [debt["reason"] for debt in owed()] == ["backing_off"], 30, "Synapse backing off"
    )
    remote.online = True
    wait_until_received(remote, sent)
    eventually(lambda: owed() == [], 30, "nothing owed")
