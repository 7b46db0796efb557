"""Operators by which `torch.optim` changes tensors in place, at the precision that its running averages need.

Adam divides by the root of an average of squared gradients. A gradient of 2^-14 has a square of 2^-28, of which a
thousandth enters the average at a step: the state of an optimizer holds 44 fractional bits, and the operators here take
such tensors without dropping what a product elsewhere has no room for. Comparisons see 30 bits of a word, so roots and
quotients first tell small operands from large ones and multiply the small ones up.

Numbers are public: learning rates, decays, corrections. A rounding is up or down by chance and right on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tacit.errors import UnsupportedOperator
from tacit.mpc import functions
from tacit.mpc.linear import Multiply, times, times_number
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol, together
from tacit.program.lowering.backward import PARAMETER_BITS
from tacit.program.lowering.operands import MAX_SCALE, Context, Operand, is_private, product, share_of
from tacit.ring.fixed_point import FRACTION_BITS

STATE_BITS = 44
"""Fractional bits of what an optimizer keeps for a parameter."""
_FACTOR_BITS = 32
"""What a word keeps before a factor of 16 bits, so that magnitudes below 16,384 stay below 2^62."""
_SMALL_ROOT, _ROOT_UP = 2.0**-6, 20
_SMALL_DIVISOR, _DIVISOR_UP, _DIVISOR_BITS = 4.0, 10, 34
"""Below what an operand is small, by how many bits it is multiplied up, and how many fractional bits it then needs."""


def filled(context: Context, x: Operand, value: float = 0.0, **_: Any) -> Share:
    """``zeros_like`` and ``full_like`` of a parameter: where an optimizer begins; local."""
    own = share_of(x)
    return functions.shifted(own.with_words(torch.zeros_like(own.words), STATE_BITS), float(value))


def times_factor(context: Context, x: Share, factor: float) -> Protocol[Share]:
    """x times a public number, at x's scale or finer.

    The whole part is exact. The rest is off by its own 2^-16, by 2^-32 times itself and by a unit of x's last place.
    Two rounds at most.
    """
    whole = round(factor)
    if whole == factor:
        return x.with_words(x.words * whole)
    rest = times_number((yield from context.truncate(x, min(x.scale, _FACTOR_BITS))), factor - whole)
    return x.with_words(x.words * whole) + (yield from context.truncate(rest, min(rest.scale, x.scale)))


def multiply_number(context: Context, x: Operand, factor: float) -> Protocol[Share]:
    """``mul_`` by a number; see `times_factor`."""
    return (yield from times_factor(context, share_of(x), float(factor)))


def divide_number(context: Context, x: Operand, divisor: float) -> Protocol[Share]:
    """``div_`` by a number; see `times_factor`."""
    return (yield from times_factor(context, share_of(x), 1 / float(divisor)))


def add_number(context: Context, x: Operand, number: float, *, alpha: float = 1) -> Share:
    """``add_`` of a number, rounded to the last place of x; local."""
    return functions.shifted(share_of(x), float(number) * alpha)


def lerp(context: Context, x: Operand, end: Operand, weight: float) -> Protocol[Share]:
    """``lerp_`` by a number: x + weight·(end - x); see `times_factor`."""
    own = share_of(x)
    return own + (yield from times_factor(context, share_of(end) - own, float(weight)))


def addcmul(context: Context, x: Operand, left: Any, right: Any, *, value: float = 1) -> Protocol[Share]:
    """``addcmul_``: x + value·left·right for factors whose product is below 2^14; four rounds.

    The smaller the value, the more of left·value is kept, so that products far below 2^-24 still count.
    """
    own = share_of(x)
    if not value:
        return own
    sides = yield from together(*(context.truncate(_private(side), PARAMETER_BITS) for side in (left, right)))
    finer = PARAMETER_BITS - math.floor(math.log2(abs(value)))
    scaled = times_number(sides[0], value)
    scaled = yield from context.truncate(scaled, min(finer, scaled.scale))
    result = yield from times(scaled, sides[1], Multiply())
    return own + (yield from context.truncate(result, min(result.scale, max(own.scale, PARAMETER_BITS))))


def addcdiv(context: Context, x: Operand, numerator: Any, divisor: Any, *, value: float = 1) -> Protocol[Share]:
    """``addcdiv_``: x + value·numerator/divisor; 16 rounds.

    A divisor below 2^-18 in magnitude counts as 2^-18, and the largest is 12,000. The quotient, which must stay below
    2^13, is off by 2^-12 times itself and 2^-12.
    """
    own = share_of(x)
    quotient = yield from _quotient(context, _private(numerator), _private(divisor))
    scaled = times_number((yield from context.truncate(quotient, PARAMETER_BITS)), float(value))
    return own + (yield from context.truncate(scaled, min(scaled.scale, max(own.scale, PARAMETER_BITS))))


def divide(context: Context, x: Operand, divisor: Any) -> Protocol[Share]:
    """``div_`` by a tensor, private as in `addcdiv` or public; 13 rounds or one."""
    if isinstance(divisor, Tensor):
        return (yield from product(context, share_of(x), divisor.to(torch.float64).reciprocal(), Multiply()))
    return (yield from _quotient(context, share_of(x), share_of(divisor)))


def _quotient(context: Context, x: Share, y: Share) -> Protocol[Share]:
    """x/y, both multiplied up by 2^10 where y is small."""
    x, y = yield from together(*(context.truncate(side, _DIVISOR_BITS) for side in (x, y)))
    outside = [functions.shifted(side, -_SMALL_DIVISOR) for side in (y, -y)]
    above, below = yield from together(*(context.nonnegative(side) for side in outside))
    large = above + below
    raised = yield from together(*(_raised(side, large, _DIVISOR_UP) for side in (x, y)))
    return (yield from functions.power(raised[1], "reciprocal", raised[0], signed=True, chunks=context.chunks))


def _raised(x: Share, large: Share, bits: int) -> Protocol[Share]:
    """x where ``large`` is 1, x·2^bits where it is 0; exact modulo 2^64, one round."""
    selected = yield from times(large.map(lambda words: words.expand(x.shape)), x, Multiply())
    return x.with_words((x.words << bits) - selected.words * ((1 << bits) - 1))


def sqrt(context: Context, x: Operand) -> Protocol[Share]:
    """``sqrt`` of a running average: from 2^-36, which stands for anything smaller, to 2^14; 12 rounds.

    Returns:
        A share at scale 34, off by 2^-12 times itself and 2^-17.
    """
    own = share_of(x)
    large = yield from context.nonnegative(functions.shifted(own, -_SMALL_ROOT))
    raised = yield from _raised(own, large, _ROOT_UP)
    root = yield from functions.power(raised, "sqrt", least=-8, chunks=context.chunks)
    root = yield from context.truncate(root, PARAMETER_BITS)
    # Half of the bits of the square: √(S·2^20) = √S·2^10.
    halved = root.with_words(root.words, PARAMETER_BITS + _ROOT_UP // 2)
    selected = yield from times(large, root, Multiply())
    return halved + selected - selected.with_words(selected.words, halved.scale)


def _private(value: Any) -> Share:
    if not is_private(value):
        raise UnsupportedOperator("takes private tensors here: share the public one first")
    return share_of(value)


_IN_PLACE: dict[str, Callable[..., Any]] = {
    "aten.lerp.Scalar": lerp,
    "aten.addcmul.default": addcmul,
    "aten.addcdiv.default": addcdiv,
    "aten.div.Tensor": divide,
}
_BY_NUMBER: dict[str, Callable[..., Any]] = {"mul": multiply_number, "div": divide_number, "add": add_number}
_WITH_NUMBER = {f"aten.{name}.{kind}": one for name, one in _BY_NUMBER.items() for kind in ("Tensor", "Scalar")}
_OF_PARAMETERS: dict[str, Callable[..., Any]] = {"aten.zeros_like.default": filled, "aten.full_like.default": filled}


def lowering_for(
    name: str, args: Sequence[Any], scale: int, in_place: bool, trained: bool
) -> Callable[..., Any] | None:
    """What an operator is lowered to where the tables' lowering would lose what an optimizer keeps.

    Args:
        name: the operator's, without the underscore of its form that works in place.
        args: its arguments.
        scale: fractional bits of the first one.
        in_place: whether it changes its first argument, whose scale its result will have.
        trained: whether an argument requires a gradient.

    Returns:
        A lowering whose result is taken as it is; ``None`` where the tables' is right.
    """
    if trained and name in _OF_PARAMETERS:
        return _OF_PARAMETERS[name]
    if scale > MAX_SCALE and name == "aten.sqrt.default":
        return sqrt
    if scale < FRACTION_BITS or not (in_place or scale > MAX_SCALE):
        return None
    by_number = len(args) > 1 and isinstance(args[-1], int | float)
    return _WITH_NUMBER.get(name) if by_number and name in _WITH_NUMBER else _IN_PLACE.get(name)
