"""What an admin sees and does on the page, in Chromium."""

import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, Locator, Page, Request, Route, expect

from harness.client import Client, JsonDict
from harness.processes import free_port
from harness.wait import eventually
from tests.browser.looking import DESKTOP, LIVE, NARROWEST, PHONE, block_bob, sign_in
from tests.browser.world import API, MEMBER, World, be_in_call, named_room, room_path
from tests.support import HOUR_MS, SETTINGS, now_ms, unique


def open_room(page: Page, world: World, room_id: str) -> None:
    """Sign in, and look at a room until it is shown."""
    sign_in(page, world, f"#/rooms/{quote(room_id, safe='')}")
    expect(page.get_by_role("heading", name="Servers")).to_be_visible()


def row(page: Page, text: str) -> Locator:
    """The rows of tables that have a text."""
    return page.get_by_role("row").filter(has_text=text)


def part(page: Page, name: str) -> Locator:
    """A part of a room's view."""
    return page.get_by_role("region", name=re.compile(rf"^{name}\b"))


def new_call(world: World, name: str = "") -> tuple[str, Client]:
    """A room of one test alone, and a user who is in a call there."""
    user = world.homeserver.register()
    room_id = named_room(user, name or unique("Room "))
    be_in_call(user, room_id, "LAPTOP")
    return room_id, user


# Signing in and out


def test_the_token_stays_in_the_tab(page: Page, context: BrowserContext, world: World) -> None:
    """It is in no address, cookie or lasting storage, and goes to the API in a header only."""
    requests: list[Request] = []
    page.on("request", lambda request: requests.append(request))
    sign_in(page, world)
    expect(row(page, "Friday stand-up")).to_be_visible()
    token = world.admin.access_token
    for request in requests:
        assert token not in request.url
        sent = request.headers.get("authorization")
        is_file = re.search(r"/page(/[\w.]+)?$", request.url)
        assert sent == (None if is_file else f"Bearer {token}"), request.url
        assert token not in (request.post_data or "")
    assert token not in page.url
    assert context.cookies() == []
    assert page.evaluate("localStorage.length") == 0
    assert page.evaluate("history.length") <= 3
    # It survives a reload, and no other tab has it.
    page.reload()
    expect(row(page, "Friday stand-up")).to_be_visible()
    other = context.new_page()
    other.goto(world.page_url)
    expect(other.get_by_label("Access token")).to_be_visible()
    assert other.evaluate("sessionStorage.length") == 0
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Access token")).to_be_focused()
    expect(page.get_by_label("Access token")).to_have_value("")
    assert page.evaluate("sessionStorage.length") == 0
    page.reload()
    expect(page.get_by_label("Access token")).to_be_visible()


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("nonsense", "The server does not accept this access token, or not any more."),
        ("two words", "An access token has letters, digits and punctuation only, and no spaces."),
        ("ALICE", "This account is not an admin of this server."),
    ],
)
def test_tokens_that_are_not_accepted(page: Page, world: World, token: str, sentence: str) -> None:
    """A sentence says why, and the field is ready for another try."""
    page.goto(world.page_url)
    field = page.get_by_label("Access token")
    field.fill(token.replace("ALICE", world.alice.access_token))
    field.press("Enter")
    expect(page.get_by_role("alert")).to_have_text(sentence)
    expect(field).to_be_focused()
    assert page.evaluate("sessionStorage.length") == 0
    field.fill(world.admin.access_token)
    field.press("Enter")
    expect(page.get_by_role("heading", name="Rooms")).to_be_focused()


def test_a_token_that_ends(page: Page, world: World) -> None:
    """Whoever is logged out elsewhere is told so, and nothing of the data stays."""
    admin = world.homeserver.register(admin=True)
    page.goto(world.page_url)
    page.get_by_label("Access token").fill(admin.access_token)
    page.get_by_role("button", name="Sign in").click()
    expect(row(page, "Friday stand-up")).to_be_visible()
    admin.request("POST", "/_matrix/client/v3/logout", json={})
    expect(page.get_by_role("alert")).to_contain_text("does not accept this access token")
    expect(page.get_by_text("Friday stand-up")).to_have_count(0)
    assert page.evaluate("sessionStorage.length") == 0


