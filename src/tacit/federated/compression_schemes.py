"""Encodings of an update's vector: half precision, stochastic quantisation, the largest entries.

All numbers are little-endian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tacit.errors import CodecError, InputError

_FLOATS: dict[torch.dtype, np.dtype[np.floating]] = {torch.float32: np.dtype("<f4"), torch.float64: np.dtype("<f8")}


@dataclass(frozen=True)
class Float16:
    """IEEE half precision: 2 bytes an entry.

    Error: relative 2^-11 at most, absolute 2^-25 at most for entries below 2^-14; entries from 65,520 on decode to
    infinity.
    """

    error_feedback: bool = False

    def encode(self, vector: Tensor, generator: torch.Generator) -> bytes:
        """See `Scheme`."""
        _check(vector)
        return vector.half().numpy().astype("<f2", copy=False).tobytes()

    def nbytes(self, size: int, dtype: torch.dtype) -> int:
        """See `Scheme`."""
        return 2 * size

    def decode(self, encoding: bytes, size: int, dtype: torch.dtype) -> Tensor:
        """See `Scheme`."""
        _check_length(encoding, self.nbytes(size, dtype), f"{size} numbers of float16")
        return torch.from_numpy(np.frombuffer(encoding, "<f2").astype(np.float16)).to(dtype)


@dataclass(frozen=True)
class StochasticQuantisation:
    """``bits`` bits an entry, rounded at random so that the mean of the decoding is the vector itself.

    The vector is cut into chunks. In each, with a its least and b its greatest entry and s = (b − a) / (2^bits − 1),
    an entry x becomes the whole number q = ⌊(x − a) / s + u⌋ with u uniform in [0, 1), and decodes to a + s q.
    Encoded are a and s of each chunk in the vector's own dtype, then q of every entry, packed.

    Error: less than s for every entry, with mean 0 and variance at most s² / 4, up to rounding of the floats.

    Suresh et al. 2017, *Distributed Mean Estimation with Limited Communication*, section 2.2 (stochastic k-level
    quantisation); chunks as the buckets of Alistarh et al. 2017, *QSGD*.

    Args:
        bits: 1 to 16.
        chunk: entries that share a and s; smaller ones cost more bytes and have less error.
        error_feedback: see `Compressed`; not needed without bias.

    Raises:
        InputError: a setting is out of range.
    """

    bits: int = 8
    chunk: int = 1024
    error_feedback: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise InputError(f"bits={self.bits}: choose from 1 to 16 bits an entry")
        if self.chunk < 1:
            raise InputError(f"chunk={self.chunk}: give 1 entry or more")

    def encode(self, vector: Tensor, generator: torch.Generator) -> bytes:
        """See `Scheme`."""
        dtype = _check(vector)
        levels = (1 << self.bits) - 1
        least, greatest = _chunked(vector, self.chunk).aminmax(dim=1)
        # Halves first: the difference of two finite floats may not be finite.
        step = (greatest / levels - least / levels).to(vector.dtype)
        a, s = (self._spread(values, len(vector)).double() for values in (least, step))
        noise = torch.rand(len(vector), generator=generator, dtype=torch.float64)
        scaled = torch.where(s > 0, (vector.double() - a) / s, 0.0)
        words = scaled.add_(noise).floor_().clamp_(0, levels).numpy().astype("<u2")
        scales = torch.stack([least, step], dim=1).numpy().astype(dtype, copy=False)
        return scales.tobytes() + _pack(words, self.bits)

    def nbytes(self, size: int, dtype: torch.dtype) -> int:
        """See `Scheme`."""
        return 2 * math.ceil(size / self.chunk) * _float_format(dtype).itemsize + math.ceil(size * self.bits / 8)

    def decode(self, encoding: bytes, size: int, dtype: torch.dtype) -> Tensor:
        """See `Scheme`."""
        _check_length(encoding, self.nbytes(size, dtype), f"{size} numbers of {self.bits} bits")
        floats, chunks = _float_format(dtype), math.ceil(size / self.chunk)
        header = 2 * chunks * floats.itemsize
        scales = _to_torch(np.frombuffer(encoding, floats, 2 * chunks)).view(chunks, 2)
        words = torch.from_numpy(_unpack(encoding[header:], size, self.bits).astype(np.float64))
        a, s = (self._spread(scales[:, column], size).double() for column in (0, 1))
        return (a + s * words).to(dtype)

    def _spread(self, values: Tensor, size: int) -> Tensor:
        """A chunk's value for each of its entries."""
        return values.repeat_interleave(self.chunk)[:size]


