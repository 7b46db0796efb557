"""The main job on one machine: train federatedly, then test an encrypted model on an encrypted data set."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from tacit.cluster import PrivateModel, cluster
from tacit.data.digits import load_digits
from tacit.data.download import Progress
from tacit.data.examples import Dataset, Examples
from tacit.data.mnist import load_mnist
from tacit.data.partition import dirichlet, iid, label_counts, shards
from tacit.errors import InputError
from tacit.federated.fedavg import FedAvg
from tacit.federated.generators import generator_for
from tacit.federated.history import RoundRecord
from tacit.federated.models import cnn, lenet, two_nn
from tacit.mpc.shares import Share
from tacit.report.data import DemoReport, LayerCost, Sample
from tacit.runtimes.simulation import federate

DATASETS = ("digits", "mnist")
MODELS: dict[str, Callable[[], nn.Module]] = {"2nn": two_nn, "cnn": cnn, "lenet": lenet}
SPLITS = ("iid", "dirichlet", "shards")
ENCRYPTED_BATCH = 100
SAMPLES = 24


@dataclass(frozen=True)
class Settings:
    """What to train on, how, and for how long.

    Args:
        dataset: ``digits`` (bundled with scikit-learn) or ``mnist``.
        model: ``2nn``, ``cnn`` or ``lenet``, see `tacit.federated.models`.
        split: how the training examples are spread over clients: ``iid``, ``dirichlet`` (label skew, alpha 0.5) or
            ``shards`` (two classes a client).
        clients: how many clients.
        cohort: how many of them train in a round.
        rounds: communication rounds.
        lr: the clients' learning rate; each makes one pass in batches of 10.
        server_lr: learning rate of the server's SGD on the pseudo-gradient; 1 without momentum is plain averaging.
        server_momentum: its momentum.
        secure_sum: whether the server sees only sums of the clients' updates.
        seed: of everything that is not secret.
        data_dir: where MNIST's files are.

    Raises:
        InputError: an option has none of its values, or is out of range.
    """

    dataset: str = "digits"
    model: str = "2nn"
    split: str = "iid"
    clients: int = 10
    cohort: int = 5
    rounds: int = 30
    lr: float = 0.05
    server_lr: float = 1.0
    server_momentum: float = 0.8
    secure_sum: bool = True
    seed: int = 0
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        for option, value, known in (
            ("dataset", self.dataset, DATASETS),
            ("model", self.model, tuple(MODELS)),
            ("split", self.split, SPLITS),
        ):
            if value not in known:
                raise InputError(f"{option} {value!r} is unknown: choose {', '.join(known)}")
        for option, number in (("clients", self.clients), ("cohort", self.cohort), ("rounds", self.rounds)):
            if number < 1:
                raise InputError(f"{option} is {number}: give 1 or more")
        if self.cohort > self.clients:
            raise InputError(f"cohort is {self.cohort} but there are {self.clients} clients: give at most as many")
        if not (self.server_lr > 0 and 0 <= self.server_momentum < 1):
            raise InputError(
                f"server_lr is {self.server_lr}, server_momentum {self.server_momentum}: "
                "give a rate above 0, and a momentum of 0 or more and below 1"
            )

    def server_optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """The server's SGD."""
        return torch.optim.SGD(parameters, lr=self.server_lr, momentum=self.server_momentum)


@dataclass(frozen=True)
class Watcher:
    """Whoever wants to know how far the demonstration is; every field is called with news.

    Args:
        download: bytes of a file so far and in all.
        round: the record of a round that ended.
        predicted: how many test images have been predicted in secret, and out of how many.
    """

    download: Progress | None = None
    round: Callable[[RoundRecord], None] | None = None
    predicted: Callable[[int, int], None] | None = None


