"""Autograd, modules and optimizers on private tensors: what PyTorch does with plain ones, operator by operator."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tacit
from engine import UNIT, prg, shared
from tacit.cluster import Cluster
from tacit.errors import InputError, UnsupportedOperator
from tacit.mpc.lockstep import Meter, Trio, plan
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol, Role
from tacit.program.lowering import gradients
from tacit.program.lowering.gradients import Fine
from tacit.tensor import PrivateTensor, share_module

# Gradients are kept to 2^-24, activations to 2^-16 and a softmax to 2^-11. Inputs here are mostly below 2, and so are
# the factors by which a gradient passes through a layer: a gradient of a mean over 8 items errs by less than 2^-11, a
# weight by lr times that a step. The usual error is a hundredth of it.
GRADIENT_BOUND = 2.0**-11
LR = 0.1
CLASSES = 3


@pytest.fixture
def parties() -> Cluster:
    return Cluster(prg())


def hidden(parties: Cluster, values: Tensor) -> PrivateTensor:
    """The values, rounded to 2^-16, as a private tensor."""
    fixed = tacit.tensor(values).fix_prec(precision=16, base=2)
    return fixed.share(parties.alice, parties.bob, crypto_provider=parties.provider)


def private(parties: Cluster, module: nn.Module) -> nn.Module:
    return share_module(module, parties.alice, parties.bob, crypto_provider=parties.provider)


def revealed(value: Tensor | None) -> Tensor:
    assert isinstance(value, PrivateTensor)
    return value.get().float_prec()


def distance(shares: nn.Module, plain: nn.Module) -> float:
    pairs = zip(shares.parameters(), plain.parameters(), strict=True)
    return max((revealed(one) - other.detach()).abs().max().item() for one, other in pairs)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02, eps=2.0**-8),
    "Adam, decayed, over lists": lambda p: torch.optim.Adam(p, lr=0.02, eps=2.0**-8, weight_decay=0.01, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, eps=2.0**-8),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02, eps=2.0**-8),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.02),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.002, eps=2.0**-8),
    "RMSprop, centred, momentum": lambda p: torch.optim.RMSprop(p, lr=0.002, eps=2.0**-8, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, eps=2.0**-8),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, eps=2.0**-16),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.02),
}

torch.manual_seed(0)
MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "perceptron": (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(True), nn.Linear(5, 3)), (6,)),
    "lenet": (
        nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2)
        ).append(nn.Flatten()).append(nn.Linear(4, 3)),
        (1, 8, 8),
    ),
    "strides, groups, overlaps and curves": (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, bias=False), nn.MaxPool2d(3, 2, 1), nn.Tanh(),
            nn.Flatten(), nn.Linear(16, 4), nn.Sigmoid(), nn.Linear(4, 3),
        ),
        (2, 7, 7),
    ),
    "norms": (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3)), (6,)),
}  # fmt: skip


def batch(name: str, seed: int, count: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs and one-hot targets."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *MODELS[name][1], generator=generator)
    return inputs, torch.eye(CLASSES)[torch.randint(0, CLASSES, (count,), generator=generator)]


class TestTraining:
    @pytest.mark.parametrize("name", MODELS)
    def test_steps_on_private_data_labels_and_weights_are_the_plaintext_steps(
        self, name: str, parties: Cluster
    ) -> None:
        plain = copy.deepcopy(MODELS[name][0])
        shares = private(parties, plain)
        settings = {"lr": LR, "momentum": 0.9, "weight_decay": 0.01}
        optimizers = [torch.optim.SGD(model.parameters(), **settings) for model in (plain, shares)]
        for step in range(3):
            inputs, targets = batch(name, step)
            for optimizer in optimizers:
                optimizer.zero_grad()
            expected = functional.cross_entropy(plain(inputs), targets)
            loss = functional.cross_entropy(shares(hidden(parties, inputs)), hidden(parties, targets))
            expected.backward()
            loss.backward()
            for one, other in zip(shares.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(revealed(one.grad), other.grad, atol=(step + 1) * GRADIENT_BOUND, rtol=0)
            for optimizer in optimizers:
                optimizer.step()
            assert revealed(loss).item() == pytest.approx(expected.item(), abs=2.0**-10)
        assert distance(private(parties, MODELS[name][0]), plain) > 20 * LR * GRADIENT_BOUND
        # With momentum a gradient's error enters three steps.
        assert distance(shares, plain) < 6 * LR * GRADIENT_BOUND

    @pytest.mark.parametrize("settings", [{"foreach": True}, {"foreach": False, "nesterov": True, "momentum": 0.5}])
    def test_other_ways_of_sgd(self, settings: dict[str, float], parties: Cluster) -> None:
        plain, (inputs, targets) = copy.deepcopy(MODELS["perceptron"][0]), batch("perceptron", 1)
        shares = private(parties, plain)
        for model, data in ((plain, inputs), (shares, hidden(parties, inputs))):
            optimizer = torch.optim.SGD(model.parameters(), lr=LR, **settings)
            for _ in range(2):
                optimizer.zero_grad(set_to_none=False)
                functional.mse_loss(model(data), targets).backward()
                optimizer.step()
        assert distance(shares, plain) < 2 * LR * GRADIENT_BOUND

    def test_the_loss_written_out_and_labels_that_are_public(self, parties: Cluster) -> None:
        inputs, targets = batch("perceptron", 2)
        losses: list[Callable[[Tensor], Tensor]] = [
            lambda logits: -(hidden(parties, targets) * logits.log_softmax(1)).sum(1).mean(),
            lambda logits: functional.cross_entropy(logits, targets),
            lambda logits: functional.cross_entropy(logits, targets.argmax(1)),
        ]
        plain = copy.deepcopy(MODELS["perceptron"][0])
        functional.cross_entropy(plain(inputs), targets).backward()
        for loss in losses:
            shares = private(parties, plain)
            loss(shares(inputs)).backward()
            for one, other in zip(shares.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(revealed(one.grad), other.grad, atol=GRADIENT_BOUND, rtol=0)

    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_other_optimizers_as_they_stand(self, make: Callable[..., torch.optim.Optimizer], parties: Cluster) -> None:
        plain = copy.deepcopy(MODELS["perceptron"][0])
        shares, steps = private(parties, plain), 4
        optimizers = [make(model.parameters()) for model in (plain, shares)]
        for step in range(steps):
            inputs, targets = batch("perceptron", step)
            for optimizer, model, *data in (
                (optimizers[0], plain, inputs, targets),
                (optimizers[1], shares, hidden(parties, inputs), hidden(parties, targets)),
            ):
                optimizer.zero_grad()
                functional.cross_entropy(model(data[0]), data[1]).backward()
                optimizer.step()
        moved = distance(private(parties, MODELS["perceptron"][0]), plain)
        # An update's relative error: a root's and a quotient's, and that of a gradient beside eps.
        assert distance(shares, plain) < min(moved / 50, steps * 0.02 * 2.0**-6)

    def test_small_gradients_move_weights_less_and_none_moves_none(self, parties: Cluster) -> None:
        layer = nn.Linear(3, 1, bias=False)
        shares = private(parties, layer)
        before = revealed(shares.weight)
        optimizer = torch.optim.Adam(shares.parameters(), lr=0.01)
        shares(hidden(parties, torch.tensor([[0.0, 2.0**-16, 1.0]]))).sum().backward()
        optimizer.step()
        moved = (before - revealed(shares.weight)).flatten()
        assert moved[0].abs() < 0.01 * 2.0**-5
        assert -0.001 < moved[1] < 0.011
        assert moved[2] == pytest.approx(0.01, rel=2.0**-9)

    @pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}, {"momentum": 0.5, "weight_decay": 0.25}])
    def test_eager_and_traced_steps_agree_to_one_unit(self, settings: dict[str, float], parties: Cluster) -> None:
        """Values so coarse that all products are exact: what is left is one truncation, with two possible outcomes."""
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 4), nn.ReLU(), nn.Linear(4, 2)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter * 4).round() / 4)
        generator = torch.Generator().manual_seed(2)
        inputs = torch.randint(-2, 3, (4, 1, 8, 8), generator=generator) / 2
        targets = torch.randint(-4, 5, (4, 2), generator=generator) / 4
        trainer = parties.trainer(model, functional.mse_loss, lr=0.125, **settings)
        trainer.step(inputs, targets)
        shares = private(parties, model)
        optimizer = torch.optim.SGD(shares.parameters(), lr=0.125, **settings)
        functional.mse_loss(shares(hidden(parties, inputs)), hidden(parties, targets)).backward()
        optimizer.step()
        traced = list(trainer.reveal().parameters())
        assert max((a - b).abs().max().item() for a, b in zip(traced, model.parameters(), strict=True)) > 2.0**-10
        units = [
            (one - revealed(other)).abs().max().item() * 2**24
            for one, other in zip(traced, shares.parameters(), strict=True)
        ]
        assert max(units) <= 1.01

    @pytest.mark.parametrize(
        "optimizer", [lambda p: torch.optim.Adam(p, amsgrad=True), torch.optim.Adamax, torch.optim.Rprop]
    )
    def test_optimizers_that_compare_are_refused_by_name(
        self, optimizer: Callable[..., torch.optim.Optimizer], parties: Cluster
    ) -> None:
        shares = private(parties, nn.Linear(2, 1))
        steps = optimizer(shares.parameters())
        shares(hidden(parties, torch.ones(1, 2))).sum().backward()
        with pytest.raises(UnsupportedOperator, match=r"aten\.(maximum|index_put)\.\w+ at test_eager.py:\d+"):
            steps.step()


IMAGES = torch.linspace(-2, 2, 144).mul(12.9898).sin().reshape(2, 2, 6, 6)
ROWS = torch.linspace(-2, 2, 12).mul(7.1).sin().reshape(3, 4) * 2
OPERATORS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "matrix products": (lambda x: x @ x.T @ torch.ones(3, 2), ROWS),
    "means and sums": (lambda x: x.mean(0) * x.sum(1, keepdim=True), ROWS),
    "softmax": (lambda x: x.softmax(1) * torch.arange(4), ROWS),
    "gelu and silu": (lambda x: functional.gelu(x) + functional.silu(x), ROWS),
    "threshold of an input": (lambda x: functional.leaky_relu(x) * functional.hardtanh(x), ROWS),
    "division and roots": (lambda x: x / (x * x + 1).sqrt(), ROWS),
    "views": (lambda x: torch.cat([x[1:, ::2].T, x[0, :2].unsqueeze(1) * 2], 1).flatten() ** 2, ROWS),
    "public positions": (lambda x: x[[0, 2, 2]].gather(1, torch.tensor([[0], [1], [1]])) * 3, ROWS),
    "where": (lambda x: torch.where(x > 0, x, x * x), ROWS),
    "overlapping maxima": (lambda x: functional.max_pool2d(x, 3, 1, 1, ceil_mode=True) * 2, IMAGES),
    "adaptive maxima": (lambda x: functional.adaptive_max_pool2d(x, 3) * 2, IMAGES),
    "adaptive averages": (lambda x: functional.adaptive_avg_pool2d(x, 2) ** 2, IMAGES),
    "one dimension": (lambda x: functional.max_pool1d(functional.conv1d(x[:, :, 0], torch.ones(3, 2, 3)), 2), IMAGES),
    "dilation": (lambda x: functional.conv2d(x, torch.ones(2, 2, 2, 2), dilation=2, stride=2), IMAGES),
    "upsampling": (lambda x: functional.interpolate(x, scale_factor=2) ** 2, IMAGES),
    "smooth upsampling": (lambda x: functional.interpolate(x, scale_factor=2, mode="bilinear") ** 2, IMAGES),
    "transposed": (lambda x: functional.conv_transpose2d(x, torch.ones(2, 1, 3, 3), stride=2, groups=2) ** 2, IMAGES),
    "averages beyond the edge": (lambda x: functional.avg_pool2d(x, 4, 3, 1, True, False) ** 2, IMAGES),
    "layer norm": (lambda x: functional.layer_norm(x, (4,)) * torch.arange(4), ROWS),
    "group norm": (lambda x: functional.group_norm(x, 2) * torch.arange(6), IMAGES),
}


class TestGradients:
    @pytest.mark.parametrize("name", OPERATORS)
    def test_of_operators(self, name: str, parties: Cluster) -> None:
        function, values = OPERATORS[name]
        plain, x = values.clone().requires_grad_(), hidden(parties, values).requires_grad_()
        weights = torch.linspace(0.5, 1.5, function(values).numel()).view(function(values).shape)
        (function(plain) * weights).mean().backward()
        (function(x) * weights).mean().backward()
        torch.testing.assert_close(revealed(x.grad), plain.grad, atol=GRADIENT_BOUND, rtol=0)

    def test_pooling_gives_private_indices(self, parties: Cluster) -> None:
        x = hidden(parties, IMAGES).requires_grad_()
        for window in ((2,), (3, 2, 1)):
            found = functional.max_pool2d(x, *window, return_indices=True)
            expected = functional.max_pool2d(IMAGES, *window, return_indices=True)
            assert torch.equal(revealed(found[1]).long(), expected[1])
            torch.testing.assert_close(revealed(found[0]), expected[0], atol=2 * UNIT, rtol=0)

    def test_they_accumulate_and_are_cleared(self, parties: Cluster) -> None:
        x = hidden(parties, ROWS).requires_grad_()
        for times in (1, 2, 3):
            x.sum().backward()
            assert torch.equal(revealed(x.grad), torch.full((3, 4), float(times)))
        assert x.grad is not None
        x.grad.zero_()
        (x * 2).sum().backward()
        assert torch.equal(revealed(x.grad), torch.full((3, 4), 2.0))

    def test_of_two_paths_and_of_a_second_pass(self, parties: Cluster) -> None:
        x = hidden(parties, ROWS).requires_grad_()
        total = (x.relu() + x.T.reshape(3, 4)).sum()
        total.backward(retain_graph=True)
        total.backward()
        assert torch.equal(revealed(x.grad), 2 * ((ROWS > 0).float() + 1))

    def test_plain_weights_get_private_gradients_that_a_plain_weight_cannot_take(self, parties: Cluster) -> None:
        layer, copied = nn.Linear(4, 2), nn.Linear(4, 2)
        copied.load_state_dict(layer.state_dict())
        layer(hidden(parties, ROWS)).sum().backward()
        copied(ROWS).sum().backward()
        torch.testing.assert_close(revealed(layer.weight.grad), copied.weight.grad, atol=GRADIENT_BOUND, rtol=0)
        with pytest.raises(InputError, match=r"test_eager.py:\d+: a plain tensor cannot take a private value"):
            torch.optim.SGD(layer.parameters(), lr=LR).step()

    def test_none_without_grad_mode(self, parties: Cluster) -> None:
        x = hidden(parties, ROWS).requires_grad_()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                y = x.relu() * 2
            assert not y.requires_grad
            torch.testing.assert_close(revealed(y), ROWS.relu() * 2, atol=2 * UNIT, rtol=0)

    @pytest.mark.parametrize(
        ("call", "operator"),
        [
            (lambda x: x.max(3).values, "aten.scatter.src"),
            (lambda x: functional.threshold(x.relu(), 1.0, 0.0), "aten.threshold_backward.default"),
        ],
    )
    def test_what_has_no_encrypted_form_is_refused_by_name(
        self, call: Callable[[Tensor], Tensor], operator: str, parties: Cluster
    ) -> None:
        x = hidden(parties, IMAGES).requires_grad_()
        result = call(x).sum()
        with pytest.raises(UnsupportedOperator) as error:
            result.backward()
        assert operator in str(error.value)
        assert "test_eager.py:" in str(error.value)
        x.relu().sum().backward()
        assert torch.equal(revealed(x.grad), (IMAGES > 0).float())


class TestInPlace:
    def test_views_and_aliases_follow(self, parties: Cluster) -> None:
        x, plain = hidden(parties, ROWS), hidden(parties, ROWS).get().float_prec()
        pairs = [(t, t.T, t[1], t.detach(), t.flatten()[2:5]) for t in (x, plain)]
        for t, _, row, alias, part in pairs:
            t.mul_(2).add_(1)
            row.zero_()
            part.copy_(torch.tensor([1.0, 2.0, 3.0]))
            alias.sub_(0.5)
            t[2] = 7.0
            t[:, torch.tensor([3])] = t[:, :1]
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(revealed(one), other, atol=4 * UNIT, rtol=0)

    @pytest.mark.parametrize("copied", [torch.clone, lambda x: x * 1, lambda x: x * 2, lambda x: x.to(torch.float64)])
    def test_results_are_nobody_else_s(self, copied: Callable[[Tensor], Tensor], parties: Cluster) -> None:
        x = hidden(parties, ROWS)
        copied(x).zero_()
        assert torch.equal(revealed(x), hidden(parties, ROWS).get().float_prec())

    def test_autograd_finds_a_value_changed_that_it_needs(self, parties: Cluster) -> None:
        x = hidden(parties, ROWS).requires_grad_()
        y = x.sigmoid()
        total = y.sum()
        y.detach().zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()

    def test_a_fraction_does_not_go_into_whole_numbers(self, parties: Cluster) -> None:
        with pytest.raises(UnsupportedOperator, match="holds 0 fractional bits: make a new one"):
            (hidden(parties, ROWS) > 0).add_(hidden(parties, ROWS))

    def test_tensors_of_other_parties_stay_out(self, parties: Cluster) -> None:
        with pytest.raises(InputError, match="different parties"):
            hidden(parties, ROWS).copy_(hidden(Cluster(prg(1)), ROWS))


class TestModules:
    def test_a_shared_module_is_a_copy_with_the_same_ties(self, parties: Cluster) -> None:
        plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        plain[2].weight = plain[0].weight
        plain[1].bias.requires_grad_(False)
        shares = private(parties, plain)
        assert not any(isinstance(value, PrivateTensor) for value in plain.state_dict().values())
        assert shares[2].weight is shares[0].weight
        assert [value.requires_grad for value in shares.parameters()] == [p.requires_grad for p in plain.parameters()]
        for name, value in plain.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(revealed(shares.state_dict()[name]), value, atol=2.0**-24, rtol=0)

    def test_a_copy_is_apart_from_its_original(self, parties: Cluster) -> None:
        plain, shares = nn.Linear(3, 2), private(parties, nn.Linear(3, 2))
        shares.load_state_dict(plain.state_dict())
        twin = copy.deepcopy(shares)
        assert all(isinstance(value, nn.Parameter) and value.requires_grad for value in twin.parameters())
        shares.load_state_dict(nn.Linear(3, 2).state_dict())
        assert distance(twin, plain) <= 2.0**-24

    def test_its_state_goes_back_into_a_plain_one_and_comes_from_one(self, parties: Cluster) -> None:
        plain, shares = nn.Linear(3, 2), private(parties, nn.Linear(3, 2))
        shares.load_state_dict(plain.state_dict())
        assert distance(shares, plain) <= 2.0**-24
        other = nn.Linear(3, 2)
        other.load_state_dict({name: revealed(value) for name, value in shares.state_dict().items()})
        assert distance(shares, other) == 0

    @pytest.mark.parametrize(
        "module",
        [
            nn.Linear(6, 4), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1),
            nn.AvgPool2d(2), nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        ],
        ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize("recording", [False, True])
    def test_eager_and_traced_agree_to_one_unit(self, module: nn.Module, recording: bool, parties: Cluster) -> None:
        """One truncation at most, whose two outcomes are one unit of 2^-16 apart; products and poolings are exact."""
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_((parameter * 256).round() / 256)
        traced = parties.encrypt(module, IMAGES)(IMAGES)
        with torch.set_grad_enabled(recording):
            eager = revealed(private(parties, module)(hidden(parties, IMAGES).requires_grad_()))
        assert (traced - eager).abs().max().item() <= 1.01 * UNIT

    def test_nothing_prints_and_no_value_leaves(self, parties: Cluster) -> None:
        shares = private(parties, nn.Linear(2, 1))
        shares(hidden(parties, torch.ones(1, 2))).sum().backward()
        text = "PrivateTensor(shape=(1, 2), shared by alice and bob)"
        assert text in repr(shares.weight)
        assert [repr(shares.weight.grad), repr(shares.state_dict()["weight"])] == [text] * 2
        for leave in (Tensor.item, Tensor.tolist, Tensor.numpy, bool, float, int):
            for value in (shares.bias.detach(), shares.bias.grad):
                with pytest.raises((RuntimeError, UnsupportedOperator)) as error:
                    leave(value)
                assert not any(character.isdigit() for character in str(error.value).split(": ", 1)[-1])


COSTS: dict[str, tuple[Callable[..., Protocol[object]], list[tuple[int, ...]], int]] = {
    "relu": (gradients.relu, [(3, 4)], 3),
    "max_pool": (lambda context, x: gradients.max_pool(context, x, [3], [2], [1]), [(2, 3, 7, 7)], 15),
    "convolution_backward": (
        lambda context, g, x, w: gradients.convolution_backward(
            context, g, x, w, [4], [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]
        ),
        [(2, 4, 4, 4), (2, 3, 7, 7), (4, 3, 3, 3)],
        3,
    ),
}


@pytest.mark.parametrize("name", COSTS)
def test_what_is_planned_is_what_is_counted(name: str) -> None:
    lowering, shapes, rounds = COSTS[name]
    blanks = [Share(torch.empty(shape, dtype=torch.int64, device="meta"), 32, Role.ALICE) for shape in shapes]
    planned, counted = Meter(), Meter()
    plan(lowering(Fine(), *blanks), planned)
    pairs = [shared(torch.zeros(shape, dtype=torch.int64), 32, seed) for seed, shape in enumerate(shapes)]
    alice, bob = (lowering(Fine(), *(pair[i] for pair in pairs)) for i in range(2))
    Trio(prg()).run(alice, bob, counted)
    assert planned.rounds == rounds
    assert (planned.rounds, planned.bytes_online) == (counted.rounds, counted.bytes_online)
    assert (planned.bytes_dealt, planned.correlations) == (counted.bytes_dealt, counted.correlations)