@dataclass(frozen=True)
class TopK:
    """The entries of largest magnitude, with their places: the rest counts as 0.

    Encoded are the places, ascending, as uint32, then the entries in the vector's own dtype: exact where kept.
    Without error feedback this scheme is biased and may not converge (Stich et al. 2018).

    Args:
        fraction: of the entries to keep, above 0 and at most 1; rounded up to a whole entry.
        error_feedback: see `Compressed`.

    Raises:
        InputError: ``fraction`` is out of range.
    """

    fraction: float = 0.01
    error_feedback: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InputError(f"fraction={self.fraction}: keep a fraction above 0 and at most 1, such as 0.01")

    def encode(self, vector: Tensor, generator: torch.Generator) -> bytes:
        """See `Scheme`."""
        dtype = _check(vector)
        if len(vector) >= 1 << 32:
            raise InputError(f"a vector of {len(vector)} entries: top-k numbers them with 32 bits")
        places = vector.abs().topk(self._kept(len(vector)), sorted=False).indices.sort().values
        kept = vector[places].numpy().astype(dtype, copy=False)
        return places.numpy().astype("<u4").tobytes() + kept.tobytes()

    def nbytes(self, size: int, dtype: torch.dtype) -> int:
        """See `Scheme`."""
        return self._kept(size) * (4 + _float_format(dtype).itemsize)

    def decode(self, encoding: bytes, size: int, dtype: torch.dtype) -> Tensor:
        """See `Scheme`."""
        floats, kept = _float_format(dtype), self._kept(size)
        _check_length(encoding, self.nbytes(size, dtype), f"the {kept} largest of {size} numbers")
        places = torch.from_numpy(np.frombuffer(encoding, "<u4", kept).astype(np.int64))
        if kept and (int(places[-1]) >= size or not bool((places.diff() > 0).all())):
            raise CodecError(f"the places of the largest numbers are not ascending and below {size}: refuse the update")
        vector = torch.zeros(size, dtype=dtype)
        vector[places] = _to_torch(np.frombuffer(encoding, floats, kept, 4 * kept))
        return vector

    def _kept(self, size: int) -> int:
        # Rounding of the product must not add an entry: 0.07 of 100 is 7.
        return math.ceil(round(self.fraction * size, 6))


def _chunked(vector: Tensor, chunk: int) -> Tensor:
    """The vector in rows of ``chunk`` entries, the last one filled with the vector's own last entry."""
    missing = -len(vector) % chunk
    return torch.cat([vector, vector[-1:].expand(missing)]).view(-1, chunk)


def _pack(words: NDArray[np.uint16], bits: int) -> bytes:
    """The lowest ``bits`` bits of each word, one after another, each from its lowest bit on."""
    if bits in (8, 16):
        return words.astype(f"<u{bits // 8}").tobytes()
    planes = (words[:, None] >> np.arange(bits, dtype=np.uint16)) & 1
    return np.packbits(planes.astype(np.uint8), bitorder="little").tobytes()


def _unpack(packed: bytes, count: int, bits: int) -> NDArray[np.uint16]:
    """The inverse of `_pack` for ``count`` words; the bits that fill the last byte must be 0."""
    if bits in (8, 16):
        return np.frombuffer(packed, f"<u{bits // 8}", count).astype(np.uint16)
    planes = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little").astype(np.uint16)
    if planes[count * bits :].any():
        raise CodecError("bits are set beyond the last number of a quantised update: refuse the update")
    weights = np.left_shift(np.uint16(1), np.arange(bits, dtype=np.uint16))
    words: NDArray[np.uint16] = planes[: count * bits].reshape(count, bits) @ weights
    return words


def _to_torch(values: NDArray[np.floating]) -> Tensor:
    """A tensor with memory of its own, in this machine's byte order."""
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))


def _float_format(dtype: torch.dtype) -> np.dtype[np.floating]:
    if dtype not in _FLOATS:
        raise InputError(f"an update of {dtype} cannot be compressed: train in float32 or float64")
    return _FLOATS[dtype]


def _check(vector: Tensor) -> np.dtype[np.floating]:
    if vector.dim() != 1 or len(vector) == 0:
        raise InputError(f"a vector of shape {tuple(vector.shape)} cannot be compressed: expected (D,) with D above 0")
    return _float_format(vector.dtype)


def _check_length(encoding: bytes, expected: int, what: str) -> None:
    if len(encoding) != expected:
        raise CodecError(f"{len(encoding)} bytes for {what}: expected {expected}; refuse the update")
