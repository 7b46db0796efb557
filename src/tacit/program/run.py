"""Running a graph of operators on shares, and planning what a run costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch

from tacit.errors import InputError, UnsupportedOperator
from tacit.mpc.correlation import Correlation
from tacit.mpc.linear import Weight, load_weight
from tacit.mpc.lockstep import LayerCount, Meter, plan
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol, Role, Task, dataflow
from tacit.program.lowering import BIAS_POSITIONS, FACTOR_POSITIONS, LOWERINGS, Context
from tacit.program.network import SECONDS_PER_DEALT_BYTE, SECONDS_PER_PRODUCT, Network
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.trace import Graph, Node, Ref, references


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
    """Load a model: open every weight under its mask, all in one round, and leave its bias with it.

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
    weights: dict[str, Weight] = yield from dataflow(tasks, names)
    return with_weights(graph, state, weights)


def with_weights(graph: Graph, state: Mapping[str, Share], weights: Mapping[str, Weight]) -> dict[str, Share | Weight]:
    """A model's state where its weights are loaded: each with its bias, in the place of its share.

    Args:
        graph: the program.
        state: this party's shares of its state.
        weights: one for each of `factors`.
    """
    uses = Counter(name for node in graph.nodes for name in node.refs)
    loaded = dict(weights)
    for node in graph.nodes:
        if pair := _biased(node, graph, uses):
            weight, bias = pair
            column = (*state[bias].shape, *[1] * (len(node.shape) - 2))
            loaded[weight] = replace(loaded[weight], bias=state[bias].map(partial(torch.reshape, shape=column)))
    return {**state, **loaded}


def _biased(node: Node, graph: Graph, uses: Mapping[str, int]) -> tuple[str, str] | None:
    """The names of a node's weight and bias, if both belong to the model and nothing else takes the weight."""
    if node.operator not in BIAS_POSITIONS or node.kwargs:
        return None
    weight, bias = (node.args[position] for position in BIAS_POSITIONS[node.operator])
    owned = all(isinstance(value, Ref) and value.name in graph.state for value in (weight, bias))
    return (weight.name, bias.name) if owned and uses[weight.name] == 1 else None


@dataclass(frozen=True)
class Operation:
    """A node made ready to run, any number of times.

    Args:
        node: what it is.
        needs: names of the results and inputs it takes.
        owned: names of the state tensors it takes.
        lowering: its protocol.
        args: gives the lowering's arguments, given all these values by name.
        kwargs: likewise.
    """

    node: Node
    needs: tuple[str, ...]
    owned: tuple[str, ...]
    lowering: Callable[..., Any]
    args: Callable[[Mapping[str, Any]], Any]
    kwargs: Callable[[Mapping[str, Any]], Any]

    def task(self, state: Mapping[str, Share | Weight], context: Context) -> Task:
        """The operation on this party's state; an error of its lowering names the operator and the model's line."""
        held = {name: state[name] for name in self.owned}

        def start(*results: Any) -> Any:
            values = dict(zip(self.needs, results, strict=True), **held)
            try:
                result = self.lowering(context.at(self.node.name), *self.args(values), **self.kwargs(values))
            except InputError as error:
                raise _blamed(self.node, error) from None
            return self._guarded(result) if isinstance(result, Generator) else result

        return Task(self.node.name, self.needs, start)

    def _guarded(self, protocol: Protocol[Any]) -> Protocol[Any]:
        try:
            return (yield from protocol)
        except InputError as error:
            raise _blamed(self.node, error) from None


def operations(graph: Graph) -> tuple[Operation, ...]:
    """Make a graph ready to run, once: looking through its arguments anew costs a small network's run a tenth."""
    ready = []
    for node in graph.nodes:
        names = dict.fromkeys(node.refs)
        needs = tuple(name for name in names if name not in graph.state)
        owned = tuple(name for name in names if name in graph.state)
        lowering = LOWERINGS[node.operator]
        ready.append(Operation(node, needs, owned, lowering, _binder(node.args), _binder(node.kwargs)))
    return tuple(ready)


