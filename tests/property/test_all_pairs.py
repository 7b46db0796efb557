"""Comparing all pairs at once: `tacit.mpc.all_pairs` against plain arithmetic."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tacit.errors import InputError
from tacit.mpc.all_pairs import PairwiseMask, largest, pairs_of, winner
from tacit.mpc.lockstep import Meter, Trio, both, plan
from tacit.mpc.pooling import Windows, max_pool_at_once
from tacit.mpc.shares import Share, reconstruct, share
from tacit.mpc.steps import Role
from tacit.ring.fixed_point import encode
from tacit.ring.prg import Prg

SEED = bytes(range(16))
CASES = list(itertools.product((2, 3, 4), (False, True)))


def run(words: torch.Tensor, scale: int, rectify: bool, to: int | None = None, chunks: int = 5) -> torch.Tensor:
    pair = share(words, scale, Prg(SEED))
    return reconstruct(*both(Trio(Prg(SEED)), largest, pair, rectify=rectify, scale=to, chunks=chunks))


@pytest.mark.parametrize(("count", "rectify"), CASES)
@given(data=st.data())
def test_exact_at_sixteen_fractional_bits(count, rectify, data):
    value = st.integers(-(2**28), 2**28) | st.integers(-2, 2) | st.sampled_from([63, 64, -64, 4095, 4096])
    rows = data.draw(st.lists(st.lists(value, min_size=count, max_size=count), min_size=1, max_size=20))
    words = torch.tensor(rows).T
    expected = words.amax(0).clamp(min=0) if rectify else words.amax(0)
    assert torch.equal(run(words, 16, rectify), expected.double() * 2.0**-16)


@pytest.mark.parametrize(("count", "rectify"), CASES)
def test_every_order_and_every_tie_of_small_values(count, rectify):
    words = torch.tensor(list(itertools.product(range(-2, 3), repeat=count))).T
    expected = words.amax(0).clamp(min=0) if rectify else words.amax(0)
    for chunks in (1, 2, 5):
        assert torch.equal(run(words, 0, rectify, chunks=chunks), expected.double())


@pytest.mark.parametrize(("count", "rectify"), CASES)
@given(data=st.data())
def test_near_ties_at_a_higher_scale_have_one_winner(count, rectify, data):
    """Values that differ by less than a unit of the comparison must not knock each other out."""
    base = data.draw(st.integers(-(2**44), 2**44))
    near = st.integers(-(2**17), 2**17).map(lambda offset: base + offset)
    rows = data.draw(st.lists(st.lists(near, min_size=count, max_size=count), min_size=1, max_size=20))
    words = torch.tensor(rows).T
    expected = (words.amax(0).clamp(min=0) if rectify else words.amax(0)).double() * 2.0**-32
    for to in (None, 16):
        assert float((run(words, 32, rectify, to) - expected).abs().max()) < 2 * 2.0**-16


def test_the_tables_are_the_truth_table():
    for count, rectify in CASES:
        pairs, tables = pairs_of(count, rectify), winner(count, rectify)
        every = range(1 << len(pairs))
        for mask, results in itertools.product(every, every[:: max(1, len(every) // 64) | 1]):
            opened = mask ^ results
            for i in range(count):
                wins = all((results >> p & 1) == (i == j) for p, (j, k) in enumerate(pairs) if i in (j, k))
                word = int(tables.products[mask]) & int(tables.coefficients[i, opened])
                assert (word.bit_count() & 1) ^ int(tables.constant[i, opened]) == wins


@pytest.mark.parametrize(("count", "rectify"), CASES)
@pytest.mark.parametrize(("scale", "to"), [(16, None), (32, 16)])
def test_planned_cost_is_counted_cost(count, rectify, scale, to):
    words = torch.zeros(count, 7, dtype=torch.int64)
    alice, bob = share(words, scale, Prg(SEED))
    counted, planned = Meter(), Meter()
    Trio(Prg(SEED)).run(largest(alice, rectify, to), largest(bob, rectify, to), counted)
    plan(largest(Share(words.to("meta"), scale, Role.ALICE), rectify, to), planned)
    assert (counted.rounds, counted.bytes_online, counted.bytes_dealt) == (
        planned.rounds,
        planned.bytes_online,
        planned.bytes_dealt,
    )
    assert planned.rounds == 4
    assert isinstance(planned.correlations[0], PairwiseMask)


@pytest.mark.parametrize("rectify", [False, True])
def test_pooling_as_torch_does(rectify):
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0)) * 5
    windows = Windows((2, 2), (2, 1), (1, 0), (1, 1))
    pair = share(encode(x), 16, Prg(SEED))
    result = reconstruct(*both(Trio(Prg(SEED)), max_pool_at_once, pair, windows=windows, rectify=rectify))
    expected = torch.max_pool2d(x, 2, (2, 1), (1, 0))
    assert float((result - (expected.relu() if rectify else expected)).abs().max()) <= 2.0**-16


@pytest.mark.parametrize("count", [1, 5])
def test_one_value_or_too_many_are_refused(count):
    with pytest.raises(InputError, match=f"{count} values"):
        run(torch.zeros(count, 1, dtype=torch.int64), 16, True)
