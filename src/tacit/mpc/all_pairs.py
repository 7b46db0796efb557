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

import torch
from torch import Tensor

from tacit.errors import InputError
from tacit.mpc import phases
from tacit.mpc.correlation import Correlation, Field, Part, Provider
from tacit.mpc.phases import OFFSET, SELECTOR_BIT
from tacit.mpc.shares import Share
from tacit.mpc.sign import MAX_CHUNKS, Window, combiner, comparison_facts, comparison_window, truncation_facts
from tacit.mpc.steps import Open, Protocol, Role, Take
from tacit.ring.integers import lookup, parity, shift_right, top_bit

MAX_VALUES = 4
"""With zero, four values make ten pairs, whose 54 products of mask bits and four selectors just fit one word."""

Pair = tuple[int, int | None]


def pairs_of(count: int, rectify: bool) -> list[Pair]:
    """The comparisons: i against each later j, and, to rectify, against zero (``None``)."""
    pairs: list[Pair] = list(combinations(range(count), 2))
    return pairs + ([(i, None) for i in range(count)] if rectify else [])


def _differences(values: Tensor, pairs: list[Pair], zero: int) -> Tensor:
    """``values[i] - values[j]`` for every pair, stacked; ``zero`` is what stands for zero."""
    rows = torch.cat([values, torch.full_like(values[:1], zero)])
    left = torch.tensor([i for i, _ in pairs], device=values.device)
    right = torch.tensor([len(values) if j is None else j for _, j in pairs], device=values.device)
    return rows.index_select(0, left).sub_(rows.index_select(0, right))


def _positions(like: Tensor, lowest: int, count: int) -> Tensor:
    """Numbers from ``lowest`` up along a new first dimension."""
    return torch.arange(lowest, lowest + count, device=like.device).view(count, *[1] * like.dim())


def _bits(words: Tensor, lowest: int, count: int) -> Tensor:
    """Bits of each word from bit ``lowest`` up, stacked along a new first dimension, as uint8."""
    return (words >> _positions(words, lowest, count)).bitwise_and_(1).to(torch.uint8)


def _packed(bits: Tensor) -> Tensor:
    """Bits stacked along the first dimension as one int64: the first is bit 0."""
    return (bits.to(torch.int64) << _positions(bits[0], 0, len(bits))).sum(0)


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
        count, *rest = self.shape
        pairs = pairs_of(count, self.rectify)
        rho, mu = shift_right(uniform.r, self.drop), top_bit(uniform.r)
        masks = _differences(shift_right(uniform.r, self.lowest), pairs, 0)
        facts = comparison_facts(masks, Window(0, self.chunks), provider)
        s = provider.prg.bits(self.shape).to(torch.int64)
        mask_bits = _packed(provider.prg.bits((len(pairs), *rest)))
        h = lookup(winner(count, self.rectify).products, mask_bits) | (_packed(s) << (SELECTOR_BIT + 1 - count))
        dealt = facts | {"s": s, "s_rho": s * rho, "h": h}
        if self.drop:
            narrow = truncation_facts(self.drop)["mu"]
            dealt |= {"rho": rho, "mu": mu.to(narrow), "s_mu": (s & mu).to(narrow)}
        return dealt


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
    alice, pairs = z.holder is Role.ALICE, pairs_of(count, rectify)
    (opened,) = yield Open(phases.mask(z.words, part.r, alice))
    bits = yield from _compare(opened, part, mask, pairs, alice)
    (seen,) = yield Open((bits ^ _bits(part.h, 0, len(pairs))).to(torch.bool))
    tables, index = winner(count, rectify), _packed(seen)
    entries = index + (_positions(index, 0, count) << len(pairs))
    picks = parity(part.h & lookup(tables.coefficients.view(-1), entries))
    picks = picks ^ lookup(tables.constant.view(-1), entries) if alice else picks
    (d,) = yield Open((picks ^ _bits(part.h, SELECTOR_BIT + 1 - count, count)).to(torch.bool))
    if drop:
        facts = (part.rho, part.mu, part.s, part.s_rho, part.s_mu)
        words = phases.selected(d, opened, facts, drop, alice)
    else:
        words = phases.selected_whole(d, opened, z.words, (part.s, part.s_rho))
    return z.with_words(words.sum(0), z.scale - drop)


def _compare(opened: Tensor, part: Part, mask: PairwiseMask, pairs: list[Pair], alice: bool) -> Protocol[Tensor]:
    """Shares of 1{Z_i ≥ Z_j} for every pair, from one opened byte each."""
    # `compare` expects an opening's offset, which has cancelled in the differences.
    differences = _differences(shift_right(opened, mask.lowest), pairs, OFFSET >> mask.lowest).add_(OFFSET)
    byte, rest = phases.compare(differences, part.thermometers, part.m, 0, mask.chunks, alice)
    if mask.chunks == 1:
        return rest
    (byte,) = yield Open(byte)
    tables = combiner(mask.chunks)
    return phases.resolve(byte, rest, part.m, tables.coefficients, tables.constant, alice)
