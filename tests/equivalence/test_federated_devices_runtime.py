"""Devices and compression leave training what it was: the same bits on devices that are always there, in processes
as in one, and after a restart."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tacit.data.examples import Examples
from tacit.federated.algorithm import Algorithm
from tacit.federated.compression import ERROR, Compressed
from tacit.federated.compression_schemes import StochasticQuantisation, TopK
from tacit.federated.devices import AlwaysOn, Fleet, Speeds
from tacit.federated.devices_schedule import RoundPolicy
from tacit.federated.eligibility import Eligibility
from tacit.federated.fedavg import FedAvg
from tacit.federated.history import RoundRecord
from tacit.federated.local.plain import PlainSolver
from tacit.federated.scaffold import Scaffold
from tacit.federated.selection import Uniform
from tacit.runtimes.executors import Executor, InProcess
from tacit.runtimes.federation import Devices, Federation, Snapshot
from tacit.runtimes.forked import Forked

CLIENTS = 12
EVER = Eligibility(idle=False, charging=False, unmetered=False)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))


def clients() -> list[Examples]:
    generator = torch.Generator().manual_seed(0)
    return [
        Examples(torch.randn(4 + k, 10, generator=generator), torch.randint(3, (4 + k,), generator=generator))
        for k in range(CLIENTS)
    ]


def federation(executor: Executor, algorithm: Algorithm, devices: Devices | None = None) -> Federation:
    sizes = torch.tensor([len(client) for client in clients()])
    return Federation(model(), executor, sizes, algorithm=algorithm, selection=Uniform(5), devices=devices, seed=1)


def trained(executor: Executor, algorithm: Algorithm, devices: Devices | None = None, rounds: int = 5):
    run = federation(executor, algorithm, devices)
    records = [replace(run.advance(), seconds=0.0) for _ in range(rounds)]
    executor.close()
    return run.snapshot, records


def in_process() -> InProcess:
    return InProcess(PlainSolver(model(), cross_entropy), clients())


def assert_same(a: Snapshot, b: Snapshot) -> None:
    assert torch.equal(a.state.parameters, b.state.parameters)
    assert a.memories.keys() == b.memories.keys()
    for client, memory in a.memories.items():
        assert memory.keys() == b.memories[client].keys()
        assert all(torch.equal(tensor, b.memories[client][name]) for name, tensor in memory.items())


def test_devices_that_are_always_there_change_nothing_but_the_clock() -> None:
    plain, records = trained(in_process(), FedAvg(batch_size=4))
    devices = Devices(Fleet(AlwaysOn(CLIENTS), speeds=Speeds(failures=0.0)))
    simulated, timed = trained(in_process(), FedAvg(batch_size=4), devices)
    assert_same(plain, simulated)
    clocks = [record.simulated_seconds for record in timed]
    assert clocks == sorted(clocks)
    assert clocks[0] > 0
    assert [replace(record, simulated_seconds=None) for record in timed] == records


@pytest.mark.parametrize(
    "algorithm",
    [
        Compressed(FedAvg(batch_size=4), TopK(0.2)),
        Compressed(FedAvg(batch_size=4), StochasticQuantisation(4)),
        Compressed(Scaffold(batch_size=4), TopK(0.2)),
    ],
    ids=["top-k", "quantised", "scaffold top-k"],
)
def test_processes_and_restarts_give_the_same_bits(algorithm: Compressed) -> None:
    """On phones of which some are lost; the restart goes on from the snapshot after the second round."""
    fleet = Fleet.of_phones(CLIENTS, policy=EVER, speeds=Speeds(examples=0.05, failures=20.0))
    devices = Devices(fleet, RoundPolicy(over_selection=1.5, deadline=600.0))
    expected, records = trained(in_process(), algorithm, devices)
    assert any(record.lost for record in records)
    assert any(ERROR in memory for memory in expected.memories.values()) == algorithm.scheme.error_feedback

    forked, same = trained(Forked(PlainSolver(model(), cross_entropy), clients(), 2), algorithm, devices)
    assert_same(forked, expected)
    assert same == records

    halfway, first = trained(in_process(), algorithm, devices, rounds=2)
    restarted = federation(in_process(), algorithm, devices)
    restarted.restore(halfway)
    rest: list[RoundRecord] = [replace(restarted.advance(), seconds=0.0) for _ in range(3)]
    assert_same(restarted.snapshot, expected)
    assert first + rest == records
