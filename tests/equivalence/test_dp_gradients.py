"""Sums of clipped per-example gradients: ghost norms ≡ vmap ≡ a loop over examples ≡ Opacus."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from tacit.federated.layout import Layout
from tacit.federated.local.ghost import GhostGradients
from tacit.federated.local.per_example import PerExampleGradients
from tacit.federated.models import cnn, lenet, two_nn

CHAINS = {
    "2nn": (two_nn, (1, 28, 28)),
    "lenet": (lenet, (1, 28, 28)),
    "cnn": (cnn, (1, 28, 28)),
    "in-place, no bias, strides, dilation, groups": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), groups=4),
            nn.Sequential(nn.Tanh(), nn.AvgPool2d(2)),
            nn.Flatten(),
            nn.Linear(64, 10),
        ),
        (3, 11, 11),
    ),
    "sequences": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 3, padding=1, groups=2), nn.GELU(), nn.Linear(9, 7), nn.ELU(),
            nn.Linear(7, 30, bias=False), nn.Flatten(), nn.Linear(180, 10),
        ),
        (4, 9),
    ),
    "few positions, wide layers": (
        lambda: nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 40), nn.Flatten(), nn.Linear(120, 10)),
        (3, 40),
    ),
    "wide convolution": (
        lambda: nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4, 10)), (32, 4, 4),
    ),
}  # fmt: skip


class Residual(nn.Module):
    """Nothing that a chain can say: a layer used twice, a normalisation, a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.norm = nn.GroupNorm(3, 12)
        self.scale = nn.Parameter(torch.ones(12))
        self.last = nn.Linear(12, 10)

    def forward(self, x):
        x = x + self.first(x).relu()
        x = x + self.scale * self.norm(self.first(x))
        return self.last(x)


def setting(make, shape, count=7, seed=0):
    torch.manual_seed(seed)
    model = make()
    # Examples of very different sizes, so that some gradients are clipped and some are not.
    inputs = torch.randn(count, *shape) * torch.logspace(-2, 0.5, count).view(-1, *[1] * len(shape))
    return model, inputs, torch.randint(10, (count,))


