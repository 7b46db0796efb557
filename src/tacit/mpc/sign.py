"""Truncation, sign, comparison and ReLU, all on one opening of a masked value.

Let Z be a private word with |Z| < 2^62 and R a dealt uniform mask. The parties open Ẑ = Z + 2^62 + R, which is
uniform. Everything else follows from Ẑ and from dealt facts about R:

*Truncation.* Z + 2^62 has top bit 0, so the sum wrapped around exactly if msb(R) = 1 and msb(Ẑ) = 0. With ρ = R >> t
and μ = msb(R)·2^(64-t) dealt, [v] = (Ẑ >> t) - [ρ] + (1 - msb Ẑ)·[μ] - 2^(62-t) is Z / 2^t, rounded up or down.

*Sign.* On a window of bits, sign(Z) = ẑ_top ⊕ r_top ⊕ 1{ẑ_low < r_low}. The low part is cut into chunks of 6 bits. For
a chunk r_i the provider deals one 64-bit *thermometer word* whose bit j is 1{r_i ≥ j}; shifted right by the public
ẑ_i, its bit 0 is a share of r_i ≥ ẑ_i and its bit 1 of r_i > ẑ_i. No cipher, no communication.

*Combining.* With l_i = 1{r_i > ẑ_i} and e_i = 1{r_i = ẑ_i}, the borrow is l_4 ⊕ e_4 l_3 ⊕ e_4 e_3 l_2 ⊕ …. The parties
open the e's and l's under dealt mask bits, one byte an element; the borrow is then a XOR of dealt products of mask
bits, 45 in all, which fit one dealt word: ⟨borrow⟩ = parity(M & COEFFICIENTS[byte]) ⊕ CONSTANT[byte].

*Selection.* b·v for the bit b and the value v: with a dealt bit s and [s·ρ], [s·μ], the parties open d = b ⊕ s, and
b·v = d·[v] + (1 - 2d)·[s·v], where [s·v] is local from [s], [s·ρ], [s·μ] and Ẑ.

A linear layer, a truncation and a ReLU take four rounds in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from tacit.errors import InputError
from tacit.mpc.correlation import Correlation, Field, Part, Provider
from tacit.mpc.shares import Bits, Share
from tacit.mpc.steps import Open, Protocol, Role, Take
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.ring.integers import (
    WORD_BITS,
    bits_at,
    lookup,
    low_byte_after_shift,
    parity,
    shift_right,
    thermometer,
    top_bit,
)

CHUNK_BITS = 6
MAX_CHUNKS = 5
_OFFSET = 1 << 62
_SELECTOR_BIT = 62
_TOP_BIT = 61


@dataclass(frozen=True)
class Window:
    """The bits of a word in which a comparison takes place.

    Args:
        lowest: the lowest bit looked at; what lies below is ignored, so a value in (-2^lowest, 0) may count as 0.
        chunks: how many groups of 6 bits, 1 to 5. The sign is right for magnitudes below 2^(lowest + 6·chunks).

    Raises:
        InputError: the window does not fit the word.
    """

    lowest: int
    chunks: int = MAX_CHUNKS

    def __post_init__(self) -> None:
        if not (1 <= self.chunks <= MAX_CHUNKS and self.lowest >= 0 and self.top < WORD_BITS - 1):
            raise InputError(f"{self} does not fit a word: 1 to 5 chunks, and lowest + 6·chunks at most 62")

    @property
    def top(self) -> int:
        """The sign bit's position."""
        return self.lowest + CHUNK_BITS * self.chunks


@dataclass(frozen=True)
class Combiner:
    """The tables that turn an opened byte into a share of the borrow, for one number of chunks.

    Args:
        products: for each value of the mask byte, the word of products of mask bits that the provider deals. Its lowest
            bits are the mask bits themselves.
        coefficients: for each opened byte, which products XOR to the borrow.
        constant: for each opened byte, the public rest.
        width: how many bits of the byte are used.
    """

    products: Tensor
    coefficients: Tensor
    constant: Tensor
    width: int


