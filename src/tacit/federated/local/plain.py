"""The plain training loop over PyTorch's autograd: works for any module, and is the oracle of faster solvers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tacit.federated.layout import Layout, trainable_parameters
from tacit.federated.local.work import LocalResult, LocalWork, Loss


class PlainSolver:
    """Trains a copy of ``model`` with one autograd call a batch.

    Layers that draw random numbers of their own (dropout) take them from torch's global generator, which is
    seeded from the work's generator meanwhile and restored afterwards.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.layout = Layout.of(model)
        self._model = copy.deepcopy(model)
        self._loss = loss

    def __call__(self, work: LocalWork) -> LocalResult:
        """See `LocalSolver`."""
        trained = work.parameters.clone()
        model = self._load(trained, work)
        weights: list[Tensor] = list(trainable_parameters(model).values())
        total, seen, steps = torch.zeros((), dtype=torch.float64), 0, 0
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(work.layer_seed())
            for batch in work.batches():
                examples = work.examples.subset(batch)
                loss = self._loss(model(examples.inputs), examples.targets)
                gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
                with torch.no_grad():
                    drift = work.drift(trained)
                    torch._foreach_add_(weights, gradients, alpha=-work.lr)
                    if drift is not None:
                        trained.add_(drift, alpha=-work.lr)
                    total += loss.double() * len(batch)
                    seen, steps = seen + len(batch), steps + 1
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return LocalResult(trained, buffers, float(total) / seen, steps)

    @torch.no_grad()
    def _load(self, trained: Tensor, work: LocalWork) -> nn.Module:
        """The model in training mode, its parameters views of ``trained``, its buffers those of ``work``."""
        parameters = trainable_parameters(self._model)
        for name, view in self.layout.views(trained).items():
            parameters[name].data = view
        for name, buffer in self._model.named_buffers():
            buffer.copy_(work.buffers[name])
        return self._model.train()
