"""What a federated algorithm is: frozen state and four pure functions.

One communication round, whatever the runtime::

    outcomes = (algorithm.client_update(state, memories[k], solver, clients[k], generators[k]) for k in cohort)
    state = algorithm.server_update(state, algorithm.combine(update for update, memory in outcomes))

The shape follows fedjax (Ro et al. 2021): a runtime may move the calls to other processes or machines without
the algorithm noticing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tacit.data.examples import Examples
from tacit.federated.layout import Layout
from tacit.federated.local.work import LocalSolver

Memory = Mapping[str, Tensor]
"""What an algorithm keeps at one client between the rounds in which it takes part; empty before the first."""

SCALARS_BYTES = 16
"""What an update carries beside its tensors: the number of examples (int64) and the mean loss (float64)."""


@dataclass(frozen=True)
class ServerState:
    """All that the server keeps from one round to the next.

    Args:
        layout: where each trainable parameter lies in the vectors. Frozen parameters are part of the model that
            every client already holds and are never sent.
        parameters: the global model's trainable parameters, shape ``(D,)``.
        buffers: the global model's buffers by name, of any dtype.
        optimizer: ``state_dict()`` of the server optimizer.
        clients: N, how many clients there are.
        shared: what the algorithm sends to the clients beside the model, by name.
        resident: tensors of the initial model, by name, that stay at the clients: each holds them from the start,
            trains its own, and they are never sent.
        round: how many rounds have been completed.
    """

    layout: Layout
    parameters: Tensor
    buffers: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    clients: int
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    resident: Mapping[str, Tensor] = field(default_factory=dict)
    round: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of parameters, buffers and what is shared beside them: what one client downloads."""
        return self.parameters.nbytes + nbytes(self.buffers) + nbytes(self.shared)

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Overwrite the parameters and buffers of ``model``, which has the global model's architecture."""
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, value in {**self.layout.views(self.parameters), **self.buffers}.items():
            tensors[name].copy_(value)


@dataclass(frozen=True)
class Update:
    """What one client sends after training, or what came of combining those of several.

    Args:
        delta: trained minus received parameters, shape ``(D,)``.
        buffers: the buffers as training left them, by name.
        examples: how many examples it was trained on.
        loss: mean training loss over those examples, while training.
        nbytes: bytes sent by the clients it comes from.
        weight: its weight in a mean; of a combined update, the sum of the clients'.
        extra: whatever else the algorithm sends, by name; combining adds them up.
    """

    delta: Tensor
    buffers: Mapping[str, Tensor]
    examples: int
    loss: float
    nbytes: int
    weight: float
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_client(
        cls,
        delta: Tensor,
        buffers: Mapping[str, Tensor],
        examples: int,
        loss: float,
        weight: float | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> Update:
        """The update of one client, its ``nbytes`` counted from the tensors and `SCALARS_BYTES`.

        Its weight is the number of examples unless another is given.
        """
        extra = extra or {}
        sent = delta.nbytes + nbytes(buffers) + nbytes(extra) + SCALARS_BYTES
        return cls(delta, buffers, examples, loss, sent, float(examples) if weight is None else weight, extra)

    def is_finite(self) -> bool:
        """Whether the loss and every entry of ``delta`` are finite; if not, training has diverged."""
        return math.isfinite(self.loss) and math.isfinite(float(self.delta.sum()))


@dataclass(frozen=True)
class Extra:
    """What an algorithm sends beside the model's update, under one name.

    Args:
        shape: of the tensor.
        times: how many times as large as an entry of the update one of its entries may be.
    """

    shape: torch.Size
    times: float = 1.0


@dataclass(frozen=True, eq=False)
class Effort:
    """What a round asks of clients, known before it starts.

    Args:
        examples: how many each computes on, epochs counted, shape ``(M,)``.
        bytes_up: what each sends.
    """

    examples: Tensor
    bytes_up: int


class Algorithm(Protocol):
    """A federated algorithm: its settings are its fields, its functions keep no memory between calls."""

    def init(self, model: nn.Module, clients: int) -> ServerState:
        """The state before the first round, from the initial global model and the number of clients."""
        ...

    def client_update(
        self, state: ServerState, memory: Memory, solver: LocalSolver, examples: Examples, generator: torch.Generator
    ) -> tuple[Update, Memory]:
        """Train at one client.

        Args:
            state: the global model of this round.
            memory: what this client's previous call returned, empty at its first.
            solver: trains the model's architecture on a set of examples.
            examples: the client's own, at least one.
            generator: the source of every random choice that is made here.
        """
        ...

    def effort(self, state: ServerState, sizes: Tensor) -> Effort:
        """What this round asks of clients with ``sizes`` examples (int64, shape ``(M,)``)."""
        ...

    def extras(self, state: ServerState) -> Mapping[str, Extra]:
        """What every update of a round carries in its ``extra``, known before the round starts."""
        ...

    def combine(self, updates: Iterable[Update]) -> Update:
        """The mean of the cohort's updates; reads the iterable once."""
        ...

    def server_update(self, state: ServerState, mean: Update) -> ServerState:
        """Apply the mean update, whose negative is the pseudo-gradient, to the global model."""
        ...


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all the tensors together."""
    return sum(tensor.nbytes for tensor in tensors.values())
