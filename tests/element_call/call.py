"""One user in a browser, with Element Call."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect

from harness.client import Client, JsonDict
from harness.wait import eventually
from tests.element_call.site import Site


class Call:
    """A page that is a client of a user's, with Element Call as the user sees it.

    With `encrypted` the client can encrypt and decrypt. `timeline_limit` is how many events of the
    room it wants at first.
    """

    def __init__(
        self,
        page: Page,
        site: Site,
        user: Client,
        room: str,
        log: Path,
        *,
        encrypted: bool = False,
        timeline_limit: int = 20,
    ) -> None:
        self._user_id = user.user_id
        self._page = page
        browser = page.context.browser
        assert browser is not None
        self._browser = browser
        self._log = log
        self._lines: list[str] = []
        self._page.on("console", lambda message: self._lines.append(message.text))
        self._page.goto(site.url)
        self._page.wait_for_function("window.host")
        given = {
            "base_url": user.homeserver.main_url,
            "user_id": user.user_id,
            "device_id": user.device_id,
            "access_token": user.access_token,
            "room_id": room,
            "encrypted": encrypted,
            "timeline_limit": timeline_limit,
        }
        self._page.evaluate("given => host.start(given)", given)
        self.screen = self._page.frame_locator("iframe")

    def join(self) -> None:
        """Open Element Call, which joins the call by itself."""
        self._page.evaluate("host.open()")

    @property
    def noted(self) -> JsonDict:
        """What happened between Element Call and the page: see `host.mjs`."""
        noted: JsonDict = self._page.evaluate("host.noted")
        return noted

    def wait_for_participants(self, *users: Client, timeout_s: float = 30) -> None:
        """Wait until the count is theirs, and the tiles have just the names of these users."""
        count = self.screen.get_by_test_id("roomHeader_participants_count")
        expect(count).to_have_text(str(len(users)), timeout=timeout_s * 1000)
        # They have no other names than their localparts.
        wanted = {user.user_id[1:].partition(":")[0] for user in users}

        def as_wanted() -> bool:
            names = self.screen.get_by_test_id("name_tag").all_inner_texts()
            assert set(names) == wanted, f"the tiles have the names {names}"
            return True

        eventually(as_wanted, what=f"the tiles that {self._user_id} sees")

    def hang_up(self) -> None:
        """Leave the call by its button."""
        self.screen.get_by_test_id("incall_leave").click()

    def crash(self) -> None:
        """End its browser with SIGKILL, as if it had crashed."""
        session = self._browser.new_browser_cdp_session()
        processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
        (pid,) = [process["id"] for process in processes if process["type"] == "browser"]
        os.kill(pid, signal.SIGKILL)

    def pause(self, seconds: float) -> None:
        """Let time pass in the browser."""
        self._page.wait_for_timeout(seconds * 1000)

    def close(self) -> None:
        """Save how it looks and what it logged, and end it."""
        if self._browser.is_connected():
            self._page.screenshot(path=self._log.with_suffix(".png"))
            self._browser.close()
        self._log.write_text("\n".join(self._lines))


# The fixture `open_call`.
OpenCall = Callable[..., Call]
