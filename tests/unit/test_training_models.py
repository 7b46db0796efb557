"""Training on shares of the models that people train: norms, activations, attention, recurrence, tables, dropout."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine import Recorder, prg
from tacit.cluster import Cluster
from tacit.errors import InputError, UnsupportedOperator
from tacit.mpc.coin import kept
from tacit.program.optimizers import Adam

# A gradient's error comes from rounding to 2^-16 and from functions that are within 2^-12 (a root's relative error is
# 2^-12.5): less than 2^-11 where factors are about 1, as they are here. A weight is off by lr times that a step. The
# usual error is a twentieth of it, and running statistics are closer still.
GRADIENT_BOUND = 2.0**-11
LR, STEPS = 0.1, 3


class Tokens(nn.Module):
    """Two of torch's own encoder layers over private tokens, with a padding token."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(5, 8) * 0.1)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.positions).mean(1))


class Sequence(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


torch.manual_seed(0)
IMAGE, ROW = (2, 8, 8), (6,)
TOKENS = "tokens"
MODELS: dict[str, tuple[nn.Module, tuple[int, ...] | str]] = {
    "vgg with batch norm": (
        nn.Sequential(
            *block(2, 4), nn.MaxPool2d(2), *block(4, 6), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 8),
            nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3),
        ),
        IMAGE,
    ),
    "batch norm that keeps nothing": (
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False, track_running_stats=False), nn.Linear(6, 3)),
        ROW,
    ),
    "batch norm that is frozen": (nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval(), ROW),
    "group, instance and layer norm": (
        nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True),
            nn.Flatten(), nn.Linear(64, 6), nn.LayerNorm(6), nn.Linear(6, 3),
        ),
        IMAGE,
    ),
    "activations": (
        nn.Sequential(
            nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6), nn.ELU(), nn.LeakyReLU(),
            nn.Hardswish(), nn.Linear(6, 6), nn.ReLU6(), nn.Softplus(), nn.Sigmoid(), nn.Tanh(), nn.Linear(6, 6),
            nn.Softmax(1), nn.Linear(6, 6), nn.LogSigmoid(), nn.Linear(6, 3),
        ),
        ROW,
    ),
    "averages": (
        nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2, 1, 1, count_include_pad=False),
            nn.AvgPool2d(4, ceil_mode=True, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3),
        ),
        IMAGE,
    ),
    "upwards": (
        nn.Sequential(
            nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2), nn.Conv2d(4, 1, 3, 2),
            nn.Upsample(scale_factor=2), nn.Conv2d(1, 2, 3, 3), nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Flatten(), nn.Linear(128, 3),
        ),
        IMAGE,
    ),
    "transformer": (Tokens(), TOKENS),
    "transformer, norm first, gelu": (Tokens(norm_first=True, activation="gelu"), TOKENS),
    "lstm": (Sequence(nn.LSTM), (4, 4)),
    "gru": (Sequence(nn.GRU), (4, 4)),
}  # fmt: skip


