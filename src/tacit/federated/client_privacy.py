"""What differential privacy at the level of clients asks of them, whoever adds the noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tacit.data.examples import Examples
from tacit.dp.clipping import clip
from tacit.dp.models import refuse_running_statistics
from tacit.errors import InputError
from tacit.federated.algorithm import Algorithm, Effort, Extra, Memory, ServerState, Update, nbytes
from tacit.federated.fedavg import uniform
from tacit.federated.local.work import LocalSolver
from tacit.federated.mean import weighted_mean


@dataclass(frozen=True)
class ClientPrivacy:
    """Any algorithm whose clients send an update of the model and nothing else, which they clip.

    Every client weighs the same. Buffers never leave the clients. It has to be the outermost wrapper: what changes an
    update after clipping voids it.

    Args:
        inner: the algorithm.
        clip: S, the greatest norm of a client's update.

    Raises:
        InputError: the bound is out of range, or the inner algorithm does not average, or not uniformly.
    """

    inner: Algorithm
    clip: float

    def __post_init__(self) -> None:
        if not (self.clip > 0 and math.isfinite(self.clip)):
            raise InputError(f"clip={self.clip}: the bound on a client's update is a number above 0, such as 0.5")
        for algorithm in wrapped(self.inner):
            if getattr(algorithm, "mean", weighted_mean) is not weighted_mean:
                raise InputError(f"{algorithm} replaces the mean: what is clipped and noised has to be a plain sum")
            # The default of most algorithms is not a choice of the caller's.
            if getattr(algorithm, "weighting", uniform) not in (uniform, float):
                raise InputError(
                    f"{algorithm} weighs clients by their examples: under differential privacy every client weighs the "
                    "same, or a large one would be less private: leave weighting out"
                )

    def init(self, model: nn.Module, clients: int) -> ServerState:
        """See `Algorithm`.

        Raises:
            InputError: the clients would send the running statistics of batch normalisation.
        """
        state = self.inner.init(model, clients)
        refuse_running_statistics(model, state.buffers)
        return state

    def client_update(
        self, state: ServerState, memory: Memory, solver: LocalSolver, examples: Examples, generator: torch.Generator
    ) -> tuple[Update, Memory]:
        """See `Algorithm`.

        Raises:
            InputError: the inner algorithm sends more than an update of the model.
        """
        update, memory = self.inner.client_update(state, memory, solver, examples, generator)
        if update.extra:
            raise InputError(
                f"{self.inner} sends {', '.join(update.extra)} beside the model's update, which no noise would cover: "
                "choose an algorithm that sends the update alone, such as FedAvg or FedProx"
            )
        extra = self.beside(state, update)
        sent = update.nbytes - nbytes(update.buffers) + nbytes(extra)
        clipped = clip(update.delta, self.bound(state))
        return replace(update, delta=clipped, buffers={}, weight=1.0, extra=extra, nbytes=sent), memory

    def bound(self, state: ServerState) -> float:
        """S of the coming round."""
        return self.clip

    def beside(self, state: ServerState, update: Update) -> Mapping[str, Tensor]:
        """What a client sends beside its update, which it has not clipped yet."""
        return {}

    def effort(self, state: ServerState, sizes: Tensor) -> Effort:
        """The inner algorithm's, without buffers."""
        return self.inner.effort(replace(state, buffers={}), sizes)

    def extras(self, state: ServerState) -> Mapping[str, Extra]:
        """What stands beside an update: nothing."""
        return {}


def wrapped(algorithm: Algorithm) -> Iterable[Algorithm]:
    """An algorithm and those that it builds on, from the outermost in."""
    yield algorithm
    for attribute in ("inner", "averaging"):
        if hasattr(algorithm, attribute):
            yield from wrapped(getattr(algorithm, attribute))
