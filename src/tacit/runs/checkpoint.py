"""A training's snapshot on disk: safetensors, written whole or not at all, checked before use.

Every tensor of the snapshot goes into the file under a name of its own; the metadata's ``snapshot`` is JSON for
everything else. Of Python's types it can hold those of `_RECORDS` and plain values, and nothing in the file is code.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tacit import atomic
from tacit.errors import DataError, InputError
from tacit.federated.algorithm import ServerState, Update
from tacit.federated.layout import Layout
from tacit.runtimes.asynchronous import AsynchronousSnapshot, Flight
from tacit.runtimes.executors import Outcome
from tacit.runtimes.federation import Snapshot

_FORMAT = "tacit training snapshot v1"
_RECORDS = {
    record.__name__: record for record in (Snapshot, AsynchronousSnapshot, ServerState, Layout, Flight, Outcome, Update)
}
_DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def save(path: Path, snapshot: Snapshot, run: str) -> None:
    """Write a snapshot; a crash leaves either the old file or the new one.

    Args:
        path: the file; its folder exists.
        snapshot: what to write.
        run: identifies the settings that the snapshot belongs to.

    Raises:
        InputError: the snapshot holds what a file cannot, such as an object of an optimizer of the user's own.
    """
    tensors: dict[str, Tensor] = {}
    metadata = {"format": _FORMAT, "run": run, "snapshot": json.dumps(_packed(snapshot, "snapshot", tensors))}
    partial = path.with_suffix(".partial")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, partial, metadata)
    atomic.sync(partial)
    os.replace(partial, path)
    atomic.sync(path.parent)


def load(path: Path, fresh: Snapshot, run: str) -> Snapshot:
    """Read a snapshot.

    Args:
        path: as given to `save`.
        fresh: of a training with the same settings that has not begun, to compare with.
        run: as given to `save`.

    Raises:
        DataError: the file is missing, damaged, or belongs to other settings.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: there is no snapshot to resume from")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable snapshot: {error}") from error
    for key, expected in (("format", _FORMAT), ("run", run)):
        if metadata.get(key) != expected:
            raise DataError(f"{path} has {key} {metadata.get(key)!r}, not {expected!r}: it belongs to other settings")
    try:
        snapshot = _unpacked(json.loads(metadata["snapshot"]), tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a complete snapshot: {error!r}") from error
    if type(snapshot) is not type(fresh) or snapshot.state.layout != fresh.state.layout:
        raise DataError(f"{path} does not hold the tensors of this model and algorithm")
    loaded: Snapshot = snapshot
    return loaded


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON: what JSON has no type for is an object of one entry, named after its type."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, dict):  # as pairs, since keys may be numbers
        return {"dict": [[key, _packed(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = next(kind for kind in (torch.Size, tuple, list) if isinstance(value, kind)).__name__
        return {kind: [_packed(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if is_dataclass(value) and type(value).__name__ in _RECORDS:
        content = {f.name: _packed(getattr(value, f.name), f"{name}/{f.name}", tensors) for f in fields(value)}
        return {type(value).__name__: content}
    raise InputError(f"{name} is a {type(value).__name__}, which cannot be kept in a file")


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        return _DTYPES[content]
    if kind == "dict":
        return {key: _unpacked(item, tensors) for key, item in content}
    if kind in ("list", "tuple", "Size"):
        return {"list": list, "tuple": tuple, "Size": torch.Size}[kind]([_unpacked(x, tensors) for x in content])
    return _RECORDS[kind](**{key: _unpacked(item, tensors) for key, item in content.items()})
