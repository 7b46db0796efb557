"""The noise is Gaussian, of the right scale and on the grid; every test also rejects what is a little wrong."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.dp import mechanisms
from tacit.dp.clipping import AdaptiveClipping
from tacit.dp.mechanisms import add_gaussian_, grid, standard_normal
from tacit.errors import InputError
from tacit.federated.algorithm import Update
from tacit.federated.central_privacy import CentralPrivacy
from tacit.federated.fedavg import FedAvg
from tacit.federated.local.dp_sgd import DpSgdSolver, poisson_batch
from tacit.federated.local.work import LocalWork
from tacit.ring.prg import Prg

COUNT = 200_000
REJECTED = 1e-6


def drawn(count=COUNT, seed=b"0123456789abcdef", dtype=torch.float64):
    values = torch.zeros(count, dtype=dtype)
    add_gaussian_(values, 1.0, Prg(seed))
    return values.double().numpy()


def right_scale(noise, std):
    """Whether the sample's variance is likely under N(0, std²)."""
    statistic = float((noise**2).sum()) / std**2
    two_sided = 2 * min(stats.chi2.cdf(statistic, noise.size), stats.chi2.sf(statistic, noise.size))
    return two_sided > REJECTED


def kolmogorov(noise):
    return stats.kstest(noise, "norm").pvalue


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_is_normal(dtype):
    noise = drawn(dtype=dtype)
    assert kolmogorov(noise) > REJECTED
    assert right_scale(noise, 1.0)
    # The fourth and sixth moments, by their own standard errors.
    for power, moment, variance in ((4, 3, 96), (6, 15, 10_170)):
        assert abs((noise**power).mean() - moment) < 5 * math.sqrt(variance / COUNT)


def test_the_tests_of_normality_have_power():
    noise = drawn()
    for wrong in (1.03 * noise, noise + 0.02, np.clip(noise, -2, 2), np.sign(noise) * np.abs(noise) ** 1.05):
        assert kolmogorov(wrong) < REJECTED
    assert not right_scale(1.02 * noise, 1.0)
    assert not right_scale(noise / 1.02, 1.0)


def test_the_tails_are_there():
    noise = np.abs(drawn(4_000_000))
    for bound in (3.0, 4.0, 5.0):
        expected = noise.size * 2 * stats.norm.sf(bound)
        assert stats.poisson.sf((noise > bound).sum() - 1, expected) > REJECTED
        assert stats.poisson.cdf((noise > bound).sum(), expected) > REJECTED
    assert noise.max() > 4.7


def test_pairs_signs_and_magnitudes_are_independent():
    noise = drawn(1 << 14)
    first, second = noise[: 1 << 13], noise[1 << 13 :]
    for a, b in (
        (first, second),
        (first**2, second**2),
        (np.abs(first), np.sign(second)),
        (noise[:-1], noise[1:]),
        (noise[:-1] ** 2, noise[1:] ** 2),
    ):
        assert stats.pearsonr(a, b).pvalue > REJECTED
    assert stats.pearsonr(first, 0.1 * first + second).pvalue < REJECTED


def test_the_largest_deviations_come_from_the_smallest_words():
    # A radius word of 0 is a chance of 2^-65, whose deviation is √(130 ln 2).
    words = torch.tensor([0, -1, 1, 0, 0, 0], dtype=torch.int64)
    turned = standard_normal(words)
    assert turned[0] == pytest.approx(math.sqrt(2 * 65 * math.log(2)))
    assert turned[1] == 0
    assert turned[2] == pytest.approx(math.sqrt(2 * (64 * math.log(2) - math.log(1.5))))


@pytest.mark.parametrize("count", [1, 2, 7, 1000, (1 << 14) + 3])
def test_the_compiled_loop_equals_torch(count, monkeypatch):
    sums = torch.linspace(-3, 3, count)
    compiled, plain = sums.clone(), sums.clone()
    add_gaussian_(compiled, 0.37, Prg(b"b" * 16))
    monkeypatch.setattr(mechanisms, "load", lambda name: None)
    add_gaussian_(plain, 0.37, Prg(b"b" * 16))
    # The last bits of a logarithm decide a rounding once in a while.
    assert (compiled - plain).abs().max() <= grid(0.37)
    assert (compiled != plain).sum() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("std", [1e-6, 0.37, 1.0, 1e5])
def test_releases_lie_on_the_same_grid_whatever_was_summed(dtype, std):
    step = grid(std)
    assert std / step >= mechanisms.GRID
    for sums in (torch.zeros(999, dtype=dtype), torch.full((999,), math.pi * std, dtype=dtype)):
        add_gaussian_(sums, std, Prg(b"c" * 16))
        assert torch.equal((sums.double() / step).round() * step, sums.double())
    # Without rounding, the low-order bits are anyone's.
    raw = math.pi * std + std * standard_normal(Prg(b"c" * 16).words((1000,)))
    assert not torch.equal((raw / step).round() * step, raw)


