"""Published data files, which are the same everywhere, and the error for one that is damaged."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tacit.errors import DataError


@dataclass(frozen=True)
class PublishedFile:
    """A file's name, size in bytes and SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str

    def fault(self, content: bytes) -> str | None:
        """What is wrong with ``content`` as the predicate of a sentence; ``None`` if it is this file."""
        found = hashlib.sha256(content).hexdigest()
        if found == self.sha256:
            return None
        return f"is not the published {self.name}, SHA-256 expected {self.sha256}, found {found}"


def in_folder(folder: Path, name: str, file: PublishedFile) -> Path | None:
    """Where ``file`` of the data set ``name`` lies: in the folder of that name in ``folder``, or in it itself."""
    return next((path for path in (folder / name / file.name, folder / file.name) if path.is_file()), None)


def damaged(path: Path, fault: str) -> DataError:
    """The error for the file at ``path``; ``fault`` is the predicate of its sentence."""
    return DataError(f"{path} {fault}: put the original file in its place")