# Rooms


def test_rooms(page: Page, world: World) -> None:
    """They have their counts, are searched by name, alias or ID, and sorted."""
    sign_in(page, world)
    call = row(page, "Friday stand-up")
    described = world.get(room_path(world.call))
    expect(call).to_contain_text(f"{described['live']}")
    expect(row(page, "Announcements")).to_contain_text("Off by the room")
    expect(call).to_contain_text("On by default")
    expect(page.locator("dl")).to_contain_text("1 switched off")

    search = page.get_by_label("Search rooms")
    for text in ("FRIDAY", "#standup:", world.call):
        search.fill(text)
        expect(page.locator(".rooms tbody tr")).to_have_count(1)
        expect(call).to_be_visible()
    search.fill(unique())
    expect(page.get_by_text("No room with sticky events has this")).to_be_visible()
    search.fill("")
    expect(row(page, "Board games")).to_be_visible()

    names = page.locator(".rooms tbody th a")
    heading = page.get_by_role("columnheader", name="Room")
    heading.get_by_role("button").click()
    expect(heading).to_have_attribute("aria-sort", "ascending")
    expect(names.first).to_have_text("Announcements")
    heading.get_by_role("button").click()
    expect(heading).to_have_attribute("aria-sort", "descending")
    expect(names.first).not_to_have_text("Announcements")
    counts = page.get_by_role("columnheader", name="Held")
    counts.get_by_role("button").click()
    expect(counts).to_have_attribute("aria-sort", "descending")
    expect(heading).not_to_have_attribute("aria-sort", re.compile(".*"))
    expect(names.first).to_have_text("Announcements")


def test_a_room_that_is_in_no_list(page: Page, world: World) -> None:
    """A room without sticky events is opened by its ID, and says that there are none."""
    room_id = world.alice.create_room()
    sign_in(page, world)
    page.get_by_label("Search rooms").fill(room_id)
    page.get_by_role("link", name="Open this room").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(room_id)
    expect(part(page, "Now")).to_contain_text("nobody has sent a sticky event here")
    expect(part(page, "Servers")).to_contain_text("No other server is in this room.")
    page.goto(f"{world.page_url}#/rooms/{quote('!nothing:example.com', safe='')}")
    expect(page.get_by_role("alert")).to_have_text("This server does not know this room.")
    page.goto(f"{world.page_url}#/rooms/nonsense")
    expect(page.get_by_role("alert")).to_have_text("'room_id' must be the ID of a room.")


def test_many_rooms(page: Page, world: World) -> None:
    """They come in pages; whoever looks at one that is gone is shown the last one."""
    total = [120]

    def instead(route: Route) -> None:
        query = parse_qs(urlsplit(route.request.url).query)
        start, limit = (int(query[name][0]) for name in ("from", "limit"))
        numbers = range(start, min(start + limit, total[0]))
        rooms: list[JsonDict] = [
            {
                "room_id": f"!{n}:b",
                "name": f"Room {n}",
                "canonical_alias": None,
                "live": 1,
                "held": {},
                "owed": 0,
                "enabled": True,
                "enabled_by": "default",
            }
            for n in numbers
        ]
        more = {"next_token": str(start + limit)} if start + limit < total[0] else {}
        route.fulfill(json={"rooms": rooms, "total": total[0], **more})

    page.route(re.compile(rf"{API}/rooms\?"), instead)
    sign_in(page, world)
    pages = page.get_by_role("navigation", name="Pages")
    before, after = (pages.get_by_role("button", name=name) for name in ("Previous", "Next"))
    expect(pages).to_contain_text("1 to 50 of 120 rooms")
    expect(before).to_be_disabled()
    after.click()
    expect(pages).to_contain_text("51 to 100 of 120 rooms")
    after.click()
    expect(row(page, "Room 119")).to_be_visible()
    expect(after).to_be_disabled()
    before.click()
    expect(row(page, "Room 50 ")).to_be_visible()
    total[0] = 40
    expect(row(page, "Room 39")).to_be_visible()
    expect(pages).to_be_hidden()


# One room, live


