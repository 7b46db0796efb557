"""What a federated algorithm is: frozen state and four pure functions.

One communication round, whatever the runtime::

    updates = (algorithm.client_update(state, model, clients[k], generators[k]) for k in cohort)
    state = algorithm.server_update(state, algorithm.combine(updates))

The shape follows fedjax (Ro et al. 2021): a runtime may move the calls to other processes or machines without
the algorithm noticing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tacit.data.examples import Examples

SCALARS_BYTES = 16
"""What an update carries beside its tensors: the number of examples (int64) and the mean loss (float64)."""


@dataclass(frozen=True)
class ServerState:
    """All that the server keeps from one round to the next.

    Args:
        parameters: the global model's trainable parameters by name. Frozen parameters are part of the model
            that every client already holds and are never sent.
        buffers: the global model's buffers by name, of any dtype.
        optimizer: ``state_dict()`` of the server optimizer.
        round: how many rounds have been completed.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    round: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of parameters and buffers: what one client downloads."""
        return _nbytes(self.parameters) + _nbytes(self.buffers)

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Overwrite the parameters and buffers of ``model``, which has the global model's architecture."""
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, value in {**self.parameters, **self.buffers}.items():
            tensors[name].copy_(value)


@dataclass(frozen=True)
class Update:
    """What one client sends after training, or the mean of what several sent.

    Args:
        delta: trained minus received value of each trainable parameter, by name.
        buffers: the buffers as training left them, by name.
        examples: how many examples it was trained on.
        loss: mean training loss over those examples, while training.
        nbytes: bytes sent by the clients it comes from.
    """

    delta: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    examples: int
    loss: float
    nbytes: int

    @classmethod
    def of_client(
        cls, delta: Mapping[str, Tensor], buffers: Mapping[str, Tensor], examples: int, loss: float
    ) -> Update:
        """The update of one client, its ``nbytes`` counted from the tensors and `SCALARS_BYTES`."""
        return cls(delta, buffers, examples, loss, _nbytes(delta) + _nbytes(buffers) + SCALARS_BYTES)

    def is_finite(self) -> bool:
        """Whether the loss and every entry of ``delta`` are finite; if not, training has diverged."""
        values = [torch.tensor(self.loss), *self.delta.values()]
        return all(bool(value.isfinite().all()) for value in values)


class Algorithm(Protocol):
    """A federated algorithm: its settings are its fields, its functions keep no memory between calls."""

    def init(self, model: nn.Module) -> ServerState:
        """The state before the first round, from the initial global model."""
        ...

    def client_update(
        self, state: ServerState, model: nn.Module, examples: Examples, generator: torch.Generator
    ) -> Update:
        """Train at one client.

        Args:
            state: the global model of this round.
            model: a scratch copy of the architecture; whatever it holds is overwritten.
            examples: the client's own, at least one.
            generator: the source of every random choice that is made here.
        """
        ...

    def combine(self, updates: Iterable[Update]) -> Update:
        """The mean of the cohort's updates; reads the iterable once and keeps no more than a running mean."""
        ...

    def server_update(self, state: ServerState, mean: Update) -> ServerState:
        """Apply the mean update, whose negative is the pseudo-gradient, to the global model."""
        ...


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that require gradients, by name, each shared one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
