# SPDX-License-Identifier: AGPL-3.0-or-later
"""The module's block in ``homeserver.yaml``, typed.

A mistake stops Synapse at start-up with the option's path, the value that was
expected and the one that it got.
"""

import enum
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attr
from synapse.module_api.errors import ConfigError

from synapse_sticky.protocol import MAX_EVENTS

_UNITS_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}
_HIGHEST_RATE: Final = 1_000_000
_DURATION = re.compile(r"([0-9]{1,9})(ms|s|m|h)")


class Default(enum.Enum):
    """Where sticky events are on if nobody has decided. The values are those of the option."""

    ALL = "all"
    PRIVATE_ROOMS = "private_rooms"
    NONE = "none"


@attr.s(slots=True, frozen=True, auto_attribs=True)
class RateLimit:
    """How many events may be sent, as Synapse's own `rc_` options say it."""

    per_second: float
    burst_count: int


LOCAL_RATE_LIMIT: Final = RateLimit(per_second=1, burst_count=60)
REMOTE_RATE_LIMIT: Final = RateLimit(per_second=20, burst_count=1_000)


@attr.s(slots=True, frozen=True, auto_attribs=True)
class PullConfig:
    """Whom to ask after an outage for the events that nobody sends again."""

    servers_per_room: int = 3
    max_rooms: int = 100
    # Beside those that had sticky events.
    rooms: tuple[str, ...] = ()


PULL: Final = PullConfig()


@attr.s(slots=True, frozen=True, auto_attribs=True)
class StickyEventsConfig:
    """The options that an admin can set. ``sample_config.yaml`` explains them."""

    max_events_per_sync: int = MAX_EVENTS
    cleanup_interval_ms: int = 60_000
    poll_interval_ms: int = 5_000
    federation_grace_period_ms: int = 15_000
    max_servers_at_once: int = 100
    enabled_by_default: Default = Default.ALL
    # What `new_rooms.enabled` says, None if the option is left out.
    enabled_in_new_rooms: bool | None = None
    local_rate_limit: RateLimit | None = LOCAL_RATE_LIMIT
    remote_rate_limit: RateLimit | None = REMOTE_RATE_LIMIT
    max_held_per_server: int = 20_000
    pull_after_outage: PullConfig | None = PULL

    @classmethod
    def parse(cls, options: object) -> "StickyEventsConfig":
        """Read the ``config`` of the module.

        Raises:
            ConfigError: with the path of the option that is wrong.
        """
        if options is None:
            options = {}
        if not isinstance(options, Mapping):
            raise _mistake((), options, "a block of options, or nothing")
        parsers: dict[str, tuple[str, Callable[[str, object], object]]] = {
            "max_events_per_sync": ("max_events_per_sync", _whole_number(1, MAX_EVENTS)),
            "cleanup_interval": ("cleanup_interval_ms", _duration_ms(1_000, 3_600_000)),
            "poll_interval": ("poll_interval_ms", _duration_ms(500, 60_000)),
            "federation_grace_period": (
                "federation_grace_period_ms",
                _duration_ms(0, 600_000),
            ),
            "max_servers_at_once": ("max_servers_at_once", _whole_number(1, 10_000)),
            "enabled_by_default": ("enabled_by_default", _default),
            "new_rooms": ("enabled_in_new_rooms", _enabled),
            "local_rate_limit": ("local_rate_limit", _rate_limit(LOCAL_RATE_LIMIT)),
            "remote_rate_limit": ("remote_rate_limit", _rate_limit(REMOTE_RATE_LIMIT)),
            "max_held_per_server": ("max_held_per_server", _whole_number(0, 1_000_000)),
            "pull_after_outage": ("pull_after_outage", _pull),
        }
        values: dict[str, Any] = {}
        for name, value in options.items():
            if name not in parsers:
                raise _unknown((), name, parsers)
            attribute, parse = parsers[name]
            values[attribute] = parse(name, value)
        return cls(**values)


