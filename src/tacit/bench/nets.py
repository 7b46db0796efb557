"""The networks of the benchmarks, as anyone would write them in PyTorch.

Each comes with PyTorch's own initial weights, in evaluation mode, and maps a float batch to logits ``(n, 10)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tacit.errors import InputError
from tacit.federated.models import lenet


@dataclass(frozen=True)
class Net:
    """A network and what it takes.

    Args:
        build: makes it.
        item_shape: the shape of one input.
    """

    build: Callable[[], nn.Module]
    item_shape: tuple[int, ...]


def mlp() -> nn.Sequential:
    """784–128–128–10 with ReLU; 118,282 parameters."""
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def vgg() -> nn.Sequential:
    """A small VGG for 32 × 32 colour images (Simonyan and Zisserman 2015, scaled down): 64, 128, 256 channels."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        norms = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        return [first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), nn.MaxPool2d(2)]

    features = [*block(3, 64), *block(64, 128), *block(128, 256)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(256 * 4 * 4, 256), nn.ReLU(), nn.Linear(256, 10))


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a way around them (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``(n, inputs, h, w)`` to ``(n, outputs, h / stride, w / stride)``."""
        y = self.relu(self.bn1(self.conv1(x)))
        result: Tensor = self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))
        return result


def resnet18() -> nn.Sequential:
    """ResNet-18 with the stem that is usual for 32 × 32 images: a 3 × 3 convolution, no pooling; 11,173,962
    parameters."""
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [block for i, o, stride in stages for block in (BasicBlock(i, o, stride), BasicBlock(o, o, 1))]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Transformer(nn.Module):
    """A sequence classifier: two encoder layers over 16 positions of 64 features, averaged."""

    def __init__(self, positions: int = 16, features: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(positions, features))
        nn.init.normal_(self.position, std=0.02)
        layer = nn.TransformerEncoderLayer(features, heads, 4 * features, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, positions, features)`` to logits ``(n, 10)``."""
        result: Tensor = self.head(self.encoder(x + self.position).mean(1))
        return result


NETS = {
    "mlp": Net(mlp, (784,)),
    "lenet": Net(lenet, (1, 28, 28)),
    "vgg": Net(vgg, (3, 32, 32)),
    "resnet18": Net(resnet18, (3, 32, 32)),
    "transformer": Net(Transformer, (16, 64)),
}


def build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network in evaluation mode, the same weights every time, and the shape of one input.

    Raises:
        InputError: there is no network of this name.
    """
    if name not in NETS:
        raise InputError(f"there is no network {name!r}: choose one of {', '.join(NETS)}")
    torch.manual_seed(0)
    return NETS[name].build().eval(), NETS[name].item_shape
