"""The traced solver makes the plain loop's descent."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.layout import Layout
from tacit.federated.local import traced
from tacit.federated.local.plain import PlainSolver
from tacit.federated.local.traced import LARGEST, TracedSolver, solver_for
from tacit.federated.local.work import LocalSolver, LocalWork
from tacit.federated.models import cnn, lenet, two_nn
from tacit.ring.kernels import load

cross_entropy = functional.cross_entropy


class Encoder(nn.Module):
    """An embedding, an encoder layer of a transformer, and a class for the whole sequence."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)).mean(1))


class Tied(nn.Module):
    """One matrix used twice, and a part that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(784, 12).requires_grad_(False)
        self.square = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(torch.tanh(self.square(self.frozen(x.flatten(1)))))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) * (2 if x.mean() > 0.1 else 1)


class Counting(nn.Module):
    """Behaves differently at every call, which a trace cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.called = nn.Linear(784, 10), 0

    def forward(self, x: Tensor) -> Tensor:
        self.called += 1
        return self.linear(x.flatten(1)) * self.called


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, groups=2),
        nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def odd() -> nn.Module:
    """Widths that fill no vector."""
    layers = nn.Linear(784, 37), nn.ReLU(), nn.Linear(37, 11, bias=False), nn.ReLU(), nn.Linear(11, 3)
    return nn.Sequential(nn.Flatten(), *layers)


def dropping() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 10))


def images(count: int, channels: int = 1, classes: int = 10) -> Examples:
    generator = torch.Generator().manual_seed(count)
    inputs = torch.rand(count, channels, 28, 28, generator=generator)
    return Examples(inputs, torch.randint(classes, (count,), generator=generator))


def sequences(count: int) -> Examples:
    generator = torch.Generator().manual_seed(count)
    return Examples(
        torch.randint(20, (count, 7), generator=generator), torch.randint(10, (count,), generator=generator)
    )


def work_of(
    model: nn.Module, examples: Examples, batch_size: int | None = 5, epochs: int = 1, **more: object
) -> LocalWork:
    start = Layout.of(model).flatten(dict(model.named_parameters()))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    generator = torch.Generator().manual_seed(3)
    return LocalWork(start, buffers, examples, 0.1, batch_size, epochs, generator, **more)  # type: ignore[arg-type]


def require_equal(model: nn.Module, examples: Examples, tolerance: float = 1e-6, **more: object) -> LocalSolver:
    plain, solver = PlainSolver(model, cross_entropy), TracedSolver(model, cross_entropy)
    expected, result = plain(work_of(model, examples, **more)), solver(work_of(model, examples, **more))
    torch.testing.assert_close(result.parameters, expected.parameters, rtol=tolerance, atol=tolerance)
    assert not torch.equal(result.parameters, work_of(model, examples).parameters)
    for name, buffer in expected.buffers.items():
        torch.testing.assert_close(result.buffers[name], buffer, rtol=1e-5, atol=1e-5)
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    assert result.steps == expected.steps
    return solver


@pytest.mark.parametrize(
    ("model", "examples"),
    [
        (two_nn, images(23)),
        (lenet, images(13)),
        (cnn, images(7)),
        (convolutional, images(13, channels=3)),
        (odd, images(13, classes=3)),
        (dropping, images(13)),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), images(13)),
        (Tied, images(13)),
        (lambda: Encoder(0.0), sequences(13)),
        (lambda: Encoder(0.1), sequences(13)),
    ],
    ids=["2nn", "lenet", "cnn", "batch norm", "odd", "dropout", "logistic", "tied", "transformer", "its dropout"],
)
def test_models_descend_as_in_the_plain_loop(model, examples):
    torch.manual_seed(0)
    require_equal(model(), examples)


@pytest.mark.parametrize(
    "more",
    [
        {"proximal": 0.3},
        {"correction": torch.linspace(-0.01, 0.01, 199_210)},
        {"proximal": 0.3, "anchor": torch.zeros(199_210), "correction": torch.linspace(-0.01, 0.01, 199_210)},
        {"epochs": 3},
        {"batch_size": 1},
        {"batch_size": 100},
        {"batch_size": None},
        {"batch_size": LARGEST + 1},
    ],
    ids=str,
)
def test_every_kind_of_work(more):
    torch.manual_seed(0)
    require_equal(two_nn(), images(11), **more)


def test_double_precision():
    torch.manual_seed(0)
    examples = images(11)
    require_equal(two_nn().double(), Examples(examples.inputs.double(), examples.targets), tolerance=1e-12)


@pytest.mark.parametrize("model", [two_nn, convolutional, dropping])
def test_without_compiled_loops(model, monkeypatch):
    monkeypatch.setattr(traced, "load", lambda name: None)
    torch.manual_seed(0)
    require_equal(model(), images(13, channels=3 if model is convolutional else 1))


def test_a_mean_squared_error_is_a_loss_like_another():
    torch.manual_seed(0)
    model, examples = two_nn(), images(10)
    examples = Examples(examples.inputs, torch.rand(10, 10))
    plain, solver = PlainSolver(model, functional.mse_loss), TracedSolver(model, functional.mse_loss)
    expected, result = plain(work_of(model, examples)), solver(work_of(model, examples))
    torch.testing.assert_close(result.parameters, expected.parameters, rtol=1e-6, atol=1e-6)


