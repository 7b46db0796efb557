import copy
import math

import pytest
import torch
from torch import nn

from tacit.data.digits import load_digits
from tacit.data.examples import Dataset, Examples
from tacit.data.partition import iid, shards
from tacit.errors import InputError, TrainingError
from tacit.federated.fedavg import FedAvg
from tacit.federated.history import RoundRecord
from tacit.federated.models import two_nn
from tacit.runtimes.simulation import FederatedRun, federate


def examples(n: int, seed: int = 0) -> Examples:
    g = torch.Generator().manual_seed(seed)
    return Examples(torch.rand(n, 6, generator=g), torch.randint(3, (n,), generator=g))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


CLIENTS = [examples(n, n) for n in (8, 12, 20, 6, 10)]


def run(**changes: object) -> FederatedRun:
    settings = {
        "model": changes.get("model") or network(),
        "clients": CLIENTS,
        "algorithm": FedAvg(batch_size=4),
        "rounds": 3,
        "cohort": 2,
        "test": examples(40, 99),
    }
    return federate(**(settings | changes))


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def without_time(run: FederatedRun) -> list[tuple[object, ...]]:
    return [(r.round, r.cohort, r.examples, r.loss, r.accuracy, r.bytes_up, r.bytes_down) for r in run.history]


def test_equal_seeds_give_bit_equal_runs() -> None:
    first = run(seed=4)
    torch.manual_seed(1234)
    second = run(seed=4)
    assert equal(first.model, second.model)
    assert without_time(first) == without_time(second)
    other = run(seed=5)
    assert not equal(first.model, other.model)
    assert [r.cohort for r in first.history] != [r.cohort for r in other.history]


def test_the_callers_model_and_random_state_are_untouched() -> None:
    model = network().eval()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    trained = run(model=model).model
    assert equal(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert not trained.training
    assert not equal(trained, model)
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in trained.parameters())


def test_history_and_bytes() -> None:
    seen: list[RoundRecord] = []
    result = run(on_round=seen.append)
    assert tuple(seen) == result.history
    assert [record.round for record in seen] == [1, 2, 3]
    floats = sum(p.numel() for p in network().parameters()) + 8 + 8
    for record in seen:
        assert len(record.cohort) == 2
        assert record.examples == sum(len(CLIENTS[client]) for client in record.cohort)
        assert record.bytes_down == 2 * (4 * floats + 8)
        assert record.bytes_up == 2 * (4 * floats + 8 + 16)
        assert record.seconds > 0
        assert record.loss is not None
        assert record.accuracy is not None
        assert 0 <= record.accuracy <= 1


def test_when_it_evaluates() -> None:
    evaluated = [record.accuracy is not None for record in run(rounds=5, evaluate_every=2).history]
    assert evaluated == [False, True, False, True, True]
    assert all(record.loss is None for record in run(test=None).history)


def test_stops_at_the_target() -> None:
    assert len(run(rounds=50, target_accuracy=1e-9).history) == 1
    assert len(run(rounds=3, target_accuracy=1.0).history) == 3


def test_more_rounds_continue_the_same_trajectory() -> None:
    assert without_time(run(rounds=2)) == without_time(run(rounds=4))[:2]