def _binder(value: Any) -> Callable[[Mapping[str, Any]], Any]:
    """`substitute` in this structure, worked out ahead as far as it can be without the values."""
    if isinstance(value, Ref):
        return itemgetter(value.name)
    if not list(references(value)):
        return lambda values: value
    if isinstance(value, Mapping):
        named = {key: _binder(item) for key, item in value.items()}
        return lambda values: {key: item(values) for key, item in named.items()}
    kind, items = type(value), [_binder(item) for item in value]
    return lambda values: kind([item(values) for item in items])


def execute(
    graph: Graph,
    state: Mapping[str, Share | Weight],
    inputs: Sequence[Share],
    context: Context,
    ready: Sequence[Operation] = (),
) -> Protocol[tuple[Share, ...]]:
    """Run the graph on shares, independent operators side by side.

    Args:
        graph: the program.
        state: what `load` returned.
        inputs: this party's shares of the inputs.
        context: the engine's settings.
        ready: what `operations` made of the graph, if that was done before.

    Returns:
        This party's shares of the outputs, each at a scale of its own.
    """
    results = yield from evaluate(graph, state, inputs, context, graph.outputs, ready)
    return tuple(results[name] for name in graph.outputs)


def evaluate(
    graph: Graph,
    state: Mapping[str, Share | Weight],
    inputs: Sequence[Share],
    context: Context,
    names: Sequence[str],
    ready: Sequence[Operation] = (),
) -> Protocol[dict[str, Any]]:
    """Like `execute`, returning the results of the nodes of these names."""
    given = [Task(name, (), lambda value=value: value) for name, value in zip(graph.inputs, inputs, strict=True)]
    nodes = (operation.task(state, context) for operation in ready or operations(graph))
    results = yield from dataflow([*given, *nodes], [name for name in names if name not in graph.state])
    return results | {name: state_share(state[name]) for name in names if name in graph.state}


def state_share(value: Share | Weight) -> Share:
    """A state tensor's share, whether it is loaded as a weight or not."""
    return value.share if isinstance(value, Weight) else value


def _blamed(node: Node, error: InputError) -> InputError:
    """The error of a lowering, naming the operator and the line of the model."""
    return type(error)(_described(node, str(error)))


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
        multiplications: words that each party multiplies in products.
        seconds: computing time of both parties together, where it was measured.
    """

    name: str
    layer: str
    operator: str
    rounds: int
    bytes_online: int
    bytes_dealt: int
    multiplications: int
    seconds: float = field(default=0.0, compare=False)

    def estimate(self, network: Network) -> float:
        """Seconds that it will take on this network, when nothing else shares its rounds."""
        return network.seconds(self.rounds, self.bytes_online) + _computing(self.multiplications, self.bytes_dealt)


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

    def estimate(self, network: Network) -> float:
        """Seconds that a run will take online on this network."""
        computing = sum(_computing(layer.multiplications, layer.bytes_dealt) for layer in self.layers)
        return network.seconds(self.rounds, self.bytes_online) + computing

    def __str__(self) -> str:
        lines = [f"{'operator':<44}{'rounds':>8}{'online B':>14}{'dealt B':>14}"]
        rows = [(f"{c.layer or c.name} ({c.operator})", c.rounds, c.bytes_online, c.bytes_dealt) for c in self.layers]
        rows.append(("in all", self.rounds, self.bytes_online, self.bytes_dealt))
        lines += [f"{name:<44}{rounds:>8}{online:>14,}{dealt:>14,}" for name, rounds, online, dealt in rows]
        return "\n".join(lines)


def _computing(multiplications: int, bytes_dealt: int) -> float:
    return SECONDS_PER_PRODUCT * multiplications + SECONDS_PER_DEALT_BYTE * bytes_dealt


def cost_of(graph: Graph, meter: Meter) -> Cost:
    """What a meter counted, operator by operator."""
    layers = []
    for node in graph.nodes:
        count = meter.layers.get(node.name, LayerCount())
        if count.rounds or count.bytes_dealt:
            costs = (count.rounds, count.bytes_online, count.bytes_dealt, count.multiplications, count.seconds)
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
        InputError: shapes do not fit, or the settings hold a window for an operator that there is not.
    """
    check(graph)
    unknown = context.windows.keys() - {node.name for node in graph.nodes}
    if unknown:
        raise InputError(f"the program has no operator {min(unknown)}: its windows were calibrated for another model")
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
