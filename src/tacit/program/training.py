"""Training on shares: data, labels, weights, gradients and loss stay hidden from every party.

The plaintext step (the model's forward pass, its loss, the gradient, the optimizer's update) is traced to one ATen
graph, rewritten for shares (`tacit.program.step`), planned (`tacit.program.recipe`), and run. What a step opens are
masked values; what it leaves are shares of the new weights, of the optimizer's state and of the loss.

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

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tacit.errors import InputError
from tacit.mpc.correlation import Party
from tacit.mpc.lockstep import Dealt, Meter, Trio
from tacit.mpc.shares import Share, reconstruct
from tacit.mpc.steps import Open, Role
from tacit.program import checkpoint
from tacit.program.lowering import Context
from tacit.program.lowering.backward import PARAMETER_BITS
from tacit.program.optimizers import Optimizer
from tacit.program.recipe import Loss, Pair, Recipe, run_step
from tacit.program.run import Cost, cost_of
from tacit.ring.prg import Prg


@dataclass(frozen=True, eq=False, repr=False)
class SharedLoss:
    """The loss of one step, of which alice and bob hold a share each. Nobody knows it unless it is revealed."""

    shares: Pair
    trio: Trio

    def reveal(self, to: Party | None = None) -> float:
        """Put the shares together, as the one does who may know the loss.

        Args:
            to: alice or bob, who is then sent the other one's share; both send theirs to the caller if not given.

        Raises:
            InputError: it is neither alice nor bob of these shares' cluster.
        """
        _sent(self.trio, [self.shares], to)
        return float(reconstruct(*self.shares))

    def __repr__(self) -> str:
        return "SharedLoss(shared by alice and bob)"


def _sent(trio: Trio, pairs: list[Pair], to: Party | None) -> None:
    """Send shares to whom they are revealed, and to nobody else."""
    if to is not None and to is not trio.alice and to is not trio.bob:
        raise InputError("what is revealed goes to alice or bob of this cluster, or to the caller if none is named")
    for position, sender in enumerate(Role):
        if trio.tap and to is not None and sender is not to.role:
            trio.tap(sender, Open(*(pair[position].words for pair in pairs), labels=("reveal",) * len(pairs)))


class Trainer:
    """Trains a model of which alice and bob hold a share each. Made by `Cluster.trainer`.

    The caller of `step` is the client: it shares images and labels. `reveal` gives the weights to their owner.
    """

    def __init__(
        self, trio: Trio, owner: Prg, model: nn.Module, loss: Loss, optimizer: Optimizer, context: Context
    ) -> None:
        self._trio, self._prg = trio, owner
        self._recipe = Recipe(model, loss, optimizer, context)
        self._state = self._recipe.share_state(owner)
        self._dealt: dict[tuple[int, ...], deque[Dealt]] = {}
        self._last: Cost | None = None
        self.steps = 0

    def step(self, inputs: Tensor, labels: Tensor, *, clock: Callable[[], float] | None = None) -> SharedLoss:
        """One step of the optimizer on one batch, in secret.

        Args:
            inputs: a real batch ``(n, …)`` that the model takes, or whole numbers where it takes these.
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
        recipe = self._recipe
        planned, batch = recipe.share_batch(inputs, labels, self._prg)
        pairs: list[tuple[Any, Any]] = [*(self._state[name] for name in recipe.order), *batch]
        pairs += [(number, number) for number in map(torch.tensor, recipe.optimizer.numbers(self.steps + 1))]
        meter, ahead = Meter(clock), self._dealt.get(tuple(inputs.shape))
        try:
            sides = [run_step(planned.program, [pair[i] for pair in pairs], recipe.context) for i in range(2)]
            alice, bob = self._trio.run(sides[0], sides[1], meter, ahead.popleft() if ahead else None)
        finally:
            # The step's own end does this; a step that was broken off leaves masks that belong to nothing any more.
            self._trio.provider.step_masks.clear()
        outputs = list(zip(alice, bob, strict=True))
        self._state |= dict(zip(recipe.updated, outputs[:-1], strict=True))
        self.steps += 1
        self._last = cost_of(planned.program.graph, meter)
        return SharedLoss(outputs[-1], self._trio)

    def reveal(self, to: Party | None = None) -> nn.Module:
        """A copy of the model with the trained weights, for their owner.

        Args:
            to: alice or bob, if the owner is one of them: the other one's shares are then sent there and nowhere else.

        Raises:
            InputError: it is neither alice nor bob of this cluster.
        """
        _sent(self._trio, [self._state[name] for name in self._recipe.parameters], to)
        return self._recipe.restored(self._state)

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """What a step on a batch of this shape costs: planned, not run."""
        return self._recipe.plan(tuple(shape)).cost

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
            checkpoint.save(Path(folder), role, words, self._recipe.description, self.steps)

    def load(self, folder: str | Path) -> None:
        """Go on from a checkpoint of the same model and optimizer.

        Raises:
            DataError: a file is missing or damaged, belongs to another model, optimizer or step than the other.
        """
        shapes = self._recipe.shapes
        sides = [checkpoint.load(Path(folder), role, shapes, self._recipe.description) for role in Role]
        steps = checkpoint.common_step(*(step for _, step in sides))
        self._state = {
            name: (
                Share(sides[0][0][name], PARAMETER_BITS, Role.ALICE),
                Share(sides[1][0][name], PARAMETER_BITS, Role.BOB),
            )
            for name in shapes
        }
        self.steps = steps

    def __repr__(self) -> str:
        recipe = self._recipe
        return f"Trainer({recipe.name}, {recipe.optimizer}, {self.steps} steps, shared by alice and bob)"
