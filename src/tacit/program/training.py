"""Training on shares: data, labels, weights, gradients and loss stay hidden from every party.

The plaintext step (the model's forward pass, its loss, the gradient, the optimizer's update) is traced to one ATen
graph, rewritten for shares (`tacit.program.step`), planned, and run. What a step opens are masked values; what it
leaves are shares of the new weights, of the optimizer's state and of the loss.

*Precision.* Inputs, activations and gradients of activations have 16 fractional bits, weights and the optimizer's state
24. The mean over a batch of n would push gradients below 2^-16, so the step differentiates the loss times the power of
two from n up (loss scaling: Micikevicius et al., ICLR 2018) and divides the gradients of the weights by it at the very
end, where a power of two costs nothing. Truncation rounds up or down by chance and is right on average, so updates
smaller than a unit still count. What remains is the rounding of activations: over 40 steps of the 2NN at a batch of
128, weights stayed within 10^-4 of float64 training on average and 2·10^-3 at most, the latter below ReLUs whose input
was within 2^-16 of zero. Larger loss scales changed neither.

*Range.* Magnitudes stay below 2^14, and here that includes a weight's gradient times the loss scale, which is its sum
over the batch. No party can see a value that leaves the range; the loss, if it is revealed, shows it.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from tacit.errors import InputError
from tacit.mpc.lockstep import Dealt, Meter, Trio, plan
from tacit.mpc.masked import Forget
from tacit.mpc.shares import Share, reconstruct, share
from tacit.mpc.steps import Protocol, Role, Take
from tacit.program import checkpoint
from tacit.program.lowering import Context
from tacit.program.lowering.backward import PARAMETER_BITS
from tacit.program.optimizers import Optimizer
from tacit.program.run import Cost, check, cost_of, execute
from tacit.program.step import StepProgram, compile_step
from tacit.ring.fixed_point import FRACTION_BITS, encode
from tacit.ring.prg import Prg
from tacit.trace import trace_function

Loss = Callable[[Tensor, Tensor], Tensor]
_SUM_TOLERANCE = 2.0**-10


@dataclass(frozen=True, eq=False, repr=False)
class SharedLoss:
    """The loss of one step, of which alice and bob hold a share each."""

    shares: tuple[Share, Share]

    def reveal(self) -> float:
        """Put the shares together, as whoever may know the loss does."""
        return float(reconstruct(*self.shares))

    def __repr__(self) -> str:
        return "SharedLoss(shared by alice and bob)"


@dataclass(frozen=True)
class _Planned:
    program: StepProgram
    cost: Cost


def run_step(program: StepProgram, inputs: list[Any], context: Context) -> Protocol[tuple[Share, ...]]:
    """One party's side of a step: the graph, and then the provider forgets the step's masks."""
    given: list[Any] = [*inputs, *program.constants]
    outputs = yield from execute(program.graph, {}, given, context)
    yield Take(Forget())
    return outputs


class Trainer:
    """Trains a model of which alice and bob hold a share each. Made by `Cluster.trainer`.

    The caller of `step` is the client: it shares images and labels. `reveal` gives the weights to their owner.
    """

    def __init__(
        self, trio: Trio, owner: Prg, model: nn.Module, loss: Loss, optimizer: Optimizer, context: Context
    ) -> None:
        self._trio, self._prg, self._context = trio, owner, context
        self._module, self._loss, self._optimizer = copy.deepcopy(model), loss, optimizer
        self._name = type(model).__name__
        tensors = {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}
        floating = {name: value for name, value in tensors.items() if value.is_floating_point()}
        self._trained = tuple(name for name, value in floating.items() if value.requires_grad)
        if not self._trained:
            raise InputError(f"{self._name} has no parameter that requires a gradient: there is nothing to train")
        self._fixed = tuple(name for name in floating if name not in self._trained)
        state = {name: value.detach() for name, value in floating.items()}
        for name in self._trained:
            state |= {f"{slot} of {name}": torch.zeros_like(floating[name]) for slot in optimizer.slots}
        self._state = {
            name: share(encode(value, PARAMETER_BITS, what=f"{name} of {self._name}"), PARAMETER_BITS, owner)
            for name, value in state.items()
        }
        self._planned: dict[tuple[int, ...], _Planned] = {}
        self._dealt: dict[tuple[int, ...], deque[Dealt]] = {}
        self._last: Cost | None = None
        self.steps = 0

    def step(self, inputs: Tensor, labels: Tensor, *, clock: Callable[[], float] | None = None) -> SharedLoss:
        """One step of the optimizer on one batch, in secret.

        Args:
            inputs: a real batch ``(n, …)`` that the model takes.
            labels: what the loss takes beside the model's output: class numbers ``(n,)``, which are shared as rows of
                zeros and a one, or real targets of the output's shape. For cross-entropy, rows sum to one.
            clock: gives seconds, for the computing time of each operator in `counted`.

        Returns:
            The loss before the update, shared.

        Raises:
            InputError: shapes, dtypes or labels do not fit; nothing has been dealt or sent.
            RangeError: a value is not finite, or of magnitude 16,384 or more.
            UnsupportedOperator: the step uses an operator that has no encrypted form.
        """
        inputs = _batch(inputs)
        words = encode(inputs)
        planned = self._plan(tuple(inputs.shape))
        targets = encode(self._targets(inputs, labels, planned.program.labels_sum_to_one), what="labels")
        pairs: list[tuple[Any, Any]] = [self._state[name] for name in self._order]
        pairs += [share(words, FRACTION_BITS, self._prg), share(targets, FRACTION_BITS, self._prg)]
        pairs += [(number, number) for number in map(torch.tensor, self._optimizer.numbers(self.steps + 1))]
        meter, ahead = Meter(clock), self._dealt.get(tuple(inputs.shape))
        try:
            sides = [run_step(planned.program, [pair[i] for pair in pairs], self._context) for i in range(2)]
            alice, bob = self._trio.run(sides[0], sides[1], meter, ahead.popleft() if ahead else None)
        finally:
            # The step's own end does this; a step that was broken off leaves masks that belong to nothing any more.
            self._trio.provider.step_masks.clear()
        outputs = list(zip(alice, bob, strict=True))
        self._state |= dict(zip(self._updated, outputs[:-1], strict=True))
        self.steps += 1
        self._last = cost_of(planned.program.graph, meter)
        return SharedLoss(outputs[-1])

    def reveal(self) -> nn.Module:
        """A copy of the model with the trained weights, for their owner."""
        module = copy.deepcopy(self._module)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with torch.no_grad():
            for name in (*self._trained, *self._fixed):
                tensors[name].copy_(reconstruct(*self._state[name]))
        return module

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """What a step on a batch of this shape costs: planned, not run."""
        return self._plan(tuple(_batch(torch.empty(shape)).shape)).cost

    def counted(self) -> Cost:
        """What the last step cost, as the driver counted it.

        Raises:
            InputError: there has been no step.
        """
        if self._last is None:
            raise InputError("nothing has been counted: call step first")
        return self._last

    def deal(self, shape: tuple[int, ...]) -> None:
        """Deal the correlated randomness of the next step on a batch of this shape, ahead of it."""
        self._dealt.setdefault(tuple(shape), deque()).append(self._trio.deal(self.cost(shape).correlations))

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint: alice's shares and bob's, a file each, that must never meet.

        Args:
            folder: gets ``alice.safetensors`` and ``bob.safetensors``. Either alone is uniformly random.
        """
        for position, role in enumerate(Role):
            words = {name: pair[position].words for name, pair in self._state.items()}
            checkpoint.save(Path(folder), role, words, self._description(), self.steps)

    def load(self, folder: str | Path) -> None:
        """Go on from a checkpoint of the same model and optimizer.

        Raises:
            DataError: a file is missing or damaged, belongs to another model, optimizer or step than the other.
        """
        shapes = {name: tuple(pair[0].shape) for name, pair in self._state.items()}
        sides = [checkpoint.load(Path(folder), role, shapes, self._description()) for role in Role]
        steps = checkpoint.common_step(*(step for _, step in sides))
        self._state = {
            name: (
                Share(sides[0][0][name], PARAMETER_BITS, Role.ALICE),
                Share(sides[1][0][name], PARAMETER_BITS, Role.BOB),
            )
            for name in shapes
        }
        self.steps = steps

    def _description(self) -> str:
        return f"{self._name} trained by {self._optimizer}"

    @property
    def _updated(self) -> tuple[str, ...]:
        """Names of what a step changes, in the order of its outputs."""
        slots = (f"{slot} of {name}" for name in self._trained for slot in self._optimizer.slots)
        return (*self._trained, *slots)

    @property
    def _order(self) -> tuple[str, ...]:
        """Names of what a step takes, in the order of its inputs."""
        return (*self._updated, *self._fixed)

    def _plan(self, shape: tuple[int, ...]) -> _Planned:
        if shape not in self._planned:
            self._planned[shape] = self._compile(torch.empty(shape))
        return self._planned[shape]

    def _compile(self, inputs: Tensor) -> _Planned:
        targets = torch.empty(self._output_shape(inputs))
        state = [torch.empty(self._state[name][0].shape) for name in self._order]
        numbers = [torch.tensor(number) for number in self._optimizer.numbers(1)]
        examples = [*state, inputs, targets, *numbers]
        try:
            graph = trace_function(self._step_in_the_clear(len(inputs)), examples)
        except InputError as error:
            raise InputError(f"{self._name} cannot be trained on shares: {error}") from error
        labels, public = graph.inputs[len(state) + 1], graph.inputs[len(state) + 2 :]
        shapes = [tuple(example.shape) for example in examples]
        program = compile_step(graph, shapes, labels, public, graph.outputs[:-1])
        check(program.graph)
        return _Planned(program, self._price(program, examples, len(state)))

    def _price(self, program: StepProgram, examples: list[Tensor], parameters: int) -> Cost:
        blank = [torch.empty(example.shape, dtype=torch.int64, device="meta") for example in examples]
        scales = [PARAMETER_BITS] * parameters + [FRACTION_BITS] * 2
        shares = [Share(words, scale, Role.ALICE) for words, scale in zip(blank, scales, strict=False)]
        public = [example.to("meta") for example in examples[len(scales) :]]
        constants = tuple(constant.to("meta") for constant in program.constants)
        meter = Meter()
        blank_program = StepProgram(program.graph, constants, program.labels_sum_to_one)
        plan(run_step(blank_program, [*shares, *public], self._context), meter)
        return cost_of(program.graph, meter)

    def _step_in_the_clear(self, batch: int) -> Callable[..., tuple[Tensor, ...]]:
        """The plaintext step as a function of its state, inputs, labels and the optimizer's public numbers."""
        loss_scale = 2.0 ** math.ceil(math.log2(batch))
        slots = len(self._optimizer.slots)

        def step(*tensors: Tensor) -> tuple[Tensor, ...]:
            named = dict(zip(self._order, tensors, strict=False))
            inputs, labels, *numbers = tensors[len(self._order) :]
            trained = {name: named[name] for name in self._trained}
            fixed = {name: named[name] for name in self._fixed}

            def scaled_loss(parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
                loss = self._loss(functional_call(self._module, {**parameters, **fixed}, (inputs,)), labels)
                return loss * loss_scale, loss

            gradients, (_, loss) = grad_and_value(scaled_loss, has_aux=True)(trained)
            updated, states = [], list[Tensor]()
            for position, name in enumerate(self._trained):
                start = len(self._trained) + position * slots
                gradient, state = gradients[name] / loss_scale, tuple(tensors[start : start + slots])
                parameter, state = self._optimizer.update(trained[name], gradient, state, tuple(numbers))
                updated.append(parameter)
                states += state
            return (*updated, *states, loss)

        return step

    def _output_shape(self, inputs: Tensor) -> tuple[int, ...]:
        blank = {
            name: torch.empty(self._state[name][0].shape, device="meta") for name in (*self._trained, *self._fixed)
        }
        try:
            output = functional_call(self._module, blank, (inputs.to("meta"),))
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{self._name} does not take inputs of shape {tuple(inputs.shape)}: {reason}") from error
        return tuple(output.shape)

    def _targets(self, inputs: Tensor, labels: Any, sum_to_one: bool) -> Tensor:
        """The labels as real targets of the model's output's shape."""
        shape = self._output_shape(inputs)
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
        targets: Tensor = labels.to(torch.float32)
        return targets

    def __repr__(self) -> str:
        return f"Trainer({self._name}, {self._optimizer}, {self.steps} steps, shared by alice and bob)"


def _batch(inputs: Any) -> Tensor:
    if not isinstance(inputs, Tensor):
        raise InputError(f"the input is a {type(inputs).__name__}: give a torch.Tensor")
    if inputs.dim() < 1 or not len(inputs):
        raise InputError("the input is an empty batch: give at least one item")
    if inputs.is_complex() or inputs.dtype == torch.bool:
        raise InputError(f"the input has dtype {inputs.dtype}: give real numbers, for example float32")
    return inputs.detach().to(torch.float32)
