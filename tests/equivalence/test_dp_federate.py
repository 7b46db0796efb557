"""Whole runs under differential privacy: what the history says, what repeats, and what stops them."""

import pytest
import torch
from torch import nn

from tacit.data.examples import Examples
from tacit.dp.accounting import SampledGaussian, privacy_spent
from tacit.dp.ledger import Ledger
from tacit.errors import BudgetExceeded
from tacit.federated.fedavg import FedAvg
from tacit.federated.privacy import CentralDP, RecordDP
from tacit.federated.selection import Poisson
from tacit.runtimes.simulation import federate

DELTA = 1e-4


def two_classes(count, seed):
    """Two clouds, mirror images of each other."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(2, (count,), generator=generator)
    inputs = torch.randn(count, 5, generator=generator) + 2 * (2 * targets[:, None] - 1)
    return Examples(inputs, targets)


CLIENTS = [two_classes(40, seed) for seed in range(30)]
TEST = two_classes(500, 99)


def run(privacy, *, rounds=8, rate=0.4, ledger=None, clients=CLIENTS, test=TEST):
    return federate(
        nn.Linear(5, 2),
        clients,
        algorithm=FedAvg(lr=0.5, batch_size=20),
        rounds=rounds,
        selection=Poisson(rate),
        privacy=privacy,
        ledger=ledger,
        test=test,
    )


def weights(result):
    return torch.cat([parameter.flatten() for parameter in result.model.parameters()])


@pytest.mark.parametrize("kind", [CentralDP, RecordDP])
def test_a_private_model_learns_and_the_history_says_what_it_cost(kind):
    ledger = Ledger()
    result = run(kind(clip=1.0, delta=DELTA, target_epsilon=8.0, noise_seed=1), ledger=ledger)
    epsilons = [record.epsilon for record in result.history]
    assert epsilons == sorted(epsilons)
    assert 0 < epsilons[0] < epsilons[-1] <= 8.0
    assert result.privacy_spent.epsilon == epsilons[-1]
    assert result.history[-1].accuracy > 0.9
    worst = max(privacy_spent(ledger.events(subject), DELTA) for subject in ledger.subjects)
    assert worst == epsilons[-1]


@pytest.mark.parametrize("kind", [CentralDP, RecordDP])
def test_only_a_seed_repeats_a_run(kind):
    def trained(noise_seed):
        return weights(run(kind(clip=1.0, delta=DELTA, noise_multiplier=1.0, noise_seed=noise_seed), rounds=2))

    assert torch.equal(trained(5), trained(5))
    assert not (trained(5) == trained(6)).any()
    assert not torch.equal(trained(None), trained(None))


def test_rounds_without_a_client_release_noise_and_are_charged():
    ledger = Ledger()
    # Every other label is wrong, so that no weights, however large the noise makes them, have a loss of exactly zero.
    half_wrong = Examples(TEST.inputs, torch.where(torch.arange(500) % 2 == 0, TEST.targets, 1 - TEST.targets))
    settings = CentralDP(clip=1.0, delta=DELTA, noise_multiplier=1.0)
    result = run(settings, rate=0.01, rounds=5, ledger=ledger, test=half_wrong)
    empty = [record for record in result.history if not record.cohort]
    assert len(empty) >= 2
    losses = [record.loss for record in result.history]
    assert len(set(losses)) == len(losses)
    assert ledger.events("central") == (SampledGaussian(1.0, 0.01, 5),)


@pytest.mark.parametrize("kind", [CentralDP, RecordDP])
def test_a_run_stops_before_the_round_that_would_exceed_the_budget(kind):
    ledger, records = Ledger(), []
    rate = 0.4 if kind is CentralDP else 1.0
    settings = kind(clip=1.0, delta=DELTA, noise_multiplier=2.0, budget=3.0)
    with pytest.raises(BudgetExceeded):
        federate(
            nn.Linear(5, 2),
            CLIENTS[:4],
            algorithm=FedAvg(lr=0.1, batch_size=None),
            rounds=1000,
            selection=Poisson(rate),
            privacy=settings,
            ledger=ledger,
            on_round=records.append,
        )
    assert len(records) > 1
    assert 2.5 < records[-1].epsilon <= 3.0
    for subject in ledger.subjects:
        [spent] = ledger.events(subject)
        assert spent.times == len(records)


def test_a_client_whose_training_diverges_neither_stops_the_run_nor_spoils_the_model():
    broken = Examples(torch.full((10, 5), torch.nan), torch.zeros(10, dtype=torch.int64))
    result = run(CentralDP(clip=1.0, delta=DELTA, noise_multiplier=0.5), clients=[broken, *CLIENTS], rate=1.0, rounds=3)
    assert all("diverged" in record.lost[0] for record in result.history)
    assert weights(result).isfinite().all()
    assert result.history[-1].accuracy > 0.9
