"""A party's shares on disk: safetensors, written whole or not at all, checked before use.

Format: int64 tensors by name, and the metadata ``format`` (``tacit shares v1``), ``role``, ``program`` (which model and
optimizer) and ``step``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tacit.errors import DataError
from tacit.mpc.steps import Role

_FORMAT = "tacit shares v1"


def path_of(folder: Path, role: Role) -> Path:
    """Where a party's shares lie."""
    return folder / f"{role.value}.safetensors"


def save(folder: Path, role: Role, words: Mapping[str, Tensor], program: str, step: int) -> None:
    """Write one party's shares.

    Args:
        folder: made if it is missing.
        role: whose shares.
        words: int64, by name.
        program: what they belong to.
        step: how many steps led to them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, role)
    partial = path.with_suffix(".partial")
    metadata = {"format": _FORMAT, "role": role.value, "program": program, "step": str(step)}
    save_file({name: value.contiguous() for name, value in words.items()}, partial, metadata)
    os.replace(partial, path)


def load(
    folder: Path, role: Role, shapes: Mapping[str, tuple[int, ...]], program: str
) -> tuple[dict[str, Tensor], int]:
    """Read one party's shares.

    Args:
        folder: as given to `save`.
        role: whose shares.
        shapes: of the tensors that are expected, by name.
        program: what they should belong to.

    Returns:
        The words by name, and the step.

    Raises:
        DataError: the file is missing, damaged, of another party or another program.
    """
    path = path_of(folder, role)
    if not path.is_file():
        raise DataError(f"{path} does not exist: it is where {role.value}'s shares would be")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            words = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable checkpoint: {error}") from error
    for key, expected in (("format", _FORMAT), ("role", role.value), ("program", program)):
        if metadata.get(key) != expected:
            raise DataError(f"{path} has {key} {metadata.get(key)!r}, not {expected!r}")
    found = {name: tuple(value.shape) for name, value in words.items()}
    if found != dict(shapes) or any(value.dtype != torch.int64 for value in words.values()):
        raise DataError(f"{path} does not hold the tensors of this model")
    if not metadata.get("step", "").isdecimal():
        raise DataError(f"{path} does not say after which step it was written")
    return words, int(metadata["step"])


def common_step(alice: int, bob: int) -> int:
    """The step that both parties' files were written after.

    Raises:
        DataError: they differ, so the shares do not belong together.
    """
    if alice != bob:
        raise DataError(f"alice's shares are from step {alice} and bob's from step {bob}: they do not belong together")
    return alice
