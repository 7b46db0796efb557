"""The largest of a few private values in four rounds, however many there are: every pair compared at once.

The values are opened once under their own masks, Ẑ_i = Z_i + 2^62 + R_i. With q the lowest bit that a comparison looks
at, (Ẑ_i >> q) - (R_i >> q) is Z_i in units of 2^q, rounded up or down, the same way in every comparison: there is
always exactly one largest. A difference of two such words is itself an opening masked by a difference of masks, so all
pairs are compared with nothing more to open than one byte a pair (see `tacit.mpc.sign`). Value i is the largest if it
wins all its comparisons: a product of bits, whose share again follows from opened masked bits and dealt products of
the mask bits. One selection then picks it.

With `rectify`, zero takes part, and the result is max(0, largest): a ReLU that costs no round of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from tacit.errors import InputError
from tacit.mpc import phases
from tacit.mpc.correlation import Correlation, Field, Part, Provider
from tacit.mpc.pairs import compare_pairs, differences, packed, pairs_of, under_masks, winners
from tacit.mpc.phases import SELECTOR_BIT
from tacit.mpc.shares import Share
from tacit.mpc.sign import (
    MAX_CHUNKS,
    Window,
    combiner,
    comparison_facts,
    comparison_window,
    correct_facts,
    truncation_facts,
)
from tacit.mpc.steps import Open, Protocol, Role, Take
from tacit.ring.integers import lookup, shift_right, top_bit

MAX_VALUES = 4
"""With zero, four values make ten pairs, whose 54 products of mask bits and four selectors just fit one word."""


@dataclass(frozen=True)
class Winner:
    """The tables that turn opened bits into a share of "value i wins all its comparisons".

    Args:
        products: for each value of the mask bits, the word of their products that the provider deals; the mask bits
            themselves are its lowest.
        coefficients: for each i and each value of the opened bits, which products XOR to the answer.
        constant: for each i and each value of the opened bits, the public rest.
    """

    products: Tensor
    coefficients: Tensor
    constant: Tensor


@cache
def winner(count: int, rectify: bool) -> Winner:
    """Build the tables: value i wins if its own comparisons are 1 and those of earlier values against it are 0."""
    pairs = pairs_of(count, rectify)
    literals = [{p: i == j for p, (j, k) in enumerate(pairs) if i in (j, k)} for i in range(count)]
    subsets = {frozenset({p}): None for p in range(len(pairs))}
    for own in literals:
        for size in range(2, len(own) + 1):
            subsets.update(dict.fromkeys(map(frozenset, combinations(sorted(own), size))))
    order = list(subsets)
    if len(order) + count > SELECTOR_BIT + 1:
        raise InputError(f"{count} values need {len(order)} products of mask bits: more than a word holds")
    opened = torch.arange(1 << len(pairs))
    bits = torch.stack([(opened >> p) & 1 for p in range(len(pairs))])
    products = sum(
        (bits[sorted(subset)].prod(0) << n for n, subset in enumerate(order)), start=torch.zeros_like(opened)
    )
    coefficients, constant = [], []
    for own in literals:
        # A literal is mask ⊕ v, with v the opened bit, or its negation.
        v = {p: bits[p] if positive else 1 - bits[p] for p, positive in own.items()}

        def rest(of: frozenset[int], v: dict[int, Tensor] = v) -> Tensor:
            return torch.stack([v[p] for p in v if p not in of] or [torch.ones_like(opened)]).prod(0)

        inside = [(n, subset) for n, subset in enumerate(order) if subset <= own.keys()]
        coefficients.append(sum((rest(subset) << n for n, subset in inside), start=torch.zeros_like(opened)))
        constant.append(rest(frozenset()).to(torch.uint8))
    return Winner(products, torch.stack(coefficients), torch.stack(constant))


@dataclass(frozen=True)
class PairwiseMask(Correlation):
    """What the provider deals for finding the largest of a few values.

    Args:
        shape: ``(values, ...)``.
        drop: fractional bits to truncate.
        lowest: the lowest bit that comparisons look at.
        chunks: the size of their window.
        rectify: whether zero takes part.
    """

    shape: tuple[int, ...]
    drop: int
    lowest: int
    chunks: int
    rectify: bool

    @property
    def fields(self) -> dict[str, Field]:
        """r; ρ and μ to truncate; thermometer words and M for every pair; s, s·ρ, s·μ; and the word of products."""
        pairs = len(pairs_of(self.shape[0], self.rectify))
        word = Field(self.shape, dealt=True)
        truncation = {name: Field(self.shape, d, dealt=True) for name, d in truncation_facts(self.drop).items()}
        return {
            "r": Field(self.shape),
            **truncation,
            "thermometers": Field((self.chunks, pairs, *self.shape[1:]), dealt=True, xor=True),
            "m": Field((pairs, *self.shape[1:]), dealt=True, xor=True),
            "s": word,
            "s_rho": word,
            **{f"s_{name}": item for name, item in truncation.items() if name == "mu"},
            "h": Field(self.shape[1:], dealt=True, xor=True),
        }

    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """Facts about R_i, about R_i - R_j, and products of fresh mask bits."""
        rho, mu = shift_right(uniform.r, self.drop), top_bit(uniform.r)
        facts = comparison_facts(self._masks(uniform.r), Window(0, self.chunks), provider)
        s = provider.prg.bits(self.shape).to(torch.int64)
        dealt = facts | {"s": s, "s_rho": s * rho, "h": self._products(s, provider)}
        if self.drop:
            narrow = truncation_facts(self.drop)["mu"]
            dealt |= {"rho": rho, "mu": mu.to(narrow), "s_mu": (s & mu).to(narrow)}
        return dealt

    def correct(self, alice: Part, bob: Part, provider: Provider) -> dict[str, Tensor]:
        """What `derive` says, in two passes that leave alice's expansions overwritten with the corrections."""
        loops = phases.loops_for(alice.r)
        if loops is None:
            return super().correct(alice, bob, provider)
        dealt = {name: value for name, value in vars(alice).items() if name != "r"}
        about_pairs = {name: dealt[name] for name in ("thermometers", "m")}
        about_values = {name: dealt[name] for name in dealt.keys() - about_pairs.keys()}
        masks, window = self._masks(alice.r + bob.r), Window(0, self.chunks)
        correct_facts(loops, masks, torch.zeros_like(masks), about_pairs, 0, window, False, provider)
        selectors = correct_facts(loops, alice.r, bob.r, about_values, self.drop, None, True, provider)
        bits = torch.from_numpy(np.unpackbits(selectors, count=alice.r.numel())).view(self.shape)
        alice.h.bitwise_xor_(self._products(bits, provider))
        return dealt

    def _masks(self, r: Tensor) -> Tensor:
        """What hides each pair's difference."""
        return differences(shift_right(r, self.lowest), self.rectify, 0)

    def _products(self, s: Tensor, provider: Provider) -> Tensor:
        """H: products of fresh mask bits, and the selectors above them."""
        count, *rest = self.shape
        products = winner(count, self.rectify).products
        mask_bits = provider.prg.words(tuple(rest)) & (len(products) - 1)
        return lookup(products, mask_bits) | (packed(s) << (SELECTOR_BIT + 1 - count))


