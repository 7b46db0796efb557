"""Pooling on shares against torch's pooling of plain numbers."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from engine import UNIT, seeds, shared, total, trio, words
from tacit.errors import InputError
from tacit.mpc.lockstep import Meter, both
from tacit.mpc.pooling import Windows, average_pool, max_pool

LIMIT = 2**27  # 2,048 at 16 fractional bits: padding stands for -4,096


@st.composite
def geometries(draw: st.DrawFn, rank: int, dilated: bool = True) -> tuple[Windows, tuple[int, ...]]:
    every_axis = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    kernel = every_axis(1, 3)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    dilation = every_axis(1, 2) if dilated else (1,) * rank
    sizes = every_axis(1, 7)
    fits = (s + 2 * p >= d * (k - 1) + 1 for s, p, d, k in zip(sizes, padding, dilation, kernel, strict=True))
    assume(all(fits))
    windows = Windows(kernel, every_axis(1, 3), padding, dilation, draw(st.booleans()))
    # A window of nothing but padding has no largest element: torch says minus infinity, shares have none.
    assume(bool((pooled(torch.zeros(1, 1, *sizes), windows) == 0).all()))
    return windows, sizes


def pooled(values: torch.Tensor, windows: Windows) -> torch.Tensor:
    function = functional.max_pool1d if len(windows.kernel) == 1 else functional.max_pool2d
    geometry: list[Any] = [windows.kernel, windows.stride, windows.padding, windows.dilation, windows.ceil_mode]
    return function(values.double(), *geometry).long()


@settings(max_examples=60)
@given(geometries(2), seeds)
def test_max_pool_2d(case: tuple[Windows, tuple[int, ...]], seed: int) -> None:
    windows, sizes = case
    values = words(seed, (2, 2, *sizes), LIMIT)
    result = both(trio(seed), max_pool, shared(values, 16, seed), windows=windows)
    assert result[0].scale == 16
    assert torch.equal(total(result), pooled(values, windows))


@settings(max_examples=60)
@given(geometries(1), seeds)
def test_max_pool_1d(case: tuple[Windows, tuple[int, ...]], seed: int) -> None:
    windows, sizes = case
    values = words(seed, (2, 3, *sizes), LIMIT)
    result = both(trio(seed), max_pool, shared(values, 16, seed), windows=windows)
    assert torch.equal(total(result), pooled(values, windows))


@given(geometries(2))
def test_the_number_of_windows_is_torch_s(case: tuple[Windows, tuple[int, ...]]) -> None:
    windows, sizes = case
    assert windows.outputs(sizes) == tuple(pooled(torch.zeros(1, 1, *sizes), windows).shape[2:])


@pytest.mark.parametrize("scale", [24, 32])
def test_after_a_product_the_result_is_within_one_unit_of_the_largest(scale: int) -> None:
    values = words(1, (2, 3, 8, 8), LIMIT << scale - 16)
    windows = Windows((3, 3), (2, 2), (1, 1), (1, 1))
    result = both(trio(), max_pool, shared(values, scale), windows=windows)
    assert result[0].scale == scale
    assert float((total(result) - pooled(values, windows)).abs().max()) <= UNIT * 2.0**scale


@pytest.mark.parametrize(("kernel", "rounds"), [((1, 1), 0), ((1, 2), 3), ((2, 2), 6), ((1, 3), 6), ((3, 3), 12)])
def test_a_tournament_takes_three_rounds_a_level(kernel: tuple[int, int], rounds: int) -> None:
    windows, meter = Windows(kernel, kernel, (0, 0), (1, 1)), Meter()
    pair = shared(words(1, (1, 1, 6, 6), LIMIT))
    trio().run(*(max_pool(side, windows) for side in pair), meter)
    assert meter.rounds == rounds


def test_equal_elements_and_negative_ones() -> None:
    values = torch.full((1, 1, 4, 4), -5)
    windows = Windows((2, 2), (2, 2), (1, 1), (1, 1))
    assert torch.equal(total(both(trio(), max_pool, shared(values), windows=windows)), pooled(values, windows))


@given(geometries(2, dilated=False), seeds)
def test_average_pool(case: tuple[Windows, tuple[int, ...]], seed: int) -> None:
    windows, sizes = case
    assume(not windows.ceil_mode)
    values = words(seed, (2, 2, *sizes), 2**24)
    result = tuple(average_pool(side, windows) for side in shared(values, 16, seed))
    got = total(result).double() / 2.0 ** result[0].scale
    exact = functional.avg_pool2d(values.double() / 2**16, windows.kernel, windows.stride, windows.padding)
    assert bool(((got - exact).abs() <= exact.abs() * 2**-16 + 1e-9).all())


def test_an_average_over_a_power_of_two_is_exact() -> None:
    values = words(2, (1, 3, 8, 8), 2**24)
    result = tuple(average_pool(side, Windows((2, 4), (2, 4), (0, 0), (1, 1))) for side in shared(values))
    exact = functional.avg_pool2d(values.double(), (2, 4))
    assert torch.equal(total(result).double() * 2.0 ** (16 - result[0].scale), exact)


def test_a_divisor_replaces_the_window_s_size() -> None:
    values = words(2, (1, 1, 4, 4), 2**24)
    result = tuple(average_pool(side, Windows((2, 2), (2, 2), (0, 0), (1, 1)), 1) for side in shared(values))
    exact = functional.avg_pool2d(values.double(), 2, divisor_override=1)
    assert torch.equal(total(result).double() * 2.0 ** (16 - result[0].scale), exact)


def test_a_window_larger_than_the_image_is_refused() -> None:
    with pytest.raises(InputError, match="does not fit"):
        average_pool(shared(words(0, (1, 1, 2, 2)))[0], Windows((3, 3), (1, 1), (0, 0), (1, 1)))
