"""One descent step of a model as a graph of ATen operators, and its rewriting for the simulator.

The gradient is traced once and replayed without autograd (`tacit.federated.local.step_program`). Beforehand:

1. max-pooling moves before ReLU, which then sees a quarter of the numbers: a window's maximum is positive if and only
   if the maximum of its ReLU is, and lies at the same place, so values and gradients stay what they were;
2. where there are compiled loops (`tacit.federated.local.kernels`), a linear layer and its ReLU become one operator,
   and so do the mean cross-entropy and its gradient;
3. a weight's gradient that is a matrix product, and a bias's that is a sum over rows, are not made at all: the update
   of the weight takes what they would have been made of (`Product`, `RowSum`);
4. what nothing depends on is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tacit.federated.layout import trainable_parameters
from tacit.federated.local.work import Loss
from tacit.trace import Graph, Node, Ref, substitute, trace_function

LINEAR_RELU = "tacit.linear_relu"
"""``relu(addmm(bias, x, wᵀ))``, of the three."""
CROSS_ENTROPY = "tacit.cross_entropy"
"""Mean cross-entropy of logits and class indices, and its gradient by the logits."""

_POOL, _POOL_GRADIENT = "aten.max_pool2d_with_indices.default", "aten.max_pool2d_with_indices_backward.default"
_RELU, _RELU_GRADIENT = "aten.relu.default", "aten.threshold_backward.default"


@dataclass(frozen=True)
class Whole:
    """A gradient that the program computes, by name."""

    gradient: str


@dataclass(frozen=True)
class Product:
    """A gradient ``left @ right``, of the program's values of these names."""

    left: str
    right: str
    transposed: bool = False
    """Whether it is the transpose of that."""


@dataclass(frozen=True)
class RowSum:
    """A gradient that is the sum of the rows of the program's value of this name."""

    rows: str


Gradient = Whole | Product | RowSum


@dataclass(frozen=True)
class StepGraph:
    """A step, apart from its updates.

    Args:
        graph: takes the tensors of `parameter_names`, then the frozen parameters, the buffers, inputs and targets.
        loss: the name of the batch's mean loss.
        gradients: of each trainable parameter.
        buffers: the names of the buffers' new values.
    """

    graph: Graph
    loss: str
    gradients: tuple[Gradient, ...]
    buffers: tuple[str, ...]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """What a step takes beside its batch, in its order: trainable parameters, frozen parameters, buffers."""
    trainable = trainable_parameters(model)
    frozen = {name: p for name, p in model.named_parameters() if name not in trainable}
    return {**trainable, **frozen, **dict(model.named_buffers())}


def trace_step(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, fused: bool) -> StepGraph:
    """Trace the loss of a batch and its gradients.

    Args:
        model: in training mode.
        loss: mean loss of a batch.
        inputs: of the shape and dtype to trace for.
        targets: likewise.
        fused: whether operators that only `tacit.federated.local.kernels` has may be used.

    Raises:
        InputError: the model or the loss cannot be traced.
    """
    trainable = list(trainable_parameters(model))
    state = state_of(model)
    buffers = [name for name, _ in model.named_buffers()]

    def step(*values: Tensor) -> list[Tensor]:
        held = dict(zip(state, values[:-2], strict=True))

        def objective(weights: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
            written = {name: held[name].clone() for name in buffers}
            outputs = torch.func.functional_call(model, {**held, **weights, **written}, (values[-2],))
            return loss(outputs, values[-1]), list(written.values())

        differentiate = torch.func.grad_and_value(objective, has_aux=True)
        gradients, (value, written) = differentiate({name: held[name] for name in trainable})
        return [value, *(gradients[name] for name in trainable), *written]

    graph = trace_function(step, [*(value.detach() for value in state.values()), inputs, targets])
    graph = _pool_first(graph)
    if fused:
        graph = _whole_cross_entropy(_linear_with_relu(graph))
    gradients = tuple(_parts_of(graph, name) for name in graph.outputs[1 : 1 + len(trainable)])
    wanted = (graph.outputs[0], *graph.outputs[1 + len(trainable) :], *_names(gradients))
    live = replace(graph, nodes=_live(graph.nodes, wanted), outputs=wanted)
    return StepGraph(live, wanted[0], gradients, wanted[1 : 1 + len(buffers)])


def _names(gradients: Iterable[Gradient]) -> tuple[str, ...]:
    return tuple(name for gradient in gradients for name in vars(gradient).values() if isinstance(name, str))


def _live(nodes: Sequence[Node], wanted: Iterable[str]) -> tuple[Node, ...]:
    """The nodes that something wanted depends on."""
    needed, kept = set(wanted), list[Node]()
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.refs)
            kept.append(node)
    return tuple(kept[::-1])


def _users(graph: Graph) -> dict[str, list[Node]]:
    users: dict[str, list[Node]] = {name: [] for name in (*graph.inputs, *(node.name for node in graph.nodes))}
    for node in graph.nodes:
        for name in dict.fromkeys(node.refs):
            users[name].append(node)
    return users


def _parts_of(graph: Graph, name: str) -> Gradient:
    """What a gradient is made of, where the weights' update can take that instead."""
    nodes, users = {node.name: node for node in graph.nodes}, _users(graph)
    at, turned = name, False
    while at in nodes and len(users[at]) == (at != name) and graph.outputs.count(at) == (at == name):
        node = nodes[at]
        if node.operator == "aten.t.default":
            at, turned = node.refs[0], not turned
        elif node.operator == "aten.mm.default":
            return Product(node.refs[0], node.refs[1], turned)
        elif node.operator == "aten.view.default" and len(node.shape) == 1:
            total = nodes.get(node.refs[0])
            rows = total is not None and total.operator == "aten.sum.dim_IntList" and total.args[1:] == ([0], True)
            return RowSum(total.refs[0]) if total is not None and rows and len(total.shape) == 2 else Whole(name)
        else:
            break
    return Whole(name)


