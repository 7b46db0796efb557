"""The ring Z/2^b that vectors are summed in, and its words packed b bits each.

A vector of residues is a flat array of the narrowest machine word that holds them. While masks are added, the bits
above b carry whatever they may: arithmetic modulo 2^16 or 2^32 is arithmetic modulo 2^b after `Ring.reduced`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tacit.errors import CodecError, InputError
from tacit.ring.kernels import load

Words: TypeAlias = np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]
"""Residues: uint16 or uint32, flat."""
Packed: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint32]]

_KERNELS = "tacit.federated.secure_sum.kernels"


@dataclass(frozen=True)
class Ring:
    """Z/2^b.

    Args:
        bits: b, from 2 to 32.

    Raises:
        InputError: b is out of range.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 32:
            raise InputError(f"a ring of {self.bits} bits: choose from 2 to 32")

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The machine word that holds a residue."""
        return np.dtype(np.uint16 if self.bits <= 16 else np.uint32)

    def zeros(self, length: int) -> Words:
        """A vector of zeros."""
        return np.zeros(length, self.dtype)

    def reduce_(self, words: Words) -> Words:
        """Clear the bits above b, in place."""
        if self.bits < 8 * self.dtype.itemsize:
            words &= self.dtype.type((1 << self.bits) - 1)
        return words

    def signed(self, words: Words) -> NDArray[np.int64]:
        """The representatives in [-2^(b-1), 2^(b-1)), as int64."""
        high = 64 - self.bits
        return (words.astype(np.int64) << high) >> high

    def residues(self, integers: NDArray[np.int64]) -> Words:
        """Integers modulo 2^b."""
        return (integers & ((1 << self.bits) - 1)).astype(self.dtype)

    def require(self, words: Words, length: int) -> None:
        """Check a vector of residues that the caller gave.

        Raises:
            InputError: dtype, shape or a value is not as described.
        """
        if words.dtype != self.dtype or words.shape != (length,) or not words.flags.c_contiguous:
            raise InputError(
                f"a vector of {words.dtype} of shape {words.shape}: expected {self.dtype} of shape ({length},), "
                "contiguous"
            )
        if length and int(words.max()) >> self.bits:
            raise InputError(f"a vector holds a number that is not a residue modulo 2^{self.bits}: reduce it first")

    def packed_size(self, length: int) -> int:
        """Words of 32 bits that ``length`` residues pack into."""
        return -(-length * self.bits // 32)

    def pack(self, words: Words) -> Packed:
        """Residues, b bits each, lowest bit first, in little-endian words of 32 bits; unused bits are zero.

        Args:
            words: reduced.
        """
        kernels = load(_KERNELS)
        if kernels is None:
            return pack_plainly(words, self.bits)
        packed = np.empty(self.packed_size(len(words)), np.uint32)
        kernels.pack(words, self.bits, packed)
        return packed

    def require_packed(self, packed: Packed, length: int) -> None:
        """Check packed residues that came from elsewhere.

        Raises:
            CodecError: not ``length`` of them, or unused bits are not zero.
        """
        if packed.shape != (self.packed_size(length),):
            raise CodecError(f"{len(packed)} words of 32 bits came, {self.packed_size(length)} were expected")
        spare = 32 * len(packed) - self.bits * length
        if spare and int(packed[-1]) >> (32 - spare):
            raise CodecError("the unused bits of the last word of a packed vector are not zero")

    def add_packed(self, packed: Packed, words: Words) -> None:
        """Add packed residues to ``words``, in place.

        Raises:
            CodecError: not as many as ``words``, or unused bits are not zero.
        """
        self.require_packed(packed, len(words))
        kernels = load(_KERNELS)
        if kernels is None:
            words += unpack_plainly(packed, self.bits, len(words)).astype(self.dtype)
        else:
            kernels.add_packed(packed, self.bits, words)


def pack_plainly(words: Words, bits: int) -> Packed:
    """What `Ring.pack` computes, by single bits."""
    octets = words.astype("<u4").view(np.uint8).reshape(-1, 4)
    single = np.unpackbits(octets, axis=1, bitorder="little")[:, :bits].reshape(-1)
    padded = np.zeros(-(-len(single) // 32) * 32, np.uint8)
    padded[: len(single)] = single
    return np.packbits(padded, bitorder="little").view(np.uint32)


def unpack_plainly(packed: Packed, bits: int, length: int) -> Packed:
    """The residues of a packed vector, by single bits."""
    single = np.unpackbits(packed.view(np.uint8), count=bits * length, bitorder="little").reshape(length, bits)
    padded = np.zeros((length, 32), np.uint8)
    padded[:, :bits] = single
    return np.packbits(padded, bitorder="little").view(np.uint32)
