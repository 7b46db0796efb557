"""Every operator against PyTorch: within its stated error over its stated domain, at the cost that `docs/operators.md`
states."""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tacit
from engine import Recorder, prg
from tacit.cluster import Cluster
from tacit.errors import UnsupportedOperator
from tacit.program.run import Cost

OPERATORS = Path(__file__).parents[2] / "docs" / "operators.md"


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@dataclass(frozen=True)
class Case:
    """An operator on a domain.

    Args:
        function: what to run, of a tensor of shape (32, 8).
        low: the domain's lower end.
        high: its upper end.
        bound: the stated absolute error, as an exponent of two.
        relative: the stated relative error that comes on top, as an exponent of two; none if 0.
        spread: how the points lie in the domain.
    """

    function: Callable[[Tensor], Tensor]
    low: float
    high: float
    bound: float
    relative: float = 0
    spread: str = "even"

    def inputs(self) -> Tensor:
        """Points all over the domain, both ends among them, as multiples of 2^-16."""
        if self.spread == "even":
            points = torch.linspace(self.low, self.high, 256, dtype=torch.float64)
        elif self.spread == "dense at zero":
            steps = torch.linspace(-1, 1, 256, dtype=torch.float64)
            points = steps.abs().pow(6) * steps.sign() * max(abs(self.low), abs(self.high))
            points = points.clamp(self.low, self.high)
        else:
            magnitudes = torch.logspace(-16, 14, 256, 2, dtype=torch.float64)
            magnitudes = magnitudes.clamp(max(self.low, 2.0**-16) if self.low >= 0 else 2.0**-7, self.high)
            points = magnitudes if self.low >= 0 else magnitudes * torch.tensor([1.0, -1.0]).repeat(128)
        order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
        return ((points * 2**16).round() / 2**16)[order].view(32, 8).float()

    def allowed(self, expected: Tensor) -> Tensor:
        """The stated error for these results."""
        return 2.0**self.bound + (2.0**self.relative * expected.abs() if self.relative else 0)


WIDE = (-16_000.0, 16_000.0)
PAIR: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda x: (x[:, :4], x[:, 4:])  # noqa: E731
TOKENS: Callable[[Tensor], Tensor] = lambda x: x.view(4, 8, 8)  # noqa: E731
IMAGES: Callable[[Tensor], Tensor] = lambda x: x.view(2, 2, 8, 8)  # noqa: E731

