"""Selection by bits that are known already: what a forward pass compared, its backward pass uses again.

ReLU and max-pooling find bits: is this element positive, does the left one win. Their gradients are the gradient that
arrives, let through by the same bits. `keep` opens d = b ⊕ s for a uniform bit s, which the provider remembers until
the end of the step; it costs one bit an element, in the round in which the forward pass opens one anyway. A gradient V
is later opened once, under a mask R, and the provider deals [s·ρ], [s·μ] for the *same* s (ρ and μ as in
`tacit.mpc.sign`). Then

    b·v = d·[v] + (1 - 2d)·[s·v]

is local, truncation included. Where several bits decide, as in a tournament of maxima, the provider deals products of
their s's, and the whole tournament is undone on one opening.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tacit.errors import CorrelationError
from tacit.mpc.correlation import Correlation, Field, Part, Provider
from tacit.mpc.phases import OFFSET
from tacit.mpc.pooling import Windows, filler
from tacit.mpc.shares import Bits, Share
from tacit.mpc.sign import MAX_CHUNKS, comparison_window, masked_opening, truncation_facts
from tacit.mpc.steps import Open, Protocol, Take, together
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.ring.integers import WORD_BITS, shift_right, top_bit


@dataclass(frozen=True)
class Gate:
    """One of the bits that a step keeps, by name: element ``position`` of the selectors ``selector``."""

    selector: str
    position: int = 0


@dataclass(frozen=True)
class Leaf:
    """Where a value that is let through arrives."""

    index: int


@dataclass(frozen=True)
class Match:
    """A branching: the value goes ``left`` where the gate's bit is 1, otherwise ``right``, or nowhere."""

    gate: Gate
    left: Tree
    right: Tree | None = None


Tree = Leaf | Match
Monomial = frozenset[Gate]
_ONE: Monomial = frozenset()


@dataclass(frozen=True, eq=False, repr=False)
class Kept:
    """The bits that a forward operator leaves for its gradient.

    Args:
        tree: how they decide.
        opened: d = b ⊕ s by selector, bool of shape ``(gates, *shape)``; public.
    """

    tree: Tree
    opened: Mapping[str, Tensor]


