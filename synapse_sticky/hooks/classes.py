# SPDX-License-Identifier: AGPL-3.0-or-later
"""Puts our subclasses where Synapse finds the class.

Synapse builds servlets once per listener and handlers on first use, both after
modules are loaded. A second servlet for the same path would do as well, since
the later one wins, but Synapse then logs an error about doubled metrics.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from synapse_sticky.seams.checks import require


def use_instead(module: ModuleType, name: str, factory: Callable[..., Any]) -> None:
    """Make Synapse build our class in place of its own.

    Args:
        module: where Synapse looks the class up when it builds one.
        name: of Synapse's class there.
        factory: our subclass, perhaps with arguments bound.
    """
    require(module, name)
    ours: Any = factory.func if isinstance(factory, partial) else factory
    # Synapse's metrics and logs go by the name of the class.
    ours.__name__, ours.__qualname__ = name, getattr(module, name).__qualname__
    setattr(module, name, factory)
