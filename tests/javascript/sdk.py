"""matrix-js-sdk's store of sticky events, in Node.

    python -m tests.javascript.sdk

records histories with what the SDK made of them, for test runs without Node.
"""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import Phase, given, settings

from tests.javascript.histories import NOW_TS, JsonDict, Value, histories, values_of

HERE = Path(__file__).parent
RECORDED = HERE / "recorded.jsonl"
"""A line for each history: its steps, and the values after each."""


class JavaScriptSdk:
    """The SDK's store, in a process of Node."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def play(self, steps: list[JsonDict]) -> list[set[Value]]:
        """Return the values after each step."""
        return values_of(self.answer(steps))

    def answer(self, steps: list[JsonDict]) -> Any:
        """Return what its process prints of them, which :func:`values_of` reads."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"start_ts": NOW_TS, "steps": steps}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "Node has ended; what it said is above"
        return json.loads(answer)


@contextlib.contextmanager
def open_sdk() -> Iterator[JavaScriptSdk]:
    """Start it; `nox -s javascript` installs it."""
    node = shutil.which("node")
    assert node is not None, "there is no Node; `nox -s javascript` installs it"
    assert (HERE / "node_modules").is_dir(), "`nox -s javascript` installs matrix-js-sdk"
    with subprocess.Popen(
        [node, "play.mjs"], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield JavaScriptSdk(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def _record(count: int = 50) -> None:
    lines: list[str] = []
    with open_sdk() as sdk:

        @settings(max_examples=count, phases=[Phase.generate], derandomize=True, deadline=None)
        @given(histories())
        def record(history: list[JsonDict]) -> None:
            lines.append(json.dumps([history, sdk.answer(history)], separators=(",", ":")))

        record()
    RECORDED.write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    _record()
