"""Federated averaging, with any optimizer at the server.

McMahan et al. 2017, *Communication-Efficient Learning of Deep Networks from Decentralized Data*, algorithm 1;
Reddi et al. 2021, *Adaptive Federated Optimization*, algorithm 1, for the server optimizer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import SCALARS_BYTES, Effort, Extra, Memory, ServerState, Update
from tacit.federated.layout import Layout
from tacit.federated.local.work import LocalResult, LocalSolver, LocalWork
from tacit.federated.mean import weighted_mean

ServerOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
Weighting = Callable[[int], float]
"""A client's weight in the mean from its number of examples."""
Mean = Callable[[Iterable[Update]], Update]


def averaging(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Server optimizer of plain FedAvg: SGD of rate 1, so the new model is the mean of the clients'."""
    return torch.optim.SGD(parameters, lr=1.0)


@dataclass(frozen=True)
class FedAvg:
    """Federated averaging.

    In round t, with K the cohort, p_k the weight of client k (its number of examples) and p their sum::

        w_k     ← w_t, then w_k ← w_k − η ∇ℓ(w_k; b) for E epochs of shuffled batches b of B examples
        Δ       ← Σ_{k∈K} (p_k / p) (w_k − w_t)
        w_{t+1} ← server optimizer's step from w_t with the pseudo-gradient −Δ

    Args:
        lr: η, the clients' learning rate.
        batch_size: B; ``None`` is the whole of the client's examples (FedSGD if ``epochs`` is 1).
        epochs: E, passes over the client's examples in a round.
        server_optimizer: makes the ``torch.optim`` optimizer of the global model from a list of its
            parameters.
        weighting: p_k from the number of examples: ``float`` is that number, ``uniform`` is 1, ``capped(n)`` at
            most n.
        mean: how updates become one: `tacit.federated.mean.weighted_mean`, or one of `tacit.federated.robust`.

    Raises:
        InputError: a setting is not positive.
    """

    lr: float = 0.1
    batch_size: int | None = 10
    epochs: int = 1
    server_optimizer: ServerOptimizer = field(default=averaging, repr=False)
    weighting: Weighting = field(default=float, repr=False)
    mean: Mean = field(default=weighted_mean, repr=False)

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"lr={self.lr}: the clients' learning rate must be a number above 0, such as 0.1")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"batch_size={self.batch_size}: give 1 or more, or None for all of a client's examples")
        if self.epochs < 1:
            raise InputError(f"epochs={self.epochs}: clients must make at least 1 pass over their examples")

    def init(self, model: nn.Module, clients: int) -> ServerState:
        """The state before the first round, copied from ``model``.

        Raises:
            InputError: the model has nothing to train.
        """
        layout = Layout.of(model)
        parameters = layout.flatten(dict(model.named_parameters()))
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        optimizer = self.server_optimizer(list(layout.views(parameters).values()))
        return ServerState(layout, parameters, buffers, optimizer.state_dict(), clients)

    def client_update(
        self, state: ServerState, memory: Memory, solver: LocalSolver, examples: Examples, generator: torch.Generator
    ) -> tuple[Update, Memory]:
        """ClientUpdate of the paper: SGD from the global model over one client's examples."""
        return self.sent(state, solver(self.work(state, examples, generator)), len(examples)), memory

    def work(self, state: ServerState, examples: Examples, generator: torch.Generator) -> LocalWork:
        """What a client is asked to train from the global model."""
        return LocalWork(state.parameters, state.buffers, examples, self.lr, self.batch_size, self.epochs, generator)

    def sent(
        self, state: ServerState, result: LocalResult, examples: int, extra: Mapping[str, Tensor] | None = None
    ) -> Update:
        """What a client sends after training; takes the memory of ``result.parameters`` for the difference."""
        delta = result.parameters.sub_(state.parameters)
        return Update.of_client(delta, result.buffers, examples, result.loss, self.weighting(examples), extra)

    def effort(self, state: ServerState, sizes: Tensor) -> Effort:
        """E passes over the examples; as many bytes as the server sends, and the scalars."""
        return Effort(self.epochs * sizes, state.nbytes + SCALARS_BYTES)

    def extras(self, state: ServerState) -> Mapping[str, Extra]:
        """None: the update is all that is sent."""
        return {}

    def combine(self, updates: Iterable[Update]) -> Update:
        """The mean of the updates.

        Raises:
            InputError: there is no update.
        """
        return self.mean(updates)

    def server_update(self, state: ServerState, mean: Update) -> ServerState:
        """One step of the server optimizer along the mean update; the buffers are taken as they are."""
        vector = state.parameters.clone()
        parameters = list(state.layout.views(vector).values())
        for parameter, gradient in zip(parameters, state.layout.views(-mean.delta).values(), strict=True):
            parameter.grad = gradient
        optimizer = self.server_optimizer(parameters)
        optimizer.load_state_dict(copy.deepcopy(dict(state.optimizer)))
        optimizer.step()
        return replace(
            state, parameters=vector, buffers=mean.buffers, optimizer=optimizer.state_dict(), round=state.round + 1
        )


def uniform(examples: int) -> float:
    """Every client weighs the same."""
    return 1.0


def capped(most: int) -> Weighting:
    """Clients weigh their number of examples, but no more than ``most``.

    Raises:
        InputError: ``most`` is not positive.
    """
    if most < 1:
        raise InputError(f"most={most}: cap the weights at 1 example or more")
    return lambda examples: float(min(examples, most))