def seconds_left(locator: Locator) -> int:
    """The time that is left, as the page says it."""
    match = re.search(r"(?:(\d+) min )?(\d+) s", locator.inner_text())
    assert match is not None
    return int(match[1] or 0) * 60 + int(match[2])


def test_a_room_live(page: Page, world: World) -> None:
    """Entries come, go, and run out while the page is open; held ones say why."""
    room_id, user = new_call(world)
    open_room(page, world, room_id)
    now, held = part(page, "Now"), part(page, "Held")
    expect(now.get_by_role("row")).to_have_count(2)
    expect(now).to_contain_text(user.user_id)
    expect(now).to_contain_text(f"Call membership {MEMBER}")
    expect(now).to_contain_text("Key LAPTOP")
    left = now.locator(".left-text")
    before = seconds_left(left)
    assert 3_500 < before <= 3_600
    eventually(lambda: seconds_left(left) < before - 1, 15, "the time running out")
    # What is open stays open, while others come.
    now.get_by_text("Content", exact=True).click()
    expect(now.get_by_role("region", name="Content")).to_contain_text(
        '"claimed_device_id": "LAPTOP"'
    )
    be_in_call(user, room_id, "PHONE", 0.2)
    expect(row(page, "Key PHONE")).to_be_visible()
    expect(row(page, "Key PHONE").locator(".left")).to_have_class(re.compile("soon"))
    expect(now.get_by_role("region", name="Content")).to_be_visible()
    expect(row(page, "Key PHONE")).to_have_count(0, timeout=40_000)
    # Its leave says nothing more than its key.
    user.send(room_id, {"msc4354_sticky_key": "LAPTOP"}, type=MEMBER, sticky_ms=HOUR_MS)
    expect(now).to_contain_text("which only say that a value is gone")
    user.send(room_id, {"ciphertext": "x"}, type="m.room.encrypted", sticky_ms=HOUR_MS)
    expect(now).to_contain_text("Its type and key are not known here.")
    user.send_state(room_id, SETTINGS, {"enabled": False})
    expect(part(page, "Switch")).to_contain_text("Decided by the room\u2019s own settings.")
    expect(now).to_contain_text("sticky events are off in this room")
    expect(held.get_by_role("row")).to_have_count(4)
    expect(held).to_contain_text("It is delivered once they are switched on.")


def test_more_than_a_hundred(page: Page, world: World) -> None:
    """The first hundred are shown, and more on request."""
    room_id, user = new_call(world)

    def instead(route: Route) -> None:
        limit = int(parse_qs(urlsplit(route.request.url).query)["limit"][0])
        entry = {"sender": user.user_id, "type": MEMBER, "remaining_ms": HOUR_MS}
        entries = [
            {**entry, "event_id": f"${n}", "sticky_key": f"{n}", "opaque": False, "content": {}}
            for n in range(150)
        ]
        route.fulfill(json={"entries": entries[:limit], "total": 150})

    page.route(re.compile(rf"{API}/rooms/.*/map"), instead)
    open_room(page, world, room_id)
    now = part(page, "Now")
    expect(now.get_by_role("row")).to_have_count(101)
    expect(now).to_contain_text("The first 100 of 150 are shown.")
    now.get_by_role("button", name="Show more").click()
    expect(now.get_by_role("row")).to_have_count(151)
    expect(now.get_by_role("button", name="Show more")).to_be_hidden()


def test_each_server(page: Page, world: World) -> None:
    """Green, owed or unreachable, since when and why."""
    open_room(page, world, world.call)
    expect(part(page, "Servers").get_by_role("row")).to_have_count(4)
    servers = part(page, "Servers")
    good, owed, away = (
        servers.get_by_role("row").filter(has_text=s.server_name)
        for s in (world.peer, world.owed, world.away)
    )
    expect(good).to_contain_text("Up to date")
    expect(good.get_by_role("button", name="Retry")).to_have_count(0)
    expect(owed).to_contain_text(re.compile(r"Owed.* owed, the oldest for \d+ (second|minute)"))
    expect(owed).to_contain_text("Last try: it does not know the room yet.")
    expect(away).to_contain_text(re.compile(r"Unreachable.*Since \d\d:\d\d.*, for \d+ "))
    # It is in the list of all rooms too.
    page.get_by_role("link", name="Servers").click()
    expect(row(page, world.owed.server_name)).to_be_visible()
    expect(row(page, world.away.server_name)).to_be_visible()
    expect(row(page, world.peer.server_name)).to_have_count(0)