def test_noise_is_never_repeated_and_zero_adds_none():
    once, prg = torch.zeros(100), Prg(b"d" * 16)
    add_gaussian_(once, 1.0, prg)
    twice = torch.zeros(100)
    add_gaussian_(twice, 1.0, prg)
    assert not (once == twice).any()
    values = torch.rand(10)
    add_gaussian_(copied := values.clone(), 0.0, prg)
    assert torch.equal(copied, values)


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_a_scale_that_cannot_be_is_refused(std):
    with pytest.raises(InputError, match="std="):
        add_gaussian_(torch.zeros(2), std, Prg.fresh())


def test_tensors_that_noise_cannot_be_added_to_are_refused():
    for bad in (torch.zeros(4, dtype=torch.int64), torch.zeros(4, 4).T[:, :2]):
        with pytest.raises(InputError, match="contiguous float32"):
            add_gaussian_(bad, 1.0, Prg.fresh())


def model():
    return nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 3))


def central_noise(noise_multiplier, clip=0.5, cohort=20.0, seed=1):
    """What the server adds to the global model in one round."""
    algorithm = CentralPrivacy(FedAvg(), clip, noise_multiplier, cohort, noise_seed=seed)
    state = algorithm.init(model(), 100)
    update = Update.of_client(torch.zeros_like(state.parameters), {}, 5, 0.1)
    after = algorithm.server_update(state, algorithm.combine([update]))
    return (after.parameters - state.parameters).double().numpy()


def test_the_servers_noise_has_the_scale_that_is_accounted():
    z, clip, cohort = 1.3, 0.5, 20.0
    assert right_scale(central_noise(z), z * clip / cohort)
    assert right_scale(central_noise(z, clip=2.0, cohort=3.0), z * 2.0 / 3.0)
    # A twentieth too much or too little does not pass.
    for wrong in (0.95, 1.05):
        assert not right_scale(central_noise(wrong * z), z * clip / cohort)
        assert not right_scale(central_noise(z, clip=wrong * clip), z * clip / cohort)


def test_the_noise_on_the_count_has_the_scale_that_is_accounted():
    adaptive, cohort = AdaptiveClipping(quantile=0.5, lr=1.0, count_noise=4.0), 20.0
    moves = []
    for seed in range(2000):
        algorithm = CentralPrivacy(FedAvg(), 1.0, 1.0, cohort, adaptive=adaptive, noise_seed=seed)
        state = algorithm.init(nn.Linear(1, 1), 100)
        after = algorithm.server_update(state, algorithm.combine([]))
        moves.append(-math.log(float(after.shared["privacy/bound"])))
    assert right_scale(np.array(moves), 4.0 / cohort)
    assert not right_scale(np.array(moves), 0.9 * 4.0 / cohort)
    assert not right_scale(np.array(moves), 1.1 * 4.0 / cohort)


def solver_noise(noise_multiplier, clip=0.8, steps=1, seed=1):
    """What one client adds to its model in ``steps`` steps over all its examples, times B / lr."""
    torch.manual_seed(0)
    net = model()
    examples = Examples(torch.zeros(6, 200), torch.tensor([0, 1, 2, 0, 1, 2]))
    lr = 1e-4
    trained = {}
    for z in (0.0, noise_multiplier):
        solver = DpSgdSolver(net, functional.cross_entropy, clip=clip, noise_multiplier=z, noise_seed=seed)
        start = solver.layout.flatten(dict(net.named_parameters())).double()
        work = LocalWork(start.float(), {}, examples, lr, None, steps, torch.Generator().manual_seed(3))
        trained[z] = solver(work).parameters.double() - start
    return ((trained[noise_multiplier] - trained[0.0]) * len(examples) / lr).numpy()


def test_the_clients_noise_has_the_scale_that_is_accounted():
    z, clip = 1.1, 0.8
    assert right_scale(solver_noise(z), z * clip)
    assert right_scale(solver_noise(z, steps=4), 2 * z * clip)
    for wrong in (0.95, 1.05):
        assert not right_scale(solver_noise(wrong * z), z * clip)
        assert not right_scale(solver_noise(z, clip=wrong * clip), z * clip)


def test_every_example_is_drawn_independently_at_the_rate_that_is_accounted():
    n, rate, times = 400, 0.08, 4000
    prg = Prg(b"e" * 16)
    taken = torch.zeros(times, n, dtype=torch.bool)
    for time in range(times):
        taken[time, poisson_batch(n, rate, prg)] = True

    def plausible(chance):
        each = stats.binom.cdf(taken.sum(0).numpy(), times, chance)
        return stats.binomtest(int(taken.sum()), times * n, chance).pvalue > REJECTED and each.min() > 1e-7

    assert plausible(rate)
    assert not plausible(0.98 * rate)
    assert not plausible(1.02 * rate)
    # A batch of fixed size would have no variance; that of independent draws is n q (1 − q).
    variance = float(taken.sum(1).double().var())
    assert variance == pytest.approx(n * rate * (1 - rate), rel=0.1)
    assert torch.equal(poisson_batch(5, 1.0, prg), torch.arange(5))
