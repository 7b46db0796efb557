"""Asynchronous training against a plain event loop, its clock, and what happens when clients do not come."""

import heapq
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.errors import InputError, TrainingError
from tacit.federated.algorithm import Algorithm
from tacit.federated.devices import AlwaysOn, Fleet, Speeds
from tacit.federated.devices_schedule import FAILED, RoundPolicy
from tacit.federated.ditto import Ditto
from tacit.federated.fedavg import FedAvg, uniform
from tacit.federated.fedbuff import FedBuff, square_root
from tacit.federated.fedprox import FedProx
from tacit.federated.generators import generator_for
from tacit.federated.history import RoundRecord
from tacit.federated.local.plain import PlainSolver
from tacit.federated.personal import PersonalLayers
from tacit.federated.scaffold import Scaffold
from tacit.runtimes.asynchronous import AsynchronousFederation, AsynchronousSnapshot
from tacit.runtimes.executors import InProcess, one_thread
from tacit.runtimes.federation import Devices, Federation
from tacit.runtimes.forked import Forked

LOSS = functional.cross_entropy


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    """The fastest for what is as small as here."""
    with one_thread():
        yield


def examples(n: int, seed: int) -> Examples:
    g = torch.Generator().manual_seed(seed)
    return Examples(torch.rand(n, 4, generator=g), torch.randint(3, (n,), generator=g))


CLIENTS = [examples(5 + k, k) for k in range(12)]
SIZES = torch.tensor([len(c) for c in CLIENTS])


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def fleet(clients: int = 12, failures: float = 0.0) -> Fleet:
    return Fleet(AlwaysOn(clients), speeds=Speeds(examples=1.0, failures=failures), seed=7)


def federation(**changes: object) -> AsynchronousFederation:
    settings = {
        "algorithm": FedBuff(FedAvg(batch_size=2, weighting=uniform), buffer=3),
        "concurrency": 6,
        "devices": Devices(fleet()),
        "seed": 5,
    }
    clients = changes.pop("clients", CLIENTS)
    model = network()
    sizes = torch.tensor([len(c) for c in clients])
    return AsynchronousFederation(model, InProcess(PlainSolver(model, LOSS), clients), sizes, **(settings | changes))


def without_time(record: RoundRecord) -> RoundRecord:
    return replace(record, seconds=0.0)


def test_the_discount_is_the_paper_s() -> None:
    assert [square_root(s) for s in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]


@dataclass(frozen=True)
class Fixed:
    """Devices that are always there, and take a time of their own for everything."""

    seconds: tuple[float, ...]

    @property
    def clients(self) -> int:
        return len(self.seconds)

    def eligible(self, time: float, clients: Tensor | None = None) -> Tensor:
        return torch.ones(self.clients if clients is None else len(clients), dtype=torch.bool)

    def durations(self, clients: Tensor, examples: Tensor, bytes_down: int, bytes_up: int, round: int) -> Tensor:
        return torch.tensor([self.seconds[k] for k in clients.tolist()], dtype=torch.float64)

    def attempt(self, clients: Tensor, start: float, durations: Tensor, round: int):
        return Fleet(AlwaysOn(self.clients), speeds=Speeds(failures=0.0)).attempt(clients, start, durations, round)


def test_against_a_plain_event_loop() -> None:
    """Three clients with room for all: who starts when follows from the times alone, no draw is involved.

    The loop computes every update the moment its client starts, and counts staleness in server steps.
    """
    seconds, buffer, clients = (1.0, 2.6, 7.1), 2, CLIENTS[:3]
    algorithm = FedAvg(lr=0.3, batch_size=2, weighting=uniform)
    model = network()
    solver = PlainSolver(model, LOSS)
    runner = federation(
        clients=clients,
        algorithm=FedBuff(algorithm, buffer),
        concurrency=3,
        devices=Devices(Fixed(seconds)),
        initial="default",
    )
    state = algorithm.init(model, 3)
    flights: list[tuple[float, int, int, Tensor]] = []
    started: set[int] = set()

    def begin(now: float) -> None:
        working = {flight[1] for flight in flights}
        for k in range(3):
            if k not in working and k not in started:
                generator = generator_for(5, "round", state.round + 1, "client", k)
                update, _ = algorithm.client_update(state, {}, solver, clients[k], generator)
                heapq.heappush(flights, (now + seconds[k], k, state.round, update.delta))
                started.add(k)

    begin(0.0)
    stale = 0
    for _ in range(12):
        total, cohort = torch.zeros_like(state.parameters), []
        while len(cohort) < buffer:
            now, k, version, delta = heapq.heappop(flights)
            total += delta / (1 + state.round - version) ** 0.5
            stale = max(stale, state.round - version)
            cohort.append(k)
            if len(cohort) < buffer:
                begin(now)
        state = replace(state, parameters=state.parameters + total / buffer, round=state.round + 1)
        record = runner.advance()
        torch.testing.assert_close(runner.snapshot.state.parameters, state.parameters)
        assert record.cohort == tuple(sorted(cohort))
        assert record.simulated_seconds == pytest.approx(now)
        started.clear()
        begin(now)
    assert stale >= 2