def loop(model, loss, inputs, targets, bound):
    """One gradient after another."""
    model = copy.deepcopy(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    total, lengths = 0, []
    for x, y in zip(inputs, targets, strict=True):
        gradients = torch.autograd.grad(loss(model(x[None]), y[None]), parameters)
        flat = torch.cat([g.reshape(-1) for g in gradients]).double()
        lengths.append(float(flat.norm()))
        total = total + flat * min(1.0, bound / lengths[-1])
    return total, lengths


def summed(gradients, model, inputs, targets, bound):
    layout = Layout.of(model)
    trained = layout.flatten(dict(model.named_parameters()))
    gradients.load(trained)
    out = torch.full_like(trained, torch.nan)
    gradients.clipped_sum(inputs, targets, bound, out)
    return out.double()


def close(a, b):
    return float((a - b).norm() / b.norm()) < 5e-5


@pytest.mark.parametrize("name", CHAINS)
def test_ghost_norms_equal_vmap_and_the_loop(name):
    model, inputs, targets = setting(*CHAINS[name])
    loss = functional.cross_entropy
    _, lengths = loop(model, loss, inputs, targets, 1.0)
    bound = sorted(lengths)[3]
    reference, _ = loop(model, loss, inputs, targets, bound)
    ghost = GhostGradients.of(model, loss)
    assert ghost is not None
    assert close(summed(ghost, model, inputs, targets, bound), reference)
    assert close(summed(PerExampleGradients(model, loss), model, inputs, targets, bound), reference)
    # The comparison sees a bound that is a little off, and an example less.
    assert not close(loop(model, loss, inputs, targets, 1.001 * bound)[0], reference)
    assert not close(loop(model, loss, inputs[1:], targets[1:], bound)[0], reference)


def test_any_other_model_goes_through_vmap():
    model, inputs, targets = setting(Residual, (12,))
    assert GhostGradients.of(model, functional.cross_entropy) is None
    reference, _ = loop(model, functional.cross_entropy, inputs, targets, 0.7)
    assert close(summed(PerExampleGradients(model, functional.cross_entropy), model, inputs, targets, 0.7), reference)


def test_vmap_in_pieces_is_the_same(monkeypatch):
    model, inputs, targets = setting(Residual, (12,))
    whole = summed(PerExampleGradients(model, functional.cross_entropy), model, inputs, targets, 0.7)
    monkeypatch.setattr("tacit.federated.local.per_example._ENTRIES", 2 * Layout.of(model).size)
    pieces = summed(PerExampleGradients(model, functional.cross_entropy), model, inputs, targets, 0.7)
    assert close(pieces, whole)


def weighted(outputs, targets):
    """A loss whose batch value is no mean of the examples' own, and knows no ``reduction``."""
    return functional.cross_entropy(outputs, targets, weight=torch.linspace(0.1, 2, 10), label_smoothing=0.1)


@pytest.mark.parametrize("name", ["2nn", "sequences"])
def test_any_loss_is_taken_example_by_example(name):
    model, inputs, targets = setting(*CHAINS[name])
    reference, _ = loop(model, weighted, inputs, targets, 0.5)
    ghost = GhostGradients.of(model, weighted)
    assert ghost is not None
    assert close(summed(ghost, model, inputs, targets, 0.5), reference)


def test_frozen_parameters_have_no_gradient_and_do_not_count():
    model, inputs, targets = setting(*CHAINS["2nn"])
    model[1].weight.requires_grad_(False)
    model[5].bias.requires_grad_(False)
    model[3].requires_grad_(False)
    reference, _ = loop(model, functional.cross_entropy, inputs, targets, 0.5)
    ghost = GhostGradients.of(model, functional.cross_entropy)
    assert ghost is not None
    assert close(summed(ghost, model, inputs, targets, 0.5), reference)
    assert model[1].bias.requires_grad
    assert not model[3].bias.requires_grad


class MeanFree(nn.Linear):
    """A layer that mixes the examples of a batch, under the name of one that does not."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


def shared_layer():
    layer = nn.Linear(10, 10)
    return nn.Sequential(layer, nn.ReLU(), layer)


def tied_weights():
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))
    model[2].weight = model[0].weight
    return model


def hooked():
    model = nn.Sequential(nn.Linear(10, 10))
    model[0].register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(MeanFree(10, 10)),
        lambda: nn.Sequential(nn.Linear(10, 10), nn.Softmax(0)),
        lambda: nn.Sequential(nn.Linear(10, 10), nn.LayerNorm(10)),
        lambda: nn.Sequential(nn.Flatten(0), nn.Linear(10, 10)),
        lambda: nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")),
        shared_layer,
        tied_weights,
        hooked,
    ],
)
def test_ghost_norms_are_not_taken_of_what_is_not_known(make):
    assert GhostGradients.of(make(), functional.cross_entropy) is None


@pytest.mark.parametrize("name", ["2nn", "lenet", "sequences"])
def test_opacus_computes_the_same(name):
    opacus = pytest.importorskip("opacus.grad_sample", reason="needs opacus")
    model, inputs, targets = setting(*CHAINS[name])
    bound = 0.5
    ours = GhostGradients.of(model, functional.cross_entropy)
    assert ours is not None
    theirs = opacus.GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    functional.cross_entropy(theirs(inputs.requires_grad_()), targets, reduction="sum").backward()
    each = torch.cat([p.grad_sample.flatten(1) for p in theirs.parameters()], dim=1).double()
    factors = (bound / (each.norm(dim=1) + 1e-6)).clamp(max=1)
    assert (factors < 1).any()
    assert close(summed(ours, model, inputs.detach(), targets, bound), factors @ each)
