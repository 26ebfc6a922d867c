"""MSC4370: what other servers learn of a room's newest events."""

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from synapse.federation.transport.server import federation as synapse_servlets

from harness.client import Client, JsonDict, MatrixError, quote
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.support import MakeHomeserver, stored_pdu, text

# What differs between deployments differs on workers too.
pytestmark = pytest.mark.repeats("postgres")

PREFIX = "/_matrix/federation/unstable/org.matrix.msc4370/extremities/"
# Some release after the oldest supported one began to have the endpoint itself.
SYNAPSE_HAS_IT = "/extremities/" in inspect.getsource(synapse_servlets)


def ask(server: RemoteServer, homeserver: Homeserver, room_id: str) -> JsonDict:
    """The answer to a server that asks for a room. Raises `MatrixError`."""
    return server.request(homeserver.server_name, "GET", PREFIX + quote(room_id))


def extremities(server: RemoteServer, homeserver: Homeserver, room_id: str) -> list[str]:
    """The events in the answer, which has nothing else and no event twice."""
    answer = ask(server, homeserver, room_id)
    assert list(answer) == ["prev_events"]
    events: list[str] = answer["prev_events"]
    assert len(set(events)) == len(events)
    return events


def error_of(request: Callable[[], object]) -> MatrixError | None:
    """How a request is refused; None if it is not."""
    try:
        request()
    except MatrixError as error:
        return error
    return None


def refusal(request: Callable[[], object]) -> tuple[int, str]:
    """The status and the error code of a request that is refused; (200, "") if it is not."""
    error = error_of(request)
    return (error.status, error.errcode) if error else (200, "")


@pytest.fixture
def elsewhere() -> Iterator[RemoteServer]:
    """A server that is in no room."""
    with RemoteServer() as server:
        yield server


