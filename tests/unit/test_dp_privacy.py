"""Privacy as a setting of a run: what is charged to whom, when a run stops, how much noise a target needs."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from tacit.dp.accounting import SampledGaussian, noise_for, privacy_spent
from tacit.dp.ledger import Ledger
from tacit.errors import BudgetExceeded, InputError
from tacit.federated.central_privacy import CentralPrivacy
from tacit.federated.compression import Compressed
from tacit.federated.compression_schemes import Float16
from tacit.federated.ditto import Ditto
from tacit.federated.fedavg import FedAvg
from tacit.federated.local.dp_sgd import DpSgdSolver
from tacit.federated.privacy import CentralDP, Plan, PrivacySpent, RecordDP
from tacit.federated.scaffold import Scaffold

DELTA = 1e-5


def plan(sizes=(60, 60, 20), rounds=10, cohort=2.0, rate=None):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    return Plan(model, functional.cross_entropy, torch.tensor(sizes), rounds, cohort, rate)


def test_a_round_is_charged_before_it_runs_and_reported_after():
    ledger = Ledger()
    private = CentralDP(clip=0.5, delta=DELTA, noise_multiplier=1.2).start(FedAvg(), plan(rate=0.1), ledger)
    assert isinstance(private.algorithm, CentralPrivacy)
    assert private.solver is None
    assert private.spent() == PrivacySpent(0.0, DELTA, "client")
    for number in (1, 2, 3):
        assert private.spend(number, [0, 1]) == {}
    assert ledger.events("central") == (SampledGaussian(1.2, 0.1, 3),)
    assert private.spent().epsilon == privacy_spent([SampledGaussian(1.2, 0.1, 3)], DELTA)


def test_a_cohort_of_fixed_size_claims_no_amplification():
    ledger = Ledger()
    CentralDP(clip=0.5, delta=DELTA, noise_multiplier=1.2).start(FedAvg(), plan(rate=None), ledger).spend(1, [0])
    assert ledger.events("central") == (SampledGaussian(1.2, 1.0, 1),)


def test_a_target_finds_the_noise_and_is_the_budget():
    for rate in (None, 0.05):
        private = CentralDP(clip=0.5, delta=DELTA, target_epsilon=3.0).start(FedAvg(), plan(rate=rate), Ledger())
        assert private.algorithm.noise_multiplier == noise_for(3.0, DELTA, 10, rate or 1.0)
        for number in range(1, 11):
            private.spend(number, [0, 1])
        assert 2.99 < private.spent().epsilon <= 3.0
        with pytest.raises(BudgetExceeded, match="round 11"):
            private.spend(11, [0, 1])
        assert private.spent().epsilon <= 3.0


def test_a_run_that_goes_on_finds_what_it_has_spent(tmp_path):
    settings = CentralDP(clip=0.5, delta=DELTA, noise_multiplier=1.0, budget=10.0, noise_seed=1)
    first = settings.start(FedAvg(), plan(), Ledger(tmp_path / "privacy.sqlite"))
    first.spend(1, [0])
    first.spend(2, [0])
    again = settings.start(FedAvg(), plan(), Ledger(tmp_path / "privacy.sqlite"))
    # With noise from a seed the round that was interrupted releases the same once more.
    again.spend(2, [0])
    spent = again.spent()
    assert spent == first.spent()
    fresh = CentralDP(clip=0.5, delta=DELTA, noise_multiplier=1.0, budget=10.0)
    resumed = fresh.start(FedAvg(), plan(), Ledger(tmp_path / "privacy.sqlite"))
    resumed.spend(2, [0])
    assert resumed.spent().epsilon > spent.epsilon


def test_every_client_has_an_account_of_its_own():
    ledger = Ledger()
    settings = RecordDP(clip=1.0, delta=DELTA, noise_multiplier=1.1)
    private = settings.start(FedAvg(batch_size=10, epochs=2), plan(), ledger)
    assert isinstance(private.solver, DpSgdSolver)
    assert private.spent() == PrivacySpent(0.0, DELTA, "example")
    private.spend(1, [0, 2])
    private.spend(2, [0])
    assert ledger.events("client 0") == (SampledGaussian(1.1, 1 / 6, 24),)
    assert ledger.events("client 1") == ()
    assert ledger.events("client 2") == (SampledGaussian(1.1, 1 / 2, 4),)
    worst = max(privacy_spent(ledger.events(f"client {k}"), DELTA) for k in (0, 2))
    assert private.spent().epsilon == worst > 0
    again = settings.start(FedAvg(batch_size=10, epochs=2), plan(), ledger)
    assert again.spent() == private.spent()


@pytest.mark.parametrize(
    ("algorithm", "steps"),
    [(Compressed(FedAvg(batch_size=20), Float16()), 3), (Scaffold(batch_size=20), 3), (FedAvg(batch_size=None), 1)],
)
def test_what_is_charged_is_what_the_algorithm_asks_of_a_client(algorithm, steps):
    ledger = Ledger()
    RecordDP(clip=1.0, delta=DELTA, noise_multiplier=1.0).start(algorithm, plan(), ledger).spend(1, [0])
    assert ledger.events("client 0") == (SampledGaussian(1.0, 1.0 if steps == 1 else 1 / 3, steps),)


def test_an_algorithm_that_trains_twice_is_charged_twice():
    ledger, algorithm = Ledger(), Ditto(batch_size=20)
    RecordDP(clip=1.0, delta=DELTA, noise_multiplier=1.0).start(algorithm, plan(), ledger).spend(1, [0])
    assert sum(event.times for event in ledger.events("client 0")) == 6


def test_a_client_without_budget_is_left_out_and_the_run_stops_when_none_is_left():
    one_round = [SampledGaussian(1.0, 1 / 6, 6)]
    budget = privacy_spent(one_round * 2, DELTA)
    settings = RecordDP(clip=1.0, delta=DELTA, noise_multiplier=1.0, budget=budget)
    private = settings.start(FedAvg(batch_size=10), plan(sizes=(60, 60, 60)), Ledger())
    assert private.spend(1, [0, 1]) == {}
    assert private.spend(2, [0]) == {}
    assert private.spend(3, [0, 1]) == {0: "its privacy budget is spent"}
    with pytest.raises(BudgetExceeded, match="round 4"):
        private.spend(4, [0, 1])
    assert private.spent().epsilon == pytest.approx(budget)
    assert private.spend(5, [2]) == {}
    assert private.spend(6, []) == {}


def test_a_target_of_examples_holds_for_clients_of_every_size():
    sizes = (15, 60, 200, 7)
    for participations in (None, 3):
        settings = RecordDP(clip=1.0, delta=DELTA, target_epsilon=4.0, participations=participations)
        ledger = Ledger()
        private = settings.start(FedAvg(batch_size=10), plan(sizes=sizes, rounds=6), ledger)
        for number in range(1, (participations or 6) + 1):
            assert private.spend(number, range(4)) == {}
        epsilons = [ledger.epsilon(f"client {k}", DELTA) for k in range(4)]
        assert 3.99 < max(epsilons) <= 4.0
        assert private.spent().epsilon == max(epsilons)
        assert private.spend(7, range(4)).keys() >= {epsilons.index(max(epsilons))} if participations else True


@pytest.mark.parametrize("kind", [CentralDP, RecordDP])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either noise_multiplier"),
        ({"noise_multiplier": 1.0, "target_epsilon": 1.0}, "either noise_multiplier"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"target_epsilon": 0.0}, "epsilon=0.0"),
        ({"target_epsilon": math.nan}, "epsilon=nan"),
        ({"noise_multiplier": 1.0, "budget": 0.0}, "epsilon=0.0"),
        ({"noise_multiplier": 1.0, "delta": 0.0}, "delta=0.0"),
        ({"noise_multiplier": 1.0, "accountant": "moments"}, "accountant='moments'"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(kind, settings, message):
    with pytest.raises(InputError, match=message):
        kind(**{"clip": 1.0, "delta": DELTA, **settings})
    with pytest.raises(InputError, match="participations=0"):
        RecordDP(clip=1.0, delta=DELTA, noise_multiplier=1.0, participations=0)
