"""Client-level privacy: what the server computes, what clients may send, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.dp.clipping import AdaptiveClipping, norm
from tacit.errors import InputError
from tacit.federated.algorithm import SCALARS_BYTES, Update
from tacit.federated.central_privacy import BOUND, CentralPrivacy
from tacit.federated.compression import Compressed
from tacit.federated.compression_schemes import Float16
from tacit.federated.fedavg import FedAvg
from tacit.federated.local.plain import PlainSolver
from tacit.federated.personal import PersonalLayers, batch_norm_layers
from tacit.federated.robust import TrimmedMean
from tacit.federated.scaffold import Scaffold


def net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def client(number, count=10):
    generator = torch.Generator().manual_seed(number)
    inputs = (1 + number) * torch.randn(count, 4, generator=generator)
    return Examples(inputs, torch.randint(3, (count,), generator=generator))


def generator(number=0):
    return torch.Generator().manual_seed(number)


def updates_of(algorithm, model, state, clients):
    solver = PlainSolver(model, functional.cross_entropy)
    return [algorithm.client_update(state, {}, solver, client(k), generator(k))[0] for k in clients]


def test_a_round_is_the_sum_of_clipped_updates_over_the_expected_cohort():
    model, inner = net(), FedAvg(lr=0.5, batch_size=None)
    state = inner.init(model, 10)
    deltas = [update.delta.double() for update in updates_of(inner, model, state, range(4))]
    clip = sorted(map(norm, deltas))[1] * 1.01
    private = CentralPrivacy(inner, clip, 0.0, expected_cohort=5)
    state = private.init(model, 10)
    updates = updates_of(private, model, state, range(4))
    # Two were short enough, two were not.
    assert sum(norm(update.delta) < 0.999 * clip for update in updates) == 2
    assert all(norm(update.delta) <= clip for update in updates)
    after = private.server_update(state, private.combine(iter(updates)))
    expected = sum(d * min(1, clip / norm(d)) for d in deltas) / 5
    torch.testing.assert_close((after.parameters - state.parameters).double(), expected, rtol=1e-4, atol=1e-6)
    assert after.round == 1
    assert float(after.shared[BOUND]) == clip


def test_one_client_more_changes_the_model_by_no_more_than_the_bound_over_the_cohort():
    model, clip, cohort = net(), 0.01, 3.0
    private = CentralPrivacy(FedAvg(lr=1.0), clip, 0.0, cohort)
    state = private.init(model, 10)
    updates = updates_of(private, model, state, range(5))
    with_all = private.server_update(state, private.combine(updates)).parameters
    for left_out in range(5):
        others = [update for k, update in enumerate(updates) if k != left_out]
        without = private.server_update(state, private.combine(others)).parameters
        assert norm(with_all - without) <= clip / cohort * 1.001


def test_numbers_of_examples_do_not_weigh():
    model = net()
    private = CentralPrivacy(FedAvg(), 1.0, 0.0, 2)
    state = private.init(model, 10)
    delta = torch.full_like(state.parameters, 0.01)
    solver_updates = [replace(Update.of_client(s * delta, {}, n, 0.1), weight=1.0) for s, n in ((1, 1), (-1, 1000))]
    combined = private.combine(solver_updates)
    assert norm(combined.delta) < 1e-6
    assert combined.examples == 1001
    [update] = updates_of(private, model, state, [0])
    assert update.weight == 1


def test_a_round_without_an_update_still_releases_noise():
    private = CentralPrivacy(FedAvg(), 1.0, 1.0, 2, noise_seed=1)
    state = private.init(net(), 10)
    nobody = private.combine([])
    assert (nobody.examples, nobody.nbytes, nobody.weight) == (0, 0, 0)
    after = private.server_update(state, nobody)
    assert not (after.parameters == state.parameters).any()
    assert after.round == 1


def test_only_a_seed_repeats_the_noise_and_never_in_another_round():
    state = CentralPrivacy(FedAvg(), 1.0, 1.0, 2).init(net(), 10)

    def noise(seed, number=0):
        private = CentralPrivacy(FedAvg(), 1.0, 1.0, 2, noise_seed=seed)
        return private.server_update(replace(state, round=number), private.combine([])).parameters - state.parameters

    assert torch.equal(noise(4), noise(4))
    assert not (noise(4) == noise(4, number=1)).any()
    assert not (noise(4) == noise(5)).any()
    assert not torch.equal(noise(None), noise(None))
    assert "noise_seed" not in repr(CentralPrivacy(FedAvg(), 1.0, 1.0, 2, noise_seed=123456))


def test_the_bound_adapts_and_reaches_the_clients():
    model, inner = net(), FedAvg(lr=0.5, batch_size=None)
    private = CentralPrivacy(inner, 1e-3, 0.0, 8, adaptive=AdaptiveClipping(quantile=0.5, lr=0.7))
    state = private.init(model, 10)
    lengths = [norm(update.delta) for update in updates_of(inner, model, inner.init(model, 10), range(8))]
    for _ in range(60):
        start = replace(state, parameters=private.init(model, 10).parameters)
        updates = updates_of(private, model, start, range(8))
        assert all(norm(update.delta) <= float(state.shared[BOUND]) for update in updates)
        state = private.server_update(start, private.combine(updates))
    # Between the fourth and the fifth of eight lengths, or a step of the search beside them.
    assert 0.9 * sorted(lengths)[3] < float(state.shared[BOUND]) < 1.1 * sorted(lengths)[4]


def test_bytes_are_counted_as_sent_and_buffers_stay():
    model = nn.Sequential(net(), nn.Identity())
    model[1].register_buffer("seen", torch.zeros(100))
    for adaptive, more in ((None, 0), (AdaptiveClipping(), 8)):
        private = CentralPrivacy(FedAvg(), 1.0, 0.1, 2, adaptive=adaptive)
        state = private.init(model, 10)
        [update] = updates_of(private, model, state, [0])
        assert update.buffers == {}
        assert update.nbytes == update.delta.nbytes + SCALARS_BYTES + more
        assert private.effort(state, torch.tensor([10])).bytes_up == update.nbytes
        after = private.server_update(state, private.combine([update]))
        assert after.buffers.keys() == state.buffers.keys()


def test_what_diverged_stays_recognisable_after_clipping():
    model = net()
    private = CentralPrivacy(FedAvg(lr=1e38, epochs=5), 1.0, 0.1, 2)
    [update] = updates_of(private, model, private.init(model, 10), [3])
    assert not update.is_finite()


def test_it_wraps_compression_and_personal_layers():
    model = net()
    for inner in (Compressed(FedAvg(), Float16()), PersonalLayers(FedAvg(), layers=("2",))):
        private = CentralPrivacy(inner, 0.01, 0.0, 2)
        state = private.init(model, 10)
        update, memory = private.client_update(
            state, {}, PlainSolver(model, functional.cross_entropy), client(4), generator()
        )
        assert norm(update.delta) <= 0.01
        assert update.delta.shape == state.parameters.shape
        assert bool(memory) == isinstance(inner, PersonalLayers)
        assert private.server_update(state, private.combine([update])).round == 1


def test_batch_normalisation_is_refused_unless_its_statistics_stay_at_the_clients():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with pytest.raises(InputError, match=r"1 is BatchNorm1d.*GroupNorm"):
        CentralPrivacy(FedAvg(), 1.0, 1.0, 2).init(model, 10)
    with pytest.raises(InputError, match="the model is BatchNorm1d"):
        CentralPrivacy(FedAvg(), 1.0, 1.0, 2).init(nn.BatchNorm1d(4), 10)
    local = PersonalLayers(FedAvg(), layers=batch_norm_layers(model))
    assert CentralPrivacy(local, 1.0, 1.0, 2).init(model, 10).buffers == {}
    grouped = nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Linear(6, 3))
    assert CentralPrivacy(FedAvg(), 1.0, 1.0, 2).init(grouped, 10).round == 0


def test_algorithms_that_send_more_or_do_not_sum_are_refused():
    model = net()
    private = CentralPrivacy(Scaffold(), 1.0, 1.0, 2)
    with pytest.raises(InputError, match="beside the model's update"):
        updates_of(private, model, private.init(model, 10), [0])
    with pytest.raises(InputError, match="has to be a plain sum"):
        CentralPrivacy(FedAvg(mean=TrimmedMean(0.1)), 1.0, 1.0, 2)
    with pytest.raises(InputError, match="has to be a plain sum"):
        CentralPrivacy(Compressed(FedAvg(mean=TrimmedMean(0.1)), Float16()), 1.0, 1.0, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": 0.0}, "clip=0.0"),
        ({"clip": math.inf}, "clip=inf"),
        ({"noise_multiplier": -0.1}, "noise_multiplier=-0.1"),
        ({"expected_cohort": 0}, "expected_cohort=0"),
        ({"noise_seed": -1}, "noise_seed=-1"),
        ({"adaptive": AdaptiveClipping(count_noise=0.1)}, "set count_noise above 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        CentralPrivacy(FedAvg(), **{"clip": 1.0, "noise_multiplier": 1.0, "expected_cohort": 10, **settings})
