"""Clipping: what bounds how much one client, or one example, can change a sum.

Andrew et al. 2021, *Differentially Private Learning with Adaptive Clipping*, for a bound that follows a quantile of
the norms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tacit.errors import InputError

_INWARD = 1 - 2.0**-16
"""Clipped vectors end this much inside the bound, so that sums and products in float32 cannot take them over it."""

_LARGEST_EXPONENT = 30.0


def norm(vector: Tensor) -> float:
    """The Euclidean norm of ``vector``, summed in float64."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def clip(vector: Tensor, bound: float) -> Tensor:
    """``vector`` if its Euclidean norm is at most ``bound``, else a shorter one of the same direction.

    The result's norm is at most ``bound``, also after rounding. A vector that is not finite becomes all NaN: such an
    update has to be left out of the sum.
    """
    length = norm(vector)
    if not math.isfinite(length):
        return torch.full_like(vector, math.nan)
    return vector if length <= bound else vector * (bound / length * _INWARD)


def clip_factors(squared_norms: Tensor, bound: float) -> Tensor:
    """What each of n vectors is multiplied by to be clipped, from their squared norms, shape ``(n,)``.

    A vector whose norm is not finite gets 0: it counts as if it were not there.
    """
    norms = squared_norms.double().sqrt()
    factors = torch.where(norms <= bound, 1.0, bound * _INWARD / norms)
    return torch.where(norms.isfinite(), factors, 0.0).to(squared_norms.dtype)


@dataclass(frozen=True)
class AdaptiveClipping:
    """A clipping bound that follows a quantile of the clients' norms (Andrew et al. 2021, algorithm 1).

    Every client also sends b = 1 if its norm is within the bound S, else 0. With b̃ the noised mean of these, the next
    bound is S exp(−lr (b̃ − quantile)).

    The count is noised by N(0, count_noise²), and both sums together are one Gaussian mechanism of noise multiplier z
    if the updates get `update_noise_multiplier` (theorem 1 of the paper). It is b − ½ that is summed, whose
    sensitivity is ½.

    Args:
        quantile: the fraction of clients whose updates are to stay unclipped.
        lr: how fast the bound moves.
        count_noise: σ_b, the standard deviation of the noise on the count; ``None`` is the paper's choice, a twentieth
            of the expected cohort.

    Raises:
        InputError: a setting is out of range.
    """

    quantile: float = 0.5
    lr: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise InputError(f"quantile={self.quantile}: the fraction of unclipped updates lies between 0 and 1")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"lr={self.lr}: the bound's learning rate is a number above 0, such as 0.2")
        if self.count_noise is not None and not (self.count_noise > 0 and math.isfinite(self.count_noise)):
            raise InputError(f"count_noise={self.count_noise}: the noise on the count is a number above 0")

    def count_std(self, expected_cohort: float) -> float:
        """σ_b for a cohort of that many clients."""
        return expected_cohort / 20 if self.count_noise is None else self.count_noise

    def update_noise_multiplier(self, noise_multiplier: float, expected_cohort: float) -> float:
        """z_Δ = (z⁻² − (2σ_b)⁻²)^(−½), the noise multiplier of the updates when both sums together have z.

        Raises:
            InputError: the count alone already costs more than z allows.
        """
        if noise_multiplier == 0:
            return 0.0
        count_std = self.count_std(expected_cohort)
        left = noise_multiplier**-2 - (2 * count_std) ** -2
        if not left > 0:
            raise InputError(
                f"noise_multiplier={noise_multiplier} with noise {count_std} on the count of unclipped updates: the "
                f"count alone costs more; set count_noise above {noise_multiplier / 2}, or take larger cohorts"
            )
        return float(left**-0.5)

    def next_bound(self, bound: float, unclipped: float) -> float:
        """The bound of the next round, from the noised fraction of unclipped updates; finite and positive."""
        exponent = math.log(bound) - self.lr * (unclipped - self.quantile)
        return math.exp(min(max(exponent, -_LARGEST_EXPONENT), _LARGEST_EXPONENT))
