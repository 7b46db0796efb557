"""Stacks of clients against one client after another."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tacit import federate
from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import Algorithm
from tacit.federated.compression import Compressed
from tacit.federated.compression_schemes import StochasticQuantisation
from tacit.federated.ditto import Ditto
from tacit.federated.fedavg import FedAvg
from tacit.federated.fedprox import FedProx
from tacit.federated.local.plain import PlainSolver
from tacit.federated.personal import PersonalLayers
from tacit.federated.scaffold import Scaffold
from tacit.federated.selection import Uniform
from tacit.runtimes.executors import InProcess
from tacit.runtimes.federation import Federation
from tacit.runtimes.grouped import Grouped, StackedSolver

DEVICES = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()


def examples(n: int, seed: int) -> Examples:
    g = torch.Generator().manual_seed(seed)
    return Examples(torch.rand(n, 1, 8, 8, generator=g), torch.randint(3, (n,), generator=g))


CLIENTS = [examples(n, seed) for seed, n in enumerate((12, 12, 7, 12, 7, 12, 1))]


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(
    "algorithm",
    [
        FedAvg(batch_size=5, epochs=2),
        FedAvg(batch_size=None),
        FedProx(batch_size=5, mu=0.3),
        Scaffold(batch_size=5, lr=0.05),
        Ditto(batch_size=5, epochs=2, pull=0.2),
        PersonalLayers(FedAvg(batch_size=5), layers=("4",)),
        Compressed(FedAvg(batch_size=5), StochasticQuantisation(12)),
    ],
    ids=["fedavg", "all at once", "fedprox", "scaffold", "ditto", "personal", "quantised"],
)
def test_stacked_clients_train_as_one_after_another(algorithm: Algorithm, device: torch.device) -> None:
    model, sizes = network(), torch.tensor([len(own) for own in CLIENTS])
    executors = (
        InProcess(PlainSolver(model, functional.cross_entropy), CLIENTS),
        Grouped(StackedSolver(model, functional.cross_entropy, device), CLIENTS, group=4),
    )
    runs = [Federation(model, one, sizes, algorithm=algorithm, selection=Uniform(6), seed=5) for one in executors]
    # A unit of rounding may tip a stochastic rounding over; its step is a 2^-11th of a chunk's largest entry.
    tolerance = 1e-3 if isinstance(algorithm, Compressed) else 1e-6
    for _ in range(3):
        plain, stacked = (run.advance() for run in runs)
        assert (plain.cohort, plain.examples, plain.bytes_up) == (stacked.cohort, stacked.examples, stacked.bytes_up)
        assert stacked.train_loss == pytest.approx(plain.train_loss, abs=tolerance)
    states = [run.snapshot.state for run in runs]
    torch.testing.assert_close(states[1].parameters, states[0].parameters, rtol=0, atol=tolerance)
    memories = [run.snapshot.memories for run in runs]
    assert memories[0].keys() == memories[1].keys()
    for client, memory in memories[0].items():
        for name, value in memory.items():
            torch.testing.assert_close(memories[1][client][name], value, rtol=0, atol=max(tolerance, 1e-5))


def test_through_federate() -> None:
    settings = {"algorithm": FedAvg(batch_size=5), "rounds": 2, "cohort": 4}
    stacked = federate(network(), CLIENTS, **settings, solver="stacked")
    plain = federate(network(), CLIENTS, **settings, solver="plain")
    for a, b in zip(stacked.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.Dropout(0.5)])
def test_layers_that_cannot_be_stacked_are_named(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(InputError, match=f"layer 1 is a {type(layer).__name__}"):
        federate(model, CLIENTS, algorithm=FedAvg(), rounds=1, cohort=2, solver="stacked")


def test_an_empty_group_is_refused() -> None:
    with pytest.raises(InputError, match="group=0"):
        Grouped(StackedSolver(network(), functional.cross_entropy, DEVICES[0]), CLIENTS, group=0)
