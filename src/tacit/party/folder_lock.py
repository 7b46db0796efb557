"""A folder that belongs to one process at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tacit.errors import DataError


def lock(folder: Path) -> int:
    """Have a folder to oneself until the descriptor that is returned is closed or this process ends, however it ends.

    Raises:
        DataError: another process has it.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise DataError(f"{folder} is in use by another process: one party has one folder") from None
    return descriptor
