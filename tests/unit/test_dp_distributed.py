"""What noised sums cost, against Rényi divergences computed from the distributions themselves."""

import math

import msgspec
import numpy as np
import pytest
from scipy import special

from tacit.dp.accounting import Budget, Event, SampledGaussian, privacy_spent
from tacit.dp.distributed import DiscreteGaussianSum, SkellamSum, rounded_norm, summed_norm
from tacit.dp.ledger import Ledger, Limit
from tacit.errors import BudgetExceeded, InputError

ORDERS = np.array([1.1, 2.0, 2.5, 3.0, 4.0, 8.0, 16.0, 64.0])
INTEGERS = [1, 3, 4, 5]


def logarithms(masses):
    """Of the probabilities of a symmetric distribution, its middle in the middle; underflow cut off."""
    return np.log(masses[masses > 1e-290])


def skellam(variance):
    reach = int(45 * math.sqrt(variance)) + 150
    return logarithms(special.ive(np.abs(np.arange(-reach, reach + 1)), variance))


def discrete_gaussians(variance, shares):
    reach = int(45 * math.sqrt(variance)) + 20
    masses = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * variance))
    total = masses / masses.sum()
    for _ in range(shares - 1):
        # Terms of one sign: every probability keeps its relative precision.
        total = np.convolve(total, masses / masses.sum())
    return logarithms(total)


def divergence(first, second, order):
    return np.logaddexp.reduce(order * first + (1 - order) * second) / (order - 1)


def shifted(logs, shift):
    return logs[shift:], logs[:-shift]


@pytest.mark.parametrize("variance", [0.2, 1.0, 4.0, 25.0, 400.0])
@pytest.mark.parametrize("shift", [1, 2, 5, 10])
def test_skellam_costs_at_least_its_exact_divergence(variance, shift):
    exact = np.array([divergence(*shifted(skellam(variance), shift), order) for order in ORDERS])
    bound = SkellamSum(variance, shift, shift).divergences(ORDERS)
    assert (exact <= bound * (1 + 1e-12)).all()
    if variance == 400.0:
        assert (exact[INTEGERS] > 0.98 * bound[INTEGERS]).all()
        # A bound that takes the variance to be 5 % larger than it is would not hold.
        wrong = SkellamSum(1.05 * variance, shift, shift).divergences(ORDERS)
        assert (exact[INTEGERS] > wrong[INTEGERS]).all()


@pytest.mark.parametrize("vector", [(1, 1, 1, 1), (3, 1), (2, 2, 1)])
def test_skellam_noise_on_vectors(vector):
    variance, l2, l1 = 30.0, math.hypot(*vector), float(sum(vector))
    exact = sum(
        np.array([divergence(*shifted(skellam(variance), shift), order) for order in ORDERS]) for shift in vector
    )
    bound = SkellamSum(variance, l2, l1).divergences(ORDERS)
    assert (exact <= bound).all()
    assert (exact[1:5] > 0.85 * bound[1:5]).all()