@cache
def combiner(chunks: int) -> Combiner:
    """Build the tables from the borrow's polynomial; bits 0 to c-2 are e_{c-1}…e_1, the next are l_{c-2}…l_0."""
    equals = chunks - 1
    width = 2 * equals
    monomials = [frozenset({*range(length), equals + length - 1}) for length in range(1, chunks)]
    subsets = {frozenset({bit}): None for bit in range(width)}
    for monomial in monomials:
        for size in range(1, len(monomial) + 1):
            subsets.update(dict.fromkeys(map(frozenset, combinations(sorted(monomial), size))))
    order = list(subsets)
    products, coefficients, constant = [], [], []
    for byte in range(1 << width):
        ones = {bit for bit in range(width) if byte >> bit & 1}
        products.append(sum(1 << i for i, subset in enumerate(order) if subset <= ones))
        word = 0
        for i, subset in enumerate(order):
            containing = sum(subset <= monomial and monomial - subset <= ones for monomial in monomials)
            word |= (containing & 1) << i
        coefficients.append(word)
        constant.append(sum(monomial <= ones for monomial in monomials) & 1)
    return Combiner(
        torch.tensor(products), torch.tensor(coefficients), torch.tensor(constant, dtype=torch.uint8), width
    )


@dataclass(frozen=True)
class Mask(Correlation):
    """What the provider deals for one masked opening.

    Args:
        shape: of the value to open.
        drop: fractional bits to truncate, 0 to 62.
        window: where to compare, or ``None`` for truncation alone.
        select: whether the comparison's result will multiply the (truncated) value.
    """

    shape: tuple[int, ...]
    drop: int
    window: Window | None = None
    select: bool = False

    @property
    def fields(self) -> dict[str, Field]:
        """r, then ρ and μ, the thermometer words, the word M of mask-bit products, and s, s·ρ, s·μ where needed."""
        fields = {"r": Field(self.shape)}
        # A share of μ = bit·2^(64-t) is a share of the bit modulo 2^t, shifted: t bits are enough for it.
        wrap = Field(self.shape, _ring_of(self.drop), dealt=True)
        word = Field(self.shape, dealt=True)
        if self.drop:
            fields |= {"rho": word, "mu": wrap}
        if self.window:
            fields["thermometers"] = Field((self.window.chunks, *self.shape), dealt=True, xor=True)
            fields["m"] = Field(self.shape, dealt=True, xor=True)
        if self.select:
            fields |= {"s": word, "s_rho": word} | ({"s_mu": wrap} if self.drop else {})
        return fields

    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """The facts about R that `Opening` uses."""
        r = uniform.r
        dealt: dict[str, Tensor] = {}
        rho, msb = shift_right(r, self.drop), top_bit(r)
        if self.drop:
            dealt |= {"rho": rho, "mu": msb.to(_ring_of(self.drop))}
        if self.window:
            low, chunks = self.window.lowest, range(self.window.chunks)
            levels = (bits_at(r, low + CHUNK_BITS * i, CHUNK_BITS) for i in chunks)
            dealt["thermometers"] = torch.stack([thermometer(level) for level in levels])
            tables = combiner(self.window.chunks)
            mask_bits = torch.from_numpy(provider.prg.array(r.numel())).reshape(self.shape) & ((1 << tables.width) - 1)
            r_top = bits_at(r, self.window.top, 1)
            dealt["m"] = lookup(tables.products, mask_bits) | (r_top << _TOP_BIT)
        if self.select:
            selector = provider.prg.bits(self.shape).to(torch.int64)
            dealt["m"] |= selector << _SELECTOR_BIT
            dealt |= {"s": selector, "s_rho": selector * rho}
            if self.drop:
                dealt["s_mu"] = (selector & msb).to(_ring_of(self.drop))
        return dealt


def _ring_of(bits: int) -> torch.dtype:
    """The narrowest integer type that holds Z/2^bits."""
    return next(d for d in (torch.int8, torch.int16, torch.int32, torch.int64) if 8 * d.itemsize >= bits)


