"""The fast solver: the step traced once for every size of batch, then replayed without autograd."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tacit.data.examples import Examples
from tacit.federated.layout import Layout
from tacit.federated.local.plain import PlainSolver
from tacit.federated.local.scratch import Scratch
from tacit.federated.local.step_graph import state_of, trace_step
from tacit.federated.local.step_program import StepProgram
from tacit.federated.local.work import LocalResult, LocalSolver, LocalWork, Loss
from tacit.ring.kernels import load

LARGEST = 256
"""Batches of more examples go to the plain loop: arithmetic takes nearly all of their time, and each size that occurs
would have to be traced."""
PROGRAMS = 64
"""How many sizes of batch are kept ready; their memory is shared."""
TOLERANCE = 1e-5
"""By how much a traced step may differ from the plain one when it is tried, relative to the largest change of a
weight: the products add up in another order."""


class TracedSolver:
    """Replays a traced step; the same descent as `PlainSolver` to float32's rounding.

    The gradient is traced to ATen operators once for every size of batch, rewritten
    (`tacit.federated.local.step_graph`) and laid out in memory (`tacit.federated.local.step_program`): no autograd,
    no modules, no new memory in a step, and no copy of the model beyond one vector. Images are kept channels last,
    the layout in which convolution and pooling are fastest. Works of batches beyond `LARGEST` examples, or of all a
    client's examples at once, go to the plain loop.

    Every result depends on the work alone, bit by bit, and not on what was trained before.

    Args:
        model: copied. Its forward pass may not depend on the values of tensors or on anything that changes.
        loss: mean loss of a batch.
        compiled: whether to use compiled loops; without numba there are none.
    """

    def __init__(self, model: nn.Module, loss: Loss, compiled: bool = True) -> None:
        self.layout = Layout.of(model)
        self._plain = PlainSolver(model, loss)
        self._loss = loss
        self._model = copy.deepcopy(model).train()
        fused = compiled and self.layout.dtype == torch.float32
        self._kernels = load("tacit.federated.local.kernels") if fused else None
        self._weights = torch.zeros(self.layout.size, dtype=self.layout.dtype)
        weights = self.layout.views(self._weights)
        state = {name: weights.get(name, value.detach()) for name, value in state_of(self._model).items()}
        self._state = list(state.values())
        self._buffers = {name: state[name] for name, _ in self._model.named_buffers()}
        self._scratch = Scratch()
        self._programs: OrderedDict[tuple[object, ...], _Batch] = OrderedDict()

    def __call__(self, work: LocalWork) -> LocalResult:
        """See `LocalSolver`.

        Raises:
            InputError: the step cannot be traced, or a target is not a class.
            UnsupportedOperator: the step cannot be laid out.
        """
        if work.batch_size is None or work.batch_size > LARGEST:
            return self._plain(work)
        self._weights.copy_(work.parameters)
        for name, buffer in self._buffers.items():
            buffer.copy_(work.buffers[name])
        seed = work.layer_seed()
        with torch.inference_mode():
            total, seen, steps = self._descend(work, seed)
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        return LocalResult(self._weights.clone(), buffers, total / seen, steps)

    def calls(self, examples: Examples) -> int:
        """How many calls a step on a batch of the size of ``examples`` makes.

        Raises:
            InputError: the step cannot be traced.
            UnsupportedOperator: the step cannot be laid out.
        """
        with torch.inference_mode():
            return len(self._batch(examples, len(examples)).program)

    def _descend(self, work: LocalWork, seed: int) -> tuple[float, int, int]:
        total, seen, steps = 0.0, 0, 0
        drift = torch.empty_like(self._weights) if work.proximal or work.correction is not None else None
        anchor = work.parameters if work.anchor is None else work.anchor
        examples = work.examples
        drawing = _Drawing(seed)
        for indices in work.batches():
            batch = self._batch(examples, len(indices))
            batch.fill(examples, indices)
            if drift is not None:
                _drift(drift, self._weights, anchor, work)
            if batch.program.draws:
                with drawing.at_work():
                    loss = batch.program(work.lr)
            else:
                loss = batch.program(work.lr)
            if drift is not None:
                self._weights.add_(drift, alpha=-work.lr)
            total, seen, steps = total + loss * len(indices), seen + len(indices), steps + 1
        return total, seen, steps

    def _batch(self, examples: Examples, size: int) -> _Batch:
        """What trains on batches of ``size`` of such examples."""
        key = (
            size,
            examples.inputs.shape[1:],
            examples.inputs.dtype,
            examples.targets.shape[1:],
            examples.targets.dtype,
        )
        batch = self._programs.get(key)
        if batch is None:
            while len(self._programs) >= PROGRAMS:
                self._programs.popitem(last=False)
            batch = self._programs[key] = self._new_batch(examples, size)
        else:
            self._programs.move_to_end(key)
        return batch

    def _new_batch(self, examples: Examples, size: int) -> _Batch:
        some = torch.zeros(size, dtype=torch.long)
        inputs, targets = examples.inputs[some], examples.targets[some]
        with torch.inference_mode(False), torch.no_grad(), _random_state_kept():
            step = trace_step(self._model, self._loss, inputs.clone(), targets.clone(), self._kernels is not None)
        kept = [value.clone() for value in (self._weights, *self._buffers.values())]
        with _random_state_kept():
            batch = _Batch(
                lambda x, y: StepProgram(step, self._state, x, y, self._kernels, self._scratch), inputs, targets
            )
        for place, value in zip((self._weights, *self._buffers.values()), kept, strict=True):
            place.copy_(value)
        return batch


class _Batch:
    """The memory of a batch, and the program of a step on it."""

    def __init__(self, program: Callable[[Tensor, Tensor], StepProgram], inputs: Tensor, targets: Tensor) -> None:
        self._targets = targets.contiguous()
        # Of one channel both layouts are the same memory, which rows are gathered into directly.
        self._rows = inputs.contiguous()
        self._images: Tensor | None = None
        placed = self._rows
        if inputs.dim() == 4 and inputs.is_floating_point():
            if inputs.shape[1] == 1:
                height, width = inputs.shape[2:]
                placed = self._rows.as_strided(inputs.shape, (height * width, 1, width, 1))
            else:
                placed = self._images = inputs.contiguous(memory_format=torch.channels_last)
        self.program = program(placed, self._targets)

    def fill(self, examples: Examples, indices: Tensor) -> None:
        """Gather the examples at ``indices``."""
        torch.index_select(examples.inputs, 0, indices, out=self._rows)
        torch.index_select(examples.targets, 0, indices, out=self._targets)
        if self._images is not None:
            self._images.copy_(self._rows)


class _Drawing:
    """One stream of torch's global generator, which is put back whenever a step has taken what it needs."""

    def __init__(self, seed: int) -> None:
        self._state = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with _random_state_kept():
            torch.set_rng_state(self._state)
            yield
            self._state = torch.get_rng_state()


