"""Differential privacy as a setting of a federated run: whose privacy, how much noise, how much may be spent.

What a run asks of it, in this order::

    private = privacy.start(model, algorithm, sizes=…, rounds=…, expected_cohort=…, sampling_rate=…, …)
    train with private.algorithm, and with private.solver where there is one
    each round:  refused = private.spend(round, cohort)     # before anything is trained; may raise BudgetExceeded
                 …                                          # a round without any update is combined and applied too
                 private.opening(round, finished)           # before a secure sum is opened
                 private.spent()                            # for the record
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from tacit.data.examples import Examples
from tacit.dp.accounting import Accountant, Budget, SampledGaussian, noise_for, privacy_spent
from tacit.dp.clipping import AdaptiveClipping
from tacit.dp.ledger import Ledger, Limit
from tacit.errors import BudgetExceeded, InputError
from tacit.federated.algorithm import Algorithm
from tacit.federated.central_privacy import CentralPrivacy
from tacit.federated.layout import Layout
from tacit.federated.local.dp_sgd import DpSgdSolver, local_event
from tacit.federated.local.work import LocalResult, LocalSolver, LocalWork, Loss
from tacit.federated.secure_sum.mean import SecureMean


@dataclass(frozen=True)
class PrivacySpent:
    """What a run has cost: (ε, δ)-differential privacy of each ``unit``, ``"client"`` or ``"example"``."""

    epsilon: float
    delta: float
    unit: str


@dataclass(frozen=True)
class Plan:
    """What a run is going to do, as far as privacy depends on it.

    Args:
        model: the architecture, with any weights.
        loss: mean loss of a batch.
        sizes: how many examples each client has, int64 of shape ``(N,)``.
        rounds: communication rounds, at most.
        expected_cohort: how many clients' updates a round is expected to have.
        sampling_rate: the probability with which each client takes part, independently of every other; ``None`` if
            cohorts are of fixed size, or a round closes when enough clients are done.
        name: of the run, where several share a ledger.
        secure_mean: how updates are summed without anybody seeing one; ``None`` if they are not.
    """

    model: nn.Module
    loss: Loss
    sizes: Tensor
    rounds: int
    expected_cohort: float
    sampling_rate: float | None = None
    name: str = "run"
    secure_mean: SecureMean | None = None


class PrivateTraining(Protocol):
    """A run under differential privacy."""

    @property
    def algorithm(self) -> Algorithm:
        """What to run in place of the caller's algorithm."""
        ...

    @property
    def solver(self) -> LocalSolver | None:
        """What clients have to train with; ``None`` leaves the choice."""
        ...

    def spend(self, round: int, cohort: Sequence[int]) -> Mapping[int, str]:
        """Write down what a round costs before it starts.

        Args:
            round: its number, from 1.
            cohort: the clients that are going to train.

        Returns:
            The clients that must not take part, and why.

        Raises:
            BudgetExceeded: the round must not be run.
            DataError: the ledger is damaged.
        """
        ...

    def opening(self, round: int, finished: int) -> None:
        """Write down what depends on how many clients finished, before the secure sum of their updates is opened.

        Raises:
            BudgetExceeded: the sum must not be opened.
            DataError: the ledger is damaged.
        """
        ...

    def spent(self) -> PrivacySpent:
        """What has been spent in all; of examples, at the client with the largest ε."""
        ...


class Privacy(Protocol):
    """A setting that can be given to a run."""

    def start(self, algorithm: Algorithm, plan: Plan, ledger: Ledger) -> PrivateTraining:
        """Begin, or go on with, a run whose spending is written to ``ledger``.

        Raises:
            InputError: the algorithm, the model or the plan does not allow it.
        """
        ...


