"""A run's folder: its settings, its history and its models.

::

    RUN/
    ├── config.toml           as it was given
    ├── history.sqlite        a row a round; the record that resuming trusts
    ├── history.csv           the same, for spreadsheets
    ├── snapshot.safetensors  where training is
    ├── best.safetensors      the model at its best evaluation
    └── model.safetensors     the model after the last round

and, where it is to be audited, what `tacit.runs.evidence` lists.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from safetensors.torch import save_file
from torch import Tensor

from tacit.errors import DataError, InputError
from tacit.federated.algorithm import ServerState
from tacit.federated.history import ClientAccuracies, RoundRecord
from tacit.federated.secure_sum.interface import Safeguards
from tacit.runs.evidence import Evidence
from tacit.runtimes.federation import Federation

LOCK_PATIENCE = 5.0
"""Seconds to wait for another process to let go of a run."""

_COLUMNS = {
    "round": "INTEGER PRIMARY KEY",
    "cohort": "TEXT NOT NULL",
    "examples": "INTEGER NOT NULL",
    "loss": "REAL",
    "accuracy": "REAL",
    "bytes_up": "INTEGER NOT NULL",
    "bytes_down": "INTEGER NOT NULL",
    "seconds": "REAL NOT NULL",
    "train_loss": "REAL",
    "lost": "TEXT NOT NULL",
    "simulated_seconds": "REAL",
    "epsilon": "REAL",
    "clients": "TEXT",
    "secure_sum": "TEXT",
    "note": "TEXT NOT NULL",
}


@dataclass(frozen=True)
class RunFolder:
    """One run on disk.

    Args:
        path: the folder.
    """

    path: Path

    @classmethod
    def create(cls, path: Path, config: str, origin: Path) -> RunFolder:
        """Make a new run.

        Args:
            path: a folder that is missing or empty.
            config: the text of its configuration.
            origin: the folder that paths in the configuration are relative to.

        Raises:
            InputError: something is there already.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} is there already: choose another folder, or `tacit resume {path}`")
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        columns = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
        with folder._database() as database:
            database.execute(f"CREATE TABLE rounds ({columns})")
            database.execute("CREATE TABLE origin (path TEXT NOT NULL)")
            database.execute("INSERT INTO origin VALUES (?)", (str(origin),))
        partial = folder.config.with_suffix(".partial")
        partial.write_text(config, encoding="utf-8")
        os.replace(partial, folder.config)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run.

        Raises:
            DataError: the folder is none.
        """
        folder = cls(path)
        if not folder.config.is_file() or not (path / "history.sqlite").is_file():
            raise DataError(f"{path} is not a run's folder: it has no config.toml and history.sqlite")
        return folder

    @property
    def config(self) -> Path:
        """The configuration, as it was given."""
        return self.path / "config.toml"

    @property
    def origin(self) -> Path:
        """The folder that paths in the configuration are relative to."""
        with self._database() as database:
            return Path(database.execute("SELECT path FROM origin").fetchone()[0])

    @property
    def snapshot(self) -> Path:
        """Where training is."""
        return self.path / "snapshot.safetensors"

    @property
    def identity(self) -> str:
        """What the run's snapshots belong to: a hash of its configuration."""
        return hashlib.sha256(self.config.read_bytes()).hexdigest()

    @property
    def evidence(self) -> Evidence:
        """What an audit rests on."""
        return Evidence(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training the same run; the lock goes with the process.

        Raises:
            InputError: another process holds it.
        """
        with (self.path / ".lock").open("w") as file:
            # Workers of a training that was killed hold the lock for the moment that they take to notice.
            deadline = time.monotonic() + LOCK_PATIENCE
            while not _locks(file):
                if time.monotonic() > deadline:
                    raise InputError(f"{self.path} is being trained by another process: wait for it or stop it")
                time.sleep(0.1)
            yield

    def append(self, record: RoundRecord) -> None:
        """Add a round to the history, in the database and in the CSV file."""
        row = _row(record)
        marks = ", ".join("?" * len(row))
        with self._database() as database:
            database.execute(f"INSERT INTO rounds VALUES ({marks})", tuple(row.values()))
        self._write_csv([row], append=True)

    def history(self) -> tuple[RoundRecord, ...]:
        """Every round, from the first.

        Raises:
            DataError: the database is damaged.
        """
        try:
            with self._database() as database:
                rows = database.execute(f"SELECT {', '.join(_COLUMNS)} FROM rounds ORDER BY round").fetchall()
            return tuple(_record(dict(zip(_COLUMNS, row, strict=True))) for row in rows)
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            raise DataError(f"{self.path / 'history.sqlite'} is damaged: {error}") from error

    def forget_after(self, round: int) -> None:
        """Drop the rounds after ``round`` from the history: they will be run again from the snapshot."""
        with self._database() as database:
            database.execute("DELETE FROM rounds WHERE round > ?", (round,))
        self._write_csv([_row(record) for record in self.history()], append=False)

    def save_model(self, federation: Federation, state: ServerState, name: str) -> None:
        """Write the global model as ``name.safetensors``, whose metadata says which of its tensors are trained."""
        tensors: Mapping[str, Tensor] = federation.model(state).state_dict()
        metadata = {"format": "pt", "trained": json.dumps([*state.layout.names, *state.buffers])}
        partial = self.path / f"{name}.partial"
        save_file({key: value.clone() for key, value in tensors.items()}, partial, metadata)
        os.replace(partial, self.path / f"{name}.safetensors")

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path / "history.sqlite")) as database, database:
            database.execute("PRAGMA synchronous = FULL")
            yield database

    def _write_csv(self, rows: list[dict[str, Any]], append: bool) -> None:
        path = self.path / "history.csv"
        new = not append or not path.exists()
        with path.open("a" if append else "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(_COLUMNS))
            if new:
                writer.writeheader()
            writer.writerows(rows)


def _locks(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _row(record: RoundRecord) -> dict[str, Any]:
    row = {field.name: getattr(record, field.name) for field in fields(record)}
    clients, summed = (_json(value) for value in (record.clients, record.secure_sum))
    lists = {"cohort": json.dumps(record.cohort), "lost": json.dumps(dict(record.lost))}
    return row | lists | {"clients": clients, "secure_sum": summed}


def _record(row: dict[str, Any]) -> RoundRecord:
    clients = None if row["clients"] is None else ClientAccuracies(**json.loads(row["clients"]))
    summed = None if row["secure_sum"] is None else Safeguards(**json.loads(row["secure_sum"]))
    lost = {int(client): reason for client, reason in json.loads(row["lost"]).items()}
    lists = {"cohort": tuple(json.loads(row["cohort"])), "lost": lost}
    return RoundRecord(**row | lists | {"clients": clients, "secure_sum": summed})


def _json(value: ClientAccuracies | Safeguards | None) -> str | None:
    return None if value is None else json.dumps(asdict(value))
