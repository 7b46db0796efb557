"""FedBuff: the server moves on after every K updates, however old.

Nguyen et al. 2022, *Federated Learning with Buffered Asynchronous Aggregation* (AISTATS), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import Algorithm, Effort, Extra, Memory, ServerState, Update
from tacit.federated.fedavg import FedAvg, uniform
from tacit.federated.local.work import LocalSolver

Staleness = Callable[[int], float]
"""The factor on an update that arrives as many server steps after its client started."""


def square_root(steps: int) -> float:
    """1 / √(1 + steps), the paper's choice."""
    return float((1 + steps) ** -0.5)


@dataclass(frozen=True)
class FedBuff:
    """Buffered asynchronous aggregation, around an algorithm that says what clients and server do.

    Clients train all the time, M at once; one that finishes makes room for another, which starts from the model of
    that moment. An update that arrives τ server steps after its client started goes into a buffer; when K are in it::

        Δ ← (1/K) Σ s(τ_k) Δ_k,        w ← server optimizer's step with Δ

    No round waits for its slowest client: in simulated time it reaches an accuracy sooner than synchronous rounds
    where clients differ in speed, at the price of stale updates. M and the clock belong to the runtime,
    `tacit.runtimes.asynchronous`.

    Args:
        inner: what the clients do and what the server does with a mean. With weights other than uniform, these take
            the place of 1/K.
        buffer: K.
        staleness: s.

    Raises:
        InputError: K is not positive.
    """

    inner: Algorithm = field(default_factory=lambda: FedAvg(weighting=uniform))
    buffer: int = 10
    staleness: Staleness = field(default=square_root, repr=False)

    def __post_init__(self) -> None:
        if self.buffer < 1:
            raise InputError(f"buffer={self.buffer}: the server needs at least 1 update for a step")

    def init(self, model: nn.Module, clients: int) -> ServerState:
        """The state before the first step.

        Raises:
            InputError: the buffer is larger than the number of clients, or ``inner`` shares more than a model.
        """
        if self.buffer > clients:
            raise InputError(f"buffer={self.buffer}: choose at most the number of clients, {clients}")
        state = self.inner.init(model, clients)
        if state.shared:
            carried = ", ".join(state.shared)
            raise InputError(
                f"FedBuff discounts stale models, not {carried}, which {self.inner} also keeps: use FedAvg"
            )
        return state

    def client_update(
        self, state: ServerState, memory: Memory, solver: LocalSolver, examples: Examples, generator: torch.Generator
    ) -> tuple[Update, Memory]:
        """As the inner algorithm's."""
        return self.inner.client_update(state, memory, solver, examples, generator)

    def effort(self, state: ServerState, sizes: Tensor) -> Effort:
        """As the inner algorithm's."""
        return self.inner.effort(state, sizes)

    def extras(self, state: ServerState) -> Mapping[str, Extra]:
        """As the inner algorithm's."""
        return self.inner.extras(state)

    def discount(self, update: Update, staleness: int) -> Update:
        """The update scaled by s(staleness); its weight stays, so that stale updates make smaller steps."""
        return replace(update, delta=update.delta * self.staleness(staleness))

    def combine(self, updates: Iterable[Update]) -> Update:
        """As the inner algorithm's, of discounted updates."""
        return self.inner.combine(updates)

    def server_update(self, state: ServerState, mean: Update) -> ServerState:
        """As the inner algorithm's."""
        return self.inner.server_update(state, mean)