@dataclass(frozen=True)
class PrivacySettings:
    """What all kinds of differential privacy are told: how much noise there is, and how much may be spent.

    Args:
        clip: S, the bound on what one of those who are protected can send.
        delta: δ, well below one over the number of those who are protected.
        noise_multiplier: z, the noise's standard deviation over S.
        target_epsilon: find the least z with which all rounds of the run together stay within this ε; in place of
            ``noise_multiplier``, and the budget unless another is given.
        budget: stop before a round that would take an ε of the ledger over this.
        accountant: ``"rdp"``, or ``"pld"``: tighter and slower.
        noise_seed: for experiments that are to be repeated only; ``None`` is real privacy.

    Raises:
        InputError: a setting is out of range, or not exactly one of noise and target is given.
    """

    clip: float
    delta: float
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    budget: float | None = None
    accountant: Accountant = field(default="rdp", kw_only=True)
    noise_seed: int | None = field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise InputError("give either noise_multiplier=, how much noise, or target_epsilon=, what it has to reach")
        if self.noise_multiplier is not None:
            SampledGaussian(self.noise_multiplier)
        privacy_spent([], self.delta, self.accountant)
        _ = self.limit
        if self.target_epsilon is not None:
            Budget(self.target_epsilon, self.delta)

    @property
    def limit(self) -> Limit | None:
        """What a ledger is held to."""
        epsilon = self.target_epsilon if self.budget is None else self.budget
        return None if epsilon is None else Limit(Budget(epsilon, self.delta), self.accountant)


@dataclass(frozen=True)
class CentralDP(PrivacySettings):
    """Differential privacy of whole clients: the server clips, adds noise, and is trusted with the updates.

    See `tacit.federated.central_privacy.CentralPrivacy` for what is computed, and `PrivacySettings` for the other
    arguments; ``clip`` is the greatest norm of a client's update, and the first one if it adapts.

    Args:
        adaptive: let the bound follow a quantile of the norms.
        subject: whose account in the ledger is charged.
    """

    adaptive: AdaptiveClipping | None = None
    subject: str = "central"

    def start(self, algorithm: Algorithm, plan: Plan, ledger: Ledger) -> PrivateTraining:
        """See `Privacy`."""
        rate = plan.sampling_rate or 1.0
        noise = self.noise_multiplier
        if noise is None:
            noise = noise_for(self.target_epsilon or 0.0, self.delta, plan.rounds, rate, self.accountant)
        private = CentralPrivacy(
            algorithm, self.clip, noise, plan.expected_cohort, adaptive=self.adaptive, noise_seed=self.noise_seed
        )
        return _CentralTraining(self, private, SampledGaussian(noise, rate), plan.name, ledger)


@dataclass(frozen=True)
class _CentralTraining:
    settings: CentralDP
    algorithm: CentralPrivacy
    event: SampledGaussian
    name: str
    ledger: Ledger

    @property
    def solver(self) -> None:
        """Clients train as they like: their update is clipped as a whole."""
        return None

    def spend(self, round: int, cohort: Sequence[int]) -> Mapping[int, str]:
        """See `PrivateTraining`; a round costs the same whoever is in it."""
        s = self.settings
        self.ledger.spend(s.subject, self.event, label(self.name, round), s.limit, repeatable=s.noise_seed is not None)
        return {}

    def opening(self, round: int, finished: int) -> None:
        """Nothing is left to write down."""

    def spent(self) -> PrivacySpent:
        """See `PrivateTraining`."""
        s = self.settings
        return PrivacySpent(self.ledger.epsilon(s.subject, s.delta, s.accountant), s.delta, "client")


@dataclass(frozen=True)
class RecordDP(PrivacySettings):
    """Differential privacy of single examples: every client clips and adds noise itself, and need not trust the server.

    See `tacit.federated.local.dp_sgd.DpSgdSolver` for what is computed, and `PrivacySettings` for the other arguments;
    ``clip`` is the greatest norm of one example's gradient. Each client has an account of its own in the ledger, and is
    left out of further rounds when it is empty; when no client of a round is left, the run stops.

    Args:
        participations: in how many rounds a client is to take part at most, for ``target_epsilon``; ``None`` is all of
            them.

    Raises:
        InputError: a setting is out of range, or not exactly one of noise and target is given.
    """

    participations: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.participations is not None and self.participations < 1:
            raise InputError(f"participations={self.participations}: give 1 round or more, or None for all")

    def start(self, algorithm: Algorithm, plan: Plan, ledger: Ledger) -> PrivateTraining:
        """See `Privacy`."""
        work = _Rehearsal(algorithm, plan)
        noise = self.noise_multiplier
        if noise is None:
            noise = self._calibrated(work, plan)
        solver = DpSgdSolver(plan.model, plan.loss, clip=self.clip, noise_multiplier=noise, noise_seed=self.noise_seed)
        return _RecordTraining(self, algorithm, solver, noise, work, plan, ledger)

    def _calibrated(self, work: _Rehearsal, plan: Plan) -> float:
        """The largest of the noise multipliers that the clients need."""
        target, times = self.target_epsilon or 0.0, min(self.participations or plan.rounds, plan.rounds)
        noise = 0.0
        for size in sorted(set(plan.sizes[plan.sizes > 0].tolist())):
            events = work.events(size, noise or 1.0)
            if noise and privacy_spent(events * times, self.delta, self.accountant) <= target:
                continue
            # Of several trainings a round, each is held to a share of ε by the most sampled and the sum of their steps.
            rate, steps = max(event.sampling_rate for event in events), sum(event.times for event in events)
            noise = noise_for(target, self.delta, steps * times, rate, self.accountant)
        return noise


