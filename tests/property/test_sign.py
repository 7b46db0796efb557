"""Truncation, comparison, ReLU and maximum against exact integers, over chosen values and chosen masks."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import LARGEST, UNIT, chosen, drive, prg, seeds, shared, total, trio, words
from tacit.errors import InputError
from tacit.mpc.lockstep import both
from tacit.mpc.shares import reconstruct
from tacit.mpc.sign import (
    Mask,
    Window,
    combiner,
    comparison_window,
    masked_opening,
    maximum,
    nonnegative,
    relu,
    truncate,
)
from tacit.ring.integers import parity

WRAPS = [0, 1, 2**62 - 1, 2**62, 2**63 - 1, -(2**63), -(2**63) + 1, -(2**62), -(2**62) - 1, -1, -2]
"""Masks around every boundary of the ring: 2^63 is -(2^63), 2^64 - 1 is -1."""
EDGES = sorted({s * (m + d) for s in (1, -1) for m in (0, 1, 2**16, 2**30, 2**47, LARGEST - 1) for d in (-1, 0, 1)})
DROPS = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 61, 62]


def grid(left: list[int], right: list[int]) -> tuple[Tensor, Tensor]:
    """All pairs."""
    pairs = torch.tensor(list(product(left, right)), dtype=torch.int64)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


def opened_value(z, drop, window=None, select=False):
    return (yield from masked_opening(z, drop, window, select)).value()


def sign_bit(z, window):
    opening = yield from masked_opening(z, window=window)
    return (yield from opening.nonnegative())


def selected(z, drop, window):
    opening = yield from masked_opening(z, drop, window, select=True)
    bit = yield from opening.nonnegative()
    return (yield from opening.times(bit))


def run(protocol, values: Tensor, masks: Tensor, *args, scale: int = 32, seed: int = 0):
    """Run a protocol of one input under chosen masks."""
    pair = shared(values, scale, seed)
    return drive(*(protocol(side, *args) for side in pair), chosen(masks, seed))


class TestTruncation:
    @pytest.mark.parametrize("drop", DROPS)
    def test_at_every_edge_and_wrap_it_is_the_floor_or_one_more(self, drop: int) -> None:
        values, masks = grid(EDGES, WRAPS)
        result = run(opened_value, values, masks, drop, scale=62)
        assert result[0].scale == 62 - drop
        error = total(result) - (values >> drop)
        assert bool(((error == 0) | (error == 1)).all())

    @pytest.mark.parametrize("drop", DROPS)
    def test_both_wrapping_and_not_occur(self, drop: int) -> None:
        values, masks = grid(EDGES, WRAPS)
        wrapped = (values + 2**62 + masks >= 0) & (masks < 0)
        assert 0 < int(wrapped.sum()) < len(values)

    @pytest.mark.parametrize("drop", [1, 3, 6])
    def test_one_more_exactly_when_the_mask_carries(self, drop: int) -> None:
        unit = 1 << drop
        values, masks = grid(list(range(-unit, unit)), list(range(unit)))
        result = total(run(opened_value, values, masks, drop))
        assert torch.equal(result - (values >> drop), ((values % unit + masks) >= unit).long())
        # Over all masks that is (Z mod 2^t) / 2^t of them: on average nothing is lost.
        averages = result.double().view(2 * unit, unit).mean(1)
        assert torch.equal(averages, torch.arange(-unit, unit).double() / unit)

    @given(seeds, st.integers(1, 62))
    def test_under_dealt_masks(self, seed: int, drop: int) -> None:
        values = words(seed, (50,), LARGEST)
        result = both(trio(seed), truncate, shared(values, drop + 3, seed), scale=3)
        assert result[0].scale == 3
        error = total(result) - (values >> drop)
        assert bool(((error == 0) | (error == 1)).all())

    def test_rounding_has_no_bias(self) -> None:
        values = torch.full((100_000,), 3 * 2**16 + 2**14)
        result = total(both(trio(), truncate, shared(values, 32), scale=16))
        # A binomial of p = 1/4; five standard deviations.
        assert abs((result - 3).double().mean().item() - 0.25) < 5 * (0.25 * 0.75 / 100_000) ** 0.5

    def test_nothing_to_drop_costs_nothing(self) -> None:
        side = shared(words(0, (3,)), 16)[0]
        with pytest.raises(StopIteration) as stop:
            next(truncate(side, 16))
        assert stop.value.value is side

    @pytest.mark.parametrize(
        ("drop", "dtype"),
        [(8, torch.int8), (9, torch.int16), (16, torch.int16), (17, torch.int32), (32, torch.int32), (33, torch.int64)],
    )
    def test_the_wrap_is_dealt_in_the_narrowest_type(self, drop: int, dtype: torch.dtype) -> None:
        fields = Mask((2, 3), drop).fields
        assert fields["mu"].dtype == dtype
        assert fields["rho"].nbytes == 48


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 5])
def test_the_tables_give_the_borrow_for_every_mask_and_every_byte(chunks: int) -> None:
    tables = combiner(chunks)
    count = 1 << tables.width
    mask, true = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    equal = [true >> i & 1 for i in range(chunks - 1)]
    less = [true >> (chunks - 1 + i) & 1 for i in range(chunks - 1)]
    borrow, prefix = torch.zeros_like(true), torch.ones_like(true)
    for e, l in zip(equal, less, strict=True):  # noqa: E741
        prefix = prefix & e
        borrow = borrow ^ (prefix & l)
    byte = mask ^ true
    got = parity((tables.products[mask] & tables.coefficients[byte]).contiguous()) ^ tables.constant[byte]
    assert torch.equal(got.long(), borrow)
    assert int(tables.products.max()) < 1 << 61  # the two bits above carry the window's top bit and the selector


class TestComparison:
    def check(self, window: Window, values: Tensor, masks: Tensor, seed: int = 0) -> None:
        alice, bob = run(sign_bit, values, masks, window, seed=seed)
        assert torch.equal((alice.bits ^ bob.bits).bool(), values >= 0)

    @pytest.mark.parametrize("lowest", [0, 5, 56])
    def test_one_chunk_for_all_values_and_all_masks(self, lowest: int) -> None:
        values, masks = grid(list(range(-64, 64)), list(range(128)))
        noise = prg().words(masks.shape)  # what lies outside the window must not matter
        outside = noise & ~(127 << lowest)
        # Below the window, a mask that carries turns -1 into 0: leave it out where values are multiples of the lowest.
        self.check(Window(lowest, 1), values << lowest, (masks << lowest) | outside)

    def test_two_chunks_for_all_values(self) -> None:
        values = torch.arange(-(2**12), 2**12).repeat(64)
        self.check(Window(0, 2), values, prg().words(tuple(values.shape)))

    @pytest.mark.parametrize("value", [0, 1, -1, 63, 64, -64, -65, 4095, -4096])
    def test_two_chunks_for_all_masks(self, value: int) -> None:
        masks = torch.arange(2**13)
        self.check(Window(0, 2), torch.full_like(masks, value), masks)

    @pytest.mark.parametrize("lowest", [0, 1, 16, 32])
    @pytest.mark.parametrize("chunks", [3, 4, 5])
    def test_every_edge(self, lowest: int, chunks: int) -> None:
        window = Window(lowest, chunks)
        limit = 1 << window.top
        largest = limit - (1 << lowest)  # above it the ignored low bits may carry into the sign
        ends = {0, largest, -limit, *(s << lowest + 6 * i for i in range(chunks) for s in (1, -1, 63, -63))}
        near = {value + step for value in ends for step in (-(1 << lowest), 0, 1 << lowest)}
        values = sorted({*near, *ends, *(v + d for v in ends if v >= 0 for d in (0, 1))})
        values = [v for v in values if -limit <= v <= largest and not -(1 << lowest) < v < 0]
        carries = [
            s * (1 << b) + d for b in (*range(0, 64, 6), lowest, window.top, 62) for s in (1, -1) for d in (-1, 0)
        ]
        masks = sorted({(m + 2**63) % 2**64 - 2**63 for m in carries} | set(WRAPS))
        self.check(window, *grid(values, masks))
        repeated = torch.tensor(values).repeat(400)
        self.check(window, repeated, prg(chunks).words(tuple(repeated.shape)))

    @given(seeds, st.integers(1, 5), st.data())
    def test_values_inside_the_window(self, seed: int, chunks: int, data: st.DataObject) -> None:
        window = Window(data.draw(st.integers(0, 62 - 6 * chunks)), chunks)
        values = words(seed, (64,), (1 << window.top) - (1 << window.lowest))
        values = torch.where(values < 0, values >> window.lowest << window.lowest, values)
        self.check(window, values, prg(seed + 1).words((64,)), seed)

    @pytest.mark.parametrize("scale", [16, 24, 32, 40, 48])
    def test_near_ties_are_decided_down_to_one_unit_at_16_bits(self, scale: int) -> None:
        unit = 1 << scale - 16
        values, masks = grid([-3 * unit, -2 * unit - 1, -unit, 0, 1, unit - 1, unit], list(range(-500, 500)))
        masks = masks * 0x9E3779B97F4A7C1
        result = total(run(nonnegative, values, masks, scale=scale))
        assert torch.equal(result, (values >= 0).long())

    @pytest.mark.parametrize("scale", [17, 32])
    def test_closer_to_zero_than_that_the_mask_decides(self, scale: int) -> None:
        # A mask whose ignored bits are zero borrows nothing from -1; any other does.
        masks = torch.tensor([0, 1])
        result = total(run(nonnegative, torch.tensor([-1, -1]), masks, scale=scale))
        assert result.tolist() == [0, 1]

    @given(seeds, st.integers(0, 16), st.integers(1, 5))
    def test_the_result_is_a_number_at_scale_zero(self, seed: int, scale: int, chunks: int) -> None:
        values = words(seed, (30,), 2 ** (6 * chunks) - 1)
        result = both(trio(seed), nonnegative, shared(values, scale, seed), chunks=chunks)
        assert result[0].scale == 0
        assert torch.equal(total(result), (values >= 0).long())

    @pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4), (7,), (0,), (3, 0)])
    def test_every_shape(self, shape: tuple[int, ...]) -> None:
        values = words(5, shape, 2**30 - 1)
        result = total(both(trio(), nonnegative, shared(values)))
        assert torch.equal(result, (values >= 0).long())

    @pytest.mark.parametrize(("lowest", "chunks"), [(0, 0), (0, 6), (-1, 1), (33, 5), (57, 1)])
    def test_a_window_outside_the_word_is_refused(self, lowest: int, chunks: int) -> None:
        with pytest.raises(InputError, match="does not fit a word"):
            Window(lowest, chunks)

    def test_an_opening_without_a_window_does_not_compare(self) -> None:
        with pytest.raises(InputError, match="without a comparison window"):
            both(trio(), sign_bit, shared(words(0, (2,), 5)), window=None)


class TestRelu:
    @pytest.mark.parametrize("drop", [0, 7, 8, 16, 17, 32, 33])
    def test_within_one_unit_under_every_wrap(self, drop: int) -> None:
        window = Window(drop, 5) if drop <= 32 else Window(32, 5)
        limit = 1 << window.top
        ends = [0, 1, -1, 1 << drop, -(1 << drop), limit - (1 << window.lowest), -limit, limit >> 1, -(limit >> 1) + 1]
        values, masks = grid(ends, WRAPS)
        result = total(run(selected, values, masks, drop, window, scale=60))
        exact = values.clamp(min=0).double() / 2.0**drop
        # Adding 2^-20 keeps float64 rounding of large magnitudes out of it.
        assert float((result.double() - exact).abs().max()) <= 1 + 2**-20

    @settings(max_examples=60)
    @given(seeds, st.integers(0, 40), st.integers(0, 16), st.integers(1, 5))
    def test_against_the_oracle(self, seed: int, scale: int, kept: int, chunks: int) -> None:
        window = comparison_window(scale, chunks)
        values = words(seed, (40,), (1 << window.top) - (1 << window.lowest))
        result = both(trio(seed), relu, shared(values, scale, seed), scale=kept, chunks=chunks)
        drop = max(0, scale - kept)
        assert result[0].scale == scale - drop
        error = total(result).double() - values.clamp(min=0).double() / 2.0**drop
        near_tie = 2.0 ** (window.lowest - drop)
        assert float(error.abs().max()) <= max(1.0, near_tie)

    def test_real_numbers(self) -> None:
        values = torch.linspace(-100, 100, 4001, dtype=torch.float64)
        words = (values * 2.0**32).round().long()
        result = both(trio(), relu, shared(words, 32))
        assert float((reconstruct(*result) - values.clamp(min=0)).abs().max()) <= UNIT


class TestMaximum:
    @settings(max_examples=60)
    @given(seeds, st.integers(0, 16), st.integers(0, 16))
    def test_exact_at_16_bits_and_below(self, seed: int, left: int, right: int) -> None:
        x, y = words(seed, (30,), 2**13), words(seed + 1, (30,), 2**13)
        result = both(trio(seed), maximum, shared(x, left, seed), shared(y, right, seed + 1))
        scale = max(left, right)
        assert result[0].scale == scale
        assert torch.equal(total(result), torch.maximum(x << scale - left, y << scale - right))

    def test_at_a_higher_scale_it_is_one_of_the_two_and_close_to_the_larger(self) -> None:
        x = words(1, (1000,), 2**40)
        y = x + words(2, (1000,), 2**18)
        result = total(both(trio(), maximum, shared(x, 32, 1), shared(y, 32, 2)))
        assert bool(((result == x) | (result == y)).all())
        assert int((torch.maximum(x, y) - result).max()) < 2**16

    def test_the_range_s_ends_are_compared(self) -> None:
        ends = [2**29 - 1, -(2**29), 0]
        x, y = grid(ends, ends)
        assert torch.equal(total(both(trio(), maximum, shared(x), shared(y, seed=1))), torch.maximum(x, y))


def test_unsigned_masks_are_what_they_are_called() -> None:
    assert np.array([-(2**63), -1]).view(np.uint64).tolist() == [2**63, 2**64 - 1]
    assert {2**63 - 2**64, -1} <= set(WRAPS)
