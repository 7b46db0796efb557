"""The ledger: what has been spent of whose privacy, written down before it is spent, and never forgotten.

One file holds any number of subjects: the server's central mechanism is one, each site's records are another. A
spending is on disk (SQLite, write-ahead log, synced at every commit) before `Ledger.spend` returns, and noise is drawn
only afterwards. So a process that dies has at worst written down a release that it never made.

Each row carries a digest of itself and of the row before. A row that was changed, removed from the middle, or written
by a version that knows more events than this one makes every later use of the ledger fail.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tacit.dp.accounting import Accountant, Budget, Event, privacy_spent
from tacit.errors import BudgetExceeded, DataError, InputError

_FORMAT = 1
_APPLICATION = 0x7AC17D90
_TABLE = """
    CREATE TABLE spending (
        number INTEGER PRIMARY KEY, subject TEXT NOT NULL, label TEXT NOT NULL, event TEXT NOT NULL,
        digest BLOB NOT NULL
    ) STRICT
"""
_STAMPS = {"application_id": _APPLICATION, "user_version": _FORMAT}
_WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class Limit:
    """A budget, and how what was spent of it is computed."""

    budget: Budget
    accountant: Accountant = "rdp"


class Ledger:
    """An append-only list of events, by subject.

    Several processes may use one file; what one adds, the others see before they spend. A forked process opens it anew.

    Args:
        path: of the file, which is made if it is missing; ``":memory:"`` for one that ends with the process.

    Raises:
        DataError: the file is something else, damaged, or of another version.
    """

    def __init__(self, path: str | Path = ":memory:") -> None:
        self._path = str(path)
        self._process = os.getpid()
        self._spent: dict[str, Counter[Event]] = {}
        self._seen: set[tuple[str, str]] = set()
        self._last, self._digest = 0, b""
        with self._reported():
            self._file = sqlite3.connect(self._path, timeout=_WAIT_SECONDS, isolation_level=None)
        try:
            with self._reported():
                self._file.execute("PRAGMA journal_mode = WAL")
                self._file.execute("PRAGMA synchronous = FULL")
            with self._transaction():
                self._check_format()
                self._read()
        except BaseException:
            self._file.close()
            raise

    def spend(
        self, subject: str, event: Event, label: str, limit: Limit | None = None, *, repeatable: bool = False
    ) -> None:
        """Write down that ``event`` is about to happen to ``subject``; see `spend_each`.

        Raises:
            BudgetExceeded: it would exceed the limit; nothing was written.
            DataError: the ledger is damaged.
        """
        if self.spend_each({subject: [event]}, label, limit, repeatable=repeatable) and limit is not None:
            budget = limit.budget
            spent = privacy_spent(self.events(subject), budget.delta, limit.accountant)
            raise BudgetExceeded(
                f"{label} would take {subject!r} over its privacy budget of ε = {budget.epsilon:g} at δ = "
                f"{budget.delta:g}, of which ε = {spent:.4g} is spent: stop here, or decide on a larger budget"
            )

    def spend_each(
        self, events: Mapping[str, Sequence[Event]], label: str, limit: Limit | None = None, *, repeatable: bool = False
    ) -> tuple[str, ...]:
        """Write down what is about to happen to each of several subjects, except those whose budget it would exceed.

        Args:
            events: all of it, by subject.
            label: what it happens for, such as ``"run 7, round 12"``; public.
            limit: of each subject alone; ``None`` writes down without limit.
            repeatable: the noise comes from a seed, so doing the same again shows nothing new: a subject of which
                something stands under the label already is not written down a second time.

        Returns:
            The subjects whose budget would be exceeded: nothing may be released of them.

        Raises:
            DataError: the ledger is damaged.
        """
        refused = []
        with self._transaction():
            self._read()
            number, digest = self._last, self._digest
            for subject, added in events.items():
                if repeatable and (subject, label) in self._seen:
                    continue
                if limit is not None:
                    after = privacy_spent([*self.events(subject), *added], limit.budget.delta, limit.accountant)
                    # Written so that a NaN is refused.
                    if not after <= limit.budget.epsilon:
                        refused.append(subject)
                        continue
                for event in added:
                    number, text = number + 1, msgspec.json.encode(event).decode()
                    digest = _digest(digest, subject, label, text)
                    row = (number, subject, label, text, digest)
                    self._file.execute("INSERT INTO spending VALUES (?, ?, ?, ?, ?)", row)
        with self._transaction():
            self._read()
        return tuple(refused)

    def events(self, subject: str) -> tuple[Event, ...]:
        """What was written down of a subject when the ledger was last read, equal events together; empty if unknown."""
        counts = self._spent.get(subject, Counter())
        return tuple(msgspec.structs.replace(event, times=event.times * n) for event, n in counts.items())

    def epsilon(self, subject: str, delta: float, accountant: Accountant = "rdp") -> float:
        """The ε at ``delta`` that a subject has spent.

        Raises:
            DataError: the ledger is damaged.
            InputError: δ is out of range.
        """
        with self._transaction():
            self._read()
        return privacy_spent(self.events(subject), delta, accountant)

    @property
    def subjects(self) -> tuple[str, ...]:
        """Everyone of whom something was written down when the ledger was last read."""
        return tuple(self._spent)

    def close(self) -> None:
        """Close the file; the ledger is of no use afterwards."""
        self._file.close()

    def _check_format(self) -> None:
        """Make the table in an empty file; refuse a file that is not a whole ledger of this version."""
        [application], [version] = (self._file.execute(f"PRAGMA {name}").fetchone() for name in _STAMPS)
        [tables] = self._file.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if (application, version, tables) == (0, 0, 0):
            self._file.execute(_TABLE)
            for name, value in _STAMPS.items():
                self._file.execute(f"PRAGMA {name} = {value}")
        elif application != _APPLICATION:
            raise self._unusable("it is a database of something else")
        elif version != _FORMAT:
            raise self._unusable(f"it has format {version} and this version of tacit reads {_FORMAT}")
        if self._file.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise self._unusable("its pages are damaged")

    def _read(self) -> None:
        """Take in the rows that were added since the last call."""
        rows = self._file.execute("SELECT * FROM spending WHERE number > ? ORDER BY number", (self._last,))
        for number, subject, label, text, digest in rows.fetchall():
            if number != self._last + 1 or digest != _digest(self._digest, subject, label, text):
                raise self._unusable(f"row {number} is not what was written, or a row before it is missing")
            try:
                event = msgspec.json.decode(text, type=Event)
            except (msgspec.MsgspecError, InputError) as error:
                raise self._unusable(f"row {number} is no event that this version knows: {error}") from error
            self._spent.setdefault(subject, Counter())[event] += 1
            self._seen.add((subject, label))
            self._last, self._digest = number, digest

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """What is read and written inside is one step for every other process, and on disk when it ends."""
        if os.getpid() != self._process:
            raise self._unusable("it was opened before this process was forked: open it anew")
        with self._reported():
            self._file.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._file.execute("COMMIT")
            finally:
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._unusable(str(error)) from error

    def _unusable(self, why: str) -> DataError:
        return DataError(
            f"the privacy ledger {self._path} cannot be used: {why}. Nothing more may be released on its account; "
            "restore the file, or account for what it held in a new one"
        )


def _digest(previous: bytes, subject: str, label: str, event: str) -> bytes:
    return hashlib.sha256(msgspec.json.encode([previous.hex(), subject, label, event])).digest()
