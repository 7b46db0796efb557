"""Clients trained many at a time, their models stacked: for a GPU, which one small model cannot fill.

On a CPU stacking gains nothing over one client after another; there `InProcess` and `Forked` are the executors to use.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import Algorithm, ServerState
from tacit.federated.layout import Layout, trainable_parameters
from tacit.federated.local.work import LocalResult, LocalWork, Loss
from tacit.runtimes.executors import Job, Outcome, train_client

GROUP = 32
"""How many clients are trained together unless said otherwise."""


class StackedSolver:
    """Does the work of several clients at once, with `torch.func.vmap` over their models.

    The same descent as `tacit.federated.local.plain.PlainSolver`, to the rounding of batched products.

    Args:
        model: copied to ``device``.
        loss: mean loss of a batch.
        device: where to compute; what goes in and comes out is on the CPU.

    Raises:
        InputError: the model has layers that are not the same for every client of a stack: batch normalisation, which
            writes its statistics, or dropout, which draws.
    """

    def __init__(self, model: nn.Module, loss: Loss, device: torch.device) -> None:
        for name, layer in model.named_modules():
            if isinstance(layer, _BatchNorm | _DropoutNd):
                raise InputError(f"clients cannot be stacked: layer {name} is a {type(layer).__name__}")
        self.layout = Layout.of(model)
        self._model = copy.deepcopy(model).to(device).train()
        self._frozen = {
            name: value.detach()
            for name, value in (*self._model.named_parameters(), *self._model.named_buffers())
            if name not in trainable_parameters(self._model)
        }
        self._device = device

        def loss_of(vector: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
            outputs = functional_call(self._model, self.layout.views(vector) | self._frozen, (inputs,))
            return loss(outputs, targets)

        self._step = vmap(grad_and_value(loss_of))

    def __call__(self, works: Sequence[LocalWork]) -> list[LocalResult]:
        """Train clients that have as many examples, and the same settings.

        Args:
            works: one of each client, alike in all that `likeness` tells.
        """
        for work in works:
            work.layer_seed()  # unused, but what it draws from goes on to the batches
        steps = [list(work.batches()) for work in works]
        inputs = torch.stack([work.examples.inputs for work in works]).to(self._device)
        targets = torch.stack([work.examples.targets for work in works]).to(self._device)
        trained = torch.stack([work.parameters for work in works]).to(self._device)
        anchors = torch.stack([work.parameters if work.anchor is None else work.anchor for work in works])
        anchors = anchors.to(self._device)
        corrections = None
        if works[0].correction is not None:
            corrections = torch.stack([w.correction for w in works if w.correction is not None]).to(self._device)
        total, rows = torch.zeros(len(works), dtype=torch.float64, device=self._device), torch.arange(len(works))
        for batches in zip(*steps, strict=True):
            batch = torch.stack(batches).to(self._device)
            chosen = rows[:, None].to(self._device), batch
            gradient, loss = self._step(trained, inputs[chosen], targets[chosen])
            if works[0].proximal:
                gradient = gradient + works[0].proximal * (trained - anchors)
            if corrections is not None:
                gradient = gradient + corrections
            trained = trained - works[0].lr * gradient
            total += loss.detach().double() * batch.shape[1]
        seen = works[0].epochs * len(works[0].examples)
        return [
            LocalResult(vector.clone(), {k: v.clone() for k, v in work.buffers.items()}, mean, len(steps[0]))
            for work, vector, mean in zip(works, trained.detach().cpu(), (total / seen).tolist(), strict=True)
        ]


def likeness(work: LocalWork) -> tuple[object, ...]:
    """What has to be equal for clients to be stacked."""
    shapes = work.examples.inputs.shape, work.examples.targets.shape
    return (*shapes, work.lr, work.batch_size, work.epochs, work.proximal, work.correction is None)


class Grouped:
    """Trains ``group`` clients at a time.

    An algorithm asks for a client's training by calling its solver, in the middle of a pure function. So a client's
    update is begun, and given up when it asks for work; the work of the group is done together; then each update is
    begun anew, answered with what it asked for, and goes on to its end or to the next thing that it asks.

    Args:
        solver: trains stacks of clients.
        clients: the examples of each client.
        group: how many are stacked at most; those with as many examples, and neighbours in the cohort, are.

    Raises:
        InputError: ``group`` is below 1.
    """

    def __init__(self, solver: StackedSolver, clients: Sequence[Examples], group: int = GROUP) -> None:
        if group < 1:
            raise InputError(f"group={group}: train 1 client or more at a time")
        self._solver = solver
        self._clients = clients
        self._group = group

    def run(self, algorithm: Algorithm, state: ServerState, jobs: Sequence[Job], seed: int) -> Iterator[Outcome]:
        """See `tacit.runtimes.executors.Executor`."""
        for start in range(0, len(jobs), self._group):
            yield from self._together(algorithm, state, jobs[start : start + self._group], seed)

    def close(self) -> None:
        """Nothing to give back."""

    def _together(self, algorithm: Algorithm, state: ServerState, jobs: Sequence[Job], seed: int) -> Sequence[Outcome]:
        examples = [self._clients[job.client] for job in jobs]
        answers: list[list[LocalResult]] = [[] for _ in jobs]
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < len(jobs):
            asked: list[tuple[int, LocalWork]] = []
            for number in (number for number in range(len(jobs)) if number not in outcomes):
                replay = _Replay(self._solver.layout, answers[number])
                try:
                    outcomes[number] = train_client(algorithm, state, jobs[number], replay, examples[number], seed)
                except _AsksForWork as request:
                    asked.append((number, request.work))
            asked.sort(key=lambda pair: repr(likeness(pair[1])))
            for _, alike in groupby(asked, key=lambda pair: likeness(pair[1])):
                numbers, works = zip(*alike, strict=True)
                for number, result in zip(numbers, self._solver(works), strict=True):
                    answers[number].append(result)
        return [outcomes[number] for number in range(len(jobs))]


class _AsksForWork(Exception):
    def __init__(self, work: LocalWork) -> None:
        super().__init__()
        self.work = work


class _Replay:
    """A solver that gives the answers there are, and stops at the first question without one."""

    def __init__(self, layout: Layout, answers: Sequence[LocalResult]) -> None:
        self.layout = layout
        self._answers = iter(answers)

    def __call__(self, work: LocalWork) -> LocalResult:
        answer = next(self._answers, None)
        if answer is None:
            raise _AsksForWork(work)
        # The generator goes on as if the work had been done here, and the caller may write to what it gets.
        work.layer_seed()
        for _ in work.batches():
            pass
        buffers = {name: value.clone() for name, value in answer.buffers.items()}
        return LocalResult(answer.parameters.clone(), buffers, answer.loss, answer.steps)
