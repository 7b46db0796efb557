"""The compiled loops behind `tacit.mpc.phases`, one pass over memory each; see `tacit.ring.kernels`.

Arrays are flat and contiguous, and words come as int64. Elements are taken in blocks of 512, so that what
is worked on stays in the first-level cache while every inner loop stays simple enough to become vector instructions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tacit.mpc.phases import CHUNK_BITS, OFFSET, SELECTOR_BIT, TOP_BIT
from tacit.ring.kernels import compiled

Words = NDArray[np.int64]
Unsigned = NDArray[np.uint64]
Bytes = NDArray[np.uint8]
Narrow = NDArray[Any]

_BLOCK = 512
_ONE, _BYTE, _LEVEL, _TOP = np.uint64(1), np.uint64(0xFF), np.uint64(63), np.uint64(63)
_OFFSET = np.uint64(OFFSET)
_TOP_BIT, _SELECTOR_BIT = np.uint64(TOP_BIT), np.uint64(SELECTOR_BIT)
_REST, _UNUSED = np.uint64(32), np.uint64(40)
_NOTHING = np.uint64(0xFFFFFFFFFFFFFFFE)


@compiled
def mask(z: Words, r: Words, offset: int, out: Words) -> None:
    """``out = z + r + offset``."""
    for i in range(z.size):
        out[i] = z[i] + r[i] + offset


@compiled
def _compare_block(
    words: Unsigned, kept: Unsigned, thermometers: Words, stride: int, start: int, lowest: int, chunks: int,
    alice: int, facts: Unsigned, byte: Bytes, rest: Bytes,
) -> None:  # fmt: skip
    """`compare` for at most a block of unmasked openings; row ``i`` of their thermometers is at ``i * stride + start``.

    ``kept`` is their M, and ``facts`` is overwritten.
    """
    used = np.uint64((1 << 2 * (chunks - 1)) - 1)
    first, top = np.uint64(alice), np.uint64(lowest + CHUNK_BITS * chunks)
    for j in range(kept.size):
        # The shares of e and l come below bit 32 as they stand in the byte; what stays at home comes at it.
        signs = kept[j] >> _TOP_BIT ^ (first & ~(words[j] >> top))
        facts[j] = (kept[j] & used) | (signs & _ONE) << _REST
    for position in range(chunks):
        chunk = chunks - 1 - position
        shift = np.uint64(lowest + CHUNK_BITS * chunk)
        equal = np.uint64(position) if chunk else _UNUSED
        above = np.uint64(chunks - 2 + position) if position else _REST
        row = thermometers[chunk * stride + start : chunk * stride + start + kept.size].view(np.uint64)
        for j in range(kept.size):
            pair = row[j] >> (words[j] >> shift & _LEVEL)
            more = pair >> _ONE
            facts[j] ^= (more & _ONE) << above ^ ((pair ^ more) & _ONE) << equal
    for j in range(kept.size):
        byte[j] = facts[j] & _BYTE
    for j in range(kept.size):
        rest[j] = facts[j] >> _REST & _ONE


@compiled
def compare(
    opened: Words, thermometers: Words, m: Words, lowest: int, chunks: int, alice: int, byte: Bytes, rest: Bytes
) -> None:  # fmt: skip
    """See `tacit.mpc.phases.compare`; ``thermometers`` holds one row a chunk."""
    facts, block = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
    size = opened.size
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        words, kept = opened[start:end].view(np.uint64), m[start:end].view(np.uint64)
        for j in range(end - start):
            block[j] = words[j] - _OFFSET
        own, stays = byte[start:end], rest[start:end]
        _compare_block(block, kept, thermometers, size, start, lowest, chunks, alice, facts, own, stays)


@compiled
def compare_pairs(
    opened: Words, thermometers: Words, m: Words, left: Words, right: Words, count: int, lowest: int, chunks: int,
    alice: int, byte: Bytes, rest: Bytes,
) -> None:  # fmt: skip
    """See `tacit.mpc.pairs.compare_pairs`; ``opened`` holds ``count`` rows, and row ``count`` stands for zero."""
    facts, block = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
    size, shift = opened.size // count, np.uint64(lowest)
    words = opened.view(np.uint64)
    for pair in range(left.size):
        for start in range(0, size, _BLOCK):
            length = min(_BLOCK, size - start)
            one = words[left[pair] * size + start :]
            if right[pair] < count:
                other = words[right[pair] * size + start :]
                for j in range(length):
                    block[j] = (one[j] >> shift) - (other[j] >> shift)
            else:
                for j in range(length):
                    block[j] = (one[j] >> shift) - (_OFFSET >> shift)
            at, to = pair * size + start, pair * size + start + length
            kept, own, stays = m[at:to].view(np.uint64), byte[at:to], rest[at:to]
            _compare_block(block, kept, thermometers, m.size, at, 0, chunks, alice, facts, own, stays)


@compiled
def winners(
    seen: Bytes, h: Words, coefficients: Words, constant: Bytes, count: int, alice: int, out: Bytes
) -> None:  # fmt: skip
    """See `tacit.mpc.pairs.winners`; the tables hold ``count`` rows."""
    size, entries, flip = h.size, coefficients.size // count, np.uint8(alice)
    index, facts = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.uint64)
    table, kept = coefficients.view(np.uint64), h.view(np.uint64)
    for start in range(0, size, _BLOCK):
        length = min(_BLOCK, size - start)
        index[:length] = 0
        for pair in range(seen.size // size):
            bits = seen[pair * size + start :]
            for j in range(length):
                index[j] |= np.int64(bits[j]) << pair
        for i in range(count):
            won, words = out[i * size + start :], kept[start:]
            for j in range(length):
                facts[j] = words[j] & table[i * entries + index[j]]
            _fold(facts[:length])
            for j in range(length):
                won[j] = np.uint8(facts[j] & _ONE) ^ (constant[i * entries + index[j]] & flip)


@compiled
def under_masks(bits: Bytes, h: Words, lowest: int, out: Bytes) -> None:
    """See `tacit.mpc.pairs.under_masks`."""
    for row in range(bits.size // max(h.size, 1)):
        own, under = bits[row * h.size :], out[row * h.size :]
        for j in range(h.size):
            under[j] = own[j] ^ np.uint8((h[j] >> (lowest + row)) & 1)


@compiled
def _fold(facts: Unsigned) -> None:
    """Leave each word's parity in its lowest bit."""
    for j in range(facts.size):
        word = facts[j]
        word ^= word >> np.uint64(32)
        word ^= word >> np.uint64(16)
        word ^= word >> np.uint64(8)
        word ^= word >> np.uint64(4)
        word ^= word >> np.uint64(2)
        facts[j] = word ^ word >> _ONE


