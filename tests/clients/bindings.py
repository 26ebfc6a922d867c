"""The Python bindings of matrix-rust-sdk, beside the tests and not in their environment.

    python -m tests.clients.bindings

installs them. Their wheels for Linux need glibc 2.38, for two functions that C compilers name
anew since then. Older systems have these under their old names: there the wheel's library is told
that it can do without that version, and the two are given to it.
"""

import contextlib
import os
import platform
import struct
import subprocess
import sys
from pathlib import Path

VERSION = "0.18.0"
INSTALLED = Path(__file__).parents[2] / "build" / "matrix-sdk-python"
SHIM = INSTALLED / "shim.so"

# The hash of "GLIBC_2.38" in a library's list of the versions that it needs, then its flags.
_NEEDED = struct.pack("<IH", 0x069691B8, 0)
_WEAKLY_NEEDED = struct.pack("<IH", 0x069691B8, 2)
_SHIM = r"""
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
long __isoc23_strtol(const char *text, char **end, int base) { return strtol(text, end, base); }
int __isoc23_sscanf(const char *text, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int count = vsscanf(text, format, arguments);
    va_end(arguments);
    return count;
}
"""


def environment() -> dict[str, str]:
    """Return the environment of a process that imports `matrix_sdk_python`."""
    assert INSTALLED.is_dir(), "`make test-clients` installs matrix-sdk-python"
    path = os.pathsep.join([str(INSTALLED), os.environ.get("PYTHONPATH", "")])
    preload = {"LD_PRELOAD": str(SHIM)} if SHIM.exists() else {}
    return {**os.environ, **preload, "PYTHONPATH": path}


def _is_old_linux() -> bool:
    library, version = platform.libc_ver()
    if library != "glibc" or platform.machine() != "x86_64":
        return False
    return tuple(int(part) for part in version.split(".")) < (2, 38)


def main() -> None:
    """Install the bindings, unless they are."""
    with contextlib.suppress(FileNotFoundError):
        if (INSTALLED / "version").read_text() == VERSION:
            return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps"]
    command += ["--only-binary=:all:", f"--target={INSTALLED}"]
    if _is_old_linux():
        command.append("--platform=manylinux_2_38_x86_64")
    subprocess.run([*command, f"matrix-sdk-python=={VERSION}"], check=True)
    if _is_old_linux():
        (library,) = INSTALLED.glob("matrix_sdk_python/_generated/*.so")
        content = library.read_bytes()
        assert content.count(_NEEDED) == 1, "the library does not need glibc 2.38 as expected"
        library.write_bytes(content.replace(_NEEDED, _WEAKLY_NEEDED))
        compile_shim = ["cc", "-shared", "-fPIC", "-o", str(SHIM), "-x", "c", "-"]
        subprocess.run(compile_shim, input=_SHIM.encode(), check=True)
    (INSTALLED / "version").write_text(VERSION)


if __name__ == "__main__":
    main()
