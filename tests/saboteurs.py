"""Modules that make Synapse look different to the module under test, to see what it says.

Name them before it in `modules`. Each does its work when its configuration is parsed: that is
after Synapse itself was imported, and before the module named next is.
"""

import functools
import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any


class _Saboteur:
    """What Synapse needs to take something for a module."""

    def __init__(self, config: Any, api: Any) -> None:
        pass


class OtherVersion(_Saboteur):
    """Synapse claims to be of the version that is configured."""

    @staticmethod
    def parse_config(config: dict[str, str]) -> None:
        original = importlib.metadata.version

        def version(distribution_name: str) -> str:
            if distribution_name == "matrix-synapse":
                return config["version"]
            return original(distribution_name)

        importlib.metadata.version = version


class WithoutSyncMethod(_Saboteur):
    """A method of Synapse's that the module overrides has another name."""

    @staticmethod
    def parse_config(config: Any) -> None:
        from synapse.handlers.sync import SyncHandler

        handler: Any = SyncHandler
        handler._generate_sync_entry_of_rooms = handler._generate_sync_entry_for_rooms
        del handler._generate_sync_entry_for_rooms


class OtherSyncParameter(_Saboteur):
    """It has the name, and takes something else."""

    @staticmethod
    def parse_config(config: Any) -> None:
        from synapse.handlers.sync import SyncHandler

        async def _generate_sync_entry_for_rooms(self: Any, builder: Any) -> Any:
            raise NotImplementedError

        handler: Any = SyncHandler
        handler._generate_sync_entry_for_rooms = _generate_sync_entry_for_rooms


class OtherVisibilityParameter(_Saboteur):
    """Synapse's visibility filter cannot be told what to include any more."""

    @staticmethod
    def parse_config(config: Any) -> None:
        from synapse import visibility

        async def without_it(storage: Any, user_id: str, events: Any, is_peeking: bool) -> Any:
            raise NotImplementedError

        module: Any = visibility
        module.filter_and_transform_events_for_client = without_it


class WithoutTokenSlot(_Saboteur):
    """Synapse has done away with the slot of its token that the module uses."""

    @staticmethod
    def parse_config(config: Any) -> None:
        from synapse import types

        class StreamToken:
            """One without the slot."""

        module: Any = types
        module.StreamToken = StreamToken


class WithoutTurns(_Saboteur):
    """Synapse's queue for a server cannot be told to go on."""

    @staticmethod
    def parse_config(config: Any) -> None:
        from synapse.federation.sender.per_destination_queue import PerDestinationQueue

        queue: Any = PerDestinationQueue
        del queue.attempt_new_transaction


class RenamedName(_Saboteur):
    """Synapse has renamed something that the module imports."""

    @staticmethod
    def parse_config(config: Any) -> None:
        from synapse.util import async_helpers

        module: Any = async_helpers
        del module.stop_cancellation


class RenamedMethod(_Saboteur):
    """Synapse has renamed a method that the module replaces."""

    @staticmethod
    def parse_config(config: Any) -> None:
        from synapse.handlers.delayed_events import DelayedEventsHandler

        handler: Any = DelayedEventsHandler
        handler.schedule = handler.add
        del handler.add


class Impatient(_Saboteur):
    """The module does not wait long for its lock."""

    @staticmethod
    def parse_config(config: Any) -> None:
        from synapse_sticky.seams import database

        module: Any = database
        module.LOCK_TIMEOUT_S = 2


class OtherTransactions(_Saboteur):
    """What Synapse sends to servers goes another way."""

    @staticmethod
    def parse_config(config: Any) -> None:
        from synapse.federation.sender.transaction_manager import TransactionManager

        async def send_new_transaction(self: Any, destination: str, transaction: Any) -> None:
            raise NotImplementedError

        manager: Any = TransactionManager
        manager.send_new_transaction = send_new_transaction


class OtherVisibilityForServers(_Saboteur):
    """Synapse's filter for what servers ask for takes something else."""

    @staticmethod
    def parse_config(config: Any) -> None:
        from synapse import visibility

        async def filter_events_for_server(storage: Any, events: Any) -> Any:
            raise NotImplementedError

        module: Any = visibility
        module.filter_events_for_server = filter_events_for_server


