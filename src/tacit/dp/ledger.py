"""The ledger: what has been spent of whose privacy, written down before it is spent, and never forgotten.

One file holds any number of subjects: the server's central mechanism is one, each site's records are another. A
spending is on disk (SQLite, write-ahead log, synced at every commit) before `Ledger.spend` returns, and noise is drawn
only afterwards. So a process that dies has at worst written down a release that it never made.

Each row carries a digest of itself and of the row before. A row that was changed, removed from the middle, or written
by a version that knows more events than this one makes every later use of the ledger fail.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection

import msgspec

from tacit.database import Database
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
        self._spent: dict[str, Counter[Event]] = {}
        self._seen: set[tuple[str, str]] = set()
        self._last, self._digest = 0, b""
        self._file = Database(path, _APPLICATION, _FORMAT, (_TABLE,), self._unusable)
        try:
            self._catch_up()
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
            raise self._exceeded(subject, label, limit)

    def afford(
        self, subject: str, event: Event, label: str, limit: Limit | None = None, *, repeatable: bool = False
    ) -> None:
        """Refuse what `spend` would refuse now, and write nothing down.

        Raises:
            BudgetExceeded: ``event`` would exceed the limit.
            DataError: the ledger is damaged.
        """
        self._catch_up()
        if limit is None or (repeatable and (subject, label) in self._seen):
            return
        if not self._fits(subject, [event], limit):
            raise self._exceeded(subject, label, limit)

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
        with self._file.transaction() as file:
            self._read(file)
            number, digest = self._last, self._digest
            for subject, added in events.items():
                if repeatable and (subject, label) in self._seen:
                    continue
                if limit is not None and not self._fits(subject, added, limit):
                    refused.append(subject)
                    continue
                for event in added:
                    number, text = number + 1, msgspec.json.encode(event).decode()
                    digest = _digest(digest, subject, label, text)
                    row = (number, subject, label, text, digest)
                    file.execute("INSERT INTO spending VALUES (?, ?, ?, ?, ?)", row)
        self._catch_up()
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
        self._catch_up()
        return privacy_spent(self.events(subject), delta, accountant)

    def rows(self, after: int = 0) -> list[tuple[str, str, str]]:
        """What was written down, in order: subject, label and the event as JSON.

        Args:
            after: leave out so many from the beginning.

        Raises:
            DataError: the ledger is damaged.
        """
        with self._file.transaction() as file:
            self._read(file)
            chosen = "SELECT subject, label, event FROM spending WHERE number > ? ORDER BY number"
            return [(subject, label, event) for subject, label, event in file.execute(chosen, (after,))]

    @property
    def subjects(self) -> tuple[str, ...]:
        """Everyone of whom something was written down when the ledger was last read."""
        return tuple(self._spent)

    def close(self) -> None:
        """Close the file; the ledger is of no use afterwards."""
        self._file.close()

    def _fits(self, subject: str, added: Sequence[Event], limit: Limit) -> bool:
        after = privacy_spent([*self.events(subject), *added], limit.budget.delta, limit.accountant)
        # A NaN does not.
        return after <= limit.budget.epsilon

    def _exceeded(self, subject: str, label: str, limit: Limit) -> BudgetExceeded:
        budget = limit.budget
        spent = privacy_spent(self.events(subject), budget.delta, limit.accountant)
        return BudgetExceeded(
            f"{label} would take {subject!r} over its privacy budget of ε = {budget.epsilon:g} at δ = "
            f"{budget.delta:g}, of which ε = {spent:.4g} is spent: stop here, or decide on a larger budget"
        )

    def _catch_up(self) -> None:
        with self._file.transaction() as file:
            self._read(file)

    def _read(self, file: Connection) -> None:
        """Take in the rows that were added since the last call."""
        rows = file.execute("SELECT * FROM spending WHERE number > ? ORDER BY number", (self._last,))
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

    def _unusable(self, why: str) -> DataError:
        return DataError(
            f"the privacy ledger {self._path} cannot be used: {why}. Nothing more may be released on its account; "
            "restore the file, or account for what it held in a new one"
        )


def _digest(previous: bytes, subject: str, label: str, event: str) -> bytes:
    return hashlib.sha256(msgspec.json.encode([previous.hex(), subject, label, event])).digest()
