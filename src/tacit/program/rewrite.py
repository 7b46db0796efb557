"""What the model's owner simplifies in the clear before sharing it: constants, batch norms, the order of ReLU and
pooling."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tacit.trace import Graph, Node, Ref, operator_of, references, substitute

_BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"
_CONVOLUTION = "aten.convolution.default"
_LINEAR = "aten.addmm.default"
_MAX_POOL = "aten.max_pool2d_with_indices.default"
_RELU = "aten.relu.default"


@dataclass(frozen=True)
class Model:
    """A graph with the values of its state: what the owner holds.

    Args:
        graph: the program.
        state: the tensors that it takes besides its inputs, by name.
    """

    graph: Graph
    state: dict[str, Tensor]

    def __repr__(self) -> str:
        return f"Model({len(self.graph.nodes)} operators, {len(self.state)} state tensors)"


def simplify(model: Model) -> Model:
    """Apply every rewriting. The result computes the same function, up to float32 rounding in folded batch norms."""
    return _pool_before_relu(_fold_batch_norms(_fold_constants(model)))


def _with(model: Model, nodes: list[Node], state: dict[str, Tensor], renamed: dict[str, str]) -> Model:
    """The model with other nodes and state, references followed through ``renamed``, unused state dropped."""

    def final(name: str) -> str:
        while name in renamed:
            name = renamed[name]
        return name

    def follow(value: Any) -> Any:
        return substitute(value, lambda name: Ref(final(name)))

    nodes = [replace(node, args=follow(node.args), kwargs=follow(node.kwargs)) for node in nodes]
    outputs = tuple(final(name) for name in model.graph.outputs)
    used = set(outputs).union(*(node.refs for node in nodes))
    state = {name: value for name, value in state.items() if name in used}
    graph = replace(model.graph, state=tuple(state), nodes=tuple(nodes), outputs=outputs)
    return Model(graph, state)


def _fold_constants(model: Model) -> Model:
    """Compute, once and in the clear, every node that takes nothing but state."""
    values: dict[str, Any] = dict(model.state)
    nodes = []
    for node in model.graph.nodes:
        if node.refs and all(name in values for name in node.refs):
            args, kwargs = (substitute(part, values.__getitem__) for part in (node.args, node.kwargs))
            values[node.name] = operator_of(node.operator)(*args, **kwargs)
        else:
            nodes.append(node)
    tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
    return _with(model, nodes, tensors, {})


def _fold_batch_norms(model: Model) -> Model:
    """Turn y = x·a + b, a and b per channel, into new weights of the layer before, or into a product and a sum."""
    uses = _use_counts(model.graph)
    state, renamed = dict(model.state), dict[str, str]()
    nodes: dict[str, Node] = {}
    norms: dict[str, Node] = {}
    for node in model.graph.nodes:
        if node.operator == _BATCH_NORM:
            norms[node.name] = node
        elif node.operator != "getitem" or node.args[0].name not in norms:
            nodes[node.name] = node
        elif node.args[1] == 0:
            norm = norms[node.args[0].name]
            source, factor, offset = norm.args[0].name, *_affine(norm, state)
            before = nodes.get(source)
            if before is not None and uses[source] == 1 and _is_linear(before, state):
                nodes[source] = _absorb(before, factor, offset, state)
                renamed[node.name] = source
            else:
                column = (-1, *[1] * (len(node.shape) - 2))
                state[f"{norm.name}_factor"], state[f"{norm.name}_offset"] = (
                    factor.view(column),
                    offset.view(column),
                )
                product = replace(norm, operator="aten.mul.Tensor", args=(norm.args[0], Ref(f"{norm.name}_factor")))
                total = replace(node, operator="aten.add.Tensor", args=(Ref(norm.name), Ref(f"{norm.name}_offset")))
                nodes |= {product.name: product, total.name: total}
    return _with(model, list(nodes.values()), state, renamed)


def _affine(norm: Node, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """a and b of a batch norm, in float64."""
    _, weight, bias, mean, variance, _, epsilon = norm.args
    factor = torch.rsqrt(state[variance.name].double() + epsilon)
    if weight is not None:
        factor = factor * state[weight.name].double()
    offset = -state[mean.name].double() * factor
    if bias is not None:
        offset = offset + state[bias.name].double()
    return factor, offset


def _is_linear(node: Node, state: dict[str, Tensor]) -> bool:
    """Whether the node is a convolution or a linear layer with weights of its own."""
    if node.operator == _CONVOLUTION:
        return node.args[1].name in state and not node.args[6]
    return node.operator == _LINEAR and not node.kwargs and all(node.args[i].name in state for i in (0, 2))


def _absorb(node: Node, factor: Tensor, offset: Tensor, state: dict[str, Tensor]) -> Node:
    """The linear node with its weight and bias replaced by those of node·factor + offset."""
    args = list(node.args)
    weight_at, bias_at = (1, 2) if node.operator == _CONVOLUTION else (2, 0)
    weight = state[args[weight_at].name].double()
    columns = (-1, *[1] * (weight.dim() - 1)) if node.operator == _CONVOLUTION else (1, -1)
    bias = state[args[bias_at].name].double() if args[bias_at] is not None else torch.zeros_like(offset)
    for position, value in ((weight_at, weight * factor.reshape(columns)), (bias_at, bias * factor + offset)):
        name = f"{node.name}_folded_{'weight' if position == weight_at else 'bias'}"
        state[name] = value
        args[position] = Ref(name)
    return replace(node, args=tuple(args))


def _pool_before_relu(model: Model) -> Model:
    """max-pool(ReLU(x)) = ReLU(max-pool(x)), and the second has fewer signs to find."""
    uses = _use_counts(model.graph)
    producers = {node.name: node for node in model.graph.nodes}
    swapped: dict[str, str] = {}
    nodes: list[Node] = []
    for node in model.graph.nodes:
        if node.operator == _MAX_POOL:
            relu = producers.get(node.args[0].name)
            if relu is not None and relu.operator == _RELU and uses[relu.name] == 1:
                nodes.remove(relu)
                swapped[node.name] = relu.name
                node = replace(node, args=(relu.args[0], *node.args[1:]))
        nodes.append(node)
        if node.operator == "getitem" and node.args[0].name in swapped:
            relu = producers[swapped[node.args[0].name]]
            nodes[-1] = replace(node, name=f"{node.name}_pooled")
            nodes.append(replace(relu, name=node.name, args=(Ref(f"{node.name}_pooled"),)))
    return _with(model, nodes, model.state, {})


def _use_counts(graph: Graph) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in (*references([node.args for node in graph.nodes]), *graph.outputs):
        counts[name] = counts.get(name, 0) + 1
    return counts