def test_a_retry(page: Page, world: World) -> None:
    """It is asked for at once. Where Synapse waits, the admin is asked first."""
    open_room(page, world, world.call)
    owed, away = world.owed, world.away
    tries = len(owed.transactions)
    page.get_by_role("button", name=f"Retry {owed.server_name}").click()
    expect(page.get_by_role("status")).to_contain_text(f"{owed.server_name} is tried now.")
    eventually(lambda: len(owed.transactions) > tries, 10, "a try")

    dialog = page.get_by_role("dialog", name="End the wait?")
    said = page.get_by_role("status").filter(has_text=f"{away.server_name} is tried now.")

    def until_asked() -> bool:
        # Synapse waits a few seconds in these tests: now and then it does not wait.
        world.alice.send(world.call)
        page.evaluate("document.getElementById('said').textContent = ''")
        page.get_by_role("button", name=f"Retry {away.server_name}").click()
        expect(dialog.or_(said)).to_be_visible()
        return bool(dialog.is_visible())

    eventually(until_asked, 60, "Synapse waiting")
    expect(dialog).to_contain_text("did not answer, so Synapse leaves it alone until")
    # Nothing is ended but by the admin.
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    eventually(until_asked, 60, "Synapse waiting")
    dialog.get_by_role("button", name="Try now").click()
    expect(dialog).to_have_count(0)
    expect(said).to_be_visible()


# Decisions


def test_the_switch_of_a_room(page: Page, world: World) -> None:
    """It is switched off, on and left to the room, each after a question."""
    room_id, _ = new_call(world)
    open_room(page, world, room_id)
    switch, path = part(page, "Switch"), room_path(room_id, "/settings")
    expect(switch).to_contain_text("Decided by this server\u2019s configuration.")

    def press(name: str) -> None:
        switch.get_by_role("button", name=name).click()
        page.get_by_role("dialog").get_by_role("button", name=name).click()
        expect(page.get_by_role("dialog")).to_have_count(0)

    switch.get_by_role("button", name="Switch off").click()
    page.get_by_role("button", name="Cancel").click()
    assert world.get(path)["override"] is None
    press("Switch off")
    expect(switch).to_contain_text(
        "Sticky events are off here. Decided by an admin of this server."
    )
    expect(page.get_by_role("status")).to_have_text("Sticky events are off in this room.")
    # The button is gone: the focus is on what it changed.
    expect(switch.get_by_role("heading")).to_be_focused()
    assert world.get(path)["override"] is False
    press("Switch on")
    expect(switch).to_contain_text("Sticky events are on here. Decided by an admin of this server.")
    assert world.get(path)["override"] is True
    press("Leave it to the room")
    expect(switch).to_contain_text("Decided by this server\u2019s configuration.")
    assert world.get(path)["override"] is None


