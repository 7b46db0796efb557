"""A program as bytes: what the model's owner tells the three processes.

A graph is names, numbers and references (`tacit.trace`), so its encoding is plain msgpack. Only operators and their
arguments travel: where in the owner's source code a node came from, and in which module, stays with the owner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import torch

from tacit.errors import CodecError, InputError
from tacit.mpc.correlation import Correlation
from tacit.mpc.lockstep import Meter, plan
from tacit.mpc.shares import Share
from tacit.mpc.steps import Role
from tacit.program.lowering import Context
from tacit.program.run import Cost, Operation, load, operations, plan_execution
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.trace import Graph, Node, Ref
from tacit.wire import parsed


@dataclass(frozen=True)
class Program:
    """All that the parties and the provider must agree on before a run.

    Args:
        graph: the operators.
        state: the shapes of its state tensors, by name.
        inputs: the shapes of its inputs.
        context: the engine's settings.
        first_number: weights are numbered from here; see `tacit.mpc.linear.load_weight`.
    """

    graph: Graph
    state: Mapping[str, tuple[int, ...]]
    inputs: tuple[tuple[int, ...], ...]
    context: Context
    first_number: int = 0

    def cost(self) -> Cost:
        """What one run takes; see `tacit.program.run.plan_execution`."""
        shapes = {name: torch.Size(shape) for name, shape in self.state.items()}
        return plan_execution(self.graph, shapes, self.inputs, self.context, self.first_number)

    @cached_property
    def ready(self) -> tuple[Operation, ...]:
        """The graph, made ready to run."""
        return operations(self.graph)

    def load_correlations(self) -> tuple[Correlation, ...]:
        """What is dealt to load the weights, in order."""
        blank = {
            name: Share(torch.empty(shape, dtype=torch.int64, device="meta"), FRACTION_BITS, Role.ALICE)
            for name, shape in self.state.items()
        }
        meter = Meter()
        plan(load(self.graph, blank, self.first_number), meter)
        return tuple(meter.correlations)


class _Node(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    name: str
    operator: str
    args: list[Any]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]


class _Program(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    inputs: tuple[str, ...]
    state: dict[str, tuple[int, ...]]
    nodes: list[_Node]
    outputs: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    context: Any
    first_number: int


_decoder = msgspec.msgpack.Decoder(_Program)
_REFERENCE, _DTYPE = "ref", "dtype"
_DTYPES = {
    str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
}


def encode_program(program: Program) -> bytes:
    """The program as bytes.

    Raises:
        InputError: an argument of a node is neither a number, a string, a reference, a dtype nor a list of these.
    """
    nodes = [
        _Node(n.name, n.operator, [_plain(arg) for arg in n.args], _plain_values(n.kwargs), n.shape)
        for n in program.graph.nodes
    ]
    state = {name: tuple(shape) for name, shape in program.state.items()}
    context = msgspec.to_builtins(program.context)
    packed = _Program(
        program.graph.inputs, state, nodes, program.graph.outputs, program.inputs, context, program.first_number
    )
    return msgspec.msgpack.encode(packed)


def decode_program(data: bytes) -> Program:
    """The program in these bytes.

    Raises:
        CodecError: they do not parse.
    """
    packed = parsed(_decoder, data, "the program")
    try:
        context = msgspec.convert(packed.context, Context)
    except msgspec.MsgspecError:
        context = None
    if context is None or msgspec.to_builtins(context) != packed.context:
        raise CodecError("the program's settings are not those this side knows: both must run the same version")
    nodes = tuple(
        Node(n.name, n.operator, tuple(map(_rebuilt, n.args)), {k: _rebuilt(v) for k, v in n.kwargs.items()}, n.shape)
        for n in packed.nodes
    )
    graph = Graph(packed.inputs, tuple(packed.state), nodes, packed.outputs)
    return Program(graph, packed.state, packed.input_shapes, context, packed.first_number)


def _plain(value: Any) -> Any:
    if isinstance(value, Ref):
        return {_REFERENCE: value.name}
    if isinstance(value, torch.dtype) and str(value) in _DTYPES:
        return {_DTYPE: str(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(f"an operator's argument of type {type(value).__name__} cannot be sent to the parties")


def _plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments without those that say where and how a tensor lies in memory, which the parties decide."""
    placing = ("device", "layout", "pin_memory", "memory_format")
    return {key: _plain(value) for key, value in values.items() if key not in placing}


def _rebuilt(value: Any) -> Any:
    if isinstance(value, list):
        return [_rebuilt(item) for item in value]
    if not isinstance(value, dict):
        return value
    match list(value.items()):
        case [("ref", str(name))]:
            return Ref(name)
        case [("dtype", str(name))] if name in _DTYPES:
            return _DTYPES[name]
    raise CodecError("the program holds an argument that is neither a number, a string, a reference nor a dtype")
