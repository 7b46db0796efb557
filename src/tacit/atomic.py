"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tacit.errors import DataError, StorageFull

PARTIAL = ".partial"
"""What the name of a file that `write` is at work on ends with; a crash leaves it."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file that only its owner may read; it appears under its name when it is whole and on the disk.

    Args:
        path: of the file; its folder exists.
        pieces: its content; whatever comes of making them passes through, and leaves no file behind.

    Raises:
        StorageFull: the disk is full, or the file larger than it may be; nothing is left behind.
        DataError: the disk failed.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with disk_errors(path):
            file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            for piece in pieces:
                with disk_errors(path):
                    _write_all(file, memoryview(piece))
            with disk_errors(path):
                os.fsync(file)
        finally:
            os.close(file)
        with disk_errors(path):
            os.replace(partial, path)
            sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def make_private(folder: Path) -> None:
    """Make a folder, if it is missing, that only its owner may look into, and those above it.

    Raises:
        DataError: it cannot be made.
    """
    with disk_errors(folder):
        if not folder.is_dir():
            if not folder.parent.is_dir():
                make_private(folder.parent)
            folder.mkdir(mode=0o700, exist_ok=True)
            sync(folder.parent)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say what the system's errors on this file mean.

    Raises:
        StorageFull: it does not fit the disk, or what the process may use of it.
        DataError: anything else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(f"{path} does not fit the disk: nothing was written") from error
        raise DataError(f"{path} cannot be used: {error.strerror or type(error).__name__}") from error


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]
