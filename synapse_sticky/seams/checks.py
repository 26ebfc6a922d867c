# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether this Synapse is one that the seams fit."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from packaging.version import Version
from synapse.module_api.errors import ConfigError

if TYPE_CHECKING:
    # Not in every Synapse whose version is checked here.
    from synapse.server import HomeServer

logger = logging.getLogger(__name__)

OLDEST_SYNAPSE: Final = Version("1.148.0")
# With all of its patch releases, and with its release candidates.
NEWEST_TESTED_SYNAPSE: Final = Version("1.164")

TESTED_RANGE: Final = f"{OLDEST_SYNAPSE} to {NEWEST_TESTED_SYNAPSE}"


def synapse_version() -> Version:
    """The version of the Synapse that is installed."""
    return Version(version("matrix-synapse"))


def check_oldest_synapse() -> None:
    """Refuse a Synapse that is too old.

    Raises:
        ConfigError: saying what to do.
    """
    found = synapse_version()
    if found < OLDEST_SYNAPSE:
        raise ConfigError(
            f"synapse_sticky needs Synapse {OLDEST_SYNAPSE} or later, and this is {found}. "
            "Upgrade Synapse, or remove synapse_sticky from `modules` in homeserver.yaml."
        )


def is_untested(found: Version) -> bool:
    """Whether a Synapse is newer than any that was tested."""
    return found.release[:2] > NEWEST_TESTED_SYNAPSE.release


def warn_of_untested_synapse() -> None:
    """Say once that this Synapse is newer than any that was tested, if it is."""
    found = synapse_version()
    if is_untested(found):
        logger.warning(
            "synapse_sticky was tested with Synapse %s, and this is %s. Everything that it relies "
            "on is there, so it goes on; look for a newer synapse_sticky.",
            TESTED_RANGE,
            found,
        )


def check_listed_once(hs: "HomeServer", module: type) -> None:
    """Refuse a configuration that lists this module more than once.

    Raises:
        ConfigError: saying what to do.
    """
    require(hs.config.modules, "loaded_modules")
    count = sum(1 for listed, _ in hs.config.modules.loaded_modules if listed is module)
    if count > 1:
        raise ConfigError(
            f"synapse_sticky is listed {count} times under `modules` in homeserver.yaml. "
            "Remove all of its entries but one."
        )


def require(owner: object, name: str, *parameters: str) -> None:
    """Checks that something of Synapse's is there, and takes these parameters.

    Args:
        owner: the module, class or object that must have it.
        name: of the attribute.
        parameters: names that a function must accept.

    Raises:
        ConfigError: if not, with the seam, the versions and what to do.
    """
    names = (getattr(owner, attribute, None) for attribute in ("__qualname__", "__name__"))
    where = f"{next(filter(None, names), type(owner).__qualname__)}.{name}"
    if not hasattr(owner, name):
        raise misfit(f"{where} is not there")
    if parameters:
        accepted = inspect.signature(getattr(owner, name)).parameters
        missing = [p for p in parameters if p not in accepted]
        # Somebody else's wrapper may take whatever there is.
        if missing and all(p.kind is not p.VAR_KEYWORD for p in accepted.values()):
            raise misfit(f"{where} does not take {', '.join(missing)}")


@contextmanager
def fitting() -> Iterator[None]:
    """Turn the errors that a changed Synapse causes into the one that stops Synapse.

    Raises:
        ConfigError: as :func:`require`, for a name that is not there or is used differently.
    """
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        raise misfit(str(error)) from error


def misfit(what: str) -> ConfigError:
    """Return the error that stops Synapse at start-up, saying what does not fit."""
    return ConfigError(
        f"synapse_sticky does not fit Synapse {synapse_version()}: {what}. It was tested with "
        f"Synapse {TESTED_RANGE}. Install a synapse_sticky made for this Synapse, go back to a "
        "tested Synapse, or remove synapse_sticky from `modules` in homeserver.yaml."
    )
