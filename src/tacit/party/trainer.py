"""Training in real processes, as the model's owner and the client see it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tacit.errors import DataError, InputError, PeerError
from tacit.mpc.shares import reconstruct
from tacit.party.calls import Planned
from tacit.party.launch import Dealt, LocalProcesses, Outcome
from tacit.party.training import training_program
from tacit.program.lowering import Context
from tacit.program.optimizers import Optimizer, Sgd
from tacit.program.recipe import Loss, Recipe
from tacit.program.run import Cost
from tacit.ring.prg import Prg


class ProcessTrainer:
    """Trains a model of which alice and bob, each in a process of its own, hold a share each.

    The caller is the model's owner, who alone may `reveal`, and the client, who shares images and labels. Between
    steps, parameters, the optimizer's state and the loss stay with the parties. See `tacit.program.training` for the
    precision, and `tacit.mpc.masked` for what is opened.

    Args:
        processes: running; their installed program is replaced.
        model: any module whose operators and their gradients have an encrypted form; it is not changed.
        loss: of the model's output and the labels, as a number.
        optimizer: SGD if not given.
        context: the engine's settings.

    Raises:
        InputError: the model has nothing to train, or the context asks for what training has not.
        RangeError: a weight is not finite, or of magnitude 64 or more.
    """

    def __init__(
        self,
        processes: LocalProcesses,
        model: nn.Module,
        loss: Loss = cross_entropy,
        optimizer: Optimizer | None = None,
        context: Context | None = None,
    ) -> None:
        self._processes, self._client = processes, Prg.fresh()
        self._recipe = Recipe(model, loss, optimizer or Sgd(), context or Context())
        # Sent when a step is installed, and not kept here.
        self._begin = self._recipe.share_state(Prg.fresh())
        self._installed: tuple[tuple[int, ...], Planned] | None = None
        self._ahead = 0
        self.steps = 0

    def install(self, shape: tuple[int, ...]) -> Planned:
        """Compile a step on batches of this shape and send it to the three; at first, the parameters' shares too.

        Returns:
            What a step takes, on which this process and the three agree.

        Raises:
            InputError: a step was dealt for batches of another shape and not taken.
            UnsupportedOperator: the step uses an operator that has no encrypted form.
            PeerError: a process failed, or plans another cost.
        """
        if self._installed is not None and self._installed[0] == shape:
            return self._installed[1]
        if self._ahead:
            raise InputError(f"{self._ahead} steps were dealt for batches of another shape: take them first")
        cost = self.cost(shape)
        planned = self._processes.install(training_program(self._recipe, shape))
        if planned != Planned(cost.rounds, cost.bytes_online, cost.bytes_dealt):
            raise PeerError("the processes plan another cost than this one: they do not run the same version")
        if self._begin:
            self._processes.keep(self._begin)
            self._begin = {}
        self._installed = shape, planned
        return planned

    def deal(self, shape: tuple[int, ...]) -> Dealt:
        """Deal what one step on a batch of this shape takes, any number of steps ahead.

        Raises:
            PeerError: a process failed; see also `install`.
        """
        self.install(shape)
        dealt = self._processes.deal()
        self._ahead += 1
        return dealt

    def step(self, inputs: Tensor, labels: Tensor, *, by_layer: bool = False) -> Outcome:
        """One step of the optimizer on one batch, in secret; dealt on the spot if it was not dealt before.

        Args:
            inputs: a real batch ``(n, …)`` that the model takes.
            labels: class numbers ``(n,)`` or real targets of the output's shape; see `Trainer.step`.
            by_layer: whether the parties take the time of every operator.

        Returns:
            What the parties counted and timed; no outputs.

        Raises:
            InputError: shapes, dtypes or labels do not fit; nothing has been dealt or sent.
            RangeError: a value is not finite, or of magnitude 16,384 or more.
            PeerError: a process failed; see also `install`.
        """
        _, batch = self._recipe.share_batch(inputs, labels, self._client)
        shape = tuple(inputs.shape)
        self.install(shape)
        if not self._ahead:
            self.deal(shape)
        self._ahead -= 1
        numbers = self._recipe.optimizer.numbers(self.steps + 1)
        outcome = self._processes.step(batch, numbers, by_layer=by_layer)
        self.steps += 1
        return outcome

    def loss(self) -> float:
        """Ask alice and bob for their shares of the last step's loss, before its update, and put them together.

        Raises:
            PeerError: a process failed, or there has been no step.
        """
        return float(reconstruct(*self._processes.reveal_loss()))

    def reveal(self) -> nn.Module:
        """A copy of the model with the trained weights: alice and bob give their owner the shares of it.

        Raises:
            PeerError: a process failed, or nothing has been installed yet.
        """
        names = self._recipe.parameters
        return self._recipe.restored(self._processes.reveal(names))

    def save(self, folder: str | Path) -> None:
        """Have alice and bob write their shares: parameters, buffers and the optimizer's state, each to its own disk.

        Args:
            folder: gets ``alice.safetensors`` at alice's and ``bob.safetensors`` at bob's. Either alone is uniformly
                random; the two must never meet.

        Raises:
            InputError: nothing has been installed yet.
            PeerError: a process failed.
        """
        if self._installed is None:
            raise InputError("the parties hold nothing yet: install a step, or take one, before saving")
        self._processes.save(str(Path(folder).resolve()), self._recipe.description, self.steps)

    def load(self, folder: str | Path, shape: tuple[int, ...]) -> None:
        """Go on from a checkpoint of the same model and optimizer, of processes or of one: alice and bob read theirs.

        Args:
            folder: as given to `save`.
            shape: of the batches that follow; `install` is called with it.

        Raises:
            PeerError: a process failed: a file is missing or damaged, or belongs to another model or optimizer.
            DataError: the two files were written after different steps. The parties then keep shares that do not
                belong together: load another checkpoint.
        """
        self.install(shape)
        steps = self._processes.restore(str(Path(folder).resolve()), self._recipe.description)
        if len(set(steps)) > 1:
            raise DataError(
                f"alice's shares are from step {steps[0]} and bob's from step {steps[1]}: not one checkpoint"
            )
        self.steps = steps[0]

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """What a step on a batch of this shape costs: planned, not run."""
        return self._recipe.plan(tuple(shape)).cost

    def operators(self, shape: tuple[int, ...]) -> dict[str, str]:
        """The operators of a step on a batch of this shape, by the names under which `step` takes their times."""
        return {node.name: node.operator for node in self._recipe.plan(tuple(shape)).program.graph.nodes}

    def __repr__(self) -> str:
        return f"ProcessTrainer({self.steps} steps, shared by alice and bob)"
