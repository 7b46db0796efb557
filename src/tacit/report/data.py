"""What a run leaves to be reported: plain frozen records, no drawing and no HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tacit.federated.history import RoundRecord


@dataclass(frozen=True)
class Sample:
    """One test image, as each party held it, and what became of it.

    Args:
        image: float tensor ``(28, 28)`` in ``[0, 1]``; what the client put in.
        alice: int64 tensor ``(28, 28)``; alice's share of the image, uniform in Z/2^64.
        bob: int64 tensor ``(28, 28)``; bob's share.
        label: the true class.
        plaintext: the class predicted in the clear.
        encrypted: the class predicted on shares.
        probabilities: float tensor ``(classes,)``; softmax of the encrypted logits, as the client sees them.
    """

    image: Tensor = field(repr=False)
    alice: Tensor = field(repr=False)
    bob: Tensor = field(repr=False)
    label: int
    plaintext: int
    encrypted: int
    probabilities: Tensor = field(repr=False)

    @property
    def wrong(self) -> bool:
        """Whether the encrypted prediction is not the true class."""
        return self.encrypted != self.label

    @property
    def differs(self) -> bool:
        """Whether the encrypted prediction is not the one made in the clear."""
        return self.encrypted != self.plaintext


@dataclass(frozen=True)
class LayerCost:
    """What one layer of the encrypted model costs for one batch.

    Args:
        name: the layer's name in the model.
        operator: the operator that it runs.
        rounds: times that alice and bob each wait for a message of the other.
        bytes_online: bytes that one party sends to the other.
        bytes_dealt: bytes of correlated randomness that the provider sends.
        milliseconds: what alice and bob compute together, in one process.
    """

    name: str
    operator: str
    rounds: int
    bytes_online: int
    bytes_dealt: int
    milliseconds: float


@dataclass(frozen=True)
class DemoReport:
    """A whole run: federated training, then encrypted inference with the model that came of it.

    Args:
        dataset: name of the data set.
        model: name of the model.
        secure_sum: whether the server saw only sums of the clients' updates.
        history: the federated rounds, in order.
        label_counts: int64 tensor ``(clients, classes)``; training examples of each class at each client.
        confusion: int64 tensor ``(classes, classes)``; rows are true classes, columns encrypted predictions.
        federated_accuracy: fraction of test images classified correctly in the clear.
        encrypted_accuracy: the same fraction on shares.
        agreement: fraction of test images on which both give the same class.
        max_abs_error: largest absolute difference between a logit in the clear and on shares.
        test_images: how many images were classified on shares.
        batch: images per batch.
        rounds_per_batch: online rounds for one batch.
        bytes_online_per_image: bytes that one party sends online, per image.
        bytes_dealt_per_image: bytes that the provider sends, per image.
        samples: the images to show.
        layers: cost of each layer, in order of execution.
        seconds_federated: wall-clock time of the training.
        seconds_encrypted: wall-clock time of the encrypted inference.
        settings: what the run was asked to do, by name.
        versions: software and machine, by name.
    """

    dataset: str
    model: str
    secure_sum: bool
    history: Sequence[RoundRecord]
    label_counts: Tensor
    confusion: Tensor
    federated_accuracy: float
    encrypted_accuracy: float
    agreement: float
    max_abs_error: float
    test_images: int
    batch: int
    rounds_per_batch: int
    bytes_online_per_image: float
    bytes_dealt_per_image: float
    samples: Sequence[Sample]
    layers: Sequence[LayerCost]
    seconds_federated: float
    seconds_encrypted: float
    settings: Mapping[str, str]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class TrainingReport:
    """A federated training.

    Args:
        dataset: name of the data set.
        model: name of the model.
        algorithm: name of the algorithm.
        secure_sum: whether the server saw only sums of the clients' updates.
        history: the rounds, in order.
        label_counts: int64 tensor ``(clients, classes)``; training examples of each class at each client; ``None``
            where only the clients know.
        seconds: wall-clock time of all rounds.
        settings: what the run was asked to do, by name.
        versions: software and machine, by name.
    """

    dataset: str
    model: str
    algorithm: str
    secure_sum: bool
    history: Sequence[RoundRecord]
    label_counts: Tensor | None
    seconds: float
    settings: Mapping[str, str]
    versions: Mapping[str, str]
