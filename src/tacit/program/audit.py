"""A dress rehearsal of an encrypted model, with everything in view: for the model's owner, on sample inputs of its own.

Online, nobody can see that a value has left the range in which a protocol is right. An audit can: it runs the very
protocols on the owner's machine, with all parties in one process, puts every intermediate value together and compares
it with what the same operator computes in floating point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tacit.mpc.lockstep import Trio
from tacit.mpc.phases import CHUNK_BITS
from tacit.mpc.shares import Share, reconstruct, share
from tacit.program.lowering import Context
from tacit.program.lowering.operands import finite
from tacit.program.rewrite import Model
from tacit.program.run import check, evaluate, load
from tacit.ring.fixed_point import FRACTION_BITS, MAGNITUDE_BITS, encode
from tacit.ring.prg import Prg
from tacit.trace import Node, Ref, operator_of, substitute

_MAGNITUDES = ("relu", "leaky_relu", "abs", "sign")
_DIFFERENCES = ("ge", "gt", "le", "lt", "eq", "ne", "maximum", "minimum")
_CLAMPS = ("clamp", "clamp_min", "clamp_max", "hardtanh")
_SPREADS = ("amax", "amin", "max", "min", "argmax", "argmin", "topk", "sort")
_PADDING = 2.0 ** (MAGNITUDE_BITS - 2 - FRACTION_BITS)
"""The magnitude of the number that pads for `tacit.mpc.pooling.max_pool`."""
_POOLS = ("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "max_pool2d_relu")


@dataclass(frozen=True)
class LayerAudit:
    """How one operator did on the sample.

    Args:
        name: the node's name; ``layer`` the module it belongs to; ``operator`` its ATen operator.
        largest: the largest magnitude among the values that its bound is about: what it compares where it does
            (`largest_compared`), its result elsewhere.
        bound: the magnitude from which the protocol may be wrong: that of the operator's own comparison window, or of
            a word.
        error: the largest absolute difference between the result on shares and the result in float32.
    """

    name: str
    layer: str
    operator: str
    largest: float
    bound: float
    error: float

    @property
    def within(self) -> bool:
        """Whether every value stayed inside the bound."""
        return self.largest < self.bound


@dataclass(frozen=True)
class Audit:
    """An audit's findings, operator by operator."""

    layers: tuple[LayerAudit, ...]

    @property
    def within(self) -> bool:
        """Whether no value left its range."""
        return all(layer.within for layer in self.layers)

    @property
    def error(self) -> float:
        """The largest absolute error of the model's output."""
        return self.layers[-1].error

    def __str__(self) -> str:
        lines = [f"{'operator':<44}{'largest':>12}{'bound':>12}{'of bound':>10}{'error':>10}"]
        for one in self.layers:
            name = f"{one.layer or one.name} ({one.operator})"
            note = "" if one.within else "  OUT OF RANGE"
            ratio = one.largest / one.bound
            lines.append(f"{name:<44}{one.largest:>12.4g}{one.bound:>12.4g}{ratio:>10.1%}{one.error:>10.1e}{note}")
        return "\n".join(lines)


