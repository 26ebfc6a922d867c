"""Fixtures: the browser, all that Element Call is given, and users who open it."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import BrowserType, expect, sync_playwright

from harness.client import Client
from tests.chromium import ARGUMENTS, CHROMIUM
from tests.element_call.call import Call, OpenCall
from tests.element_call.site import Site

# A camera and a microphone that only seem to be there, and for which nobody has to be asked.
# Names of other hosts have no address.
CALL_ARGUMENTS = [
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
# Element Call gives up on a media server that says nothing for 15 seconds, too soon for most tests:
# every timer of 15 seconds takes ten minutes.
PATIENT = """
const setTimeoutOfBrowser = window.setTimeout;
window.setTimeout = (callback, delay, ...rest) =>
    setTimeoutOfBrowser(callback, delay === 15000 ? 600000 : delay, ...rest);
"""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Where the host page and Element Call are."""
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.close()


@pytest.fixture(scope="session")
def chromium() -> Iterator[BrowserType]:
    """To launch headless Chromiums."""
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        yield playwright.chromium


@pytest.fixture
def open_call(chromium: BrowserType, site: Site, tmp_path: Path) -> Iterator[OpenCall]:
    """Open Element Call for a user, in a browser of its own.

    With `patient=False` it gives up on the media server as soon as it does by itself; with
    `join=False` only its host is opened. The other arguments are those of `Call`. The directory of
    the test has the log of each browser, and a screenshot of its end.
    """
    numbers = itertools.count(1)
    opened: list[Call] = []
    addresses: set[str] = set()

    def open_call(
        user: Client, room: str, *, patient: bool = True, join: bool = True, **arguments: Any
    ) -> Call:
        browser = chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, *CALL_ARGUMENTS])
        context = browser.new_context(locale="en-GB", viewport={"width": 1000, "height": 700})
        if patient:
            context.add_init_script(PATIENT)
        page = context.new_page()
        # Those of its frame and of its workers too.
        context.on("request", lambda request: addresses.add(request.url))
        page.on("websocket", lambda socket: addresses.add(socket.url))
        call = Call(page, site, user, room, tmp_path / f"call{next(numbers)}.log", **arguments)
        opened.append(call)
        if join:
            call.join()
        return call

    yield open_call
    for call in opened:
        call.close()
    hosts = {urlsplit(url).hostname for url in addresses if not url.startswith(("blob:", "data:"))}
    assert hosts == {"127.0.0.1"}, "the browser asked for other hosts"
