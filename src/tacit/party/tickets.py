"""Tickets: names for the correlated randomness of one run, and the provider's record of those that it has dealt.

A ticket stands for everything that one run of a model on one batch size takes. Its seeds and corrections exist from the
moment the provider draws them until the run is over; its *name* is never given twice.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from tacit import atomic
from tacit.database import Database
from tacit.errors import DataError, InputError

Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""What a model version is called: SHA-256 in hexadecimal."""
BatchSize = Annotated[int, Meta(ge=1, le=1 << 20)]
Serial = Annotated[int, Meta(ge=0, lt=1 << 62)]

_APPLICATION, _FORMAT = 0x7AC17D91, 1
_SCHEMA = (
    """
    CREATE TABLE dealt (
        model TEXT NOT NULL, batch INTEGER NOT NULL, next INTEGER NOT NULL, PRIMARY KEY (model, batch)
    ) STRICT, WITHOUT ROWID
    """,
)


class Ticket(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True, order=True):
    """The name of the correlated randomness of one run.

    Args:
        model: the digest of the model version.
        batch: the size of the batch that it is for.
        serial: counts the tickets of this model and batch size; one that was dealt later has a larger one.
    """

    model: Digest
    batch: BatchSize
    serial: Serial

    def __str__(self) -> str:
        return f"{self.serial} of {self.model[:12]}…, batch {self.batch}"


def check_ticket(model: str, batch: int, serial: int = 0) -> Ticket:
    """A ticket of these parts.

    Raises:
        InputError: they are not a digest, a batch size and a serial.
    """
    try:
        return msgspec.convert((model, batch, serial), Ticket)
    except msgspec.ValidationError as error:
        raise InputError(f"this names no ticket: {error}") from None


class DealtLedger:
    """The provider's record: which serials are taken, and nothing else of any ticket.

    Threads and processes may share it.

    Args:
        folder: made if it is missing.

    Raises:
        DataError: the record is damaged, or of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        atomic.make_private(folder)
        self._path = folder / "dealt.sqlite"
        self._guard = threading.Lock()
        self._file = Database(self._path, _APPLICATION, _FORMAT, _SCHEMA, self._unusable, shared=True)

    def next(self, model: str, batch: int, count: int = 1, above: int = -1) -> list[Ticket]:
        """Take the next serials; that they are taken is on the disk before this returns.

        A crash that follows costs their names and nothing else: they are not handed out again.

        Args:
            model: the digest of a model version.
            batch: a batch size.
            count: how many.
            above: the largest serial that a party says it has seen. It exceeds this record's only if the record was
                lost or put back to an earlier state; what follows is then above it.

        Raises:
            InputError: no such ticket can be.
            StorageFull: the disk is full; nothing was taken.
            DataError: the record is damaged.
        """
        if count < 1:
            raise InputError(f"{count} tickets were asked for: 1 or more")
        check_ticket(model, batch)
        with self._guard, self._file.transaction() as file:
            row = file.execute("SELECT next FROM dealt WHERE model = ? AND batch = ?", (model, batch)).fetchone()
            first = max(row[0] if row else 0, above + 1)
            tickets = [check_ticket(model, batch, serial) for serial in range(first, first + count)]
            file.execute(
                "INSERT INTO dealt VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET next = excluded.next",
                (model, batch, first + count),
            )
        return tickets

    def dealt(self) -> dict[tuple[str, int], int]:
        """How many serials are taken, by model and batch size."""
        with self._guard, self._file.transaction() as file:
            return {(model, batch): taken for model, batch, taken in file.execute("SELECT * FROM dealt").fetchall()}

    def close(self) -> None:
        """Close the record."""
        self._file.close()

    def _unusable(self, why: str) -> DataError:
        return DataError(
            f"the record of dealt tickets {self._path} cannot be used: {why}. Move it away to start a new one: parties "
            "say which serials they have seen, and those are not dealt again"
        )
