"""Handwritten digits for the programs beside it: MNIST from the folder that TACIT_DATA names, else scikit-learn's."""

import os

from torch.utils.data import TensorDataset

from tacit.data.digits import load_digits
from tacit.data.mnist import load_mnist


def load(train: int, test: int) -> tuple[TensorDataset, TensorDataset]:
    """So many training and test images, standardised, float32 ``(n, 1, 28, 28)``, with their labels."""
    data = load_mnist() if os.environ.get("TACIT_DATA") else load_digits()
    parts = ((data.train, train), (data.test, test))
    kept = [TensorDataset((part.inputs[:count] - 0.13) / 0.31, part.targets[:count]) for part, count in parts]
    return kept[0], kept[1]
