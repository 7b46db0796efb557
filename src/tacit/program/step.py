"""From a traced training step to a program for shares.

`torch.func` differentiates a model into ATen operators that recompute what they need from tensors: whether a ReLU was
open from its output, where a maximum stood from an index. On shares these bits are dear and already known, and a tensor
that enters several products need be opened once. `compile_step` rewrites the graph accordingly:

1. what depends on no input is computed, chains of public factors become one, and dropout's masks are drawn from a
   public seed that the parties toss (`tacit.mpc.coin`);
2. an embedding is a product with one-hot vectors, and so is its gradient;
3. the gradient of log-softmax is written with the softmax, which for labels that sum to one is a difference;
4. max-pooling moves before ReLU, and both keep their bits for their gradients (`tacit.mpc.gates`);
5. operands of products are masked, each once, and products take masked operands (`tacit.mpc.masked`);
6. the new parameters, buffers and the optimizer's state come out at one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tacit.errors import UnsupportedOperator
from tacit.program.lowering.backward import PARAMETER_BITS
from tacit.program.masking import mask_operands, namer
from tacit.trace import CONSTANT, Graph, Node, Ref, operator_of, substitute

_RELU, _MAX_POOL = "aten.relu.default", "aten.max_pool2d_with_indices.default"
_FACTORS = ("aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar", "aten.neg.default")
_SUMS = ("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar")
_FILLED = {"ones_like": 1.0, "zeros_like": 0.0, "new_ones": 1.0, "new_zeros": 0.0, "empty_like": 0.0, "empty": 0.0}
_DRAWN, _SEED = "aten.bernoulli.p", "dropout_seed"


@dataclass(frozen=True)
class StepProgram:
    """A training step that runs on shares.

    Args:
        graph: its program; the public constants are its last inputs.
        constants: their values, in the order of these inputs.
        labels_sum_to_one: whether the program relies on the labels summing to one along their second dimension.
    """

    graph: Graph
    constants: tuple[Tensor, ...]
    labels_sum_to_one: bool


def compile_step(
    graph: Graph, shapes: Sequence[tuple[int, ...]], labels: str, public: Sequence[str], kept: Sequence[str]
) -> StepProgram:
    """Rewrite a traced step.

    Args:
        graph: as `tacit.trace.trace_function` gives it.
        shapes: of its inputs.
        labels: the input that holds one row of probabilities, or one target, for each item.
        public: inputs that the parties know: numbers from 0 to 1, left operands of the products they enter.
        kept: the outputs that the next step takes: parameters and the optimizer's state.

    Raises:
        UnsupportedOperator: the step draws random numbers for something else than dropout, or uses a form of an
            operator that has no gradient here.
    """
    shape_of = {**dict(zip(graph.inputs, shapes, strict=True)), **{node.name: node.shape for node in graph.nodes}}
    nodes, constants = _fold(graph, shape_of)
    nodes = _embeddings_as_products(nodes, shape_of)
    nodes = _without_duplicates(nodes, graph.outputs)
    nodes, by_sum = _softmax_gradients(nodes, labels)
    nodes = _keep_bits(nodes)
    nodes = mask_operands(nodes, public, constants)
    nodes = _settle(nodes, kept)
    nodes = _live(nodes, graph.outputs)
    used = {name for node in nodes for name in node.refs}
    constants = {name: value for name, value in constants.items() if name in used}
    whole = replace(graph, inputs=(*graph.inputs, *constants), nodes=tuple(nodes))
    return StepProgram(whole, tuple(constants.values()), by_sum)


def _fold(graph: Graph, shape_of: Mapping[str, tuple[int, ...]]) -> tuple[list[Node], dict[str, Tensor]]:
    """Compute constants, and merge chains of public factors into one `tacit.scale`."""
    constants: dict[str, Tensor] = {}
    chains: dict[str, tuple[str, float]] = {}
    nodes: list[Node] = []

    def with_numbers(node: Node) -> Node:
        """Constants that are one number everywhere as that number, where the other operand gives the shape."""
        if not any(ref not in constants and shape_of[ref] == node.shape for ref in node.refs):
            return node

        def number(name: str) -> Any:
            flat = constants[name].flatten() if name in constants else None
            uniform = flat is not None and flat.numel() > 0 and bool((flat == flat[0]).all())
            return flat[0].item() if flat is not None and uniform else Ref(name)

        return replace(node, args=substitute(node.args, number))

    for node in graph.nodes:
        if node.operator == CONSTANT:
            constants[node.name] = torch.tensor(node.args[0])
        elif node.operator == "getitem" and node.args[0].name not in constants:
            nodes.append(node)
        elif (stem := node.operator.partition(".")[2].partition(".")[0]) in _FILLED:
            constants[node.name] = torch.full(node.shape, _FILLED[stem])
        elif stem in ("full_like", "new_full"):
            constants[node.name] = torch.full(node.shape, float(node.args[-1]))
        elif node.operator == _DRAWN:
            if not any(one.name == _SEED for one in nodes):
                nodes.append(Node(_SEED, "tacit.toss", (), {}))
            draw = (Ref(_SEED), node.name, tuple(node.shape), float(node.args[1]))
            nodes.append(replace(node, operator="tacit.kept", args=draw, kwargs={}))
        elif stem == "copy_":
            # What follows takes the node's own name, and so sees what was copied.
            nodes.append(replace(node, operator="aten.alias.default", args=node.args[1:2], kwargs={}))
        elif torch.Tag.nondeterministic_seeded in getattr(operator_of(node.operator), "tags", ()):
            raise UnsupportedOperator(f"{node.operator} at {node.source or 'the step'}: draws random numbers")
        elif all(name in constants for name in node.refs):
            args, kwargs = (substitute(part, constants.__getitem__) for part in (node.args, node.kwargs))
            on_cpu = {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs
            constants[node.name] = operator_of(node.operator)(*args, **on_cpu)
        elif node.operator in _FACTORS:
            nodes.append(_scaled(with_numbers(node), chains))
        elif node.operator in _SUMS:
            nodes += _scaled_sum(with_numbers(node))
        else:
            nodes.append(node)
    return nodes, constants


def _embeddings_as_products(nodes: list[Node], shape_of: Mapping[str, tuple[int, ...]]) -> list[Node]:
    """Rows of a table at private indices as one-hot vectors times the table; its gradient likewise."""
    result: list[Node] = []

    def one_hot(new: Callable[..., Node], indices: Ref, rows: int) -> Node:
        vectors = new("one_hot", "tacit.one_hot", indices, rows)
        flat = replace(new("flat", "aten.view.default", Ref(vectors.name), [-1, rows]), shape=(-1, rows))
        result.extend((vectors, flat))
        return flat

    for node in nodes:
        new = namer(node)
        if node.operator == "aten.embedding.default":
            table, indices = node.args[:2]
            flat = one_hot(new, indices, shape_of[table.name][0])
            rows = new("rows", "aten.mm.default", Ref(flat.name), table)
            result += [rows, replace(node, operator="aten.view.default", args=(Ref(rows.name), list(node.shape)))]
        elif node.operator == "aten.embedding_dense_backward.default":
            gradient, indices, rows, padding, by_frequency = node.args
            if by_frequency:
                raise UnsupportedOperator(f"{node.operator} at {node.source}: has no encrypted form by frequency")
            flat = replace(one_hot(new, indices, rows), shape=(rows, -1))
            turned = new("turned", "aten.t.default", Ref(flat.name))
            width = node.shape[-1]
            items = replace(new("items", "aten.view.default", gradient, [-1, width]), shape=(-1, width))
            total = replace(node, operator="aten.mm.default", args=(Ref(turned.name), Ref(items.name)), kwargs={})
            if padding >= 0:
                total = replace(total, name=f"{node.name}_total")
            result += [turned, items, total]
            if padding >= 0:
                result.append(replace(node, operator="tacit.without_row", args=(Ref(total.name), padding), kwargs={}))
        else:
            result.append(node)
    return result


def _scaled(node: Node, chains: dict[str, tuple[str, float]]) -> Node:
    """A product with a public number as `tacit.scale` of the start of its chain; other products as they are."""
    divides = "div" in node.operator
    if len(node.refs) != 1 or (divides and not isinstance(node.args[0], Ref)):
        return node
    number = next((float(arg) for arg in node.args if not isinstance(arg, Ref)), -1.0)
    source, factor = chains.get(node.refs[0], (node.refs[0], 1.0))
    chains[node.name] = source, factor / number if divides else factor * number
    return replace(node, operator="tacit.scale", args=(Ref(source), chains[node.name][1]), kwargs={})


def _scaled_sum(node: Node) -> list[Node]:
    """``x ± alpha·y`` with the public factor apart."""
    alpha = float(node.kwargs.get("alpha", 1))
    if alpha == 1.0 or not isinstance(node.args[1], Ref):
        return [node]
    factor = Node(f"{node.name}_alpha", "tacit.scale", (node.args[1], alpha), {}, node.shape, node.layer, node.source)
    return [factor, replace(node, args=(node.args[0], Ref(factor.name)), kwargs={})]


def _without_duplicates(nodes: list[Node], outputs: Sequence[str]) -> list[Node]:
    """Equal operators on equal operands, and factors of one, are one value."""
    renamed: dict[str, str] = {}
    first: dict[str, str] = {}
    kept = []
    for node in nodes:
        node = _renamed(node, renamed)
        key = repr((node.operator, node.args, node.kwargs))
        if node.name in outputs:
            kept.append(node)
        elif node.operator == "tacit.scale" and node.args[1] == 1.0:
            renamed[node.name] = node.args[0].name
        elif key in first:
            renamed[node.name] = first[key]
        else:
            kept.append(node)
            first[key] = node.name
    return kept


def _softmax_gradients(nodes: list[Node], labels: str) -> tuple[list[Node], bool]:
    """grad - softmax·Σgrad, where grad = c·labels and Σlabels = 1 as c·(labels - softmax)."""
    producers = {node.name: node for node in nodes}
    result: list[Node] = []
    by_sum = False
    for node in nodes:
        if node.operator != "aten._log_softmax_backward_data.default":
            result.append(node)
            continue
        gradient, forward = node.args[0], producers[node.args[1].name]
        dim = forward.args[1]
        new = namer(node)
        probability = new("softmax", "aten._softmax.default", forward.args[0], dim, False)
        result.append(probability)
        source, factor = gradient.name, 1.0
        if source in producers and producers[source].operator == "tacit.scale":
            source, factor = producers[source].args[0].name, producers[source].args[1]
        if source == labels and dim % len(node.shape) == 1:
            by_sum = True
            difference = new("difference", "aten.sub.Tensor", Ref(labels), Ref(probability.name))
            result += [difference, replace(node, operator="tacit.scale", args=(Ref(difference.name), factor))]
        else:
            total = new("sum", "aten.sum.dim_IntList", gradient, [dim], True)
            product = new("product", "aten.mul.Tensor", Ref(probability.name), Ref(total.name))
            result += [total, product, replace(node, operator="aten.sub.Tensor", args=(gradient, Ref(product.name)))]
    return result, by_sum


def _keep_bits(nodes: list[Node]) -> list[Node]:
    """ReLU and max-pooling with the bits for their gradients, pooling first where one follows the other."""
    producers = {node.name: node for node in nodes}
    users: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.refs:
            users.setdefault(name, []).append(node)
    ahead: dict[str, Node] = {}
    for node in nodes:
        if node.operator == _MAX_POOL:
            relu = producers.get(node.args[0].name)
            forward = [user for user in users.get(node.args[0].name, ()) if "backward" not in user.operator]
            if relu is not None and relu.operator == _RELU and forward == [node]:
                ahead[relu.name] = node
    pooled = {node.name: relu for relu, node in ahead.items()}
    result: list[Node] = []
    for node in nodes:
        new = namer(node)
        if node.operator == _RELU and node.name not in ahead:
            result += _with_bits(node, "tacit.relu", node.args[0])
        elif node.operator == _MAX_POOL:
            relu_name = pooled.get(node.name)
            source = producers[relu_name].args[0] if relu_name else node.args[0]
            geometry = _geometry(node.args[1:])
            result += _with_bits(node, "tacit.max_pool", source, *geometry)
            if relu_name:
                result += _with_bits(new("relu", _RELU), "tacit.relu", Ref(node.name))
        elif node.operator == "getitem" and producers[node.args[0].name].operator == _MAX_POOL:
            if node.args[1] == 0:
                pool = node.args[0].name
                source_name = f"{pool}_relu" if pool in pooled else pool
                result.append(replace(node, operator="aten.alias.default", args=(Ref(source_name),)))
        elif node.operator == "aten.max_pool2d_with_indices_backward.default":
            pool = producers[node.args[7].name].args[0].name
            gradient = node.args[0]
            if pool in pooled:
                through = new("relu_gradient", "tacit.relu_gradient", gradient, Ref(f"{pool}_relu_bits"))
                result.append(through)
                gradient = Ref(through.name)
            geometry = (node.shape[-2:], *_geometry(node.args[2:7]))
            args = (gradient, Ref(f"{pool}_bits"), *geometry)
            result.append(replace(node, operator="tacit.max_pool_gradient", args=args))
        elif node.operator == "aten.threshold_backward.default":
            relu_name = node.args[1].name
            if relu_name not in producers or producers[relu_name].operator != _RELU or node.args[2] != 0:
                raise UnsupportedOperator(f"{node.operator} of something else than relu has no encrypted form")
            if relu_name in ahead:
                result.append(replace(node, operator="aten.alias.default", args=node.args[:1]))
            else:
                args = (node.args[0], Ref(f"{relu_name}_bits"))
                result.append(replace(node, operator="tacit.relu_gradient", args=args))
        else:
            result.append(node)
    return result


def _with_bits(node: Node, operator: str, source: Ref, *geometry: Any) -> list[Node]:
    """The operator, its value under the node's name, and its bits under that name with ``_bits``."""
    new = namer(node)
    pair = new("with_bits", operator, source, node.name, *geometry)
    return [
        pair,
        replace(node, operator="tacit.part", args=(Ref(pair.name), 0)),
        new("bits", "tacit.part", Ref(pair.name), 1),
    ]


