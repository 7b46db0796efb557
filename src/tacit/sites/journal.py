"""What a site was asked and did: a text file for people, a line an event, only ever added to.

::

    2026-03-02 21:14:07  run 1f6c2a90  round 3   train     agreed   mlp by FedAvg on 199 examples, in a secure sum of 4
    2026-03-02 21:14:09  run 1f6c2a90  round 3   train     sent     a masked vector of 276 numbers
    2026-03-02 21:14:31  run 1f6c2a90  round 4   train     refused  not now: outside the hours 20 to 21

It never holds a value of the data, of the model or of an update.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Literal

from tacit import atomic

What = Literal["started", "stopped", "agreed", "refused", "sent", "lost", "note"]


class Journal:
    """A site's journal.

    Args:
        path: of the file; its folder exists.

    Raises:
        DataError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.note("note", "the journal is opened")

    @property
    def path(self) -> Path:
        """Of the file."""
        return self._path

    def note(self, what: What, text: str, run: bytes = b"", round: int | None = None, work: str = "") -> None:
        """Add a line, which is on the disk when this returns.

        Args:
            what: the kind of event.
            text: what happened, in words.
            run, round, work: what it belongs to.
        """
        place = f"run {run.hex()[:8]}  " if run else ""
        number = "" if round is None else f"round {round:<4d}"
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S}  {place}{number}  {work:<8}  {what:<8} {' '.join(text.split())}\n"
        with atomic.disk_errors(self._path):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, line.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
