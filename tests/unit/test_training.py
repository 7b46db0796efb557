"""Training on shares takes the steps that plaintext training takes, at the cost that it announces."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine import Recorder, prg
from tacit.cluster import Cluster
from tacit.errors import DataError, InputError, RangeError
from tacit.mpc.steps import Role
from tacit.program.optimizers import Adam, Sgd
from tacit.program.training import Trainer

# A step's error comes from the roundings of gradients to 2^-16 before they are averaged over the batch, and, with
# cross-entropy, from the softmax, which is within 2^-12. Inputs here are mostly below 2, and so are the factors by
# which a gradient passes through a layer: a gradient errs by less than 2^-11, a weight by lr times that a step. The
# usual error is a twentieth of it.
GRADIENT_BOUND = 2.0**-11
LR = 0.1

Loss = Callable[[Tensor, Tensor], Tensor]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x + self.second(self.first(x).relu())).relu() * 0.5)


torch.manual_seed(0)
MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "perceptron": (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), (6,)),
    "regression": (nn.Linear(6, 3), (6,)),
    "residual": (Residual(), (6,)),
    "tanh": (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), (6,)),
    "lenet": (
        nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 3, bias=False),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        (1, 8, 8),
    ),
    "strides, groups and averages": (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
            nn.ReLU(),
            nn.AvgPool2d(2, padding=1),
            nn.Conv2d(4, 2, 2, dilation=2),
            nn.Flatten(),
            nn.Linear(2, 3),
        ),
        (2, 7, 7),
    ),
}


def batch(name: str, count: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and class numbers."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *MODELS[name][1], generator=generator)
    return inputs, torch.randint(0, 3, (count,), generator=generator)


def trained_in_the_clear(
    model: nn.Module, loss: Loss, batches: list[tuple[Tensor, Tensor]], **settings: float
) -> tuple[nn.Module, list[float]]:
    model = copy.deepcopy(model)
    optimizer, losses = torch.optim.SGD(model.parameters(), **{"lr": LR, **settings}), []
    for inputs, labels in batches:
        optimizer.zero_grad()
        value = loss(model(inputs), labels)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return model, losses


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def one_hot_error(output: Tensor, labels: Tensor) -> Tensor:
    return functional.mse_loss(output, labels if labels.is_floating_point() else torch.eye(3)[labels])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loss", [functional.cross_entropy, one_hot_error])
def test_steps_on_shares_are_the_plaintext_steps(name: str, loss: Loss) -> None:
    model, batches = MODELS[name][0], [batch(name, seed=seed) for seed in range(3)]
    trainer = Cluster(prg()).trainer(model, loss, lr=LR)
    losses = [trainer.step(*one).reveal() for one in batches]
    expected, expected_losses = trained_in_the_clear(model, loss, batches)
    assert distance(expected, model) > 20 * LR * GRADIENT_BOUND
    assert distance(trainer.reveal(), expected) < len(batches) * LR * GRADIENT_BOUND
    assert losses == pytest.approx(expected_losses, abs=2.0**-10)
    shape = tuple(batches[0][0].shape)
    assert trainer.cost(shape) == trainer.counted()


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"weight_decay": 0.05},
        {"momentum": 0.5, "weight_decay": 0.01},
        {"momentum": 0.5, "nesterov": True},
    ],
)
def test_momentum_and_weight_decay(settings: dict[str, float]) -> None:
    model, batches = MODELS["perceptron"][0], [batch("perceptron", seed=seed) for seed in range(5)]
    trainer = Cluster(prg()).trainer(model, lr=LR, **settings)
    for one in batches:
        trainer.step(*one)
    expected, _ = trained_in_the_clear(model, functional.cross_entropy, batches, **settings)
    plain, _ = trained_in_the_clear(model, functional.cross_entropy, batches)
    bound = len(batches) * LR * GRADIENT_BOUND / (1 - settings.get("momentum", 0))
    assert distance(expected, plain) > 5 * bound
    assert distance(trainer.reveal(), expected) < bound


def adam_in_the_clear(model: nn.Module, batches: list[tuple[Tensor, Tensor]], optimizer: Adam) -> nn.Module:
    """The optimizer's own arithmetic in float64."""
    model = copy.deepcopy(model).double()
    state: dict[str, tuple[Tensor, ...]] = {
        name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()
    }
    for step, (inputs, labels) in enumerate(batches, 1):
        model.zero_grad()
        functional.cross_entropy(model(inputs.double()), labels).backward()
        numbers = tuple(torch.tensor(number) for number in optimizer.numbers(step))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                value, state[name] = optimizer.update(parameter, parameter.grad, state[name], numbers)
                parameter.copy_(value)
    return model