def _geometry(args: Sequence[Any]) -> tuple[Any, ...]:
    """What pooling operators take after their input, as `tacit.mpc.pooling.Windows` takes it."""
    defaults: tuple[Any, ...] = ([], [0], [1], False)
    kernel, stride, padding, dilation, ceil_mode = (*args, *defaults[len(args) - 1 :])
    every_axis = (tuple(v) * 2 if len(v) == 1 else tuple(v) for v in (kernel, stride or kernel, padding, dilation))
    return (*every_axis, ceil_mode)


def _settle(nodes: list[Node], kept: Sequence[str]) -> list[Node]:
    """Bring what the next step takes to `PARAMETER_BITS`, where it is computed."""
    result = []
    for node in nodes:
        if node.name in kept:
            exact = replace(node, name=f"{node.name}_exact")
            result += [
                exact,
                replace(node, operator="tacit.truncate", args=(Ref(exact.name), PARAMETER_BITS), kwargs={}),
            ]
        else:
            result.append(node)
    return result


def _live(nodes: list[Node], outputs: Iterable[str]) -> list[Node]:
    """The nodes that an output depends on."""
    needed, kept = set(outputs), list[Node]()
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.refs)
            kept.append(node)
    return kept[::-1]


def _renamed(node: Node, names: dict[str, str]) -> Node:
    def follow(name: str) -> Ref:
        return Ref(names.get(name, name))

    return replace(node, args=substitute(node.args, follow), kwargs=substitute(node.kwargs, follow))
