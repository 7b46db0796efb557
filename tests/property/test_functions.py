"""One-time tables, and the functions and orders made of them, under chosen and dealt masks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import Pair, Recorder, chosen, drive, prg, seeds, shared, total, trio
from tacit.errors import InputError, UnsupportedOperator
from tacit.mpc import functions, ordering
from tacit.mpc.lockstep import Meter, both, plan
from tacit.mpc.shares import Share, reconstruct
from tacit.mpc.steps import Role
from tacit.mpc.tables import EXP_HIGH, EXP_LOW, SPLINES, exponential, indicator, interpolate

FITS = {
    "sigmoid": -14,
    "tanh": -13,
    "erf": -13.5,
    "gelu": -13,
    "gelu_tanh": -13,
    "silu": -13,
    "reciprocal": -14,
    "rsqrt": -13.5,
    "sqrt": -15,
    "log": -15,
}
"""The error of each spline inside its interval, as an exponent of two."""


def encoded(values: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """Ring elements, and the numbers that they stand for exactly."""
    words = (values.double() * 2.0**scale).round().to(torch.int64)
    return words, words.double() * 2.0**-scale


def run(protocol: Callable[..., Any], values: Tensor, scale: int = 16, seed: int = 0, **options: Any) -> Tensor:
    words, _ = encoded(values, scale)
    return reconstruct(*both(trio(seed), protocol, shared(words, scale, seed), **options))


def plaintext(name: str, x: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(SPLINES[name].function(x.numpy())))


def boundary_masks(side: Share, protocol: Any, index_bits: int) -> Tensor:
    """Masks just before, at and just after every boundary between nodes, and where the ring wraps."""
    bits = next(protocol).correlation.bits
    boundaries = [(2 * node + 1) << (bits - 1) for node in range(1 << index_bits)]
    near = [(at + step) % 2**64 for at in (0, *boundaries, 2**63) for step in (-1, 0, 1)]
    return torch.tensor([word - 2**64 if word >= 2**63 else word for word in near])


def grid(points: Tensor, masks: Tensor, scale: int) -> tuple[Pair, Tensor]:
    """All pairs of a point and a mask: shares of the one, and the other."""
    words, _ = encoded(points, scale)
    return shared(words.repeat_interleave(len(masks)), scale), masks.repeat(len(words))


class TestInterpolation:
    def test_every_spline_has_a_stated_fit(self) -> None:
        assert SPLINES.keys() == FITS.keys()

    @pytest.mark.parametrize("scale", [16, 17, 32, 44])
    @pytest.mark.parametrize("name", SPLINES)
    def test_it_fits_the_function_over_the_whole_interval(self, name: str, scale: int) -> None:
        spline = SPLINES[name]
        _, x = encoded(torch.linspace(spline.low, spline.high, 2001, dtype=torch.float64), scale)
        result = run(interpolate, x, scale, name=name)
        assert float((result - plaintext(name, x)).abs().max()) < 2.0 ** FITS[name]

    @pytest.mark.parametrize("name", ["sigmoid", "silu", "reciprocal", "log"])
    def test_and_under_masks_at_every_boundary(self, name: str) -> None:
        spline, scale = SPLINES[name], 20
        points = torch.linspace(spline.low, spline.high, 65)
        blank = shared(encoded(points, scale)[0], scale)[0]
        pair, masks = grid(points, boundary_masks(blank, interpolate(blank, name), spline.index_bits), scale)
        result = reconstruct(*drive(*(interpolate(side, name) for side in pair), chosen(masks)))
        expected = plaintext(name, total(pair).double() * 2.0**-scale)
        assert float((result - expected).abs().max()) < 2.0 ** FITS[name]

    def test_an_argument_too_fine_is_refused(self) -> None:
        side = shared(torch.zeros(2, dtype=torch.int64), 60)[0]
        with pytest.raises(InputError, match="too fine"):
            next(interpolate(side, "sigmoid"))


class TestExponential:
    @pytest.mark.parametrize("scale", [16, 24, 40])
    def test_its_error_is_relative(self, scale: int) -> None:
        _, x = encoded(torch.linspace(EXP_LOW, EXP_HIGH, 4001), scale)
        result = run(exponential, x, scale)
        assert bool(((result - x.exp()).abs() <= 2.0**-17 * x.exp() + 2.0**-20).all())

    def test_and_under_masks_at_every_boundary(self) -> None:
        points = torch.linspace(EXP_LOW, EXP_HIGH, 57)
        blank = shared(encoded(points, 18)[0], 18)[0]
        pair, masks = grid(points, boundary_masks(blank, exponential(blank), 3), 18)
        result = reconstruct(*drive(*(exponential(side) for side in pair), chosen(masks)))
        x = total(pair).double() * 2.0**-18
        assert bool(((result - x.exp()).abs() <= 2.0**-17 * x.exp() + 2.0**-20).all())


class TestIndicator:
    @given(seeds, st.integers(1, 40), st.sampled_from([0, 16]))
    @settings(max_examples=25)
    def test_it_is_the_one_hot_vector(self, seed: int, count: int, scale: int) -> None:
        x = torch.arange(count)
        result = both(trio(seed), indicator, shared(x << scale, scale, seed), count=count)
        assert result[0].scale == 0
        assert torch.equal(total(result), torch.eye(count, dtype=torch.int64))

    def test_what_is_not_counted_gives_zeros(self) -> None:
        result = both(trio(), indicator, shared(torch.arange(8), 0), count=5)
        assert torch.equal(total(result), torch.eye(8, 5, dtype=torch.int64))


class TestNormalisation:
    @given(seeds, st.sampled_from([16, 24, 32, 40]))
    @settings(max_examples=10)
    def test_powers_are_within_their_relative_error(self, seed: int, scale: int) -> None:
        exponents = prg(seed).derive("exponents").words((200,)).double() * 2.0**-64 + 0.5
        near = torch.tensor([4.0**i + step for i in range(-4, 7) for step in (0.0, 2.0**-16, -(2.0**-16))])
        _, x = encoded(torch.cat([2.0 ** (22 * exponents - 8), near.clamp(min=2.0**-8)]).clamp(max=16_000), scale)
        for name in ("reciprocal", "rsqrt"):
            result, expected = run(functions.power, x, scale, seed, name=name), plaintext(name, x)
            assert float(((result - expected) / expected).abs().max()) < 2.0**-13

    @pytest.mark.parametrize("scale", [16, 32])
    def test_a_signed_reciprocal(self, scale: int) -> None:
        magnitudes = torch.logspace(-8, 13.5, 300, 2)
        _, x = encoded(torch.cat([magnitudes, -magnitudes]), scale)
        result = run(functions.power, x, scale, name="reciprocal", signed=True)
        assert float(((result * x) - 1).abs().max()) < 2.0**-13

    def test_what_is_below_the_least_counts_as_the_least(self) -> None:
        x = torch.tensor([0.0, 2.0**-16, 2.0**-9, -1.0])
        assert torch.allclose(run(functions.power, x, name="reciprocal"), torch.tensor(256.0).double(), rtol=2**-12)
        assert torch.allclose(run(functions.power, x, name="rsqrt"), torch.tensor(16.0).double(), rtol=2**-12)
        assert torch.equal(run(functions.sqrt, x[:1]), torch.zeros(1).double())

    def test_a_numerator_costs_no_round(self) -> None:
        blank = Share(torch.empty(4, dtype=torch.int64, device="meta"), 16, Role.ALICE)
        meters = [Meter(), Meter()]
        plan(functions.power(blank, "reciprocal"), meters[0])
        plan(functions.power(blank, "reciprocal", blank), meters[1])
        assert [meter.rounds for meter in meters] == [6, 6]

    @pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 100, 768])
    @pytest.mark.parametrize("scale", [16, 32, 40])
    def test_norms_of_any_width(self, count: int, scale: int) -> None:
        torch.manual_seed(count)
        _, x = encoded(torch.randn(5, count) * torch.tensor([[0.1], [1.0], [5.0], [20.0], [25.0]]) + 3, scale)
        result = run(functions.normalise, x, scale, dims=(1,), epsilon=1e-5)
        expected = torch.nn.functional.layer_norm(x, (count,))
        # Rounding of the centred values to 2^-16 counts in standard deviations.
        spread = x.std(1, correction=0, keepdim=True).clamp(min=2.0**-6)
        assert bool(((result - expected).abs() <= 2.0**-12 * expected.abs() + 2.0**-15 + 2.0**-14 / spread).all())


class TestSoftmax:
    @pytest.mark.parametrize("size", [1, 2, 3, 10, 17])
    @pytest.mark.parametrize("scale", [16, 32])
    def test_it_sums_to_one_over_any_range(self, size: int, scale: int) -> None:
        torch.manual_seed(size)
        rows = torch.randn(20, size) * torch.tensor([0.01, 1.0, 10.0, 1000.0]).repeat(5).view(20, 1)
        rows[0] = 5.0
        _, x = encoded(rows, scale)
        result = run(functions.softmax, x, scale, dim=1)
        assert float((result - x.softmax(1)).abs().max()) < 2.0**-13
        assert float((result.sum(1) - 1).abs().max()) < 2.0**-11
        logarithms = run(functions.log_softmax, x, scale, dim=1)
        assert float((logarithms - x.log_softmax(1)).abs().max()) < 2.0**-13


class TestOrder:
    @given(seeds, st.integers(1, 12), st.booleans())
    @settings(max_examples=25)
    def test_sorting_with_ties(self, seed: int, size: int, largest_first: bool) -> None:
        x = prg(seed).derive("values").words((3, size)) % 5 - 2
        sides = shared(x << 16, 16, seed)

        def sort(side: Share) -> Any:
            matrix = yield from ordering.order(side, size, largest_first)
            return (yield from ordering.picked(matrix, side)), ordering.indices(matrix)

        (alice, places), (bob, other) = both(trio(seed), sort, sides)
        expected = torch.sort(x, dim=1, descending=largest_first, stable=True)
        assert torch.equal(total((alice, bob)), expected[0] << 16)
        assert torch.equal(total((places, other)), expected[1])

    @given(seeds, st.integers(1, 20))
    @settings(max_examples=15)
    def test_the_largest(self, seed: int, size: int) -> None:
        x = prg(seed).derive("values").words((2, size)) >> 35
        result = both(trio(seed), ordering.largest, shared(x, 16, seed), dim=1)
        assert torch.equal(total(result), x.amax(1, keepdim=True))

    def test_equality(self) -> None:
        x = torch.tensor([0, 1, -1, 2**28, -(2**28), 5])
        pair = shared(x.repeat_interleave(6), 16), shared(x.repeat(6), 16, 1)
        result = total(both(trio(), ordering.equal, *pair)).view(6, 6)
        assert torch.equal(result, torch.eye(6, dtype=torch.int64))

    def test_too_many_to_sort(self) -> None:
        side = shared(torch.zeros(ordering.MAX_SORTED + 1, dtype=torch.int64), 16)[0]
        with pytest.raises(UnsupportedOperator, match="at most 128"):
            next(ordering.order(side, 1))


PROTOCOLS: dict[str, Callable[[Share], Any]] = {
    "sigmoid": lambda x: functions.bounded(x, "sigmoid"),
    "gelu": lambda x: functions.unit(x, "gelu"),
    "exp": functions.exp,
    "log": functions.log,
    "sqrt": functions.sqrt,
    "reciprocal": lambda x: functions.power(x, "reciprocal", x, signed=True),
    "softmax": lambda x: functions.softmax(x, 1),
    "norm": lambda x: functions.normalise(x, (1,), 1e-5),
    "absolute": functions.absolute,
    "order": lambda x: ordering.order(x, 2),
    "equal": lambda x: ordering.equal(x, -x),
    "indicator": lambda x: indicator(x, 9),
}


@pytest.mark.parametrize("scale", [16, 32])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_planned_cost_is_the_counted_cost(name: str, scale: int) -> None:
    pair = shared(torch.arange(1, 16).view(3, 5) << scale, scale)
    blank = Share(torch.empty(3, 5, dtype=torch.int64, device="meta"), scale, Role.ALICE)
    planned, counted = Meter(), Meter()
    shape = plan(PROTOCOLS[name](blank), planned).shape
    result = trio().run(*(PROTOCOLS[name](side) for side in pair), counted)
    assert result[0].shape == shape
    assert planned.correlations == counted.correlations
    assert (planned.rounds, planned.bytes_online) == (counted.rounds, counted.bytes_online)


@pytest.mark.parametrize("protocol", [lambda x: interpolate(x, "sigmoid"), exponential, lambda x: indicator(x, 4)])
def test_what_is_opened_is_uniform(protocol: Callable[[Share], Any]) -> None:
    # The same private value and fresh masks: the opened words' top bytes pass a chi-square test at five deviations.
    tap = Recorder()
    pair = shared(torch.full((20_000,), 2 << 16), 16)
    trio(7, tap).run(*(protocol(side) for side in pair))
    ((opened,),) = tap.opened()
    counts = torch.bincount((opened >> 56) + 128, minlength=256).double()
    statistic = float(((counts - 20_000 / 256) ** 2 / (20_000 / 256)).sum())
    assert abs(statistic - 255) < 5 * (2 * 255) ** 0.5
