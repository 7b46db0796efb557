"""What lowerings share: the kinds of operands, and products, sums and scalings of any mix of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tacit.errors import UnsupportedOperator
from tacit.mpc import linear, sign
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
    """

    chunks: int = sign.MAX_CHUNKS
    network: Network | None = None


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


def fit(x: Share) -> Protocol[Share]:
    """Truncate a share that would overflow in a product; most shares pass unchanged and for nothing."""
    if x.scale <= MAX_FACTOR_SCALE:
        return x
    return (yield from sign.truncate(x))


def product(x: Operand | Tensor, y: Operand | Tensor, op: Bilinear) -> Protocol[Share]:
    """The bilinear map on any mix of shares, loaded weights and public tensors."""
    if isinstance(x, Weight | Tensor):
        x, y, op = y, x, Swapped(op) if not isinstance(op, Multiply | Swapped) else op
    if isinstance(x, Tensor | Weight):
        raise UnsupportedOperator("a product of two constants belongs to the model's owner, not to the parties")
    x = yield from fit(x)
    if isinstance(y, Tensor):
        words = encode(y, what="public operand").to(x.words.device)
        return x.with_words(op(x.words, words), x.scale + FRACTION_BITS)
    if isinstance(y, Weight):
        return (yield from linear.times_weight(x, y, op))
    y = yield from fit(y)
    return (yield from linear.times(x, y, op))


def scaled(x: Operand, factor: float) -> Protocol[Share]:
    """x times a public number, truncating before or after where the scale would grow too far."""
    x = share_of(x)
    if linear.times_number(x, factor).scale > MAX_SCALE and x.scale > FRACTION_BITS:
        x = yield from sign.truncate(x)
    result = linear.times_number(x, factor)
    return result if result.scale <= MAX_SCALE else (yield from sign.truncate(result))


def plus(x: Operand, other: Operand | Public) -> Share:
    """x + other, broadcasting; local."""
    x = share_of(x)
    return x + (share_of(other) if is_private(other) else constant(x, other))  # type: ignore[arg-type]
