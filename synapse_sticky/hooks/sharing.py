# SPDX-License-Identifier: AGPL-3.0-or-later
"""Puts ours in place of Synapse's where all homeservers of a process share one.

A process may have several homeservers, with the module or without, and may shut one down and
go on. So the place gets something that asks which homeserver it is for, once for all of them,
and what it chooses from lies with the homeserver: nothing here keeps one alive.
"""

import functools
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Final

from synapse.server import HomeServer

from synapse_sticky.seams.checks import require

_OURS: Final = "_synapse_sticky_replacements"
SYNAPSES: Final = "_synapse_sticky_original"
"""The attribute with Synapse's own, of what stands in its place."""


def synapses(owner: object, name: str) -> Any:
    """Return Synapse's own function or class, whether or not it was replaced here."""
    found = getattr(owner, name, None)
    return getattr(found, SYNAPSES, found)


def wrap_for(
    hs: HomeServer,
    owner: type,
    name: str,
    wrapper: Callable[..., Any],
    *parameters: str,
    homeserver_of: Callable[[Any], Any] = attrgetter("hs"),
) -> None:
    """Put our method in place of one of Synapse's, for the objects of one homeserver.

    Args:
        wrapper: called as Synapse's is. It calls Synapse's itself (:func:`synapses`).
        parameters: those that Synapse's must take.
        homeserver_of: returns the homeserver of such an object.

    Raises:
        ConfigError: if Synapse's is not there, or does not take the parameters.
    """
    require(owner, name, *parameters)
    original = synapses(owner, name)
    choose = choosing(hs, original, functools.update_wrapper(wrapper, original), homeserver_of)
    setattr(owner, name, choose)


def choosing(
    hs: HomeServer,
    original: Callable[..., Any],
    ours: Callable[..., Any],
    homeserver_of: Callable[[Any], Any],
) -> Callable[..., Any]:
    """Return a function that calls ours for a homeserver, and Synapse's for others.

    Args:
        homeserver_of: returns the homeserver from the first argument of both.
    """
    place = note(hs, original, ours)

    @functools.wraps(original)
    def choose(first: Any, *args: Any, **kwargs: Any) -> Any:
        return chosen(homeserver_of(first), place, original)(first, *args, **kwargs)

    setattr(choose, SYNAPSES, original)
    return choose


def note(hs: HomeServer, original: Any, ours: Callable[..., Any]) -> str:
    """Let a homeserver use ours in place of Synapse's own; returns the name of the place."""
    place = _place(original)
    vars(hs).setdefault(_OURS, {})[place] = ours
    return place


def is_noted(hs: HomeServer, original: Any) -> bool:
    """Whether a homeserver uses ours in this place."""
    return _place(original) in vars(hs).get(_OURS, {})


def chosen(hs: HomeServer, place: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a homeserver uses in a place."""
    ours: Callable[..., Any] = vars(hs).get(_OURS, {}).get(place, original)
    return ours


def _place(original: Any) -> str:
    return f"{original.__module__}.{original.__qualname__}"
