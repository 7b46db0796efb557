"""Clipped vectors never exceed the bound; the adaptive bound finds its quantile."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tacit.dp.clipping import AdaptiveClipping, clip, clip_factors, norm
from tacit.errors import InputError


@given(st.integers(1, 5000), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.integers(0, 2**31))
def test_a_clipped_vector_is_never_longer_than_the_bound_and_keeps_its_direction(size, scale, bound, seed):
    vector = scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    clipped = clip(vector, bound)
    assert norm(clipped) <= bound
    if norm(vector) <= bound:
        assert torch.equal(clipped, vector)
    else:
        assert norm(clipped) == pytest.approx(bound, rel=1e-4)
        assert torch.nn.functional.cosine_similarity(clipped, vector, dim=0) > 0.9999


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_mistaken_for_a_clipped_vector(bad):
    assert clip(torch.tensor([1.0, bad]), 1.0).isnan().all()
    assert clip_factors(torch.tensor([4.0, bad, 0.0, 0.25]), 1.0).tolist() == pytest.approx([0.5, 0, 1, 1], rel=1e-4)


def test_the_bound_converges_to_the_quantile_of_the_norms():
    norms = torch.rand(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 10
    for quantile in (0.3, 0.5, 0.8):
        adaptive, bound = AdaptiveClipping(quantile), 0.1
        for _ in range(200):
            bound = adaptive.next_bound(bound, float((norms <= bound).double().mean()))
        assert bound == pytest.approx(float(norms.quantile(quantile)), rel=0.05)


def test_the_bound_stays_a_positive_number():
    adaptive = AdaptiveClipping(lr=1000.0)
    assert 0 < adaptive.next_bound(1e-9, 1e6) <= adaptive.next_bound(1e9, -0.5) < math.inf


def test_updates_and_count_together_cost_the_noise_multiplier():
    adaptive, z = AdaptiveClipping(count_noise=5.0), 1.2
    updates = adaptive.update_noise_multiplier(z, 100)
    # Two Gaussian mechanisms on the same data: the squared ratios of sensitivity to noise add up.
    assert updates**-2 + (0.5 / 5.0) ** 2 == pytest.approx(z**-2)
    assert AdaptiveClipping().count_std(100) == 5.0
    assert adaptive.update_noise_multiplier(0.0, 100) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantile": 0.0}, "quantile=0.0"),
        ({"quantile": 1.0}, "quantile=1.0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": math.inf}, "lr=inf"),
        ({"count_noise": 0.0}, "count_noise=0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        AdaptiveClipping(**settings)


def test_a_count_that_costs_more_than_allowed_is_refused():
    with pytest.raises(InputError, match=r"set count_noise above 1\.0"):
        AdaptiveClipping().update_noise_multiplier(2.0, 20)