def batch(name: str, seed: int, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = MODELS[name][1]
    if isinstance(shape, str):
        inputs = torch.randint(0, 11, (count, 5), generator=generator)
    else:
        inputs = torch.randn(count, *shape, generator=generator)
    return inputs, torch.randint(0, 3, (count,), generator=generator)


def distance(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of parameters and of running statistics."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs if a.is_floating_point())


@pytest.mark.parametrize("name", MODELS)
def test_steps_on_shares_are_the_plaintext_steps(name: str) -> None:
    model = MODELS[name][0]
    expected, trainer = copy.deepcopy(model), Cluster(prg()).trainer(model, lr=LR, momentum=0.5)
    optimizer = torch.optim.SGD(expected.parameters(), lr=LR, momentum=0.5)
    # Seeds for which no ReLU's input and no two elements that pooling compares are within 2^-16 of a tie.
    for seed in range(5, 5 + STEPS):
        inputs, labels = batch(name, seed)
        optimizer.zero_grad()
        loss = functional.cross_entropy(expected(inputs), labels)
        loss.backward()
        optimizer.step()
        assert trainer.step(inputs, labels).reveal() == pytest.approx(loss.item(), abs=2.0**-10)
    assert distance(expected, model) > 20 * LR * GRADIENT_BOUND
    assert distance(trainer.reveal(), expected) < 2 * STEPS * LR * GRADIENT_BOUND
    assert trainer.cost(tuple(inputs.shape)) == trainer.counted()


@pytest.mark.parametrize(
    ("loss", "module"),
    [
        (functional.binary_cross_entropy_with_logits, nn.Linear(13, 1)),
        (functional.binary_cross_entropy, nn.Sequential(nn.Linear(13, 1), nn.Sigmoid())),
        (functional.smooth_l1_loss, nn.Linear(13, 1)),
        (functional.huber_loss, nn.Linear(13, 1)),
        (functional.l1_loss, nn.Linear(13, 1)),
    ],
)
def test_logistic_and_other_regressions(loss: Callable[[Tensor, Tensor], Tensor], module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(16, 13, generator=generator), torch.randint(0, 2, (16, 1), generator=generator).float()
    trainer, expected = Cluster(prg()).trainer(module, loss, lr=LR), copy.deepcopy(module)
    value = loss(expected(inputs), labels)
    value.backward()
    torch.optim.SGD(expected.parameters(), lr=LR).step()
    assert trainer.step(inputs, labels).reveal() == pytest.approx(value.item(), abs=2.0**-10)
    assert distance(expected, module) > 5 * LR * GRADIENT_BOUND
    assert distance(trainer.reveal(), expected) < LR * GRADIENT_BOUND


def test_adam_trains_norms_and_tables() -> None:
    name = "transformer"
    trainer = Cluster(prg()).trainer(MODELS[name][0], optimizer=Adam(0.01, eps=0.01))
    losses = [trainer.step(*batch(name, 0)).reveal() for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert trainer.cost((6, 5)) == trainer.counted()


class Dropped(nn.Module):
    """Dropout, as a mask that this module also returns: the loss lets it out."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 400), nn.Dropout(chance)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x))


@pytest.mark.parametrize("chance", [0.25, 0.5, 0.9])
def test_dropout_drops_and_scales_with_the_chance_that_it_has(chance: float) -> None:
    model = Dropped(chance)
    with torch.no_grad():
        model.linear.weight.zero_()
        model.linear.bias.fill_(1.0)
    trainer = Cluster(prg()).trainer(model, lambda output, ones: (output * ones).sum(), lr=2.0**-8)
    kept_counts = []
    for _ in range(2):
        before = trainer.reveal().linear.bias.detach()
        trainer.step(torch.zeros(1, 6), torch.ones(1, 400))
        moved = (before - trainer.reveal().linear.bias.detach()) * 2**8
        kept_ones = moved > 0.5 / (1 - chance)
        torch.testing.assert_close(moved, kept_ones.float() / (1 - chance), atol=2.0**-8, rtol=2.0**-13)
        kept_counts.append(kept_ones)
    rate = torch.cat(kept_counts).float().mean().item()
    assert rate == pytest.approx(1 - chance, abs=5 * (chance * (1 - chance) / 800) ** 0.5)
    assert not torch.equal(*kept_counts)
    assert trainer.cost((1, 6)) == trainer.counted()


def test_dropout_s_masks_come_from_one_public_seed_a_step() -> None:
    recorder = Recorder()
    model = nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.5), nn.Linear(40, 40), nn.Dropout(0.5), nn.Linear(40, 3))
    trainer = Cluster(prg(), recorder).trainer(model, lr=LR)
    for _ in range(2):
        trainer.step(*batch("activations", 0))
    seeds = [
        value
        for labels, values in zip(recorder.labels, recorder.opened(), strict=True)
        for label, value in zip(labels, values, strict=True)
        if label == "dropout_seed"
    ]
    assert [tuple(seed.shape) for seed in seeds] == [(2,), (2,)]
    assert not torch.equal(*seeds)
    masks = [kept(seed, name, (1000,), 0.5) for seed in seeds for name in ("one", "other")]
    assert torch.equal(masks[0], kept(seeds[0], "one", (1000,), 0.5))
    agreement = torch.stack([(a == b).float().mean() for i, a in enumerate(masks) for b in masks[:i]])
    assert bool(((agreement > 0.4) & (agreement < 0.6)).all())


def test_whole_numbers_are_asked_for_where_a_table_takes_them() -> None:
    trainer = Cluster(prg()).trainer(Tokens(), lr=LR)
    with pytest.raises(InputError, match="takes whole numbers"):
        trainer.step(torch.zeros(2, 5), torch.tensor([0, 1]))
    trainer.step(torch.zeros(2, 5, dtype=torch.int32), torch.tensor([0, 1]))
    assert trainer.steps == 1


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.Unflatten(1, (1, 2, 3)), "adaptive_max_pool2d"),
        (nn.RReLU(), "rrelu"),
        (nn.CELU(2.0), "elu"),
    ],
)
def test_what_has_no_gradient_here_is_refused_by_name(layer: nn.Module, named: str) -> None:
    after = nn.AdaptiveMaxPool2d((1, 3)) if isinstance(layer, nn.Unflatten) else nn.Identity()
    model = nn.Sequential(nn.Linear(6, 6), layer, after, nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(2, 6))
    trainer = Cluster(prg()).trainer(model)
    before = repr(trainer._trio.provider)
    with pytest.raises(UnsupportedOperator, match=named):
        trainer.step(torch.zeros(2, 6), torch.tensor([0, 1]))
    assert repr(trainer._trio.provider) == before
