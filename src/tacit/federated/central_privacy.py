"""Differential privacy at the level of clients, with noise added by the server.

McMahan et al. 2018, *Learning Differentially Private Recurrent Language Models*, with the fixed denominator of its
estimator f̃_f; Andrew et al. 2021 for the bound that adapts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tacit.dp.accounting import SampledGaussian
from tacit.dp.clipping import AdaptiveClipping, norm
from tacit.dp.mechanisms import add_gaussian_
from tacit.errors import InputError
from tacit.federated.algorithm import Effort, Extra, ServerState, Update
from tacit.federated.client_privacy import ClientPrivacy
from tacit.federated.local.dp_sgd import seeded
from tacit.federated.mean import weighted_mean
from tacit.ring.prg import Prg

BOUND = "privacy/bound"
"""Where the clipping bound S of the coming round stands in `ServerState.shared`: float64, one entry."""
_WITHIN, _WITHIN_BYTES = "privacy/within", 8


@dataclass(frozen=True)
class CentralPrivacy(ClientPrivacy):
    """An algorithm made differentially private by noise that the server adds.

    In round t, with m the expected cohort::

        client:  Δ_k ← clip(Δ_k of the inner algorithm, S)
        server:  Δ ← (Σ_k Δ_k + N(0, (z S)²)) / m,  then the inner algorithm's server step with Δ

    The sum is divided by m however many clients there were, so that one client changes the sum by at most S. The noise
    is added also when no client finished.

    *Guarantees*: the sequence of global models costs one Gaussian mechanism of noise multiplier z a round, on a Poisson
    sample if that is how the cohort was drawn. What else the server records (losses, numbers of examples, who took
    part) is not covered.

    Args:
        inner: see `ClientPrivacy`.
        clip: S, the greatest norm of a client's update; the first bound if it adapts.
        noise_multiplier: z; 0 is clipping without privacy.
        expected_cohort: m, such as the cohort's size, or q N for Poisson selection.
        adaptive: let the bound follow a quantile of the norms, paid for from z.
        noise_seed: in [0, 2^128), for experiments that are to be repeated only; ``None`` takes fresh noise from the
            operating system, as privacy demands.

    Raises:
        InputError: a setting is out of range, or the inner algorithm does not average.
    """

    noise_multiplier: float
    expected_cohort: float
    adaptive: AdaptiveClipping | None = None
    noise_seed: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.expected_cohort > 0 and math.isfinite(self.expected_cohort)):
            raise InputError(f"expected_cohort={self.expected_cohort}: the expected number of clients is above 0")
        SampledGaussian(self.noise_multiplier)
        if self.noise_seed is not None:
            seeded(self.noise_seed)
        if self.adaptive is not None:
            self.adaptive.update_noise_multiplier(self.noise_multiplier, self.expected_cohort)

    def init(self, model: nn.Module, clients: int) -> ServerState:
        """See `ClientPrivacy.init`."""
        return self._with_bound(super().init(model, clients), self.clip)

    def bound(self, state: ServerState) -> float:
        """S of the coming round."""
        return float(state.shared[BOUND])

    def beside(self, state: ServerState, update: Update) -> Mapping[str, Tensor]:
        """b − ½, whether the update was within the bound, if the bound adapts."""
        if self.adaptive is None:
            return {}
        within = 0.5 if norm(update.delta) <= self.bound(state) else -0.5
        return {_WITHIN: torch.tensor(within, dtype=torch.float64)}

    def effort(self, state: ServerState, sizes: Tensor) -> Effort:
        """The inner algorithm's, without buffers."""
        shared = {name: tensor for name, tensor in state.shared.items() if name != BOUND}
        effort = super().effort(replace(state, shared=shared), sizes)
        return replace(effort, bytes_up=effort.bytes_up + (0 if self.adaptive is None else _WITHIN_BYTES))

    def extras(self, state: ServerState) -> Mapping[str, Extra]:
        """b − ½, if the bound adapts."""
        return {} if self.adaptive is None else {_WITHIN: Extra(torch.Size())}

    def combine(self, updates: Iterable[Update]) -> Update:
        """The clipped updates' sum over the expected cohort, without noise yet; an empty one if there is no update."""
        remaining = iter(updates)
        first = next(remaining, None)
        if first is None:
            return Update(torch.empty(0), {}, 0, 0.0, 0, 0.0)
        mean = weighted_mean(_chained(first, remaining))
        return replace(mean, delta=mean.delta.mul_(mean.weight / self.expected_cohort))

    def server_update(self, state: ServerState, mean: Update) -> ServerState:
        """Add the noise and apply the result; each round's noise is drawn once, here."""
        prg = Prg.fresh() if self.noise_seed is None else seeded(self.noise_seed).derive("central", state.round)
        bound, multiplier = self.bound(state), self.noise_multiplier
        if self.adaptive is not None:
            multiplier = self.adaptive.update_noise_multiplier(multiplier, self.expected_cohort)
        delta = mean.delta.clone() if mean.delta.numel() else torch.zeros_like(state.parameters)
        add_gaussian_(delta, multiplier * bound / self.expected_cohort, prg)
        noised = replace(mean, delta=delta, buffers=state.buffers, extra={})
        return self._with_bound(self.inner.server_update(state, noised), self._next_bound(bound, mean, prg))

    def _next_bound(self, bound: float, mean: Update, prg: Prg) -> float:
        if self.adaptive is None:
            return bound
        within = mean.extra.get(_WITHIN, torch.zeros((), dtype=torch.float64)).reshape(1).clone()
        if self.noise_multiplier > 0:
            add_gaussian_(within, self.adaptive.count_std(self.expected_cohort), prg)
        return self.adaptive.next_bound(bound, 0.5 + float(within) / self.expected_cohort)

    def _with_bound(self, state: ServerState, bound: float) -> ServerState:
        return replace(state, shared={**state.shared, BOUND: torch.tensor(bound, dtype=torch.float64)})


def _chained(first: Update, remaining: Iterable[Update]) -> Iterable[Update]:
    yield first
    yield from remaining