CASES: dict[str, Case] = {
    "relu": Case(F.relu, *WIDE, -16, spread="dense at zero"),
    "leaky_relu": Case(F.leaky_relu, *WIDE, -15, -15, "dense at zero"),
    "relu6": Case(F.relu6, *WIDE, -15, spread="dense at zero"),
    "clamp": Case(lambda x: x.clamp(-1.5, 2.25), *WIDE, -15, spread="dense at zero"),
    "hardsigmoid": Case(F.hardsigmoid, *WIDE, -14, spread="dense at zero"),
    "hardswish": Case(F.hardswish, -1000, 1000, -11, -14, "dense at zero"),
    "elu": Case(F.elu, *WIDE, -14, -15, "dense at zero"),
    "abs": Case(torch.abs, *WIDE, -15, spread="dense at zero"),
    "sign": Case(torch.sign, *WIDE, -24, spread="dense at zero"),
    "maximum": Case(lambda x: torch.maximum(*PAIR(x)), -8000, 8000, -16),
    "minimum": Case(lambda x: torch.minimum(*PAIR(x)), -8000, 8000, -16),
    "ge, gt, le, lt": Case(lambda x: (x >= 0).float(), *WIDE, -24, spread="dense at zero"),
    "eq, ne": Case(lambda x: (x == x.flatten()[7]).float(), -8000, 8000, -24, spread="dense at zero"),
    "clamp (tensors)": Case(lambda x: x.clamp(-x, x.flip(1)), -8000, 8000, -16, spread="dense at zero"),
    "where": Case(lambda x: torch.where(x > 0, x, 2 * x), -8000, 8000, -15, spread="dense at zero"),
    "logical_and": Case(lambda x: ((x > -1) & (x < 1)).float(), *WIDE, -24, spread="dense at zero"),
    "any": Case(lambda x: (x > 0.9).any(1).float(), -1, 1, -24),
    "sigmoid": Case(torch.sigmoid, *WIDE, -12, spread="dense at zero"),
    "tanh": Case(torch.tanh, *WIDE, -11.5, spread="dense at zero"),
    "erf": Case(torch.erf, *WIDE, -12, spread="dense at zero"),
    "gelu": Case(F.gelu, *WIDE, -12, spread="dense at zero"),
    "gelu (tanh)": Case(lambda x: F.gelu(x, approximate="tanh"), *WIDE, -12, spread="dense at zero"),
    "silu": Case(F.silu, *WIDE, -11.5, spread="dense at zero"),
    "exp": Case(torch.exp, -16_000, 9.7, -19, -16, "dense at zero"),
    "log": Case(torch.log, 2**-16, 16_000, -14, spread="logarithmic"),
    "log1p": Case(torch.log1p, 0, 16_000, -14, spread="logarithmic"),
    "sqrt": Case(torch.sqrt, 0, 16_000, -19, -13, "logarithmic"),
    "rsqrt": Case(torch.rsqrt, 2**-8, 16_000, -19, -13, "logarithmic"),
    "reciprocal": Case(torch.reciprocal, -12_000, 12_000, -19, -13, "logarithmic"),
    "div": Case(lambda x: PAIR(x)[0] / (PAIR(x)[1].abs() + 0.5), -100, 100, -13, -12),
    "pow(2)": Case(lambda x: x**2, -100, 100, -15),
    "pow(3)": Case(lambda x: x**3, -20, 20, -11),
    "softmax": Case(lambda x: x.softmax(1), -20, 20, -13),
    "log_softmax": Case(lambda x: x.log_softmax(1), -20, 20, -13),
    "logsumexp": Case(lambda x: x.logsumexp(1), -20, 20, -13),
    "amax": Case(lambda x: x.amax(1), -8000, 8000, -16),
    "argmax": Case(lambda x: x.argmax(1).float(), -8000, 8000, -24),
    "max (dim)": Case(lambda x: x.max(1)[0], -8000, 8000, -16),
    "topk(3)": Case(lambda x: x.topk(3)[0], -8000, 8000, -16),
    "sort": Case(lambda x: x.sort(1)[0], -8000, 8000, -16),
    "var": Case(lambda x: x.var(1), -100, 100, -9, -15),
    "norm": Case(lambda x: x.norm(dim=1), -30, 30, -10, -13),
    "layer_norm": Case(lambda x: F.layer_norm(x, (8,)), -20, 20, -14, -12),
    "group_norm": Case(lambda x: F.group_norm(IMAGES(x), 2), -20, 20, -14, -12),
    "instance_norm": Case(lambda x: F.instance_norm(IMAGES(x)), -20, 20, -14, -12),
    "attention": Case(lambda x: F.scaled_dot_product_attention(*[TOKENS(x)] * 3), -2, 2, -12),
    "matmul": Case(lambda x: x @ x.T, -4, 4, -15),
    "max_pool2d": Case(lambda x: F.max_pool2d(IMAGES(x), 2), -8000, 8000, -16),
    "avg_pool2d": Case(lambda x: F.avg_pool2d(IMAGES(x), 3, 2, 1), -100, 100, -16, -15),
    "avg_pool2d (ceil_mode)": Case(lambda x: F.avg_pool2d(IMAGES(x), 3, 2, 1, ceil_mode=True), -100, 100, -16, -15),
    "adaptive_max_pool2d": Case(lambda x: F.adaptive_max_pool2d(IMAGES(x), 2), -4000, 4000, -16),
    "upsample (nearest)": Case(lambda x: F.interpolate(IMAGES(x), scale_factor=2), -8000, 8000, -24),
    "upsample (bilinear)": Case(lambda x: F.interpolate(IMAGES(x), scale_factor=2, mode="bilinear"), -100, 100, -16),
}

MOVING: dict[str, Callable[[Tensor], Tensor]] = {
    "cat": lambda x: torch.cat([x, x.flip(1)], 1),
    "stack": lambda x: torch.stack([x, x + 1]),
    "pad": lambda x: F.pad(x, (1, 2), value=3.0),
    "reflect": lambda x: F.pad(IMAGES(x), (1, 1, 2, 2), mode="reflect"),
    "slice": lambda x: x[:, 1::2],
    "split": lambda x: x.split(3, 1)[2],
    "chunk": lambda x: x.chunk(4, 1)[1],
    "unbind": lambda x: x.unbind(1)[3],
    "index": lambda x: x[:, [5, 0, 0]],
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 7])),
    "gather": lambda x: x.gather(1, torch.arange(32).view(32, 1) % 8),
    "roll": lambda x: x.roll(3, 1),
    "repeat": lambda x: x.repeat(2, 1),
    "tril": lambda x: x.tril(),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.view(1, 4, 8, 8), 2),
    "cumsum": lambda x: x.cumsum(1),
    "full": lambda x: x + torch.arange(8) * torch.ones(8),
    "masked_fill": lambda x: x.masked_fill(torch.ones(32, 8).tril() == 0, -2.0),
    "expand": lambda x: x[:, :1].expand(32, 5) + 0,
}