@dataclass(frozen=True, eq=False, repr=False)
class Opening:
    """An opened masked value Ẑ with what was dealt about its mask: one party's view.

    Args:
        opened: Ẑ = Z + 2^62 + R, public and uniform.
        part: this party's part of the `Mask`.
        mask: what was dealt.
        source: the share of Z that was opened.
    """

    opened: Tensor
    part: Part
    mask: Mask
    source: Share

    @property
    def _scale(self) -> int:
        return self.source.scale - self.mask.drop

    def _public(self) -> Tensor:
        """What alice adds: (Ẑ >> t) - 2^(62-t)."""
        return shift_right(self.opened, self.mask.drop) - (_OFFSET >> self.mask.drop)

    def _unmask(self, rho: Tensor, mu: Tensor | None) -> Tensor:
        """-ρ + (1 - msb Ẑ)·μ, for shares of ρ and μ (or of their products with s)."""
        if mu is None:
            return -rho
        wrapped = 1 - top_bit(self.opened)
        return (mu.to(torch.int64) << (WORD_BITS - self.mask.drop)) * wrapped - rho

    def value(self) -> Share:
        """Z / 2^drop as a share; local. See `truncate` for the error."""
        if not self.mask.drop:
            return self.source
        own = self.source.with_words(self._unmask(self.part.rho, self.part.mu), self._scale)
        return own.plus_public(self._public())

    def nonnegative(self) -> Protocol[Bits]:
        """The bit 1{Z ≥ 0} as an XOR share; one round of one byte an element. See `nonnegative` for its guarantee."""
        window, holder = self.mask.window, self.source.holder
        if window is None:
            raise InputError("this opening was dealt without a comparison window")
        tables = combiner(window.chunks)
        masked = self.opened - _OFFSET
        equals: list[Tensor] = []
        greater: list[Tensor] = []
        for i in reversed(range(window.chunks)):
            level = bits_at(masked, window.lowest + CHUNK_BITS * i, CHUNK_BITS)
            pair = low_byte_after_shift(self.part.thermometers[i], level)
            above = (pair >> 1) & 1
            greater.append(above)
            equals.append((pair & 1) ^ above)
        borrow = greater[0]
        if tables.width:
            byte = self.part.m.to(torch.uint8) & ((1 << tables.width) - 1)
            for bit, share in enumerate((*equals[:-1], *greater[1:])):
                byte = byte ^ (share << bit)
            (byte,) = yield Open(byte)
            borrow = borrow ^ parity(self.part.m & lookup(tables.coefficients, byte))
            if holder is Role.ALICE:
                borrow = borrow ^ lookup(tables.constant, byte)
        sign = borrow ^ bits_at(self.part.m, _TOP_BIT, 1).to(torch.uint8)
        if holder is Role.ALICE:
            sign = sign ^ bits_at(masked, window.top, 1).to(torch.uint8)
        return ~Bits(sign, holder)

    def times(self, bit: Bits) -> Protocol[Share]:
        """b·(Z / 2^drop) as a share; one round of one bit an element."""
        d = yield from self._open_under_selector(bit)
        part = self.part
        selected = part.s * self._public() + self._unmask(part.s_rho, getattr(part, "s_mu", None))
        value = self.value()
        return value.with_words(torch.where(d, value.words - selected, selected))

    def as_number(self, bit: Bits) -> Protocol[Share]:
        """The bit b as an arithmetic share of 0 or 1, scale 0; one round of one bit an element."""
        d = yield from self._open_under_selector(bit)
        own = self.source.with_words(torch.where(d, -self.part.s, self.part.s), scale=0)
        return own.plus_public(d.to(torch.int64))

    def _open_under_selector(self, bit: Bits) -> Protocol[Tensor]:
        selector = bits_at(self.part.m, _SELECTOR_BIT, 1).to(torch.uint8)
        opened: tuple[Tensor] = yield Open((bit.bits ^ selector).to(torch.bool))
        return opened[0]


def masked_opening(z: Share, drop: int = 0, window: Window | None = None, select: bool = False) -> Protocol[Opening]:
    """Open Z + 2^62 + R, the one opening on which truncation, sign and selection are built.

    Args:
        z: a share of Z with |Z| < 2^62.
        drop: fractional bits that `Opening.value` will drop.
        window: where `Opening.nonnegative` will compare.
        select: whether `Opening.times` or `Opening.as_number` will be used.

    Leakage: none; the opened word is uniform and independent of Z.
    Cost: one round, 8 bytes an element each way. Dealt to bob, bytes an element: 8 + t/8 to truncate (t rounded up to
        8, 16, 32 or 64 bits), 8·chunks + 8 to compare, 16 + t/8 to select.
    """
    mask = Mask(tuple(z.shape), drop, window, select)
    part = yield Take(mask)
    (opened,) = yield Open(z.plus_public(_OFFSET).words + part.r)
    return Opening(opened, part, mask, z)


