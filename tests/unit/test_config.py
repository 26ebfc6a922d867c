"""The module's configuration: what is taken, and how a mistake is reported."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synapse.module_api.errors import ConfigError

from synapse_sticky import StickyEventsModule
from synapse_sticky.config import Default, PullConfig, RateLimit, StickyEventsConfig

WHOLE_NUMBERS = {"max_events_per_sync": (1, 100), "max_servers_at_once": (1, 10_000)}
DURATIONS = {
    "cleanup_interval": (1_000, 3_600_000),
    "poll_interval": (500, 60_000),
    "federation_grace_period": (0, 600_000),
}
OPTIONS = [*WHOLE_NUMBERS, *DURATIONS]


def _mistake(options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        StickyEventsModule.parse_config(options)
    return caught.value


def _parsed(options: Any) -> StickyEventsConfig:
    return StickyEventsModule.parse_config(options)


@pytest.mark.parametrize("options", [None, {}])
def test_everything_has_a_default(options: Any) -> None:
    # C4
    config = _parsed(options)
    assert config == StickyEventsConfig()
    assert config.max_events_per_sync == 100
    assert config.cleanup_interval_ms == 60_000
    assert config.poll_interval_ms == 5_000
    assert config.federation_grace_period_ms == 15_000
    assert config.max_servers_at_once == 100
    assert config.enabled_by_default is Default.ALL
    assert config.enabled_in_new_rooms is None
    assert config.local_rate_limit == RateLimit(1, 60)


def test_options_are_taken() -> None:
    config = _parsed(
        {
            "max_events_per_sync": 7,
            "cleanup_interval": "2m",
            "poll_interval": "700ms",
            "federation_grace_period": "0s",
            "max_servers_at_once": 3,
        }
    )
    assert config.max_events_per_sync == 7
    assert config.cleanup_interval_ms == 120_000
    assert config.poll_interval_ms == 700
    assert config.federation_grace_period_ms == 0
    assert config.max_servers_at_once == 3


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("1s", 1_000), ("1000ms", 1_000), ("90s", 90_000), ("60m", 3_600_000), ("1h", 3_600_000)],
)
def test_durations(text: str, milliseconds: int) -> None:
    assert _parsed({"cleanup_interval": text}).cleanup_interval_ms == milliseconds


@pytest.mark.parametrize("options", [[], ["max_events_per_sync"], "on", 5, True, 0, ""])
def test_the_whole_must_be_a_block(options: Any) -> None:
    mistake = _mistake(options)
    assert list(mistake.path or ()) == []
    assert repr(options) in mistake.msg
    assert "block" in mistake.msg


@pytest.mark.parametrize("name", ["no_such_option", "Max_events_per_sync", "poll_interval_ms", ""])
def test_unknown_options(name: str) -> None:
    mistake = _mistake({"poll_interval": "5s", name: 1})
    assert list(mistake.path or ()) == [name]
    assert repr(name) in mistake.msg
    for known in OPTIONS:
        assert known in mistake.msg


@pytest.mark.parametrize("name", [5, None, True, 1.5, ("a",)])
def test_options_whose_name_is_no_text(name: Any) -> None:
    mistake = _mistake({name: 1})
    assert list(mistake.path or ()) == [str(name)]
    assert repr(name) in mistake.msg


any_value = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-5, 105),
    st.floats(),
    st.text(),
    st.from_regex(r"\A[0-9]{1,12}(ms|s|m|h|d|)\Z"),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


@given(st.sampled_from(list(WHOLE_NUMBERS)), any_value)
def test_whole_numbers_are_checked(name: str, value: Any) -> None:
    smallest, largest = WHOLE_NUMBERS[name]
    # YAML's `yes` and `1.0` are none.
    if type(value) is int and smallest <= value <= largest:
        assert getattr(_parsed({name: value}), name) == value
    else:
        _assert_reported(name, value, f"from {smallest} to {largest}")


@given(st.sampled_from(list(DURATIONS)), any_value)
def test_durations_are_checked(name: str, value: Any) -> None:
    shortest_ms, longest_ms = DURATIONS[name]
    milliseconds = _milliseconds(value)
    if milliseconds is not None and shortest_ms <= milliseconds <= longest_ms:
        assert getattr(_parsed({name: value}), f"{name}_ms") == milliseconds
    else:
        _assert_reported(name, value, f"from {shortest_ms} ms to {longest_ms} ms")


def _milliseconds(value: Any) -> int | None:
    """What a text stands for if it is ASCII digits and a unit."""
    units = (("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000))
    for unit, factor in units if isinstance(value, str) else ():
        number = value.removesuffix(unit)
        if number != value and number.isascii() and number.isdigit():
            return int(number) * factor
    return None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_events_per_sync", True),
        ("max_events_per_sync", "100"),
        ("max_events_per_sync", 0),
        ("max_events_per_sync", 101),
        ("max_events_per_sync", None),
        ("max_events_per_sync", {"value": 5}),
        ("cleanup_interval", 5),
        ("cleanup_interval", "5"),
        ("cleanup_interval", "5 s"),
        ("cleanup_interval", "5s\n"),
        ("cleanup_interval", "-5s"),
        ("cleanup_interval", "0.5h"),
        ("cleanup_interval", "1d"),
        ("cleanup_interval", "999ms"),
        ("cleanup_interval", "61m"),
        ("cleanup_interval", "\u0665s"),
        ("cleanup_interval", "9" * 5_000 + "s"),
        ("poll_interval", True),
        ("poll_interval", ["5s"]),
        ("poll_interval", "499ms"),
        ("poll_interval", "61s"),
        ("poll_interval", None),
        ("federation_grace_period", 0),
        ("federation_grace_period", "0"),
        ("federation_grace_period", "-1s"),
        ("federation_grace_period", "600001ms"),
        ("federation_grace_period", "11m"),
        ("max_servers_at_once", 0),
        ("max_servers_at_once", 10_001),
        ("max_servers_at_once", False),
        ("max_servers_at_once", "100"),
        ("max_servers_at_once", 1.0),
    ],
)
def test_mistakes_of_an_admin(name: str, value: Any) -> None:
    bounds = WHOLE_NUMBERS.get(name) or DURATIONS[name]
    _assert_reported(name, value, *map(str, bounds))


def _assert_reported(name: str, value: Any, *allowed: str) -> None:
    """The path of the option, what was found, and what is allowed."""
    mistake = _mistake({name: value})
    assert list(mistake.path or ()) == [name]
    assert repr(value) in mistake.msg
    for words in allowed:
        assert words in mistake.msg


@pytest.mark.parametrize("default", list(Default))
def test_the_default_for_rooms(default: Default) -> None:
    # A4
    assert _parsed({"enabled_by_default": default.value}).enabled_by_default is default


@pytest.mark.parametrize(
    "value", ["ALL", "private", True, None, ["all"], {"all": True}, Default.ALL]
)
def test_other_defaults_for_rooms(value: Any) -> None:
    _assert_reported("enabled_by_default", value, "all", "private_rooms", "none")


@pytest.mark.parametrize("enabled", [True, False])
def test_settings_of_new_rooms(enabled: bool) -> None:
    # A4
    assert _parsed({"new_rooms": {"enabled": enabled}}).enabled_in_new_rooms is enabled
    assert _parsed({"new_rooms": None}).enabled_in_new_rooms is None


@pytest.mark.parametrize("value", [True, False, 1, "on", ["enabled"]])
def test_settings_of_new_rooms_are_a_block(value: Any) -> None:
    _assert_reported("new_rooms", value, "block", "enabled", "null")


@pytest.mark.parametrize("value", [1, 0, "true", "yes", None, {}])
def test_mistakes_in_settings_of_new_rooms(value: Any) -> None:
    _assert_reported_below("new_rooms", "enabled", value, "true or false")
    assert list(_mistake({"new_rooms": {}}).path or ()) == ["new_rooms", "enabled"]


def test_rate_limits() -> None:
    # A3
    for block, limit in (
        ({"per_second": 0.5, "burst_count": 1}, RateLimit(0.5, 1)),
        ({"per_second": 5}, RateLimit(5, 60)),
        ({"burst_count": 1_000_000}, RateLimit(1, 1_000_000)),
        ({}, RateLimit(1, 60)),
        (None, None),
        (False, None),
    ):
        assert _parsed({"local_rate_limit": block}).local_rate_limit == limit


@pytest.mark.parametrize("value", [True, 0, 5, "none", [1, 60]])
def test_rate_limits_are_a_block(value: Any) -> None:
    _assert_reported("local_rate_limit", value, "block", "per_second", "burst_count", "null")


@given(any_value)
def test_rates_are_checked(value: Any) -> None:
    # Comparisons with a float that is no number are false.
    if type(value) in (int, float) and 0 < value <= 1_000_000:
        limit = _parsed({"local_rate_limit": {"per_second": value}}).local_rate_limit
        assert limit is not None
        assert limit.per_second == value
    else:
        _assert_reported_below("local_rate_limit", "per_second", value, "above 0", "1000000")


@given(any_value)
def test_bursts_are_checked(value: Any) -> None:
    if type(value) is int and 1 <= value <= 1_000_000:
        limit = _parsed({"local_rate_limit": {"burst_count": value}}).local_rate_limit
        assert limit is not None
        assert limit.burst_count == value
    else:
        _assert_reported_below("local_rate_limit", "burst_count", value, "from 1 to 1000000")


# P3
def test_whom_to_ask_after_an_outage() -> None:
    for block, config in (
        ({}, PullConfig(3, 100, ())),
        ({"servers_per_room": 20}, PullConfig(20, 100, ())),
        ({"max_rooms": 2, "rooms": ["!a:b", "!c"]}, PullConfig(3, 2, ("!a:b", "!c"))),
        (None, None),
        (False, None),
    ):
        assert _parsed({"pull_after_outage": block}).pull_after_outage == config


@pytest.mark.parametrize("value", [True, 0, 3, "on", ["!a:b"]])
def test_whom_to_ask_is_a_block(value: Any) -> None:
    assert list(_mistake({"pull_after_outage": value}).path or ()) == ["pull_after_outage"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("servers_per_room", value) for value in (0, 21, -1, True, 1.5, "3", None)),
        *(("max_rooms", value) for value in (0, 10_001, False, None)),
        *(("rooms", value) for value in ("!a:b", None, ["a"], [5], [None], {"!a:b": 1})),
    ],
)
def test_mistakes_in_whom_to_ask(option: str, value: Any) -> None:
    mistake = _mistake({"pull_after_outage": {option: value}})
    assert list(mistake.path or ()) == ["pull_after_outage", option]
    assert repr(value) in mistake.msg


def test_more_rooms_than_are_asked_about() -> None:
    for block in (
        {"max_rooms": 1, "rooms": ["!a", "!b"]},
        {"rooms": [f"!{n}" for n in range(101)]},
    ):
        mistake = _mistake({"pull_after_outage": block})
        assert list(mistake.path or ()) == ["pull_after_outage", "rooms"]
        assert "max_rooms" in mistake.msg


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("new_rooms", ["enabled"]),
        ("local_rate_limit", ["per_second", "burst_count"]),
        ("pull_after_outage", ["servers_per_room", "max_rooms", "rooms"]),
    ],
)
@pytest.mark.parametrize("unknown", ["Enabled", "per_minute", 5, None])
def test_unknown_options_of_a_block(name: str, known: list[str], unknown: Any) -> None:
    mistake = _mistake({name: {unknown: 1}})
    assert list(mistake.path or ()) == [name, str(unknown)]
    assert repr(unknown) in mistake.msg
    assert all(option in mistake.msg for option in known)


def _assert_reported_below(name: str, key: str, value: Any, *allowed: str) -> None:
    mistake = _mistake({name: {key: value}})
    assert list(mistake.path or ()) == [name, key]
    assert repr(value) in mistake.msg
    for words in allowed:
        assert words in mistake.msg


def test_the_first_mistake_is_reported_whatever_else_is_right() -> None:
    mistake = _mistake({"poll_interval": "5s", "cleanup_interval": 60, "max_events_per_sync": 3})
    assert list(mistake.path or ()) == ["cleanup_interval"]


def test_the_configuration_cannot_change_later() -> None:
    with pytest.raises(AttributeError):
        _parsed(None).max_events_per_sync = 5  # type: ignore[misc]
