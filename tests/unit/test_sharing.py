"""What the homeservers of one process share: each has the module or not, and none is kept."""

import gc
import inspect
import weakref
from functools import partial
from types import ModuleType
from typing import Any

import pytest
from synapse.module_api.errors import ConfigError

from synapse_sticky.hooks.classes import use_instead
from synapse_sticky.hooks.sharing import choosing, is_noted, note, synapses, wrap_for


class Homeserver:
    """Stands for a homeserver."""


def homeserver() -> Any:
    """One of its own."""
    return Homeserver()


class Handler:
    """Stands for a class of Synapse's."""

    def __init__(self, hs: Any) -> None:
        self.hs = hs

    @staticmethod
    def encode(value: str) -> str:
        """Encode it."""
        return value.upper()

    def fetch(self, room_id: str) -> str:
        """Fetch it."""
        return room_id


class StickyHandler(Handler):
    """Ours."""

    def __init__(self, hs: Any, *, limit: int) -> None:
        super().__init__(hs)
        self.limit = limit


@pytest.fixture
def synapse() -> Any:
    """A module of Synapse's, with a class of its own that no other test changes."""
    module: Any = ModuleType("where_synapse_looks")
    module.Handler = type("Handler", (Handler,), {"__doc__": Handler.__doc__})
    module.Handler.__module__ = module.__name__
    return module


def test_each_homeserver_builds_its_own_class(synapse: Any) -> None:
    original, (first, second, plain) = synapse.Handler, (homeserver() for _ in range(3))
    use_instead(first, synapse, "Handler", partial(StickyHandler, limit=1))
    use_instead(second, synapse, "Handler", partial(StickyHandler, limit=2))
    assert [synapse.Handler(hs).limit for hs in (first, second, first)] == [1, 2, 1]
    assert type(synapse.Handler(plain)) is original
    assert synapse.Handler(plain).hs is plain
    assert synapses(synapse, "Handler") is original


def test_the_class_stays_a_class(synapse: Any) -> None:
    original, hs = synapse.Handler, homeserver()
    use_instead(hs, synapse, "Handler", partial(StickyHandler, limit=1))
    # As Synapse's servlet of `/sync` does, by its own name.
    assert synapse.Handler.encode("a") == "A"
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(synapse.Handler, attribute) == getattr(original, attribute)
    # For metrics and logs.
    assert type(synapse.Handler(hs)).__name__ == "Handler"

    class Theirs(synapse.Handler):  # type: ignore[misc]
        """Of another module."""

    assert type(Theirs(hs)) is Theirs


def test_each_homeserver_calls_its_own_method(synapse: Any) -> None:
    original, (first, second, plain) = synapse.Handler.fetch, (homeserver() for _ in range(3))
    for number, hs in enumerate((first, second)):

        def fetch(self: Any, room_id: str, number: int = number) -> str:
            return f"{number} {original(self, room_id)}"

        wrap_for(hs, synapse.Handler, "fetch", fetch, "room_id")
    answers = [synapse.Handler(hs).fetch("!a") for hs in (first, second, plain)]
    assert answers == ["0 !a", "1 !a", "!a"]
    assert synapses(synapse.Handler, "fetch") is original
    assert synapse.Handler.fetch.__doc__ == "Fetch it."
    assert "room_id" in inspect.signature(synapse.Handler.fetch).parameters


def test_each_homeserver_calls_its_own_function() -> None:
    def look(hs: Any, room_id: str) -> str:
        return room_id

    with_module, plain = homeserver(), homeserver()
    ours = choosing(with_module, look, lambda hs, room_id: "ours", lambda hs: hs)
    assert [ours(hs, "!a") for hs in (with_module, plain)] == ["ours", "!a"]


def test_what_was_noted_is_of_one_homeserver() -> None:
    first, second = homeserver(), homeserver()
    note(first, Handler, StickyHandler)
    assert [is_noted(hs, Handler) for hs in (first, second)] == [True, False]


def test_no_homeserver_is_kept(synapse: Any) -> None:
    hs = homeserver()

    def fetch(self: Any, room_id: str, kept: Any = hs) -> str:
        return room_id

    use_instead(hs, synapse, "Handler", partial(StickyHandler, limit=1))
    wrap_for(hs, synapse.Handler, "fetch", fetch)
    reference = weakref.ref(hs)
    del hs, fetch
    gc.collect()
    assert reference() is None
    assert synapse.Handler(homeserver()).fetch("!a") == "!a"


def test_what_does_not_fit_is_refused(synapse: Any) -> None:
    hs = homeserver()
    with pytest.raises(ConfigError):
        use_instead(hs, synapse, "Gone", Handler)
    with pytest.raises(ConfigError):
        wrap_for(hs, synapse.Handler, "gone", Handler.fetch)
    with pytest.raises(ConfigError):
        wrap_for(hs, synapse.Handler, "fetch", Handler.fetch, "user_id")
