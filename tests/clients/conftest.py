"""Fixtures: devices, and a second server."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.client import Client
from tests.clients.device import Device, OpenDevice


@pytest.fixture
def open_device(tmp_path: Path) -> Iterator[OpenDevice]:
    """Start a device of a user; the other arguments are those of `Device`."""
    opened: list[Device] = []
    numbers = itertools.count(1)

    def open_device(user: Client, **arguments: Any) -> Device:
        device = Device(user, tmp_path / f"device{next(numbers)}.log", **arguments)
        opened.append(device)
        return device

    yield open_device
    for device in opened:
        device.close()


@pytest.fixture(params=[False, True], ids=["sync", "sliding-sync"])
def sliding(request: pytest.FixtureRequest) -> bool:
    """Whether clients use Sliding Sync."""
    chosen: bool = request.param
    return chosen
