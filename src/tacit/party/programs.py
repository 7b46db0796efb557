"""A program for prediction as bytes: what the owner of a model tells the three processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import torch

from tacit.mpc.correlation import Correlation
from tacit.mpc.lockstep import Meter, plan
from tacit.mpc.shares import Share
from tacit.mpc.steps import Role
from tacit.party.graphs import PackedNode, pack_nodes, unpack_context, unpack_graph
from tacit.program.lowering import Context
from tacit.program.run import Cost, Operation, load, operations, plan_execution
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.trace import Graph
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


class _Program(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    inputs: tuple[str, ...]
    state: dict[str, tuple[int, ...]]
    nodes: list[PackedNode]
    outputs: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    context: Any
    first_number: int


_decoder = msgspec.msgpack.Decoder(_Program)


def encode_program(program: Program) -> bytes:
    """The program as bytes.

    Raises:
        InputError: an argument of a node is neither a number, a string, a reference, a dtype nor a list of these.
    """
    state = {name: tuple(shape) for name, shape in program.state.items()}
    context = msgspec.to_builtins(program.context)
    packed = _Program(
        program.graph.inputs,
        state,
        pack_nodes(program.graph.nodes),
        program.graph.outputs,
        program.inputs,
        context,
        program.first_number,
    )
    return msgspec.msgpack.encode(packed)


def decode_program(data: bytes) -> Program:
    """The program in these bytes.

    Raises:
        CodecError: they do not parse, or hold no program that this side can run.
    """
    packed = parsed(_decoder, data, "the program")
    graph = unpack_graph(packed.inputs, tuple(packed.state), packed.nodes, packed.outputs)
    return Program(graph, packed.state, packed.input_shapes, unpack_context(packed.context), packed.first_number)
