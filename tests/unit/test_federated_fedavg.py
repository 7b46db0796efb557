import math
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import ServerState, Update
from tacit.federated.fedavg import FedAvg, capped, uniform
from tacit.federated.layout import Layout
from tacit.federated.local.plain import PlainSolver
from tacit.federated.mean import weighted_mean


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
    return Update.of_client(torch.tensor(delta), buffers, examples, loss)


def train(
    algorithm: FedAvg, model: nn.Module, own: Examples, seed: int = 0, state: ServerState | None = None
) -> tuple[Update, dict[str, torch.Tensor]]:
    """A client's update, and its delta by name."""
    solver = PlainSolver(model, functional.cross_entropy)
    state = state or algorithm.init(model, clients=1)
    sent, memory = algorithm.client_update(state, {}, solver, own, seeded(seed))
    assert memory == {}
    return sent, state.layout.views(sent.delta)


def test_weighted_mean_by_hand() -> None:
    updates = [
        update([1.0, 2.0], 10, 0.5, 3),
        update([4.0, -2.0], 30, 1.5, 7),
        update([0.0, 8.0], 60, 1.0, 5),
    ]
    mean = FedAvg().combine(iter(updates))
    torch.testing.assert_close(mean.delta, torch.tensor([1.3, 4.4]))
    torch.testing.assert_close(mean.buffers["mean"], torch.tensor([1.3, 4.4]))
    assert mean.buffers["count"] == 7
    assert mean.examples == 100
    assert mean.loss == pytest.approx(1.1)
    assert mean.nbytes == 3 * (8 + 8 + 8 + 16)


def test_the_mean_of_one_update_is_itself() -> None:
    only = update([0.1, 0.7], 3)
    mean = FedAvg().combine([only])
    assert torch.equal(mean.delta, only.delta)
    assert (mean.examples, mean.loss, mean.nbytes, mean.weight) == (3, 0.0, only.nbytes, 3.0)


def test_combining_leaves_the_updates_as_they_are() -> None:
    a, b = update([1.0, 2.0], 1), update([3.0, 4.0], 1)
    weighted_mean([a, b])
    assert a.delta.tolist() == [1.0, 2.0]
    assert b.delta.tolist() == [3.0, 4.0]


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
    state = algorithm.init(model, clients=1)
    sent, delta = train(algorithm, model, examples(10))
    parameters = sum(p.numel() for p in model.parameters())
    assert set(delta) == {name for name, _ in model.named_parameters()}
    assert sent.examples == 10
    assert sent.nbytes == 4 * (parameters + 8 + 8) + 8 + 16
    assert state.nbytes == 4 * (parameters + 8 + 8) + 8
    assert sent.buffers["1.num_batches_tracked"] == 6
    assert 0 < sent.loss < 5


def test_client_update_is_a_function_of_its_arguments() -> None:
    algorithm = FedAvg(batch_size=4, epochs=2)
    dropping = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    state = algorithm.init(dropping, clients=1)
    before = state.parameters.clone()
    global_state = torch.get_rng_state()
    first, _ = train(algorithm, dropping, examples(10), 1, state)
    torch.testing.assert_close(torch.get_rng_state(), global_state, rtol=0, atol=0)
    torch.rand(3)
    second, _ = train(algorithm, dropping, examples(10), 1, state)
    other, _ = train(algorithm, dropping, examples(10), 2, state)
    assert torch.equal(first.delta, second.delta)
    assert first.loss == second.loss
    assert not torch.equal(first.delta, other.delta)
    assert torch.equal(before, state.parameters)


def test_every_epoch_visits_every_example_once_in_another_order() -> None:
    seen: list[float] = []

    class Spy(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            seen.extend(input[:, 0].tolist())
            return super().forward(input)

    algorithm, model = FedAvg(batch_size=4, epochs=2), Spy(1, 2)
    own = Examples(torch.arange(10.0).view(10, 1), torch.zeros(10, dtype=torch.int64))
    train(algorithm, model, own)
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != sorted(first)


def test_mean_training_loss_weighs_examples_not_batches() -> None:
    algorithm, model, own = FedAvg(lr=1e-30, batch_size=4), network()[:1], examples(10)
    sent, _ = train(algorithm, model, own)
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
    _, delta = train(algorithm, model, examples(5))
    assert set(delta) == {"head.weight", "head.bias", "unused.weight", "unused.bias"}
    assert delta["head.weight"].abs().max() > 0
    assert delta["unused.weight"].abs().max() == 0


def test_nothing_to_train() -> None:
    with pytest.raises(InputError, match="nothing to train"):
        FedAvg().init(nn.Flatten(), clients=1)


def test_server_update_is_pure() -> None:
    algorithm = FedAvg(server_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1))
    layout = Layout(("w",), (torch.Size([2]),), torch.float32)
    fresh = torch.optim.Adam([torch.zeros(2)], lr=0.1).state_dict()
    state = ServerState(layout, torch.zeros(2), {}, fresh, clients=9, round=4)
    mean = Update(torch.tensor([1.0, -2.0]), {"count": torch.tensor(3)}, 5, 0.0, 0, 5.0)
    first = algorithm.server_update(state, mean)
    again = algorithm.server_update(state, mean)
    onwards = Update(torch.tensor([-3.0, 0.5]), {"count": torch.tensor(4)}, 5, 0.0, 0, 5.0)
    branch = algorithm.server_update(first, onwards)
    assert torch.equal(first.parameters, again.parameters)
    assert torch.equal(branch.parameters, algorithm.server_update(first, onwards).parameters)
    assert state.parameters.tolist() == [0.0, 0.0]
    assert state.optimizer["state"] == {}
    assert (first.round, branch.round) == (5, 6)
    assert first.buffers["count"] == 3
    assert not first.parameters.requires_grad
    assert first.parameters.grad is None


def test_weightings() -> None:
    weights = [[weighting(n) for n in (5, 60)] for weighting in (FedAvg().weighting, uniform, capped(20))]
    assert weights == [[5.0, 60.0], [1.0, 1.0], [5.0, 20.0]]
    mean = FedAvg().combine([replace(update([1.0], 5), weight=1.0), replace(update([2.0], 60), weight=1.0)])
    assert mean.delta.tolist() == [1.5]
    assert (mean.examples, mean.weight) == (65, 2.0)
    with pytest.raises(InputError, match="add up to 0"):
        weighted_mean([replace(update([1.0], 5), weight=0.0)])
    with pytest.raises(InputError, match="most=0"):
        capped(0)


def test_extras_add_up() -> None:
    one = replace(update([1.0], 5), extra={"control": torch.tensor([1.0, 2.0])})
    assert FedAvg().combine([one, one, one]).extra["control"].tolist() == [3.0, 6.0]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.complex64, torch.complex64)])
def test_parameters_of_several_or_odd_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    first, second = (nn.Linear(2, 2, dtype=dtype) for dtype in dtypes)
    with pytest.raises(InputError, match="one floating-point dtype"):
        Layout.of(nn.Sequential(first, second))


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