@contextmanager
def _random_state_kept() -> Iterator[None]:
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _drift(drift: Tensor, weights: Tensor, anchor: Tensor, work: LocalWork) -> None:
    """``proximal (w − anchor) + correction``, in place."""
    if work.proximal:
        torch.sub(weights, anchor, out=drift).mul_(work.proximal)
        if work.correction is not None:
            drift.add_(work.correction)
    elif work.correction is not None:
        drift.copy_(work.correction)


def solver_for(model: nn.Module, loss: Loss, example: Examples) -> tuple[LocalSolver, str]:
    """The fastest solver that trains ``model`` as the plain loop does, and why if that is the plain loop.

    The traced step is tried beside the plain one on a batch before it is relied on.

    Args:
        model: any module; copied.
        loss: mean loss of a batch.
        example: a batch of examples, such as a few of one client's.

    Returns:
        The solver, and the reason for which the model cannot be traced; empty if it is.
    """
    plain = PlainSolver(model, loss)
    if not len(example):
        return plain, "there is no example to trace the model with"
    example = Examples(example.inputs[:LARGEST], example.targets[:LARGEST])
    try:
        traced = TracedSolver(model, loss)
        difference = _difference(plain, traced, model, example)
    except Exception as error:
        # Whatever it is, the plain loop is there, and raises it in turn if it is the model's own.
        return plain, (str(error) or type(error).__name__).splitlines()[0]
    if not difference <= TOLERANCE:
        return plain, f"a traced step differs from the plain one by {difference:.1e} of the largest change of a weight"
    return traced, ""


def _difference(plain: PlainSolver, traced: TracedSolver, model: nn.Module, example: Examples) -> float:
    """The largest difference after two steps on the examples, relative to the largest change."""
    start = plain.layout.flatten(dict(model.named_parameters()))
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}

    def trained(solver: LocalSolver) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        # A second step shows whether the model behaves as at its first.
        return solver(LocalWork(start, buffers, example, 0.1, len(example), 2, generator)).parameters

    expected = trained(plain)
    return float((trained(traced) - expected).abs().max() / (expected - start).abs().max().clamp_min(1e-30))
