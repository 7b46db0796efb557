"""What a client is asked to train, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tacit.data.examples import Examples
from tacit.federated.layout import Layout

Loss = Callable[[Tensor, Tensor], Tensor]
"""The mean loss (a scalar) of a batch from the model's outputs and the targets."""


@dataclass(frozen=True)
class LocalWork:
    """Stochastic gradient descent over one client's examples.

    With g the gradient of the mean loss of a batch at w, each step is::

        w ← w − lr (g + proximal (w − anchor) + correction)

    Args:
        parameters: where training starts, shape ``(D,)``; not changed.
        buffers: the model's buffers at the start, by name; not changed.
        examples: the client's own, at least one.
        lr: learning rate.
        batch_size: B; ``None`` is all the examples at once.
        epochs: E, passes over the examples.
        generator: the source of every random choice.
        proximal: μ, the pull towards ``anchor`` (Li et al. 2020, FedProx).
        anchor: shape ``(D,)``; ``None`` is ``parameters``.
        correction: added to every gradient, shape ``(D,)`` (Karimireddy et al. 2020, SCAFFOLD).
    """

    parameters: Tensor
    buffers: Mapping[str, Tensor]
    examples: Examples
    lr: float
    batch_size: int | None
    epochs: int
    generator: torch.Generator
    proximal: float = 0.0
    anchor: Tensor | None = None
    correction: Tensor | None = None

    def layer_seed(self) -> int:
        """A seed for layers that draw random numbers (dropout); every solver draws it once, before the batches."""
        return int(torch.randint(2**32, (), generator=self.generator))

    def drift(self, parameters: Tensor) -> Tensor | None:
        """``proximal (w − anchor) + correction`` at ``parameters``, shape ``(D,)``; ``None`` if there is neither."""
        if not self.proximal:
            return self.correction
        pull = self.proximal * (parameters - (self.parameters if self.anchor is None else self.anchor))
        return pull if self.correction is None else pull + self.correction

    def batches(self) -> Iterator[Tensor]:
        """Indices of each batch: every epoch a new shuffle, cut into batches, the last of which may be smaller."""
        examples = len(self.examples)
        for _ in range(self.epochs):
            order = torch.randperm(examples, generator=self.generator)
            yield from torch.split(order, self.batch_size or examples)


@dataclass(frozen=True)
class LocalResult:
    """A client's trained model.

    Args:
        parameters: shape ``(D,)``, in memory of its own.
        buffers: by name, likewise.
        loss: mean training loss over every example seen, while training.
        steps: how many descent steps were made.
    """

    parameters: Tensor
    buffers: Mapping[str, Tensor]
    loss: float
    steps: int


class LocalSolver(Protocol):
    """Does local work for one architecture and one loss."""

    @property
    def layout(self) -> Layout:
        """Where each parameter lies in the vectors of the work."""
        ...

    def __call__(self, work: LocalWork) -> LocalResult:
        """Train; the result depends on ``work`` alone."""
        ...