class _RecordTraining:
    def __init__(
        self,
        settings: RecordDP,
        algorithm: Algorithm,
        solver: DpSgdSolver,
        noise: float,
        work: _Rehearsal,
        plan: Plan,
        ledger: Ledger,
    ) -> None:
        self.algorithm = algorithm
        self.solver: LocalSolver | None = solver
        self._settings = settings
        self._noise = noise
        self._work = work
        self._sizes = plan.sizes
        self._name = plan.name
        self._ledger = ledger
        self._epsilon = max((self._spent_by(subject) for subject in self._subjects()), default=0.0)

    def spend(self, round: int, cohort: Sequence[int]) -> Mapping[int, str]:
        """See `PrivateTraining`."""
        s, limit, name = self._settings, self._settings.limit, label(self._name, round)
        events = {_account(client): self._work.events(int(self._sizes[client]), self._noise) for client in cohort}
        refused = set(self._ledger.spend_each(events, name, limit, repeatable=s.noise_seed is not None))
        if cohort and len(refused) == len(events) and limit is not None:
            raise BudgetExceeded(
                f"{name}: another round would take every client of the cohort over its privacy budget of ε = "
                f"{limit.budget.epsilon:g} at δ = {limit.budget.delta:g}: stop here, or decide on a larger budget"
            )
        spent = (self._spent_by(subject) for subject in events if subject not in refused)
        self._epsilon = max([self._epsilon, *spent])
        return {client: "its privacy budget is spent" for client in cohort if _account(client) in refused}

    def opening(self, round: int, finished: int) -> None:
        """Nothing is left to write down: the clients' noise is in what they send."""

    def spent(self) -> PrivacySpent:
        """See `PrivateTraining`."""
        return PrivacySpent(self._epsilon, self._settings.delta, "example")

    def _spent_by(self, subject: str) -> float:
        return privacy_spent(self._ledger.events(subject), self._settings.delta, self._settings.accountant)

    def _subjects(self) -> Sequence[str]:
        known = set(self._ledger.subjects)
        return [account for account in map(_account, range(len(self._sizes))) if account in known]


class _Rehearsal:
    """What an algorithm has its clients train in a round, found by letting it ask a solver that only takes note."""

    def __init__(self, algorithm: Algorithm, plan: Plan) -> None:
        self.layout = Layout.of(plan.model)
        self._algorithm = algorithm
        self._state = algorithm.init(plan.model, len(plan.sizes))
        self._asked: list[tuple[int, int | None, int]] = []
        self._works: dict[int, list[tuple[int, int | None, int]]] = {}

    def __call__(self, work: LocalWork) -> LocalResult:
        """See `LocalSolver`."""
        self._asked.append((len(work.examples), work.batch_size, work.epochs))
        buffers = {name: buffer.clone() for name, buffer in work.buffers.items()}
        return LocalResult(work.parameters.clone(), buffers, 0.0, 1)

    def events(self, size: int, noise_multiplier: float) -> list[SampledGaussian]:
        """What a round costs a client with ``size`` examples."""
        if size not in self._works:
            self._asked = []
            # There is nothing in the examples but their number: an algorithm that looks at them elsewhere fails here.
            examples = Examples(torch.empty(size, 0), torch.empty(size, 0))
            self._algorithm.client_update(self._state, {}, self, examples, torch.Generator().manual_seed(0))
            self._works[size] = self._asked
        return [local_event(*work, noise_multiplier) for work in self._works[size]]


def label(run: str, round: int) -> str:
    """What a ledger calls a round."""
    return f"{run}, round {round}"


def _account(client: int) -> str:
    return f"client {client}"
