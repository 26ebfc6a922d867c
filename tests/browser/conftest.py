"""Fixtures: one world for all tests, and a browser with a new profile for each."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from tests.browser.world import World, make_world
from tests.chromium import ARGUMENTS, CHROMIUM
from tests.support import GRACE_PERIOD


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that writes the pictures of the documentation."""
    parser.addoption(
        "--update-images",
        action="store_true",
        help="write the screenshots to docs/images, not to a directory of the test run",
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server with the module, another Synapse beside it, and two servers that lack events."""
    shared: dict[str, Any] = {
        "federation": True,
        "proxied": True,
        "module_config": {"federation_grace_period": GRACE_PERIOD},
    }
    homeserver = Homeserver(directory=tmp_path_factory.mktemp("page"), **shared)
    peer = Homeserver(directory=tmp_path_factory.mktemp("peer"), **shared)
    try:
        homeserver.start()
        peer.start()
        with RemoteServer() as owed, RemoteServer() as away:
            yield make_world(homeserver, peer, owed, away)
    finally:
        peer.close()
        homeserver.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    # On a busy machine an answer may take a while, and the page asks every few seconds only.
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser, world: World) -> Iterator[BrowserContext]:
    """A new profile, of a desktop in light colours. A complaint of the browser fails the test."""
    world.settle()
    context = browser.new_context(
        locale="en-GB", viewport={"width": 1280, "height": 900}, color_scheme="light"
    )
    context.set_default_timeout(30_000)
    complaints: list[str] = []

    def note(message: Any) -> None:
        # An answer that is an error is no fault of the page.
        if message.type in ("error", "warning") and not re.search(
            r"Failed to load resource", message.text
        ):
            complaints.append(message.text)

    context.on("console", note)
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    yield context
    context.close()
    assert complaints == []


@pytest.fixture
def page(context: BrowserContext) -> Page:
    """An empty tab."""
    return context.new_page()


@pytest.fixture
def images(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where screenshots go."""
    if request.config.getoption("--update-images"):
        return Path(__file__).parents[2] / "docs" / "images"
    return tmp_path
