"""A training step as bytes, and the parties' side of it: parameters stay shared between them from step to step.

The owner of a model compiles a step (`tacit.program.step`) and sends it to the three processes once. alice and bob keep
their shares of the parameters and of the optimizer's state; a step takes shares of a batch from the client and replaces
them. Public beside the graph are constants and the optimizer's numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from tacit.errors import CodecError, InputError
from tacit.mpc.lockstep import Meter, plan
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol, Role
from tacit.party.graphs import DTYPES, PackedNode, pack_nodes, unpack_context, unpack_graph
from tacit.program.lowering import Context
from tacit.program.lowering.backward import PARAMETER_BITS
from tacit.program.recipe import Recipe, run_step
from tacit.program.run import Cost, check, cost_of
from tacit.program.step import StepProgram
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.wire import parsed

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TrainingProgram:
    """All that the parties and the provider must agree on before a step.

    Args:
        step: the compiled step. Its inputs are the state, the batch, the optimizer's numbers and the constants, in this
            order; its outputs are the new values of the first of the state, and the loss.
        state: shapes of what the parties keep, by name, at `PARAMETER_BITS` fractional bits.
        batch: shapes of what the client sends for a step (inputs, labels), at `FRACTION_BITS`.
        numbers: how many public numbers the optimizer takes at each step.
        context: the engine's settings.
    """

    step: StepProgram
    state: Mapping[str, Shape]
    batch: tuple[Shape, ...]
    numbers: int
    context: Context

    @property
    def updated(self) -> tuple[str, ...]:
        """Names of the state that a step replaces; the rest is fixed."""
        return tuple(self.state)[: len(self.step.graph.outputs) - 1]

    def run(self, state: Mapping[str, Share], batch: Sequence[Share], numbers: Sequence[float]) -> Protocol[Any]:
        """One party's side of a step.

        Args:
            state: its shares of what it keeps, by name.
            batch: its shares of inputs and labels.
            numbers: the optimizer's, from 0 to 1.

        Returns:
            Its shares of the new state, in the order of `updated`, and of the loss.

        Raises:
            InputError: something does not fit the program; nothing has been opened.
        """
        if {name: tuple(share.shape) for name, share in state.items()} != dict(self.state):
            raise InputError("the state kept is not of the installed training step's names and shapes: keep one first")
        if tuple(tuple(share.shape) for share in batch) != self.batch:
            raise InputError("the batch does not have the shapes of the installed training step's")
        if len(numbers) != self.numbers or not all(0.0 <= number <= 1.0 for number in numbers):
            raise InputError(f"the optimizer of this step takes {self.numbers} numbers from 0 to 1")
        held = [state[name] for name in self.state]
        return run_step(self.step, [*held, *batch, *map(torch.tensor, numbers)], self.context)

    def cost(self) -> Cost:
        """What one step takes; see `plan`."""
        return self.plan()[0]

    def plan(self) -> tuple[Cost, int]:
        """What one step takes, and the fractional bits of its loss, from shapes alone.

        Raises:
            UnsupportedOperator: an operator, or a form of it, has no lowering.
            InputError: shapes do not fit, or what a step leaves is not what the next one takes.
        """
        check(self.step.graph)
        blank = StepProgram(
            self.step.graph, tuple(c.to("meta") for c in self.step.constants), self.step.labels_sum_to_one
        )
        held = [_blank(shape, PARAMETER_BITS) for shape in self.state.values()]
        batch = [_blank(shape, FRACTION_BITS) for shape in self.batch]
        numbers = [torch.empty((), device="meta")] * self.numbers
        meter = Meter()
        try:
            outputs = plan(run_step(blank, [*held, *batch, *numbers], self.context), meter)
        except (RuntimeError, TypeError, IndexError) as error:
            raise InputError(f"the training step does not fit its shapes: {error}") from error
        left = [(tuple(value.shape), value.scale) for value in outputs if isinstance(value, Share)]
        if len(left) < len(outputs) or left[:-1] != [(self.state[name], PARAMETER_BITS) for name in self.updated]:
            raise InputError("the training step leaves a state of other shapes or scales than it takes")
        return cost_of(self.step.graph, meter), outputs[-1].scale


def training_program(recipe: Recipe, shape: Shape) -> TrainingProgram:
    """The step of a recipe on batches of this shape, for the three processes.

    Raises:
        InputError: the model does not take such batches, or has no gradient on shares.
        UnsupportedOperator: the step uses an operator that has no encrypted form.
    """
    planned = recipe.plan(tuple(shape))
    numbers = len(recipe.optimizer.numbers(1))
    return TrainingProgram(planned.program, recipe.shapes, (tuple(shape), planned.output), numbers, recipe.context)


def _blank(shape: Shape, scale: int) -> Share:
    return Share(torch.empty(shape, dtype=torch.int64, device="meta"), scale, Role.ALICE)


class _Constant(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    dtype: str
    shape: Shape
    data: bytes


class _TrainingProgram(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    inputs: tuple[str, ...]
    nodes: list[PackedNode]
    outputs: tuple[str, ...]
    constants: list[_Constant]
    labels_sum_to_one: bool
    state: list[tuple[str, Shape]]
    batch: tuple[Shape, ...]
    numbers: int
    context: Any


_decoder = msgspec.msgpack.Decoder(_TrainingProgram)


def encode_training_program(program: TrainingProgram) -> bytes:
    """The program as bytes; constants in full, since they are public.

    Raises:
        InputError: an argument of a node, or a constant's dtype, does not travel.
    """
    graph = program.step.graph
    packed = _TrainingProgram(
        graph.inputs,
        pack_nodes(graph.nodes),
        graph.outputs,
        [_packed(constant) for constant in program.step.constants],
        program.step.labels_sum_to_one,
        [(name, tuple(shape)) for name, shape in program.state.items()],
        program.batch,
        program.numbers,
        msgspec.to_builtins(program.context),
    )
    return msgspec.msgpack.encode(packed)


def decode_training_program(data: bytes) -> TrainingProgram:
    """The program in these bytes.

    Raises:
        CodecError: they do not parse, or hold no step that this side can run.
    """
    packed = parsed(_decoder, data, "the training step")
    graph = unpack_graph(packed.inputs, (), packed.nodes, packed.outputs)
    state = dict(packed.state)
    counts = (len(state), len(packed.batch), packed.numbers, len(packed.constants))
    if len(state) < len(packed.state) or min(counts) < 0 or sum(counts) != len(graph.inputs):
        raise CodecError("the training step does not take one input for each tensor that it is said to take")
    if not 1 <= len(graph.outputs) <= len(state) + 1:
        raise CodecError("the training step returns something else than a part of its state and the loss")
    step = StepProgram(graph, tuple(map(_constant, packed.constants)), packed.labels_sum_to_one)
    return TrainingProgram(step, state, packed.batch, packed.numbers, unpack_context(packed.context))


def _packed(constant: Tensor) -> _Constant:
    if str(constant.dtype) not in DTYPES:
        raise InputError(f"a constant of dtype {constant.dtype} cannot be sent to the parties")
    data = constant.detach().cpu().contiguous().numpy().tobytes()
    return _Constant(str(constant.dtype), tuple(constant.shape), data)


def _constant(packed: _Constant) -> Tensor:
    dtype = DTYPES.get(packed.dtype)
    if dtype is None or min(packed.shape, default=0) < 0:
        raise CodecError("the training step holds a constant of a dtype or shape that this side does not know")
    if len(packed.data) != math.prod(packed.shape) * dtype.itemsize:
        raise CodecError("the training step holds a constant with another number of bytes than its shape takes")
    if not packed.data:
        return torch.empty(packed.shape, dtype=dtype)
    return torch.frombuffer(bytearray(packed.data), dtype=dtype).reshape(packed.shape)
