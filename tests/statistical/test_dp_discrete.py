"""Integer noise has exactly the distribution it should; every test of that also rejects what is a little wrong."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from scipy import stats

from tacit.dp import discrete, discrete_kernels
from tacit.dp.discrete import (
    LARGEST_VARIANCE,
    DiscreteGaussian,
    Skellam,
    Table,
    add_noise_,
    draw,
    invert,
    magnitude,
)
from tacit.errors import InputError
from tacit.ring.prg import Prg

COUNT = 400_000
REJECTED = 1e-6
KINDS = [DiscreteGaussian, Skellam]
SEED = b"0123456789abcdef"


def probabilities(noise, digits=60):
    """P(X = k) for k = 0, 1, 2 …, from the definitions, with mpmath."""
    with mpmath.workdps(digits):
        v = mpmath.mpf(noise.variance)
        last = len(discrete._table(noise).high)
        if isinstance(noise, Skellam):
            return [mpmath.exp(-v) * mpmath.besseli(k, v) for k in range(last)]
        weights = [mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * v)) for k in range(last + 400)]
        total = 2 * mpmath.fsum(weights) - 1
        return [weight / total for weight in weights[:last]]


def goodness(drawn, noise):
    """The p-value of a chi-square test of the exact probabilities, over cells that expect 20 draws or more."""
    exact = np.array([float(p) for p in probabilities(noise, 30)])
    both = np.concatenate([exact[:0:-1], exact])
    last = len(exact) - 1
    counts = np.bincount(np.clip(drawn, -last, last) + last, minlength=len(both))
    expected = both * drawn.size
    inner = expected >= 20
    observed = np.append(counts[inner], counts[~inner].sum())
    wanted = np.append(expected[inner], drawn.size - expected[inner].sum())
    keep = wanted > 1
    return stats.chi2.sf(((observed - wanted)[keep] ** 2 / wanted[keep]).sum(), keep.sum() - 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", [0.3, 1.0, 7.5, 900.0])
def test_every_value_has_its_probability_and_a_wrong_variance_is_rejected(kind, variance):
    noise = kind(variance)
    drawn = draw(noise, COUNT, Prg(SEED))
    assert goodness(drawn, noise) > REJECTED
    assert goodness(drawn, kind(1.05 * variance)) < REJECTED
    assert goodness(drawn, kind(0.95 * variance)) < REJECTED


@pytest.mark.parametrize("kind", KINDS)
def test_one_distribution_is_not_taken_for_the_other(kind):
    other = Skellam if kind is DiscreteGaussian else DiscreteGaussian
    assert goodness(draw(kind(7.5), COUNT, Prg(SEED)), other(7.5)) < REJECTED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", [900.0, 2.0**26 + 0.37])
def test_the_variance_is_accepted_and_one_a_little_off_is_not(kind, variance):
    squares = draw(kind(variance), COUNT, Prg(SEED)).astype(np.float64) ** 2

    def accepted(claimed):
        statistic = squares.sum() / claimed
        return 2 * min(stats.chi2.cdf(statistic, COUNT), stats.chi2.sf(statistic, COUNT)) > REJECTED

    assert accepted(variance)
    assert not accepted(1.05 * variance)
    assert not accepted(0.95 * variance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_signs_are_fair_and_neighbours_independent(kind):
    drawn = draw(kind(5e4), COUNT, Prg(SEED)).astype(np.float64)
    error = 5 / math.sqrt(COUNT)
    assert abs(np.sign(drawn).mean()) < error
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < error
    assert abs(np.corrcoef(drawn[:-1] ** 2, drawn[1:] ** 2)[0, 1]) < error
    assert abs(np.corrcoef(np.abs(drawn), np.sign(drawn))[0, 1]) < error
    # The same test finds a sign that follows its neighbour one time in fifty.
    copied = np.where(np.arange(COUNT) % 50 == 0, np.roll(drawn, 1), drawn)
    assert abs(np.corrcoef(copied[:-1], copied[1:])[0, 1]) > error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", [2.0**-10, 0.05, 1.0, 60.0, 1234.5])
def test_the_table_is_within_the_stated_distance_of_the_definition(kind, variance):
    noise = kind(variance)
    table = discrete._table(noise)
    cumulative = [(int(high) << 64) + int(low) for high, low in zip(table.high, table.low, strict=True)]
    assert cumulative[-1] == 1 << 127
    with mpmath.workdps(60):
        exact = probabilities(noise)
        sums = np.cumsum([exact[0], *(2 * p for p in exact[1:])])
        worst = max(
            abs(Fraction(c, 1 << 127) - Fraction(int(s * 2**190), 1 << 190))
            for c, s in zip(cumulative, sums, strict=True)
        )
        # Each of both ends of a value's interval is off by no more than that; so is what is missing beyond the table.
        assert len(cumulative) * worst < Fraction(1, 1 << 100)
        assert 1 - sums[-1] < mpmath.mpf(2) ** -130


@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_loop_equals_the_plain_one(kind):
    for variance in (0.2, 30.0, 1e7):
        table = discrete._table(kind(variance))
        words = Prg(SEED).words((50_000,)).numpy().view(np.uint64)
        words[:4] = [0, 1, 2**64 - 1, 2**64 - 2]
        drawn = np.empty(words.size, np.int64)
        edge = table.high[len(table.high) // 3] << np.uint64(1)
        words[4:7] = [edge, edge - np.uint64(1), edge + np.uint64(2)]
        undecided = discrete_kernels.invert(words, table.high, table.guide, table.shift, drawn)
        plain = invert(words, table, Prg(SEED))
        decided = ~np.isin(words >> np.uint64(1), table.high)
        assert undecided == words.size - decided.sum() >= 1
        assert np.array_equal(drawn[decided], plain[decided])


def test_bits_that_do_not_decide_are_followed_by_others():
    # P(0) = (5·2^64 + 2^62) / 2^127, the next two values have 2^62 / 2^127 each, then the rest.
    cumulative = [(5 << 64) + (1 << 62), (5 << 64) + (1 << 63), (5 << 64) + (3 << 62), 1 << 127]
    high = np.array([c >> 64 for c in cumulative], np.uint64)
    low = np.array([c & (1 << 64) - 1 for c in cumulative], np.uint64)
    table = Table(high, low, np.zeros(1, np.uint32), 63)
    count = 40_000
    for sign in (0, 1):
        words = np.full(count, 5 << 1 | sign, np.uint64)
        magnitudes = invert(words, table, Prg(SEED)) * (1 - 2 * sign)
        counts = np.bincount(magnitudes, minlength=4)
        assert stats.chisquare(counts, np.full(4, count / 4)).pvalue > REJECTED
        assert stats.chisquare(counts, count / 4 * np.array([1.05, 0.95, 1, 1])).pvalue < REJECTED
    decided = np.array([4 << 1, 6 << 1, (6 << 1) + 1], np.uint64)
    assert invert(decided, table, Prg(SEED)).tolist() == [0, 3, -3]


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_shares(kind):
    shares = [draw(kind(2.5), COUNT, Prg(SEED).derive("share", i)) for i in range(4)]
    # Skellam shares add up to one; so do those of discrete Gaussians, as far as 400,000 draws show, from σ² = 2 on.
    assert goodness(sum(shares), kind(10.0)) > REJECTED
    assert goodness(sum(shares[:3]), kind(10.0)) < REJECTED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", [3.0, 40.0])
@pytest.mark.parametrize("failure", [1e-3, 2.0**-60])
def test_the_magnitude_is_reached_as_seldom_as_asked_and_not_much_seldomer(kind, variance, failure):
    noise = kind(variance)
    bound = magnitude(noise, COUNT, failure)
    exact = probabilities(noise)
    assert 2 * COUNT * sum(exact[bound:]) <= failure
    assert 2 * COUNT * sum(exact[int(0.85 * bound) :]) > failure
    assert magnitude(noise, 10**6 * COUNT, failure) > bound
    assert magnitude(kind(4 * variance), COUNT, failure) > bound


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_hold_where_tables_are_long(kind):
    variance = 2.0**13 + 0.5
    weights = kind(variance).weights()
    assert len(weights) > 13 * 90
    with mpmath.workdps(60):
        for k in (1, 90, 500, 13 * 90):
            if kind is Skellam:
                exact = mpmath.besseli(k, variance) / mpmath.besseli(0, variance)
            else:
                exact = mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * mpmath.mpf(variance)))
            assert abs(mpmath.mpf(weights[k]) / weights[0] / exact - 1) < mpmath.mpf(2) ** -150


def test_noise_is_added_and_never_drawn_twice():
    values = np.arange(100_000, dtype=np.int64)
    prg = Prg(SEED)
    add_noise_(values, Skellam(9.0), prg)
    again = np.arange(100_000, dtype=np.int64)
    add_noise_(again, Skellam(9.0), prg)
    assert np.array_equal(values - np.arange(100_000), draw(Skellam(9.0), 100_000, Prg(SEED)))
    assert abs(np.corrcoef(values - np.arange(100_000), again - np.arange(100_000))[0, 1]) < 0.02
    assert draw(Skellam(9.0), 0, prg).size == 0


class Undecided(Prg):
    """A generator whose words all have the first 63 bits of one cumulative probability."""

    word = 0

    def array(self, count):
        return np.full(count // 8, self.word, np.uint64).view(np.uint8)


def test_noise_that_63_bits_do_not_decide_has_the_right_probabilities():
    noise, count = Skellam(12.0), 20_000
    table, k = discrete._table(noise), 3
    prg = Undecided(SEED)
    prg.word = int(table.high[k]) << 1
    counts = np.bincount(draw(noise, count, prg), minlength=k + 2)
    share = int(table.low[k]) / 2**64
    assert counts.sum() == counts[k] + counts[k + 1] == count
    assert 0.1 < share < 0.9
    assert stats.binomtest(int(counts[k]), count, share).pvalue > REJECTED
    assert stats.binomtest(int(counts[k]), count, 1.05 * share).pvalue < REJECTED


def test_without_compiled_loops_the_noise_is_the_same(monkeypatch):
    compiled = draw(DiscreteGaussian(12.0), 70_000, Prg(SEED))
    monkeypatch.setattr(discrete, "load", lambda name: None)
    assert np.array_equal(draw(DiscreteGaussian(12.0), 70_000, Prg(SEED)), compiled)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", [0.0, -1.0, 1e-4, math.nan, math.inf])
def test_a_variance_out_of_range_is_named(kind, variance):
    with pytest.raises(InputError, match="variance="):
        kind(variance)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_that_is_too_fine_is_refused_where_it_is_drawn(kind):
    with pytest.raises(InputError, match="coarser scale"):
        draw(kind(1.01 * LARGEST_VARIANCE), 1, Prg(SEED))


@pytest.mark.parametrize(
    "values", [np.zeros(4), np.zeros(4, np.int32), np.zeros((2, 2), np.int64), np.zeros(8, np.int64)[::2]]
)
def test_only_flat_integers_take_noise(values):
    with pytest.raises(InputError, match="int64"):
        add_noise_(values, Skellam(1.0), Prg(SEED))


@pytest.mark.parametrize(("draws", "failure"), [(0, 0.1), (1, 0.0), (1, 1.0), (1, math.nan)])
def test_a_magnitude_of_nothing_is_refused(draws, failure):
    with pytest.raises(InputError, match="draws="):
        magnitude(Skellam(1.0), draws, failure)