def test_with_a_buffer_of_everyone_it_is_synchronous_rounds() -> None:
    """M = K = N: all start together, and the server waits for all."""
    algorithm = FedAvg(batch_size=2)
    asynchronous = federation(algorithm=FedBuff(algorithm, 12), concurrency=12)
    model = network()
    synchronous = Federation(
        model,
        InProcess(PlainSolver(model, LOSS), CLIENTS),
        SIZES,
        algorithm=algorithm,
        selection=AllOfThem(),
        seed=5,
    )
    for _ in range(3):
        a, b = asynchronous.advance(), synchronous.advance()
        assert torch.equal(asynchronous.snapshot.state.parameters, synchronous.snapshot.state.parameters)
        assert (a.cohort, a.examples, a.bytes_up, a.bytes_down) == (b.cohort, b.examples, b.bytes_up, b.bytes_down)


class AllOfThem:
    sampling_rate = None

    def select(self, round: int, sizes: Tensor, eligible: Tensor, generator: torch.Generator) -> tuple[int, ...]:
        return tuple(range(len(sizes)))

    def scaled(self, factor: float, clients: int) -> "AllOfThem":
        return self


def test_records_and_invariants_of_a_run() -> None:
    runner, clock = federation(), 0.0
    size = runner.snapshot.state.nbytes
    down = 0
    for number in range(1, 15):
        record = runner.advance()
        flights = runner.snapshot.flights
        assert record.round == runner.round == number
        assert len(record.cohort) == 3
        assert list(record.cohort) == sorted(record.cohort)
        assert record.examples == sum(len(CLIENTS[k]) for k in record.cohort)
        assert record.simulated_seconds >= clock
        assert len({flight.client for flight in flights}) == len(flights) == 6 - 1
        assert all(flight.end >= record.simulated_seconds for flight in flights)
        assert all(flight.outcome is not None for flight in flights)
        assert record.note == ""
        clock, down = record.simulated_seconds, down + record.bytes_down
    assert down == runner.snapshot.tasks * size


def test_equal_seeds_give_bit_equal_runs_and_others_do_not() -> None:
    first, second, other = federation(), federation(), federation(seed=6)
    records = [[without_time(run.advance()) for _ in range(6)] for run in (first, second, other)]
    assert records[0] == records[1]
    assert torch.equal(first.snapshot.state.parameters, second.snapshot.state.parameters)
    assert records[0] != records[2]


def test_goes_on_from_a_snapshot_as_if_nothing_had_happened() -> None:
    settings = {"algorithm": FedBuff(PersonalLayers(FedAvg(batch_size=2), ("2",)), 3)}
    whole, resumed = federation(**settings), federation(**settings)
    for _ in range(4):
        whole.advance()
    resumed.restore(whole.snapshot)
    for _ in range(5):
        assert without_time(whole.advance()) == without_time(resumed.advance())
    assert torch.equal(whole.snapshot.state.parameters, resumed.snapshot.state.parameters)


@pytest.mark.parametrize("inner", [PersonalLayers(FedAvg(batch_size=2), ("2",)), Ditto(batch_size=2)])
def test_two_processes_train_the_same(inner: Algorithm) -> None:
    model = network()
    settings = {"algorithm": FedBuff(inner, 3), "concurrency": 6, "devices": Devices(fleet())}
    with closing(Forked(PlainSolver(model, LOSS), CLIENTS, 2)) as executor:
        two, one = AsynchronousFederation(model, executor, SIZES, seed=5, **settings), federation(**settings)
        for _ in range(4):
            assert without_time(two.advance()) == without_time(one.advance())
    assert torch.equal(two.snapshot.state.parameters, one.snapshot.state.parameters)


