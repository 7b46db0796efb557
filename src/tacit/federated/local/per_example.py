"""Losses and gradients of examples one by one, for any model that treats them so: ``vmap(grad(…))`` of `torch.func`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from tacit.dp.clipping import clip_factors
from tacit.federated.layout import Layout
from tacit.federated.local.work import Loss

_ENTRIES = 1 << 24
"""At most so many gradient entries are held at once."""


def losses(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of every example alone, shape ``(n,)``, whatever ``loss`` does with a batch."""
    if loss is functional.cross_entropy and outputs.dim() == 2:
        return functional.cross_entropy(outputs, targets, reduction="none")

    def one(output: Tensor, target: Tensor) -> Tensor:
        return loss(output.unsqueeze(0), target.unsqueeze(0))

    try:
        result: Tensor = vmap(one)(outputs, targets)
    except RuntimeError:  # an operator without a batched form, such as that of class weights with smoothed labels
        result = torch.stack([one(output, target) for output, target in zip(outputs, targets, strict=True)])
    return result


class PerExampleGradients:
    """Clipped gradients of a copy of any model whose forward pass `torch.func.vmap` can take."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self._model = copy.deepcopy(model)
        self._layout = Layout.of(model)
        self._loss = loss
        self._views: dict[str, Tensor] = {}

    def load(self, trained: Tensor) -> None:
        """Compute from now on with the parameters in ``trained``, shape ``(D,)``, by reference."""
        self._views = self._layout.views(trained)

    def clipped_sum(self, inputs: Tensor, targets: Tensor, bound: float, out: Tensor) -> None:
        """Write Σ_i clip(∇ℓ_i, bound) over n ≥ 1 examples to ``out``, shape ``(D,)``, every entry of it."""
        gradient = vmap(grad(self._one), in_dims=(None, 0, 0), randomness="different")
        out.zero_()
        views = self._layout.views(out)
        rows = max(1, _ENTRIES // self._layout.size)
        for start in range(0, len(inputs), rows):
            x, y = inputs[start : start + rows], targets[start : start + rows]
            gradients = {name: g.flatten(1) for name, g in gradient(self._views, x, y).items()}
            squares = torch.zeros(len(x), dtype=torch.float64)
            for g in gradients.values():
                squares += g.square().sum(1)
            factors = clip_factors(squares, bound).to(out.dtype)
            for name, g in gradients.items():
                views[name].view(-1).addmv_(g.T, factors)

    def _one(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(self._model, parameters, (x.unsqueeze(0),))
        return self._loss(outputs, y.unsqueeze(0))
