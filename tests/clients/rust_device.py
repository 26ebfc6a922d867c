"""One device of a user, with matrix-rust-sdk; its commands come and go as those of `device.mjs`.

It runs in a process of its own, in the environment that `tests.clients.bindings` gives.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import matrix_sdk_python as sdk


class Listener(sdk.TimelineListener):  # type: ignore[misc]
    """A room's timeline, kept up to date by the changes that the SDK tells."""

    def __init__(self) -> None:
        self._items: list[Any] = []

    def on_update(self, diff: list[Any]) -> None:
        """Apply changes."""
        for change in diff:
            self._apply(change)

    def _apply(self, change: Any) -> None:
        items = self._items
        if change.is_APPEND():
            items += change.values
        elif change.is_CLEAR():
            items.clear()
        elif change.is_PUSH_FRONT():
            items.insert(0, change.value)
        elif change.is_PUSH_BACK():
            items.append(change.value)
        elif change.is_POP_FRONT():
            items.pop(0)
        elif change.is_POP_BACK():
            items.pop()
        elif change.is_INSERT():
            items.insert(change.index, change.value)
        elif change.is_SET():
            items[change.index] = change.value
        elif change.is_REMOVE():
            del items[change.index]
        elif change.is_TRUNCATE():
            del items[change.length :]
        elif change.is_RESET():
            items[:] = change.values

    def messages(self) -> list[tuple[str, str]]:
        """Return the sender and the text of each message, in their order."""
        events = [item.as_event() for item in list(self._items)]
        return [
            (event.sender, event.content.content.kind.content.body)
            for event in events
            if event is not None
            and event.content.is_MSG_LIKE()
            and event.content.content.kind.is_MESSAGE()
        ]


class Restarter(sdk.SyncServiceStateObserver):  # type: ignore[misc]
    """Starts Sliding Sync again when it has given up, as a client has to.

    It does when the server has forgotten its position, which may follow a request that the SDK
    itself has cut short to ask for a room.
    """

    def __init__(self, service: Any) -> None:
        self._service = service
        self._loop = asyncio.get_running_loop()

    def on_update(self, state: Any) -> None:
        """Hear of the service's state, in a thread of the SDK's."""
        if state == sdk.SyncServiceState.ERROR:
            asyncio.run_coroutine_threadsafe(self._service.start(), self._loop)


class Device:
    """What the commands do."""

    def __init__(self) -> None:
        self._client: Any = None
        # With Sliding Sync.
        self._service: Any = None
        # What the SDK ends when nobody has it any more.
        self._running: list[Any] = []
        self._timelines: dict[str, tuple[Any, Listener]] = {}

    async def start(
        self, base_url: str, user_id: str, password: str, directory: str, sliding: bool
    ) -> None:
        """Log in, and sync from then on."""
        version = sdk.SlidingSyncVersionBuilder
        self._client = (
            await sdk.ClientBuilder()
            .homeserver_url(base_url)
            .sqlite_store(sdk.SqliteStoreBuilder(directory, directory))
            .sliding_sync_version_builder(version.NATIVE if sliding else version.NONE)
            .build()
        )
        await self._client.login(user_id, password, None, None)
        if sliding:
            self._service = await self._client.sync_service().finish()
            self._running.append(self._service.state(Restarter(self._service)))
            await self._service.start()
        else:
            settings = sdk.SyncSettingsV2(timeout_ms=10_000)
            self._running.append(asyncio.create_task(self._sync(settings)))

    async def _sync(self, settings: Any) -> None:
        while True:
            await self._client.sync_once_v2(settings)

    async def join(self, room_id: str) -> None:
        """Join a room."""
        await self._client.join_room_by_id(room_id)

    async def timeline(self, room_id: str) -> list[tuple[str, str]]:
        """Return the messages of a room; none as long as the SDK does not know it."""
        if room_id not in self._timelines:
            room = self._client.get_room(room_id)
            if room is None:
                return []
            # As a client does that opens a room: the list of rooms brings one event of each.
            if self._service is not None:
                await self._service.room_list_service().subscribe_to_rooms([room_id])
            timeline, listener = await room.timeline(), Listener()
            self._running.append(await timeline.add_listener(listener))
            self._timelines[room_id] = timeline, listener
        timeline, listener = self._timelines[room_id]
        # As a client does that shows the top: what came before the SDK had the timeline, and what
        # a limited response has left out.
        await timeline.paginate_backwards(50)
        return listener.messages()

    async def send(self, room_id: str, text: str) -> None:
        """Send a message by the SDK's own queue, which also encrypts."""
        timeline, _ = self._timelines[room_id]
        await timeline.send(sdk.message_event_content_from_markdown(text))

    async def participants(self, room_id: str) -> list[str]:
        """Return those who take part in the room's call."""
        room = self._client.get_room(room_id)
        return list(room.active_room_call_participants())


async def main() -> None:
    """Answer commands until the input ends."""
    device = Device()
    while line := await asyncio.to_thread(sys.stdin.readline):
        given = json.loads(line)
        command: Callable[..., Awaitable[Any]] = getattr(device, given.pop("do"))
        try:
            answer: dict[str, Any] = {"result": await command(**given)}
        except Exception as error:
            answer = {"error": {"name": type(error).__name__, "message": str(error)}}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
