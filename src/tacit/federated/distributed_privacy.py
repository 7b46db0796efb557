"""Differential privacy of clients that no one has to be trusted with: each adds its share of the noise before masking.

Kairouz, Liu and Steinke 2021, *The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
Aggregation*, algorithm 1 without the rotation, which only spreads large entries; Agarwal, Kairouz and Liu 2021 for
Skellam noise in its place. For an update Δ_k, with s steps of the grid in 1::

    client:  y ← s · clip(Δ_k, S); round y at random until ‖y‖ ≤ B; send y + a share of integer noise, masked
    server:  sum of those who finished, over s and the expected cohort

The noise is provisioned for a number of clients that is sure to finish. Every further one adds to it, and every missing
one takes from it: `NoiseShares.event` says what a sum really costs, from who really finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tacit.dp.accounting import Budget, NoisedSum, least_noise, privacy_spent
from tacit.dp.clipping import clip
from tacit.dp.discrete import DiscreteGaussian, Skellam, add_noise_, magnitude
from tacit.dp.distributed import DiscreteGaussianSum, SkellamSum, rounded_norm, summed_norm
from tacit.errors import InputError
from tacit.federated.secure_sum.encoding import Encoded, Encoding
from tacit.ring.prg import Prg

Noise = Literal["skellam", "discrete-gaussian"]

OVERFLOW = 2.0**-60
"""With at most that probability the noise of a round takes some entry of the sum out of the ring."""


@dataclass(frozen=True)
class NoiseShares:
    """How the clients of a round make a private sum together.

    Every client weighs the same, and nothing but the update is in the vector: a weight or a loss beside it would be
    covered by no noise.

    *Guarantees*: the sum that is opened costs `event`, against everyone who knows no more than ``colluding`` of the
    shares. That holds for any update, NaN and infinity being refused, because the norm is bounded after rounding, in
    integers. A client that leaves out its share counts as one that colludes. No amplification by sampling is claimed:
    whoever invites the cohort knows it, and how many finish is public.

    Args:
        size: D, entries of an update.
        clip: S, the greatest Euclidean norm of an update.
        clients: the most whose vectors are summed.
        fewest: the fewest whose sum may be opened; the noise is provisioned for them.
        noise_multiplier: z, the standard deviation of the noise in the sum over S, when that many finish.
        colluding: of those who finish, how many may tell their shares to whoever looks at the sum; the noise is
            provisioned without theirs.
        noise: ``"skellam"``, or ``"discrete-gaussian"``, whose shares have to have a variance of ¼ steps or more.
        bits: q, bits of one client's entry, sign included.

    Raises:
        InputError: a setting is out of range, the sum with its noise needs more than 32 bits, or the grid is too coarse
            for the noise.
    """

    size: int
    clip: float
    clients: int
    fewest: int
    noise_multiplier: float
    colluding: int = 0
    noise: Noise = "skellam"
    bits: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.colluding < self.fewest <= self.clients:
            raise InputError(
                f"colluding={self.colluding}, fewest={self.fewest}, clients={self.clients}: give 0 ≤ colluding < "
                "fewest ≤ clients, so that somebody's noise is unknown"
            )
        if not (self.noise_multiplier > 0 and math.isfinite(self.noise_multiplier)):
            raise InputError(
                f"noise_multiplier={self.noise_multiplier}: the noise in the sum, over the clip, is above 0; for a sum "
                "without noise use an Encoding alone"
            )
        if self.noise not in get_args(Noise):
            raise InputError(f"noise={self.noise!r}: choose one of {', '.join(get_args(Noise))}")
        self.event(self.fewest)
        _ = self.encoding

    @cached_property
    def encoding(self) -> Encoding:
        """How sums are encoded, with headroom for the noise of all clients.

        Headroom is what each client's share may take of the ring on average: it is the sum that must not wrap, and its
        noise is far smaller than so many times the largest share.
        """
        total = type(self.share)(self.clients * self.share.variance)
        return replace(self._quiet, headroom=-(-magnitude(total, self.size, OVERFLOW) // self.clients))

    @cached_property
    def share(self) -> Skellam | DiscreteGaussian:
        """The noise that each client adds to every entry."""
        std = self.noise_multiplier * self._norm
        variance = std**2 / (self.fewest - self.colluding)
        return Skellam(variance) if self.noise == "skellam" else DiscreteGaussian(variance)

    @property
    def bound(self) -> float:
        """B, the greatest Euclidean norm of a client's integers before noise."""
        return rounded_norm(self._norm, self.size)

    def event(self, finished: int, times: int = 1) -> NoisedSum:
        """What a sum costs that ``finished`` clients are in, to be written down before it is opened.

        Raises:
            InputError: they are more than ``clients``, or no more than may collude.
        """
        if not self.colluding < finished <= self.clients:
            raise InputError(
                f"finished={finished} of at most {self.clients} clients, of whom {self.colluding} may collude: a sum "
                "without anyone's unknown noise must not be opened"
            )
        shares, variance, l2 = finished - self.colluding, self.share.variance, self.bound
        if isinstance(self.share, DiscreteGaussian):
            return DiscreteGaussianSum(variance, shares, self.size, l2, times=times)
        return SkellamSum(shares * variance, l2, summed_norm(l2, self.size), times=times)

    def encode(self, update: Tensor, prg: Prg) -> Encoded:
        """A client's residues, ready to be masked; see `integers`."""
        return Encoded(self.encoding.ring.residues(self.integers(update, prg)), 0)

    def integers(self, update: Tensor, prg: Prg) -> NDArray[np.int64]:
        """A client's clipped, rounded and noised update, int64 of shape ``(size,)``; not reduced yet.

        Args:
            update: real, shape ``(size,)``.
            prg: fresh for every round, or derived for it alone.

        Raises:
            InputError: the shape does not fit.
            RangeError: an entry is not finite.
        """
        result = self.rounded(clip(update, self.clip), prg)
        add_noise_(result, self.share, prg)
        return result

    def rounded(self, update: Tensor, prg: Prg) -> NDArray[np.int64]:
        """A clipped update in steps of the grid, without noise: of Euclidean norm at most `bound`.

        Raises:
            InputError: the shape does not fit.
            RangeError: an entry is not finite.
        """
        while True:
            # At most 2.6 times on average, whatever the update.
            integers, _ = self._quiet.integers(update, (), prg)
            if int(np.dot(integers, integers)) <= self.bound**2:
                return integers

    @cached_property
    def _quiet(self) -> Encoding:
        return Encoding(self.size, self.clip, self.clients, self.bits)

    @property
    def _norm(self) -> float:
        return self.clip * self._quiet.scale


def calibrated(target_epsilon: float, delta: float, rounds: int, shares: Callable[[float], NoiseShares]) -> NoiseShares:
    """The shares with the least noise at which ``rounds`` sums of the fewest clients stay within a target.

    Args:
        target_epsilon: ε for all rounds together.
        delta: δ.
        rounds: how many sums are opened.
        shares: what they are like with a given noise multiplier.

    Raises:
        InputError: only absurd noise reaches the target, a setting is out of range, or the noise does not fit the grid.
    """
    Budget(target_epsilon, delta)

    def spent(noise: float) -> float:
        tried = shares(noise)
        return privacy_spent([tried.event(tried.fewest, rounds)], delta)

    return shares(least_noise(spent, target_epsilon))