@pytest.mark.parametrize("variance", [0.25, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("shares", [1, 2, 5, 20])
@pytest.mark.parametrize("shift", [1, 2])
def test_sums_of_discrete_gaussians_cost_at_least_their_exact_divergence(variance, shares, shift):
    orders = ORDERS[:6]
    exact = np.array([divergence(*shifted(discrete_gaussians(variance, shares), shift), order) for order in orders])
    event = DiscreteGaussianSum(variance, shares, 1, shift)
    assert (exact <= event.divergences(orders) * (1 + 1e-9)).all()
    if variance >= 1 and shares > 1:
        assert (exact[1:] > 0.9 * event.divergences(orders)[1:]).all()


@pytest.mark.parametrize("shares", [2, 3, 20])
def test_the_distortion_of_a_sum_is_bounded(shares):
    for variance in (0.25, 0.5, 1.0):
        sums = discrete_gaussians(variance, shares)
        one = discrete_gaussians(shares * variance, 1)
        middle, other = len(sums) // 2, len(one) // 2
        span = int(6 * math.sqrt(shares * variance))
        worst = np.abs(sums[middle - span : middle + span + 1] - one[other - span : other + span + 1]).max()
        assert 0 < worst <= DiscreteGaussianSum(variance, shares, 1, 1.0).distortion


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.7])
@pytest.mark.parametrize("kind", ["skellam", "discrete-gaussian"])
def test_sampling_costs_at_least_its_exact_divergence_in_both_directions(rate, kind):
    orders = np.array([2.0, 3.0, 5.0, 12.0])
    if kind == "skellam":
        logs, event = skellam(9.0), SkellamSum(9.0, 2, 2, rate)
    else:
        logs, event = discrete_gaussians(3.0, 3), DiscreteGaussianSum(3.0, 3, 1, 2, rate)
    with_member, without = shifted(logs, 2)
    mixture = np.logaddexp(with_member + math.log(rate), without + math.log1p(-rate))
    bound = event.divergences(orders)
    for exact in (
        [divergence(mixture, without, order) for order in orders],
        [divergence(without, mixture, order) for order in orders],
    ):
        assert (np.array(exact) <= bound * (1 + 1e-9)).all()
    assert divergence(mixture, without, 2.0) > 0.8 * bound[0]
    assert (bound < msgspec.structs.replace(event, sampling_rate=1.0).divergences(orders)).all()


@pytest.mark.parametrize("rate", [1.0, 0.1])
@pytest.mark.parametrize("noise", [0.8, 2.0])
def test_on_a_fine_grid_both_cost_what_a_gaussian_does(rate, noise):
    # What is left is that integer orders alone are bounded.
    steps, size = 2.0**20, 1000
    l2 = rounded_norm(steps, size)
    gaussian = privacy_spent([SampledGaussian(noise, rate, 20)], 1e-6)
    for event in (
        SkellamSum((noise * steps) ** 2, l2, summed_norm(l2, size), rate, 20),
        DiscreteGaussianSum((noise * steps) ** 2 / 100, 100, size, l2, rate, 20),
    ):
        assert privacy_spent([event], 1e-6) == pytest.approx(gaussian, rel=0.015)
        assert privacy_spent([event], 1e-6) >= gaussian


def skellam_sum(**changes):
    return SkellamSum(**{"variance": 1e5, "l2": 100.0, "l1": 2000.0, "sampling_rate": 0.5, "times": 3, **changes})


def gaussian_sum(**changes):
    fields = {"share_variance": 1.0, "shares": 1000, "size": 5000, "l2": 10.0, "sampling_rate": 0.5, "times": 3}
    return DiscreteGaussianSum(**{**fields, **changes})


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (skellam_sum(variance=2e5), skellam_sum()),
        (skellam_sum(), skellam_sum(l2=110.0)),
        (skellam_sum(), skellam_sum(l1=90_000.0)),
        (skellam_sum(), skellam_sum(sampling_rate=0.6)),
        (skellam_sum(sampling_rate=0.99), skellam_sum(sampling_rate=1.0)),
        (skellam_sum(), skellam_sum(times=4)),
        (gaussian_sum(share_variance=1.1), gaussian_sum()),
        (gaussian_sum(shares=1001), gaussian_sum()),
        (gaussian_sum(), gaussian_sum(shares=900)),
        (gaussian_sum(), gaussian_sum(size=50_000)),
        (gaussian_sum(), gaussian_sum(l2=11.0)),
        (gaussian_sum(), gaussian_sum(sampling_rate=0.6)),
        (gaussian_sum(), gaussian_sum(times=4)),
    ],
)
def test_more_noise_costs_less_and_more_of_the_rest_costs_more(less, more):
    assert privacy_spent([less], 1e-6) < privacy_spent([more], 1e-6)


def test_noised_sums_compose_with_each_other_and_with_gaussians():
    events = [skellam_sum(), gaussian_sum(), SampledGaussian(2.0, 0.1, 5), SampledGaussian(3.0)]
    together = privacy_spent(events, 1e-6)
    assert privacy_spent(events[::-1], 1e-6) == together
    assert privacy_spent([skellam_sum(times=1), *events[1:], skellam_sum(times=2)], 1e-6) == together
    for left_out in range(4):
        assert privacy_spent(events[:left_out] + events[left_out + 1 :], 1e-6) < together
    assert together < sum(privacy_spent([event], 1e-6 / 4) for event in events)