def largest(z: Share, rectify: bool, scale: int | None = None, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """The largest along the first dimension, of at most four values; with ``rectify``, max(0, largest).

    1. open all Ẑ_i; 2. compare all pairs, opening one byte each; 3. open the results under mask bits, and take shares
    of o_i = 1{value i wins}; 4. open d_i = o_i ⊕ s_i, and select Σ o_i·v_i as in `tacit.mpc.sign`.

    Args:
        z: a share of shape ``(values, ...)``, 2 to 4 values.
        rectify: whether zero takes part.
        scale: truncate to so many fractional bits on the way; not at all if not given.
        chunks: the comparison window's size; it must hold every difference.

    Returns:
        A share of shape ``(...)``.

    Guarantees: within two units of 16 fractional bits of max(0, largest) or the largest.
    Leakage: none.
    Cost: 4 rounds. For 4 values with zero, an element of the result costs 45 bytes each way and 600 bytes dealt, to
        bob.
    """
    count = z.shape[0]
    if not 2 <= count <= MAX_VALUES:
        raise InputError(f"all pairs of {count} values: 2 to {MAX_VALUES} fit a word, use a tournament for more")
    drop = 0 if scale is None else max(0, z.scale - scale)
    mask = PairwiseMask(tuple(z.shape), drop, comparison_window(z.scale, chunks).lowest, chunks, rectify)
    part = yield Take(mask)
    alice, tables = z.holder is Role.ALICE, winner(count, rectify)
    (opened,) = yield Open(phases.mask(z.words, part.r, alice))
    bits = yield from _compare(opened, part, mask, alice)
    (seen,) = yield Open(under_masks(bits, part.h, 0))
    won = winners(seen, part.h, tables.coefficients, tables.constant, alice)
    (d,) = yield Open(under_masks(won, part.h, SELECTOR_BIT + 1 - count))
    if drop:
        facts = (part.rho, part.mu, part.s, part.s_rho, part.s_mu)
        words = phases.selected(d, opened, facts, drop, alice)
    else:
        words = phases.selected_whole(d, opened, z.words, (part.s, part.s_rho))
    return z.with_words(words.sum(0), z.scale - drop)


def _compare(opened: Tensor, part: Part, mask: PairwiseMask, alice: bool) -> Protocol[Tensor]:
    """Shares of 1{Z_i ≥ Z_j} for every pair, from one opened byte each."""
    byte, rest = compare_pairs(opened, part.thermometers, part.m, mask.rectify, mask.lowest, mask.chunks, alice)
    if mask.chunks == 1:
        return rest
    (byte,) = yield Open(byte)
    tables = combiner(mask.chunks)
    return phases.resolve(byte, rest, part.m, tables.coefficients, tables.constant, alice)
