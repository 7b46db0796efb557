"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def create(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a new file, which is on the disk when this returns.

    Args:
        path: where; its folder exists.
        content: what.
        mode: who may read and write it, less what the process's umask takes away.

    Raises:
        FileExistsError: something is there already, and stays as it is.
        OSError: nothing can be written there.
    """
    draft = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(draft, path)  # unlike a rename, refuses to replace what is there
    finally:
        draft.unlink()
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
