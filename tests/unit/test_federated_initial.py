import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tacit.errors import InputError
from tacit.federated.initial import NORMAL_STD, initialise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(16, 64, 5), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(400, 300))


def agrees(weights: Tensor, std: float) -> bool:
    """Whether the sample variance lies within five standard errors of ``std``², and the mean of 0."""
    n, weights = weights.numel(), weights.detach().double()
    variance = float(weights.var()) / std**2
    mean = float(weights.mean()) / std
    return abs(variance - 1) < 5 * math.sqrt(2 / n) and abs(mean) < 5 / math.sqrt(n)


EXPECTED = {
    "normal": (NORMAL_STD, NORMAL_STD),
    "xavier": (math.sqrt(2 / (16 * 25 + 64 * 25)), math.sqrt(2 / 700)),
    "he": (math.sqrt(2 / (16 * 25)), math.sqrt(2 / 400)),
}


@pytest.mark.parametrize("how", EXPECTED)
def test_the_scale_is_the_rule_s_and_no_other(how: str) -> None:
    model = network()
    initialise(model, how, seeded())
    for layer, std in zip((model[0], model[3]), EXPECTED[how], strict=True):
        assert agrees(layer.weight, std)
        assert not agrees(layer.weight, 1.05 * std)
        assert not agrees(layer.weight, std / 1.05)
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


@pytest.mark.parametrize("how", EXPECTED)
def test_normalisation_and_frozen_layers_stay(how: str) -> None:
    model = network()
    nn.init.constant_(model[1].weight, 3.0)
    model[3].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    initialise(model, how, seeded())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight", "0.bias"}


def test_default_keeps_the_model() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    initialise(model, "default", seeded())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_generator_alone_decides() -> None:
    models = [network() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        initialise(model, "he", seeded(seed))
    assert torch.equal(models[0][3].weight, models[1][3].weight)
    assert not torch.equal(models[0][3].weight, models[2][3].weight)


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(InputError, match="initial='zeros': choose one of normal, xavier, he, default"):
        initialise(network(), "zeros", seeded())
