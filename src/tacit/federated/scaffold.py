"""SCAFFOLD: client drift corrected by control variates.

Karimireddy et al. 2020, *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning* (ICML), algorithm 1 with
option II.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from tacit.data.examples import Examples
from tacit.federated.algorithm import Extra, Memory, ServerState, Update
from tacit.federated.fedavg import FedAvg, Weighting, uniform
from tacit.federated.local.work import LocalSolver

CONTROL = "scaffold.control"
"""Under this name lie c in ``ServerState.shared``, c_k in a client's memory and Δc_k in ``Update.extra``."""


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """`FedAvg` whose clients correct every gradient by what the others would have done.

    c_k estimates the gradient at client k, c its mean over all N clients. With y the local model and K its steps::

        y    ← y − η (∇ℓ(y; b) − c_k + c)             K times from y = x
        c_k⁺ ← c_k − c + (x − y) / (K η)              option II
        x    ← server optimizer's step with Δ = mean of y − x
        c    ← c + (1/N) Σ_{k in the cohort} (c_k⁺ − c_k)

    All controls start at 0. A client remembers c_k between its rounds, so SCAFFOLD pays when clients come back:
    N / cohort rounds pass before each has a control. It sends and receives twice the bytes of `FedAvg`.

    Args:
        weighting: as in `FedAvg`, but uniform unless said otherwise, as in the paper: c weighs clients alike, and
            training converges to the optimum of the plain mean of the clients' losses.

    Raises:
        InputError: a setting is out of range.
    """

    weighting: Weighting = field(default=uniform, repr=False)

    def init(self, model: nn.Module, clients: int) -> ServerState:
        """The state before the first round, with c = 0."""
        state = super().init(model, clients)
        return replace(state, shared={CONTROL: torch.zeros_like(state.parameters)})

    def client_update(
        self, state: ServerState, memory: Memory, solver: LocalSolver, examples: Examples, generator: torch.Generator
    ) -> tuple[Update, Memory]:
        """Corrected local steps; the update's ``extra`` carries c_k⁺ − c_k."""
        control = state.shared[CONTROL]
        own = memory.get(CONTROL, torch.zeros_like(control))
        result = solver(replace(self.work(state, examples, generator), correction=control - own))
        change = (state.parameters - result.parameters).div_(result.steps * self.lr).sub_(control)
        return self.sent(state, result, len(examples), {CONTROL: change}), {CONTROL: own + change}

    def extras(self, state: ServerState) -> Mapping[str, Extra]:
        """c_k⁺ − c_k, of which entries are at most r / η and those of c, if those of x − y are at most r."""
        return {CONTROL: Extra(state.parameters.shape, 2 / self.lr)}

    def server_update(self, state: ServerState, mean: Update) -> ServerState:
        """The step of `FedAvg`, and that of c."""
        control = state.shared[CONTROL].add(mean.extra[CONTROL], alpha=1 / state.clients)
        return replace(super().server_update(state, mean), shared={CONTROL: control})
