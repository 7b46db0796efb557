"""What lowerings share: the kinds of operands, and products, sums and scalings of any mix of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tacit.errors import UnsupportedOperator
from tacit.mpc import exact, linear, sign
from tacit.mpc.linear import Bilinear, Multiply, Swapped, Weight
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol
from tacit.program.network import Network
from tacit.ring.fixed_point import FRACTION_BITS, encode

Operand = Share | Weight
"""A private tensor. Plain tensors and numbers among a lowering's arguments are public."""
Public = Tensor | float | int | bool
MAX_FACTOR_SCALE = FRACTION_BITS + 8
MAX_SCALE = 2 * FRACTION_BITS + 8
MINUS_INFINITY = -8192.0
"""What stands for minus infinity where it is added or selected, as attention masks do: e to that is 0 anyway."""


@dataclass(frozen=True)
class Context:
    """The engine's settings for one program.

    Args:
        chunks: the size of every comparison window, in groups of 6 bits; 5 compare magnitudes up to 16,384.
        network: the link to plan for; where an operator can be had for fewer rounds or for fewer bytes, it decides.
            Without one, the fewest bytes and the least computing.
        exact: whether truncations round down and comparisons see every bit, at the cost that `tacit.mpc.exact` states:
            none for a ReLU in rounds, one more for a comparison, two for a truncation alone. Functions that are
            approximated stay so.
        windows: for operators by name, a size of their comparison window in the place of ``chunks``; found by
            `tacit.program.calibrate`, which says what happens to a value outside.
        finer: for operators by name, how many fractional bits more than 16 (fewer, if negative) their results and
            their windows have; found there too.
        extra: that number for the operator at hand.
    """

    chunks: int = sign.MAX_CHUNKS
    network: Network | None = None
    exact: bool = False
    windows: Mapping[str, int] = field(default_factory=dict)
    finer: Mapping[str, int] = field(default_factory=dict)
    extra: int = 0

    def at(self, name: str) -> Context:
        """The settings for the operator of this name."""
        if name not in self.windows and name not in self.finer:
            return self
        return replace(self, chunks=self.windows.get(name, self.chunks), extra=self.finer.get(name, 0))

    def zoomed(self, x: Share) -> Share:
        """x taken for 2^extra times as much: what keeps 16 fractional bits of it keeps ``extra`` more of x; local."""
        return x.with_words(x.words, x.scale - self.extra) if self.extra else x

    def unzoomed(self, x: Share) -> Share:
        """The opposite of `zoomed`."""
        return x.with_words(x.words, x.scale + self.extra) if self.extra else x

    def truncate(self, x: Share, scale: int = FRACTION_BITS) -> Protocol[Share]:
        """Drop fractional bits."""
        return exact.truncate(x, scale) if self.exact else sign.truncate(x, scale)

    def relu(self, x: Share) -> Protocol[Share]:
        """max(x, 0), truncated to 16 fractional bits on the way, or as many as are set for the operator."""
        relu = exact.relu if self.exact else sign.relu
        return self.unzoomed((yield from relu(self.zoomed(x), chunks=self.chunks)))

    def nonnegative(self, x: Share) -> Protocol[Share]:
        """1{x ≥ 0} at scale 0."""
        nonnegative = exact.nonnegative if self.exact else sign.nonnegative
        return nonnegative(self.zoomed(x), self.chunks)

    def maximum(self, x: Share, y: Share) -> Protocol[Share]:
        """The larger one, element by element."""
        maximum = exact.maximum if self.exact else sign.maximum
        return self.unzoomed((yield from maximum(self.zoomed(x), self.zoomed(y), self.chunks)))

    def comparable(self, x: Share) -> Protocol[Share]:
        """A share whose comparisons are exact if that is asked for: truncated to 16 fractional bits then."""
        return (yield from exact.truncate(x)) if self.exact and x.scale > FRACTION_BITS else x


def is_private(value: Any) -> bool:
    """Whether a lowering's argument is a share or a loaded weight."""
    return isinstance(value, Share | Weight)


def share_of(value: Any) -> Share:
    """The share of a private operand.

    Raises:
        UnsupportedOperator: the operand is public, so there is nothing for the parties to compute.
    """
    if isinstance(value, Weight):
        return value.share
    if isinstance(value, Share):
        return value
    raise UnsupportedOperator("its operands are public constants: compute it outside the model")


def finite(value: Public) -> Tensor:
    """A public tensor in float64, with `MINUS_INFINITY` for minus infinity."""
    return torch.as_tensor(value, dtype=torch.float64).nan_to_num(nan=math.nan, posinf=math.inf, neginf=MINUS_INFINITY)


def constant(like: Share, value: Public) -> Share:
    """A public tensor as a share at scale 16: alice holds the value, bob zeros; local."""
    words = encode(finite(value), what="public operand").to(like.words.device)
    return like.with_words(torch.zeros_like(words), FRACTION_BITS).plus_public(words)


def fit(context: Context, x: Share) -> Protocol[Share]:
    """Truncate a share that would overflow in a product; most shares pass unchanged and for nothing."""
    if x.scale <= MAX_FACTOR_SCALE:
        return x
    return (yield from context.truncate(x))


def product(context: Context, x: Operand | Tensor, y: Operand | Tensor, op: Bilinear) -> Protocol[Share]:
    """The bilinear map on any mix of shares, loaded weights and public tensors."""
    if isinstance(x, Weight | Tensor):
        x, y, op = y, x, Swapped(op) if not isinstance(op, Multiply | Swapped) else op
    if isinstance(x, Tensor | Weight):
        raise UnsupportedOperator("a product of two constants belongs to the model's owner, not to the parties")
    x = yield from fit(context, x)
    if isinstance(y, Tensor):
        words = encode(y, what="public operand").to(x.words.device)
        return x.with_words(op(x.words, words), x.scale + FRACTION_BITS)
    if isinstance(y, Weight):
        return (yield from linear.times_weight(x, y, op))
    y = yield from fit(context, y)
    return (yield from linear.times(x, y, op))


def scaled(context: Context, x: Operand, factor: float) -> Protocol[Share]:
    """x times a public number, truncating before or after where the scale would grow too far."""
    x = share_of(x)
    if linear.times_number(x, factor).scale > MAX_SCALE and x.scale > FRACTION_BITS:
        x = yield from context.truncate(x)
    result = linear.times_number(x, factor)
    return result if result.scale <= MAX_SCALE else (yield from context.truncate(result))


def plus(x: Operand, other: Operand | Public) -> Share:
    """x + other, broadcasting; local."""
    x = share_of(x)
    return x + (share_of(other) if is_private(other) else constant(x, other))  # type: ignore[arg-type]