def test_adam() -> None:
    # With this epsilon no gradient is so small that its rounding would be divided by something smaller still.
    model, batches, optimizer = (
        MODELS["regression"][0],
        [batch("regression", seed=s) for s in range(4)],
        Adam(0.05, eps=0.01),
    )
    trainer = Cluster(prg()).trainer(model, optimizer=optimizer)
    for one in batches:
        trainer.step(*one)
    expected = adam_in_the_clear(model, batches, optimizer)
    assert distance(expected, model.double()) > 0.05
    model.float()
    assert distance(trainer.reveal(), expected) < len(batches) * 0.05 * 2.0**-6
    assert trainer.cost((8, 6)) == trainer.counted()


def test_adam_s_arithmetic_is_torch_s_where_epsilon_does_not_matter() -> None:
    model, batches = MODELS["regression"][0], [batch("regression", seed=seed) for seed in range(6)]
    reference = copy.deepcopy(model).double()
    optimizer = torch.optim.Adam(reference.parameters(), lr=0.05, eps=1e-12)
    for inputs, labels in batches:
        optimizer.zero_grad()
        functional.cross_entropy(reference(inputs.double()), labels).backward()
        optimizer.step()
    assert distance(adam_in_the_clear(model, batches, Adam(0.05)), reference) < 1e-5


@pytest.mark.parametrize("count", [1, 5, 12])
def test_batches_that_are_no_power_of_two(count: int) -> None:
    model, data = MODELS["perceptron"][0], batch("perceptron", count)
    trainer = Cluster(prg()).trainer(model, lr=LR)
    trainer.step(*data)
    expected, _ = trained_in_the_clear(model, functional.cross_entropy, [data])
    assert distance(trainer.reveal(), expected) < LR * GRADIENT_BOUND


def test_small_gradients_survive_a_large_batch() -> None:
    # Each item's share of the mean is about 2^-8 · 2^-9, below the smallest number that an activation can hold.
    model, count = nn.Linear(4, 1, bias=False), 512
    inputs = torch.full((count, 4), 2.0**-6)
    targets = model(inputs).detach() + 2.0**-3
    trainer = Cluster(prg()).trainer(model, functional.mse_loss, lr=1.0)
    trainer.step(inputs, targets)
    expected, _ = trained_in_the_clear(model, functional.mse_loss, [(inputs, targets)], lr=1.0)
    moved = distance(expected, model)
    assert 2.0**-9 < moved < 2.0**-7
    assert distance(trainer.reveal(), expected) < moved / 200


def test_what_is_not_trained_stays() -> None:
    model = copy.deepcopy(MODELS["perceptron"][0])
    first = model[0]
    assert isinstance(first, nn.Linear)
    first.weight.requires_grad_(False)
    trainer = Cluster(prg()).trainer(model, lr=LR)
    trainer.step(*batch("perceptron"))
    revealed = trainer.reveal()
    expected, _ = trained_in_the_clear(model, functional.cross_entropy, [batch("perceptron")])
    assert distance(revealed, expected) < LR * GRADIENT_BOUND
    assert (revealed[0].weight - first.weight).abs().max() <= 2.0**-25


def test_soft_labels() -> None:
    model, (inputs, _) = MODELS["regression"][0], batch("regression")
    labels = torch.tensor([[0.25, 0.5, 0.25]]).expand(8, 3)
    trainer = Cluster(prg()).trainer(model, lr=LR)
    trainer.step(inputs, labels)
    expected, _ = trained_in_the_clear(model, functional.cross_entropy, [(inputs, labels)])
    assert distance(trainer.reveal(), expected) < LR * GRADIENT_BOUND


def test_a_loss_with_constants_of_its_own() -> None:
    model, data = MODELS["regression"][0], batch("regression")
    weights = torch.tensor([0.5, 1.0, 2.0])

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        rows = labels if labels.is_floating_point() else torch.eye(3)[labels]
        return functional.cross_entropy(output * weights, rows, label_smoothing=0.25)

    trainer = Cluster(prg()).trainer(model, loss, lr=LR)
    value = trainer.step(*data).reveal()
    expected, (expected_value,) = trained_in_the_clear(model, loss, [data])
    assert distance(trainer.reveal(), expected) < LR * GRADIENT_BOUND
    assert value == pytest.approx(expected_value, abs=2.0**-10)
    assert trainer.cost((8, 6)) == trainer.counted()


def test_dealing_ahead_gives_the_same_step() -> None:
    model, data = MODELS["lenet"][0], batch("lenet")
    trainer = Cluster(prg()).trainer(model, lr=LR)
    trainer.deal((8, 1, 8, 8))
    trainer.deal((8, 1, 8, 8))
    for _ in range(3):
        trainer.step(*data)
    expected, _ = trained_in_the_clear(model, functional.cross_entropy, [data] * 3)
    assert distance(trainer.reveal(), expected) < 3 * LR * GRADIENT_BOUND


