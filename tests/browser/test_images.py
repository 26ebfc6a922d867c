"""The pictures of the documentation. Before the other tests, which add rooms."""

import re
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.looking import DESKTOP, LIVE, PHONE, block_bob, sign_in
from tests.browser.world import API, World


def with_names(route: Route, world: World) -> None:
    """Give the servers of the tests the names that an example has."""
    response = route.fetch()
    body = response.text()
    named = {
        world.homeserver.server_name: "example.com",
        world.peer.server_name: "matrix.example.org",
        world.owed.server_name: "chat.example.net",
        world.away.server_name: "old.example.edu",
    }
    for name, example in named.items():
        body = body.replace(name, example)
    route.fulfill(response=response, body=body)


@pytest.mark.parametrize(
    ("scheme", "size"), [("light", DESKTOP), ("dark", PHONE)], ids=["desktop", "phone"]
)
def test_screenshots(
    page: Page, world: World, images: Path, scheme: str, size: dict[str, int]
) -> None:
    """They show what the page shows, and are small."""
    images.mkdir(parents=True, exist_ok=True)
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type,unused-ignore]
    page.set_viewport_size({**size, "height": 700})  # type: ignore[arg-type,unused-ignore]
    block_bob(world)
    sign_in(page, world)
    page.route(re.compile(rf"{API}/(?!page)"), lambda route: with_names(route, world))
    device = "desktop" if size is DESKTOP else "phone"
    for name, place in {
        "rooms": "#/rooms",
        "room": f"#/rooms/{quote(world.call, safe='')}",
    }.items():
        page.goto("about:blank")
        page.goto(world.page_url + place)
        expect(page.get_by_text(LIVE)).to_be_visible()
        page.mouse.move(0, 0)
        path = images / f"admin-page-{name}-{device}.png"
        page.screenshot(path=path, full_page=True)
        assert 10_000 < path.stat().st_size < 150_000
        assert path.read_bytes().startswith(b"\x89PNG")