def test_threads_are_restored_and_one_while_training() -> None:
    class Probe(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            if self.training:
                seen.add(torch.get_num_threads())
            return super().forward(input)

    seen: set[int] = set()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run(model=Probe(6, 3), solver="plain")
        assert seen == {1}
        assert torch.get_num_threads() == 2
        with pytest.raises(TrainingError):
            run(
                model=Probe(6, 3),
                clients=[Examples(torch.full((4, 6), math.nan), CLIENTS[0].targets[:4])],
                cohort=1,
            )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_every_solver_and_number_of_processes_trains_alike() -> None:
    plain = run(solver="plain")
    assert plain.notes == ()
    fast = run()
    for a, b in zip(plain.model.state_dict().values(), fast.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert equal(run(processes=2).model, fast.model)
    assert equal(run(solver="plain", processes=3).model, plain.model)


def test_a_model_that_does_not_trace_trains_in_the_plain_loop_and_the_run_says_so() -> None:
    class Deciding(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            outputs = super().forward(input)
            return outputs if outputs.detach().sum().item() > 0 else -outputs

    result = run(model=Deciding(6, 3))
    assert len(result.notes) == 1
    assert result.notes[0].startswith("clients train in the plain loop: ")
    assert equal(result.model, run(model=Deciding(6, 3), solver="plain").model)


def test_a_client_that_diverges_is_left_out_and_named() -> None:
    poisoned = [*CLIENTS[:3], Examples(torch.full((4, 6), math.inf), CLIENTS[0].targets[:4])]
    history = run(clients=poisoned, cohort=4).history
    assert [record.cohort for record in history] == [(0, 1, 2)] * 3
    assert all("not finite" in record.lost[3] for record in history)
    assert all(math.isfinite(record.loss) for record in history)
    spared = run(clients=CLIENTS[:3], cohort=3)
    assert [record.loss for record in spared.history] == [record.loss for record in history]


def test_training_that_diverges_everywhere_stops_and_names_the_remedy() -> None:
    with pytest.raises(TrainingError, match=r"3 rounds in a row.*FedAvg\(lr=1e\+30.*lower lr") as caught:
        run(model=nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), algorithm=FedAvg(lr=1e30), rounds=20)
    assert "\n" not in str(caught.value)


def test_clients_without_examples_are_never_selected() -> None:
    history = run(clients=[examples(0), *CLIENTS[:2]], cohort=2).history
    assert {record.cohort for record in history} == {(1, 2)}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"clients": []}, "clients: the list is empty"),
        ({"clients": [examples(0), examples(0)]}, "none of the 2 clients has examples"),
        ({"cohort": 0}, "cohort=0: choose between 1 and the number of clients, 5"),
        ({"cohort": 6}, "cohort=6: choose between 1 and the number of clients, 5"),
        ({"rounds": 0}, "rounds=0: "),
        ({"rounds": -3}, "rounds=-3: "),
        ({"evaluate_every": 0}, "evaluate_every=0: "),
        ({"target_accuracy": 0.0}, r"target_accuracy=0\.0: "),
        ({"target_accuracy": 97.0}, r"target_accuracy=97\.0: give a fraction"),
        ({"target_accuracy": 0.9, "test": None}, r"target_accuracy=0\.9 needs test examples"),
        ({"test": examples(0), "rounds": 10**9, "evaluate_every": 10**9}, "test has no examples"),
        ({"initial": "zeros"}, "initial='zeros'"),
        ({"processes": 0}, "processes=0: "),
        ({"solver": "quick"}, "solver='quick': choose one of auto, plain, stacked"),
        ({"cohort": None}, "give either cohort="),
        ({"patience": 0}, "patience=0: "),
    ],
)
def test_bad_options_are_named(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        run(**changes)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    pytest.importorskip("sklearn")
    return load_digits()


def test_learns_the_digits(digits: Dataset) -> None:
    parts = iid(digits.train.targets, 10, torch.Generator().manual_seed(0))
    clients = [digits.train.subset(part) for part in parts]
    result = federate(
        two_nn(),
        clients,
        algorithm=FedAvg(lr=0.1),
        rounds=15,
        cohort=5,
        test=digits.test,
        target_accuracy=0.93,
    )
    assert result.history[-1].accuracy >= 0.93


def test_learns_mnist_from_two_digit_clients(mnist: Dataset) -> None:
    parts = shards(mnist.train.targets, 100, torch.Generator().manual_seed(0))
    clients = [mnist.train.subset(part) for part in parts]
    result = federate(
        two_nn(),
        clients,
        algorithm=FedAvg(lr=0.05),
        rounds=12,
        cohort=10,
        test=mnist.test,
        target_accuracy=0.7,
    )
    assert result.history[-1].accuracy >= 0.7
