"""Much is to be judged again at once: news do not wait for all of it."""

import time
from collections.abc import Callable

import pytest

from harness.client import Client, JsonDict, quote
from harness.homeserver import Homeserver
from harness.wait import eventually
from tests.support import HOUR_MS, MakeHomeserver, is_recorded, now_ms, section_ids, send_sticky

MANY = 20_000
API = "/_synapse/client/synapse_sticky/admin/v1"
LIVE = "SELECT COUNT(*) FROM synapse_sticky_events WHERE room_id = ? AND position IS NOT NULL"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.deployments("sqlite"),
    pytest.mark.any_synapse,
]


def seeded(
    make_homeserver: MakeHomeserver, count: int, reason: str | None, rooms: int = 1
) -> tuple[Homeserver, Client, str, str]:
    """A homeserver that was stopped, with many rows of sticky events in one room or more.

    Returns it, started again, with its admin, the room (the first of them), and a calm room.
    """
    homeserver = make_homeserver("sqlite")
    homeserver.start()
    admin = homeserver.register(admin=True)
    room, calm = admin.create_room(), admin.create_room()
    (first,) = send_sticky(admin, calm)
    eventually(lambda: is_recorded(homeserver, first), what="an event of the calm room")
    homeserver.stop()
    ((last,),) = homeserver.query("SELECT last_position FROM synapse_sticky_progress")
    sender = f"@bot:{homeserver.server_name}" if reason is None else "@carol:elsewhere.example.org"
    homeserver.execute(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
        "INSERT INTO synapse_sticky_events (event_id, room_id, sender, expires_ts, "
        "stream_ordering, revision, position, held_reason, owed) "
        "SELECT '$seed' || i, CASE i % ? WHEN 0 THEN ? ELSE '!room' || (i % ?) END, ?, ?, "
        "1000000 + i, ? + i, CASE WHEN ? IS NULL THEN ? + i END, ?, 0 FROM n",
        *(count, rooms, room, rooms, sender, now_ms() + HOUR_MS, last, reason, last, reason),
    )
    if reason is not None:
        homeserver.execute(
            "INSERT INTO synapse_sticky_held (event_id, reason) "
            "SELECT event_id, held_reason FROM synapse_sticky_events WHERE position IS NULL"
        )
    homeserver.execute("UPDATE synapse_sticky_progress SET last_position = ?", last + count)
    homeserver.start()
    return homeserver, admin, room, calm


def switch(admin: Client, room: str, enabled: bool) -> None:
    """What the server's admin decides on a room."""
    body: JsonDict = {"enabled": enabled}
    admin.request("PUT", f"{API}/rooms/{quote(room)}/settings", json=body)


def news_come_before(
    homeserver: Homeserver, calm: str, sender: Client, left: Callable[[], int]
) -> None:
    """What is sent now is delivered while some of the rest is still to be done."""
    assert left(), "done too soon"
    (sent,) = send_sticky(sender, calm)
    eventually(lambda: is_recorded(homeserver, sent), interval_s=0.005, what="the news")
    assert left(), "the news have waited"
    assert sent in section_ids(sender, calm)


def test_news_come_between_two_parts_of_a_switch(make_homeserver: MakeHomeserver) -> None:
    # A4: a room with many events is switched off, and on
    homeserver, admin, room, calm = seeded(make_homeserver, MANY, None)

    def live() -> int:
        return int(homeserver.query(LIVE, room)[0][0])

    news_come_before(homeserver, calm, admin, lambda: 1)
    switch(admin, room, enabled=False)
    news_come_before(homeserver, calm, admin, live)
    eventually(lambda: not live(), 180, "all held")
    switch(admin, room, enabled=True)
    news_come_before(homeserver, calm, admin, lambda: MANY - live())
    eventually(lambda: live() == MANY, 180, "all live")
    ordered = homeserver.query(
        "SELECT stream_ordering FROM synapse_sticky_events WHERE room_id = ? ORDER BY position",
        room,
    )
    assert ordered == sorted(ordered)


def test_a_switch_goes_on_after_a_kill(make_homeserver: MakeHomeserver) -> None:
    # A4: the decision is stored, and that is enough
    homeserver, admin, room, _ = seeded(make_homeserver, MANY, None)

    def live() -> int:
        return int(homeserver.query(LIVE, room)[0][0])

    switch(admin, room, enabled=False)
    eventually(lambda: live() < MANY, interval_s=0.005, what="a part of them held")
    homeserver.kill("main")
    assert 0 < live() < MANY
    homeserver.start()
    eventually(lambda: not live(), 180, "all held")
    held = "SELECT COUNT(*) FROM synapse_sticky_held WHERE reason = 'switched_off'"
    assert homeserver.query(held) == [(MANY,)]


def test_news_do_not_wait_for_soft_failed_events(make_homeserver: MakeHomeserver) -> None:
    # K1: after a start, and some rows have no event behind them
    began = time.monotonic()
    homeserver, admin, _, calm = seeded(make_homeserver, 10_000, "soft_failed")
    as_usual_s = time.monotonic() - began
    began = time.monotonic()
    (sent,) = send_sticky(admin, calm)
    eventually(lambda: is_recorded(homeserver, sent), 60, "the news")
    assert time.monotonic() - began < as_usual_s / 2


def test_news_come_while_a_flood_is_released(make_homeserver: MakeHomeserver) -> None:
    # A2: of one server, over many rooms
    homeserver, admin, _, calm = seeded(make_homeserver, 60 * 200, "over_rate", rooms=60)

    def held() -> int:
        return int(homeserver.query("SELECT COUNT(*) FROM synapse_sticky_held")[0][0])

    eventually(lambda: held() < 60 * 200, interval_s=0.005, what="the first of them released")
    for _ in range(3):
        news_come_before(homeserver, calm, admin, held)
    eventually(lambda: not held(), 180, "all released")
    positions = homeserver.query(
        "SELECT room_id, stream_ordering FROM synapse_sticky_events "
        "WHERE event_id LIKE '$seed%' ORDER BY room_id, position"
    )
    assert positions == sorted(positions)