def test_a_synchronous_snapshot_is_refused() -> None:
    runner = federation()
    model = network()
    other = Federation(
        model, InProcess(PlainSolver(model, LOSS), CLIENTS), SIZES, algorithm=FedAvg(), selection=AllOfThem()
    )
    with pytest.raises(InputError, match="synchronous rounds"):
        runner.restore(other.snapshot)
    assert isinstance(runner.snapshot, AsynchronousSnapshot)


def test_those_who_drop_out_are_named_and_replaced() -> None:
    runner = federation(devices=Devices(fleet(failures=60.0)))
    records = [runner.advance() for _ in range(15)]
    lost = [client for record in records for client in record.lost]
    assert lost
    assert all(reason == FAILED for record in records for reason in record.lost.values())
    assert sum(len(record.cohort) for record in records) >= 40


def test_clients_that_diverge_are_left_out() -> None:
    poisoned = [*CLIENTS[:9], *(Examples(torch.full((6, 4), torch.inf), CLIENTS[1].targets[:6]) for _ in range(3))]
    runner = federation(clients=poisoned)
    records = [runner.advance() for _ in range(12)]
    lost = {client for record in records for client in record.lost}
    assert lost
    assert lost <= {9, 10, 11}
    assert runner.snapshot.state.parameters.isfinite().all()


def test_when_too_few_are_left_it_says_so_and_steps() -> None:
    poisoned = [*CLIENTS[:2], *(Examples(torch.full((6, 4), torch.inf), CLIENTS[1].targets[:6]) for _ in range(10))]
    record = federation(clients=poisoned).advance()
    assert record.cohort == (0, 1)
    assert record.note == "2 of 3 updates came: no client was left"
    assert set(record.lost) == set(range(2, 12))


def test_when_nobody_is_left_it_stops_with_the_model_as_it_was() -> None:
    poisoned = [Examples(torch.full((6, 4), torch.inf), CLIENTS[1].targets[:6]) for _ in range(12)]
    runner = federation(clients=poisoned)
    before = runner.snapshot.state.parameters.clone()
    failed = [runner.advance() for _ in range(2)]
    assert [record.cohort for record in failed] == [(), ()]
    assert all(record.note.startswith("0 of 3 updates came") for record in failed)
    with pytest.raises(TrainingError, match="3 rounds in a row"):
        runner.advance()
    assert torch.equal(runner.snapshot.state.parameters, before)


def test_it_waits_for_clients_that_come_later() -> None:
    class Night(Fixed):
        def eligible(self, time: float, clients: Tensor | None = None) -> Tensor:
            return super().eligible(time, clients) & (time >= 3600)

    devices = Devices(Night((10.0,) * 12), RoundPolicy(wait=600.0, max_waits=10))
    record = federation(devices=devices).advance()
    assert record.simulated_seconds == 3610.0
    short = federation(devices=Devices(Night((10.0,) * 12), RoundPolicy(wait=600.0, max_waits=2)))
    assert short.advance().cohort == ()
    assert short.snapshot.clock == 1200.0


def test_clients_without_examples_never_start() -> None:
    some = [examples(0, 0), *CLIENTS[1:8], examples(0, 1)]
    runner = federation(clients=some, concurrency=7, devices=Devices(fleet(9)))
    assert not {client for _ in range(8) for client in runner.advance().cohort} & {0, 8}


def test_nobody_waits_for_the_slow_yet_they_are_heard() -> None:
    """Half the clients take 1 s, half 30 s: a place turns over every 15.5 s, and 4 of them bring 80 updates in 310 s.

    Synchronous rounds of two take 30 s in three of four cases.
    """
    seconds = (1.0,) * 6 + (30.0,) * 6
    runner = federation(devices=Devices(Fixed(seconds)), concurrency=4, algorithm=FedBuff(FedProx(), 2))
    counts = torch.zeros(12)
    for _ in range(40):
        record = runner.advance()
        for client in record.cohort:
            counts[client] += 1
    assert 200 < record.simulated_seconds < 450
    assert counts[6:].sum() > 20
    assert counts.min() > 0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"concurrency": 0}, "concurrency=0: "),
        ({"concurrency": 13}, "concurrency=13: .* 12"),
        ({"algorithm": FedBuff(FedAvg(), 13)}, "buffer=13: .* 12"),
        ({"algorithm": FedBuff(Scaffold(), 3)}, "not scaffold.control"),
        ({"devices": Devices(fleet(11))}, "11 devices for 12 clients"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        federation(**changes)
    assert "\n" not in str(caught.value)


def test_a_buffer_of_nobody() -> None:
    with pytest.raises(InputError, match="buffer=0: "):
        FedBuff(FedAvg(), 0)
