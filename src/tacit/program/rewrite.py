"""What the model's owner simplifies in the clear before sharing it: constants, batch norms, the order of ReLU and
pooling, SiLU."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tacit.trace import CONSTANT, RELU_MAX_POOL, TRUTH, Graph, Node, Ref, operator_of, references, substitute

_BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"
_CLAMP = "aten.clamp.default"
_CONVOLUTION = "aten.convolution.default"
_LINEAR = "aten.addmm.default"
_MAX_POOL = "aten.max_pool2d_with_indices.default"
_PRODUCT = "aten.mul.Tensor"
_RELU = "aten.relu.default"
_SIGMOID = "aten.sigmoid.default"
_SILU = "aten.silu.default"
_WHERE = "aten.where.self"
_POSITIONS = {
    "aten.index.Tensor": 1,
    "aten.index_select.default": 2,
    "aten.gather.default": 2,
    "aten.embedding.default": 1,
}
"""Which argument says where to gather."""
_FILLINGS = {
    "full_like": None,
    "new_full": None,
    "zeros_like": 0.0,
    "new_zeros": 0.0,
    "ones_like": 1.0,
    "new_ones": 1.0,
    "isinf": False,
    "isnan": False,
}
"""Operators that fill a tensor of their operand's shape, with their last argument if None; no fixed point is
infinite."""
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


@dataclass(frozen=True)
class Model:
    """A graph with the values of its state: what the owner holds.

    Args:
        graph: the program.
        state: the tensors that it takes besides its inputs, by name.
    """

    graph: Graph
    state: dict[str, Tensor]

    def same_state(self, other: Model) -> bool:
        """Whether another trace of the model takes the same state; constants may follow the input's shape."""
        mine, theirs = self.state, other.state
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def __repr__(self) -> str:
        return f"Model({len(self.graph.nodes)} operators, {len(self.state)} state tensors)"


def simplify(model: Model) -> Model:
    """Apply every rewriting. The result computes the same function, up to float32 rounding in folded batch norms."""
    return _mark_truths(_merge_clamps(_fuse_silu(_fuse_pooling(_fold_batch_norms(_fold_constants(model))))))


def _with(model: Model, nodes: list[Node], state: dict[str, Tensor], renamed: dict[str, str]) -> Model:
    """The model with other nodes and state, references followed through ``renamed``, what is unused dropped.

    Assertions about values go with what is unused: they have no result.
    """

    def final(name: str) -> str:
        while name in renamed:
            name = renamed[name]
        return name

    def follow(value: Any) -> Any:
        return substitute(value, lambda name: Ref(final(name)))

    outputs = tuple(final(name) for name in model.graph.outputs)
    used, kept = set(outputs), list[Node]()
    for node in reversed(nodes):
        if node.name in used:
            kept.insert(0, replace(node, args=follow(node.args), kwargs=follow(node.kwargs)))
            used.update(kept[0].refs)
    nodes = kept
    state = {name: value for name, value in state.items() if name in used}
    graph = replace(model.graph, state=tuple(state), nodes=tuple(nodes), outputs=outputs)
    return Model(graph, state)


def _fold_constants(model: Model) -> Model:
    """Compute, once and in the clear, every node that takes no input.

    What takes nothing but numbers (masks, positions, zeros to start from) becomes a public constant; what takes state
    is state. Whole numbers at which a node gathers are its structure, as its shape is, and public too.
    """
    state: dict[str, Any] = dict(model.state)
    public: dict[str, Any] = {}
    shapes = {node.name: node.shape for node in model.graph.nodes}
    nodes: list[Node] = []
    renamed: dict[str, str] = {}
    for node in model.graph.nodes:
        node = _with_public_positions(node, state, public)
        implied = _implied(node)
        if implied is not None:
            public[node.name] = implied
        elif all(name in public for name in node.refs) and _is_deterministic(node):
            public[node.name] = _computed(node, public)
        elif node.refs and all(name in public or name in state for name in node.refs):
            state[node.name] = _computed(node, {**state, **public})
        else:
            branch = _only_branch(node, public)
            if branch is not None and shapes.get(branch) == node.shape:
                renamed[node.name] = branch
            nodes.append(node)
    nodes = [node for node in nodes if node.name not in renamed]
    literals = [_literal(name, value) for name, value in public.items() if isinstance(value, Tensor)]
    tensors = {name: value.contiguous() for name, value in state.items() if isinstance(value, Tensor)}
    return _with(model, [*literals, *nodes], tensors, renamed)


def _computed(node: Node, values: dict[str, Any]) -> Any:
    args, kwargs = (substitute(part, values.__getitem__) for part in (node.args, node.kwargs))
    return operator_of(node.operator)(*args, **kwargs)


def _is_deterministic(node: Node) -> bool:
    if node.operator == "getitem":
        return True
    tags = getattr(operator_of(node.operator), "tags", ()) if node.operator.startswith("aten.") else None
    return tags is not None and torch.Tag.nondeterministic_seeded not in tags


