"""How the tests look at the page."""

import re
from urllib.parse import quote

from playwright.sync_api import Page, expect

from tests.browser.world import World

PHONE = {"width": 390, "height": 844}
NARROWEST = {"width": 320, "height": 640}
LIVE = re.compile(r"^Live \u00b7")
DESKTOP = {"width": 1280, "height": 900}


def sign_in(page: Page, world: World, place: str = "") -> None:
    """Open the page, or a place of it, and sign in as a server admin."""
    page.goto(world.page_url + place)
    page.get_by_label("Access token").fill(world.admin.access_token)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()


def block_bob(world: World) -> None:
    """Have an event that is held, and a block with a reason."""
    body = {"enabled": False, "reason": "Joins every call and says nothing"}
    world.put(f"users/{quote(world.bob.user_id, safe='')}/settings", body)
