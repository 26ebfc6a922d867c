# SPDX-License-Identifier: AGPL-3.0-or-later
"""Gets Synapse's tests, which are in its source distribution and not in what pip installs.

`pip download` would build Synapse to look at it, for which it needs Rust and all that Synapse's
own Rust code depends on.
"""

import hashlib
import json
import os
import shutil
import tarfile
import urllib.parse
import urllib.request
from io import BytesIO
from pathlib import Path
from typing import Any, Final

_INDEX: Final = "https://pypi.org/simple"
_JSON: Final = "application/vnd.pypi.simple.v1+json"


def get_tests(version: str, directory: Path) -> Path:
    """Return the directory that has Synapse's package `tests`, taken from the package index.

    Args:
        version: of Synapse.
        directory: to put it into, if it is not there yet.
    """
    target = directory / version
    if not target.exists():
        unfinished = directory / f"{version}.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        _extract_tests(_download(version), unfinished)
        unfinished.rename(target)
    return target


def _download(version: str) -> bytes:
    index = f"{os.environ.get('PIP_INDEX_URL', _INDEX).rstrip('/')}/matrix-synapse/"
    request = urllib.request.Request(index, headers={"Accept": _JSON})
    with urllib.request.urlopen(request) as response:
        files = json.load(response)["files"]
    found = source_of(files, version)
    with urllib.request.urlopen(urllib.parse.urljoin(index, found["url"])) as response:
        content: bytes = response.read()
    if hashlib.sha256(content).hexdigest() != found["hashes"]["sha256"]:
        raise RuntimeError(f"{found['filename']} is not what the package index says it is")
    return content


def source_of(files: list[Any], version: str) -> Any:
    """Return the source distribution among the files that the package index lists."""
    names = {f"{name}-{version}.tar.gz" for name in ("matrix_synapse", "matrix-synapse")}
    found = [file for file in files if file["filename"] in names]
    if not found:
        raise LookupError(f"the package index has no source distribution of Synapse {version}")
    return found[0]


def _extract_tests(archive: bytes, directory: Path) -> None:
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        # The first releases of Python 3.10 and 3.11 have none.
        files.extraction_filter = getattr(tarfile, "data_filter", None)
        for member in files:
            _, _, name = member.name.partition("/")
            if name.startswith("tests/"):
                member.name = name
                files.extract(member, directory)
