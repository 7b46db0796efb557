"""A PyTorch model as a graph of ATen operators: plain data that a party can check before it runs anything.

`trace` exports a model with `torch.export`, decomposed to core ATen operators, and copies what matters into a `Graph`;
`trace_function` does the same for a function of tensors, gradients that `torch.func` takes inside it included.
A graph holds names, numbers and references and no code, so a computing party that receives one executes nothing but the
operators it knows.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch.export.graph_signature import InputKind
from torch.fx.experimental.proxy_tensor import make_fx

from tacit.errors import InputError


@dataclass(frozen=True)
class Ref:
    """The result of the node, input or state tensor of this name."""

    name: str


@dataclass(frozen=True)
class Node:
    """One operator applied once.

    Args:
        name: unique in its graph.
        operator: as ATen writes it (``aten.relu.default``), ``getitem``, or an operator of tacit's own (``tacit.…``).
        args: numbers, strings, None, `Ref`, and lists of these.
        kwargs: likewise, by name.
        shape: of its result; empty where the result is not one tensor.
        layer: dotted path of the submodule it comes from; empty for the model's own code.
        source: file, line and text of the model's code it comes from, for messages.
    """

    name: str
    operator: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape: tuple[int, ...] = ()
    layer: str = ""
    source: str = ""

    @property
    def refs(self) -> tuple[str, ...]:
        """Names of the values it takes, in order, repeated if taken twice."""
        return tuple(references((self.args, self.kwargs)))


@dataclass(frozen=True)
class Graph:
    """A program: nodes in an order in which each comes after those it takes.

    Args:
        inputs: names of the inputs, in the order of the model's arguments.
        state: names of the parameters, buffers and constants that nodes take.
        nodes: the operators.
        outputs: the names of the results.
    """

    inputs: tuple[str, ...]
    state: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]


def references(value: Any) -> Iterator[str]:
    """The names of all references in nested lists, tuples and mappings."""
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from references(item)
    elif isinstance(value, Mapping):
        yield from references(list(value.values()))


def substitute(value: Any, replace: Callable[[str], Any]) -> Any:
    """The same nested structure with every reference replaced by ``replace(name)``."""
    if isinstance(value, Ref):
        return replace(value.name)
    if isinstance(value, (list, tuple)):
        return type(value)(substitute(item, replace) for item in value)
    if isinstance(value, Mapping):
        return {key: substitute(item, replace) for key, item in value.items()}
    return value


RELU_MAX_POOL = "tacit.max_pool2d_relu"
"""``relu(max_pool2d(x, ...))``."""
CONSTANT = "tacit.constant"
"""A public tensor, from nested lists of numbers and a shape to expand them to."""
TRUTH = "tacit.truth"
"""A private tensor of zeros and ones as truth values."""


def _constant(values: Any, shape: list[int] | None = None) -> Tensor:
    return torch.tensor(values) if shape is None else torch.tensor(values).expand(shape)


_OWN: dict[str, Callable[..., Any]] = {
    "getitem": lambda values, index: values[index],
    RELU_MAX_POOL: lambda x, *geometry: torch.relu(torch.max_pool2d(x, *geometry)),
    CONSTANT: _constant,
    TRUTH: lambda x: x.bool(),
}


def operator_of(name: str) -> Callable[..., Any]:
    """The function in the clear that a node's operator name stands for: torch's own, or one of tacit's."""
    if name in _OWN:
        return _OWN[name]
    _, packet, overload = name.split(".")
    operator: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
    return operator


def trace(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[Graph, dict[str, Tensor]]:
    """Trace a model in evaluation mode.

    Args:
        model: any module that `torch.export` can trace; it is copied, not changed.
        example: inputs of the shapes and dtypes to plan for; their values do not matter.

    Returns:
        The graph, and the values of its state by name.

    Raises:
        InputError: the model cannot be traced, for example because its control flow depends on data.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export deprecates parts of itself while it runs
        try:
            program = torch.export.export(copy.deepcopy(model).eval(), example).run_decompositions()
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"{type(model).__name__} cannot be traced by torch.export: {reason}") from error
    holders = {InputKind.PARAMETER: program.state_dict, InputKind.BUFFER: program.state_dict}
    inputs: list[str] = []
    values: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        name = getattr(spec.arg, "name", str(spec.arg))
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(name)
        else:
            source = holders.get(spec.kind, program.constants)
            key = str(spec.target)
            value = source[key] if key in source else program.constants[key]
            values[name] = value.detach()
    nodes = tuple(_node(node) for node in program.graph.nodes if node.op == "call_function")
    outputs = tuple(references(_plain(program.graph.output_node().args)))
    used = set(outputs).union(*(node.refs for node in nodes))
    state = {name: value for name, value in values.items() if name in used}
    return Graph(tuple(inputs), tuple(state), nodes, outputs), state


def trace_function(
    function: Callable[..., Sequence[Tensor]],
    examples: Sequence[Tensor],
    definitions: Mapping[Any, Callable[..., Any]] | None = None,
) -> Graph:
    """Trace a function of tensors to the ATen operators that it comes down to.

    Args:
        function: takes tensors and returns a sequence of them; ``torch.func.grad`` may be used inside.
        examples: inputs of the shapes and dtypes to trace for; their values do not matter.
        definitions: of operators that are to be traced as what they are defined by; a few losses and activations
            unless given.

    Returns:
        A graph without state. Tensors that the function creates or closes over are `CONSTANT` nodes: they are public.

    Raises:
        InputError: the function cannot be traced, for example because its control flow depends on data.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            traced = make_fx(
                torch.func.functionalize(function),
                dict(definitions or _DECOMPOSITIONS),
                "fake",
                _allow_non_fake_inputs=True,
                record_stack_traces=True,
            )
            module = traced(*(torch.empty_like(example) for example in examples))
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"the function cannot be traced: {reason}") from error
    module.graph.eliminate_dead_code()
    nodes = []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = getattr(module, node.target)
            nodes.append(Node(node.name, CONSTANT, (value.tolist(),), {}, tuple(value.shape)))
        elif node.op == "call_function":
            nodes.append(_node(node))
    inputs = tuple(node.name for node in module.graph.nodes if node.op == "placeholder")
    outputs = tuple(references(_plain(module.graph.output_node().args)))
    return Graph(inputs, (), tuple(nodes), outputs)


_aten = torch.ops.aten
_DECOMPOSITIONS: Any = get_decompositions(
    [_aten.mse_loss, _aten.mse_loss_backward, _aten.tanh_backward, _aten.sigmoid_backward, _aten.addcmul, _aten.addcdiv]
)
"""Operators whose definition in terms of products and sums is what would be run anyway."""


def _node(node: fx.Node) -> Node:
    operator = "getitem" if getattr(node.target, "__name__", "") == "getitem" else str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return Node(
        node.name,
        operator,
        tuple(_plain(node.args)),
        _plain(node.kwargs),
        tuple(getattr(node.meta.get("val"), "shape", ())),
        paths[-1] if paths else "",
        _user_line(node.meta.get("stack_trace") or ""),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return Ref(value.name)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]+\n\s*(?P<text>[^\n]*)')
_TORCH = str(Path(torch.__file__).parent)


def _user_line(stack: str) -> str:
    frames = [frame for frame in _FRAME.finditer(stack) if not frame["file"].startswith(_TORCH)]
    return f"{Path(frames[-1]['file']).name}:{frames[-1]['line']}: {frames[-1]['text'].strip()}" if frames else ""
