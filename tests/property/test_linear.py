"""Products on shares are exact in the ring, whatever their operands: against the same product of plain words."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine import Pair, seeds, shared, total, trio, words
from tacit.mpc.linear import (
    Bilinear,
    Convolve,
    MatMul,
    Multiply,
    Swapped,
    load_weight,
    output_shape,
    times,
    times_number,
    times_public,
    times_weight,
)
from tacit.mpc.lockstep import Trio, both

sizes = st.integers(1, 4)
matrices = st.sampled_from(
    [
        ((2, 3), (3, 4)),
        ((3,), (3,)),
        ((2, 3), (3,)),
        ((3,), (3, 2)),
        ((5, 2, 3), (3, 4)),
        ((5, 2, 3), (5, 3, 1)),
        ((2, 1, 2, 3), (4, 3, 2)),
        ((1, 1), (1, 1)),
    ]
)
broadcasts = st.sampled_from(
    [((2, 3), (2, 3)), ((2, 3), (3,)), ((1, 3), (2, 1)), ((), (4,)), ((4,), ()), ((2, 1, 3), (5, 1))]
)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Convolve, tuple[int, ...], tuple[int, ...]]:
    rank = draw(st.integers(1, 2))
    every_axis = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    groups, kernel, padding, dilation = draw(st.integers(1, 2)), every_axis(1, 3), every_axis(0, 2), every_axis(1, 2)
    image = every_axis(1, 7)
    assume(all(i + 2 * p >= d * (k - 1) + 1 for i, p, d, k in zip(image, padding, dilation, kernel, strict=True)))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    op = Convolve(every_axis(1, 3), padding, dilation, groups)
    return op, (draw(st.integers(1, 3)), inputs, *image), (outputs, inputs // groups, *kernel)


products = st.one_of(
    st.tuples(st.just(MatMul()), matrices).map(lambda c: (c[0], *c[1])),
    st.tuples(st.just(Multiply()), broadcasts).map(lambda c: (c[0], *c[1])),
    convolutions(),
    st.tuples(st.just(Swapped(MatMul())), matrices).map(lambda c: (c[0], c[1][1], c[1][0])),
    convolutions().map(lambda c: (Swapped(c[0]), c[2], c[1])),
)


def loaded(run: Trio, pair: Pair, number: int = 0) -> tuple[Any, Any]:
    """Load a weight in a trio; each party's side of it."""
    state = run.load(*(_as_state(side, number) for side in pair))
    return state[0]["w"], state[1]["w"]


def _as_state(side, number):
    return {"w": (yield from load_weight(side, number))}


@given(products, seeds)
def test_a_product_of_two_private_operands(case: tuple[Bilinear, Any, Any], seed: int) -> None:
    op, left, right = case
    x, y = words(seed, left), words(seed + 1, right)
    result = both(trio(seed), times, shared(x, 16, seed), shared(y, 13, seed + 1), op=op)
    assert result[0].scale == 29
    assert torch.equal(total(result), op(x, y))


@given(products, seeds)
def test_products_with_a_loaded_weight(case: tuple[Bilinear, Any, Any], seed: int) -> None:
    op, left, right = case
    run, w = trio(seed), words(seed, right)
    weight = loaded(run, shared(w, 13, seed))
    for query in range(2):
        x = words(seed + query, left)
        result = both(run, times_weight, shared(x, 16, seed + query), weight, op=op)
        assert result[0].scale == 29
        assert torch.equal(total(result), op(x, w))


def test_weights_loaded_side_by_side_are_kept_apart() -> None:
    run = trio()
    values = [words(i, (3, 3)) for i in range(3)]
    weights = [loaded(run, shared(value, seed=i), i) for i, value in enumerate(values)]
    x = words(9, (2, 3))
    for value, weight in reversed(list(zip(values, weights, strict=True))):
        assert torch.equal(total(both(run, times_weight, shared(x), weight, op=MatMul())), x @ value)


@given(products)
def test_the_planned_shape_is_the_product_s(case: tuple[Bilinear, Any, Any]) -> None:
    op, left, right = case
    assert output_shape(op, left, right) == tuple(op(words(0, left), words(1, right)).shape)


@given(broadcasts, seeds)
def test_a_product_with_a_public_tensor(shapes: Any, seed: int) -> None:
    x, public = words(seed, shapes[0]), torch.full(shapes[1], -1.75)
    result = tuple(times_public(side, public, Multiply(), 8) for side in shared(x, 16, seed))
    assert result[0].scale == 24
    assert torch.equal(total(result), x * torch.full(shapes[1], -448))


@settings(max_examples=300)
@given(st.floats(-1000, 1000).filter(lambda factor: abs(factor) > 2**-12), seeds)
def test_a_public_number_has_a_relative_error_of_at_most_2_to_the_minus_16(factor: float, seed: int) -> None:
    x = words(seed, (20,), 2**30 - 1)
    result = tuple(times_number(side, factor) for side in shared(x, 16, seed))
    got = total(result).double() / 2.0 ** result[0].scale
    exact = x.double() / 2**16 * factor
    assert bool(((got - exact).abs() <= exact.abs() * 2**-16 * (1 + 1e-9)).all())


@pytest.mark.parametrize("factor", [0.25, 1.0, 2.0, -1.0, 1024.0, 3.0, -0.75, 2.0**20, 65535.0])
def test_short_factors_are_exact(factor: float) -> None:
    x = words(3, (20,), 2**20)
    result = tuple(times_number(side, factor) for side in shared(x))
    assert result[0].scale >= 0
    assert torch.equal(total(result).double() * 2.0 ** -result[0].scale, x.double() / 2**16 * factor)


def test_zero_times_anything_is_zero() -> None:
    assert total(tuple(times_number(side, 0.0) for side in shared(words(1, (5,))))).tolist() == [0] * 5


@pytest.mark.parametrize("exponent", [-3, 0, 3])
def test_powers_of_two_leave_the_words_alone(exponent: int) -> None:
    side = shared(words(1, (5,)))[0]
    assert torch.equal(times_number(side, math.ldexp(1.0, exponent)).words, side.words)
