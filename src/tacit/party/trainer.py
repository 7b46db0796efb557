"""Training in real processes, as the model's owner and the client see it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tacit.errors import InputError, PeerError
from tacit.mpc.lockstep import Trio
from tacit.mpc.shares import reconstruct, share
from tacit.party.calls import Planned
from tacit.party.launch import Dealt, LocalProcesses, Outcome, Pair
from tacit.party.training import TrainingProgram
from tacit.program.lowering import Context
from tacit.program.optimizers import Optimizer, Sgd
from tacit.program.run import Cost
from tacit.program.training import Loss, Trainer
from tacit.ring.fixed_point import FRACTION_BITS, encode
from tacit.ring.prg import Prg


class _Owner(Trainer):
    """The owner's and the client's side of `Trainer`: what to run, what to send, what to make of what comes back.

    No step runs in this process.
    """

    def program(self, shape: tuple[int, ...]) -> TrainingProgram:
        """The step on a batch of this shape, for the three processes."""
        step = self._plan(shape).program
        labels = self._output_shape(torch.empty(shape, device="meta"))
        state = {name: tuple(self._state[name][0].shape) for name in self._order}
        return TrainingProgram(step, state, (shape, labels), len(self._optimizer.numbers(1)), self._context)

    def shares(self) -> dict[str, Pair]:
        """Shares of the parameters and of the optimizer's state."""
        return {name: self._state[name] for name in self._order}

    def batch(self, inputs: Tensor, labels: Tensor, client: Prg) -> list[Pair]:
        """Shares of a batch, the labels as the loss takes them."""
        if not isinstance(inputs, Tensor):
            raise InputError(f"the input is a {type(inputs).__name__}: give a torch.Tensor")
        words, shape = encode(inputs), tuple(inputs.shape)
        self.cost(shape)  # refuses what is no batch
        targets = self._targets(inputs, labels, self._plan(shape).program.labels_sum_to_one)
        return [share(value, FRACTION_BITS, client) for value in (words, encode(targets, what="labels"))]

    def numbers(self) -> tuple[float, ...]:
        """The optimizer's public numbers for the next step."""
        return self._optimizer.numbers(self.steps + 1)

    def restored(self, revealed: dict[str, Pair]) -> nn.Module:
        """The model, from both parties' shares of it."""
        self._state |= revealed
        return self.reveal()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what makes up the model."""
        return (*self._trained, *self._fixed)


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
        InputError: the model has nothing to train.
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
        self._owner = _Owner(Trio(), Prg.fresh(), model, loss, optimizer or Sgd(), context or Context())
        self._installed: tuple[tuple[int, ...], Planned] | None = None
        self._ahead = 0

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
        cost = self._owner.cost(shape)
        planned = self._processes.install(self._owner.program(shape))
        if planned != Planned(cost.rounds, cost.bytes_online, cost.bytes_dealt):
            raise PeerError("the processes plan another cost than this one: they do not run the same version")
        if self._installed is None:
            self._processes.keep(self._owner.shares())
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
        batch = self._owner.batch(inputs, labels, self._client)
        shape = tuple(inputs.shape)
        self.install(shape)
        if not self._ahead:
            self.deal(shape)
        self._ahead -= 1
        outcome = self._processes.step(batch, self._owner.numbers(), by_layer=by_layer)
        self._owner.steps += 1
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
        return self._owner.restored(self._processes.reveal(self._owner.parameters))

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """What a step on a batch of this shape costs: planned, not run."""
        return self._owner.cost(shape)

    def operators(self, shape: tuple[int, ...]) -> dict[str, str]:
        """The operators of a step on a batch of this shape, by the names under which `step` takes their times."""
        return {node.name: node.operator for node in self._owner.program(shape).step.graph.nodes}

    def __repr__(self) -> str:
        return f"ProcessTrainer({self._owner.steps} steps, shared by alice and bob)"
