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
from tacit.program.rewrite import Model
from tacit.program.run import check, evaluate, load
from tacit.ring.fixed_point import FRACTION_BITS, encode
from tacit.ring.prg import Prg
from tacit.trace import Node, Ref, operator_of, substitute

_COMPARING = (
    "relu",
    "max_pool",
    "ge",
    "gt",
    "le",
    "lt",
    "clamp",
    "hardtanh",
    "leaky_relu",
    "abs",
    "maximum",
    "minimum",
)


@dataclass(frozen=True)
class LayerAudit:
    """How one operator did on the sample.

    Args:
        name: the node's name; ``layer`` the module it belongs to; ``operator`` its ATen operator.
        largest: the largest magnitude among the values that its bound is about: its inputs where it compares, its
            result elsewhere.
        bound: the magnitude from which the protocol would be wrong.
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
    name = node.operator.split(".")[1]
    if name.startswith(_COMPARING):
        bound = 2.0 ** (CHUNK_BITS * context.chunks - FRACTION_BITS)
        operands = [clear[arg.name] for arg in node.args if isinstance(arg, Ref)]
        # Pooling compares differences, and zero may take part.
        spread = [float(value.max().clamp(min=0) - value.min().clamp(max=0)) for value in operands]
        largest = max(spread) if "max_pool" in name else max(float(value.abs().max()) for value in operands)
    else:
        bound, largest = 2.0 ** (62 - pair[0].scale), float(exact[finite].abs().max())
    error = float((reconstruct(*pair) - exact)[finite].abs().max())
    return LayerAudit(node.name, node.layer, node.operator, largest, bound, error)


def _first(result: Any) -> Any:
    """The result that matters of an operator with several."""
    return result[0] if isinstance(result, (list, tuple)) else result
