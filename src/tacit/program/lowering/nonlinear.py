"""Activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tacit.errors import UnsupportedOperator
from tacit.mpc import functions
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol, together
from tacit.program.lowering.operands import Context, Operand, scaled, share_of


def relu(context: Context, x: Operand) -> Protocol[Share]:
    """``relu``, which truncates on the way; three rounds."""
    return (yield from context.relu(share_of(x)))


def leaky_relu(context: Context, x: Operand, negative_slope: float = 0.01) -> Protocol[Share]:
    """``leaky_relu`` as slope·x + (1 - slope)·relu(x); three rounds."""
    x = yield from context.comparable(share_of(x))
    own, positive = yield from together(functions.reduced(x), context.relu(x))
    return (yield from scaled(context, own, negative_slope)) + (
        yield from scaled(context, positive, 1 - negative_slope)
    )


def elu(context: Context, x: Operand, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Protocol[Share]:
    """``elu`` as relu(x) + alpha·(e^min(x, 0) - 1); four rounds."""
    if input_scale != 1:
        raise UnsupportedOperator(f"elu with input_scale={input_scale} has no encrypted form")
    x = yield from context.comparable(share_of(x))
    own, positive = yield from together(functions.reduced(x), context.relu(x))
    falling = yield from functions.exp(own - positive, context.chunks)
    falling = yield from scaled(context, functions.shifted(falling, -1.0), alpha * scale)
    return (yield from scaled(context, positive, scale)) + falling


def gelu(context: Context, x: Operand, *, approximate: str = "none") -> Protocol[Share]:
    """``gelu`` in both forms; four rounds."""
    name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    if name is None:
        raise UnsupportedOperator(f"gelu with approximate={approximate!r} has no encrypted form")
    return (yield from functions.unit(share_of(x), name, context.chunks))


def _bounded(name: str) -> Callable[..., Protocol[Share]]:
    def lowering(context: Context, x: Operand) -> Protocol[Share]:
        return (yield from functions.bounded(share_of(x), name, context.chunks))

    return lowering


def silu(context: Context, x: Operand) -> Protocol[Share]:
    """``silu``; four rounds."""
    return (yield from functions.unit(share_of(x), "silu", context.chunks))


def exp(context: Context, x: Operand) -> Protocol[Share]:
    """``exp``; four rounds."""
    return (yield from functions.exp(share_of(x), context.chunks))


def expm1(context: Context, x: Operand) -> Protocol[Share]:
    """``expm1``; four rounds."""
    return functions.shifted((yield from exp(context, x)), -1.0)


def _log(base: float, offset: float = 0.0) -> Callable[..., Protocol[Share]]:
    def lowering(context: Context, x: Operand) -> Protocol[Share]:
        own = share_of(x)
        result = yield from functions.log(functions.shifted(own, offset) if offset else own, chunks=context.chunks)
        return result if base == math.e else (yield from scaled(context, result, 1 / math.log(base)))

    return lowering


def softmax(context: Context, x: Operand, dim: int, half_to_float: bool = False) -> Protocol[Share]:
    """``softmax``; ten rounds and those of a maximum."""
    return (yield from functions.softmax(share_of(x), dim, context.chunks))


def log_softmax(context: Context, x: Operand, dim: int, half_to_float: bool = False) -> Protocol[Share]:
    """``log_softmax``; ten rounds and those of a maximum."""
    return (yield from functions.log_softmax(share_of(x), dim, context.chunks))


LOWERINGS: dict[str, Callable[..., Any]] = {
    "aten.relu.default": relu,
    "aten.leaky_relu.default": leaky_relu,
    "aten.elu.default": elu,
    "aten.gelu.default": gelu,
    "aten.silu.default": silu,
    "aten.sigmoid.default": _bounded("sigmoid"),
    "aten.tanh.default": _bounded("tanh"),
    "aten.erf.default": _bounded("erf"),
    "aten.exp.default": exp,
    "aten.expm1.default": expm1,
    "aten.log.default": _log(math.e),
    "aten.log2.default": _log(2),
    "aten.log10.default": _log(10),
    "aten.log1p.default": _log(math.e, 1.0),
    "aten._softmax.default": softmax,
    "aten._log_softmax.default": log_softmax,
}