def _pool_first(graph: Graph) -> Graph:
    """ReLU and max-pooling the other way round, forward and backward."""
    users = _users(graph)
    for relu in graph.nodes:
        if relu.operator != _RELU or relu.name in graph.outputs:
            continue
        pools = [node for node in users[relu.name] if node.operator == _POOL]
        pooled_gradients = [node for node in users[relu.name] if node.operator == _POOL_GRADIENT]
        masks = [node for node in users[relu.name] if node.operator == _RELU_GRADIENT]
        maxima = [node for pool in pools for node in users[pool.name] if node.args[1] == 0]
        alone = len(pools) == len(pooled_gradients) == len(masks) == len(maxima) == 1 and len(users[relu.name]) == 3
        if not alone or masks[0].args[0] != Ref(pooled_gradients[0].name) or maxima[0].name in graph.outputs:
            continue
        if users[pooled_gradients[0].name] != masks or pooled_gradients[0].args[0] == Ref(relu.name):
            continue
        graph = _swap(graph, relu, maxima[0], pooled_gradients[0], masks[0])
        users = _users(graph)
    return graph


def _swap(graph: Graph, relu: Node, maximum: Node, pool_gradient: Node, mask: Node) -> Graph:
    open_name = f"{maximum.name}_open"
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.name == relu.name:
            continue
        source = {relu.name: relu.refs[0]}
        if node.name == maximum.name:
            relu_after = Node(open_name, _RELU, (Ref(maximum.name),), {}, maximum.shape, relu.layer, relu.source)
            nodes += [node, relu_after]
        elif node.name == pool_gradient.name:
            masked = f"{node.name}_masked"
            after = _renamed(node, {**source, maximum.name: open_name})
            arriving, *rest = after.args
            shape = maximum.shape
            nodes.append(
                Node(masked, _RELU_GRADIENT, (arriving, Ref(open_name), 0), {}, shape, mask.layer, mask.source)
            )
            nodes.append(replace(after, args=(Ref(masked), *rest)))
        elif node.name == mask.name:
            nodes.append(replace(node, operator="aten.alias.default", args=(Ref(pool_gradient.name),), kwargs={}))
        else:
            nodes.append(_renamed(node, {**source, maximum.name: open_name}))
    return replace(graph, nodes=tuple(nodes))


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    def follow(name: str) -> Ref:
        return Ref(names.get(name, name))

    return replace(node, args=substitute(node.args, follow), kwargs=substitute(node.kwargs, follow))


def _linear_with_relu(graph: Graph) -> Graph:
    """A linear layer whose result only its ReLU takes, as one operator under the ReLU's name."""
    users, nodes = _users(graph), {node.name: node for node in graph.nodes}
    fused: dict[str, Node] = {}
    for node in graph.nodes:
        linear = nodes.get(node.refs[0]) if node.operator == _RELU else None
        if linear is None or linear.operator != "aten.addmm.default" or linear.kwargs:
            continue
        if users[linear.name] == [node] and linear.name not in graph.outputs:
            fused[node.name] = replace(node, operator=LINEAR_RELU, args=linear.args)
    return replace(graph, nodes=tuple(fused.get(node.name, node) for node in graph.nodes))


def _whole_cross_entropy(graph: Graph) -> Graph:
    """The mean cross-entropy that is the loss, with its gradient, as one operator."""
    nodes = {node.name: node for node in graph.nodes}
    users = _users(graph)
    value = nodes.get(graph.outputs[0])
    loss = nodes[value.refs[0]] if value is not None and value.operator == "getitem" else None
    if loss is None or loss.operator != "aten.nll_loss_forward.default" or loss.args[2:] != (None, 1, -100):
        return graph
    softmax = nodes.get(loss.refs[0])
    if softmax is None or softmax.operator != "aten._log_softmax.default" or len(softmax.shape) != 2:
        return graph
    if softmax.args[1] not in (1, -1):
        return graph
    backward = [node for node in users[softmax.name] if node.operator == "aten._log_softmax_backward_data.default"]
    taken = [node for node in users[softmax.name] if node not in (loss, *backward)]
    if len(backward) != 1 or [node.operator for node in taken] != ["aten.nll_loss_backward.default"]:
        return graph
    arriving = nodes.get(taken[0].refs[0])
    ones = arriving is not None and arriving.operator == "aten.ones_like.default"
    if not ones or backward[0].args[0] != Ref(taken[0].name) or users[taken[0].name] != backward:
        return graph
    whole = f"{loss.name}_with_gradient"
    result: list[Node] = []
    for node in graph.nodes:
        if node is softmax:
            result.append(
                replace(node, name=whole, operator=CROSS_ENTROPY, args=(softmax.args[0], loss.args[1]), shape=())
            )
        elif value is not None and node.name in (value.name, backward[0].name):
            place = 0 if node.name == value.name else 1
            result.append(replace(node, operator="getitem", args=(Ref(whole), place), kwargs={}))
        elif node not in (loss, taken[0], arriving):
            result.append(node)
    live = _live(result, graph.outputs)
    return replace(graph, nodes=live) if _closed(live, graph.inputs) else graph


def _closed(nodes: Sequence[Node], inputs: Sequence[str]) -> bool:
    """Whether every value that is taken is there."""
    known = set(inputs)
    for node in nodes:
        if not known.issuperset(node.refs):
            return False
        known.add(node.name)
    return True