def _mistake(path: tuple[str, ...], got: object, expected: str) -> ConfigError:
    # Synapse puts the place of the module in front of the path.
    return ConfigError(f"expected {expected}, got {got!r}", path)


def _unknown(path: tuple[str, ...], name: object, known: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"unknown option {name!r}: known options are {', '.join(known)}", (*path, str(name))
    )


def _block(name: str, value: object, *known: str) -> Mapping[str, object]:
    """Return a block of options that are all known."""
    if not isinstance(value, Mapping):
        raise _mistake((name,), value, f"a block with {' and '.join(known)}, or null")
    for key in value:
        if key not in known:
            raise _unknown((name,), key, known)
    return value


def _enabled(name: str, value: object) -> bool | None:
    if value is None:
        return None
    enabled = _block(name, value, "enabled").get("enabled")
    if not isinstance(enabled, bool):
        raise _mistake((name, "enabled"), enabled, "true or false")
    return enabled


def _rate_limit(default: RateLimit) -> Callable[[str, object], RateLimit | None]:
    def parse(name: str, value: object) -> RateLimit | None:
        if value is None or value is False:
            return None
        block = {**attr.asdict(default), **_block(name, value, *attr.asdict(default))}
        per_second, burst_count = block["per_second"], block["burst_count"]
        # Not a bool, which is an int as well; and no NaN, which compares false.
        if type(per_second) not in (int, float) or not 0 < per_second <= _HIGHEST_RATE:
            expected = f"a number above 0, up to {_HIGHEST_RATE}"
            raise _mistake((name, "per_second"), per_second, expected)
        if type(burst_count) is not int or not 1 <= burst_count <= _HIGHEST_RATE:
            expected = f"a whole number from 1 to {_HIGHEST_RATE}"
            raise _mistake((name, "burst_count"), burst_count, expected)
        return RateLimit(per_second, burst_count)

    return parse


def _pull(name: str, value: object) -> PullConfig | None:
    if value is None or value is False:
        return None
    block = dict(_block(name, value, *attr.asdict(PULL)))
    for key, largest in (("servers_per_room", 20), ("max_rooms", 10_000)):
        if key in block:
            _whole_number(1, largest)(name, block[key], key)
    rooms = block.get("rooms", [])
    if not isinstance(rooms, list) or not all(map(_is_room_id, rooms)):
        raise _mistake((name, "rooms"), rooms, "a list of room IDs, which begin with !")
    block["rooms"] = tuple(rooms)
    config = PullConfig(**block)  # type: ignore[arg-type]
    if len(rooms) > config.max_rooms:
        raise _mistake((name, "rooms"), rooms, f"at most {config.max_rooms} rooms (max_rooms)")
    return config


def _is_room_id(value: object) -> bool:
    return isinstance(value, str) and value.startswith("!")


def _whole_number(smallest: int, largest: int) -> Callable[..., int]:
    def parse(name: str, value: object, *key: str) -> int:
        if type(value) is not int or not smallest <= value <= largest:
            raise _mistake((name, *key), value, f"a whole number from {smallest} to {largest}")
        return value

    return parse


def _default(name: str, value: object) -> Default:
    for default in Default:
        if value == default.value:
            return default
    names = ", ".join(default.value for default in Default)
    raise _mistake((name,), value, f"one of {names}")


def _duration_ms(shortest_ms: int, longest_ms: int) -> Callable[[str, object], int]:
    expected = (
        "a duration with its unit, such as 500ms, 5s, 2m or 1h, "
        f"from {shortest_ms} ms to {longest_ms} ms"
    )

    def parse(name: str, value: object) -> int:
        match = _DURATION.fullmatch(value) if isinstance(value, str) else None
        duration_ms = int(match.group(1)) * _UNITS_MS[match.group(2)] if match else -1
        if not shortest_ms <= duration_ms <= longest_ms:
            raise _mistake((name,), value, expected)
        return duration_ms

    return parse