def demonstrate(settings: Settings, watcher: Watcher | None = None) -> DemoReport:
    """Train, evaluate in the clear, encrypt the model and the whole test set, evaluate encrypted, compare.

    Raises:
        InputError: a setting is out of range.
        DataError: the data set is missing or damaged.
    """
    watcher = watcher or Watcher()
    data = load_mnist(settings.data_dir, progress=watcher.download) if settings.dataset == "mnist" else load_digits()
    parts = _split(data, settings)
    started = time.perf_counter()
    run = federate(
        MODELS[settings.model](),
        [data.train.subset(part) for part in parts],
        algorithm=FedAvg(lr=settings.lr, server_optimizer=settings.server_optimizer),
        rounds=settings.rounds,
        cohort=settings.cohort,
        seed=settings.seed,
        secure_sum="masked" if settings.secure_sum else None,
        test=data.test,
        on_round=watcher.round,
    )
    seconds_federated = time.perf_counter() - started
    with torch.inference_mode():
        clear = torch.cat([run.model.eval()(batch) for batch in torch.split(data.test.inputs, ENCRYPTED_BATCH)])
    started = time.perf_counter()
    prediction = _predict(run.model, data.test, watcher)
    seconds_encrypted = time.perf_counter() - started
    labels, clear_class, secret_class = data.test.targets, clear.argmax(1), prediction.logits.argmax(1)
    cost = prediction.model.cost()
    return DemoReport(
        dataset=data.name,
        model=settings.model,
        secure_sum=settings.secure_sum,
        history=run.history,
        label_counts=label_counts(data.train.targets, parts, data.classes),
        confusion=_confusion(labels, secret_class, data.classes),
        federated_accuracy=_fraction(clear_class == labels),
        encrypted_accuracy=_fraction(secret_class == labels),
        agreement=_fraction(clear_class == secret_class),
        max_abs_error=float((clear - prediction.logits).abs().max()),
        test_images=len(labels),
        batch=prediction.batch,
        rounds_per_batch=cost.rounds,
        bytes_online_per_image=cost.bytes_online / prediction.batch,
        bytes_dealt_per_image=cost.bytes_dealt / prediction.batch,
        samples=_samples(data.test, clear_class, prediction),
        layers=prediction.layers,
        seconds_federated=seconds_federated,
        seconds_encrypted=seconds_encrypted,
        settings={k: str(v) for k, v in vars(settings).items() if v is not None},
        versions=_versions(),
    )


def _split(data: Dataset, settings: Settings) -> list[Tensor]:
    labels, generator = data.train.targets, generator_for(settings.seed, "split")
    if settings.split == "dirichlet":
        return dirichlet(labels, settings.clients, 0.5, generator)
    return (iid if settings.split == "iid" else shards)(labels, settings.clients, generator=generator)


@dataclass(frozen=True)
class _Prediction:
    """What came of predicting the test set in secret."""

    model: PrivateModel
    logits: Tensor
    alice: Tensor
    bob: Tensor
    batch: int
    layers: tuple[LayerCost, ...]


def _predict(model: nn.Module, test: Examples, watcher: Watcher) -> _Prediction:
    batches = torch.split(test.inputs, ENCRYPTED_BATCH)
    seconds: dict[str, float] = {}
    shares: list[tuple[Share, Share]] = []
    logits = []
    with cluster() as parties:
        private = parties.encrypt(model, batches[0])
        for batch in batches:
            private.deal(tuple(batch.shape))
            logits.append(private(batch, clock=time.perf_counter, seen=lambda *pair: shares.append(pair)))
            for layer in private.counted().layers:
                seconds[layer.name] = seconds.get(layer.name, 0.0) + layer.seconds
            if watcher.predicted:
                watcher.predicted(sum(map(len, logits)), len(test))
    share_of_a_batch = len(batches[0]) / len(test)
    layers = tuple(
        LayerCost(
            layer.layer or layer.name,
            layer.operator,
            layer.rounds,
            layer.bytes_online,
            layer.bytes_dealt,
            1000 * seconds[layer.name] * share_of_a_batch,
        )
        for layer in private.cost().layers
    )
    alice, bob = (torch.cat([pair[i].words for pair in shares]) for i in range(2))
    return _Prediction(private, torch.cat(logits), alice, bob, len(batches[0]), layers)


def _samples(test: Examples, clear: Tensor, prediction: _Prediction) -> tuple[Sample, ...]:
    """The first test images, with some of those that were predicted wrongly among them, in the test set's order."""
    secret = prediction.logits.argmax(1)
    notable = torch.nonzero((secret != test.targets) | (secret != clear)).flatten()[: SAMPLES // 4]
    usual = torch.tensor([i for i in range(len(test)) if i not in set(notable.tolist())][: SAMPLES - len(notable)])
    chosen = torch.cat([notable, usual]).sort().values
    return tuple(
        Sample(
            image=test.inputs[i, 0],
            alice=prediction.alice[i, 0],
            bob=prediction.bob[i, 0],
            label=int(test.targets[i]),
            plaintext=int(clear[i]),
            encrypted=int(secret[i]),
            probabilities=prediction.logits[i].softmax(0),
        )
        for i in chosen.tolist()
    )


def _confusion(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def _fraction(correct: Tensor) -> float:
    return float(correct.to(torch.float64).mean())


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("tacit", "torch", "numpy", "cryptography")}
    return {**packages, "python": platform.python_version(), "machine": platform.machine()}
