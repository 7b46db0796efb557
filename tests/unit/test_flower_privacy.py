"""Distributed differential privacy over sites: the models and accounts are the simulator's, of whoever finished."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from processes import DISTRIBUTED, largest_difference
from sites import answering, grid_of, tables, train_over, write_files
from tacit import DistributedDP
from tacit.dp.ledger import Ledger
from tacit.federated.fedavg import FedAvg
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.masked import MaskedSum
from tacit.federated.secure_sum.mean import SecureMean
from tacit.runtimes.flower.client_app import HELLO
from tacit.runtimes.simulation import federate

DELTA, NOISE, SEED = 1e-3, 2.0, 5
PRIVACY = DistributedDP(clip=1.0, delta=DELTA, noise_multiplier=NOISE, noise_seed=SEED)


def spent(folder: Path) -> float:
    with closing(Ledger(folder / "run" / "ledger.sqlite")) as ledger:
        return ledger.epsilon("distributed", DELTA)


def simulated(rounds: int):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    secure = SecureMean(MaskedSum.among(4, Policy(3)))
    algorithm = FedAvg(lr=0.3, batch_size=8)
    return federate(
        network, tables(4), algorithm=algorithm, rounds=rounds, cohort=4, seed=3, secure_sum=secure, privacy=PRIVACY
    )


def test_noise_that_sites_add_is_the_simulators_and_is_accounted_for_like_it(monkeypatch, tmp_path):
    files = write_files(tmp_path, tables(4), 'privacy = "none"\n')
    with answering(files, 4) as sites:
        history = train_over(monkeypatch, files, grid_of(sites), f"{DISTRIBUTED}noise_seed = {SEED}\n")
    expected = simulated(6)
    assert [record.cohort for record in history] == [(0, 1, 2, 3)] * 6
    assert [record.epsilon for record in history] == [record.epsilon for record in expected.history]
    assert history[-1].epsilon == spent(tmp_path) > 0
    found = load_file(tmp_path / "run" / "model.safetensors")
    assert largest_difference(found, expected.model.state_dict()) <= 1e-6


def test_a_round_costs_what_those_who_finished_have_made_of_its_noise(monkeypatch, tmp_path):
    files = write_files(tmp_path, tables(4), 'privacy = "distributed"\n')
    at = [0]

    def meddle(stage, node, message):
        return None if (node, at[0]) == (103, 2) and stage != HELLO else message

    with answering(files, 4) as sites:
        grid = grid_of(sites)
        grid.meddle = meddle
        history = train_over(monkeypatch, files, grid, DISTRIBUTED, lambda board: at.__setitem__(0, board.round))
    assert [len(record.cohort) for record in history] == [4, 3, 4, 4, 4, 4]
    alike = simulated(6).history
    assert history[0].epsilon == alike[0].epsilon
    # Fewer shares of noise, a dearer round.
    assert history[1].epsilon > alike[1].epsilon
    assert history[-1].epsilon == spent(tmp_path) > alike[-1].epsilon


@pytest.mark.parametrize(
    ("allow", "reason"),
    [
        ('privacy = "record"\n', "records must be protected by privacy of kind 'record' here"),
        ('privacy = "distributed"\nepsilon = 8.0\n', "this site keeps a privacy budget for its records"),
    ],
)
def test_a_site_that_wants_its_own_noise_refuses(monkeypatch, tmp_path, allow, reason):
    files = write_files(tmp_path, tables(4), 'privacy = "distributed"\n')
    path = files.site(3)
    path.write_text(path.read_text().replace('privacy = "distributed"\n', allow))
    with answering(files, 4) as sites:
        history = train_over(monkeypatch, files, grid_of(sites), DISTRIBUTED.replace("number = 6", "number = 1"))
    assert history[0].cohort == (0, 1, 2)
    assert reason in history[0].lost[3]


def test_noise_is_in_the_model(monkeypatch, tmp_path):
    files = write_files(tmp_path, tables(4), 'privacy = "distributed"\n')
    with answering(files, 4) as sites:
        train_over(monkeypatch, files, grid_of(sites), DISTRIBUTED)
    found = load_file(tmp_path / "run" / "model.safetensors")
    again = simulated(6).model.state_dict()
    # Noise of a sum is provisioned for two honest clients of three, and four add to it: 2 * sqrt(4 / 2) / 4 in a mean,
    # in each of six rounds; two draws of it differ by sqrt(2) times as much, about 2.4.
    gap = torch.cat([(found[name] - again[name]).flatten() for name in found])
    assert 0.5 < float(gap.square().mean().sqrt()) < 5