def test_weights_labels_and_gradients_are_opened_under_fresh_masks() -> None:
    recorder = Recorder()
    trainer = Cluster(prg(), recorder).trainer(MODELS["regression"][0], lr=LR)
    data = batch("regression")
    for _ in range(2):
        trainer.step(*data)
    opened = [value for values in recorder.opened() for value in values if value.dtype == torch.int64]
    words = torch.cat([value.flatten() for value in opened])
    assert len(words.unique()) == len(words)
    assert 0.4 < (words < 0).double().mean().item() < 0.6


def test_no_operand_is_opened_twice_in_a_step() -> None:
    trainer = Cluster(prg()).trainer(MODELS["lenet"][0], lr=LR)
    masks = [layer.name for layer in trainer.cost((8, 1, 8, 8)).layers if layer.operator == "tacit.mask"]
    # The input, three weights, two activations and the gradients of three outputs; the labels and log-softmax.
    assert len(masks) == len(set(masks)) == 11


@pytest.mark.parametrize("optimizer", [Sgd(LR, momentum=0.9), Adam(0.05)])
def test_training_goes_on_from_a_checkpoint(optimizer: Any, tmp_path: Path) -> None:
    model, data = MODELS["regression"][0], batch("regression")
    trainer = Cluster(prg(1)).trainer(model, optimizer=optimizer)
    trainer.step(*data)
    trainer.save(tmp_path)
    resumed = Cluster(prg(2)).trainer(copy.deepcopy(model), optimizer=optimizer)
    resumed.load(tmp_path)
    assert resumed.steps == 1
    assert distance(resumed.reveal(), trainer.reveal()) == 0
    trainer.step(*data)
    resumed.step(*data)
    # Truncation rounds up or down by chance, and the two have fresh randomness.
    assert distance(resumed.reveal(), trainer.reveal()) < 0.05 * 2.0**-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alice.safetensors", "bob.safetensors"]


def test_a_checkpoint_file_alone_tells_nothing(tmp_path: Path) -> None:
    model = nn.Linear(100, 100)
    nn.init.zeros_(model.weight)
    Cluster(prg()).trainer(model).save(tmp_path)
    for name in ("alice", "bob"):
        content = torch.frombuffer(
            bytearray((tmp_path / f"{name}.safetensors").read_bytes()[-80_000:]), dtype=torch.int64
        )
        assert 0.47 < (content < 0).double().mean().item() < 0.53


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, data = MODELS["regression"][0], batch("regression")
    trainer = Cluster(prg()).trainer(model)
    with pytest.raises(DataError, match="does not exist"):
        trainer.load(tmp_path)
    trainer.save(tmp_path)
    with pytest.raises(DataError, match="has program"):
        Cluster(prg()).trainer(model, momentum=0.5).load(tmp_path)
    with pytest.raises(DataError, match="does not hold the tensors"):
        Cluster(prg()).trainer(nn.Linear(5, 3)).load(tmp_path)
    alice = tmp_path / "alice.safetensors"
    before = alice.read_bytes()
    trainer.step(*data)
    trainer.save(tmp_path)
    alice.write_bytes(before)
    with pytest.raises(DataError, match="step 0 and bob's from step 1"):
        trainer.load(tmp_path)
    (tmp_path / "bob.safetensors").write_bytes(before)
    with pytest.raises(DataError, match="has role 'alice', not 'bob'"):
        trainer.load(tmp_path)
    alice.write_bytes(before[:100])
    with pytest.raises(DataError, match="not a readable checkpoint"):
        trainer.load(tmp_path)
    assert trainer.steps == 1


def dealt_by(trainer: Trainer) -> str:
    return repr(trainer._trio.provider)


