"""Fetching a published file, once, with its checksum."""

from __future__ import annotations

import http.client
import os
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from tacit.data.published import PublishedFile
from tacit.errors import DataError

Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes fetched so far and its size in bytes."""

TIMEOUT = 30.0
"""Seconds without a byte after which a mirror is given up."""

CHUNK = 1 << 16


def fetch(file: PublishedFile, folder: Path, mirrors: Sequence[str], progress: Progress | None = None) -> Path:
    """Fetch ``file`` into ``folder`` from the first of ``mirrors`` that has it.

    The content goes to a temporary file of the same folder, is checked, and only then takes its name, so an
    interrupted or wrong download leaves nothing behind.

    Args:
        file: what to fetch.
        folder: created if missing.
        mirrors: URLs of the folders that hold the file, each ending in ``/``.
        progress: called after every piece.

    Returns:
        The path of the file.

    Raises:
        DataError: no mirror delivers the file with its checksum, or ``folder`` cannot be written.
    """
    failures = []
    for mirror in mirrors:
        try:
            content = _read(mirror + file.name, file, progress)
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{mirror}: {error}")
            continue
        fault = file.fault(content)
        if fault is None:
            return _write(folder / file.name, content)
        failures.append(f"what {mirror} sent {fault}")
    raise DataError(
        f"{file.name} could not be downloaded ({'; '.join(failures)}): "
        "check the network connection, or put the file into a data folder"
    )


def _read(url: str, file: PublishedFile, progress: Progress | None) -> bytes:
    """The response's body, cut off one byte beyond the published size."""
    content = bytearray()
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        while len(content) <= file.size and (piece := response.read(min(CHUNK, file.size + 1 - len(content)))):
            content += piece
            if progress is not None:
                progress(file.name, len(content), file.size)
    return bytes(content)


def _write(path: Path, content: bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as temporary:
            try:
                temporary.write(content)
                temporary.flush()
                os.replace(temporary.name, path)
            except BaseException:
                os.unlink(temporary.name)
                raise
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error}): make room, or choose another data folder") from error
    return path