@pytest.mark.parametrize("event", [skellam_sum(variance=0.0), gaussian_sum(share_variance=0.0), gaussian_sum(shares=0)])
def test_without_noise_there_is_no_privacy(event):
    assert privacy_spent([event, SampledGaussian(1.0)], 1e-6) == math.inf


def test_a_ledger_keeps_noised_sums_and_stops_at_the_budget(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    spent = privacy_spent([skellam_sum(), gaussian_sum()], 1e-6)
    limit = Limit(Budget(spent, 1e-6))
    ledger.spend("clients", skellam_sum(), "round 1", limit)
    ledger.spend("clients", gaussian_sum(), "round 2", limit)
    with pytest.raises(BudgetExceeded, match="round 3"):
        ledger.spend("clients", skellam_sum(times=1), "round 3", limit)
    ledger.close()
    again = Ledger(tmp_path / "ledger.sqlite")
    assert set(again.events("clients")) == {skellam_sum(), gaussian_sum()}
    assert again.epsilon("clients", 1e-6) == spent
    again.close()


@pytest.mark.parametrize("event", [skellam_sum(), gaussian_sum()])
def test_loss_distributions_are_not_claimed_for_integer_noise(event):
    with pytest.raises(InputError, match="rdp"):
        privacy_spent([SampledGaussian(1.0), event], 1e-6, "pld")


def test_events_that_are_not_known_are_refused():
    text = msgspec.json.encode(skellam_sum()).replace(b"skellam-sum", b"skellam-mixture")
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=Event)
    assert msgspec.json.decode(msgspec.json.encode(gaussian_sum()), type=Event) == gaussian_sum()


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        *[(skellam_sum, "variance", value) for value in (-1.0, math.nan, math.inf)],
        *[(gaussian_sum, "share_variance", value) for value in (-1.0, math.nan, math.inf, 0.2)],
        *[(make, "l2", value) for make in (skellam_sum, gaussian_sum) for value in (0.0, -1.0, math.nan, math.inf)],
        *[(skellam_sum, "l1", value) for value in (99.0, math.nan, math.inf)],
        *[(make, "sampling_rate", value) for make in (skellam_sum, gaussian_sum) for value in (0.0, 1.1, math.nan)],
        *[(make, "times", value) for make in (skellam_sum, gaussian_sum) for value in (0, -1)],
        (gaussian_sum, "shares", -1),
        (gaussian_sum, "size", 0),
    ],
)
def test_a_field_out_of_range_is_named(make, field, value):
    with pytest.raises(InputError, match=f"{field}={value}"):
        make(**{field: value})


def test_the_rounded_norm_is_seldom_exceeded_and_no_larger_than_it_has_to_be():
    generator = np.random.default_rng(0)
    for norm, size in ((5.0, 1000), (300.0, 1000), (2.0, 3)):
        vector = generator.normal(size=size)
        vector *= norm / np.linalg.norm(vector)
        rounded = np.floor(vector + generator.random((2000, size)))
        norms = np.linalg.norm(rounded, axis=1)
        within = (norms <= rounded_norm(norm, size)).mean()
        assert within > 1 - math.exp(-0.5)
        assert rounded_norm(norm, size) <= norm + math.sqrt(size)
        assert rounded_norm(norm, size) < 1.5 * norms.max()
        assert (np.abs(rounded).sum(1) <= np.array([summed_norm(n, size) for n in norms]) * (1 + 1e-12)).all()


@pytest.mark.parametrize(("norm", "size"), [(0.0, 1), (-1.0, 1), (math.nan, 1), (math.inf, 1), (1.0, 0)])
def test_a_norm_out_of_range_is_refused(norm, size):
    with pytest.raises(InputError, match="norm="):
        rounded_norm(norm, size)
