"""ε from events, against values that others published."""

import math

import msgspec
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant

from tacit.dp.accounting import Budget, SampledGaussian, dp_event, noise_for, privacy_spent
from tacit.errors import InputError

MNIST = 60_000

# q, z, steps, δ, and the ε of the moments accountant in print.
PUBLISHED = [
    pytest.param(0.01, 4.0, 10_000, 1e-5, 1.26, id="Abadi et al. 2016, section 4"),
    pytest.param(256 / MNIST, 1.3, 15 * MNIST // 256, 1e-5, 1.19, id="TensorFlow Privacy, MNIST tutorial"),
    pytest.param(256 / MNIST, 1.1, 60 * MNIST // 256, 1e-5, 3.01, id="TensorFlow Privacy, MNIST tutorial"),
    pytest.param(256 / MNIST, 0.7, 45 * MNIST // 256, 1e-5, 7.10, id="TensorFlow Privacy, MNIST tutorial"),
    pytest.param(256 / MNIST, 0.7, 70 * MNIST // 256, 1e-5, 8.68, id="Bu et al. 2020, figure 4"),
]


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "published"), PUBLISHED)
def test_the_divergences_are_those_of_published_results(rate, noise, steps, delta, published):
    accountant = RdpAccountant().compose(dp_event(SampledGaussian(noise, rate, steps)))
    # The conversion of Mironov 2017 (proposition 3), which these papers use; newer ones give less.
    converted = np.min(accountant.rdp + math.log(1 / delta) / (accountant.orders - 1))
    assert converted == pytest.approx(published, abs=0.006)


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "published"), PUBLISHED[1:3])
def test_tighter_accounting_never_reports_more_than_looser(rate, noise, steps, delta, published):
    events = [SampledGaussian(noise, rate, steps)]
    tight, loose = privacy_spent(events, delta, "pld"), privacy_spent(events, delta)
    assert 0.5 * published < tight < loose < published


def test_one_gaussian_release_has_its_exact_epsilon():
    # Balle and Wang 2018, theorem 8: δ(ε) = Φ(1/2z − εz) − e^ε Φ(−1/2z − εz).
    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    for noise in (0.8, 2.0):
        epsilon = privacy_spent([SampledGaussian(noise)], 1e-5, "pld")
        exact = phi(0.5 / noise - epsilon * noise) - math.exp(epsilon) * phi(-0.5 / noise - epsilon * noise)
        assert exact == pytest.approx(1e-5, rel=0.01)
        assert epsilon < privacy_spent([SampledGaussian(noise)], 1e-5) < 1.3 * epsilon


def test_events_compose_in_any_order_and_grouping():
    a, b = SampledGaussian(1.2, 0.1, 30), SampledGaussian(2.0, 1.0, 3)
    together = privacy_spent([a, b], 1e-6)
    assert privacy_spent([b, a], 1e-6) == together
    pieces = [SampledGaussian(1.2, 0.1, 10), b, SampledGaussian(1.2, 0.1, 20)]
    assert privacy_spent(pieces, 1e-6) == together
    assert together > max(privacy_spent([a], 1e-6), privacy_spent([b], 1e-6))
    twenty = (
        RdpAccountant().compose(PoissonSampledDpEvent(0.1, GaussianDpEvent(1.2)), 30).compose(GaussianDpEvent(2.0), 3)
    )
    assert together == pytest.approx(twenty.get_epsilon(1e-6), rel=1e-9)


def test_only_poisson_sampling_amplifies():
    assert dp_event(SampledGaussian(1.1, times=5)) == SelfComposedDpEvent(GaussianDpEvent(1.1), 5)
    assert dp_event(SampledGaussian(1.1, 0.02)) == PoissonSampledDpEvent(0.02, GaussianDpEvent(1.1))
    assert privacy_spent([SampledGaussian(1.1, 0.02, 50)], 1e-5) < 0.2 * privacy_spent(
        [SampledGaussian(1.1, 1, 50)], 1e-5
    )


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    assert privacy_spent([], 1e-5) == 0
    for accountant in ("rdp", "pld"):
        assert privacy_spent([SampledGaussian(0.0), SampledGaussian(1.0)], 1e-5, accountant) == math.inf


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
@pytest.mark.parametrize(("target", "delta", "times", "rate"), [(1.0, 1e-5, 20, 0.05), (8.0, 1e-6, 10, 1.0)])
def test_the_noise_for_a_target_reaches_it_and_hardly_more(target, delta, times, rate, accountant):
    noise = noise_for(target, delta, times, rate, accountant)
    assert privacy_spent([SampledGaussian(noise, rate, times)], delta, accountant) <= target
    assert privacy_spent([SampledGaussian(noise * 0.999, rate, times)], delta, accountant) > target


@pytest.mark.parametrize(
    ("target", "delta", "times", "message"),
    [
        (0.0, 1e-5, 10, "epsilon=0.0"),
        (-1.0, 1e-5, 10, "epsilon=-1.0"),
        (math.inf, 1e-5, 10, "epsilon=inf"),
        (1e-3, 1e-9, 10**9, "nothing is left"),
        (1.0, 0.0, 10, "delta=0.0"),
        (1.0, 1.0, 10, "delta=1.0"),
        (1.0, 1e-5, 0, "times=0"),
    ],
)
def test_an_impossible_target_is_refused(target, delta, times, message):
    with pytest.raises(InputError, match=message):
        noise_for(target, delta, times)


@pytest.mark.parametrize(
    "fields",
    [
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": 1.0, "sampling_rate": 0.0},
        {"noise_multiplier": 1.0, "sampling_rate": 1.5},
        {"noise_multiplier": 1.0, "times": 0},
    ],
)
def test_an_event_that_cannot_be_is_refused_also_when_it_is_read(fields):
    with pytest.raises(InputError):
        SampledGaussian(**fields)
    text = msgspec.json.encode({"type": "sampled-gaussian", **fields})
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=SampledGaussian)


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="accountant='zcdp'"):
        privacy_spent([], 1e-5, "zcdp")
    with pytest.raises(InputError, match="delta=2"):
        privacy_spent([], 2)
    with pytest.raises(InputError, match="epsilon=0"):
        Budget(0, 1e-5)
