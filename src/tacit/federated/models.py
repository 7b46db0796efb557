"""Reference networks, with PyTorch's own initial weights.

`two_nn`, `cnn` and `lenet` are for 28 × 28 grey images in ten classes: float ``(n, 1, 28, 28)`` to logits ``(n, 10)``;
`logistic` and `mlp` for tables: float ``(n, features)`` to logits ``(n, classes)``.
"""

from __future__ import annotations

from torch import nn


def two_nn() -> nn.Sequential:
    """The 2NN of McMahan et al. 2017: 784–200–200–10 with ReLU; 199,210 parameters."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, 10),
    )


def cnn() -> nn.Sequential:
    """The CNN of McMahan et al. 2017: two 5 × 5 convolutions (32, 64), 512 units; 1,663,370 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


def lenet() -> nn.Sequential:
    """Caffe's LeNet with a ReLU after each convolution: 20, 50, 500 units; 431,080 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * 4 * 4, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


def logistic(features: int, classes: int) -> nn.Linear:
    """Logistic regression: a linear layer whose outputs are logits."""
    return nn.Linear(features, classes)


def mlp(features: int, classes: int, hidden: int = 16) -> nn.Sequential:
    """One hidden layer of ReLU units."""
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))
