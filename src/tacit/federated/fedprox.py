"""FedProx: local training that is held near the global model.

Li et al. 2020, *Federated Optimization in Heterogeneous Networks* (MLSys), algorithm 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import ServerState
from tacit.federated.fedavg import FedAvg
from tacit.federated.local.work import LocalWork


@dataclass(frozen=True)
class FedProx(FedAvg):
    """`FedAvg` whose clients minimise their loss plus (μ/2) ‖w − w_t‖²::

        w ← w − η (∇ℓ(w; b) + μ (w − w_t))

    Local training that runs long on unlike data drifts towards each client's own optimum; the pull limits the
    drift. With μ = 0 it is `FedAvg`, bit for bit. Keep η μ < 2, or the pull itself diverges.

    Args:
        mu: μ ≥ 0; the paper tries 0.001 to 1.

    Raises:
        InputError: μ is negative or not finite, or another setting is out of range.
    """

    mu: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.mu >= 0 and math.isfinite(self.mu)):
            raise InputError(f"mu={self.mu}: the pull towards the global model must be a number from 0, such as 0.1")

    def work(self, state: ServerState, examples: Examples, generator: torch.Generator) -> LocalWork:
        """What a client is asked to train, its anchor the global model."""
        return replace(super().work(state, examples, generator), proximal=self.mu)
