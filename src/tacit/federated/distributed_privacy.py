"""Differential privacy of clients that nobody has to be trusted with: the noise is in the sum before anyone sees it.

`tacit.federated.secure_sum.noise_shares` says whose noise it is, and which papers it follows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from tacit.errors import InputError, TooFewUpdates
from tacit.federated.algorithm import ServerState, Update
from tacit.federated.client_privacy import ClientPrivacy
from tacit.federated.local.dp_sgd import seeded
from tacit.federated.mean import weighted_mean
from tacit.federated.secure_sum.noise_shares import NoiseShares
from tacit.ring.prg import Prg


@dataclass(frozen=True)
class DistributedPrivacy(ClientPrivacy):
    """An algorithm made differentially private by noise in shares; it has to be run by a secure sum.

    In round t, with n clients who finish::

        client:  y_k ← s · clip(Δ_k of the inner algorithm, S), rounded, with its share of the noise if clients add it
        sum:     Σ_k y_k, with the servers' noise if they add it
        server:  Δ ← Σ_k y_k / (s n),  then the inner algorithm's server step with Δ

    How many finish is public, so the sum may be divided by it. A round that fails reveals nothing and costs nothing.

    *Guarantees*: each global model costs `NoiseShares.event` of those who finished. The server hears of nothing else:
    not of losses, numbers of examples or buffers.

    Args:
        inner: see `ClientPrivacy`.
        clip: S.
        shares: the noise, and how updates are encoded, for a cohort of the fewest clients.
        noise_seed: in [0, 2^128), for experiments that are to be repeated only; ``None`` takes fresh noise from the
            operating system, as privacy demands.

    Raises:
        InputError: a setting is out of range, or the inner algorithm does not average.
    """

    shares: NoiseShares
    noise_seed: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip != self.shares.clip:
            raise InputError(f"clip={self.clip}, but the noise is for updates clipped to {self.shares.clip}")
        if self.noise_seed is not None:
            seeded(self.noise_seed)

    def shares_among(self, clients: int) -> NoiseShares:
        """The noise of a cohort of ``clients``.

        Raises:
            TooFewUpdates: the noise was provisioned for more.
        """
        if clients < self.shares.fewest:
            raise TooFewUpdates(
                f"a cohort of {clients} clients, and the noise is provisioned for {self.shares.fewest}: no sum"
            )
        return replace(self.shares, clients=clients)

    def randomness(self, round: int, party: str | int) -> Prg:
        """Where a party's rounding and noise of a round come from."""
        return Prg.fresh() if self.noise_seed is None else seeded(self.noise_seed).derive(f"noise of {party}", round)

    def combine(self, updates: Iterable[Update]) -> Update:
        """The mean that a secure sum has made.

        Raises:
            InputError: these are clients' own updates, without noise.
        """
        mean = weighted_mean(updates)
        if mean.examples:
            raise InputError("these updates carry no noise: under distributed privacy only a secure sum combines them")
        return mean

    def server_update(self, state: ServerState, mean: Update) -> ServerState:
        """See `Algorithm`; the buffers stay as they are."""
        return self.inner.server_update(state, replace(mean, buffers=state.buffers))
