"""The ring Z/2^64 and bit vectors, held in tensors.

A ring element, or *word*, is an ``int64``: torch's addition, multiplication, ``matmul`` and ``conv2d`` wrap around,
which is arithmetic modulo 2^64. What torch lacks on such words (unsigned shifts, popcount) is here, done by NumPy on
the same memory. Every function also accepts tensors on the ``meta`` device and then returns shapes only, so that a
protocol can be planned without data.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WORD_BITS = 64


def shift_right(words: Tensor, count: int) -> Tensor:
    """``words >> count`` with zeros coming in from the left, for one public ``count`` in [0, 63]."""
    if count == 0:
        return words
    return (words >> count) & ((1 << (WORD_BITS - count)) - 1)


def top_bit(words: Tensor) -> Tensor:
    """Bit 63 of each word as an int64 0 or 1."""
    return shift_right(words, WORD_BITS - 1)


def bits_at(words: Tensor, lowest: int, count: int) -> Tensor:
    """The ``count`` bits of each word from bit ``lowest`` up, as an int64 in [0, 2^count)."""
    return (words >> lowest) & ((1 << count) - 1)


def low_byte_after_shift(words: Tensor, counts: Tensor) -> Tensor:
    """The low byte of ``words >> counts`` (zeros coming in), element by element.

    Args:
        words: int64, any shape.
        counts: int64 of the same shape, each in [0, 63].

    Returns:
        uint8 of the same shape.
    """
    if words.is_meta:
        return torch.empty_like(words, dtype=torch.uint8)
    shifted = _unsigned(words) >> _unsigned(counts)
    return torch.from_numpy(np.asarray(shifted.astype(np.uint8)))


def thermometer(levels: Tensor) -> Tensor:
    """Words whose bits 0 to ``level`` are one and whose other bits are zero, for levels in [0, 63]."""
    if levels.is_meta:
        return torch.empty_like(levels)
    return torch.from_numpy(np.asarray(~np.left_shift(np.int64(-2), levels.numpy())))


def parity(words: Tensor) -> Tensor:
    """The XOR of the 64 bits of each word, as a uint8 0 or 1."""
    if words.is_meta:
        return torch.empty_like(words, dtype=torch.uint8)
    return torch.from_numpy(np.asarray(np.bitwise_count(_unsigned(words)) & np.uint8(1)))


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` for a public table of 256 entries or fewer and a uint8 index."""
    if index.is_meta:
        return torch.empty_like(index, dtype=table.dtype)
    return torch.from_numpy(np.asarray(np.take(table.numpy(), index.numpy())))


def _unsigned(words: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    return words.numpy().view(np.uint64)