def test_a_result_depends_on_its_work_alone(monkeypatch):
    monkeypatch.setattr(traced, "PROGRAMS", 3)
    torch.manual_seed(0)
    model = dropping()
    solver, fresh = TracedSolver(model, cross_entropy), TracedSolver(model, cross_entropy)
    first = solver(work_of(model, images(9)))
    kept = first.parameters.clone()
    for count in range(1, 6):
        solver(work_of(model, images(count), batch_size=count))
    assert torch.equal(first.parameters, kept), "a later work wrote to an earlier result"
    again = solver(work_of(model, images(9)))
    assert torch.equal(again.parameters, first.parameters)
    assert torch.equal(fresh(work_of(model, images(9))).parameters, first.parameters)


def test_the_callers_tensors_and_random_state_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
    work = work_of(model, images(8, classes=5))
    before = [work.parameters.clone(), *(buffer.clone() for buffer in work.buffers.values())]
    state = torch.get_rng_state()
    TracedSolver(model, cross_entropy)(work)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, before, [work.parameters, *work.buffers.values()]))


def test_other_rates_and_other_shapes_of_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    solver, plain = TracedSolver(model, cross_entropy), PlainSolver(model, cross_entropy)
    for side in (8, 12):
        for rate in (0.1, 0.5):
            examples = Examples(torch.rand(6, 1, side, side), torch.randint(3, (6,)))
            works = [LocalWork(**vars(work_of(model, examples)) | {"lr": rate}) for _ in range(2)]
            torch.testing.assert_close(solver(works[0]).parameters, plain(works[1]).parameters)


def test_numbers_that_are_none_are_not_lost():
    """Training that diverges has to be seen as such."""
    model, examples = two_nn(), images(5)
    examples.inputs[2] = torch.nan
    result = TracedSolver(model, cross_entropy)(work_of(model, examples))
    assert result.loss != result.loss
    assert result.parameters.isnan().any()


@pytest.mark.parametrize("last", [lambda y: y.double(), lambda y: y.t().contiguous().t(), lambda y: y[:, ::2]])
def test_logits_that_the_compiled_loss_does_not_take(last):
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = two_nn()

        def forward(self, x: Tensor) -> Tensor:
            return last(self.net(x))

    torch.manual_seed(0)
    require_equal(Last(), images(10, classes=5))


def test_targets_that_are_no_classes_are_refused():
    model, examples = two_nn(), images(5)
    examples.targets[1] = 10
    with pytest.raises(InputError, match="with 10 outputs, targets are 0 to 9"):
        TracedSolver(model, cross_entropy)(work_of(model, examples))


def test_targets_left_out():
    torch.manual_seed(0)
    examples = images(10)
    examples.targets[3] = -100
    require_equal(two_nn(), examples)


def test_the_fastest_solver_that_fits():
    torch.manual_seed(0)
    solver, reason = solver_for(two_nn(), cross_entropy, images(5))
    assert isinstance(solver, TracedSolver)
    assert reason == ""
    assert solver.calls(images(5)) <= 14, "three products forward, two back, six updates, two masks and a loss"


@pytest.mark.parametrize(
    ("model", "examples", "reason"),
    [
        (Branching(), images(5), "cannot be traced"),
        (Counting(), images(5), "differs from the plain one"),
        (two_nn(), images(0), "there is no example"),
    ],
    ids=["branching", "counting", "nothing"],
)
def test_what_cannot_be_traced_trains_by_the_plain_loop(model, examples, reason):
    solver, why = solver_for(model, cross_entropy, examples)
    assert isinstance(solver, PlainSolver)
    assert reason in why


@pytest.mark.skipif(load("tacit.federated.local.kernels") is None, reason="numba is missing")
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (5, 16, 4), (10, 784, 200), (7, 72, 33), (64, 25, 9)])
def test_compiled_products_equal_torchs(shape):
    kernels = load("tacit.federated.local.kernels")
    rows, depth, width = shape
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient, bias = (
        torch.randn(size, generator=generator) for size in ((rows, depth), (width, depth), (rows, width), (width,))
    )
    # What lies around the results has to stay as it is.
    out = torch.full((rows + 2, width), 7.0)
    kernels.linear(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out[1].data_ptr(), rows, depth, width, False)
    torch.testing.assert_close(out[1:-1], torch.addmm(bias, x, weight.t()), rtol=1e-5, atol=1e-4)
    assert (out[[0, -1]] == 7).all()
    back = torch.full((rows + 2, depth), 7.0)
    kernels.multiply(gradient.data_ptr(), weight.data_ptr(), back[1].data_ptr(), rows, width, depth)
    torch.testing.assert_close(back[1:-1], gradient @ weight, rtol=1e-5, atol=1e-4)
    assert (back[[0, -1]] == 7).all()
    moved = torch.cat([torch.full((1, depth), 7.0), weight, torch.full((1, depth), 7.0)])
    kernels.update(gradient.data_ptr(), x.data_ptr(), moved[1].data_ptr(), rows, width, depth, 0.1)
    torch.testing.assert_close(moved[1:-1], weight - 0.1 * gradient.t() @ x, rtol=1e-5, atol=1e-4)
    assert (moved[[0, -1]] == 7).all()


def test_programs_of_all_sizes_share_memory():
    torch.manual_seed(0)
    model = lenet()
    solver = TracedSolver(model, cross_entropy)
    solver(work_of(model, images(12), batch_size=12))
    held = solver._scratch.nbytes
    assert held > 12 * 4 * 20 * 24 * 24, "the first convolution's result"
    expected = PlainSolver(model, cross_entropy)(work_of(model, images(13), batch_size=12))
    for _ in range(2):  # programs of 12 and of 1 take turns
        result = solver(work_of(model, images(13), batch_size=12))
        torch.testing.assert_close(result.parameters, expected.parameters, rtol=1e-6, atol=1e-6)
    assert solver._scratch.nbytes == held
