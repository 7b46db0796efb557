"""Integer noise in shares: no party of a secure sum knows enough of it to see the sum without noise.

Every client of a masked sum adds a share before it masks (Kairouz, Liu and Steinke 2021, *The Distributed Discrete
Gaussian Mechanism for Federated Learning with Secure Aggregation*, algorithm 1; Agarwal, Kairouz and Liu 2021 for
Skellam noise in its place). For an update Δ_k, with s steps of the grid in 1::

    client:  y ← s · clip(Δ_k, S); round y at random until ‖y‖ ≤ B; send y + a share of integer noise, masked
    server:  sum of those who finished, over s and their number

The noise is provisioned for a number of clients that is sure to finish. Every further one adds to it, and every missing
one takes from it: `NoiseShares.event` says what a sum really costs, from who really finished.

Of a shared sum alice and bob add the noise, each to its own share of the sum and each as much as is needed alone: what
either knows is its own, so that against it the other's remains. Clients that drop out, or lie, take nothing from it.
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
from tacit.dp.discrete import LARGEST_VARIANCE, DiscreteGaussian, Skellam, add_noise_, draw, magnitude
from tacit.dp.distributed import DiscreteGaussianSum, SkellamSum, summed_norm
from tacit.errors import InputError
from tacit.federated.secure_sum.bounded import BoundedEncoding
from tacit.federated.secure_sum.encoding import Encoding
from tacit.federated.secure_sum.ring import Words
from tacit.ring.prg import Prg

Noise = Literal["skellam", "discrete-gaussian"]
AddedBy = Literal["clients", "servers"]
SERVERS = 2
"""alice and bob."""

OVERFLOW = 2.0**-60
"""With at most that probability the noise of a round takes some entry of the sum out of the ring."""


@dataclass(frozen=True)
class NoiseShares:
    """How the parties of a round make a private sum together.

    Every client weighs the same, and nothing but the update is in the vector: a weight or a loss beside it would be
    covered by no noise.

    *Guarantees*: the sum that is opened costs `event`, against everyone who knows no more than ``colluding`` of the
    clients' shares, or no more than one server's. That holds for any update, NaN and infinity being refused, because
    the norm is bounded after rounding, in integers. A party that leaves out its share counts as one that colludes. No
    amplification by sampling is claimed: whoever invites the cohort knows it, and how many finish is public.

    Args:
        size: D, entries of an update.
        clip: S, the greatest Euclidean norm of an update.
        clients: the most whose vectors are summed.
        fewest: the fewest whose sum may be opened; clients' noise is provisioned for them.
        noise_multiplier: z, over S the standard deviation of the noise in the sum that nobody knows, when that many
            finish.
        colluding: of those who finish, how many may tell their shares to whoever looks at the sum; clients' noise is
            provisioned without theirs.
        noise: ``"skellam"``, or ``"discrete-gaussian"``, whose shares have to have a variance of ¼ steps or more.
        bits: q, bits of one client's entry, sign included.
        added_by: ``"clients"``, each of whom adds a share, or ``"servers"``, each of which adds all that is needed.
        verified: see `BoundedEncoding`.

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
    added_by: AddedBy = "clients"
    verified: bool = False

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
        for name, value, known in (("noise", self.noise, Noise), ("added_by", self.added_by, AddedBy)):
            if value not in get_args(known):
                raise InputError(f"{name}={value!r}: choose one of {', '.join(get_args(known))}")
        if self.share.variance > LARGEST_VARIANCE:
            raise InputError(
                f"bits={self.bits}: the noise has a variance of {self.share.variance:.3g} steps of that grid, and is "
                f"drawn up to {LARGEST_VARIANCE:.3g}: choose fewer bits, which the noise covers as well"
            )
        self.event(self.fewest)
        _ = self.encoding

    @cached_property
    def bounded(self) -> BoundedEncoding:
        """How updates become integers, before any noise."""
        return BoundedEncoding(self.size, self.clip, self.clients, self.bits, self.verified)

    @cached_property
    def encoding(self) -> Encoding:
        """How sums are encoded, with headroom for all the noise there may be.

        Headroom is what each client's share may take of the ring on average: it is the sum that must not wrap, and its
        noise is far smaller than so many times the largest share.
        """
        adding = self.clients if self.added_by == "clients" else SERVERS
        total = type(self.share)(adding * self.share.variance)
        headroom = -(-magnitude(total, self.size, OVERFLOW) // self.clients)
        return replace(self.bounded.encoding, headroom=headroom)

    @cached_property
    def share(self) -> Skellam | DiscreteGaussian:
        """The noise that each client, or each server, adds to every entry."""
        std = self.noise_multiplier * self.bounded.norm
        variance = std**2 / self._unknown(self.fewest)
        return Skellam(variance) if self.noise == "skellam" else DiscreteGaussian(variance)

    @property
    def bound(self) -> float:
        """B, the greatest Euclidean norm of a client's integers before noise."""
        return self.bounded.bound

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
        shares, variance, l2 = self._unknown(finished), self.share.variance, self.bound
        if isinstance(self.share, DiscreteGaussian):
            return DiscreteGaussianSum(variance, shares, self.size, l2, times=times)
        return SkellamSum(shares * variance, l2, summed_norm(l2, self.size), times=times)

    def encode(self, update: Tensor, prg: Prg) -> Words:
        """A client's residues, ready to be masked or shared; see `integers`."""
        return self.encoding.ring.residues(self.integers(update, prg))

    def integers(self, update: Tensor, prg: Prg) -> NDArray[np.int64]:
        """A client's clipped and rounded update, with its noise if clients add any; int64 of shape ``(size,)``.

        Args:
            update: real, shape ``(size,)``.
            prg: fresh for every round, or derived for it alone.

        Raises:
            InputError: the shape does not fit.
            RangeError: an entry is not finite.
        """
        result = self.bounded.integers(update, prg)
        if self.added_by == "clients":
            add_noise_(result, self.share, prg)
        return result

    def server_noise(self, prg: Prg) -> NDArray[np.int64]:
        """What one of the two servers adds to its share of the sum, if servers add any: int64 of shape ``(size,)``.

        Args:
            prg: this server's own, fresh for every round, or derived for it alone.

        Raises:
            InputError: the clients add the noise.
        """
        if self.added_by != "servers":
            raise InputError("the clients of this sum have added its noise: servers add none")
        return draw(self.share, self.size, prg)

    def _unknown(self, finished: int) -> int:
        """How many shares nobody knows who may look at the sum, at least."""
        return finished - self.colluding if self.added_by == "clients" else SERVERS - 1


def fitting_bits(bits: int, noise_multiplier: float, unknown: int) -> int:
    """The most bits of an entry, up to ``bits``, whose grid is coarse enough for noise of ``unknown`` shares."""
    largest = math.sqrt(LARGEST_VARIANCE * unknown) / noise_multiplier
    return max(2, min(bits, int(math.log2(largest + 1)) + 1))


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