def test_blocking_a_user_by_keyboard(page: Page, world: World) -> None:
    """With a reason and an end; the events are held, and come back."""
    room_id, user = new_call(world)
    open_room(page, world, room_id)
    opener = page.get_by_role("button", name=f"Block {user.user_id}")
    opener.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Block this user?")
    expect(dialog).to_contain_text(user.user_id)
    expect(dialog.get_by_label("Reason (optional)")).to_be_focused()
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(opener).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.type("floods rooms")
    page.keyboard.press("Tab")
    page.keyboard.type("In a day")
    for _ in range(2):
        page.keyboard.press("Tab")
    expect(dialog.get_by_role("button", name="Block")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text(f"{user.user_id} is blocked.")
    path = f"users/{quote(user.user_id, safe='')}/settings"
    block = world.get(path)
    assert (block["enabled"], block["reason"]) == (False, "floods rooms")
    assert abs(block["until_ts"] - (now_ms() + 24 * HOUR_MS)) < 60_000
    held = part(page, "Held")
    expect(held).to_contain_text("Its sender is blocked here. It is delivered when the block ends.")
    expect(part(page, "Now")).to_contain_text("every sticky event of this room is held")
    held.get_by_role("button", name=f"Unblock {user.user_id}").press("Enter")
    expect(part(page, "Now")).to_contain_text("Key LAPTOP")
    assert world.get(path)["enabled"] is True


def test_all_blocks(page: Page, world: World) -> None:
    """Any user or server is blocked by its name, and every block is listed and can be ended."""
    sign_in(page, world, "#/blocks")
    expect(page.get_by_text("Nobody is blocked.")).to_be_visible()
    page.get_by_role("button", name="Block a user or a server").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("User or server").fill("not a name")
    dialog.get_by_role("button", name="Block").click()
    # It stays open, with what the API says.
    expect(dialog.get_by_role("alert")).to_have_text("'server_name' must be the name of a server.")
    dialog.get_by_label("User or server").fill("@mallory:elsewhere.example")
    dialog.get_by_role("button", name="Block").click()
    expect(dialog.get_by_role("alert")).to_have_text(
        "'user_id' must be of this server; others are blocked as a server."
    )
    dialog.get_by_label("User or server").fill("Evil.Example")
    dialog.get_by_label("The block ends").select_option("At a time of your choice")
    dialog.get_by_label("Ends at").fill("2020-01-01T00:00")
    dialog.get_by_role("button", name="Block").click()
    expect(dialog.get_by_role("alert")).to_have_text(
        "'until_ts' must be in the future, in ms since the epoch."
    )
    dialog.get_by_label("Ends at").fill("2090-01-01T12:00")
    dialog.get_by_role("button", name="Block").click()
    expect(row(page, "evil.example")).to_contain_text("1 Jan 2090, 12:00")
    assert world.get("servers/evil.example/settings")["enabled"] is False
    page.get_by_role("button", name="Unblock evil.example").click()
    expect(page.get_by_text("Nobody is blocked.")).to_be_visible()
    expect(page.get_by_role("heading", name="Blocks")).to_be_focused()
    assert world.get("servers/evil.example/settings")["enabled"] is True


def test_blocking_a_server_of_a_room(page: Page, world: World) -> None:
    """Whoever is from elsewhere is blocked with their server."""
    open_room(page, world, world.call)
    name = world.peer.server_name
    of_carol = part(page, "Now").get_by_role("row").filter(has_text=world.carol.user_id)
    of_carol.get_by_role("button", name=f"Block {name}").click()
    page.get_by_role("dialog", name="Block this server?").get_by_role(
        "button", name="Block"
    ).click()
    server = part(page, "Servers").get_by_role("row").filter(has_text=name)
    expect(server).to_contain_text("Blocked")
    expect(part(page, "Held")).to_contain_text("Its server is blocked here.")
    server.get_by_role("button", name=f"Unblock {name}").click()
    expect(of_carol).to_be_visible()
    expect(server.get_by_role("button", name=f"Block {name}")).to_be_focused()


# Texts of others


HOSTILE = [
    "<img src=x onerror='window.pwned=1'>",
    "<script>window.pwned=1</script>",
    "</td></tr></table><h1>gone</h1>",
    "{{7*7}}${window.pwned=1}",
    "\u202egnp.exe\u2066\u200b\x07",
    "javascript:window.pwned=1",
]


def test_hostile_texts(page: Page, world: World) -> None:
    """Names, keys, types, contents and reasons are shown as what they are: texts."""
    user = world.homeserver.register()
    rooms = [named_room(user, text) for text in HOSTILE]
    room_id = rooms[0]
    for text in HOSTILE:
        user.send(
            room_id,
            {"msc4354_sticky_key": text, text: text},
            type=text.replace("\u200b", ""),
            sticky_ms=HOUR_MS,
        )
    for other in rooms[1:]:
        user.send(other, sticky_ms=HOUR_MS)
    hostile_id = f"!<b onmouseover=alert(1)>{unique()}:evil.example"
    world.put(room_path(hostile_id, "/settings"), {"enabled": False})
    body = {"enabled": False, "reason": HOSTILE[0]}
    world.put("servers/evil.example/settings", body)

    sign_in(page, world)
    for text in (*HOSTILE[:4], hostile_id, HOSTILE[5]):
        expect(page.locator(".rooms tbody th a").get_by_text(text, exact=True)).to_have_count(1)
    # What would not be seen, or turn what follows around, is spelled out.
    expect(page.get_by_text(r"\u{202e}gnp.exe\u{2066}\u{200b}\u{7}", exact=True)).to_have_count(1)
    page.get_by_role("link", name=HOSTILE[0]).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(HOSTILE[0])
    now = part(page, "Now")
    expect(now.get_by_role("row")).to_have_count(len(HOSTILE) + 1)
    for text in HOSTILE[:4]:
        entry = now.get_by_role("row").filter(has_text=f"Key {text}")
        expect(entry).to_have_count(1)
        entry.get_by_text("Content", exact=True).click()
        expect(entry.locator("pre")).to_contain_text(f'"{text}"')
    page.goto(f"{world.page_url}#/blocks")
    expect(row(page, HOSTILE[0])).to_be_visible()
    page.get_by_role("button", name="Unblock evil.example").click()
    page.goto(f"{world.page_url}#/rooms/{quote(hostile_id, safe='')}")
    expect(page.get_by_role("heading", level=1)).to_have_text(hostile_id)
    assert page.evaluate("window.pwned") is None
    assert page.locator("main img, main script, main b").count() == 0


# Errors, and how often it asks


def answering(answer: dict[str, Any] | None) -> Callable[[Route], None]:
    """What answers in place of the server; None for nobody."""

    def instead(route: Route) -> None:
        if answer is None:
            route.abort()
        else:
            route.fulfill(content_type="text/html", **answer)

    return instead


def test_errors_are_sentences(page: Page, world: World) -> None:
    """Whatever answers in place of the API; and what was shown stays."""
    open_room(page, world, world.call)
    answers: list[tuple[dict[str, Any] | None, str]] = [
        ({"status": 502, "body": "<h1>Bad gateway</h1>"}, "Synapse does not answer the reverse"),
        ({"status": 404, "body": "<h1>Not found</h1>"}, "Nothing answers at this address."),
        ({"status": 403, "body": "<h1>Forbidden</h1>"}, "The reverse proxy in front of Synapse"),
        ({"status": 500, "body": '{"errcode":"M_UNKNOWN"}'}, "The server failed to answer (500)."),
        ({"status": 200, "body": "<h1>Welcome</h1>"}, "answered in a way that this page does not"),
        (None, "The server cannot be reached."),
    ]
    for answer, sentence in answers:
        page.route(f"**{API}/rooms/**", answering(answer))
        page.get_by_role("button", name="Pause").click()
        page.get_by_role("button", name="Go on").click()
        expect(page.get_by_role("alert")).to_contain_text(sentence)
        expect(page.get_by_text("Not live · next try in")).to_be_visible()
        expect(page.get_by_text("Key LAPTOP")).to_be_visible()
        page.unroute(f"**{API}/rooms/**")
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_text(LIVE)).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_how_often_it_asks(page: Page, world: World) -> None:
    """Every few seconds, not while nobody looks, and ever more rarely after errors."""
    asked: list[str] = []
    failing = [False]

    def count(route: Route) -> None:
        asked.append(route.request.url)
        if failing[0]:
            route.fulfill(status=500, content_type="application/json", body="{}")
        else:
            route.continue_()

    page.clock.install()
    page.route(f"**{API}/rooms/**/map*", count)
    open_room(page, world, world.call)

    def asked_within(seconds: int) -> int:
        before = len(asked)
        for _ in range(seconds):
            page.clock.run_for(1_000)
            # The answers take time that is not the clock's.
            page.wait_for_timeout(60)
        return len(asked) - before

    assert 9 <= asked_within(60) <= 13
    show = "document.dispatchEvent(new Event('visibilitychange'))"
    hidden = "Object.defineProperty(document, 'visibilityState', {value: '%s', configurable: true})"
    page.evaluate(f"{hidden % 'hidden'}; {show}")
    asked_within(1)
    before = len(asked)
    page.clock.run_for(600_000)
    assert len(asked) == before
    page.evaluate(f"{hidden % 'visible'}; {show}")
    assert asked_within(2) == 1
    page.get_by_role("button", name="Pause").click()
    assert asked_within(60) == 0
    failing[0] = True
    page.get_by_role("button", name="Go on").click()
    first, *later = [asked_within(60) for _ in range(3)]
    # After 10, 20, 40, and then every 60 seconds.
    assert 2 <= first <= 4
    assert all(number <= 2 for number in later)
    failing[0] = False
    asked_within(61)
    assert 9 <= asked_within(60) <= 13


