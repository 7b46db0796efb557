"""Comparisons, logic on their results, selection, and the order of elements.

A truth value is a share of 0 or 1 at scale 0, and the logical operators take nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tacit.errors import UnsupportedOperator
from tacit.mpc import functions, ordering, sign
from tacit.mpc.linear import Multiply
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol, together
from tacit.program.lowering.arithmetic import subtract
from tacit.program.lowering.operands import Context, Operand, constant, finite, is_private, product, share_of
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.trace import TRUTH


def _at_least(context: Context, larger: Any, smaller: Any) -> Protocol[Share]:
    """1{larger >= smaller} as a share at scale 0."""
    for infinite, other, answer in ((larger, smaller, math.inf), (smaller, larger, -math.inf)):
        if _is_infinite(infinite):
            return _everywhere(share_of(other), infinite == answer)
    difference = yield from subtract(context, larger, smaller)
    return (yield from context.nonnegative(difference))


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and math.isinf(value)


def _everywhere(like: Share, truth: bool) -> Share:
    """What a comparison with infinity gives: nothing private is infinite."""
    return like.with_words(torch.zeros_like(like.words), scale=0).plus_public(int(truth))


def greater_equal(context: Context, x: Operand, y: Any) -> Protocol[Share]:
    """``x >= y``; three rounds."""
    return (yield from _at_least(context, x, y))


def less_equal(context: Context, x: Operand, y: Any) -> Protocol[Share]:
    """``x <= y``; three rounds."""
    return (yield from _at_least(context, y, x))


def greater(context: Context, x: Operand, y: Any) -> Protocol[Share]:
    """``x > y``, the negation of ``x <= y``."""
    return logical_not(context, (yield from less_equal(context, x, y)))


def less(context: Context, x: Operand, y: Any) -> Protocol[Share]:
    """``x < y``, the negation of ``x >= y``."""
    return logical_not(context, (yield from greater_equal(context, x, y)))


def equal(context: Context, x: Operand, y: Any) -> Protocol[Share]:
    """``x == y``, as the stored multiples of 2^-16; three rounds."""
    if _is_infinite(y):
        return _everywhere(share_of(x), False)
    difference = yield from subtract(context, x, y)
    if context.exact:
        above, below = yield from together(context.nonnegative(difference), context.nonnegative(-difference))
        return (above + below).plus_public(-1)
    zero = difference.map(torch.zeros_like)
    return (yield from ordering.equal(difference, zero, context.chunks))


def not_equal(context: Context, x: Operand, y: Any) -> Protocol[Share]:
    """``x != y``; three rounds."""
    return logical_not(context, (yield from equal(context, x, y)))


def sign_(context: Context, x: Operand) -> Protocol[Share]:
    """``sign``: 1{x ≥ 0} - 1{x ≤ 0}; three rounds."""
    own = share_of(x)
    above, below = yield from together(context.nonnegative(own), context.nonnegative(-own))
    return above - below


def _truth(value: Any) -> Share:
    """A private truth value: a share at scale 0."""
    if share_of(value).scale:
        raise UnsupportedOperator("logical operators take results of comparisons: compare with zero first")
    return share_of(value)


def truth(context: Context, x: Operand) -> Protocol[Share]:
    """Zeros and ones that the model's owner shared at scale 16, as truth values; one round, and exact."""
    return (yield from sign.truncate(share_of(x), 0))


def logical_not(context: Context, x: Operand) -> Share:
    """``logical_not``; local."""
    return -_truth(x).plus_public(-1)


def logical_and(context: Context, x: Any, y: Any) -> Protocol[Share]:
    """``logical_and``: the product; one round, none with a public operand."""
    private, other = (x, y) if is_private(x) else (y, x)
    truth = _truth(private)
    if is_private(other):
        return (yield from product(context, truth, _truth(other), Multiply()))
    mask = _zeros_and_ones(other).to(truth.words.device)
    return truth.map(lambda own: own * mask)


def logical_or(context: Context, x: Any, y: Any) -> Protocol[Share]:
    """``logical_or``: x + y - xy; one round, none with a public operand."""
    both = yield from logical_and(context, x, y)
    return _sum_of_truths(x, y) - both


def logical_xor(context: Context, x: Any, y: Any) -> Protocol[Share]:
    """``logical_xor``: x + y - 2xy; one round, none with a public operand."""
    both = yield from logical_and(context, x, y)
    return _sum_of_truths(x, y) - both - both


def _sum_of_truths(x: Any, y: Any) -> Share:
    private, other = (x, y) if is_private(x) else (y, x)
    truth = _truth(private)
    if is_private(other):
        return truth + _truth(other)
    mask = _zeros_and_ones(other).to(truth.words.device)
    return truth.map(lambda own: own + torch.zeros_like(mask)).plus_public(mask)


def _zeros_and_ones(value: Any) -> Tensor:
    return torch.as_tensor(value).to(torch.bool).to(torch.int64)


