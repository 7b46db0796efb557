"""Exact truncation, comparison, ReLU and maximum against int64 floor shifts, over chosen values and chosen masks."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tacit
from engine import LARGEST, Recorder, chosen, drive, prg, seeds, shared, total, trio, words
from tacit.cluster import PrivateModel
from tacit.errors import InputError
from tacit.mpc import sign
from tacit.mpc.exact import MAX_LOW_BITS, ExactMask, maximum, nonnegative, relu, truncate
from tacit.mpc.lockstep import Meter, both, plan
from tacit.mpc.shares import Share
from tacit.mpc.sign import Window, comparison_window
from tacit.mpc.steps import Role
from tacit.program.lowering import Context
from tacit.program.network import NETWORKS, Network

WRAPS = [0, 1, 2**62 - 1, 2**62, 2**63 - 1, -(2**63), -(2**63) + 1, -(2**62), -(2**62) - 1, -1, -2]
"""Masks around every boundary of the ring."""
DROPS = [1, 5, 6, 7, 12, 13, 16, 18, 24, 29, 30]


def grid(left: list[int], right: list[int]) -> tuple[Tensor, Tensor]:
    """All pairs."""
    pairs = torch.tensor(list(product(left, right)), dtype=torch.int64)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


def carries(drop: int, top: int = 62) -> list[int]:
    """Masks around the borders of every chunk, at both signs."""
    bits = {*range(0, drop, 6), drop, *range(drop, top, 6), top}
    near = {s * (1 << b) + d for b in bits for s in (1, -1) for d in (-1, 0, 1)}
    return sorted({*near, *WRAPS})


def run(protocol, values: Tensor, masks: Tensor, *options: int, scale: int, seed: int = 0):
    """Run a protocol of one input under chosen masks."""
    return drive(*(protocol(side, *options) for side in shared(values, scale, seed)), chosen(masks, seed))


def floor_relu(values: Tensor, drop: int) -> Tensor:
    return (values >> drop).clamp(min=0)


class TestTruncation:
    @pytest.mark.parametrize("drop", [1, 3, 5, 6, 7])
    def test_for_all_low_bits_of_value_and_mask(self, drop: int) -> None:
        unit = 1 << drop
        values, masks = grid(list(range(-unit, 2 * unit)), list(range(unit)))
        for high in (0, 2**62, -(2**63), -unit):
            assert torch.equal(total(run(truncate, values, masks + high, 0, scale=drop)), values >> drop)

    @pytest.mark.parametrize("drop", DROPS)
    def test_at_every_edge_and_wrap_it_is_the_floor(self, drop: int) -> None:
        ends = (0, 1, 2**6, 2**drop, 2 ** (drop + 6), 2**47, LARGEST - 1)
        edges = sorted({s * (m + d) for s in (1, -1) for m in ends for d in (-1, 0, 1)})
        values, masks = grid(edges, carries(drop))
        result = run(truncate, values, masks, 40 - drop, scale=40)
        assert result[0].scale == 40 - drop
        assert torch.equal(total(result), values >> drop)

    @given(seeds, st.integers(1, MAX_LOW_BITS))
    def test_under_dealt_masks(self, seed: int, drop: int) -> None:
        values = words(seed, (50,), LARGEST)
        result = both(trio(seed), truncate, shared(values, drop + 3, seed), scale=3)
        assert result[0].scale == 3
        assert torch.equal(total(result), values >> drop)

    @pytest.mark.parametrize("drop", [31, 45, 60, 62])
    def test_more_bits_are_dropped_in_steps(self, drop: int) -> None:
        values = words(drop, (500,), LARGEST)
        assert torch.equal(total(both(trio(), truncate, shared(values, 62), scale=62 - drop)), values >> drop)

    def test_nothing_to_drop_costs_nothing(self) -> None:
        side = shared(words(0, (3,)), 16)[0]
        with pytest.raises(StopIteration) as stop:
            next(truncate(side, 16))
        assert stop.value.value is side

    def test_raising_is_refused(self) -> None:
        with pytest.raises(InputError, match="low bits"):
            next(truncate(shared(words(0, (3,)), 8)[0], 16))


class TestRelu:
    @pytest.mark.parametrize("drop", [2, 4])
    def test_for_all_values_and_masks_of_a_small_window(self, drop: int) -> None:
        top = drop + 6
        values, masks = grid(list(range((1 << drop) - (1 << top), 1 << top)), list(range(1 << top + 1))[:: drop - 1])
        result = run(relu, values, masks, 0, 1, scale=drop)
        assert torch.equal(total(result), floor_relu(values, drop))

    @pytest.mark.parametrize("drop", [0, *DROPS])
    @pytest.mark.parametrize("chunks", [1, 3, 5])
    def test_at_every_edge(self, drop: int, chunks: int) -> None:
        top = drop + 6 * chunks
        limit, unit = 1 << top, 1 << drop
        low = unit - limit if drop else -limit
        ends = {0, unit, -unit, 2 * unit, limit >> 1, -(limit >> 1), limit - unit, low}
        values = sorted(v for end in ends for d in (-1, 0, 1) if low <= (v := end + d) < limit)
        result = run(relu, *grid(values, carries(drop, top)), 40 - drop, chunks, scale=40)
        assert result[0].scale == 40 - drop
        expected = grid(values, carries(drop, top))[0]
        assert torch.equal(total(result), floor_relu(expected, drop))

    @given(seeds, st.integers(0, 46), st.integers(0, 16), st.integers(1, 5))
    def test_under_dealt_masks(self, seed: int, scale: int, kept: int, chunks: int) -> None:
        drop = max(0, scale - kept)
        values = words(seed, (40,), min((1 << drop + 6 * chunks) - (1 << drop), LARGEST))
        result = both(trio(seed), relu, shared(values, scale, seed), scale=kept, chunks=chunks)
        assert result[0].scale == scale - drop
        assert torch.equal(total(result), floor_relu(values, drop))


class TestSign:
    @pytest.mark.parametrize("lowest", [1, 3, 4])
    def test_for_all_values_and_masks_of_a_small_window(self, lowest: int) -> None:
        limit = 1 << lowest + 6
        values, masks = grid(list(range(-limit, limit)), list(range(0, 2 * limit, max(1, lowest - 2))))
        result = run(nonnegative, values, masks, 1, scale=16 + lowest)
        assert torch.equal(total(result), (values >= 0).long())

    @pytest.mark.parametrize("scale", [17, 22, 23, 32, 40, 46])
    @pytest.mark.parametrize("chunks", [1, 3, 5])
    def test_at_every_edge(self, scale: int, chunks: int) -> None:
        window = comparison_window(scale, chunks)
        limit, unit = 1 << window.top, 1 << window.lowest
        ends = {0, unit, -unit, limit - unit, limit - 1, unit - limit, -limit, limit >> 1, -(limit >> 1)}
        values = sorted(v for end in ends for d in (-1, 0, 1) if -limit <= (v := end + d) < limit)
        pairs = grid(values, carries(window.lowest, window.top))
        result = run(nonnegative, *pairs, chunks, scale=scale)
        assert result[0].scale == 0
        assert torch.equal(total(result), (pairs[0] >= 0).long())

    @given(seeds, st.integers(0, 62), st.integers(1, 5))
    def test_under_dealt_masks(self, seed: int, scale: int, chunks: int) -> None:
        values = words(seed, (40,), min((1 << comparison_window(min(scale, 48), chunks).top) - 1, LARGEST))
        result = both(trio(seed), nonnegative, shared(values, scale, seed), chunks=chunks)
        assert torch.equal(total(result), (values >= 0).long())

    @settings(max_examples=60)
    @given(seeds, st.integers(0, 40), st.integers(0, 40))
    def test_the_larger_of_two_is_exactly_that(self, seed: int, left: int, right: int) -> None:
        scale = max(left, right)
        lowest = max(0, scale - 16)
        x = words(seed, (30,), 1 << 28 + lowest) >> scale - left
        y = torch.where(torch.arange(30) % 2 == 0, words(seed + 1, (30,), 1 << 28 + lowest) >> scale - right, 0)
        y = torch.where(torch.arange(30) % 3 == 0, (x << scale - left >> scale - right) + words(seed, (30,), 2), y)
        result = both(trio(seed), maximum, shared(x, left, seed), shared(y, right, seed + 1))
        assert result[0].scale == scale
        assert torch.equal(total(result), torch.maximum(x << scale - left, y << scale - right))

    def test_too_many_fractional_bits_are_refused(self) -> None:
        x = shared(words(0, (3,), 5), 47)[0]
        with pytest.raises(InputError, match="low bits"):
            next(maximum(x, x))


class TestWhatTheDefaultLeavesOut:
    def test_ignored_bits_carry_at_both_ends_of_the_window(self) -> None:
        # A mask of ones in the ignored bits borrows from every value that is not a multiple of 2^16.
        values = torch.tensor([-1, 2**46 - 1, 2**46 - 2**16 + 1, 2**46 - 2**16, -(2**46)])
        masks = torch.full_like(values, 2**16 - 1)
        assert total(run(sign.nonnegative, values, masks, scale=32)).tolist() == [1, 0, 0, 1, 0]
        assert total(run(nonnegative, values, masks, scale=32)).tolist() == [0, 1, 1, 1, 0]

    def test_the_floor_or_one_more(self) -> None:
        values, masks = torch.tensor([5, 5]), torch.tensor([0, 2**16 - 1])
        assert total(run(sign.truncate, values, masks, scale=32)).tolist() == [0, 1]
        assert total(run(truncate, values, masks, scale=32)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("mask", "bytes_dealt"),
    [
        (ExactMask((1,), 16), 50),
        (ExactMask((1,), 16, Window(16, 5), select=True), 124),
        (ExactMask((1,), 0, Window(16, 5), select=True), 104),
    ],
)
def test_the_stated_bytes_dealt(mask: ExactMask, bytes_dealt: int) -> None:
    assert mask.nbytes == bytes_dealt


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (0,)])
@pytest.mark.parametrize(
    ("protocol", "scale", "rounds", "bytes_each", "bits"),
    [
        (truncate, 32, 3, 9, 1),
        (truncate, 20, 2, 8, 1),
        (relu, 32, 3, 10, 2),
        (relu, 16, 3, 9, 1),
        (nonnegative, 32, 4, 11, 3),
        (nonnegative, 16, 3, 9, 1),
    ],
)
def test_planned_is_counted_is_stated(protocol, scale, rounds, bytes_each, bits, shape: tuple[int, ...]) -> None:
    planned, counted = Meter(), Meter()
    plan(protocol(Share(torch.empty(shape, dtype=torch.int64, device="meta"), scale, Role.ALICE)), planned)
    pair = shared(words(0, shape, 1000), scale)
    trio().run(protocol(pair[0]), protocol(pair[1]), counted)
    assert (planned.rounds, planned.layers) == (counted.rounds, counted.layers)
    assert planned.correlations == counted.correlations
    count = pair[0].words.numel()
    assert planned.rounds == rounds
    assert planned.bytes_online == bytes_each * count + bits * -(-count // 8)


@pytest.mark.parametrize("value", [0, -1, 12345])
@pytest.mark.parametrize("protocol", [truncate, relu, nonnegative])
def test_every_opened_bit_is_a_fair_coin_whatever_is_hidden(protocol, value: int) -> None:
    # The three values differ in borrow and sign under most masks.
    recorder, count = Recorder(), 20_000
    both(trio(tap=recorder), protocol, shared(torch.full((count,), value), 32))
    bits = [(x.long() >> i) & 1 for opened in recorder.opened()[1:] for x in opened for i in range(8)]
    used = [bit for bit in bits if bool(bit.any())]
    assert len(used) >= 5
    assert all(abs(bit.double().mean().item() - 0.5) < 5 * 0.5 / count**0.5 for bit in used)


def test_the_masks_differ_between_seeds() -> None:
    values = words(3, (64,), 2**40)
    first, second = (run(truncate, values, prg(seed).words((64,)), 16, scale=32, seed=seed) for seed in (1, 2))
    assert torch.equal(total(first), total(second))
    assert not torch.equal(first[0].words, second[0].words)


def units(tensor: Tensor) -> Tensor:
    return (tensor.detach().double() * 2**16).round().long()


def dense(x: Tensor, layer: nn.Linear, scale: int = 16) -> Tensor:
    """A linear layer on integers: a result with 16 fractional bits more."""
    return x @ units(layer.weight).T + (units(layer.bias) << scale)


def convolved(x: Tensor, layer: nn.Conv2d) -> Tensor:
    bias = (units(layer.bias) << 16).view(-1, 1, 1)
    return nn.functional.conv2d(x, units(layer.weight), None, layer.stride, layer.padding) + bias


def pooled(x: Tensor) -> Tensor:
    """The largest of every 2 × 2 window."""
    return x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))


def as_floats(integers: Tensor, scale: int) -> Tensor:
    return (integers.double() / 2.0**scale).float()


class Closest(nn.Module):
    """Which of two nearly equal layers gives more."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(6, 5)
        with torch.no_grad():
            self.right.weight.copy_(self.left.weight)
            self.right.bias.copy_(self.left.bias)
            self.right.weight[:, 0] += 2.0**-16

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        left, right = self.left(x), self.right(x)
        truths = left >= right, left > right, left == right
        return *(truth.float() for truth in truths), torch.maximum(left, right), left.abs()


