"""Processes train clients as one process does, and their end is not the end of the run."""

import json
import os
import signal
import time
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from tacit.bench.federated import measure_federated
from tacit.data.examples import Examples
from tacit.data.views import ClientViews
from tacit.errors import InputError, TacitError, TrainingError
from tacit.federated.algorithm import Memory, Update
from tacit.federated.fedavg import FedAvg
from tacit.federated.local.plain import PlainSolver
from tacit.federated.local.traced import TracedSolver
from tacit.federated.scaffold import Scaffold
from tacit.federated.selection import Uniform
from tacit.runtimes.executors import InProcess, Job, Outcome
from tacit.runtimes.federation import Federation
from tacit.runtimes.forked import Forked, available_cores, forked

CLIENTS = 9


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
    return nn.Sequential(*layers)


def views() -> ClientViews:
    generator = torch.Generator().manual_seed(0)
    examples = Examples(torch.rand(200, 12, generator=generator), torch.randint(3, (200,), generator=generator))
    sizes = torch.tensor([6, 20, 3, 11, 8, 30, 4, 18, 10])
    return ClientViews.of_sizes(examples, torch.randperm(200, generator=generator)[: int(sizes.sum())], sizes)


def federation(executor, algorithm) -> Federation:
    return Federation(model(), executor, views().sizes(), algorithm=algorithm, selection=Uniform(6), seed=1)


@pytest.mark.parametrize("algorithm", [FedAvg(batch_size=4), Scaffold(batch_size=4)], ids=["fedavg", "scaffold"])
@pytest.mark.parametrize("solver", [PlainSolver, TracedSolver])
def test_every_number_of_processes_gives_the_same_bits(algorithm, solver):
    def trained(executor):
        run = federation(executor, algorithm)
        records = [replace(run.advance(), seconds=0) for _ in range(3)]
        executor.close()
        return run.snapshot, records

    expected, records = trained(InProcess(solver(model(), functional.cross_entropy), views()))
    for processes in (1, 3):
        snapshot, same = trained(Forked(solver(model(), functional.cross_entropy), views(), processes))
        assert same == records
        assert torch.equal(snapshot.state.parameters, expected.state.parameters)
        assert snapshot.state.buffers.keys() == expected.state.buffers.keys()
        for name, buffer in expected.state.buffers.items():
            assert torch.equal(snapshot.state.buffers[name], buffer)
        assert snapshot.memories.keys() == expected.memories.keys()
        for client, memory in expected.memories.items():
            assert all(torch.equal(snapshot.memories[client][name], memory[name]) for name in memory)


