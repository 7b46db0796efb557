"""Where the shares of a job lie in a party's folder, and what each file is sealed as."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tacit.party.jobs.states import Checkpoint

STATE, ROWS = ".state", ".rows"


@dataclass(frozen=True)
class Piece:
    """Some of a contributor's rows.

    Args:
        contributor: the public key, as text.
        upload: what they came with.
        first: the number of the first row among the contributor's.
        count: how many.
    """

    contributor: str
    upload: bytes
    first: int
    count: int


def checkpoint_file(folder: Path, job: str, checkpoint: Checkpoint) -> tuple[Path, bytes]:
    """Where a checkpoint lies, and what it is sealed as."""
    name = f"{job}-{checkpoint.step}-{checkpoint.run.hex()}{STATE}"
    return folder / name, msgspec.msgpack.encode(("checkpoint", job, checkpoint))


def piece_file(folder: Path, job: str, piece: Piece) -> tuple[Path, bytes]:
    """Where a piece lies, and what it is sealed as."""
    context = msgspec.msgpack.encode(("rows", job, piece.contributor, piece.upload, piece.first, piece.count))
    return folder / f"{job}-{hashlib.sha256(context).hexdigest()}{ROWS}", context