def interpret(model: Model, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """Every value of the program in floating point: inputs, state and results by name."""
    values: dict[str, Any] = {name: value.to(torch.float32) for name, value in model.state.items()}
    values |= dict(zip(model.graph.inputs, inputs, strict=True))
    with torch.inference_mode():
        for node in model.graph.nodes:
            args, kwargs = (substitute(part, values.__getitem__) for part in (node.args, node.kwargs))
            values[node.name] = operator_of(node.operator)(*args, **kwargs)
    return values


def window_bound(chunks: int, extra: int = 0) -> float:
    """The magnitude below which a comparison window of so many chunks is right at both ends; see `tacit.mpc.sign`.

    Args:
        chunks: its size.
        extra: how many fractional bits more than 16 it begins with; see `tacit.program.lowering.Context`.
    """
    lowest = FRACTION_BITS + extra
    return 2.0 ** (CHUNK_BITS * chunks - lowest) - 2.0**-lowest


def largest_compared(node: Node, values: Mapping[str, Any]) -> float | None:
    """The largest magnitude that the comparison window of an operator has to hold.

    Args:
        node: the operator.
        values: what `interpret` returned.

    Returns:
        For an operator that compares its operand with zero, the operand's magnitude; for one that compares operands
        with each other or with bounds, that of their differences; for maxima, sorting and pooling, the range of all
        values, zero included. ``None`` for an operator that compares nothing, or only within a table's domain.
    """
    name = node.operator.partition(".")[2].partition(".")[0]
    if name not in (*_MAGNITUDES, *_DIFFERENCES, *_CLAMPS, *_SPREADS, *_POOLS):
        return None
    arguments = (arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, Ref | int | float))
    x, *others = (finite(values[arg.name] if isinstance(arg, Ref) else arg) for arg in arguments)
    if name in _MAGNITUDES:
        return float(x.abs().max())
    if name in _DIFFERENCES:
        return float((x - others[0]).abs().max())
    if name in _CLAMPS:
        # What is left out of a hardtanh's bounds is -1 or 1.
        bounds = [*others, finite(-1.0), finite(1.0)] if name == "hardtanh" else others
        return max(float((x - bound).abs().max()) for bound in bounds)
    spread = float(x.max().clamp(min=0) - x.min().clamp(max=0))
    return spread + _PADDING if name in _POOLS and is_padded(node) else spread


def is_padded(node: Node) -> bool:
    """Whether pooling windows may reach over an edge, where elements are compared with what padding stands for."""
    _, _, _, padding, _, ceil_mode = (*node.args, *[None] * 6)[:6]
    return bool(ceil_mode) or (isinstance(padding, list | tuple) and any(padding))


def audit(model: Model, inputs: Sequence[Tensor], context: Context) -> Audit:
    """Run the model on shares of the owner's own sample and compare every operator with floating point.

    Args:
        model: the simplified program and its state, in the clear.
        inputs: sample inputs, float32.
        context: the engine's settings.

    Raises:
        UnsupportedOperator: an operator has no encrypted form.
        RangeError: an input or weight does not fit the fixed-point range.
    """
    check(model.graph)
    trio, prg = Trio(), Prg.fresh()
    pairs = {
        name: share(encode(value, what=f"weight {name}"), FRACTION_BITS, prg) for name, value in model.state.items()
    }
    given = [share(encode(value), FRACTION_BITS, prg) for value in inputs]
    parts = [{name: pair[i] for name, pair in pairs.items()} for i in range(2)]
    states = trio.load(load(model.graph, parts[0], 0), load(model.graph, parts[1], 0))
    names = [node.name for node in model.graph.nodes]
    left, right = (evaluate(model.graph, states[i], [pair[i] for pair in given], context, names) for i in range(2))
    alice, bob = trio.run(left, right)
    clear = interpret(model, inputs)
    private = (node for node in model.graph.nodes if isinstance(_first(alice[node.name]), Share))
    nodes = (node for node in private if node.operator != "getitem")
    return Audit(tuple(_layer(node, alice[node.name], bob[node.name], clear, context) for node in nodes))


def _layer(node: Node, alice: Any, bob: Any, clear: Mapping[str, Any], context: Context) -> LayerAudit:
    pair = (_first(alice), _first(bob))
    exact = _first(clear[node.name]).to(torch.float64)
    # An infinity (of an attention mask) is on shares a bound that nothing reaches.
    finite = exact.isfinite()
    compared = largest_compared(node, clear)
    if compared is not None:
        settings = context.at(node.name)
        bound, largest = window_bound(settings.chunks, settings.extra), compared
    else:
        bound, largest = 2.0 ** (62 - pair[0].scale), float(exact[finite].abs().max())
    error = float((reconstruct(*pair) - exact)[finite].abs().max())
    return LayerAudit(node.name, node.layer, node.operator, largest, bound, error)


def _first(result: Any) -> Any:
    """The result that matters of an operator with several."""
    return result[0] if isinstance(result, (list, tuple)) else result