@compiled
def resolve(
    byte: Bytes, rest: Bytes, m: Words, coefficients: Words, constant: Bytes, alice: int, out: Bytes
) -> None:  # fmt: skip
    """See `tacit.mpc.phases.resolve`."""
    table, flip = coefficients.view(np.uint64), np.uint8(alice)
    facts = np.empty(_BLOCK, np.uint64)
    for start in range(0, byte.size, _BLOCK):
        end = min(start + _BLOCK, byte.size)
        opened, kept, known, bits = byte[start:end], m[start:end].view(np.uint64), rest[start:end], out[start:end]
        # The table is read one word at a time; apart from it, what follows becomes vector instructions.
        for j in range(end - start):
            facts[j] = kept[j] & table[opened[j]]
        _fold(facts[: end - start])
        for j in range(end - start):
            bits[j] = np.uint8(facts[j] & _ONE) ^ known[j] ^ (constant[opened[j]] & flip)


@compiled
def under_selector(bits: Bytes, m: Words, out: Bytes) -> None:
    """See `tacit.mpc.phases.under_selector`."""
    for i in range(bits.size):
        out[i] = bits[i] ^ np.uint8((m[i] >> SELECTOR_BIT) & 1)


@compiled
def truncated(opened: Words, rho: Words, mu: Narrow, drop: int, alice: int, out: Words) -> None:
    """See `tacit.mpc.phases.truncated`."""
    low, offset, lift = (1 << (64 - drop)) - 1, OFFSET >> drop, 64 - drop
    for i in range(opened.size):
        public = ((opened[i] >> drop) & low) - offset
        wrap = np.int64(mu[i]) << lift
        out[i] = (public & -alice) + (wrap & ~(opened[i] >> 63)) - rho[i]


