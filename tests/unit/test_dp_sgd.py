"""Record-level privacy at the client: the step is what the paper says, sampling and noise are as accounted."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.dp.accounting import SampledGaussian
from tacit.errors import InputError
from tacit.federated.local.dp_sgd import DpSgdSolver, local_event
from tacit.federated.local.plain import PlainSolver
from tacit.federated.local.work import LocalWork


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def data(count=20):
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(count, 6, generator=generator)
    return Examples(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


def work(solver, model, examples, *, batch_size=None, epochs=1, seed=0, **more):
    start = solver.layout.flatten(dict(model.named_parameters()))
    generator = torch.Generator().manual_seed(seed)
    return LocalWork(start, dict(model.named_buffers()), examples, 0.3, batch_size, epochs, generator, **more)


def solver_of(model, clip=1e6, noise_multiplier=0.0, noise_seed=None):
    return DpSgdSolver(
        model, functional.cross_entropy, clip=clip, noise_multiplier=noise_multiplier, noise_seed=noise_seed
    )


@pytest.mark.parametrize("more", [{}, {"proximal": 0.2}, {"correction": torch.linspace(-0.1, 0.1, 83)}])
def test_without_clipping_noise_and_sampling_it_is_plain_training(more):
    model, examples = net(), data()
    plain, private = PlainSolver(model, functional.cross_entropy), solver_of(model)
    for solver in (plain, private):
        assert solver.layout.size == 83
    expected = plain(work(plain, model, examples, epochs=5, **more))
    result = private(work(private, model, examples, epochs=5, **more))
    torch.testing.assert_close(result.parameters, expected.parameters, rtol=1e-5, atol=1e-6)
    assert result.steps == expected.steps == 5


def test_a_poisson_step_divides_by_the_expected_size_of_the_batch():
    model, examples = net(), data(20)
    solver = solver_of(model, noise_seed=3)
    piece = work(solver, model, examples)
    gradient = (solver(piece).parameters - piece.parameters) / 0.3
    # 400 steps so short that the model hardly moves: their sum is 400 times the mean gradient.
    many = LocalWork(piece.parameters, {}, examples, 1e-5, 5, 100, piece.generator)
    found = (solver(many).parameters - piece.parameters) / 1e-5 / 400
    assert float((found - gradient).norm() / gradient.norm()) < 0.15


def test_one_example_moves_the_model_by_no_more_than_its_clipped_gradient():
    model, examples, clip = net(), data(12), 0.05
    solver = solver_of(model, clip=clip)
    everyone = solver(work(solver, model, examples)).parameters
    for left_out in range(12):
        kept = torch.arange(12) != left_out
        without = Examples(examples.inputs[kept], examples.targets[kept])
        # Both divide by their own expected size.
        moved = (everyone - solver_start(solver, model)) * 12 - (
            solver(work(solver, model, without)).parameters - solver_start(solver, model)
        ) * 11
        assert float(moved.norm()) / 0.3 <= clip * 1.0001


def solver_start(solver, model):
    return solver.layout.flatten(dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("examples", "batch_size", "epochs", "rate", "times"),
    [(600, 32, 1, 32 / 600, 19), (600, None, 5, 1.0, 5), (7, 10, 3, 1.0, 3), (10, 5, 2, 0.5, 4), (1, 1, 1, 1.0, 1)],
)
def test_what_is_accounted_is_what_is_run(examples, batch_size, epochs, rate, times):
    assert local_event(examples, batch_size, epochs, 1.1) == SampledGaussian(1.1, rate, times)
    model = net()
    solver = solver_of(model)
    assert solver(work(solver, model, data(examples), batch_size=batch_size, epochs=epochs)).steps == times


def test_only_a_seed_repeats_sampling_and_noise():
    model, examples = net(), data()
    seeded = solver_of(model, 1.0, 1.0, noise_seed=7)

    def run(solver, seed=0):
        return solver(work(solver, model, examples, batch_size=5, seed=seed)).parameters

    assert torch.equal(run(seeded), run(seeded))
    assert torch.equal(run(seeded), run(solver_of(model, 1.0, 1.0, noise_seed=7)))
    assert not (run(seeded) == run(seeded, seed=1)).any()
    assert not (run(seeded) == run(solver_of(model, 1.0, 1.0, noise_seed=8))).any()
    fresh = solver_of(model, 1.0, 1.0)
    assert not torch.equal(run(fresh), run(fresh))


def test_noise_is_added_when_no_example_was_drawn():
    model, examples = nn.Sequential(nn.Linear(6, 400), nn.ReLU(), nn.Linear(400, 3)), data(1000)
    solver = solver_of(model, 1.0, 1.0, noise_seed=3)
    start = work(solver, model, examples, batch_size=1)
    piece = LocalWork(start.parameters, {}, examples, 1e-3, 1, 1, start.generator)
    # About e^-1 of the thousand batches are empty; were they skipped, the noise would have that much less variance.
    moved = (solver(piece).parameters - start.parameters) / 1e-3
    assert float(moved.square().mean()) == pytest.approx(1000, rel=0.12)


def test_nothing_but_the_parameters_depends_on_the_examples():
    model = nn.Sequential(net(), nn.GroupNorm(1, 3))
    model.register_buffer("seen", torch.tensor(4))
    solver = solver_of(model, 1.0, 1.0)
    result = solver(work(solver, model, data()))
    assert result.loss == 0.0
    assert result.buffers.keys() == {"seen"}
    assert int(result.buffers["seen"]) == 4


def test_dropout_follows_the_generator_and_leaves_torchs_own_alone():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    for architecture in (model, nn.Sequential(model, nn.LayerNorm(3))):
        solver = solver_of(architecture)
        torch.manual_seed(9)
        before = torch.random.get_rng_state()
        results = [solver(work(solver, architecture, data(), epochs=2, seed=seed)).parameters for seed in (1, 1, 2)]
        assert torch.equal(torch.random.get_rng_state(), before)
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])


def test_the_callers_model_and_work_stay_as_they_are():
    model = net()
    before = copy.deepcopy(model.state_dict())
    solver = solver_of(model, 1.0, 1.0)
    piece = work(solver, model, data(), epochs=3)
    start = piece.parameters.clone()
    solver(piece)
    assert torch.equal(piece.parameters, start)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.BatchNorm1d(8), "1 is BatchNorm1d"),
        (nn.SyncBatchNorm(8), "1 is SyncBatchNorm"),
        (nn.InstanceNorm1d(8, track_running_stats=True), "1 is InstanceNorm1d"),
    ],
)
def test_batch_normalisation_is_refused_by_name(layer, name):
    with pytest.raises(InputError, match=f"{name}.*GroupNorm"):
        solver_of(nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": 0.0}, "clip=0.0"),
        ({"clip": math.nan}, "clip=nan"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"noise_seed": -1}, "noise_seed=-1"),
        ({"noise_seed": 2**128}, "noise_seed="),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        solver_of(net(), **settings)