def any_(context: Context, x: Operand, dim: Any = None, keepdim: bool = False) -> Protocol[Share]:
    """``any``: whether there is at least one; three rounds."""
    return (yield from sign.nonnegative(_count(x, dim, keepdim).plus_public(-1), context.chunks))


def all_(context: Context, x: Operand, dim: Any = None, keepdim: bool = False) -> Protocol[Share]:
    """``all``: whether none is missing; three rounds."""
    missing = _count(logical_not(context, x), dim, keepdim)
    return (yield from sign.nonnegative(-missing, context.chunks))


def _count(x: Any, dim: Any, keepdim: bool) -> Share:
    dims = (dim,) if isinstance(dim, int) else dim
    return _truth(x).map(lambda own: own.sum(tuple(dims), keepdim) if dims else own.sum())


def where(context: Context, condition: Any, x: Any, y: Any) -> Protocol[Share]:
    """``where``: y + condition·(x - y); one round, none for a public condition."""
    if isinstance(condition, Tensor):
        like = share_of(x if is_private(x) else y)
        left, right = (share_of(value) if is_private(value) else constant(like, value) for value in (x, y))
        scale = max(left.scale, right.scale)
        left, right, mask = left.raised(scale), right.raised(scale), condition.to(torch.bool).to(like.words.device)
        return left.with_words(torch.where(mask, left.words, right.words))
    truth = _truth(condition)
    if not is_private(x) and not is_private(y):
        # Between public values, the condition alone is private: no round.
        first, second = finite(x), finite(y)
        return constant(truth, second) + (yield from product(context, truth, first - second, Multiply()))
    gain = yield from product(context, (yield from subtract(context, x, y)), truth, Multiply())
    return gain + (share_of(y) if is_private(y) else constant(gain, y))


def clamp(context: Context, x: Operand, low: float | None = None, high: float | None = None) -> Protocol[Share]:
    """``clamp`` between public numbers, ``hardtanh`` and ReLU6; three rounds."""
    own = yield from context.comparable(share_of(x))
    if low is not None and high is not None:
        if low >= high:
            raise UnsupportedOperator(f"clamping needs a lower bound below the upper one, not {low} and {high}")
        return (yield from functions.clamp(own, low, high, context.chunks))
    if low is not None:
        return (yield from functions.clamp_below(own, low, context.chunks))
    if high is not None:
        return (yield from functions.clamp_above(own, high, context.chunks))
    return own


def clamp_between(context: Context, x: Any, low: Any = None, high: Any = None) -> Protocol[Share]:
    """``clamp`` between tensors: a maximum, then a minimum; three rounds each."""
    if low is not None:
        x = yield from maximum(context, x, low)
    return share_of(x) if high is None else (yield from minimum(context, x, high))


def hardtanh(context: Context, x: Operand, low: float = -1.0, high: float = 1.0) -> Protocol[Share]:
    """``hardtanh``; three rounds."""
    return (yield from clamp(context, x, low, high))


def clamp_max(context: Context, x: Operand, high: float) -> Protocol[Share]:
    """``clamp_max``; three rounds."""
    return (yield from clamp(context, x, None, high))


def absolute(context: Context, x: Operand) -> Protocol[Share]:
    """``abs``; three rounds."""
    return (yield from functions.absolute((yield from context.comparable(share_of(x))), context.chunks))


def maximum(context: Context, x: Any, y: Any) -> Protocol[Share]:
    """``maximum``; three rounds."""
    like = share_of(x if is_private(x) else y)
    left, right = (share_of(value) if is_private(value) else constant(like, value) for value in (x, y))
    return (yield from context.maximum(*_broadcast(left, right)))


def minimum(context: Context, x: Any, y: Any) -> Protocol[Share]:
    """``minimum``; three rounds."""
    return -(yield from maximum(context, *(-share_of(v) if is_private(v) else -torch.as_tensor(v) for v in (x, y))))


def _broadcast(x: Share, y: Share) -> tuple[Share, Share]:
    shape = torch.broadcast_shapes(x.shape, y.shape)  # type: ignore[no-untyped-call]
    return x.map(lambda own: own.expand(shape)), y.map(lambda own: own.expand(shape))


def amax(context: Context, x: Operand, dim: Sequence[int] = (), keepdim: bool = False) -> Protocol[Share]:
    """``amax``; three rounds for each halving."""
    own = yield from context.comparable(share_of(x))
    dims = tuple(d % own.words.dim() for d in dim) or tuple(range(own.words.dim()))
    rest = [d for d in range(own.words.dim()) if d not in dims]
    flat = own.map(lambda words: words.permute(*rest, *dims).flatten(len(rest)))
    winner = (yield from ordering.largest(flat, -1, context.chunks)).map(lambda words: words.squeeze(-1))
    shape = [1 if d in dims else size for d, size in enumerate(own.shape)]
    return winner.map(lambda words: words.reshape(shape)) if keepdim else winner


