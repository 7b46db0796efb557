"""Plain modules, encrypted: they compute what they compute in the clear, at the cost they announce."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine import Recorder, prg
from tacit.cluster import Cluster, PrivateModel
from tacit.errors import InputError, RangeError, TacitError, UnsupportedOperator

# Inputs, weights and biases are rounded by at most 2^-17 each, truncations err by less than 2^-16. A dot product of n
# terms with inputs up to 4 and weights up to 1 therefore errs by at most n * 5 * 2^-17 + 2^-16, below 2^-9 for the 50
# terms that these layers have at most; roundings are independent, so the usual error is a tenth of that, and what a
# layer inherits it multiplies by about 1. `test_the_error_of_a_perceptron_is_bounded` has a bound without estimates.
BOUND = 2.0**-9


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x).relu(), self.right(x).relu(), x], 1).flatten(1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.second(self.norm(self.first(x)).relu())).relu()


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([0.5, -1.25, 3.0]))
        self.factor = nn.Parameter(torch.tensor([0.3, -0.7, 1.1]))

    def forward(self, x: Tensor) -> Tensor:
        y = 2.5 * x - 1.25 + self.shift
        return (1 - y * self.factor / 3) * 0.1 + (self.shift - x) / 4


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)
        z = self.linear(y[:, 3:15])
        return torch.stack([z, -z], 1).transpose(1, 2).unsqueeze(1).squeeze(1).flip(2).sum(2) + z[:, 1].unsqueeze(1)


class Comparing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x >= 0.5) * x + x.mean(1, keepdim=True)


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x * 0.25 + torch.matmul(x, x.transpose(0, 1)).mean()


class Tied(nn.Module):
    """One weight with two biases, and one bias with two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.bias = nn.Parameter(torch.tensor([1.5, -2.0]))

    def forward(self, x: Tensor) -> Tensor:
        first = functional.conv2d(x, self.shared.weight, self.shared.bias)
        second = functional.conv2d(x, self.shared.weight, self.bias)
        return first - 2 * second + functional.conv2d(x, self.own.weight, self.bias)


def sequence(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(nn.Sequential(*layers))


torch.manual_seed(0)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (
        sequence(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
        (6,),
    ),
    "without bias": (sequence(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)), (6,)),
    "on sequences": (sequence(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), (3, 4)),
    "lenet": (
        sequence(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(45, 6),
            nn.ReLU(),
            nn.Linear(6, 4),
        ),
        (1, 12, 12),
    ),
    "strides, groups and norms": (
        sequence(
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, padding=2, dilation=2),
            nn.BatchNorm2d(4),
        ),
        (4, 7, 6),
    ),
    "a norm after a linear layer": (
        sequence(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)),
        (5,),
    ),
    "norms that stand alone": (
        sequence(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, affine=False), nn.Flatten(), nn.Linear(12, 2)),
        (3, 2, 2),
    ),
    "one dimension": (
        sequence(nn.Conv1d(2, 3, 3, stride=2), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)),
        (2, 7),
    ),
    "average pools": (sequence(nn.AvgPool2d(2), nn.ReLU(), nn.AvgPool2d(3, 2, 1)), (2, 8, 8)),
    "an adaptive pool that divides": (sequence(nn.Conv2d(2, 2, 1), nn.AdaptiveAvgPool2d((2, 3))), (2, 6, 6)),
    "an adaptive pool that does not": (
        sequence(nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(), nn.Linear(12, 2)),
        (2, 5, 5),
    ),
    "concatenated branches": (Branches, (2, 4, 4)),
    "a residual block": (Residual, (2, 5, 5)),
    "constants": (Constants, (3,)),
    "views": (Views, (2, 3, 3)),
    "comparisons": (Comparing, (5,)),
    "products of activations": (Squares, (5,)),
    "tied weights and biases": (Tied, (2, 3, 3)),
    "nothing": (nn.Identity, (3,)),
}