class TestModels:
    def encrypted(self, model: nn.Module, x: Tensor, **options) -> PrivateModel:
        return tacit.cluster(prg(3)).encrypt(model.eval(), x, context=Context(exact=True, **options))

    def check_cost(self, private: PrivateModel, x: Tensor) -> None:
        assert private.cost(tuple(x.shape)) == private.counted()

    def test_a_perceptron_bit_for_bit(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))
        x = torch.randn(50, 20) * 3
        hidden = floor_relu(dense(units(x), model[0]), 16)
        hidden = floor_relu(dense(hidden, model[2]), 16)
        private = self.encrypted(model, x)
        assert torch.equal(private(x), as_floats(dense(hidden, model[4]), 32))
        self.check_cost(private, x)

    def test_without_exact_mode_the_last_bit_differs(self) -> None:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(20, 16), nn.ReLU()), torch.randn(50, 20) * 3
        expected = floor_relu(dense(units(x), model[0]), 16)
        got = units(tacit.cluster(prg(3)).encrypt(model.eval(), x)(x))
        assert set((got - expected).unique().tolist()) == {0, 1}

    @pytest.mark.parametrize("network", [None, NETWORKS["wan"]])
    def test_a_cnn_bit_for_bit(self, network: Network | None) -> None:
        torch.manual_seed(1)
        model = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
            *(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)),
        )
        x = torch.randn(6, 1, 14, 14)
        hidden = floor_relu(pooled(convolved(units(x), model[0])), 16)
        hidden = floor_relu(pooled(convolved(hidden, model[3])), 16)
        # A mean of four is a sum of four with two fractional bits more.
        mean = hidden.flatten(1).view(6, 6, -1).sum(-1)
        hidden = floor_relu(dense(mean, model[8], 18), 18)
        private = self.encrypted(model, x, network=network)
        assert torch.equal(private(x), as_floats(dense(hidden, model[10]), 32))
        self.check_cost(private, x)

    def test_comparisons_see_the_last_bit_of_a_product(self) -> None:
        torch.manual_seed(2)
        model, x = Closest(), torch.randn(40, 6)
        x[::7, 0] = 0
        left, right = dense(units(x), model.left), dense(units(x), model.right)
        private = self.encrypted(model, x)
        *truths, larger, magnitude = private(x)
        for got, expected in zip(truths, (left >= right, left > right, left == right), strict=True):
            assert torch.equal(got.bool(), expected)
        assert torch.equal(larger, as_floats(torch.maximum(left, right), 32))
        assert torch.equal(magnitude, as_floats((left >> 16).abs(), 16))
        assert 0 < int((left == right).sum()) < left.numel()
        assert bool(((left - right).abs() < 2**16)[left != right].any())
        self.check_cost(private, x)

    def test_truncation_between_products(self) -> None:
        class Cube(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x**3 * -0.75

        x = torch.randn(30, 4) * 2
        square = units(x) ** 2 >> 16
        private = self.encrypted(Cube(), x)
        assert torch.equal(private(x), as_floats(square * units(x) * -3, 34))
        self.check_cost(private, x)

    def test_training_has_none(self) -> None:
        with pytest.raises(InputError, match="no exact mode"):
            tacit.cluster(prg()).trainer(nn.Linear(2, 2), lr=0.1, context=Context(exact=True))