class WithoutStoredFlag(_Saboteur):
    """Synapse's event writer keeps its flag for sticky events somewhere else."""

    @staticmethod
    def parse_config(config: Any) -> None:
        from synapse.storage.databases.main.events import PersistEventsStore

        store: Any = PersistEventsStore
        original = store.__init__

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            del self._msc4354_enabled

        store.__init__ = __init__


class UnknownServlet(_Saboteur):
    """Synapse takes sticky events on one more endpoint, if its own flag is on."""

    @staticmethod
    def parse_config(config: Any) -> None:
        from synapse.http.servlet import RestServlet
        from synapse.rest.client import room

        class RoomOtherRestServlet(RestServlet):
            """One that the module does not know."""

            def __init__(self, hs: Any) -> None:
                super().__init__()
                self._msc4354_enabled = hs.config.experimental.msc4354_enabled

        RoomOtherRestServlet.__module__ = room.__name__
        module: Any = room
        module.RoomOtherRestServlet = RoomOtherRestServlet


class Unreliable(_Saboteur):
    """Functions of the module fail, or take their time, for as long as a file names them.

    The configuration has a directory, and the functions, as `module:class.method`. A file in the
    directory that is named like a method makes it fail; `slow_` and its name keeps it from coming
    to its end. Meanwhile there is another file, `in_` and its name.
    """

    @staticmethod
    def parse_config(config: dict[str, Any]) -> None:
        directory = Path(config["directory"])
        for function in config["functions"]:
            module_name, _, path = function.partition(":")
            class_name, _, name = path.partition(".")
            owner = getattr(importlib.import_module(module_name), class_name)
            setattr(owner, name, _unreliable(getattr(owner, name), name, directory))


def _unreliable(original: Any, name: str, directory: Path) -> Any:
    from synapse.logging.context import make_deferred_yieldable
    from twisted.internet import reactor, task

    @functools.wraps(original)
    async def unreliable(*args: Any, **kwargs: Any) -> Any:
        if (directory / name).exists():
            raise RuntimeError(f"{name} is sabotaged")
        while (directory / f"slow_{name}").exists():
            (directory / f"in_{name}").touch()
            await make_deferred_yieldable(task.deferLater(reactor, 0.05))
        return await original(*args, **kwargs)

    return unreliable


class Deaf(_Saboteur):
    """Processes do not hear what others tell them, or late, for as long as a file says so.

    The configuration has a directory. The files in it are named `stored` and `recorded`, for
    messages, and `signal`. They may have a number of seconds in them.
    """

    @staticmethod
    def parse_config(config: dict[str, Any]) -> None:
        from synapse_sticky.deliverable.reader import IndexReader
        from synapse_sticky.seams.signal import Signal

        for owner, method, name in (
            (IndexReader, "on_stored_elsewhere", "stored"),
            (IndexReader, "on_recorded_elsewhere", "recorded"),
            (Signal, "invalidate", "signal"),
            (Signal, "invalidate_all", "signal"),
        ):
            file = Path(config["directory"]) / name
            setattr(owner, method, _deaf(getattr(owner, method), file))


def _deaf(original: Any, file: Path) -> Any:
    from twisted.internet import reactor

    timer: Any = reactor

    @functools.wraps(original)
    def deaf(*args: Any) -> None:
        if not file.exists():
            original(*args)
        elif seconds := file.read_text():
            timer.callLater(float(seconds), original, *args)

    return deaf


class UnreadableBundles(_Saboteur):
    """Events that are bundled with others are gone when the module reads them."""

    @staticmethod
    def parse_config(config: Any) -> None:
        from synapse.storage.databases.main.events_worker import EventsWorkerStore

        original = EventsWorkerStore.get_events_as_list

        @functools.wraps(original)
        async def get_events_as_list(self: Any, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code
            if caller.co_filename.endswith("hooks/visibility.py") and caller.co_name == "_visible":
                raise RuntimeError("purged meanwhile")
            return await original(self, *args, **kwargs)

        store: Any = EventsWorkerStore
        store.get_events_as_list = get_events_as_list


class FewRoomsRemembered(_Saboteur):
    """The module forgets the state of a room as soon as it reads that of another."""

    @staticmethod
    def parse_config(config: Any) -> None:
        from synapse_sticky.seams import room_state

        constants: Any = room_state
        assert constants._MAX_ROOMS > 1
        constants._MAX_ROOMS = 1
