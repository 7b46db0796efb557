"""Optimizers as pure functions of tensors: traced with the gradient, they become part of the step that runs on shares.

Their arithmetic is that of `torch.optim`, with every choice that depends on data left out. State starts at zero. What
changes from step to step and depends on no data, a bias correction for example, is a public number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tacit.errors import InputError


class Optimizer(Protocol):
    """What a training step needs of an optimizer."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the tensors that it keeps for each parameter; they start at zero."""

    def numbers(self, step: int) -> tuple[float, ...]:
        """Public numbers from 0 to 1 that `update` takes at the step of this number; the first step is 1."""

    def update(
        self, parameter: Tensor, gradient: Tensor, state: tuple[Tensor, ...], numbers: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The new parameter and its new state; the numbers are left operands of the products that they enter."""


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent, as `torch.optim.SGD` without dampening.

    Args:
        lr: learning rate.
        momentum: of the running sum of gradients, in [0, 1).
        weight_decay: how much of a parameter is added to its gradient.
        nesterov: whether the momentum of the step to come is added already.

    Raises:
        InputError: a setting is out of its range, or Nesterov's step has no momentum.
    """

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, momentum=self.momentum)
        if self.nesterov and not self.momentum:
            raise InputError("nesterov is set, but momentum is 0: give one above 0")

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the tensors that it keeps for each parameter."""
        return ("momentum",) if self.momentum else ()

    def numbers(self, step: int) -> tuple[float, ...]:
        """None."""
        return ()

    def update(
        self, parameter: Tensor, gradient: Tensor, state: tuple[Tensor, ...], numbers: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The new parameter and its new state."""
        if self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        if not self.momentum:
            return parameter - self.lr * gradient, ()
        velocity = self.momentum * state[0] + gradient
        direction = gradient + self.momentum * velocity if self.nesterov else velocity
        return parameter - self.lr * direction, (velocity,)


_UNIT = 64.0
"""Adam's averages are of gradients times this, which brings them into the range of fixed point."""


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba, ICLR 2015), as `torch.optim.Adam` but with epsilon under the root: m̂ / √(v̂ + ε²).

    The state is the averages with their bias corrected, which the recursion â ← â + w·(x - â) with the public weight
    w = (1 - β) / (1 - β^t) gives at once. In plaintext this is the same as correcting them at each step.

    It costs much more than `Sgd`: an inverse root of every parameter, some 16 comparisons each.

    Args:
        lr: learning rate.
        betas: decay of the averages of gradients and of their squares, in [0, 1).
        eps: at least 2^-14; gradients much smaller than that move a parameter by less than ``lr``.
        weight_decay: how much of a parameter is added to its gradient.

    Raises:
        InputError: a setting is out of its range.
    """

    lr: float = 0.001
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 2.0**-14
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, **{"betas[0]": self.betas[0], "betas[1]": self.betas[1]})
        if not 2.0**-14 <= self.eps < 1:
            raise InputError(f"eps is {self.eps}: on shares it lies between 2^-14 and 1")

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the tensors that it keeps for each parameter."""
        return ("mean", "square")

    def numbers(self, step: int) -> tuple[float, ...]:
        """The weights of the newest gradient and of its square in their averages."""
        return tuple((1 - beta) / (1 - beta**step) for beta in self.betas)

    def update(
        self, parameter: Tensor, gradient: Tensor, state: tuple[Tensor, ...], numbers: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The new parameter and its new state; gradients of magnitude below 2."""
        if self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        gradient = gradient * _UNIT
        mean = state[0] + numbers[0] * (gradient - state[0])
        square = state[1] + numbers[1] * (gradient**2 - state[1])
        direction = mean * torch.rsqrt(square + (self.eps * _UNIT) ** 2)
        return parameter - self.lr * direction, (mean, square)


def _check(lr: float, weight_decay: float, **decays: float) -> None:
    if not 0 < lr < 1024:
        raise InputError(f"lr is {lr}: give a positive number below 1,024")
    if not 0 <= weight_decay < 1:
        raise InputError(f"weight_decay is {weight_decay}: give a number in [0, 1)")
    for name, value in decays.items():
        if not 0 <= value < 1:
            raise InputError(f"{name} is {value}: give a number in [0, 1)")