def truncate(z: Share, scale: int = FRACTION_BITS) -> Protocol[Share]:
    """Drop fractional bits of a share.

    1. open Ẑ = Z + 2^62 + R; 2. [v] = (Ẑ >> t) - [ρ] + (1 - msb Ẑ)·[μ] - 2^(62-t), with t the bits to drop.

    Args:
        z: a share of Z, |Z| < 2^62.
        scale: the fractional bits to keep, at most z's.

    Returns:
        A share at ``scale``.

    Guarantees: v is floor(Z / 2^t) or one more: the error is below one unit in the last place, and there is never a
        wrap error. It is one more with probability (Z mod 2^t) / 2^t over the mask, so v is Z / 2^t on average. Which
        of the two it is depends on the public low bits of Ẑ: a party that sees both Ẑ and the result learns the
        rounding bit, hence something about Z mod 2^t.
    Leakage: none; Ẑ is uniform.
    Cost: one round, 8 bytes an element each way; 8 + t/8 bytes an element dealt, to bob.
    """
    if z.scale == scale:
        return z
    opening = yield from masked_opening(z, drop=z.scale - scale)
    return opening.value()


def comparison_window(scale: int, chunks: int = MAX_CHUNKS) -> Window:
    """The window for values at ``scale``: bits worth less than one unit at 16 fractional bits are not looked at."""
    return Window(max(0, scale - FRACTION_BITS), chunks)


def nonnegative(z: Share, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """1{Z ≥ 0} as an arithmetic share of 0 or 1.

    1. open Ẑ; 2. thermometer words give shares of e_i, l_i; 3. open them under mask bits, one byte; 4. ⟨sign⟩ =
    ẑ_top ⊕ r_top ⊕ borrow; 5. open it under a dealt bit s.

    Args:
        z: a share of Z, at any scale.
        chunks: the window's size; magnitudes must be below 2^(6·chunks) units of the window's lowest bit, that is below
            16,384 for 5 chunks.

    Returns:
        A share of 0 or 1, scale 0.

    Guarantees: exact at 16 fractional bits and below. At a higher scale a negative value closer to zero than 2^-16 may
        count as non-negative. A magnitude beyond the window gives a wrong bit.
    Leakage: none.
    Cost: 3 rounds; 9 bytes and 1 bit an element each way; 64 bytes an element dealt, to bob, for 5 chunks.
    """
    opening = yield from masked_opening(z, window=comparison_window(z.scale, chunks), select=True)
    bit = yield from opening.nonnegative()
    number: Share = yield from opening.as_number(bit)
    return number


def relu(z: Share, scale: int = FRACTION_BITS, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """max(Z, 0), truncated to ``scale`` on the way.

    1. open Ẑ; 2. and 3. ⟨b⟩ = 1{Z ≥ 0}, see `nonnegative`; 4. open d = b ⊕ s; 5. b·v = d·[v] + (1 - 2d)·[s·v].

    Args:
        z: a share of Z at ``scale`` or more fractional bits (as a product leaves it).
        scale: the fractional bits of the result.
        chunks: the window's size, see `nonnegative`.

    Returns:
        A share at ``scale``.

    Guarantees: the result is within one unit in the last place of max(Z, 0) / 2^t, for magnitudes inside the window.
    Leakage: none.
    Cost: 3 rounds; 9 bytes and 1 bit an element each way; 76 bytes an element dealt, to bob, for 5 chunks and t = 16.
    """
    drop = max(0, z.scale - scale)
    opening = yield from masked_opening(z, drop, comparison_window(z.scale, chunks), select=True)
    bit = yield from opening.nonnegative()
    result: Share = yield from opening.times(bit)
    return result


def maximum(x: Share, y: Share, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """The element-wise larger of two private tensors: y + 1{x - y ≥ 0}·(x - y).

    Args:
        x: a share.
        y: a share of the same shape.
        chunks: the window's size; it must hold x - y.

    Returns:
        A share at the larger of the two scales, exact up to what `nonnegative` says of near ties.

    Cost: 3 rounds; 9 bytes and 1 bit an element each way; 64 bytes an element dealt, to bob, for 5 chunks.
    """
    difference = x - y
    opening = yield from masked_opening(difference, 0, comparison_window(difference.scale, chunks), select=True)
    bit = yield from opening.nonnegative()
    gain: Share = yield from opening.times(bit)
    return y + gain
