"""After an outage of its own a server asks others for what nobody sends it again."""

from collections.abc import Iterator

import pytest

from harness.client import Client
from harness.homeserver import BACKGROUND_WORKER, Homeserver
from harness.proxy import Fault
from tests.federation import create_room, join_via, stored, wait_until_stored
from tests.support import GRACE_PERIOD, NO_TIMELINE, assert_once, follow_until_seen, send_sticky

pytestmark = [pytest.mark.slow, pytest.mark.deployments("sqlite", "workers")]


@pytest.fixture(scope="module")
def sender_deployment(
    peer_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Homeserver]:
    """Another Synapse without the module; its own sticky events are on, or it could send none."""
    homeserver = Homeserver(
        directory=tmp_path_factory.mktemp("sender"),
        python=peer_python,
        federation=True,
        module=False,
        extra_config={"experimental_features": {"msc4354_enabled": True}},
    )
    try:
        homeserver.start()
        yield homeserver
    finally:
        homeserver.close()


@pytest.fixture
def sender(sender_deployment: Homeserver) -> Homeserver:
    """The sender of the events that are missed, running."""
    sender_deployment.ensure_running()
    return sender_deployment


def start_again(homeserver: Homeserver) -> None:
    """End the process that pulls, and start it."""
    homeserver.kill(BACKGROUND_WORKER if homeserver.workers else "main")
    homeserver.start()


# P3
@pytest.mark.parametrize("who_tells", ["the sender", "one with MSC4370", "one without"])
def test_nobody_sends_again(
    homeserver: Homeserver,
    alice: Client,
    sender: Homeserver,
    mixed_peer: Homeserver,
    stock_peer: Homeserver,
    who_tells: str,
) -> None:
    """All that the others sent while nobody could reach us is there, each once."""
    room = create_room(alice)
    bob = sender.register()
    join_via(bob, room, homeserver)
    third = {"one with MSC4370": mixed_peer, "one without": stock_peer}.get(who_tells)
    if third is not None:
        join_via(third.register(), room, homeserver)
    (before,) = send_sticky(bob, room)
    since = follow_until_seen(alice, room, [before]).next_batch
    # From here on nothing reaches us that we did not ask for.
    homeserver.proxy.set_fault(Fault.CLOSE)
    missed = send_sticky(bob, room, 30)
    if third is not None:
        wait_until_stored(third, room, missed)
        sender.stop()
    assert not set(missed) & stored(homeserver, room)
    start_again(homeserver)
    followed = follow_until_seen(
        alice, room, missed, since, timeout_s=60, timeout_ms=500, filter=NO_TIMELINE
    )
    assert followed.sticky(room) == missed
