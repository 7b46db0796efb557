"""SQLite files for what must not be forgotten: synced at every commit, and checked when they are opened.

A process can be killed between any two instructions, and a machine can lose power. In both cases, what a transaction
wrote is on the disk once it has ended, and if it has not, what was there before is there still.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tacit.errors import DataError, StorageFull

_WAIT_SECONDS = 30.0


class Database:
    """A SQLite file with a stamp: a write-ahead log, synced at every commit, and checked when it is opened.

    Several processes may use one file; a forked process opens it anew.

    Args:
        path: of the file, which is made if it is missing.
        application: what marks the file as one of this kind; 32 bits.
        version: of its format; others are refused.
        schema: the statements that make its tables.
        unusable: the error to raise, given a reason.
        shared: whether several threads use it, one at a time.

    Raises:
        DataError: what ``unusable`` makes of it: the file is something else, damaged, or of another version.
    """

    def __init__(
        self,
        path: str | Path,
        application: int,
        version: int,
        schema: Sequence[str],
        unusable: Callable[[str], DataError],
        *,
        shared: bool = False,
    ) -> None:
        self._path, self._unusable, self._process = str(path), unusable, os.getpid()
        with self._reported():
            self._file = sqlite3.connect(
                self._path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=not shared
            )
        try:
            with self._reported():
                self._file.execute("PRAGMA journal_mode = WAL")
                self._file.execute("PRAGMA synchronous = FULL")
                self._file.execute("PRAGMA secure_delete = ON")
            with self.transaction():
                self._check_format(application, version, schema)
        except BaseException:
            self._file.close()
            raise

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """What is read and written inside is one step for every other process, and on the disk when it ends.

        Raises:
            StorageFull: it does not fit the disk; nothing of it has happened.
            DataError: the file is damaged or busy, or the process was forked since.
        """
        if os.getpid() != self._process:
            raise self._unusable("it was opened before this process was forked: open it anew")
        with self._reported():
            self._file.execute("BEGIN IMMEDIATE")
            try:
                yield self._file
                self._file.execute("COMMIT")
            finally:
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")

    def close(self) -> None:
        """Close the file; nothing else can be done with it afterwards."""
        self._file.close()

    def _check_format(self, application: int, version: int, schema: Sequence[str]) -> None:
        """Make the tables in an empty file; refuse a file that is not a whole one of this version."""
        stamps = {"application_id": application, "user_version": version}
        [found_application], [found_version] = (self._file.execute(f"PRAGMA {name}").fetchone() for name in stamps)
        [tables] = self._file.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if (found_application, found_version, tables) == (0, 0, 0):
            for statement in schema:
                self._file.execute(statement)
            for name, value in stamps.items():
                self._file.execute(f"PRAGMA {name} = {value}")
        elif found_application != application:
            raise self._unusable("it is a database of something else")
        elif found_version != version:
            raise self._unusable(f"it has format {found_version} and this version of tacit reads {version}")
        if self._file.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise self._unusable("its pages are damaged")

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
                raise StorageFull(f"the disk that holds {self._path} is full: nothing was written") from error
            raise self._unusable(str(error)) from error