def _with_public_positions(node: Node, state: dict[str, Any], public: dict[str, Any]) -> Node:
    """The node, with the whole-number state at its positions moved to the public constants."""
    position = _POSITIONS.get(node.operator)
    if position is None:
        return node

    def moved(name: str) -> Ref:
        value = state.get(name)
        if not isinstance(value, Tensor) or value.is_floating_point():
            return Ref(name)
        public[f"{name}_public"] = value
        return Ref(f"{name}_public")

    args = list(node.args)
    args[position] = substitute(args[position], moved)
    return replace(node, args=tuple(args))


def _implied(node: Node) -> Tensor | None:
    """The value of a node that depends only on a private tensor's shape: a filling, a comparison with infinity."""
    stem = node.operator.split(".")[1] if "." in node.operator else ""
    if stem in _FILLINGS:
        filler = _FILLINGS[stem]
        number = node.args[-1] if filler is None else filler
        return None if isinstance(number, Ref) else torch.full(node.shape, number)
    if stem in _COMPARISONS and node.args[1] in (math.inf, -math.inf):
        return _computed(replace(node, args=(torch.zeros(node.shape), node.args[1])), {})  # type: ignore[no-any-return]
    return None


def _only_branch(node: Node, public: dict[str, Any]) -> str | None:
    """The one operand that a selection by a public condition ever takes."""
    if node.operator != _WHERE or node.args[0].name not in public:
        return None
    condition = public[node.args[0].name]
    if bool(condition.all()) or not bool(condition.any()):
        branch = node.args[1 if bool(condition.all()) else 2]
        return branch.name if isinstance(branch, Ref) else None
    return None


def _literal(name: str, value: Tensor) -> Node:
    """A public tensor as a node; one number and a shape, if it holds only one."""
    if value.numel() and bool((value == value.flatten()[0]).all()):
        return Node(name, CONSTANT, (value.flatten()[0].item(), list(value.shape)), {}, tuple(value.shape))
    return Node(name, CONSTANT, (value.tolist(),), {}, tuple(value.shape))


def _fuse_silu(model: Model) -> Model:
    """x·sigmoid(x), which is what SiLU decomposes to, is one look-up; as a product its error would grow with x."""
    producers = {node.name: node for node in model.graph.nodes}
    nodes = []
    for node in model.graph.nodes:
        if node.operator == _PRODUCT and all(isinstance(arg, Ref) for arg in node.args):
            for x, gate in (node.args, node.args[::-1]):
                sigmoid = producers.get(gate.name)
                if sigmoid is not None and sigmoid.operator == _SIGMOID and sigmoid.args[0] == x:
                    node = replace(node, operator=_SILU, args=(x,))
                    break
        nodes.append(node)
    return _with(model, nodes, model.state, {})


def _mark_truths(model: Model) -> Model:
    """Boolean state (a mask in a buffer) is shared as numbers, zeros and ones; nodes take it as truth values."""
    truths = {name: value for name, value in model.state.items() if value.dtype == torch.bool}

    def marked(name: str) -> Ref:
        return Ref(f"{name}_truth" if name in truths else name)

    nodes = [Node(f"{name}_truth", TRUTH, (Ref(name),), {}, tuple(value.shape)) for name, value in truths.items()]
    for node in model.graph.nodes:
        nodes.append(replace(node, args=substitute(node.args, marked), kwargs=substitute(node.kwargs, marked)))
    return _with(model, nodes, model.state, {})


def _merge_clamps(model: Model) -> Model:
    """clamp(clamp(x, low), max=high), which hard activations decompose to, is one clamp between both bounds."""
    producers = {node.name: node for node in model.graph.nodes}
    nodes = []
    for node in model.graph.nodes:
        inner = producers.get(node.args[0].name) if node.operator == _CLAMP else None
        if inner is not None and inner.operator == _CLAMP and len(inner.args) == 2 and node.args[1] is None:
            low, high = inner.args[1], node.args[2]
            if isinstance(low, int | float) and isinstance(high, int | float) and low < high:
                node = replace(node, args=(inner.args[0], low, high))
        nodes.append(node)
    return _with(model, nodes, model.state, {})


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


def _fuse_pooling(model: Model) -> Model:
    """Max-pooling before or after a ReLU as one operator: max(0, ·) commutes with it, and saves signs."""
    uses = _use_counts(model.graph)
    nodes = {node.name: node for node in model.graph.nodes}
    for result in model.graph.nodes:
        pool = nodes.get(result.args[0].name) if result.operator == "getitem" else None
        if pool is None or pool.operator != _MAX_POOL or uses[pool.name] > 1:
            continue
        before = nodes.get(pool.args[0].name)
        after = next((node for node in nodes.values() if result.name in node.refs), None)
        if before is not None and before.operator == _RELU and uses[before.name] == 1:
            fused, dropped = replace(pool, name=result.name, args=(before.args[0], *pool.args[1:])), (before, pool)
        elif after is not None and after.operator == _RELU and uses[result.name] == 1:
            fused, dropped = replace(pool, name=after.name), (pool, result)
        else:
            continue
        nodes[fused.name] = replace(fused, operator=RELU_MAX_POOL)
        for node in dropped:
            del nodes[node.name]
    return _with(model, list(nodes.values()), model.state, {})


def _use_counts(graph: Graph) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in (*references([node.args for node in graph.nodes]), *graph.outputs):
        counts[name] = counts.get(name, 0) + 1
    return counts