def amin(context: Context, x: Operand, dim: Sequence[int] = (), keepdim: bool = False) -> Protocol[Share]:
    """``amin``; three rounds for each halving."""
    own = yield from context.comparable(share_of(x))
    return -(yield from amax(context, -own, dim, keepdim))


def argmax(context: Context, x: Operand, dim: int | None = None, keepdim: bool = False) -> Protocol[Share]:
    """``argmax``, the first of equal ones: four rounds, five after a product, n·(n-1)/2 comparisons."""
    own = share_of(x)
    if dim is None:
        return (yield from argmax(context, own.map(lambda words: words.flatten()), 0)).map(
            lambda words: words.reshape([1] * own.words.dim()) if keepdim else words
        )
    return (yield from _topmost(context, own, 1, dim, True, keepdim))[1]


def argmin(context: Context, x: Operand, dim: int | None = None, keepdim: bool = False) -> Protocol[Share]:
    """``argmin``; as `argmax`."""
    return (yield from argmax(context, -share_of(x), dim, keepdim))


def max_dim(context: Context, x: Operand, dim: int, keepdim: bool = False) -> Protocol[tuple[Share, Share]]:
    """``max`` along a dimension and where it is: five rounds, n·(n-1)/2 comparisons."""
    return (yield from _topmost(context, share_of(x), 1, dim, True, keepdim))


def min_dim(context: Context, x: Operand, dim: int, keepdim: bool = False) -> Protocol[tuple[Share, Share]]:
    """``min`` along a dimension and where it is; as `max_dim`."""
    return (yield from _topmost(context, share_of(x), 1, dim, False, keepdim))


def topk(
    context: Context, x: Operand, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Protocol[tuple[Share, Share]]:
    """``topk``; five rounds, n·(n-1)/2 comparisons."""
    return (yield from _topmost(context, share_of(x), k, dim, largest, True))


def sort(context: Context, x: Operand, dim: int = -1, descending: bool = False) -> Protocol[tuple[Share, Share]]:
    """``sort``, stable; five rounds, n·(n-1)/2 comparisons."""
    own = share_of(x)
    return (yield from _topmost(context, own, own.shape[dim], dim, descending, True))


def stable_sort(
    context: Context, x: Operand, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> Protocol[tuple[Share, Share]]:
    """``sort``, as it is written with ``stable``."""
    return (yield from sort(context, x, dim, descending))


def _topmost(
    context: Context, x: Share, count: int, dim: int, largest_first: bool, keepdim: bool
) -> Protocol[tuple[Share, Share]]:
    """The first elements along a dimension in order, and their indices."""
    x = yield from functions.reduced((yield from context.comparable(x)), FRACTION_BITS)
    last = x.map(lambda words: words.movedim(dim, -1))
    matrix = yield from ordering.order(last, count, largest_first, context.chunks)
    values, places = (yield from ordering.picked(matrix, last)), ordering.indices(matrix)
    values, places = (found.map(lambda words: words.movedim(-1, dim)) for found in (values, places))
    if keepdim:
        return values, places
    return values.map(lambda words: words.squeeze(dim)), places.map(lambda words: words.squeeze(dim))


LOWERINGS: dict[str, Callable[..., Any]] = {
    f"aten.{name}.{kind}": lowering
    for name, lowering in {
        "ge": greater_equal,
        "gt": greater,
        "le": less_equal,
        "lt": less,
        "eq": equal,
        "ne": not_equal,
    }.items()
    for kind in ("Scalar", "Tensor")
} | {
    TRUTH: truth,
    "aten.sign.default": sign_,
    "aten.sgn.default": sign_,
    "aten.logical_not.default": logical_not,
    "aten.logical_and.default": logical_and,
    "aten.logical_or.default": logical_or,
    "aten.logical_xor.default": logical_xor,
    "aten.bitwise_not.default": logical_not,
    "aten.bitwise_and.Tensor": logical_and,
    "aten.bitwise_or.Tensor": logical_or,
    "aten.bitwise_xor.Tensor": logical_xor,
    "aten.any.default": any_,
    "aten.any.dim": any_,
    "aten.any.dims": any_,
    "aten.all.default": all_,
    "aten.all.dim": all_,
    "aten.where.self": where,
    "aten.clamp.default": clamp,
    "aten.clamp.Tensor": clamp_between,
    "aten.clamp_min.default": clamp,
    "aten.clamp_max.default": clamp_max,
    "aten.hardtanh.default": hardtanh,
    "aten.abs.default": absolute,
    "aten.maximum.default": maximum,
    "aten.minimum.default": minimum,
    "aten.amax.default": amax,
    "aten.amin.default": amin,
    "aten.max.default": amax,
    "aten.min.default": amin,
    "aten.argmax.default": argmax,
    "aten.argmin.default": argmin,
    "aten.max.dim": max_dim,
    "aten.min.dim": min_dim,
    "aten.topk.default": topk,
    "aten.sort.default": sort,
    "aten.sort.stable": stable_sort,
}
