# SPDX-License-Identifier: AGPL-3.0-or-later
"""Puts our subclasses where Synapse finds the class.

Synapse builds servlets once per listener and handlers on first use, both after
modules are loaded. A second servlet for the same path would do as well, since
the later one wins, but Synapse then logs an error about doubled metrics.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, ModuleType
from typing import Any

from synapse.http.servlet import RestServlet
from synapse.server import HomeServer

from synapse_sticky.hooks.sharing import SYNAPSES, chosen, note, synapses
from synapse_sticky.seams.checks import misfit, require

# Synapse's flag for its own sticky events, and what it may be called where it is stored.
_FLAG = re.compile(r"\w*msc4354\w*")

# The newest MSC has no sticky state. Up to 1.162 Synapse's own sends it, with the flag on.
_LEFT_ALONE = "RoomStateEventRestServlet"


def use_instead(hs: HomeServer, module: ModuleType, name: str, factory: Callable[..., Any]) -> None:
    """Make a homeserver build our class in place of Synapse's own.

    Args:
        module: where Synapse looks the class up when it builds one.
        name: of Synapse's class there.
        factory: our subclass, perhaps with arguments bound.
    """
    require(module, name)
    original = synapses(module, name)
    ours: Any = factory.func if isinstance(factory, partial) else factory
    # Synapse's metrics and logs go by the name of the class.
    ours.__name__, ours.__qualname__ = name, original.__qualname__
    place = note(hs, original, factory)

    def build(cls: type, hs: HomeServer, *args: Any, **kwargs: Any) -> Any:
        if cls is not chooser:
            # A subclass that somebody else has made of it.
            return object.__new__(cls)
        return chosen(hs, place, original)(hs, *args, **kwargs)

    # Synapse calls static methods by this name as well.
    kept = {key: getattr(original, key) for key in ("__module__", "__qualname__", "__doc__")}
    chooser: Any = type(name, (original,), {**kept, "__new__": build, SYNAPSES: original})
    setattr(module, name, chooser)


def check_servlets() -> None:
    """Refuse to start if a servlet of Synapse's has its own flag and we have not replaced it.

    It would take sticky events as ordinary ones, without a word.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("synapse.rest."):
            for servlet in _own_servlets(module):
                if _has_flag(servlet) and servlet.__name__ != _LEFT_ALONE:
                    raise misfit(f"{name}.{servlet.__name__} has sticky events of its own")


def _own_servlets(module: ModuleType) -> Iterator[type[RestServlet]]:
    """The servlets that Synapse defines in this module and that are still in their place."""
    for value in vars(module).values():
        if (
            inspect.isclass(value)
            and issubclass(value, RestServlet)
            and value.__module__ == module.__name__
        ):
            yield value


def _has_flag(servlet: type[RestServlet]) -> bool:
    methods = (inspect.unwrap(method) for method in vars(servlet).values() if callable(method))
    return any(_mentions_flag(method.__code__) for method in methods if inspect.isfunction(method))


def _mentions_flag(code: CodeType) -> bool:
    return any(
        _mentions_flag(part)
        if inspect.iscode(part)
        else isinstance(part, str) and _FLAG.fullmatch(part) is not None
        for part in (*code.co_names, *code.co_consts)
    )
