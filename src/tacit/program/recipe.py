"""What is trained and how, before anything is shared: what a model's owner and its client know of a training.

A `Recipe` traces the plaintext step of a module, a loss and an optimizer, rewrites it for shares, plans it, and turns a
batch into what is shared. It holds no share and runs nothing; `tacit.program.training` does, and so do real processes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from tacit.errors import InputError
from tacit.mpc.lockstep import Meter, plan
from tacit.mpc.masked import Forget
from tacit.mpc.shares import Share, reconstruct, share
from tacit.mpc.steps import Protocol, Role, Take
from tacit.program.definitions import DEFINITIONS, plain_operators
from tacit.program.lowering import Context
from tacit.program.lowering.backward import PARAMETER_BITS
from tacit.program.optimizers import Optimizer
from tacit.program.run import Cost, check, cost_of, execute
from tacit.program.step import StepProgram, compile_step
from tacit.ring.fixed_point import FRACTION_BITS, encode
from tacit.ring.prg import Prg
from tacit.trace import trace_function

Loss = Callable[[Tensor, Tensor], Tensor]
Pair = tuple[Share, Share]
_SUM_TOLERANCE = 2.0**-10


@dataclass(frozen=True)
class PlannedStep:
    """The step on batches of one shape.

    Args:
        program: what runs on shares.
        cost: of one step.
        output: the shape of the model's output.
        dtype: of its input in the clear: int64 where it takes whole numbers.
    """

    program: StepProgram
    cost: Cost
    output: tuple[int, ...]
    dtype: torch.dtype


def run_step(program: StepProgram, inputs: list[Any], context: Context) -> Protocol[tuple[Share, ...]]:
    """One party's side of a step: the graph, and then the provider forgets the step's masks."""
    given: list[Any] = [*inputs, *program.constants]
    outputs = yield from execute(program.graph, {}, given, context)
    yield Take(Forget())
    return outputs


class Recipe:
    """A model, a loss and an optimizer, to be trained on shares.

    Args:
        model: it is copied, and trained in the mode that it is in.
        loss: of the model's output and the labels, as a number.
        optimizer: see `tacit.program.optimizers`.
        context: the engine's settings.

    Raises:
        InputError: the model has nothing to train, or the context asks for what training has not.
    """

    def __init__(self, model: nn.Module, loss: Loss, optimizer: Optimizer, context: Context) -> None:
        if context.exact:
            raise InputError(
                "training has no exact mode: gradients far below a unit are kept by roundings that go up or down by "
                "chance, and rounding down would drop them; leave exact out of the context"
            )
        if context.windows or context.finer:
            raise InputError(
                "training has no calibrated windows: they belong to weights that do not change; leave them out"
            )
        self.module, self._loss, self.optimizer, self.context = copy.deepcopy(model), loss, optimizer, context
        self.name = type(model).__name__
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        floating = {name: value for name, value in tensors.items() if value.is_floating_point()}
        self.trained = tuple(name for name, value in floating.items() if value.requires_grad)
        if not self.trained:
            raise InputError(f"{self.name} has no parameter that requires a gradient: there is nothing to train")
        # Running statistics, for example; those that a step leaves alone come out as they went in.
        self.buffers = tuple(name for name, _ in self.module.named_buffers() if name in floating)
        self.fixed = tuple(name for name in floating if name not in (*self.trained, *self.buffers))
        self.state = {name: value.detach() for name, value in floating.items()}
        for name in self.trained:
            self.state |= {f"{slot} of {name}": torch.zeros_like(floating[name]) for slot in optimizer.slots}
        self._plans: dict[tuple[int, ...], PlannedStep] = {}

    @property
    def updated(self) -> tuple[str, ...]:
        """Names of what a step changes, in the order of its outputs."""
        slots = (f"{slot} of {name}" for name in self.trained for slot in self.optimizer.slots)
        return (*self.trained, *slots, *self.buffers)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what makes up the model."""
        return (*self.trained, *self.buffers, *self.fixed)

    @property
    def order(self) -> tuple[str, ...]:
        """Names of what a step takes, in the order of its inputs."""
        return (*self.updated, *self.fixed)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all that a step takes besides the batch, in order."""
        return {name: tuple(self.state[name].shape) for name in self.order}

    @property
    def description(self) -> str:
        """What a checkpoint belongs to."""
        return f"{self.name} trained by {self.optimizer}"

    def share_state(self, owner: Prg) -> dict[str, Pair]:
        """Shares of the parameters, the buffers and the optimizer's state, as they begin.

        Raises:
            RangeError: a value is not finite, or of magnitude 64 or more.
        """
        return {
            name: share(encode(self.state[name], PARAMETER_BITS, what=f"{name} of {self.name}"), PARAMETER_BITS, owner)
            for name in self.order
        }

    def share_batch(self, inputs: Any, labels: Any, client: Prg) -> tuple[PlannedStep, list[Pair]]:
        """The step for a batch, and shares of its inputs and of its labels as the loss takes them.

        Raises:
            InputError: shapes, dtypes or labels do not fit.
            RangeError: a value is not finite, or of magnitude 16,384 or more.
            UnsupportedOperator: the step uses an operator that has no encrypted form.
        """
        inputs = real_rows(inputs)
        words = encode(inputs)
        planned = self.plan(tuple(inputs.shape), inputs.dtype)
        real = targets(labels, planned.output, sum_to_one=planned.program.labels_sum_to_one)
        return planned, [share(value, FRACTION_BITS, client) for value in (words, encode(real, what="labels"))]

    def restored(self, state: Mapping[str, Pair]) -> nn.Module:
        """The model, from both parties' shares of it."""
        module = copy.deepcopy(self.module)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with torch.no_grad():
            for name in self.parameters:
                tensors[name].copy_(reconstruct(*state[name]))
        return module

    def plan(self, shape: tuple[int, ...], given: torch.dtype = torch.int64) -> PlannedStep:
        """The step on batches of this shape; ``given`` is what the client has, whole numbers wherever it may be."""
        if shape not in self._plans:
            self._plans[shape] = self._compile(shape)
        planned = self._plans[shape]
        if given.is_floating_point and not planned.dtype.is_floating_point:
            raise InputError(f"{self.name} takes whole numbers, for example positions in a table, not {given}")
        return planned

    def _compile(self, shape: tuple[int, ...]) -> PlannedStep:
        if not shape or not shape[0]:
            raise InputError("the input is an empty batch: give at least one item")
        output, dtype = self._output(shape)
        inputs, targets = torch.empty(shape, dtype=dtype), torch.empty(output)
        state = [torch.empty(self.state[name].shape) for name in self.order]
        numbers = [torch.tensor(number) for number in self.optimizer.numbers(1)]
        examples = [*state, inputs, targets, *numbers]
        try:
            with plain_operators():
                graph = trace_function(self._step_in_the_clear(len(inputs)), examples, DEFINITIONS)
        except InputError as error:
            raise InputError(f"{self.name} cannot be trained on shares: {error}") from error
        labels, public = graph.inputs[len(state) + 1], graph.inputs[len(state) + 2 :]
        shapes = [tuple(example.shape) for example in examples]
        program = compile_step(graph, shapes, labels, public, graph.outputs[:-1])
        check(program.graph)
        return PlannedStep(program, self._price(program, examples, len(state)), output, dtype)

    def _price(self, program: StepProgram, examples: list[Tensor], parameters: int) -> Cost:
        blank = [torch.empty(example.shape, dtype=torch.int64, device="meta") for example in examples]
        scales = [PARAMETER_BITS] * parameters + [FRACTION_BITS] * 2
        shares = [Share(words, scale, Role.ALICE) for words, scale in zip(blank, scales, strict=False)]
        public = [example.to("meta") for example in examples[len(scales) :]]
        constants = tuple(constant.to("meta") for constant in program.constants)
        meter = Meter()
        blank_program = StepProgram(program.graph, constants, program.labels_sum_to_one)
        plan(run_step(blank_program, [*shares, *public], self.context), meter)
        return cost_of(program.graph, meter)

    def _step_in_the_clear(self, batch: int) -> Callable[..., tuple[Tensor, ...]]:
        """The plaintext step as a function of its state, inputs, labels and the optimizer's public numbers."""
        loss_scale = 2.0 ** math.ceil(math.log2(batch))
        slots = len(self.optimizer.slots)

        def step(*tensors: Tensor) -> tuple[Tensor, ...]:
            named = dict(zip(self.order, tensors, strict=False))
            inputs, labels, *numbers = tensors[len(self.order) :]
            trained = {name: named[name] for name in self.trained}
            fixed = {name: named[name] for name in self.fixed}

            def scaled_loss(parameters: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
                # The forward pass may change buffers in place, which `torch.func` allows for tensors of its own.
                buffers = {name: named.get(name, value).clone() for name, value in self.module.named_buffers()}
                output = functional_call(self.module, {**parameters, **fixed, **buffers}, (inputs,))
                loss = self._loss(output, labels)
                return loss * loss_scale, (loss, [buffers[name] for name in self.buffers])

            gradients, (_, (loss, buffers)) = grad_and_value(scaled_loss, has_aux=True)(trained)
            updated, states = [], list[Tensor]()
            for position, name in enumerate(self.trained):
                start = len(self.trained) + position * slots
                gradient, state = gradients[name] / loss_scale, tuple(tensors[start : start + slots])
                parameter, state = self.optimizer.update(trained[name], gradient, state, tuple(numbers))
                updated.append(parameter)
                states += state
            return (*updated, *states, *buffers, loss)

        return step

    def _output(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape of the model's output on inputs of this shape, and their dtype: int64 if it takes no real ones."""
        blank = {name: torch.empty(self.state[name].shape, device="meta") for name in self.parameters}
        blank |= {name: value.to("meta") for name, value in self.module.named_buffers() if name not in blank}
        failed: Exception | None = None
        for dtype in (torch.float32, torch.int64):
            try:
                output = functional_call(self.module, blank, (torch.empty(shape, dtype=dtype, device="meta"),))
            except (RuntimeError, ValueError, IndexError) as error:
                failed = failed or error
            else:
                return tuple(output.shape), dtype
        reason = str(failed).strip().splitlines()[0]
        raise InputError(f"{self.name} does not take inputs of shape {shape}: {reason}")


def real_rows(inputs: Any) -> Tensor:
    """Inputs as they are shared: one row an item, real or whole numbers.

    Raises:
        InputError: they are none.
    """
    if not isinstance(inputs, Tensor):
        raise InputError(f"the input is a {type(inputs).__name__}: give a torch.Tensor")
    if inputs.dim() < 1 or not len(inputs):
        raise InputError("the input is an empty batch: give at least one item")
    if inputs.is_complex() or inputs.dtype == torch.bool:
        raise InputError(f"the input has dtype {inputs.dtype}: give real numbers, for example float32")
    return inputs.detach()


def targets(labels: Any, shape: tuple[int, ...], *, sum_to_one: bool) -> Tensor:
    """Labels as they are shared: real targets of the model's output's shape.

    Args:
        labels: class numbers, which become rows of zeros and a one, or real targets.
        shape: of the model's output.
        sum_to_one: whether the training step relies on each row summing to one.

    Raises:
        InputError: they are neither.
    """
    if not isinstance(labels, Tensor):
        raise InputError(f"the labels are a {type(labels).__name__}: give a torch.Tensor")
    labels = labels.detach()
    if labels.is_complex():
        raise InputError(f"the labels have dtype {labels.dtype}: give class numbers or real targets")
    if not labels.is_floating_point() and tuple(labels.shape) == shape[:1]:
        if bool((labels < 0).any()) or bool((labels >= shape[-1]).any()):
            raise InputError(f"a label is out of range: the model's output has {shape[-1]} classes")
        labels = torch.eye(shape[-1])[labels.long()]
    if tuple(labels.shape) != shape:
        raise InputError(f"labels of shape {tuple(labels.shape)} do not fit the model's output {shape}")
    if sum_to_one and not bool(((labels.double().sum(1) - 1).abs() <= _SUM_TOLERANCE).all()):
        raise InputError("a row of the labels does not sum to one, as cross-entropy takes them")
    targets: Tensor = labels
    return targets