@pytest.mark.parametrize(
    ("inputs", "labels", "error", "message"),
    [
        (torch.full((2, 6), torch.nan), torch.tensor([0, 1]), RangeError, "input holds NaN"),
        (torch.full((2, 6), 1e5), torch.tensor([0, 1]), RangeError, "outside"),
        (torch.zeros(0, 6), torch.zeros(0, dtype=torch.long), InputError, "empty batch"),
        (torch.zeros(2, 5), torch.tensor([0, 1]), InputError, "does not take inputs of shape"),
        (torch.zeros(2, 6, dtype=torch.complex64), torch.tensor([0, 1]), InputError, "complex64"),
        ([0.0] * 6, torch.tensor([0, 1]), InputError, "the input is a list"),
        (torch.zeros(2, 6), torch.tensor([0, 3]), InputError, "out of range: the model's output has 3 classes"),
        (torch.zeros(2, 6), torch.tensor([0, -1]), InputError, "out of range"),
        (torch.zeros(2, 6), torch.tensor([0]), InputError, "do not fit the model's output"),
        (torch.zeros(2, 6), torch.zeros(2, 4), InputError, "do not fit the model's output"),
        (torch.zeros(2, 6), [0, 1], InputError, "the labels are a list"),
        (torch.zeros(2, 6), torch.full((2, 3), torch.nan), InputError, "sum to one"),
        (torch.zeros(2, 6), torch.full((2, 3), 0.5), InputError, "sum to one"),
        (torch.zeros(2, 6), torch.zeros(2, 3, dtype=torch.complex64), InputError, "labels have dtype"),
    ],
)
def test_bad_batches_are_refused_before_anything_is_dealt(
    inputs: Any, labels: Any, error: type[Exception], message: str
) -> None:
    trainer = Cluster(prg()).trainer(MODELS["perceptron"][0])
    before, weights = dealt_by(trainer), trainer.reveal()
    with pytest.raises(error, match=message) as caught:
        trainer.step(inputs, labels)
    assert "\n" not in str(caught.value)
    assert dealt_by(trainer) == before
    assert trainer.steps == 0
    assert distance(trainer.reveal(), weights) == 0
    trainer.step(*batch("perceptron"))


def test_statistics_that_follow_a_count_of_steps_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 3))
    trainer = Cluster(prg()).trainer(model)
    before = dealt_by(trainer)
    with pytest.raises(InputError, match="item"):
        trainer.step(*batch("perceptron"))
    assert dealt_by(trainer) == before


def test_settings_and_models_that_cannot_be_trained() -> None:
    parties, model = Cluster(prg()), MODELS["regression"][0]
    for settings in ({"lr": 0.0}, {"lr": float("nan")}, {"momentum": 1.0}, {"weight_decay": -1.0}):
        with pytest.raises(InputError, match=next(iter(settings))):
            parties.trainer(model, **settings)
    with pytest.raises(InputError, match="nesterov is set, but momentum is 0"):
        parties.trainer(model, nesterov=True)
    with pytest.raises(InputError, match="eps"):
        Adam(eps=1e-8)
    with pytest.raises(InputError, match="settings belong to the optimizer"):
        parties.trainer(model, optimizer=Sgd(), lr=0.1)
    with pytest.raises(InputError, match="nothing to train"):
        parties.trainer(nn.ReLU())
    large = nn.Linear(2, 2)
    nn.init.constant_(large.weight, 100.0)
    with pytest.raises(RangeError, match="weight of Linear"):
        parties.trainer(large)


def test_a_failure_leaves_the_weights_and_no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(role: Any, step: Any) -> None:
        raise ConnectionError

    trainer = Cluster(prg(), broken).trainer(MODELS["regression"][0])
    weights = trainer.reveal()
    with pytest.raises(ConnectionError):
        trainer.step(*batch("regression"))
    assert not trainer._trio.provider.step_masks
    assert distance(trainer.reveal(), weights) == 0
    assert trainer.steps == 0


def test_nothing_prints_a_secret() -> None:
    trainer = Cluster(prg()).trainer(MODELS["regression"][0])
    loss = trainer.step(*batch("regression"))
    assert repr(loss) == "SharedLoss(shared by alice and bob)"
    assert repr(trainer).startswith("Trainer(Linear, Sgd(lr=0.1")


def test_what_is_revealed_goes_to_whom_it_is_revealed() -> None:
    recorder = Recorder()
    parties = Cluster(prg(), recorder)
    trainer = parties.trainer(MODELS["regression"][0], lr=LR)
    loss = trainer.step(*batch("regression"))
    for party, role, other in ((parties.alice, Role.ALICE, Role.BOB), (parties.bob, Role.BOB, Role.ALICE)):
        for reveal, sizes in ((loss.reveal, [1]), (trainer.reveal, [18, 3])):
            before = {one: len(sent) for one, sent in recorder.sent.items()}
            reveal(to=party)
            assert len(recorder.sent[role]) == before[role]
            assert [value.numel() for value in recorder.sent[other][before[other]]] == sizes
    assert loss.reveal(to=parties.alice) == loss.reveal()
    for stranger in (parties.provider, Cluster(prg(1)).alice, "alice"):
        for reveal in (loss.reveal, trainer.reveal):
            with pytest.raises(InputError, match="alice or bob of this cluster"):
                reveal(to=stranger)


def test_an_empty_batch_has_no_cost() -> None:
    with pytest.raises(InputError, match="empty batch"):
        Cluster(prg()).trainer(MODELS["regression"][0]).cost((0, 6))


def test_nothing_counted_before_the_first_step() -> None:
    with pytest.raises(InputError, match="call step first"):
        Cluster(prg()).trainer(MODELS["regression"][0]).counted()
