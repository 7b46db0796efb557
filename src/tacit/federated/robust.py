"""Means that a few lying clients cannot pull wherever they like.

Each is a ``Mean`` for `FedAvg`, such as ``FedAvg(mean=TrimmedMean(0.1))``. What they have in common:

- they look at all the updates of the cohort at once, so memory grows with the cohort (m × D numbers), and they need
  the updates in clear: they do not go with secure aggregation, but for `ClippedMean`, since clients can clip
  themselves;
- every client counts the same: the number of examples is the client's own word, so weights are ignored;
- floating-point buffers and counters become their coordinate-wise median, and the reported loss the median loss;
- updates that carry more than a model (SCAFFOLD's controls) are refused: their sum would not be robust.

An attacker who stays within the spread of the honest updates still moves the mean by about that spread; with unlike
data the spread is wide. The more clients are alike, the more these means are worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tacit.errors import InputError, TooFewUpdates
from tacit.federated.algorithm import Update


def coordinate_median(updates: Iterable[Update]) -> Update:
    """The median of every coordinate; of an even number of updates, the mean of the middle two.

    Holds while fewer than half of the cohort lie. Yin et al. 2018, *Byzantine-Robust Distributed Learning: Towards
    Optimal Statistical Rates* (ICML), definition 1.

    Raises:
        InputError: there is no update, or an update carries more than a model.
    """
    return _combined(list(updates), _median)


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of every coordinate without its largest and smallest values.

    Of m updates ⌈share · m⌉ are dropped at either end of each coordinate, so it holds while at most so many lie.
    Yin et al. 2018, definition 2.

    Args:
        share: in (0, 0.5).

    Raises:
        InputError: ``share`` is not; when combining, an update carries more than a model.
        TooFewUpdates: when combining, nothing would be left.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 0.5:
            raise InputError(f"share={self.share}: drop a share above 0 and below 0.5 at either end, such as 0.1")

    def __call__(self, updates: Iterable[Update]) -> Update:
        """The trimmed mean of the updates."""
        updates = list(updates)
        # the subtraction undoes the rounding of products such as 0.1 · 30 = 3.0000000000000004
        dropped = math.ceil(self.share * len(updates) - 1e-9)
        if updates and 2 * dropped >= len(updates):
            raise TooFewUpdates(
                f"share={self.share} drops {dropped} of {len(updates)} updates at either end, which leaves none: "
                "invite more clients or drop fewer"
            )
        return _combined(updates, lambda deltas: _middle(deltas, dropped))


@dataclass(frozen=True)
class Krum:
    """The updates that have the closest neighbours.

    Update i scores Σ ‖Δ_i − Δ_j‖² over the m − f − 2 others closest to it; the ``keep`` updates with the least scores
    are averaged. Costs m² D. Blanchard et al. 2017, *Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent* (NeurIPS), section 4; with ``keep`` above 1 Multi-Krum, section 5.

    Args:
        byzantine: f, how many may lie.
        keep: how many updates to average.

    Raises:
        InputError: a setting is out of range; when combining, an update carries more than a model.
        TooFewUpdates: when combining, there are fewer than 2f + 3 updates, or fewer than f + ``keep``.
    """

    byzantine: int
    keep: int = 1

    def __post_init__(self) -> None:
        if self.byzantine < 0:
            raise InputError(f"byzantine={self.byzantine}: give how many clients of a cohort may lie, 0 or more")
        if self.keep < 1:
            raise InputError(f"keep={self.keep}: average at least 1 update")

    def __call__(self, updates: Iterable[Update]) -> Update:
        """The mean of the updates kept."""
        updates = list(updates)
        needed = max(2 * self.byzantine + 3, self.byzantine + self.keep)
        if updates and len(updates) < needed:
            raise TooFewUpdates(
                f"Krum with byzantine={self.byzantine}, keep={self.keep} needs {needed} updates, "
                f"but {len(updates)} came: invite more clients or expect fewer liars"
            )
        return _combined(updates, lambda deltas: deltas[self._kept(deltas)].mean(0))

    def _kept(self, deltas: Tensor) -> Tensor:
        """Indices of the updates with the least scores."""
        distances = torch.cdist(deltas, deltas, compute_mode="donot_use_mm_for_euclid_dist").square()
        neighbours = len(deltas) - self.byzantine - 2
        scores = distances.sort(dim=1).values[:, 1 : 1 + neighbours].sum(1)
        return scores.argsort(stable=True)[: self.keep]


@dataclass(frozen=True)
class ClippedMean:
    """The mean of the updates, each scaled down to a Euclidean norm of at most ``norm``.

    One liar among m moves the mean by at most ``norm`` / m: a bound on the harm, where the others above aim to exclude
    it. Sun et al. 2019, *Can You Really Backdoor Federated Learning?*, section 4.

    Args:
        norm: the largest Euclidean norm, above 0.

    Raises:
        InputError: ``norm`` is not positive; when combining, there is no update, or an update carries more than a
            model.
    """

    norm: float

    def __post_init__(self) -> None:
        if not (self.norm > 0 and math.isfinite(self.norm)):
            raise InputError(f"norm={self.norm}: clip updates to a number above 0")

    def __call__(self, updates: Iterable[Update]) -> Update:
        """The mean of the clipped updates."""
        return _combined(list(updates), self._mean)

    def _mean(self, deltas: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(deltas, dim=1, keepdim=True)
        return (deltas * (self.norm / norms.clamp_min(self.norm))).mean(0)


def _combined(updates: list[Update], mean: Callable[[Tensor], Tensor]) -> Update:
    """The updates as one, ``mean`` taken over the first dimension of their stacked vectors."""
    if not updates:
        raise TooFewUpdates("there is no update to combine: a round needs at least one client")
    if any(update.extra for update in updates):
        carried = ", ".join(next(update.extra for update in updates if update.extra))
        raise InputError(
            f"the updates also carry {carried}, and a robust mean covers the model only: use weighted_mean"
        )
    return Update(
        delta=mean(torch.stack([update.delta for update in updates])),
        buffers={name: _median(torch.stack([u.buffers[name] for u in updates])) for name in updates[0].buffers},
        examples=sum(update.examples for update in updates),
        loss=float(_median(torch.tensor([update.loss for update in updates], dtype=torch.float64))),
        nbytes=sum(update.nbytes for update in updates),
        weight=float(len(updates)),
    )


def _median(values: Tensor) -> Tensor:
    """Along the first dimension; of whole numbers the lower of the middle two."""
    below = (len(values) - 1) // 2
    if values.is_floating_point():
        return _middle(values, below)
    ordered: Tensor = values.sort(dim=0).values
    return ordered[below]


def _middle(values: Tensor, dropped: int) -> Tensor:
    """The mean along the first dimension without the ``dropped`` largest and smallest of each column."""
    return values.sort(dim=0).values[dropped : len(values) - dropped].mean(0)
