"""What ``[data]`` and ``[split]`` of a config stand for: examples, and who holds which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from tacit.data.digits import load_digits
from tacit.data.examples import Dataset, Examples
from tacit.data.heart_disease import FEATURES, Moments, load_heart_disease, standardised
from tacit.data.mnist import load_mnist
from tacit.data.partition import dirichlet, dirichlet_sizes, iid, shards, stratified
from tacit.data.views import ClientViews
from tacit.errors import InputError
from tacit.federated.generators import generator_for
from tacit.runs import config


@dataclass(frozen=True)
class Signature:
    """What examples a run is for, known without any.

    Args:
        name: of the data set.
        shape: of one example.
        classes: how many there are.
        standardised: whether features are standardised by the moments of all clients' training examples.
        public: whether its test set is for anybody to have.
    """

    name: str
    shape: tuple[int, ...]
    classes: int
    standardised: bool
    public: bool

    def blank(self) -> Dataset:
        """A data set of that kind, of zeros."""
        examples = Examples(torch.zeros(2, *self.shape), torch.zeros(2, dtype=torch.int64))
        return Dataset(self.name, examples, examples, self.classes)


_SIGNATURES = {
    "digits": Signature("digits", (1, 28, 28), 10, False, True),
    "mnist": Signature("mnist", (1, 28, 28), 10, False, True),
    "heart": Signature("heart", (len(FEATURES),), 2, True, False),
}


def signature(settings: config.Config) -> Signature:
    """What examples a run is for.

    Raises:
        InputError: the data are the sites' own, and the config does not say of what kind.
    """
    section = settings.data
    if section.dataset != "sites":
        return _SIGNATURES[section.dataset]
    if not section.shape or min(section.shape) < 1 or (section.classes or 0) < 2:
        raise InputError(
            f"data.shape={section.shape}, data.classes={section.classes}: with dataset = 'sites' say of which shape an "
            "example is, such as [13], and how many classes there are, 2 or more"
        )
    if section.standardise and len(section.shape) != 1:
        raise InputError(f"data.standardise goes with features in a row, not with examples of shape {section.shape}")
    return Signature("sites", section.shape, section.classes or 0, section.standardise, False)


@dataclass(frozen=True)
class Holdings:
    """A data set and its division over clients.

    Args:
        data: all of it; its test set is nobody's.
        clients: each client's training examples.
        tests: each client's examples that it does not train on; ``None`` if it keeps none back.
    """

    data: Dataset
    clients: Sequence[Examples]
    tests: Sequence[Examples] | None


def holdings(settings: config.Config, origin: Path) -> Holdings:
    """Load and split.

    Raises:
        InputError: a value is out of range, or the data set has no natural division.
        DataError: the data set is missing or damaged.
    """
    section = settings.data
    if not 0 <= section.held_out < 1:
        raise InputError(f"data.held_out={section.held_out}: keep back a fraction of 0 or more and below 1")
    folder = None if section.dir is None else origin / section.dir
    if section.dataset == "sites":
        raise InputError("data.dataset='sites' is what the sites have: it goes with runtime = 'flower'")
    if section.dataset == "heart":
        return _heart(settings, folder)
    if isinstance(settings.split, config.Natural):
        raise InputError(f"split.name='natural': {section.dataset} is not divided by itself; choose another split")
    data = load_mnist(folder) if section.dataset == "mnist" else load_digits()
    return _divided(data, settings)


def _divided(data: Dataset, settings: config.Config) -> Holdings:
    labels, generator = data.train.targets, generator_for(settings.seed, "split")
    match settings.split:
        case config.Dirichlet(clients=clients, alpha=alpha):
            parts = dirichlet(labels, clients, alpha, generator)
        case config.Shards(clients=clients, shards_per_client=count):
            parts = shards(labels, clients, generator, count)
        case config.Quantity(clients=clients, alpha=alpha):
            parts = dirichlet_sizes(labels, clients, alpha, generator)
        case config.Iid(clients=clients):
            parts = iid(labels, clients, generator)
        case _:
            raise InputError(f"split {settings.split} does not divide {data.name}")
    if settings.data.held_out == 0:
        return Holdings(data, ClientViews(data.train, parts), None)
    kept = [_kept_back(labels, part, settings.data.held_out, generator) for part in parts]
    return Holdings(
        data,
        ClientViews(data.train, [own for own, _ in kept]),
        ClientViews(data.train, [test for _, test in kept]),
    )


def _kept_back(labels: Tensor, part: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A client's indices to train on and to keep back, at least one of each if it has two."""
    train, test = stratified(labels[part], 1 - fraction, generator)
    if len(test) == 0 and len(train) > 1:
        train, test = train[:-1], train[-1:]
    return part[train], part[test]


def _heart(settings: config.Config, folder: Path | None) -> Holdings:
    """Four hospitals, features standardised by the moments of all their training examples together."""
    hospitals = load_heart_disease(folder)
    moments = reduce(add, (Moments.of(hospital.train.inputs) for hospital in hospitals))
    trains = [standardised(hospital.train, moments.mean, moments.std) for hospital in hospitals]
    tests = [standardised(hospital.test, moments.mean, moments.std) for hospital in hospitals]
    data = Dataset("heart", _joined(trains), _joined(tests), 2)
    if isinstance(settings.split, config.Natural):
        return Holdings(data, trains, tests)
    return _divided(data, settings)


def _joined(parts: Sequence[Examples]) -> Examples:
    return Examples(torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))
