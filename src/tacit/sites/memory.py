"""What a site remembers between rounds, and between restarts: which questions it has had, and what algorithms keep."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tacit import atomic
from tacit.errors import DataError, PeerError
from tacit.federated.algorithm import Memory

_TABLE = """
    CREATE TABLE IF NOT EXISTS attempts (attempt BLOB PRIMARY KEY, run BLOB NOT NULL, round INTEGER NOT NULL) STRICT
"""


@dataclass(frozen=True)
class SiteMemory:
    """Files in a site's folder.

    Args:
        folder: made if it is missing, for its owner alone.
    """

    folder: Path

    def __post_init__(self) -> None:
        atomic.make_private(self.folder)

    def take(self, attempt: bytes, run: bytes, round: int) -> None:
        """Write down that this question came, before anything is done for it.

        Raises:
            PeerError: it came before: whoever repeats it would have noise drawn twice for one answer.
            DataError: the file is damaged.
        """
        with self._database() as database:
            database.execute(_TABLE)
            try:
                database.execute("INSERT INTO attempts VALUES (?, ?, ?)", (attempt, run, round))
            except sqlite3.IntegrityError:
                raise PeerError("this question came before, and is answered once") from None

    def recall(self, run: bytes, counted: int) -> Memory:
        """What the algorithm kept after the round that was counted last; what it kept before that goes.

        Args:
            run: which run.
            counted: the round; 0 for none.

        Raises:
            DataError: the file is damaged.
        """
        kept = {int(path.stem): path for path in self._folder_of(run).glob("*.safetensors")}
        for round, path in kept.items():
            if round < counted:
                path.unlink(missing_ok=True)
        if counted not in kept:
            return {}
        try:
            return load_file(kept[counted])
        except (OSError, SafetensorError) as error:
            raise DataError(f"{kept[counted]} is damaged: {error}: this site cannot go on with the run") from error

    def keep(self, run: bytes, round: int, memory: Memory) -> None:
        """Keep what an algorithm wants to find again if this round counts."""
        if not memory:
            return
        folder = self._folder_of(run)
        atomic.make_private(folder)
        path, partial = folder / f"{round}.safetensors", folder / f"{round}{atomic.PARTIAL}"
        with atomic.disk_errors(path):
            save_file({name: tensor.detach().clone().contiguous() for name, tensor in memory.items()}, partial)
            partial.chmod(0o600)
            atomic.sync(partial)
            os.replace(partial, path)
            atomic.sync(folder)

    @property
    def ledger(self) -> Path:
        """The site's own privacy ledger."""
        return self.folder / "ledger.sqlite"

    @property
    def journal(self) -> Path:
        """The journal."""
        return self.folder / "journal.txt"

    def _folder_of(self, run: bytes) -> Path:
        return self.folder / "memories" / run.hex()[:16]

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        path = self.folder / "attempts.sqlite"
        try:
            with closing(sqlite3.connect(path)) as database, database:
                database.execute("PRAGMA synchronous = FULL")
                yield database
        except sqlite3.Error as error:
            raise DataError(f"{path} cannot be used: {error}") from error
