"""Federated averaging, with any optimizer at the server.

McMahan et al. 2017, *Communication-Efficient Learning of Deep Networks from Decentralized Data*, algorithm 1;
Reddi et al. 2021, *Adaptive Federated Optimization*, algorithm 1, for the server optimizer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import ServerState, Update, trainable_parameters

ServerOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


def averaging(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Server optimizer of plain FedAvg: SGD of rate 1, so the new model is the mean of the clients'."""
    return torch.optim.SGD(parameters, lr=1.0)


@dataclass(frozen=True)
class FedAvg:
    """Federated averaging.

    In round t, with K the cohort, n_k the examples of client k and n their sum::

        w_k     ← w_t, then w_k ← w_k − η ∇ℓ(w_k; b) for E epochs of shuffled batches b of B examples
        Δ       ← Σ_{k∈K} (n_k / n) (w_k − w_t)
        w_{t+1} ← server optimizer's step from w_t with the pseudo-gradient −Δ

    ℓ is the mean cross-entropy. Floating-point buffers (batch normalisation) become the same weighted mean of
    the clients' values; other buffers (counters) become their maximum.

    Args:
        lr: η, the clients' learning rate.
        batch_size: B; ``None`` is the whole of the client's examples (FedSGD if ``epochs`` is 1).
        epochs: E, passes over the client's examples in a round.
        server_optimizer: makes the ``torch.optim`` optimizer of the global model from a list of its
            parameters.

    Raises:
        InputError: a setting is not positive.
    """

    lr: float = 0.1
    batch_size: int | None = 10
    epochs: int = 1
    server_optimizer: ServerOptimizer = field(default=averaging, repr=False)

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"lr={self.lr}: the clients' learning rate must be a number above 0, such as 0.1")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"batch_size={self.batch_size}: give 1 or more, or None for all of a client's examples")
        if self.epochs < 1:
            raise InputError(f"epochs={self.epochs}: clients must make at least 1 pass over their examples")

    def init(self, model: nn.Module) -> ServerState:
        """The state before the first round, copied from ``model``.

        Raises:
            InputError: the model has nothing to train.
        """
        parameters = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
        if not parameters:
            raise InputError("the model has no parameter that requires a gradient: there is nothing to train")
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return ServerState(parameters, buffers, self.server_optimizer(list(parameters.values())).state_dict())

    def client_update(
        self, state: ServerState, model: nn.Module, examples: Examples, generator: torch.Generator
    ) -> Update:
        """ClientUpdate of the paper: SGD from the global model over one client's examples.

        Layers that draw random numbers of their own (dropout) take them from torch's global generator, which
        is seeded from ``generator`` meanwhile and restored afterwards.
        """
        state.load_into(model)
        model.train()
        weights: list[Tensor] = list(trainable_parameters(model).values())
        total_loss = torch.zeros(())
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**32, (), generator=generator)))
            for batch in self._batches(len(examples), generator):
                loss = functional.cross_entropy(model(examples.inputs[batch]), examples.targets[batch])
                gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
                with torch.no_grad():
                    torch._foreach_add_(weights, gradients, alpha=-self.lr)
                    total_loss += loss * len(batch)
        delta = {name: p.detach() - state.parameters[name] for name, p in trainable_parameters(model).items()}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return Update.of_client(delta, buffers, len(examples), float(total_loss) / (len(examples) * self.epochs))

    def combine(self, updates: Iterable[Update]) -> Update:
        """The mean of the updates weighted by their examples, folded one by one.

        Raises:
            InputError: there is no update.
        """
        remaining = iter(updates)
        first = next(remaining, None)
        if first is None:
            raise InputError("there is no update to combine: a round needs at least one client")
        return reduce(weighted_mean, remaining, first)

    def server_update(self, state: ServerState, mean: Update) -> ServerState:
        """One step of the server optimizer along the mean update; the buffers are taken as they are."""
        parameters = {name: value.clone() for name, value in state.parameters.items()}
        for name, parameter in parameters.items():
            parameter.grad = -mean.delta[name]
        optimizer = self.server_optimizer(list(parameters.values()))
        optimizer.load_state_dict(copy.deepcopy(dict(state.optimizer)))
        optimizer.step()
        for parameter in parameters.values():
            parameter.grad = None
        return ServerState(parameters, mean.buffers, optimizer.state_dict(), state.round + 1)

    def _batches(self, examples: int, generator: torch.Generator) -> Iterator[Tensor]:
        for _ in range(self.epochs):
            order = torch.randperm(examples, generator=generator)
            yield from torch.split(order, self.batch_size or examples)


def weighted_mean(a: Update, b: Update) -> Update:
    """The mean of two updates weighted by their examples; counters take the maximum, bytes add up."""
    examples = a.examples + b.examples
    share = b.examples / examples

    def mean(x: Tensor, y: Tensor) -> Tensor:
        return torch.lerp(x, y, share) if x.is_floating_point() else torch.maximum(x, y)

    return Update(
        delta={name: mean(a.delta[name], b.delta[name]) for name in a.delta},
        buffers={name: mean(a.buffers[name], b.buffers[name]) for name in a.buffers},
        examples=examples,
        loss=a.loss + share * (b.loss - a.loss),
        nbytes=a.nbytes + b.nbytes,
    )
