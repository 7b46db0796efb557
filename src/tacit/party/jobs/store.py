"""A party's jobs on its own disk: their descriptions and states, rows, checkpoints and losses, and who may have what.

The record (SQLite) says what is there; shares lie beside it, a sealed frame a file (`tacit.party.sealed_frames`). A
file is written before its row and removed after it, so a row always has its file, and what a crash leaves besides is
swept away when the store is opened. Shares of losses are sealed in the record itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import msgspec
import torch
from torch import Tensor

from tacit import atomic
from tacit.database import Database
from tacit.errors import DataError, InputError, StorageFull
from tacit.party import folder_lock, sealed_frames
from tacit.party.cluster_file import PROVIDER
from tacit.party.jobs import files
from tacit.party.jobs.description import Job, JobPart
from tacit.party.jobs.states import Checkpoint, Entry, Held, State, initial, require_transition
from tacit.party.sealing import SALT_BYTES, Seal, Unseal, check_key, fresh_salt, subkey
from tacit.wire import payload_of

_APPLICATION, _FORMAT = 0x7AC17D93, 1
_SCHEMA = (
    """
    CREATE TABLE job (
        digest TEXT PRIMARY KEY, number INTEGER NOT NULL UNIQUE, description BLOB NOT NULL, state TEXT NOT NULL,
        reason TEXT NOT NULL, step INTEGER NOT NULL, run BLOB NOT NULL, seconds REAL NOT NULL
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE checkpoint (
        job TEXT NOT NULL, step INTEGER NOT NULL, run BLOB NOT NULL,
        bytes INTEGER NOT NULL, seconds REAL NOT NULL, PRIMARY KEY (job, step, run)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE piece (
        job TEXT NOT NULL, contributor TEXT NOT NULL, first INTEGER NOT NULL,
        upload BLOB NOT NULL, count INTEGER NOT NULL, bytes INTEGER NOT NULL, PRIMARY KEY (job, contributor, first)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE loss (
        job TEXT NOT NULL, step INTEGER NOT NULL, run BLOB NOT NULL,
        sealed BLOB NOT NULL, PRIMARY KEY (job, step)
    ) STRICT, WITHOUT ROWID
    """,
)


class JobStore:
    """The jobs of one party, or of the provider, which keeps descriptions only. Threads may share it.

    Args:
        folder: made if it is missing; private to the party, and in use by one process at a time.
        key: the party's storage key, 32 bytes.
        role: ``"alice"``, ``"bob"`` or ``"provider"``.
        limit_bytes: what rows and checkpoints may take of the disk.

    Raises:
        DataError: another process uses the folder, or the record is damaged.
    """

    def __init__(self, folder: str | Path, key: bytes, role: str, limit_bytes: int) -> None:
        check_key(key)
        self.folder, self.key, self.role, self.limit_bytes = Path(folder), key, role, limit_bytes
        self.files_folder = self.folder / "files"
        atomic.make_private(self.files_folder)
        self._guard = threading.RLock()
        self._lock = folder_lock.lock(self.folder)
        try:
            path = self.folder / "jobs.sqlite"
            self._record = Database(path, _APPLICATION, _FORMAT, _SCHEMA, self._unusable, shared=True)
            self._sweep()
        except BaseException:
            os.close(self._lock)
            raise

    def submit(self, part: JobPart) -> None:
        """Keep a job; when this returns it is on the disk. Submitting the same again changes nothing.

        Args:
            part: this party's, checked.

        Raises:
            InputError: it is another party's.
            StorageFull: it does not fit; nothing is left behind.
            DataError: the disk failed, or the record is damaged.
        """
        if part.role != self.role:
            raise InputError(f"these are {self.role}'s jobs: they do not take what was meant for {part.role}")
        job, first = part.job, initial(part.job.digest)
        with self._guard:
            if self._known(job.digest):
                return
            nbytes = 0
            if self.role != PROVIDER:
                self._require_room(sum(words.nbytes for words in part.state.values()))
                path, context = self.checkpoint_file(job.digest, first)
                nbytes = sealed_frames.write(path, self.key, context, tuple(part.state.values()))
            with self._record.transaction() as record:
                [number] = record.execute("SELECT coalesce(max(number), 0) + 1 FROM job").fetchone()
                row = (job.digest, number, job.description, State.SUBMITTED.value, "", first.step, first.run, 0.0)
                record.execute("INSERT INTO job VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
                if self.role != PROVIDER:
                    record.execute(
                        "INSERT INTO checkpoint VALUES (?, ?, ?, ?, 0.0)", (job.digest, first.step, first.run, nbytes)
                    )

    def job(self, digest: str) -> Job:
        """A job's description.

        Raises:
            InputError: there is no such job here.
        """
        with self._guard, self._record.transaction() as record:
            row = record.execute("SELECT description FROM job WHERE digest = ?", (digest,)).fetchone()
        if row is None:
            raise _unknown(digest)
        return _described(bytes(row[0]))

    def entries(self) -> list[Entry]:
        """All jobs, in the order in which they came."""
        with self._guard, self._record.transaction() as record:
            rows = record.execute(
                "SELECT digest, number, description, state, reason, step, run, seconds FROM job ORDER BY number"
            ).fetchall()
            return [self._entry(record, *row) for row in rows]

    def entry(self, digest: str) -> Entry:
        """What is known of a job.

        Raises:
            InputError: there is no such job here.
        """
        for entry in self.entries():
            if entry.digest == digest:
                return entry
        raise _unknown(digest)

    def add_rows(self, digest: str, contributor: str, upload: bytes, first: int, tensors: Sequence[Tensor]) -> int:
        """Keep shares of some of a contributor's rows; when this returns they are on the disk.

        Args:
            digest: the job.
            contributor: the public key of who sent them, as text.
            upload: 16 bytes drawn for all the pieces of one sharing; other ones begin again from the first row.
            first: the number of the first row among the contributor's.
            tensors: of the inputs and of the labels.

        Returns:
            How many of the contributor's rows are here.

        Raises:
            InputError: the job takes no such rows, or none any more.
            StorageFull: they do not fit; nothing is left behind.
        """
        with self._guard:
            entry, job = self.entry(digest), self.job(digest)
            promised = next((one.rows for one in job.terms.data if one.key == contributor), 0)
            if not promised:
                raise InputError(f"the job {job.name} takes no rows of yours: its owner did not name you")
            if entry.state is not State.SUBMITTED or entry.agreed.step:
                raise InputError(f"the job {job.name} is {entry.state.value}: it takes no more rows")
            there = self._pieces(digest, contributor)
            if any(one.upload != upload for one in there):
                self._drop_pieces(digest, contributor)
                there = []
            have = sum(one.count for one in there)
            if first != have:
                raise InputError(f"rows from {first} on came for the job {job.name}, where {have} is next")
            count = _count(job, tensors)
            if have + count > promised:
                raise InputError(f"{have + count} rows came for the job {job.name}, which takes {promised} of yours")
            self._require_room(sum(words.nbytes for words in tensors))
            piece = files.Piece(contributor, upload, first, count)
            path, context = files.piece_file(self.files_folder, digest, piece)
            nbytes = sealed_frames.write(path, self.key, context, tensors)
            with self._record.transaction() as record:
                record.execute(
                    "INSERT INTO piece VALUES (?, ?, ?, ?, ?, ?)", (digest, contributor, first, upload, count, nbytes)
                )
        return have + count

    def pieces(self, digest: str) -> list[files.Piece]:
        """The pieces of a job's rows, in the order in which rows are numbered."""
        with self._guard:
            return [one for key in self.entry(digest).contributors for one in self._pieces(digest, key)]

    def settle(self, digest: str, state: State, reason: str = "", *, told: bool = False) -> None:
        """Record a state. Rows are of no use once a job is done, and are removed.

        Args:
            digest: the job.
            state: the new one; the same again changes nothing.
            reason: why it failed.
            told: whether alice says so, who decides: what was in between may have been missed.

        Raises:
            InputError: there is no such job, or the state cannot follow on its present one.
        """
        with self._guard:
            entry = self.entry(digest)
            if (entry.state, entry.reason) != (state, reason):
                if not told or entry.state is State.DONE:
                    require_transition(entry.name, entry.state, state)
                with self._record.transaction() as record:
                    record.execute(
                        "UPDATE job SET state = ?, reason = ? WHERE digest = ?", (state.value, reason, digest)
                    )
            if state is State.DONE:
                for contributor in entry.contributors:
                    self._drop_pieces(digest, contributor)

    def begin(self, digest: str, base: Checkpoint) -> None:
        """A run begins from a checkpoint: forget the checkpoints and the losses of runs that came to nothing.

        Raises:
            InputError: there is no such job, or its checkpoint is not here.
        """
        with self._guard:
            if base not in self.entry(digest).held.checkpoints:
                raise InputError(f"the checkpoint {base} of job {digest[:12]}… is not here")
            with self._record.transaction() as record:
                record.execute("DELETE FROM loss WHERE job = ? AND step > ?", (digest, base.step))
            self.agree(digest, base)

    def saved(self, digest: str, checkpoint: Checkpoint, seconds: float, losses: Sequence[tuple[int, Tensor]]) -> None:
        """A worker has written a checkpoint: record it, and the losses of the steps that led to it.

        Args:
            digest: the job.
            checkpoint: which.
            seconds: that all the job's steps up to there took.
            losses: shares of the loss of the steps since the last one, by step.

        Raises:
            InputError: there is no such job here.
            StorageFull: the disk is full.
            DataError: the file is not there.
        """
        path, _ = self.checkpoint_file(digest, checkpoint)
        with self._guard:
            if not self._known(digest):
                raise _unknown(digest)
            with atomic.disk_errors(path):
                nbytes = path.stat().st_size
            with self._record.transaction() as record:
                row = (digest, checkpoint.step, checkpoint.run, nbytes, seconds)
                record.execute("INSERT OR REPLACE INTO checkpoint VALUES (?, ?, ?, ?, ?)", row)
                sealed = [
                    (digest, step, checkpoint.run, self._seal_loss(digest, step, checkpoint.run, words))
                    for step, words in losses
                ]
                record.executemany("INSERT OR REPLACE INTO loss VALUES (?, ?, ?, ?)", sealed)

    def agree(self, digest: str, checkpoint: Checkpoint) -> None:
        """Both parties have a checkpoint, and will go on from it: forget the others."""
        with self._guard:
            with self._record.transaction() as record:
                record.execute(
                    "UPDATE job SET step = ?, run = ?, seconds = coalesce((SELECT seconds FROM checkpoint "
                    "WHERE job = digest AND checkpoint.step = ? AND checkpoint.run = ?), 0) WHERE digest = ?",
                    (checkpoint.step, checkpoint.run, checkpoint.step, checkpoint.run, digest),
                )
                record.execute(
                    "DELETE FROM checkpoint WHERE job = ? AND NOT (step = ? AND run = ?)",
                    (digest, checkpoint.step, checkpoint.run),
                )
            kept, _ = self.checkpoint_file(digest, checkpoint)
            for path in self.files_folder.glob(f"{digest}-*{files.STATE}"):
                if path != kept:
                    path.unlink(missing_ok=True)

    def model_share(self, digest: str, checkpoint: Checkpoint) -> list[Tensor]:
        """This party's shares of the model at a checkpoint, in the order of `Job.model`.

        Raises:
            InputError: there is no such job, or its checkpoint is not here.
            DataError: its file is damaged.
        """
        job = self.job(digest)
        if checkpoint not in self.entry(digest).held.checkpoints:
            raise InputError(f"the checkpoint {checkpoint} of the job {job.name} is not here any more: ask again")
        path, context = self.checkpoint_file(digest, checkpoint)
        _, words = sealed_frames.read(path, self.key, context)
        state = dict(zip(job.program.state, words, strict=True))
        return [state[name] for name in job.model]

    def losses(self, digest: str, after: int) -> list[tuple[int, bytes, Tensor]]:
        """Shares of the loss of the steps after one of them, up to the newest checkpoint: step, run, share.

        Raises:
            DataError: one is damaged.
        """
        query = "SELECT step, run, sealed FROM loss WHERE job = ? AND step > ? ORDER BY step"
        with self._guard, self._record.transaction() as record:
            rows = record.execute(query, (digest, after)).fetchall()
        return [(step, run, self._open_loss(digest, step, run, sealed)) for step, run, sealed in rows]

    def delete(self, digest: str) -> None:
        """Forget a job and all that belongs to it, also what a worker has written since."""
        with self._guard:
            with self._record.transaction() as record:
                for table in ("piece", "checkpoint", "loss"):
                    record.execute(f"DELETE FROM {table} WHERE job = ?", (digest,))
                record.execute("DELETE FROM job WHERE digest = ?", (digest,))
            for path in self.files_folder.glob(f"{digest}-*"):
                path.unlink(missing_ok=True)

    def checkpoint_file(self, digest: str, checkpoint: Checkpoint) -> tuple[Path, bytes]:
        """Where a checkpoint lies, and what it is sealed as."""
        return files.checkpoint_file(self.files_folder, digest, checkpoint)

    def rows_files(self, digest: str) -> list[tuple[Path, bytes]]:
        """Where the pieces of a job's rows lie, and what they are sealed as, in order."""
        return [files.piece_file(self.files_folder, digest, one) for one in self.pieces(digest)]

    @property
    def nbytes(self) -> int:
        """What rows and checkpoints take."""
        with self._guard, self._record.transaction() as record:
            query = (
                "SELECT (SELECT coalesce(sum(bytes), 0) FROM piece) + (SELECT coalesce(sum(bytes), 0) FROM checkpoint)"
            )
            return int(record.execute(query).fetchone()[0])

    def close(self) -> None:
        """Let another process have the folder."""
        self._record.close()
        os.close(self._lock)

    def __repr__(self) -> str:
        return f"JobStore({self.folder}, {self.role}'s)"

    def _known(self, digest: str) -> bool:
        with self._record.transaction() as record:
            return record.execute("SELECT 1 FROM job WHERE digest = ?", (digest,)).fetchone() is not None

    def _entry(self, record: Connection, digest: str, number: int, description: bytes, *rest: Any) -> Entry:
        job = _described(bytes(description))
        state, reason, step, run, seconds = rest
        promised = {one.key: one.rows for one in job.terms.data}
        query = "SELECT contributor, min(upload), sum(count) FROM piece WHERE job = ? GROUP BY contributor"
        rows = record.execute(query, (digest,)).fetchall()
        uploads = {key: bytes(upload) for key, upload, count in rows if count == promised[key]}
        query = "SELECT step, run FROM checkpoint WHERE job = ? ORDER BY step"
        checkpoints = [Checkpoint(*one) for one in record.execute(query, (digest,)).fetchall()]
        return Entry(
            job,
            number,
            State(state),
            reason,
            Checkpoint(step, bytes(run)),
            seconds,
            Held(digest, uploads, checkpoints),
        )

    def _pieces(self, digest: str, contributor: str) -> list[files.Piece]:
        query = "SELECT contributor, upload, first, count FROM piece WHERE job = ? AND contributor = ? ORDER BY first"
        with self._record.transaction() as record:
            return [files.Piece(*row) for row in record.execute(query, (digest, contributor)).fetchall()]

    def _drop_pieces(self, digest: str, contributor: str) -> None:
        gone = [files.piece_file(self.files_folder, digest, one)[0] for one in self._pieces(digest, contributor)]
        with self._record.transaction() as record:
            record.execute("DELETE FROM piece WHERE job = ? AND contributor = ?", (digest, contributor))
        for path in gone:
            path.unlink(missing_ok=True)

    def _require_room(self, nbytes: int) -> None:
        taken = self.nbytes
        if taken + nbytes > self.limit_bytes:
            raise StorageFull(
                f"{nbytes:,} more bytes of training jobs do not fit: {taken:,} of {self.limit_bytes:,} are taken. "
                "Delete jobs that are done, or have the party allow more"
            )

    def _seal_loss(self, digest: str, step: int, run: bytes, words: Tensor) -> bytes:
        salt = fresh_salt()
        content = b"".join(payload_of([words.reshape(1)]))
        return salt + Seal(subkey(self.key, salt, "loss"), _loss_context(digest, step, run)).close(content)

    def _open_loss(self, digest: str, step: int, run: bytes, sealed: bytes) -> Tensor:
        unseal = Unseal(subkey(self.key, sealed[:SALT_BYTES], "loss"), _loss_context(digest, step, run))
        try:
            content = unseal.open(sealed[SALT_BYTES:])
        except DataError as error:
            raise self._unusable(f"the loss of step {step} of a job: {error}") from error
        return torch.frombuffer(bytearray(content), dtype=torch.int64)

    def _sweep(self) -> None:
        """Remove the files that no row speaks of: what a crash left."""
        there = {path.name for path in self.files_folder.iterdir()}
        for entry in self.entries():
            for checkpoint in entry.held.checkpoints:
                there.discard(self.checkpoint_file(entry.digest, checkpoint)[0].name)
            for path, _ in self.rows_files(entry.digest):
                there.discard(path.name)
        for name in there:
            (self.files_folder / name).unlink()

    def _unusable(self, why: str) -> DataError:
        return DataError(
            f"the record of jobs in {self.folder} cannot be used: {why}. If it cannot be put right, remove the folder: "
            "its jobs are lost then, and their owners have to submit them again"
        )


@lru_cache(maxsize=256)
def _described(description: bytes) -> Job:
    """The job; what is worked out of a description is worked out once."""
    return Job(description)


def _count(job: Job, tensors: Sequence[Tensor]) -> int:
    """How many rows these are, if they are shares of rows."""
    shapes = [tuple(words.shape) for words in tensors]
    count = shapes[0][0] if shapes and shapes[0] else 0
    if shapes != [(count, *shape) for shape in job.row_shapes] or any(words.dtype != torch.int64 for words in tensors):
        raise InputError(f"the shares are not those of rows of {job.row_shapes} for the job {job.name}")
    if not count:
        raise InputError(f"no rows came for the job {job.name}")
    return count


def _loss_context(digest: str, step: int, run: bytes) -> bytes:
    return msgspec.msgpack.encode(("loss", digest, step, run))


def _unknown(digest: str) -> InputError:
    return InputError(f"there is no job {digest[:12]}… here: was it submitted?")