def settled(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The model with statistics in its norms, in evaluation mode, and the shape of its items."""
    factory, shape = MODELS[name]
    torch.manual_seed(1)
    model = factory()
    for _ in range(5):
        model(torch.randn(16, *shape) * 1.5 + 0.5)
    return model.eval(), shape


def batch(count: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count)).clamp(-4, 4)


@pytest.fixture
def tap() -> Recorder:
    return Recorder()


@pytest.fixture
def parties(tap: Recorder) -> Cluster:
    return Cluster(prg(), tap)


def apart(private: PrivateModel, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = model(x)
    got = private(x)
    assert (got.shape, got.dtype) == (expected.shape, torch.float32)
    return float((got - expected).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_an_encrypted_model_computes_what_the_model_does_at_the_planned_cost(
    name: str, parties: Cluster, tap: Recorder
) -> None:
    model, shape = settled(name)
    private = parties.encrypt(model, batch(2, shape))
    for count in (2, 1, 2):  # tracing a batch of another size is most of this test's time
        before = len(tap.labels)
        planned = private.cost((count, *shape))
        assert apart(private, model, batch(count, shape)) < BOUND
        assert private.counted() == planned  # rounds, bytes, correlations, and all of them operator by operator
        assert planned.rounds == len(tap.labels) - before
        assert planned.bytes_online == sum(layer.bytes_online for layer in planned.layers)
        assert planned.bytes_dealt == sum(layer.bytes_dealt for layer in planned.layers)
        assert planned.bytes_dealt == sum(correlation.nbytes for correlation in planned.correlations)
    assert private.cost() == private.cost((2, *shape))


@pytest.mark.parametrize("name", ["lenet", "a residual block", "an adaptive pool that does not"])
@pytest.mark.parametrize("count", [3, 17])
def test_larger_batches(name: str, count: int, parties: Cluster) -> None:
    model, shape = settled(name)
    private = parties.encrypt(model, batch(1, shape))
    assert apart(private, model, batch(count, shape)) < BOUND
    assert private.counted() == private.cost((count, *shape))


@pytest.mark.parametrize(("name", "rounds"), [("perceptron", 9), ("concatenated branches", 4), ("nothing", 0)])
def test_rounds_are_as_few_as_the_depth_allows(name: str, rounds: int, parties: Cluster) -> None:
    model, shape = settled(name)
    # A linear layer takes one round, a ReLU three; the last layer is truncated by the client.
    assert parties.encrypt(model, batch(2, shape)).cost().rounds == rounds


@pytest.mark.parametrize("name", ["lenet", "strides, groups and norms", "concatenated branches"])
def test_what_is_dealt_ahead_is_used(name: str, parties: Cluster) -> None:
    model, shape = settled(name)
    private = parties.encrypt(model, batch(2, shape))
    private.deal((2, *shape))
    dealt = repr(parties.provider)
    assert apart(private, model, batch(2, shape)) < BOUND
    assert repr(parties.provider) == dealt


@pytest.mark.parametrize("name", ["strides, groups and norms", "a norm after a linear layer", "one dimension"])
def test_a_norm_after_a_linear_layer_costs_nothing(name: str, parties: Cluster) -> None:
    model, shape = settled(name)
    without = nn.Sequential(*(layer for layer in model if not isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d)))
    x = batch(2, shape)
    with_norm, bare = (parties.encrypt(one, x).cost() for one in (model, without))
    assert (with_norm.rounds, with_norm.bytes_online) == (bare.rounds, bare.bytes_online)


def test_the_error_of_a_perceptron_is_bounded(parties: Cluster) -> None:
    model, shape = settled("perceptron")
    x = batch(200, shape)
    private = parties.encrypt(model, x)
    half, unit = 2.0**-17, 2.0**-16
    value, error = x.double(), torch.full_like(x, half, dtype=torch.float64)
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    for layer in linears:
        weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
        # (w + a)(x + e) - wx, summed, with |a| at most half a unit; then the bias, then a truncation below a unit.
        error = error @ (weight.abs() + half).T + half * value.abs().sum(1, keepdim=True) + half
        value = value @ weight.T + bias
        if layer is not linears[-1]:
            value, error = value.clamp(min=0), error + unit
    assert bool(((private(x).double() - value).abs() <= error + 1e-6).all())  # 1e-6: the result is given as float32


def test_weights_are_opened_once_for_all_queries(parties: Cluster, tap: Recorder) -> None:
    model, shape = settled("lenet")
    private = parties.encrypt(model, batch(1, shape))
    assert len(tap.labels) == 1  # one round loads all four
    weights = sorted(layer.weight.numel() for layer in model if isinstance(layer, nn.Conv2d | nn.Linear))
    assert sorted(value.numel() for value in tap.opened()[0]) == weights
    for count in (1, 1):
        before = len(tap.labels)
        private(batch(count, shape))
        assert len(tap.labels) - before == private.cost((count, *shape)).rounds


def test_loading_twice_opens_under_another_mask(parties: Cluster, tap: Recorder) -> None:
    model, shape = settled("perceptron")
    for _ in range(2):
        parties.encrypt(model, batch(1, shape))
    assert not any(torch.equal(x, y) for x, y in zip(*tap.opened(), strict=True))


def test_the_caller_s_model_is_not_changed(parties: Cluster) -> None:
    model, shape = settled("strides, groups and norms")
    model.train()
    before = copy.deepcopy(model.state_dict())
    private = parties.encrypt(model, batch(2, shape))
    private(batch(2, shape))
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_later_changes_of_the_model_do_not_reach_the_encrypted_one(parties: Cluster) -> None:
    model, shape = settled("perceptron")
    private = parties.encrypt(model, batch(2, shape))
    with torch.no_grad():
        expected = model(batch(2, shape))
        for parameter in model.parameters():
            parameter.zero_()
    assert float((private(batch(2, shape)) - expected).abs().max()) < BOUND


def test_two_models_in_one_cluster_take_turns(parties: Cluster) -> None:
    first, first_shape = settled("perceptron")
    second, second_shape = settled("lenet")
    one = parties.encrypt(first, batch(2, first_shape))
    assert apart(one, first, batch(2, first_shape)) < BOUND
    two = parties.encrypt(second, batch(1, second_shape))
    for count in (2, 3):
        assert apart(one, first, batch(count, first_shape)) < BOUND
        assert apart(two, second, batch(count, second_shape)) < BOUND
        assert two.counted() == two.cost((count, *second_shape))


class Tangent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tan(x)  # the line that the message names


class Indices(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(x, 2, return_indices=True)[1]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Several(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x + 1


class OnlyItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight


class Positions(nn.Module):
    """Has a constant whose shape follows the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.expand(x.shape[0], -1)


class Tiny(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1e-8 + 1000.0


def one_line(error: pytest.ExceptionInfo[TacitError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("model", "shape", "named"),
    [
        (Tangent(), (3,), ["aten.tan.default", "test_program.py", "torch.tan(x)"]),
        (nn.Sequential(nn.Linear(3, 3), Tangent()), (3,), ["aten.tan.default", "test_program.py"]),
        (Indices(), (1, 4, 4), ["indices", "test_program.py"]),
    ],
)
def test_an_operator_without_an_encrypted_form_is_refused_before_anything_is_dealt(
    model: nn.Module, shape: tuple[int, ...], named: list[str], parties: Cluster, tap: Recorder
) -> None:
    with pytest.raises(UnsupportedOperator) as error:
        parties.encrypt(model, batch(2, shape))
    message = one_line(error)
    assert [part for part in named if part not in message] == []
    assert repr(parties.provider) == "Provider(0 correlations dealt)"
    assert tap.labels == []


def test_a_model_that_cannot_be_traced_is_refused(parties: Cluster) -> None:
    with pytest.raises(InputError, match="Branching cannot be traced") as error:
        parties.encrypt(Branching(), batch(2, (3,)))
    one_line(error)


@pytest.mark.parametrize("model", [Several(), OnlyItself()])
def test_outputs_that_cannot_be_given_are_refused_and_not_dropped(model: nn.Module, parties: Cluster) -> None:
    x = batch(2, (3,))
    try:
        got = parties.encrypt(model, x)(x)
    except InputError:
        return
    expected = model(x)
    assert isinstance(got, tuple) == isinstance(expected, tuple)
    torch.testing.assert_close(got, expected, atol=BOUND, rtol=0)


@pytest.mark.parametrize("model", [Positions(), Tiny()])
@pytest.mark.parametrize("count", [4, 1, 2])
def test_a_result_is_right_or_refused(model: nn.Module, count: int, parties: Cluster) -> None:
    x = batch(count, (3,))
    try:
        got = parties.encrypt(model, batch(4, (3,)))(x)
    except InputError:
        return
    torch.testing.assert_close(got, model(x).detach(), atol=BOUND, rtol=0)


@pytest.fixture(scope="module")
def perceptron() -> tuple[PrivateModel, nn.Module, Cluster]:
    model, shape = settled("perceptron")
    parties = Cluster(prg())
    return parties.encrypt(model, batch(2, shape)), model, parties


NAN = torch.full((1, 6), float("nan"))


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        (torch.zeros(2, 5), InputError, r"shape \(2, 5\).*\(n, 6\)"),
        (torch.zeros(6), InputError, "shape"),
        (torch.tensor(1.0), InputError, "shape"),
        (torch.zeros(2, 6, 1), InputError, "shape"),
        (torch.zeros(0, 6), InputError, "empty batch"),
        (torch.zeros(2, 6, dtype=torch.complex64), InputError, "complex64"),
        (torch.zeros(2, 6, dtype=torch.bool), InputError, "bool"),
        ([[0.0] * 6], InputError, "list"),
        (NAN, RangeError, "NaN"),
        (NAN.nan_to_num(float("inf")).mul(float("inf")), RangeError, "infinity"),
        (torch.full((1, 6), 16384.0), RangeError, "16384"),
    ],
)
def test_a_bad_input_is_refused_before_anything_is_dealt(
    inputs: object, kind: type[TacitError], message: str, perceptron: tuple[PrivateModel, nn.Module, Cluster]
) -> None:
    private, model, parties = perceptron
    dealt = repr(parties.provider)
    with pytest.raises(kind, match=message) as error:
        private(inputs)
    one_line(error)
    assert repr(parties.provider) == dealt
    assert apart(private, model, batch(2, (6,))) < BOUND


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8])
def test_other_real_inputs_are_taken(dtype: torch.dtype, perceptron: tuple[PrivateModel, nn.Module, Cluster]) -> None:
    private, model, _ = perceptron
    x = batch(2, (6,)).abs().to(dtype)
    assert float((private(x) - model(x.float())).detach().abs().max()) < BOUND


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 20000.0])
def test_a_weight_that_does_not_fit_is_refused(value: float, parties: Cluster) -> None:
    model, shape = settled("perceptron")
    with torch.no_grad():
        model[2].weight[0, 0] = value
    with pytest.raises(RangeError, match=r"2\.weight of Sequential") as error:
        parties.encrypt(model, batch(1, shape))
    one_line(error)
    assert repr(parties.provider) == "Provider(0 correlations dealt)"


def test_nothing_is_counted_before_a_call(parties: Cluster) -> None:
    model, shape = settled("perceptron")
    with pytest.raises(InputError, match="call the model first"):
        parties.encrypt(model, batch(1, shape)).counted()


def test_what_is_dealt_ahead_waits_for_its_own_model_and_shape(parties: Cluster) -> None:
    model, shape = settled("perceptron")
    private = parties.encrypt(model, batch(1, shape))
    private.deal((2, *shape))
    other = parties.encrypt(model, batch(1, shape))
    other(batch(1, shape))
    private(batch(1, shape))
    dealt = repr(parties.provider)
    assert apart(private, model, batch(2, shape)) < BOUND
    assert repr(parties.provider) == dealt
    private(batch(2, shape))
    assert repr(parties.provider) != dealt
