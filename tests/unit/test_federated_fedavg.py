import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import ServerState, Update
from tacit.federated.fedavg import FedAvg, weighted_mean


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def examples(n: int, seed: int = 0) -> Examples:
    g = seeded(seed)
    return Examples(torch.rand(n, 6, generator=g), torch.randint(3, (n,), generator=g))


def network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def update(delta: list[float], examples: int, loss: float = 0.0, count: int = 0) -> Update:
    buffers = {"mean": torch.tensor(delta), "count": torch.tensor(count)}
    return Update.of_client({"w": torch.tensor(delta)}, buffers, examples, loss)


def test_weighted_mean_by_hand() -> None:
    updates = [
        update([1.0, 2.0], 10, 0.5, 3),
        update([4.0, -2.0], 30, 1.5, 7),
        update([0.0, 8.0], 60, 1.0, 5),
    ]
    mean = FedAvg().combine(iter(updates))
    torch.testing.assert_close(mean.delta["w"], torch.tensor([1.3, 4.4]))
    torch.testing.assert_close(mean.buffers["mean"], torch.tensor([1.3, 4.4]))
    assert mean.buffers["count"] == 7
    assert mean.examples == 100
    assert mean.loss == pytest.approx(1.1)
    assert mean.nbytes == 3 * (8 + 8 + 8 + 16)


def test_the_mean_of_one_update_is_itself() -> None:
    only = update([0.1, 0.7], 3)
    assert FedAvg().combine([only]) is only


def test_combining_leaves_the_updates_as_they_are() -> None:
    a, b = update([1.0, 2.0], 1), update([3.0, 4.0], 1)
    weighted_mean(a, b)
    assert a.delta["w"].tolist() == [1.0, 2.0]
    assert b.delta["w"].tolist() == [3.0, 4.0]


def test_combining_lets_go_of_the_updates_it_has_read() -> None:
    read: list[weakref.ref[Update]] = []
    alive: list[int] = []

    def stream() -> Iterator[Update]:
        for _ in range(20):
            alive.append(sum(reference() is not None for reference in read))
            made = update([1.0], 1)
            read.append(weakref.ref(made))
            yield made
            del made

    FedAvg().combine(stream())
    assert max(alive) <= 2


def test_nothing_to_combine() -> None:
    with pytest.raises(InputError, match="at least one client"):
        FedAvg().combine([])


def test_client_update_reports_what_it_sends() -> None:
    algorithm, model = FedAvg(batch_size=4, epochs=2), network()
    state = algorithm.init(model)
    sent = algorithm.client_update(state, model, examples(10), seeded())
    parameters = sum(p.numel() for p in model.parameters())
    assert set(sent.delta) == {name for name, _ in model.named_parameters()}
    assert sent.examples == 10
    assert sent.nbytes == 4 * (parameters + 8 + 8) + 8 + 16
    assert state.nbytes == 4 * (parameters + 8 + 8) + 8
    assert sent.buffers["1.num_batches_tracked"] == 6
    assert 0 < sent.loss < 5


def test_client_update_is_a_function_of_its_arguments() -> None:
    algorithm = FedAvg(batch_size=4, epochs=2)
    dropping = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    state = algorithm.init(dropping)
    before = {name: value.clone() for name, value in state.parameters.items()}
    global_state = torch.get_rng_state()
    first = algorithm.client_update(state, dropping, examples(10), seeded(1))
    torch.testing.assert_close(torch.get_rng_state(), global_state, rtol=0, atol=0)
    torch.rand(3)
    second = algorithm.client_update(state, dropping, examples(10), seeded(1))
    other = algorithm.client_update(state, dropping, examples(10), seeded(2))
    assert all(torch.equal(first.delta[name], second.delta[name]) for name in first.delta)
    assert first.loss == second.loss
    assert not torch.equal(first.delta["0.weight"], other.delta["0.weight"])
    assert all(torch.equal(before[name], state.parameters[name]) for name in before)


def test_every_epoch_visits_every_example_once_in_another_order() -> None:
    seen: list[float] = []

    class Spy(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            seen.extend(input[:, 0].tolist())
            return super().forward(input)

    algorithm, model = FedAvg(batch_size=4, epochs=2), Spy(1, 2)
    own = Examples(torch.arange(10.0).view(10, 1), torch.zeros(10, dtype=torch.int64))
    algorithm.client_update(algorithm.init(model), model, own, seeded())
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != sorted(first)


def test_mean_training_loss_weighs_examples_not_batches() -> None:
    algorithm, model, own = FedAvg(lr=1e-30, batch_size=4), network()[:1], examples(10)
    sent = algorithm.client_update(algorithm.init(model), model, own, seeded())
    expected = functional.cross_entropy(model(own.inputs), own.targets)
    assert sent.loss == pytest.approx(expected.item(), rel=1e-5)


def test_frozen_and_unused_parameters() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.unused = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(2, 2)
            self.body.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    algorithm, model = FedAvg(), Partial()
    sent = algorithm.client_update(algorithm.init(model), model, examples(5), seeded())
    assert set(sent.delta) == {"head.weight", "head.bias", "unused.weight", "unused.bias"}
    assert sent.delta["head.weight"].abs().max() > 0
    assert sent.delta["unused.weight"].abs().max() == 0


def test_nothing_to_train() -> None:
    with pytest.raises(InputError, match="nothing to train"):
        FedAvg().init(nn.Flatten())


def test_server_update_is_pure() -> None:
    algorithm = FedAvg(server_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1))
    state = ServerState({"w": torch.zeros(2)}, {}, torch.optim.Adam([torch.zeros(2)], lr=0.1).state_dict(), round=4)
    mean = Update({"w": torch.tensor([1.0, -2.0])}, {"count": torch.tensor(3)}, 5, 0.0, 0)
    first = algorithm.server_update(state, mean)
    again = algorithm.server_update(state, mean)
    onwards = Update({"w": torch.tensor([-3.0, 0.5])}, {"count": torch.tensor(4)}, 5, 0.0, 0)
    branch = algorithm.server_update(first, onwards)
    assert torch.equal(first.parameters["w"], again.parameters["w"])
    assert torch.equal(branch.parameters["w"], algorithm.server_update(first, onwards).parameters["w"])
    assert state.parameters["w"].tolist() == [0.0, 0.0]
    assert state.optimizer["state"] == {}
    assert (first.round, branch.round) == (5, 6)
    assert first.buffers["count"] == 3
    assert not first.parameters["w"].requires_grad
    assert first.parameters["w"].grad is None


def test_divergence_is_recognised() -> None:
    assert update([1.0], 1).is_finite()
    assert not update([math.nan], 1).is_finite()
    assert not update([-math.inf], 1).is_finite()
    assert not update([1.0], 1, loss=math.inf).is_finite()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"lr": 0.0}, "lr=0.0: "),
        ({"lr": -0.1}, "lr=-0.1: "),
        ({"lr": math.nan}, "lr=nan: "),
        ({"lr": math.inf}, "lr=inf: "),
        ({"batch_size": 0}, "batch_size=0: .*None"),
        ({"batch_size": -1}, "batch_size=-1: "),
        ({"epochs": 0}, "epochs=0: "),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        FedAvg(**settings)
