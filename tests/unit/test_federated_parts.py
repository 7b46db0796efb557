"""Generators, reference networks and evaluation."""

import pytest
import torch
from torch import nn

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.evaluation import evaluate
from tacit.federated.generators import generator_for
from tacit.federated.models import cnn, lenet, two_nn


def test_generators_depend_on_every_part_of_their_purpose() -> None:
    purposes = [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a", 1, 0), (0, "a1")]
    seeds = {generator_for(*purpose).initial_seed() for purpose in purposes}
    assert len(seeds) == len(purposes)
    assert generator_for(0, "a", 1).initial_seed() == generator_for(0, "a", 1).initial_seed()


@pytest.mark.parametrize(
    ("make", "parameters"), [(two_nn, 199_210), (cnn, 1_663_370), (lenet, 431_080)], ids=lambda m: str(m)
)
def test_reference_networks(make, parameters: int) -> None:
    model = make()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_evaluation_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    targets = torch.tensor([0, 1, 1])
    loss, accuracy = evaluate(nn.Identity(), Examples(logits, targets), batch=2)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, targets)))
    assert accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(training: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.9)).train(training)
    examples = Examples(torch.randn(8, 2), torch.zeros(8, dtype=torch.int64))
    assert evaluate(model, examples) == evaluate(model, examples)
    assert model.training is model[1].training is training
    assert model[0].num_batches_tracked == 0


def test_evaluating_on_nothing() -> None:
    with pytest.raises(InputError, match="no examples"):
        evaluate(nn.Identity(), Examples(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)))