@dataclass(frozen=True)
class Obstinate(FedAvg):
    """Ends the process at some clients, or raises, or diverges; ``once`` is a file that says it has been done."""

    kills: tuple[int, ...] = ()
    once: str = ""
    raises: str = ""
    diverges: int = -1

    def client_update(self, state, memory: Memory, solver, examples, generator) -> tuple[Update, Memory]:
        if len(examples) in self.kills and not (self.once and os.path.exists(self.once)):
            if self.once:
                open(self.once, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.raises and len(examples) == 11:
            raise (InputError if self.raises == "input" else ZeroDivisionError)("something about client 3")
        update, memory = super().client_update(state, memory, solver, examples, generator)
        if len(examples) == self.diverges:
            update.delta[0] = torch.nan
        return update, memory


def outcomes(executor, algorithm, clients=range(CLIENTS)) -> list[Outcome]:
    state = algorithm.init(model(), CLIENTS)
    return list(executor.run(algorithm, state, [Job(client, {}) for client in clients], seed=0))


@pytest.fixture
def solver():
    return PlainSolver(model(), functional.cross_entropy)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_client_that_ends_its_process_twice_is_lost_and_no_other(solver, processes):
    expected = outcomes(InProcess(solver, views()), FedAvg(batch_size=4))
    executor = Forked(solver, views(), processes)
    try:
        for _ in range(2):  # what is lost in one round does not spoil the next
            result = outcomes(executor, Obstinate(batch_size=4, kills=(3, 30)))
            assert [outcome.client for outcome in result] == list(range(CLIENTS))
            assert [outcome.client for outcome in result if outcome.update is None] == [2, 5]
            assert result[2].reason == "lost: 2 processes that trained it ended by SIGKILL"
            for outcome, same in zip(result, expected, strict=True):
                assert outcome.update is None or torch.equal(outcome.update.delta, same.update.delta)
    finally:
        executor.close()


def test_a_process_that_is_killed_once_costs_nothing(solver, tmp_path):
    expected = outcomes(InProcess(solver, views()), FedAvg(batch_size=4))
    executor = Forked(solver, views(), 2)
    result = outcomes(executor, Obstinate(batch_size=4, kills=(8,), once=str(tmp_path / "killed")))
    executor.close()
    assert (tmp_path / "killed").exists()
    for outcome, same in zip(result, expected, strict=True):
        assert torch.equal(outcome.update.delta, same.update.delta)


def test_processes_killed_between_rounds_are_replaced(solver):
    executor = Forked(solver, views(), 2)
    algorithm = FedAvg(batch_size=4)
    first = outcomes(executor, algorithm)
    for pid in executor.pids:
        os.kill(pid, signal.SIGKILL)
    again = outcomes(executor, algorithm)
    executor.close()
    assert all(torch.equal(a.update.delta, b.update.delta) for a, b in zip(first, again, strict=True))


def test_a_client_that_diverges_is_reported(solver):
    executor = Forked(solver, views(), 2)
    result = outcomes(executor, Obstinate(batch_size=4, diverges=8))
    executor.close()
    assert [(outcome.client, outcome.reason) for outcome in result if outcome.update is None] == [
        (4, "diverged: its update is not finite")
    ]


@pytest.mark.parametrize(("raises", "error"), [("input", InputError), ("zero", TrainingError)])
def test_errors_come_back_and_the_executor_can_go_on(solver, raises, error):
    executor = Forked(solver, views(), 2)
    with pytest.raises(error, match="something about client 3"):
        outcomes(executor, Obstinate(batch_size=4, raises=raises))
    assert executor.pids == ()
    assert len(outcomes(executor, FedAvg(batch_size=4))) == CLIENTS
    executor.close()


def test_a_round_may_be_left_early(solver):
    executor = Forked(solver, views(), 2)
    algorithm = FedAvg(batch_size=4)
    state = algorithm.init(model(), CLIENTS)
    some = executor.run(algorithm, state, [Job(client, {}) for client in range(CLIENTS)], seed=0)
    first = next(some)
    some.close()
    again = outcomes(executor, algorithm)
    executor.close()
    assert torch.equal(first.update.delta, again[0].update.delta)
    assert len(again) == CLIENTS


def test_memory_does_not_grow_with_the_cohort(solver):
    """The last job is not begun before the first outcomes are taken."""
    executor = Forked(solver, views(), 2)
    algorithm = FedAvg(batch_size=4)
    asked = []

    class Jobs(list):
        def __getitem__(self, number):
            asked.append(number)
            return super().__getitem__(number)

    jobs = Jobs(Job(client % CLIENTS, {}) for client in range(100))
    run = executor.run(algorithm, algorithm.init(model(), CLIENTS), jobs, seed=0)
    next(run)
    assert max(asked) < 12
    assert sum(1 for _ in run) == 99
    executor.close()


def test_closing_leaves_no_process(solver):
    executor = Forked(solver, views(), 2)
    outcomes(executor, FedAvg(batch_size=4))
    pids = executor.pids
    assert len(pids) == 2
    executor.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_processes_of_one_that_dies_end_too(solver):
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            executor = Forked(solver, views(), 2)
            outcomes(executor, FedAvg(batch_size=4))
            os.write(write, " ".join(map(str, executor.pids)).encode())
        finally:
            os._exit(0)
    os.waitpid(parent, 0)
    pids = [int(pid) for pid in os.read(read, 100).split()]
    assert len(pids) == 2
    for pid in pids:
        deadline = time.monotonic() + 20
        while _runs(pid):
            assert time.monotonic() < deadline, f"process {pid} outlived its parent"
            time.sleep(0.02)
    os.close(read)
    os.close(write)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_process_or_none_is_this_one(solver, monkeypatch):
    assert isinstance(forked(solver, views(), 1)[0], InProcess)
    executor, reason = forked(solver, views(), 2)
    assert isinstance(executor, Forked)
    assert reason == ""
    monkeypatch.delattr(os, "fork")
    executor, reason = forked(solver, views())
    assert isinstance(executor, InProcess)
    assert "no fork" in reason


def test_processes_are_at_least_one(solver):
    with pytest.raises(InputError, match="processes=0"):
        Forked(solver, views(), 0)
    assert available_cores() >= 1
    assert issubclass(TrainingError, TacitError)


def test_views_are_the_clients_examples():
    examples = Examples(torch.arange(12.0).view(6, 2), torch.arange(6))
    parts = [torch.tensor([4, 1]), torch.tensor([], dtype=torch.long), torch.tensor([5])]
    clients = ClientViews(examples, parts)
    assert clients.sizes().tolist() == [2, 0, 1]
    assert [len(client) for client in clients] == [2, 0, 1]
    for client, part in zip(clients, parts, strict=True):
        assert torch.equal(client.inputs, examples.inputs[part])
        assert torch.equal(client.targets, part)
    assert torch.equal(clients[-1].targets, torch.tensor([5]))
    assert [len(client) for client in clients[1:]] == [0, 1]
    for beyond in (3, -4):
        with pytest.raises(IndexError):
            clients[beyond]


@pytest.mark.parametrize(
    ("parts", "text"), [([], "at least one client"), ([torch.tensor([6])], "0 to 5"), ([torch.tensor([-1])], "0 to 5")]
)
def test_views_of_what_is_not_there(parts, text):
    with pytest.raises(InputError, match=text):
        ClientViews(Examples(torch.zeros(6, 2), torch.zeros(6)), parts)


@pytest.mark.parametrize("dp", ["none", "record", "client"])
def test_the_benchmark_counts_every_process(dp):
    result = measure_federated("2nn", 30, 4, 10, 2, dp, processes=2)
    assert (result.processes, result.executor) == (2, "forked")
    assert result.solver == ("DP-SGD" if dp == "record" else "traced")
    assert result.cpu_s_per_round > 0
    assert result.over_plain_loop == result.cpu_s_per_round / result.plain_loop_cpu_s
    assert result.clients_per_s == 4 / result.wall_s_per_round
    assert json.dumps(result.as_dict())


def test_the_benchmark_times_a_secure_sum_beside_the_same_rounds_without():
    result = measure_federated("2nn", 8, 5, 10, 2, secure_sum="masked", examples=12)
    assert result.secure_sum == "masked"
    assert result.examples_per_client == 12
    assert result.secure_cpu_s_per_round > 0
    added = result.secure_cpu_s_per_round - result.cpu_s_per_round
    assert result.secure_overhead == pytest.approx(added / result.cpu_s_per_round)
    assert result.secure_over_plain_loop == pytest.approx(added / result.plain_loop_cpu_s)
    assert json.dumps(result.as_dict())


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"secure_sum": "x"}, "none, masked, shared"),
        ({"examples": 0}, "at least 1"),
        ({"model": "3nn"}, "2nn, cnn"),
        ({"cohort": 31}, "between 1 and"),
        ({"rounds": 0}, "at least 1"),
        ({"dp": "x"}, "record"),
    ],
)
def test_benchmarks_that_cannot_be_run(setting, text):
    settings = {"model": "2nn", "clients": 30, "cohort": 4, "batch_size": 10, "rounds": 2} | setting
    with pytest.raises(InputError, match=text):
        measure_federated(**settings)