@dataclass(frozen=True)
class Selector(Correlation):
    """Uniform bits s under which bits are opened and kept; the provider remembers them until the next `Forget`.

    Args:
        name: unique among the operands and selectors of one step.
        shape: of the bits.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def fields(self) -> dict[str, Field]:
        """s, in the lowest bit of a byte."""
        return {"s": Field(self.shape, torch.int8, xor=True)}

    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """Remember s, to derive its products with masks of gradients."""
        provider.step_masks[self.name] = uniform.s & 1
        return {}


@dataclass(frozen=True)
class SelectionMask(Correlation):
    """What the provider deals to let one opened value through gates that it remembers.

    Args:
        shape: of the value.
        drop: fractional bits to truncate.
        monomials: the products of gates' s that are needed, each a tuple of gates; none is empty.
    """

    shape: tuple[int, ...]
    drop: int
    monomials: tuple[tuple[Gate, ...], ...]

    @property
    def fields(self) -> dict[str, Field]:
        """r, ρ = r >> t and μ = msb(r); for every monomial m its value s_m, and s_m·ρ and s_m·μ."""
        word, words = Field(self.shape, dealt=True), Field((len(self.monomials), *self.shape), dealt=True)
        fields = {"r": Field(self.shape), "s": words, "s_rho": words}
        for name, dtype in truncation_facts(self.drop).items():
            fields[name] = replace(word, dtype=dtype)
        if self.drop:
            fields["s_mu"] = replace(words, dtype=fields["mu"].dtype)
        return fields

    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """The products of the remembered bits with the facts about r."""
        rho, mu = shift_right(uniform.r, self.drop), top_bit(uniform.r)
        products = torch.ones((len(self.monomials), *self.shape), dtype=torch.int64)
        for product, monomial in zip(products, self.monomials, strict=True):
            for gate in monomial:
                if gate.selector not in provider.step_masks:
                    raise CorrelationError(
                        f"selector {gate.selector!r} is not kept: its step has ended, or never began"
                    )
                product *= provider.step_masks[gate.selector][gate.position]
        dealt = {"s": products, "s_rho": products * rho}
        if self.drop:
            narrow = truncation_facts(self.drop)["mu"]
            dealt |= {"rho": rho, "mu": mu.to(narrow), "s_mu": (products * mu).to(narrow)}
        return dealt


def keep(bit: Bits, name: str) -> Protocol[Tensor]:
    """Open bits under selectors that the provider remembers.

    Args:
        bit: XOR shares of b, of shape ``(gates, *shape)``.
        name: unique among the operands and selectors of one step.

    Returns:
        d = b ⊕ s, a public bool tensor.

    Leakage: none; d is uniform.
    Cost: one round of one bit an element; nothing dealt.
    """
    part = yield Take(Selector(name, tuple(bit.bits.shape)))
    opened: tuple[Tensor] = yield Open((bit.bits ^ (part.s & 1).to(torch.uint8)).to(torch.bool))
    return opened[0]


def select(v: Share, kept: Kept, scale: int = FRACTION_BITS) -> Protocol[list[Share]]:
    """Send a value down a tree of kept bits: to each leaf, the value times 1{the bits lead there}.

    1. open V̂ = V + 2^62 + R; 2. [v] as in `tacit.mpc.sign.truncate`, and [s_m·v] likewise for each monomial m;
    3. from the root down, [b·s_m·v] = d·[s_m·v] + (1 - 2d)·[s·s_m·v].

    Args:
        v: a share of V, |V| < 2^62; its shape is that of every gate.
        kept: what the forward operator left.
        scale: the fractional bits of the result, if they are fewer than v's.

    Returns:
        One share for each leaf, by index.

    Guarantees: below one unit in the last place of b·V / 2^t.
    Leakage: none; V̂ is uniform.
    Cost: one round, 8 bytes an element each way. Dealt to bob for k monomials, bytes an element: 16k, and to truncate
        (k + 1)·t/8 + 8 more, t rounded up to 8, 16, 32 or 64 bits. A ReLU has k = 1, pooling over 2×2 has k = 5.
    """
    drop, shape = max(0, v.scale - scale), tuple(v.shape)
    monomials = sorted(_monomials(kept.tree) - {_ONE}, key=_order)
    part = yield Take(SelectionMask(shape, drop, tuple(tuple(sorted(m, key=_gate_order)) for m in monomials)))
    (opened,) = yield Open(v.plus_public(OFFSET).words + part.r)
    public = shift_right(opened, drop) - (OFFSET >> drop)
    value, selected = v, part.s * public - part.s_rho
    if drop:
        wrapped = (1 - top_bit(opened)) << (WORD_BITS - drop)
        value = v.with_words(part.mu * wrapped - part.rho, v.scale - drop).plus_public(public)
        selected += part.s_mu * wrapped
    leaves = _descend(kept.tree, {_ONE: value.words, **dict(zip(monomials, selected, strict=True))}, kept.opened)
    return [value.with_words(leaves[index]) for index in sorted(leaves)]


def relu(z: Share, name: str, scale: int = FRACTION_BITS, chunks: int = MAX_CHUNKS) -> Protocol[tuple[Share, Kept]]:
    """`tacit.mpc.sign.relu` that keeps its bit under selector ``name``; one bit an element more."""
    drop = max(0, z.scale - scale)
    opening = yield from masked_opening(z, drop, comparison_window(z.scale, chunks), select=True)
    bit = yield from opening.nonnegative()
    outcome: list[Any] = yield from together(opening.times(bit), keep(_stacked(bit), name))
    value, opened = outcome
    return value, Kept(Match(Gate(name), Leaf(0)), {name: opened})


def max_pool(x: Share, windows: Windows, name: str, chunks: int = MAX_CHUNKS) -> Protocol[tuple[Share, Kept]]:
    """`tacit.mpc.pooling.max_pool` by a tournament that keeps its bits.

    Level i of the tournament takes the selector ``name/i``; w - 1 bits a window of w elements more.
    """
    elements = windows.elements(x.words, filler(x))
    players: list[tuple[Tensor, Tree]] = [(view, Leaf(index)) for index, view in enumerate(elements)]
    gates: dict[str, Tensor] = {}
    while len(players) > 1:
        level, half = f"{name}/{len(gates)}", len(players) // 2
        left, right = (
            x.with_words(torch.stack([w for w, _ in side])) for side in (players[:half], players[half:][:half])
        )
        difference = left - right
        opening = yield from masked_opening(difference, 0, comparison_window(x.scale, chunks), select=True)
        bit = yield from opening.nonnegative()
        outcome: list[Any] = yield from together(opening.times(bit), keep(bit, level))
        gain, gates[level] = outcome
        winners = (right + gain).words
        players = [
            (winners[i], Match(Gate(level, i), players[i][1], players[half + i][1])) for i in range(half)
        ] + players[2 * half :]
    return x.with_words(players[0][0]), Kept(players[0][1], gates)


def _stacked(bit: Bits) -> Bits:
    return Bits(bit.bits.unsqueeze(0), bit.holder)


def _monomials(tree: Tree) -> frozenset[Monomial]:
    """The products of s that `_descend` needs."""
    if isinstance(tree, Leaf):
        return frozenset({_ONE})
    below = _monomials(tree.left) | (_monomials(tree.right) if tree.right else frozenset())
    return below | {monomial | {tree.gate} for monomial in below}


def _descend(tree: Tree, table: Mapping[Monomial, Tensor], opened: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Shares at the leaves, from shares of s_m·v for every monomial m of the tree."""
    if isinstance(tree, Leaf):
        return {tree.index: table[_ONE]}
    d = opened[tree.gate.selector][tree.gate.position]
    passed = {}
    for monomial in _monomials(tree):
        if tree.gate not in monomial:
            whole, selected = table[monomial], table[monomial | {tree.gate}]
            passed[monomial] = torch.where(d, whole - selected, selected)
    leaves = _descend(tree.left, passed, opened)
    if tree.right:
        rest = {monomial: table[monomial] - value for monomial, value in passed.items()}
        leaves |= _descend(tree.right, rest, opened)
    return leaves


def _gate_order(gate: Gate) -> tuple[str, int]:
    return gate.selector, gate.position


def _order(monomial: Monomial) -> list[tuple[str, int]]:
    return sorted(map(_gate_order, monomial))
