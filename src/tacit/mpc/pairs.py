"""What a party computes between two messages of `tacit.mpc.all_pairs`; twice, as in `tacit.mpc.phases`.

A value i stands against each later j, and, to rectify, against zero. Everything about pairs is stacked along a first
dimension in the order of `pairs_of`.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tacit.errors import InputError
from tacit.mpc import phases
from tacit.mpc.phases import OFFSET, flat, loops_for
from tacit.ring.integers import lookup, parity, shift_right

Pair = tuple[int, int | None]


def pairs_of(count: int, rectify: bool) -> list[Pair]:
    """The comparisons: i against each later j, and, to rectify, against zero (``None``)."""
    pairs: list[Pair] = list(combinations(range(count), 2))
    return pairs + ([(i, None) for i in range(count)] if rectify else [])


@cache
def _sides(count: int, rectify: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both sides of every pair, zero being number ``count``."""
    pairs = pairs_of(count, rectify)
    return np.array([i for i, _ in pairs]), np.array([count if j is None else j for _, j in pairs])


def differences(values: Tensor, rectify: bool, zero: int) -> Tensor:
    """``values[i] - values[j]`` for every pair, stacked; ``zero`` is what stands for zero."""
    rows = torch.cat([values, torch.full_like(values[:1], zero)])
    left, right = (torch.from_numpy(side).to(values.device) for side in _sides(len(values), rectify))
    return rows.index_select(0, left).sub_(rows.index_select(0, right))


def packed(bits: Tensor) -> Tensor:
    """Bits stacked along the first dimension as one int64: the first is bit 0."""
    return (bits.to(torch.int64) << _positions(bits[0], 0, len(bits))).sum(0)


def compare_pairs(
    opened: Tensor, thermometers: Tensor, m: Tensor, rectify: bool, lowest: int, chunks: int, alice: bool
) -> tuple[Tensor, Tensor]:
    """`tacit.mpc.phases.compare` of every pair's difference of (Ẑ >> lowest).

    Args:
        opened: Ẑ of the values, ``(values, *shape)``.
        thermometers: shares of the thermometer words about the masks' differences, ``(chunks, pairs, *shape)``.
        m: the share of every pair's M.
        rectify: whether zero takes part.
        lowest: the lowest bit that comparisons look at.
        chunks: the size of their window.
        alice: whether this party is alice.
    """
    loops = loops_for(opened)
    if loops is None:
        # An opening's offset has cancelled in the differences.
        unmasked = differences(shift_right(opened, lowest), rectify, OFFSET >> lowest)
        return phases.compare(unmasked + OFFSET, thermometers, m, 0, chunks, alice)
    count, (left, right) = len(opened), _sides(len(opened), rectify)
    rows = (len(left), *opened.shape[1:])
    if m.shape != rows or thermometers.shape != (chunks, *rows):
        raise InputError(f"{len(left)} pairs of {tuple(opened.shape)} do not have dealt words of {tuple(m.shape)}")
    (byte, own), (rest, kept) = phases.new(m, np.uint8), phases.new(m, np.uint8)
    loops.compare_pairs(*flat(opened, thermometers, m), left, right, count, lowest, chunks, int(alice), own, kept)
    return byte, rest


def under_masks(bits: Tensor, h: Tensor, lowest: int) -> Tensor:
    """Rows of bits under as many mask bits of ``h`` from bit ``lowest`` up, to open; as bools."""
    loops = loops_for(bits)
    if loops is None:
        return (bits ^ _bits(h, lowest, len(bits))).to(torch.bool)
    _require_rows(bits, h)
    out, words = phases.new(bits, np.bool_)
    loops.under_masks(*flat(bits, h), lowest, words.view(np.uint8))
    return out


def winners(seen: Tensor, h: Tensor, coefficients: Tensor, constant: Tensor, alice: bool) -> Tensor:
    """Shares of "value i wins all its comparisons", from their opened bits; see `tacit.mpc.all_pairs.Winner`.

    Args:
        seen: the opened bits as bools, ``(pairs, *shape)``.
        h: the share of the word of products of their masks.
        coefficients: ``(values, 2^pairs)``.
        constant: likewise.
        alice: whether this party is alice.

    Returns:
        uint8 of shape ``(values, *shape)``.
    """
    count = len(coefficients)
    loops = loops_for(seen)
    if loops is None:
        index = packed(seen)
        entries = index + (_positions(index, 0, count) << len(seen))
        picks = parity(h & lookup(coefficients.view(-1), entries))
        return picks ^ lookup(constant.view(-1), entries) if alice else picks
    _require_rows(seen, h)
    if coefficients.shape != (count, 1 << len(seen)) or constant.shape != coefficients.shape:
        raise InputError(f"the bits of {len(seen)} pairs do not fit a table of {tuple(coefficients.shape)}")
    array = np.empty((count, *h.shape), np.uint8)
    loops.winners(*flat(seen.view(torch.uint8), h, coefficients, constant), count, int(alice), array.reshape(-1))
    return torch.from_numpy(array)


def _require_rows(bits: Tensor, h: Tensor) -> None:
    # A compiled loop does not look where an array ends.
    if bits.shape[1:] != h.shape:
        raise InputError(f"rows of {tuple(bits.shape)} do not have masks of {tuple(h.shape)}")


def _positions(like: Tensor, lowest: int, count: int) -> Tensor:
    """Numbers from ``lowest`` up along a new first dimension."""
    return torch.arange(lowest, lowest + count, device=like.device).view(count, *[1] * like.dim())


def _bits(words: Tensor, lowest: int, count: int) -> Tensor:
    """Bits of each word from bit ``lowest`` up, stacked along a new first dimension, as uint8."""
    return (words >> _positions(words, lowest, count)).bitwise_and_(1).to(torch.uint8)
