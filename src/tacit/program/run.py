"""Running a graph of operators on shares, and planning what a run costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tacit.errors import InputError, UnsupportedOperator
from tacit.mpc.correlation import Correlation
from tacit.mpc.linear import Weight, load_weight
from tacit.mpc.lockstep import LayerCount, Meter, plan
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol, Role, Task, dataflow
from tacit.program.lowering import FACTOR_POSITIONS, LOWERINGS, Context
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.trace import Graph, Node, Ref, substitute


def check(graph: Graph) -> None:
    """Refuse a graph that uses an operator without a lowering.

    Raises:
        UnsupportedOperator: names the operator and the line of the model it comes from.
    """
    for node in graph.nodes:
        if node.operator not in LOWERINGS:
            raise UnsupportedOperator(_described(node, "has no encrypted form"))


def factors(graph: Graph) -> tuple[str, ...]:
    """Names of the state tensors that enter products, in the graph's order: those to load as weights."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        for position in FACTOR_POSITIONS.get(node.operator, ()):
            value = node.args[position]
            if isinstance(value, Ref) and value.name in graph.state:
                found[value.name] = None
    return tuple(found)


def load(graph: Graph, state: Mapping[str, Share], first_number: int) -> Protocol[dict[str, Share | Weight]]:
    """Load a model: open every weight under its mask, all in one round.

    Args:
        graph: the program.
        state: this party's shares of its state.
        first_number: weights are numbered from here; see `tacit.mpc.linear.load_weight`.
    """
    names = factors(graph)
    tasks = [
        Task(name, (), lambda name=name, number=number: load_weight(state[name], number))
        for number, name in enumerate(names, first_number)
    ]
    loaded = yield from dataflow(tasks, names)
    return {**state, **loaded}


def execute(
    graph: Graph, state: Mapping[str, Share | Weight], inputs: Sequence[Share], context: Context
) -> Protocol[tuple[Share, ...]]:
    """Run the graph on shares, independent operators side by side.

    Args:
        graph: the program.
        state: what `load` returned.
        inputs: this party's shares of the inputs.
        context: the engine's settings.

    Returns:
        This party's shares of the outputs, each at a scale of its own.
    """
    tasks = [Task(name, (), lambda value=value: value) for name, value in zip(graph.inputs, inputs, strict=True)] + [
        _task(node, graph, state, context) for node in graph.nodes
    ]
    results = yield from dataflow(tasks, graph.outputs)
    return tuple(results[name] for name in graph.outputs)


def _task(node: Node, graph: Graph, state: Mapping[str, Share | Weight], context: Context) -> Task:
    needs = tuple(name for name in dict.fromkeys(node.refs) if name not in graph.state)

    def start(*results: Any) -> Any:
        known = dict(zip(needs, results, strict=True))

        def value(name: str) -> Any:
            return known[name] if name in known else state[name]

        args, kwargs = substitute(node.args, value), substitute(node.kwargs, value)
        try:
            return LOWERINGS[node.operator](context, *args, **kwargs)
        except UnsupportedOperator as error:
            raise UnsupportedOperator(_described(node, str(error))) from None

    return Task(node.name, needs, start)


def _described(node: Node, reason: str) -> str:
    where = f" at {node.source}" if node.source else ""
    return f"{node.operator}{where}: {reason}"


@dataclass(frozen=True)
class LayerCost:
    """What one operator of a program costs.

    Args:
        name: the node's name; ``layer`` the module it belongs to; ``operator`` its ATen operator.
        rounds: messages each way in which it takes part.
        bytes_online: bytes that each party sends to the other.
        bytes_dealt: bytes that the provider sends ahead of time.
        seconds: computing time of both parties together, where it was measured.
    """

    name: str
    layer: str
    operator: str
    rounds: int
    bytes_online: int
    bytes_dealt: int
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Cost:
    """What one run of a program costs.

    Args:
        rounds: messages that alice and bob send each other; operators that run side by side share them.
        bytes_online: bytes that each party sends to the other.
        bytes_dealt: bytes that the provider sends ahead of time, all to bob; the parties' 16-byte seeds are not
            counted.
        layers: operator by operator; those that cost nothing are left out.
        correlations: what the provider deals, in the order of use.
    """

    rounds: int
    bytes_online: int
    bytes_dealt: int
    layers: tuple[LayerCost, ...]
    correlations: tuple[Correlation, ...]

    def __str__(self) -> str:
        lines = [f"{'operator':<44}{'rounds':>8}{'online B':>14}{'dealt B':>14}"]
        rows = [(f"{c.layer or c.name} ({c.operator})", c.rounds, c.bytes_online, c.bytes_dealt) for c in self.layers]
        rows.append(("in all", self.rounds, self.bytes_online, self.bytes_dealt))
        lines += [f"{name:<44}{rounds:>8}{online:>14,}{dealt:>14,}" for name, rounds, online, dealt in rows]
        return "\n".join(lines)


def cost_of(graph: Graph, meter: Meter) -> Cost:
    """What a meter counted, operator by operator."""
    layers = []
    for node in graph.nodes:
        count = meter.layers.get(node.name, LayerCount())
        if count.rounds or count.bytes_dealt:
            costs = (count.rounds, count.bytes_online, count.bytes_dealt, count.seconds)
            layers.append(LayerCost(node.name, node.layer, node.operator, *costs))
    return Cost(meter.rounds, meter.bytes_online, meter.bytes_dealt, tuple(layers), tuple(meter.correlations))


def plan_execution(
    graph: Graph,
    state: Mapping[str, torch.Size],
    inputs: Sequence[tuple[int, ...]],
    context: Context,
    first_number: int = 0,
) -> Cost:
    """Work out what a run will cost, from shapes alone.

    Args:
        graph: the program.
        state: the shapes of its state tensors.
        inputs: the shapes of its inputs.
        context: the engine's settings.
        first_number: as it was, or will be, given to `load`.

    Raises:
        UnsupportedOperator: an operator, or a form of it, has no lowering.
        InputError: shapes do not fit.
    """
    check(graph)
    blank_state = {name: _blank(shape) for name, shape in state.items()}
    loaded = plan(load(graph, blank_state, first_number), Meter())
    meter = Meter()
    try:
        plan(execute(graph, loaded, [_blank(shape) for shape in inputs], context), meter)
    except RuntimeError as error:
        raise InputError(f"the program does not fit inputs of shape {list(map(tuple, inputs))}: {error}") from error
    return cost_of(graph, meter)


def _blank(shape: Sequence[int]) -> Share:
    return Share(torch.empty(tuple(shape), dtype=torch.int64, device="meta"), FRACTION_BITS, Role.ALICE)