@compiled
def selected(
    d: Bytes, opened: Words, rho: Words, mu: Narrow, s: Words, s_rho: Words, s_mu: Narrow,
    drop: int, alice: int, out: Words,
) -> None:  # fmt: skip
    """See `tacit.mpc.phases.selected`, with truncation."""
    low, offset, lift = (1 << (64 - drop)) - 1, OFFSET >> drop, 64 - drop
    for i in range(opened.size):
        public, carried = ((opened[i] >> drop) & low) - offset, ~(opened[i] >> 63)
        value = (public & -alice) + ((np.int64(mu[i]) << lift) & carried) - rho[i]
        product = s[i] * public + ((np.int64(s_mu[i]) << lift) & carried) - s_rho[i]
        out[i] = value - product if d[i] else product


@compiled
def selected_whole(d: Bytes, opened: Words, value: Words, s: Words, s_rho: Words, out: Words) -> None:
    """See `tacit.mpc.phases.selected`, without truncation."""
    for i in range(opened.size):
        product = s[i] * (opened[i] - OFFSET) - s_rho[i]
        out[i] = value[i] - product if d[i] else product


@compiled
def correct(
    r: Words, other: Words, rho: Words, mu: Narrow, thermometers: Words, m: Words, s: Words, s_rho: Words,
    s_mu: Narrow, drop: int, lowest: int, chunks: int, products: Words, mask_bits: Bytes, selectors: Bytes,
) -> None:  # fmt: skip
    """Turn alice's expansions of a `tacit.mpc.sign.Mask` into the corrections for bob, in place.

    The mask is R = r + other. A fact that is not dealt is an empty array; ``selectors`` holds eight bits a byte, the
    first of them the highest, as in `tacit.ring.prg.Prg.bits`.
    """
    mask, chosen = np.empty(_BLOCK, np.uint64), np.zeros(_BLOCK, np.uint64)
    products = products.view(np.uint64)
    used = np.uint8((1 << 2 * (chunks - 1)) - 1 if chunks else 0)
    size, shift, top = r.size, np.uint64(drop), np.uint64(lowest + CHUNK_BITS * chunks)
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        count = end - start
        here, there = r[start:end].view(np.uint64), other[start:end].view(np.uint64)
        for j in range(count):
            mask[j] = here[j] + there[j]
        if rho.size:
            words, wraps = rho[start:end], mu[start:end]
            for j in range(count):
                words[j] = np.int64(mask[j] >> shift) - words[j]
            for j in range(count):
                wraps[j] = np.int64(mask[j] >> _TOP) - wraps[j]
        for chunk in range(chunks):
            low = np.uint64(lowest + CHUNK_BITS * chunk)
            row = thermometers[chunk * size + start : chunk * size + end].view(np.uint64)
            for j in range(count):
                row[j] ^= ~(_NOTHING << (mask[j] >> low & _LEVEL))
        if s.size:
            packed, words, selected = selectors[start >> 3 :], s[start:end], s_rho[start:end]
            for j in range(count):
                chosen[j] = packed[j >> 3] >> (7 - (j & 7)) & 1
            for j in range(count):
                words[j] = np.int64(chosen[j]) - words[j]
            for j in range(count):
                selected[j] = np.int64(mask[j] >> shift & (np.uint64(0) - chosen[j])) - selected[j]
            if s_mu.size:
                wraps = s_mu[start:end]
                for j in range(count):
                    wraps[j] = np.int64(mask[j] >> _TOP & chosen[j]) - wraps[j]
        if m.size:
            kept, drawn = m[start:end].view(np.uint64), mask_bits[start:end]
            for j in range(count):
                word = products[drawn[j] & used] | (mask[j] >> top & _ONE) << _TOP_BIT
                kept[j] ^= word | chosen[j] << _SELECTOR_BIT