# P1
def test_the_answer_is_what_the_next_event_refers_to(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """One event in a quiet room, and several if servers have sent at the same time."""
    room = alice.create_room(preset="public_chat")
    carol = remote.join(homeserver, room, "carol")
    newest = alice.send(room)
    assert extremities(remote, homeserver, room) == [newest]
    following = alice.send(room)
    assert stored_pdu(homeserver, following)["prev_events"] == [newest]
    # Two that do not know of each other.
    remote.wait_for(following)
    forks = [remote.create_event(room, "m.room.message", text(name), carol) for name in "xy"]
    remote.send(forks)
    expected = {fork.event_id for fork in forks}
    eventually(lambda: set(extremities(remote, homeserver, room)) == expected)
    joining = alice.send(room)
    assert set(stored_pdu(homeserver, joining)["prev_events"]) == expected
    assert extremities(remote, homeserver, room) == [joining]


# P1
@pytest.mark.repeats("workers")
def test_at_most_ten_of_many(homeserver: Homeserver, alice: Client, remote: RemoteServer) -> None:
    """As the next event does, the answer names the ten deepest ones."""
    room = alice.create_room(preset="public_chat")
    carol = remote.join(homeserver, room, "carol")
    base = remote.send_event(room, carol)
    forks = [
        # Of those that are as deep as each other any might be taken.
        remote.create_event(
            room, "m.room.message", text(str(n)), carol, prev_events=[base], depth=1_000 + n
        )
        for n in range(13)
    ]
    remote.send(forks)
    query = "SELECT event_id FROM event_forward_extremities WHERE room_id = ?"
    stored = {(fork.event_id,) for fork in forks}
    eventually(lambda: set(homeserver.query(query, room)) == stored, what="the forks")
    answer = extremities(remote, homeserver, room)
    assert set(answer) == {fork.event_id for fork in forks[3:]}
    joining = alice.send(room)
    assert set(stored_pdu(homeserver, joining)["prev_events"]) == set(answer)
    # What is left of the old ones is referred to next.
    rest = extremities(remote, homeserver, room)
    assert set(rest) == {joining, *(fork.event_id for fork in forks[:3])}


# P2
def test_servers_outside_of_the_room(
    homeserver: Homeserver, alice: Client, remote: RemoteServer, elsewhere: RemoteServer
) -> None:
    """Who was never in the room, is only invited, or has left learns nothing."""
    room = alice.create_room(preset="public_chat")
    carol = remote.join(homeserver, room, "carol")
    assert extremities(remote, homeserver, room)
    alice.invite(room, elsewhere.user_id("dave"))
    assert refusal(lambda: ask(elsewhere, homeserver, room)) == (403, "M_FORBIDDEN")
    remote.leave(room, carol)
    eventually(lambda: refusal(lambda: ask(remote, homeserver, room)) == (403, "M_FORBIDDEN"))


# P2
def test_servers_that_the_acl_denies(
    homeserver: Homeserver, alice: Client, remote: RemoteServer, elsewhere: RemoteServer
) -> None:
    """Being in the room is not enough, and those outside do not learn of the ACL."""
    room = alice.create_room(
        preset="public_chat",
        room_version="11",
        power_level_content_override={"events": {"m.room.server_acl": 0}},
    )
    carol = remote.join(homeserver, room, "carol")
    assert extremities(remote, homeserver, room)
    # All servers here have the same name, but for the port, so alice's own server is denied too,
    # which it would not let alice do.
    acl = {"allow": ["*"], "deny": ["127.0.0.1"]}
    remote.send_event(room, carol, acl, "m.room.server_acl", "")

    inside = eventually(lambda: error_of(lambda: ask(remote, homeserver, room)), what="the ACL")
    assert inside is not None
    assert (inside.status, inside.errcode) == (403, "M_FORBIDDEN")
    assert "banned" in inside.error
    outside = error_of(lambda: ask(elsewhere, homeserver, room))
    assert outside is not None
    assert (outside.status, outside.errcode) == (403, "M_FORBIDDEN")
    assert outside.error != inside.error


# P2
@pytest.mark.parametrize(
    "room_id",
    [
        "!unknown:elsewhere.example",
        "!unknown",
        "nonsense",
        "#a:b",
        "$x",
        "!",
        "",
        "%",
        "!ä",
        "!\0:a",
    ],
)
@pytest.mark.repeats("workers")
def test_rooms_that_are_not_known(
    homeserver: Homeserver, remote: RemoteServer, room_id: str
) -> None:
    """Neither one that might exist elsewhere, nor what is no room ID at all."""
    assert refusal(lambda: ask(remote, homeserver, room_id)) == (404, "M_NOT_FOUND")


# P2
@pytest.mark.repeats("workers")
def test_only_servers_that_say_who_they_are(
    homeserver: Homeserver, alice: Client, remote: RemoteServer, elsewhere: RemoteServer
) -> None:
    """Nobody gets an answer without a signature, or with that of somebody else."""
    room = alice.create_room(preset="public_chat")
    remote.join(homeserver, room, "carol")
    assert extremities(remote, homeserver, room)
    url = f"https://{homeserver.server_name}{PREFIX}{quote(room)}"
    response = homeserver.http.get(url)
    assert (response.status_code, response.json()["errcode"]) == (401, "M_UNAUTHORIZED")
    elsewhere.server_name = remote.server_name
    assert refusal(lambda: ask(elsewhere, homeserver, room))[0] == 401


# P2
def test_rate_limit(make_homeserver: MakeHomeserver, remote: RemoteServer) -> None:
    """The limits for requests of servers count."""
    limits = {"sleep_limit": 1, "sleep_delay": 500, "reject_limit": 2, "concurrent": 1}
    homeserver = make_homeserver(
        "sqlite", federation=True, extra_config={"rc_federation": {"window_size": 60_000, **limits}}
    )
    homeserver.start()
    unknown = "!unknown:elsewhere.example"
    # The keys of the asking server are known from here on.
    assert refusal(lambda: ask(remote, homeserver, unknown)) == (404, "M_NOT_FOUND")
    with ThreadPoolExecutor(8) as pool:
        at_once = [pool.submit(refusal, lambda: ask(remote, homeserver, unknown)) for _ in range(8)]
        answers = {answer.result() for answer in at_once}
    assert answers == {(404, "M_NOT_FOUND"), (429, "M_LIMIT_EXCEEDED")}


# P1: with Synapse's own flag on, the answer is Synapse's if it has one
def test_synapses_own_endpoint(make_homeserver: MakeHomeserver, remote: RemoteServer) -> None:
    """Ours gives way to the one in Synapse, and says so; whichever it is, it answers."""
    homeserver = make_homeserver(
        "sqlite", federation=True, extra_config={"experimental_features": {"msc4370_enabled": True}}
    )
    homeserver.start()
    assert ("`msc4370_enabled` is on" in homeserver.log()) == SYNAPSE_HAS_IT
    alice = homeserver.register()
    room = alice.create_room(preset="public_chat")
    remote.join(homeserver, room, "carol")
    newest = alice.send(room)
    assert extremities(remote, homeserver, room) == [newest]
    # What tells them apart: it is 404 in the MSC.
    status, _ = refusal(lambda: ask(remote, homeserver, "!unknown:elsewhere.example"))
    assert status == (403 if SYNAPSE_HAS_IT else 404)