# Where it stands


KEPT = ("authorization", "content-type", "if-none-match")


class PrefixProxy:
    """A reverse proxy that has the server below a path of its own, and nothing else."""

    def __init__(self, target: str, prefix: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def _pass_on(self) -> None:
                if not self.path.startswith(prefix):
                    self.send_error(404)
                    return
                length = int(self.headers.get("Content-Length", 0))
                headers = {n: v for n, v in self.headers.items() if n.lower() in KEPT}
                with httpx.Client(trust_env=False) as client:
                    answer = client.request(
                        self.command,
                        target + self.path.removeprefix(prefix),
                        headers=headers,
                        content=self.rfile.read(length),
                    )
                self.send_response(answer.status_code)
                for name, value in answer.headers.items():
                    if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.content)

            do_GET = do_PUT = do_POST = _pass_on

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", free_port()), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}{prefix}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def prefix_proxy(world: World) -> Iterator[PrefixProxy]:
    """The server behind a path."""
    proxy = PrefixProxy(world.homeserver.main_url, "/some/matrix")
    yield proxy
    proxy.close()


def test_behind_a_path(page: Page, world: World, prefix_proxy: PrefixProxy) -> None:
    """A reverse proxy may have it anywhere; a slash behind it makes no difference."""
    for slash in ("", "/"):
        page.goto(f"{prefix_proxy.url}{API}/page{slash}")
        page.get_by_label("Access token").fill(world.admin.access_token)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("link", name="Friday stand-up").click()
        expect(part(page, "Now")).to_contain_text("Key LAPTOP")
        page.get_by_role("button", name="Sign out").click()


