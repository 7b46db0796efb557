"""What a party computes between two messages of `tacit.mpc.sign`, each phase one pass over memory.

Every phase is written twice: here with torch's operations, which is its definition, and in `tacit.mpc.kernels` as one
compiled loop, which runs wherever it can. Words are int64, bytes and bits uint8, all of one shape.

An element's Boolean facts share one dealt word M: products of mask bits from bit 0, of which the lowest are the mask
bits themselves, at most 45; the comparison window's top bit of R at `TOP_BIT`; the selector at `SELECTOR_BIT`; where
two bits are multiplied (`tacit.mpc.exact`), the masks of the factors at `FACTOR_BIT` and `SELECTOR_BIT` and their
product at `PRODUCT_BIT`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tacit.errors import InputError
from tacit.ring.integers import WORD_BITS, bits_at, lookup, low_byte_after_shift, parity, shift_right, top_bit
from tacit.ring.kernels import load

CHUNK_BITS = 6
OFFSET = 1 << 62
SELECTOR_BIT = 62
TOP_BIT = 61
FACTOR_BIT = 60
PRODUCT_BIT = 59


def loops_for(words: Tensor) -> ModuleType | None:
    """The compiled loops, where they can take this tensor."""
    return load("tacit.mpc.kernels") if words.is_cpu else None


def mask(z: Tensor, r: Tensor, alice: bool) -> Tensor:
    """The share of Ẑ = Z + 2^62 + R to open."""
    loops = loops_for(z)
    offset = OFFSET if alice else 0
    if loops is None:
        return z + r + offset
    out, words = new(z, np.int64)
    loops.mask(*_alike(z, r), offset, words)
    return out


def compare(
    opened: Tensor, thermometers: Tensor, m: Tensor, lowest: int, chunks: int, alice: bool
) -> tuple[Tensor, Tensor]:
    """Read the shares of e_i and l_i off the thermometer words.

    Args:
        opened: Ẑ.
        thermometers: shares of the thermometer words, ``(chunks, *shape)``, the lowest chunk first.
        m: the share of M.
        lowest: the comparison window's lowest bit.
        chunks: its number of chunks.
        alice: whether this party is alice, who adds what is public.

    Returns:
        The byte to open, e_{c-1}…e_1 and l_{c-2}…l_0 from bit 0 up under the mask bits; and what stays at home, the
        share of 1 ⊕ ẑ_top ⊕ r_top ⊕ l_{c-1}.
    """
    loops = loops_for(opened)
    if loops is not None:
        if len(thermometers) != chunks:
            raise InputError(f"a window of {chunks} chunks needs as many thermometer words, not {len(thermometers)}")
        (byte, own), (rest, kept) = new(opened, np.uint8), new(opened, np.uint8)
        words, facts, _ = _alike(opened, m, thermometers[0])
        loops.compare(words, *flat(thermometers), facts, lowest, chunks, int(alice), own, kept)
        return byte, rest
    masked = opened - OFFSET
    equals: list[Tensor] = []
    greater: list[Tensor] = []
    for i in reversed(range(chunks)):
        level = bits_at(masked, lowest + CHUNK_BITS * i, CHUNK_BITS)
        pair = low_byte_after_shift(thermometers[i], level)
        above = (pair >> 1) & 1
        greater.append(above)
        equals.append((pair & 1) ^ above)
    byte = m.to(torch.uint8) & ((1 << 2 * (chunks - 1)) - 1)
    for bit, share in enumerate((*equals[:-1], *greater[1:])):
        byte = byte ^ (share << bit)
    rest = greater[0] ^ bits_at(m, TOP_BIT, 1).to(torch.uint8)
    if alice:
        rest = rest ^ 1 ^ bits_at(masked, lowest + CHUNK_BITS * chunks, 1).to(torch.uint8)
    return byte, rest


def resolve(byte: Tensor, rest: Tensor, m: Tensor, coefficients: Tensor, constant: Tensor, alice: bool) -> Tensor:
    """The share of 1{Z ≥ 0} = rest ⊕ parity(M & COEFFICIENTS[byte]) ⊕ CONSTANT[byte], from the opened byte."""
    loops = loops_for(byte)
    if loops is not None:
        out, words = new(byte, np.uint8)
        loops.resolve(*_alike(byte, rest, m), *flat(coefficients, constant), int(alice), words)
        return out
    result = rest ^ parity(m & lookup(coefficients, byte))
    return result ^ lookup(constant, byte) if alice else result


def under_selector(bits: Tensor, m: Tensor) -> Tensor:
    """The share of d = b ⊕ s to open, as bools."""
    loops = loops_for(bits)
    if loops is None:
        return (bits ^ bits_at(m, SELECTOR_BIT, 1).to(torch.uint8)).to(torch.bool)
    out, words = new(bits, np.bool_)
    loops.under_selector(*_alike(bits, m), words.view(np.uint8))
    return out


def truncated(opened: Tensor, rho: Tensor, mu: Tensor, drop: int, alice: bool) -> Tensor:
    """The share of v = (Ẑ >> t) - 2^(62-t) - ρ + (1 - msb Ẑ)·μ, for t = ``drop`` > 0."""
    loops = loops_for(opened)
    if loops is not None:
        out, words = new(opened, np.int64)
        loops.truncated(*_alike(opened, rho, mu), drop, int(alice), words)
        return out
    own = _unmasked(opened, rho, mu, drop)
    return own + _public(opened, drop) if alice else own


def selected(d: Tensor, opened: Tensor, facts: Sequence[Tensor], drop: int, alice: bool) -> Tensor:
    """The share of b·v = d·[v] + (1 - 2d)·[s·v], where v is truncated on the way by ``drop`` > 0 bits.

    Args:
        d: b ⊕ s as bools.
        opened: Ẑ.
        facts: shares of ρ, μ, s, s·ρ and s·μ.
        drop: bits to truncate.
        alice: whether this party is alice.
    """
    loops = loops_for(opened)
    if loops is not None:
        out, words = new(opened, np.int64)
        loops.selected(*_alike(d.view(torch.uint8), opened, *facts), drop, int(alice), words)
        return out
    rho, mu, s, s_rho, s_mu = facts
    value = truncated(opened, rho, mu, drop, alice)
    product = s * _public(opened, drop) + _unmasked(opened, s_rho, s_mu, drop)
    return torch.where(d, value - product, product)


def selected_whole(d: Tensor, opened: Tensor, value: Tensor, facts: Sequence[Tensor]) -> Tensor:
    """The same without truncation: ``value`` is the share of v = Z, and the facts are shares of s and s·R."""
    loops = loops_for(opened)
    if loops is not None:
        out, words = new(opened, np.int64)
        loops.selected_whole(*_alike(d.view(torch.uint8), opened, value, *facts), words)
        return out
    s, s_rho = facts
    product = s * _public(opened, 0) - s_rho
    return torch.where(d, value - product, product)


def _public(opened: Tensor, drop: int) -> Tensor:
    return shift_right(opened, drop) - (OFFSET >> drop)


def _unmasked(opened: Tensor, rho: Tensor, mu: Tensor, drop: int) -> Tensor:
    # A share of μ = bit·2^(64-t) is dealt as a share of the bit modulo 2^t.
    return (mu.to(torch.int64) << (WORD_BITS - drop)) * (1 - top_bit(opened)) - rho


def flat(*tensors: Tensor) -> list[NDArray[np.generic]]:
    """The tensors' elements as flat arrays, on the same memory where they are contiguous."""
    return [tensor.numpy().reshape(-1) for tensor in tensors]


def _alike(*tensors: Tensor) -> list[NDArray[np.generic]]:
    # A compiled loop does not look where an array ends.
    arrays = flat(*tensors)
    if len({array.size for array in arrays}) > 1:
        raise InputError(f"tensors of one masked opening differ in shape: {[tuple(x.shape) for x in tensors]}")
    return arrays


def new(like: Tensor, dtype: type[np.generic]) -> tuple[Tensor, NDArray[np.generic]]:
    """A tensor of this shape to be filled, and its elements as a flat array."""
    # NumPy's large arrays lie on large pages, torch's do not: the first write to them is several times faster.
    array = np.empty(like.shape, dtype)
    return torch.from_numpy(array), array.reshape(-1)