def measured(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Cost]:
    """What the parties compute, what PyTorch computes in float64, and the cost, planned and counted alike."""
    private = Cluster(prg()).encrypt(Function(function), x)
    got = private(x).double()
    assert private.counted() == private.cost()
    return got, function(x.double()).double(), private.cost()


@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_within_its_stated_error(name: str) -> None:
    case = CASES[name]
    got, expected, _ = measured(case.function, case.inputs())
    assert got.shape == expected.shape
    # The result is given as float32, whose own rounding is no error of the operator.
    excess = (got - expected).abs() - case.allowed(expected) - 2.0**-23 * expected.abs()
    assert float(excess.max()) <= 0


@pytest.mark.parametrize("name", MOVING)
def test_what_only_moves_elements_is_exact_and_costs_nothing(name: str) -> None:
    x = Case(torch.abs, -100, 100, -24).inputs()
    got, expected, cost = measured(MOVING[name], x)
    torch.testing.assert_close(got, expected, rtol=2**-23, atol=0)
    assert (cost.rounds, cost.bytes_online, cost.bytes_dealt) == (0, 0, 0)


def row(name: str) -> str:
    """The row of `docs/operators.md` for a case."""
    case = CASES[name]
    x = case.inputs()
    _, expected, cost = measured(case.function, x)
    error = "exact" if case.bound == -24 else f"2^{case.bound:g}"
    error += f" + 2^{case.relative:g}·\\|y\\|" if case.relative else ""
    domain = " … ".join(f"2^{math.log2(end):g}" if 0 < end < 0.1 else f"{end:g}" for end in (case.low, case.high))
    online, dealt = (round(count / expected.numel(), 1) for count in (cost.bytes_online, cost.bytes_dealt))
    return f"| {name} | {error} | {domain} | {cost.rounds} | {online:g} | {dealt:g} |"


@pytest.mark.parametrize("name", CASES)
def test_the_documentation_states_this_error_and_this_cost(name: str) -> None:
    rows = [line for line in OPERATORS.read_text().splitlines() if line.startswith(f"| {name} |")]
    assert rows == [row(name)]


def test_the_documentation_lists_no_other_operator() -> None:
    listed = re.findall(r"^\| (.+?) \| (?:exact|2\^)", OPERATORS.read_text(), re.MULTILINE)
    assert listed == list(CASES)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(2, 4, 3, dilation=2, groups=2, bias=False),
        nn.Conv2d(2, 3, 3, dilation=2, padding=2),
        nn.BatchNorm2d(2),
        nn.GroupNorm(1, 2),
    ],
)
def test_a_layer_on_images(layer: nn.Module) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 2, 5, 6)
    private = Cluster(prg()).encrypt(layer, x)
    torch.testing.assert_close(private(x), layer(x).detach(), atol=2**-10, rtol=0)
    assert private.counted() == private.cost()


@pytest.mark.parametrize("options", [(3, 2, 1), (3, 3, 0), (2, 2, 1), (4, 3, 2), ((2, 5), (1, 3), (1, 2))])
@pytest.mark.parametrize("counted", [True, False])
def test_averages_of_windows_beyond_the_edge(options: tuple[Any, ...], counted: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.AvgPool2d(*options, ceil_mode=True, count_include_pad=counted), torch.randn(2, 3, 7, 8)
    private = Cluster(prg()).encrypt(layer, x)
    torch.testing.assert_close(private(x), layer(x), atol=2**-15, rtol=2**-15)
    assert private.counted() == private.cost()


@pytest.mark.parametrize("layer", [nn.ConvTranspose1d(2, 3, 4, stride=3), nn.Conv1d(2, 4, 3, groups=2)])
def test_a_layer_on_sequences(layer: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 9)
    torch.testing.assert_close(Cluster(prg()).encrypt(layer, x)(x), layer(x).detach(), atol=2**-11, rtol=0)


def test_an_embedding_at_private_indices() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(11, 3)
    x = torch.tensor([[0, 10, 5], [7, 1, 1]])
    private = Cluster(prg()).encrypt(model, x)
    torch.testing.assert_close(private(x), model(x).detach(), atol=2**-16, rtol=0)
    assert private.cost().rounds == 2
    assert private.counted() == private.cost()


def test_equality_tells_neighbouring_units_apart() -> None:
    units = torch.tensor([[0, 1, -1, 2, 70_000, -70_000, 69_999, 65_536]]) / 2**16
    got, expected, _ = measured(lambda x: (x.T - x == 0).float(), units)
    assert torch.equal(got, expected)
    assert int(got.sum()) == 8


def test_sorting_is_stable_and_ties_keep_their_order() -> None:
    x = torch.tensor([[3.0, 1.0, 3.0, 2.0, 1.0, 3.0]])
    for descending in (True, False):
        got, expected, _ = measured(lambda x, d=descending: x.sort(dim=1, descending=d, stable=True)[1].float(), x)
        assert torch.equal(got, expected)
    got, _, _ = measured(lambda x: x.argmax(1).float(), x)
    assert got.tolist() == [0.0]


def test_truth_values_combine() -> None:
    x = torch.tensor([[-2.0, -0.5, 0.5, 2.0]])
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: (x > 0) | (x < -1),
        lambda x: (x > 0) ^ (x > 1),
        lambda x: ~(x > 0) & (x > -1),
        lambda x: torch.logical_not(x > 0),
        lambda x: (x > -3).all(1),
        lambda x: (x > 0).all(1),
        lambda x: (x > 5).any(1),
        lambda x: (x > 0) & torch.tensor([True, False, True, False]),
        lambda x: torch.isinf(x) | (x > 0),
    ]
    for function in functions:
        got, expected, _ = measured(lambda x, f=function: f(x).float(), x)
        assert torch.equal(got, expected)


