"""Truncation, comparison, ReLU and maximum without the last unit of error: the borrow of the low bits, computed.

`tacit.mpc.sign` leaves out what happens below the lowest bit kept or compared. With Ẑ = Z + 2^62 + R opened as there,
q that bit, and c = 1{Ẑ mod 2^q < R mod 2^q} the *borrow* of the low bits, what it finds is v = floor(Z / 2^q) + c. Here
c is computed as well, by one more comparison of the same kind on the q low bits, whose thermometer words are dealt
about the same R. Its byte travels with the others.

*Truncation.* floor(Z / 2^q) = v - c; c becomes a number by opening k = c ⊕ s' under a dealt bit s'.

*ReLU.* Let x = 1{v ≥ 1}: the comparison with one unit subtracted from the public Ẑ. Where v is 0, Z / 2^q rounds
down to 0 or -1 and the result is 0; elsewhere x is the sign. So max(0, floor(Z / 2^q)) = x·(v - c) = x·v - x·c, and
with s, s' and s·s' dealt, x·v and x·c are local once d = x ⊕ s and k = c ⊕ s' are open: no round more than without.

*Sign.* 1{Z ≥ 0} is 1{v ≥ 1} where c is 1, and 1{v ≥ 0} where it is 0. Both come from one set of thermometer words, read
at two public places; choosing between them by the shared bit c is one product of bits, which costs one round more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tacit.errors import InputError
from tacit.mpc import phases
from tacit.mpc.correlation import Correlation, Field, Part, Provider
from tacit.mpc.phases import CHUNK_BITS, FACTOR_BIT, OFFSET, PRODUCT_BIT, SELECTOR_BIT
from tacit.mpc.shares import Bits, Share
from tacit.mpc.sign import (
    MAX_CHUNKS,
    Mask,
    Opening,
    Window,
    compared,
    comparison_facts,
    comparison_window,
    fresh_products,
    masked_opening,
    opened_under,
)
from tacit.mpc.steps import Open, Protocol, Role, together
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.ring.integers import bits_at

MAX_LOW_BITS = CHUNK_BITS * MAX_CHUNKS
"""How many low bits one comparison takes."""


@dataclass(frozen=True)
class ExactMask(Mask):
    """A `Mask` with what it takes to find the borrow of the low bits: those dropped, or else those below the window.

    Raises:
        InputError: there are no low bits, or more than 30; or bits are dropped that are not those below the window.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.low <= MAX_LOW_BITS or (self.drop and self.window and self.window.lowest != self.drop):
            raise InputError(
                f"{self}: exact are 1 to {MAX_LOW_BITS} low bits, dropped ones being those below the window"
            )

    @property
    def low(self) -> int:
        """How many low bits there are."""
        return self.drop or (self.window.lowest if self.window else 0)

    @property
    def low_window(self) -> Window:
        """Where they are compared, once `aligned`."""
        return Window(0, -(-self.low // CHUNK_BITS))

    def aligned(self, words: Tensor) -> Tensor:
        """The low bits of words, moved up to fill the chunks of `low_window`, of which the lowest may be narrower."""
        return bits_at(words, 0, self.low) << (self.low_window.top - self.low)

    @property
    def fields(self) -> dict[str, Field]:
        """As in `Mask`; thermometer words and M' of the low bits; s' and s·s' to truncate, a second M to compare."""
        word, bits = Field(self.shape, dealt=True), Field(self.shape, dealt=True, xor=True)
        fields = super().fields
        fields["low_thermometers"] = Field((self.low_window.chunks, *self.shape), dealt=True, xor=True)
        fields["low_m"] = bits
        if not self.drop:
            return fields | {"above_m": bits}
        return fields | {"low_s": word} | ({"both": word} if self.select else {})

    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """The same facts about R as for a `Mask`, and about its low bits; s' or the factors' masks lie in M'."""
        dealt = super().derive(uniform, provider)
        facts = comparison_facts(self.aligned(uniform.r), self.low_window, provider)
        dealt |= {"low_thermometers": facts["thermometers"], "low_m": facts["m"]}
        selector = provider.prg.bits(self.shape).to(torch.int64)
        dealt["low_m"] |= selector << SELECTOR_BIT
        if self.drop:
            return dealt | {"low_s": selector} | ({"both": dealt["s"] * selector} if self.select else {})
        factor = provider.prg.bits(self.shape).to(torch.int64)
        dealt["low_m"] |= (factor << FACTOR_BIT) | ((factor & selector) << PRODUCT_BIT)
        return dealt | {"above_m": fresh_products(uniform.r, self.window, provider)}  # type: ignore[arg-type]

    def correct(self, alice: Part, bob: Part, provider: Provider) -> dict[str, Tensor]:
        """By `derive`: the compiled loop of `Mask` does not know the low bits."""
        return Correlation.correct(self, alice, bob, provider)


def truncate(z: Share, scale: int = FRACTION_BITS) -> Protocol[Share]:
    """Drop fractional bits of a share, rounding down.

    1. open Ẑ = Z + 2^62 + R; 2. open the byte that gives ⟨c⟩; 3. open k = c ⊕ s'; floor(Z / 2^t) = [v] - [c].

    Args:
        z: a share of Z, |Z| < 2^62.
        scale: the fractional bits to keep, at most z's.

    Returns:
        A share of floor(Z / 2^t) at ``scale``, with t the bits dropped.

    Guarantees: exact, whatever the mask. Nothing public depends on how a value was rounded.
    Leakage: none; all that is opened is uniform.
    Cost: 3 rounds (2 for t ≤ 6); 9 bytes and 1 bit an element each way; 24 + t/8 + 8·ceil(t / 6) bytes an element
        dealt, to bob, t/8 rounded up to 1, 2 or 4: 50 for t = 16. More than 30 bits are dropped in several such steps.
    """
    z = yield from _near(z, scale)
    if z.scale == scale:
        return z
    mask = ExactMask(tuple(z.shape), z.scale - scale)
    opening = yield from opened_under(mask, z)
    borrow = yield from _borrow(opening, mask)
    (k,) = yield Open(phases.under_selector(borrow, opening.part.low_m))
    floor = opening.value()
    one = k.to(torch.int64)
    carried = floor.with_words((1 - 2 * one) * opening.part.low_s).plus_public(one)
    return floor - carried


def relu(z: Share, scale: int = FRACTION_BITS, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """max(0, floor(Z / 2^t)), where t bits are dropped to come to ``scale``.

    1. open Ẑ; 2. open the bytes that give ⟨x⟩ = ⟨v ≥ 1⟩ and ⟨c⟩; 3. open d = x ⊕ s and k = c ⊕ s'; x·v - x·c is local.

    Args:
        z: a share of Z at ``scale`` or more fractional bits.
        scale: the fractional bits of the result.
        chunks: the window's size, in units of the result's last place.

    Returns:
        A share at ``scale``.

    Guarantees: exact for 2^t - 2^top ≤ Z < 2^top, with top = t + 6·chunks. Beyond, a positive value may give 0, and a
        negative one itself.
    Leakage: none.
    Cost: 3 rounds; 10 bytes and 2 bits an element each way; 8·ceil(t / 6) + 24 bytes an element dealt, to bob, more
        than for `tacit.mpc.sign.relu`: 124 for 5 chunks and t = 16.
    """
    z = yield from _near(z, scale)
    drop = max(0, z.scale - scale)
    window = Window(drop, chunks)
    if not drop:
        opening = yield from masked_opening(z, window=window, select=True)
        whole: Share = yield from opening.times((yield from opening.nonnegative()))
        return whole
    mask = ExactMask(tuple(z.shape), drop, window, select=True)
    opening = yield from opened_under(mask, z)
    part = opening.part
    positive, borrow = yield from together(_above(opening, window, part.m), _borrow(opening, mask))
    d, k = yield Open(phases.under_selector(positive, part.m), phases.under_selector(borrow, part.low_m))
    value, x, c = opening.selected(d), d.to(torch.int64), k.to(torch.int64)
    # x·c = (x + (1 - 2x)·s)·(c + (1 - 2c)·s'), with what is open in the place of x and c.
    own = c * (1 - 2 * x) * part.s + x * (1 - 2 * c) * part.low_s + (1 - 2 * x) * (1 - 2 * c) * part.both
    return value - value.with_words(own).plus_public(x * c)


def nonnegative(z: Share, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """1{Z ≥ 0} as an arithmetic share of 0 or 1, at any scale.

    1. open Ẑ; 2. open the bytes that give ⟨v ≥ 0⟩, ⟨v ≥ 1⟩ and ⟨c⟩; 3. open the two factors of
    c·(1{v ≥ 0} ⊕ 1{v ≥ 1}) under dealt bits; 4. open the sign under a dealt bit s.

    Args:
        z: a share of Z.
        chunks: the window's size: values from -16,384 up to, but not including, 16,384 for 5 chunks.

    Returns:
        A share of 0 or 1, scale 0.

    Guarantees: exact for -2^top ≤ Z < 2^top, see `tacit.mpc.sign.Window`; the bit is wrong beyond.
    Leakage: none.
    Cost: 4 rounds; 11 bytes and 3 bits an element each way; 8·ceil(q / 6) + 16 bytes an element dealt, to bob, more
        than for `tacit.mpc.sign.nonnegative`, for q = (fractional bits) - 16: 104 for 5 chunks and q = 16. At 16
        fractional bits and fewer it is that protocol.
    """
    z = yield from _near(z, FRACTION_BITS)
    opening, bit = yield from _sign(z, chunks)
    number: Share = yield from opening.as_number(bit)
    return number


def maximum(x: Share, y: Share, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """The element-wise larger of two private tensors: y + 1{x - y ≥ 0}·(x - y).

    Args:
        x: a share, at 46 fractional bits or fewer.
        y: a share of the same shape, likewise.
        chunks: the window's size; it must hold x - y.

    Returns:
        A share at the larger of the two scales: exactly the larger.

    Cost: as `nonnegative`.
    Raises:
        InputError: there are more than 46 fractional bits: truncate first.
    """
    scale = max(x.scale, y.scale)
    opening, bit = yield from _sign(x.raised(scale) - y.raised(scale), chunks)
    gain: Share = yield from opening.times(bit)
    return y + gain


def _sign(z: Share, chunks: int) -> Protocol[tuple[Opening, Bits]]:
    """An opening that selects, and the exact bit 1{Z ≥ 0}."""
    window, alice = comparison_window(z.scale, chunks), z.holder is Role.ALICE
    if not window.lowest:
        opening = yield from masked_opening(z, window=window, select=True)
        return opening, (yield from opening.nonnegative())
    mask = ExactMask(tuple(z.shape), 0, window, select=True)
    opening = yield from opened_under(mask, z)
    part = opening.part
    at_least, above, borrow = yield from together(
        compared(opening.opened, part.thermometers, part.m, window, alice),
        _above(opening, window, part.above_m),
        _borrow(opening, mask),
    )
    differ = at_least ^ above
    e, c = yield Open((differ ^ _bit(part.low_m, FACTOR_BIT)).to(torch.bool), phases.under_selector(borrow, part.low_m))
    # (e ⊕ factor)·(c ⊕ selector), with what is open in the place of e and c.
    both = _bit(part.low_m, PRODUCT_BIT) ^ (e & _bit(part.low_m, SELECTOR_BIT)) ^ (c & _bit(part.low_m, FACTOR_BIT))
    return opening, Bits(at_least ^ both ^ (e & c if alice else 0), z.holder)


def _above(opening: Opening, window: Window, m: Tensor) -> Protocol[Tensor]:
    """The share of 1{v ≥ 1}, where v is floor(Z / 2^lowest) or one more."""
    lowered = opening.opened - (1 << window.lowest)
    return compared(lowered, opening.part.thermometers, m, window, opening.source.holder is Role.ALICE)


def _borrow(opening: Opening, mask: ExactMask) -> Protocol[Tensor]:
    """The share of 1{Ẑ mod 2^q < R mod 2^q}; one round of one byte."""
    part, alice = opening.part, opening.source.holder is Role.ALICE
    # `compared` expects an opening's offset, which has no part in the low bits.
    low = mask.aligned(opening.opened) + OFFSET
    no_borrow = yield from compared(low, part.low_thermometers, part.low_m, mask.low_window, alice)
    return no_borrow ^ int(alice)


def _bit(m: Tensor, position: int) -> Tensor:
    return bits_at(m, position, 1).to(torch.uint8)


def _near(z: Share, scale: int) -> Protocol[Share]:
    """Z at no more fractional bits than can be dropped at once: rounding down in two steps is rounding down."""
    return (yield from truncate(z, scale + MAX_LOW_BITS)) if z.scale - scale > MAX_LOW_BITS else z
