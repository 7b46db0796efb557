"""Named tensors in memory that processes share."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping

import msgspec
import torch
from torch import Tensor

from tacit.errors import InputError

ALIGNMENT = 64
"""Every tensor starts at a multiple of so many bytes, as torch's own do."""


class Place(msgspec.Struct, frozen=True, array_like=True):
    """A tensor's name, dtype (as torch spells it after ``torch.``) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def places(tensors: Mapping[str, Tensor]) -> tuple[Place, ...]:
    """What has to be known about tensors to find them again in memory that they were put into."""
    return tuple(Place(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items())


def room(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors take one after another."""
    return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)


def views(memory: memoryview, there: Iterable[Place]) -> dict[str, Tensor]:
    """The tensors in writable memory, which they share."""
    result: dict[str, Tensor] = {}
    offset = 0
    for place in there:
        dtype: torch.dtype = getattr(torch, place.dtype)
        count = 1
        for extent in place.shape:
            count *= extent
        flat = (
            torch.frombuffer(memory, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)
        )
        result[place.name] = flat.view(place.shape)
        offset += room([flat])
    return result


def put(tensors: Mapping[str, Tensor], memory: memoryview) -> tuple[Place, ...]:
    """Copy tensors into writable memory; says how to find them.

    Raises:
        InputError: they do not fit.
    """
    if room(tensors.values()) > len(memory):
        raise InputError(
            f"{', '.join(tensors)}: {room(tensors.values()):,} bytes do not fit the {len(memory):,} that a "
            "process is given: train in one process, or send less"
        )
    there = places(tensors)
    for name, view in views(memory, there).items():
        view.copy_(tensors[name])
    return there


class SharedMemory:
    """Memory without a name that processes forked from here on share; pages that nobody touches cost nothing.

    Args:
        nbytes: how much.
    """

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
        self.view = memoryview(self._map)

    def __len__(self) -> int:
        return len(self._map)