# For everybody


def views(page: Page, world: World) -> Iterator[str]:
    """Go through everything that the page shows, and name it."""
    page.goto(world.page_url)
    expect(page.get_by_label("Access token")).to_be_visible()
    yield "sign-in"
    page.get_by_label("Access token").fill("nonsense")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_be_visible()
    yield "refusal"
    sign_in(page, world)
    expect(row(page, "Friday stand-up")).to_be_visible()
    yield "rooms"
    page.get_by_role("link", name="Friday stand-up").click()
    expect(part(page, "Servers").get_by_role("row")).to_have_count(4)
    expect(part(page, "Held").get_by_role("row")).to_have_count(2)
    part(page, "Now").get_by_text("Content", exact=True).first.click()
    yield "room"
    page.get_by_role("button", name=f"Block {world.alice.user_id}").first.click()
    page.get_by_label("The block ends").select_option("At a time of your choice")
    yield "dialog"
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Servers").click()
    expect(row(page, world.owed.server_name)).to_be_visible()
    yield "servers"
    page.get_by_role("link", name="Blocks").click()
    expect(row(page, world.bob.user_id)).to_be_visible()
    yield "blocks"
    page.get_by_role("button", name="Sign out").click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_accessibility(page: Page, world: World, scheme: str, size: dict[str, int]) -> None:
    """axe-core finds nothing serious, and nothing needs scrolling sideways."""
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type,unused-ignore]
    page.set_viewport_size(size)  # type: ignore[arg-type,unused-ignore]
    block_bob(world)
    for name in views(page, world):
        # What is read must be there in full, not on its way.
        results = Axe().run(page).response
        found = [
            f"{rule['id']}: {rule['help']} {[node['target'] for node in rule['nodes']]}"
            for rule in results["violations"]
            if rule["impact"] in ("serious", "critical")
        ]
        assert found == [], f"{name}: {found}"
        assert len(results["passes"]) > 10
        assert_fits(page, name)
    page.set_viewport_size(NARROWEST)  # type: ignore[arg-type,unused-ignore]
    for name in views(page, world):
        assert_fits(page, name)


