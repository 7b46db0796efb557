"""Operands masked once, and bits kept from a forward pass: exact products and gradients, whatever they enter."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional

from engine import UNIT, Recorder, seeds, shared, total, trio, words
from tacit.errors import CorrelationError, UnsupportedOperator
from tacit.mpc import gates
from tacit.mpc.gradients import InputGradient, WeightGradient
from tacit.mpc.linear import Convolve, MatMul, Multiply
from tacit.mpc.lockstep import Meter, both, plan
from tacit.mpc.masked import Forget, View, mask, times
from tacit.mpc.pooling import Windows
from tacit.mpc.shares import Share
from tacit.mpc.steps import Role, Take, together

views = st.lists(
    st.sampled_from(
        [
            View("transpose", (0, 1)),
            View("permute", ((1, 0),)),
            View("flip", ((0,),)),
            View("reshape", ((4, 4),)),
            View("slice", (0, 0, 4, 1)),
        ]
    ),
    max_size=3,
).map(tuple)


def seen(tensor: torch.Tensor, through: tuple[View, ...]) -> torch.Tensor:
    for view in through:
        tensor = view(tensor)
    return tensor


def masked_product(x: Share, y: Share, op: Any, left: tuple[View, ...] = (), right: tuple[View, ...] = ()) -> Any:
    one, other = yield from together(mask(x, "x"), mask(y, "y"))
    result = yield from times(one.seen(*left), other.seen(*right), op)
    yield Take(Forget())
    return result


@given(views, views, seeds)
def test_products_of_views_are_exact(left: tuple[View, ...], right: tuple[View, ...], seed: int) -> None:
    x, y = words(seed, (4, 4)), words(seed + 1, (4, 4))
    for op in (MatMul(), Multiply()):
        pair = shared(x, 16, seed), shared(y, 24, seed + 1)
        result = both(trio(seed), masked_product, *pair, op=op, left=left, right=right)
        assert result[0].scale == 40
        assert torch.equal(total(result), op(seen(x, left), seen(y, right)))


def a_layer(x: Share, w: Share, dy: Share) -> Any:
    """The three products of a linear layer in training."""
    x_, w_, dy_ = yield from together(mask(x, "x"), mask(w, "w"), mask(dy, "dy"))
    turned = View("transpose", (0, 1))
    forward = yield from times(x_, w_.seen(turned), MatMul())
    for_input = yield from times(dy_, w_, MatMul())
    for_weight = yield from times(dy_.seen(turned), x_, MatMul())
    square = yield from times(x_, x_, Multiply())
    return [forward, for_input, for_weight, square]


def test_every_operand_is_opened_once_whatever_it_enters() -> None:
    recorder, meter = Recorder(), Meter()
    x, w, dy = words(1, (5, 3)), words(2, (4, 3)), words(3, (5, 4))
    run = trio(tap=recorder)
    sides = [a_layer(*(pair[i] for pair in map(shared, (x, w, dy)))) for i in range(2)]
    alice, bob = run.run(sides[0], sides[1], meter)
    expected = [x @ w.T, dy @ w, dy.T @ x, x * x]
    assert all(torch.equal(total(tuple(pair)), value) for *pair, value in zip(alice, bob, expected, strict=True))
    assert (meter.rounds, meter.bytes_online) == (1, 8 * (15 + 12 + 20))
    assert meter.bytes_dealt == 8 * (20 + 15 + 12 + 15)
    assert [len(opened) for opened in recorder.opened()] == [3]


def test_a_masked_operand_is_uniform_and_masked_anew_each_time() -> None:
    recorder = Recorder()
    run = trio(tap=recorder)
    zeros = shared(torch.zeros(10_000, dtype=torch.int64))
    for _ in range(2):
        both(run, mask, zeros, name="weight")
    first, second = (opened[0] for opened in recorder.opened())
    assert not torch.equal(first, second)
    ones = sum(((first >> bit) & 1).sum().item() for bit in range(64)) / 640_000
    assert abs(ones - 0.5) < 5 * 0.5 / math.sqrt(640_000)


def test_a_mask_is_forgotten_at_the_end_of_its_step() -> None:
    run = trio()
    alice, bob = both(run, mask, shared(words(1, (2, 2))), name="x")
    result = run.run(times(alice, alice, MatMul()), times(bob, bob, MatMul()))
    assert torch.equal(total(result), words(1, (2, 2)) @ words(1, (2, 2)))

    def end() -> Any:
        yield Take(Forget())

    run.run(end(), end())
    with pytest.raises(CorrelationError, match="operand 'x' has no mask"):
        run.run(times(alice, alice, MatMul()), times(bob, bob, MatMul()))


def test_only_views_are_views() -> None:
    with pytest.raises(UnsupportedOperator, match="'relu' is not a view"):
        View("relu")


def test_operands_and_gates_do_not_print_values() -> None:
    alice, _ = both(trio(), mask, shared(torch.tensor([123456])), name="x")
    assert "123456" not in repr(alice)
    assert not any(str(number) in repr(alice) for number in (*alice.own.tolist(), *alice.opened.tolist()))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Convolve, tuple[int, ...], tuple[int, ...]]:
    rank = draw(st.integers(1, 2))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    groups, kernel, padding, dilation, image = draw(st.integers(1, 2)), each(1, 3), each(0, 2), each(1, 2), each(1, 8)
    assume(all(i + 2 * p >= d * (k - 1) + 1 for i, p, d, k in zip(image, padding, dilation, kernel, strict=True)))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    op = Convolve(each(1, 3), padding, dilation, groups)
    return op, (draw(st.integers(1, 3)), inputs, *image), (outputs, inputs // groups, *kernel)


@given(convolutions(), seeds)
def test_gradients_of_a_convolution_are_autograd_s(case: Any, seed: int) -> None:
    op, left, right = case
    x, w = words(seed, left, 99), words(seed + 1, right, 99)
    x_, w_ = x.double().requires_grad_(), w.double().requires_grad_()
    convolve = {1: functional.conv1d, 2: functional.conv2d}[len(op.stride)]
    y = convolve(x_, w_, None, op.stride, op.padding, op.dilation, op.groups)
    dy = words(seed + 2, tuple(y.shape), 99)
    y.backward(dy.double())
    geometry = (op.stride, op.padding, op.dilation, op.groups)
    for gradient, other, expected in (
        (InputGradient(left[2:], *geometry), w, x_.grad),
        (WeightGradient(right[2:], *geometry), x, w_.grad),
    ):
        assert torch.equal(gradient(dy, other).double(), expected)
        assert gradient(dy.to("meta"), other.to("meta")).shape == expected.shape
        result = both(trio(seed), masked_product, shared(dy, 16, seed), shared(other, 16, seed + 1), op=gradient)
        assert torch.equal(total(result).double(), expected)


def relu_and_gradient(z: Share, gradient: Share) -> Any:
    value, kept = yield from gates.relu(z, "relu")
    (passed,) = yield from gates.select(gradient, kept)
    yield Take(Forget())
    return value, passed


@pytest.mark.parametrize("scale", [16, 32, 40])
@given(seed=seeds)
def test_the_gradient_of_relu_passes_where_relu_was_open(scale: int, seed: int) -> None:
    z, g = words(seed, (50,), 2**28), words(seed + 1, (50,), 2 ** (14 + scale))
    alice, bob = both(trio(seed), relu_and_gradient, shared(z, 16, seed), shared(g, scale, seed + 1))
    value, passed = zip(alice, bob, strict=True)
    assert torch.equal(total(value), z.clamp(min=0))
    assert passed[0].scale == 16
    exact = torch.where(z >= 0, g, 0).double() * 2.0**-scale
    error = (total(passed).double() * UNIT - exact).abs().max()
    assert error == 0 if scale == 16 else error < UNIT


def pool_and_gradient(x: Share, gradient: Share, windows: Windows) -> Any:
    value, kept = yield from gates.max_pool(x, windows, "pool")
    leaves = yield from gates.select(gradient, kept)
    yield Take(Forget())
    return [value, *leaves]


WINDOWS = [
    (Windows((2, 2), (2, 2), (0, 0), (1, 1)), (6, 8)),
    (Windows((3, 3), (2, 2), (1, 1), (1, 1)), (7, 7)),
    (Windows((3, 2), (1, 2), (1, 0), (2, 1)), (7, 6)),
    (Windows((2, 2), (2, 2), (0, 0), (1, 1), ceil_mode=True), (5, 5)),
    (Windows((1, 1), (2, 2), (0, 0), (1, 1)), (5, 4)),
]


@pytest.mark.parametrize(("windows", "sizes"), WINDOWS)
@given(seed=seeds)
def test_the_gradient_of_max_pooling_goes_to_the_winner(windows: Windows, sizes: tuple[int, int], seed: int) -> None:
    # Distinct values, so that there is one winner.
    x = torch.argsort(words(seed, (2, 3, math.prod(sizes))), -1).view(2, 3, *sizes) * 1000 - 9999
    plain = x.double().requires_grad_()
    y = functional.max_pool2d(
        plain, windows.kernel, windows.stride, windows.padding, windows.dilation, windows.ceil_mode
    )
    g = words(seed + 1, tuple(y.shape), 2**30)
    alice, bob = both(trio(seed), pool_and_gradient, shared(x, 16, seed), shared(g, 16, seed + 1), windows=windows)
    value, *leaves = (total(pair) for pair in zip(alice, bob, strict=True))
    assert torch.equal(value.double(), y)
    assert torch.equal(sum(leaves), g)
    y.backward(g.double())
    positions = windows.elements(torch.arange(math.prod(sizes)).view(sizes), math.prod(sizes))
    spread = torch.zeros(2, 3, math.prod(sizes) + 1, dtype=torch.int64)
    for leaf, position in zip(leaves, positions, strict=True):
        spread.index_add_(2, position.flatten(), leaf.flatten(2))
    assert plain.grad is not None
    assert torch.equal(spread[..., :-1].view(2, 3, *sizes).double(), plain.grad)
    assert not spread[..., -1].any()


@pytest.mark.parametrize(("windows", "sizes"), WINDOWS[:3])
def test_pooling_costs_what_was_planned(windows: Windows, sizes: tuple[int, int]) -> None:
    outputs = (1, 2, *windows.outputs(sizes))
    counted, planned = Meter(), Meter()
    run = trio()
    pairs = [shared(words(1, (1, 2, *sizes), 2**20)), shared(words(2, outputs, 2**20), 32)]
    run.run(*(pool_and_gradient(*(pair[i] for pair in pairs), windows) for i in range(2)), counted)
    blanks = [Share(pair[0].words.to("meta"), pair[0].scale, Role.ALICE) for pair in pairs]
    plan(pool_and_gradient(*blanks, windows), planned)
    assert (planned.rounds, planned.bytes_online) == (counted.rounds, counted.bytes_online)
    assert planned.correlations == counted.correlations
    levels = math.ceil(math.log2(math.prod(windows.kernel)))
    assert counted.rounds == 3 * levels + 1


def test_the_two_by_two_tournament_is_undone_on_one_opening_and_five_products_of_selectors() -> None:
    windows, meter = Windows((2, 2), (2, 2), (0, 0), (1, 1)), Meter()
    x, g = (Share(torch.empty(1, 1, n, n, dtype=torch.int64, device="meta"), 16, Role.ALICE) for n in (8, 4))
    plan(pool_and_gradient(x, g, windows), meter)
    selection = next(c for c in meter.correlations if isinstance(c, gates.SelectionMask))
    assert len(selection.monomials) == 5
    assert selection.nbytes == 16 * 5 * 16


def test_kept_bits_are_forgotten_at_the_end_of_the_step() -> None:
    run, z = trio(), shared(words(1, (3,), 2**20))
    alice, bob = both(run, gates.relu, z, name="relu")

    def end() -> Any:
        yield Take(Forget())

    run.run(end(), end())
    with pytest.raises(CorrelationError, match="selector 'relu' is not kept"):
        run.run(gates.select(z[0], alice[1]), gates.select(z[1], bob[1]))


def test_what_keeping_a_bit_opens_is_uniform() -> None:
    recorder = Recorder()
    run = trio(tap=recorder)
    both(run, gates.relu, shared(torch.full((20_000,), 5)), name="relu")
    *_, (_, kept) = recorder.opened()
    assert kept.dtype == torch.bool
    assert abs(kept.double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(20_000)
