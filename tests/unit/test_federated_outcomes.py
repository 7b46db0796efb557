"""What a run does when clients fail, never come, or cannot be protected: docs/training.md names each outcome."""

import math

import pytest
import torch
from torch import nn

from tacit import federate
from tacit.data.examples import Examples
from tacit.errors import BudgetExceeded, InputError, TrainingError
from tacit.federated.devices import AlwaysOn, Fleet, Speeds
from tacit.federated.devices_schedule import RoundPolicy
from tacit.federated.eligibility import Eligibility
from tacit.federated.fedavg import FedAvg
from tacit.federated.privacy import CentralDP, RecordDP
from tacit.federated.robust import Krum
from tacit.federated.selection import Poisson
from tacit.runtimes.federation import Devices
from tacit.runtimes.simulation import FederatedRun


def examples(n: int, seed: int = 0) -> Examples:
    g = torch.Generator().manual_seed(seed)
    return Examples(torch.rand(n, 6, generator=g), torch.randint(3, (n,), generator=g))


CLIENTS = [examples(n, n) for n in (8, 12, 20, 6, 10)]


def run(**changes: object) -> FederatedRun:
    settings = {"model": nn.Linear(6, 3), "clients": CLIENTS, "algorithm": FedAvg(batch_size=4), "rounds": 3}
    settings |= {"cohort": 5, "test": examples(40, 99), "solver": "plain"}
    return federate(**(settings | changes))


def devices(speeds: Speeds | None = None, **policy: float) -> Devices:
    return Devices(Fleet(AlwaysOn(5), Eligibility(), speeds or Speeds(failures=0.0)), RoundPolicy(**policy))


def test_the_virtual_clock_and_the_late_are_in_the_history() -> None:
    calm = run(devices=devices())
    times = [record.simulated_seconds for record in calm.history]
    assert times == sorted(times)
    assert times[0] > 0
    assert all(record.cohort == (0, 1, 2, 3, 4) and not record.lost for record in calm.history)
    closed = run(devices=devices(close_at=3))
    assert all(len(record.cohort) == 3 and len(record.lost) == 2 for record in closed.history)
    assert closed.history[-1].simulated_seconds < times[-1]
    assert all(record.bytes_down == 5 * 4 * 21 for record in closed.history)


def test_a_cohort_that_never_fills_stops_the_run_and_says_why() -> None:
    fleet = Fleet(AlwaysOn(5), Eligibility(battery=1.0, hours=(13, 13.01)), Speeds())
    seen: list[str] = []
    with pytest.raises(TrainingError, match=r"3 rounds in a row.*the cohort did not fill"):
        run(
            devices=Devices(fleet, RoundPolicy(minimum=4, wait=3600, max_waits=2)),
            on_round=lambda record: seen.append(record.note),
        )
    assert len(seen) == 2
    assert all("4 needed, at most 0 were eligible" in note for note in seen)


def test_when_all_clients_drop_out_the_model_stays_and_the_run_stops() -> None:
    hopeless = devices(Speeds(examples=0.001, failures=1000.0))
    with pytest.raises(TrainingError, match="dropped out: failed"):
        run(devices=hopeless)
    one_bad_round = devices(Speeds(failures=0.0), deadline=1e-9)
    with pytest.raises(TrainingError, match="late: past the deadline"):
        run(devices=one_bad_round)


def test_an_empty_poisson_cohort_is_no_failure() -> None:
    result = run(cohort=None, selection=Poisson(0.02), rounds=30)
    empty = [record for record in result.history if not record.cohort]
    assert len(empty) > 3
    assert {record.note for record in empty} == {"no client was drawn"}
    assert len(result.history) == 30


def test_under_client_privacy_an_empty_cohort_is_noised_and_paid_for() -> None:
    private = CentralDP(clip=0.1, delta=1e-6, noise_multiplier=1.0, noise_seed=1)
    model = nn.Linear(6, 3)
    result = run(model=model, cohort=None, selection=Poisson(0.001), rounds=1, privacy=private, initial="default")
    assert [record.cohort for record in result.history] == [()]
    assert result.privacy_spent is not None
    assert result.privacy_spent.epsilon > 0
    assert not torch.equal(result.model.weight, model.weight)


@pytest.mark.parametrize("privacy", [CentralDP, RecordDP])
def test_batch_norm_under_privacy_is_refused_by_name(privacy: type[CentralDP] | type[RecordDP]) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(InputError, match=r"(?i)batch ?norm.*GroupNorm"):
        run(model=model, privacy=privacy(clip=1.0, delta=1e-3, noise_multiplier=1.0))


def test_an_impossible_epsilon_is_refused_before_training() -> None:
    seen: list[object] = []
    with pytest.raises(InputError, match="target_epsilon=1e-09"):
        run(privacy=CentralDP(clip=1.0, delta=1e-300, target_epsilon=1e-9), on_round=seen.append)
    assert seen == []


def test_the_budget_stops_before_the_round_that_would_exceed_it() -> None:
    spent: list[float] = []
    with pytest.raises(BudgetExceeded, match="privacy budget of ε = 8"):
        run(
            rounds=100,
            privacy=CentralDP(clip=1.0, delta=1e-3, noise_multiplier=1.5, budget=8.0),
            on_round=lambda record: spent.append(record.epsilon),
        )
    assert 1 <= len(spent) < 100
    assert spent == sorted(spent)
    assert spent[-1] <= 8


def test_a_client_that_diverges_under_privacy_is_left_out() -> None:
    poisoned = [*CLIENTS[:4], Examples(torch.full((10, 6), math.nan), CLIENTS[4].targets)]
    result = run(clients=poisoned, privacy=CentralDP(clip=1.0, delta=1e-3, noise_multiplier=0.5))
    assert all(4 in record.lost for record in result.history)
    assert torch.isfinite(result.model.weight).all()


def test_too_few_updates_for_a_robust_mean_fail_the_round_and_not_the_run() -> None:
    poisoned = [*CLIENTS[:4], Examples(torch.full((10, 6), math.nan), CLIENTS[4].targets)]
    seen: list[str] = []
    with pytest.raises(TrainingError, match="Krum with byzantine=1, keep=1 needs 5 updates, but 4 came"):
        run(
            clients=poisoned,
            algorithm=FedAvg(batch_size=4, mean=Krum(byzantine=1)),
            on_round=lambda record: seen.append(record.note),
        )
    assert len(seen) == 2
    assert len(run(algorithm=FedAvg(batch_size=4, mean=Krum(byzantine=1))).history[-1].cohort) == 5


def test_a_client_whose_last_batch_is_too_small_for_batch_norm_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    result = run(model=model, clients=[examples(8), examples(9), examples(12)], cohort=3)
    assert all(record.cohort == (0, 2) for record in result.history)
    assert all("could not train: Expected more than 1 value" in record.lost[1] for record in result.history)