def assert_fits(page: Page, name: str) -> None:
    """Nothing is wider than the window, or cut off at an edge within it."""
    too_wide = page.evaluate(
        "[document.documentElement, ...document.querySelectorAll('.panel, .figures, dialog')]"
        ".filter(e => e.scrollWidth > e.clientWidth)"
        ".map(e => `${e.tagName} ${e.className} ${e.scrollWidth} > ${e.clientWidth}`)"
    )
    assert too_wide == [], name


def test_only_the_keyboard(page: Page, world: World) -> None:
    """Everything is reached in its order, the focus is always seen, and follows the view."""
    sign_in(page, world)
    expect(row(page, "Friday stand-up")).to_be_visible()
    page.reload()
    expect(row(page, "Friday stand-up")).to_be_visible()
    page.keyboard.press("Tab")
    skip = page.get_by_role("button", name="Skip to the content")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    names = []
    for _ in range(20):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        if focused.count() == 0:
            break
        outline = focused.evaluate("e => getComputedStyle(e).outlineStyle")
        assert outline != "none", focused.inner_text()
        names.append(focused.inner_text() or focused.get_attribute("type"))
    assert [
        name for name in names if name in ("Pause", "search", "Room", "Live", "Held", "Owed")
    ] == [*("Pause", "search", "Room", "Live", "Held", "Owed")]
    assert "Friday stand-up" in names
    page.get_by_role("link", name="Friday stand-up").press("Enter")
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    expect(page.get_by_role("heading", level=1)).to_have_text("Friday stand-up")
    assert page.title() == "Friday stand-up · Sticky events"
    # It keeps the focus while the page goes on asking.
    button = page.get_by_role("button", name=f"Block {world.alice.user_id}").first
    button.focus()
    with page.expect_response(re.compile("/map")):
        pass
    page.wait_for_timeout(300)
    expect(button).to_be_focused()
    page.go_back()
    expect(page.get_by_role("heading", name="Rooms")).to_be_focused()
    # In a dialog the focus stays in it.
    page.go_forward()
    page.get_by_role("button", name=f"Block {world.alice.user_id}").first.press("Enter")
    for _ in range(12):
        page.keyboard.press("Tab")
        inside = page.evaluate(
            "document.activeElement === document.body || "
            "document.querySelector('dialog').contains(document.activeElement)"
        )
        assert inside


def test_what_is_read_out(page: Page, world: World) -> None:
    """There are landmarks and one heading of each view; nothing that counts down is read out."""
    open_room(page, world, world.call)
    for role in ("banner", "main", "navigation"):
        expect(page.get_by_role(role)).to_have_count(1)  # type: ignore[arg-type,unused-ignore]
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    current = page.get_by_role("navigation").locator("[aria-current]")
    expect(current).to_have_text("Rooms")
    live = "[aria-live], [role=status], [role=alert], [role=log]"
    assert page.locator(f":is({live}) :is(.left, .live-line, tr)").count() == 0
    assert page.locator(f".left:is({live}), .live-line:is({live})").count() == 0
    for name in ("Now", "Servers"):
        expect(part(page, name).get_by_role("columnheader").first).to_be_attached()
    # A phone's rows look like blocks. Safari takes them for rows only if it is told so.
    assert page.locator("tr:not([role=row])").count() == 0
    page.set_viewport_size(PHONE)  # type: ignore[arg-type,unused-ignore]
    expect(part(page, "Servers").get_by_role("row")).to_have_count(4)
    expect(part(page, "Servers").get_by_role("rowheader")).to_have_count(3)


def test_reduced_motion(page: Page, world: World) -> None:
    """Nothing moves for those who have asked for that."""
    open_room(page, world, world.call)
    moving = (
        "[...document.querySelectorAll('*')].filter(e => { const s = getComputedStyle(e); "
        "return parseFloat(s.transitionDuration) > 0 || parseFloat(s.animationDuration) > 0 })"
        ".length"
    )
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(moving) > 0
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(moving) == 0