def test_a_causal_mask_hides_what_is_after() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 4)
    attend: Callable[[Tensor], Tensor] = lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)  # noqa: E731
    got, expected, _ = measured(attend, x)
    torch.testing.assert_close(got, expected, atol=2**-11, rtol=0)


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a power that is no root": (lambda x: x**0.3, "pow to 0.3"),
    "a high power": (lambda x: x**65, "pow to 65"),
    "powers of a negative number": (lambda x: (-2.0) ** x, "base must be positive"),
    "floor division": (lambda x: torch.div(x, 2, rounding_mode="floor"), "rounding_mode"),
    "rounding": (lambda x: x.to(torch.int64).float(), "rounding"),
    "logic on numbers": (lambda x: torch.logical_not(x).float(), "results of comparisons"),
    "clamping to nothing": (lambda x: x.clamp(1, -1), "lower bound"),
    "sorting too many": (lambda x: x.flatten().sort()[0], "too many to sort"),
    "a norm of another order": (lambda x: torch.linalg.vector_norm(x, 3, 1), "order 3"),
    "private positions": (lambda x: x.gather(1, x.argmax(1, keepdim=True)), "private positions"),
    "uneven cells": (lambda x: F.adaptive_max_pool2d(IMAGES(x), 3), "divide"),
    "an unknown operator": (torch.sin, "aten.sin.default"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_without_an_encrypted_form_is_refused_before_anything_is_dealt(name: str) -> None:
    function, message = REFUSED[name]
    tap = Recorder()
    parties = Cluster(prg(), tap)
    with pytest.raises(UnsupportedOperator, match=re.escape(message)) as error:
        parties.encrypt(Function(function), torch.ones(32, 8))
    assert "\n" not in str(error.value)
    assert "test_operators.py" in str(error.value)
    assert repr(parties.provider) == "Provider(0 correlations dealt)"
    assert tap.labels == []


EAGER: dict[str, Callable[[Tensor], Any]] = {
    "decomposed activations": lambda x: F.silu(x) + F.hardswish(x) + F.softplus(x),
    "softmax": lambda x: x.softmax(1),
    "norms": lambda x: F.layer_norm(x, (8,)) + F.normalize(x),
    "attention": lambda x: F.scaled_dot_product_attention(*[TOKENS(x)] * 3),
    "logic": lambda x: (x > 0) & (x < 1),
    "parts": lambda x: x.split(4, 1)[1] / (x[:, :4] ** 2 + 1),
    "order": lambda x: x.topk(2)[0],
    "logsumexp": lambda x: x.logsumexp(1),
    "batch norm": lambda x: F.batch_norm(x, torch.zeros(8), torch.ones(8), torch.full((8,), 2.0)),
}


@pytest.mark.parametrize("name", EAGER)
def test_private_tensors_take_the_same_operators(name: str) -> None:
    parties = Cluster(prg())
    x = Case(torch.abs, -2, 2, -24).inputs()
    private = tacit.tensor(x).fix_prec(16, 2).share(parties.alice, parties.bob, crypto_provider=parties.provider)
    got, expected = EAGER[name](private), EAGER[name](x)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert float((got.get().float_prec() - expected.float()).abs().max()) < 2**-10
