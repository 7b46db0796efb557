"""Compiled loops that pack and unpack residues; `tacit.federated.secure_sum.ring` says what each computes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tacit.ring.kernels import compiled


@compiled
def pack(words: NDArray[np.unsignedinteger], bits: int, packed: NDArray[np.uint32]) -> None:
    """Fill ``packed`` with the low ``bits`` bits of each word."""
    held, filled, at = np.uint64(0), 0, 0
    for i in range(len(words)):
        held |= np.uint64(words[i]) << np.uint64(filled)
        filled += bits
        if filled >= 32:
            packed[at] = np.uint32(held & np.uint64(0xFFFFFFFF))
            held >>= np.uint64(32)
            filled -= 32
            at += 1
    if filled:
        packed[at] = np.uint32(held)


@compiled
def add_packed(packed: NDArray[np.uint32], bits: int, words: NDArray[np.unsignedinteger]) -> None:
    """Add the residues in ``packed`` to ``words``."""
    low = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    held, filled, at = np.uint64(0), 0, 0
    for i in range(len(words)):
        if filled < bits:
            held |= np.uint64(packed[at]) << np.uint64(filled)
            filled += 32
            at += 1
        words[i] += held & low
        held >>= np.uint64(bits)
        filled -= bits
