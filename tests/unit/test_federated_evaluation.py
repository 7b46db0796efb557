"""Evaluation client by client, early stop and the best round."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import ServerState
from tacit.federated.compression import Compressed
from tacit.federated.compression_schemes import TopK
from tacit.federated.ditto import Ditto
from tacit.federated.evaluation import EarlyStop, best_round, evaluate, evaluate_clients, summarise
from tacit.federated.fedavg import FedAvg
from tacit.federated.history import RoundRecord
from tacit.federated.local.plain import PlainSolver
from tacit.federated.personal import PersonalLayers, batch_norm_layers, personalised
from tacit.runtimes.executors import one_thread


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    """The fastest for what is as small as here."""
    with one_thread():
        yield


def examples(n: int, seed: int, flipped: bool = False) -> Examples:
    """Two classes by the sign of the first input; flipped clients call them the other way round."""
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return Examples(x, ((x[:, 0] > 0) ^ flipped).long())


TRAIN = [examples(40, k, flipped=k == 3) for k in range(4)]
TEST = [examples(50, 100 + k, flipped=k == 3) for k in range(4)]


def network() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def trained(algorithm, rounds: int = 10) -> tuple[ServerState, dict]:
    model = network()
    solver = PlainSolver(model, functional.cross_entropy)
    state, memories = algorithm.init(model, 4), {}
    for number in range(rounds):
        updates = []
        for k in range(4):
            generator = torch.Generator().manual_seed(10 * number + k)
            update, memories[k] = algorithm.client_update(state, memories.get(k, {}), solver, TRAIN[k], generator)
            updates.append(update)
        state = algorithm.server_update(state, algorithm.combine(updates))
    return state, memories


def test_the_global_model_is_judged_by_each_client() -> None:
    algorithm, model = FedAvg(batch_size=8), network()
    state, memories = trained(algorithm)
    before = copy.deepcopy(model.state_dict())
    found = evaluate_clients(model, algorithm, state, memories, TEST)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    state.load_into(model)
    each = [evaluate(model, test)[1] for test in TEST]
    assert found == summarise(each)
    assert found.worst_decile == each[3] < 0.3
    assert found.spread > 0.2


@pytest.mark.parametrize(
    "algorithm",
    [
        PersonalLayers(FedAvg(batch_size=8), ("3",)),
        Ditto(batch_size=8, pull=0.01),
        Compressed(PersonalLayers(FedAvg(batch_size=8), ("3",)), TopK(0.5)),
    ],
    ids=["personal layers", "ditto", "within compression"],
)
def test_personal_models_serve_the_one_who_differs(algorithm) -> None:
    state, memories = trained(algorithm)
    found = evaluate_clients(network(), algorithm, state, memories, TEST)
    assert found.worst_decile > 0.8
    newcomer = {k: memory for k, memory in memories.items() if k != 3}
    assert evaluate_clients(network(), algorithm, state, newcomer, TEST).worst_decile < 0.75


def test_who_is_personalised() -> None:
    layers = PersonalLayers(FedAvg(), batch_norm_layers(network()))
    assert personalised(Compressed(layers, TopK(0.5))) is layers
    assert personalised(layers) is layers
    assert personalised(FedAvg()) is None
    assert personalised(Compressed(FedAvg(), TopK(0.5))) is None


def test_clients_without_examples_are_left_out() -> None:
    algorithm = FedAvg()
    state = algorithm.init(network(), 4)
    assert evaluate_clients(network(), algorithm, state, {}, [TEST[0], examples(0, 0)]).count == 1
    with pytest.raises(InputError, match="none has examples"):
        evaluate_clients(network(), algorithm, state, {}, [examples(0, 0)])


def test_clients_with_a_single_output() -> None:
    model, algorithm = nn.Linear(3, 1, bias=False), FedAvg()
    nn.init.constant_(model.weight, 0.0)
    model.weight.data[0, 0] = 1.0
    tests = [Examples(test.inputs, test.targets.float().unsqueeze(1)) for test in TEST]
    found = evaluate_clients(model, algorithm, algorithm.init(model, 4), {}, tests)
    assert (found.mean, found.worst_decile) == (0.75, 0.0)


def test_summaries_by_hand() -> None:
    found = summarise([0.1 * (k % 10) for k in range(29, -1, -1)])
    assert found.count == 30
    assert found.mean == pytest.approx(0.45)
    assert found.worst_decile == pytest.approx(0.0)
    assert found.spread == pytest.approx((8.25**0.5) / 10)
    assert summarise([0.9, 0.4, 0.8]).worst_decile == pytest.approx(0.4)
    assert summarise([0.7]).spread == 0.0


def test_another_loss_and_a_single_output() -> None:
    x = torch.tensor([[2.0], [-1.0], [0.5]])
    binary = Examples(x, torch.tensor([[1.0], [0.0], [0.0]]))
    loss, accuracy = evaluate(nn.Identity(), binary, batch=2, loss=functional.binary_cross_entropy_with_logits)
    assert loss == pytest.approx(float(functional.binary_cross_entropy_with_logits(x, binary.targets)))
    assert accuracy == pytest.approx(2 / 3)


def record(round: int, accuracy: float | None) -> RoundRecord:
    return RoundRecord(round, (0,), 1, None, accuracy, 0, 0, 0.0)


def history(*accuracies: float | None) -> list[RoundRecord]:
    return [record(number, accuracy) for number, accuracy in enumerate(accuracies, 1)]


def test_the_best_round_is_the_first_of_the_highest() -> None:
    assert best_round(history(0.5, None, 0.8, 0.8, 0.7)).round == 3
    assert best_round(history(0.0, 0.0)).round == 1
    assert best_round(history(None, None)) is None
    assert best_round([]) is None


@pytest.mark.parametrize(
    ("stop", "accuracies", "says"),
    [
        (EarlyStop(0.9), (0.5, 0.89), ""),
        (EarlyStop(0.9), (0.5, 0.9), "reached 90.00%"),
        (EarlyStop(0.9, patience=2), (0.95, 0.3), "reached 95.00%"),
        (EarlyStop(patience=2), (0.5, 0.4), ""),
        (EarlyStop(patience=2), (0.5, None, None, 0.4), ""),
        (EarlyStop(patience=2), (0.5, 0.4, None, 0.5), "2 evaluations without improving on 50.00%"),
        (EarlyStop(patience=2), (0.5, 0.4, 0.6), ""),
        (EarlyStop(), (0.1,) * 99, ""),
        (EarlyStop(0.5, 1), (), ""),
        (EarlyStop(0.5, 1), (None,), ""),
    ],
)
def test_when_to_stop(stop: EarlyStop, accuracies: tuple[float | None, ...], says: str) -> None:
    reason = stop.reason(history(*accuracies))
    assert reason.startswith(says)
    assert bool(reason) == bool(says)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: EarlyStop(0.0), r"target_accuracy=0\.0: "),
        (lambda: EarlyStop(97.0), r"target_accuracy=97\.0: give a fraction"),
        (lambda: EarlyStop(patience=0), "patience=0: "),
    ],
)
def test_bad_settings_are_named(make, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        make()
