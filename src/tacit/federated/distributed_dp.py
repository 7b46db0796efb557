"""Distributed differential privacy as a setting of a federated run: nobody sees a sum without noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tacit.dp.ledger import Ledger
from tacit.errors import InputError
from tacit.federated.algorithm import Algorithm
from tacit.federated.distributed_privacy import DistributedPrivacy
from tacit.federated.privacy import Plan, PrivacySettings, PrivacySpent, PrivateTraining, label
from tacit.federated.secure_sum.noise_shares import Noise, NoiseShares, calibrated, fitting_bits


@dataclass(frozen=True)
class DistributedDP(PrivacySettings):
    """Differential privacy of whole clients, who need not trust the server: the noise is in the sum that it sees.

    It takes a secure sum. Of a masked one every client adds a share of the noise; it is provisioned for the fewest
    clients whose sum may be opened, so that drop-outs up to there leave enough, and what a round is charged is what
    those who finished have made of it. Of a shared one alice and bob each add all that is needed.

    See `tacit.federated.distributed_privacy.DistributedPrivacy` for what is computed, and `PrivacySettings` for the
    other arguments; ``clip`` is the greatest norm of a client's update.

    Args:
        noise: ``"skellam"``, whose shares add up to the same, or ``"discrete-gaussian"``.
        colluding: how many clients may tell others their shares of the noise; 1 protects from any single one. Alice's
            and bob's noise is unknown to all clients anyway.
        subject: whose account in the ledger is charged.

    Raises:
        InputError: a setting is out of range, or not exactly one of noise and target is given.
    """

    noise: Noise = "skellam"
    colluding: int = 1
    subject: str = "distributed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_multiplier == 0:
            raise InputError("noise_multiplier=0.0: that is no privacy: leave it out, and sum securely without noise")
        if self.accountant != "rdp":
            raise InputError(f"accountant={self.accountant!r} does not know sums with integer noise: choose 'rdp'")

    def start(self, algorithm: Algorithm, plan: Plan, ledger: Ledger) -> PrivateTraining:
        """See `tacit.federated.privacy.Privacy`."""
        secure_mean = plan.secure_mean
        if secure_mean is None:
            raise InputError(
                "distributed privacy puts noise into a sum that nobody sees without it: give secure_sum='masked' or "
                "'shared'; where the server is trusted with updates, use CentralDP"
            )
        size, fewest = algorithm.init(plan.model, len(plan.sizes)).layout.size, secure_mean.protocol.minimum
        if fewest > math.ceil(plan.expected_cohort):
            raise InputError(
                f"the secure sum asks for {fewest} updates, and {plan.expected_cohort:g} clients are expected in a "
                "round: larger cohorts, or a lower minimum"
            )

        by_clients = secure_mean.noised_by == "clients"
        colluding = self.colluding if by_clients else 0

        def shares(noise_multiplier: float) -> NoiseShares:
            return NoiseShares(
                size,
                self.clip,
                fewest,
                fewest,
                noise_multiplier,
                colluding,
                self.noise,
                fitting_bits(secure_mean.bits, noise_multiplier, max(1, fewest - colluding) if by_clients else 1),
                secure_mean.noised_by,
                secure_mean.verified,
            )

        if self.noise_multiplier is not None:
            chosen = shares(self.noise_multiplier)
        else:
            chosen = calibrated(self.target_epsilon or 0.0, self.delta, plan.rounds, shares)
        private = DistributedPrivacy(algorithm, self.clip, chosen, self.noise_seed)
        # So that a cohort whose sum could overflow is refused before anything is trained.
        private.shares_among(math.ceil(plan.expected_cohort))
        return _DistributedTraining(self, private, plan.name, ledger)


@dataclass(frozen=True)
class _DistributedTraining:
    settings: DistributedDP
    algorithm: DistributedPrivacy
    name: str
    ledger: Ledger

    @property
    def solver(self) -> None:
        """Clients train as they like: their update is clipped as a whole."""
        return None

    def spend(self, round: int, cohort: Sequence[int]) -> Mapping[int, str]:
        """Nothing yet, but a round is not begun whose dearest outcome would exceed the budget."""
        s, shares = self.settings, self.algorithm.shares
        dearest = shares.event(shares.fewest)
        self.ledger.afford(s.subject, dearest, label(self.name, round), s.limit, repeatable=s.noise_seed is not None)
        return {}

    def opening(self, round: int, finished: int) -> None:
        """See `PrivateTraining`: what the sum costs depends on how many shares of noise are in it."""
        s = self.settings
        event = self.algorithm.shares_among(finished).event(finished)
        self.ledger.spend(s.subject, event, label(self.name, round), s.limit, repeatable=s.noise_seed is not None)

    def spent(self) -> PrivacySpent:
        """See `PrivateTraining`."""
        s = self.settings
        return PrivacySpent(self.ledger.epsilon(s.subject, s.delta, s.accountant), s.delta, "client")
