"""Ditto: a global model, and beside it a personal one at every client that is pulled towards it.

Li et al. 2021, *Ditto: Fair and Robust Federated Learning Through Personalization* (ICML), algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import Effort, Memory, ServerState, Update
from tacit.federated.fedavg import FedAvg
from tacit.federated.layout import Layout
from tacit.federated.local.work import LocalSolver

PERSONAL = "ditto.personal"
"""Under this name a client remembers v_k; its buffers are remembered by their names under ``BUFFERS``."""
BUFFERS = "ditto.buffers."


@dataclass(frozen=True)
class Ditto(FedAvg):
    """`FedAvg`, and in the same rounds a personal model v_k at each client, which it keeps to itself.

    After its local training from w_t, of which the server hears as in `FedAvg`, client k makes as many steps of::

        v_k ← v_k − η (∇ℓ(v_k; b) + λ (v_k − w_t))

    starting in its first round from w_t. The rounds cost no more bytes, but twice the computation. λ = 0 is local
    training alone; a large λ gives everyone the global model. Keep η λ < 2, or the pull itself diverges; where v_k is
    not finite after a round, the client keeps the one it had.

    Args:
        pull: λ ≥ 0; the paper tries 0.05 to 2.

    Raises:
        InputError: λ is negative or not finite, or another setting is out of range.
    """

    pull: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.pull >= 0 and math.isfinite(self.pull)):
            raise InputError(
                f"pull={self.pull}: the pull towards the global model must be a number from 0, such as 0.1"
            )

    def client_update(
        self, state: ServerState, memory: Memory, solver: LocalSolver, examples: Examples, generator: torch.Generator
    ) -> tuple[Update, Memory]:
        """Train the global model for the server, then the personal one."""
        update, _ = super().client_update(state, memory, solver, examples, generator)
        own = self.personalise(state, memory, state.layout)
        work = replace(self.work(own, examples, generator), proximal=self.pull, anchor=state.parameters)
        result = solver(work)
        if not result.parameters.isfinite().all():
            return update, memory
        buffers = {BUFFERS + name: value for name, value in result.buffers.items()}
        return update, {PERSONAL: result.parameters, **buffers}

    def effort(self, state: ServerState, sizes: Tensor) -> Effort:
        """Twice the computation of `FedAvg`."""
        effort = super().effort(state, sizes)
        return replace(effort, examples=2 * effort.examples)

    def personalise(self, state: ServerState, memory: Memory, layout: Layout) -> ServerState:
        """v_k; before the client's first round the global model."""
        if PERSONAL not in memory:
            return state
        buffers = {name: memory[BUFFERS + name] for name in state.buffers}
        return replace(state, parameters=memory[PERSONAL], buffers=buffers)
