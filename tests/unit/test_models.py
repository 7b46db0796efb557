"""Models as people define them, encrypted without a change: what they compute, within stated errors, at the planned
cost."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import prg
from tacit.cluster import Cluster


class BasicBlock(nn.Module):
    """He et al., 2016: two 3×3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with the stem for 32×32 images: a 3×3 convolution and no pooling."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks, inputs = [], width
        for stage in range(4):
            outputs = width << stage
            blocks += [BasicBlock(inputs, outputs, 1 if stage == 0 else 2), BasicBlock(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


class InvertedResidual(nn.Module):
    """Sandler et al., 2018 (MobileNetV2): expand, depthwise, project, with ReLU6."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.Hardswish())
        self.block = InvertedResidual(4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class TokenClassifier(nn.Module):
    """Two of torch's own encoder layers over secret tokens."""

    def __init__(self, activation: str = "relu", norm_first: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.positions = nn.Parameter(torch.randn(6, 16) * 0.1)
        layer = nn.TransformerEncoderLayer(
            16, 2, 32, activation=activation, norm_first=norm_first, batch_first=True, dropout=0.1
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.positions).mean(1))


class CausalAttention(nn.Module):
    """A head of a language model written by hand, its mask in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.register_buffer("mask", torch.ones(5, 5).triu(1).bool())

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, -1)
        scores = query @ key.transpose(1, 2) / 8**0.5
        return scores.masked_fill(self.mask, float("-inf")).softmax(-1) @ value


class SequenceClassifier(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: bool) -> None:
        super().__init__()
        self.recurrent = kind(4, 6, batch_first=True, **options)
        self.head = nn.Linear(12 if options.get("bidirectional") else 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class LogisticRegression(nn.Module):
    """The 13 columns of the heart-disease tables."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(13, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(x)).squeeze(1)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10), nn.LogSoftmax(1)
    )


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 20),
        nn.ReLU(),
        nn.Linear(20, 10),
    )


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for wide in (4, 8):
        for _ in range(2):
            layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU()]
            channels = wide
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10)
    )


@dataclass(frozen=True)
class Example:
    """A model, the shape of its items, and the stated error of its output as an exponent of two."""

    factory: Callable[[], nn.Module]
    shape: tuple[int, ...]
    bound: int
    tokens: bool = False


MODELS = {
    "MLP": Example(mlp, (1, 6, 6), -10),
    "LeNet": Example(lenet, (1, 28, 28), -10),
    "VGG": Example(vgg, (3, 8, 8), -10),
    "ResNet-18": Example(lambda: ResNet18(width=4), (3, 8, 8), -9),
    "MobileNetV2": Example(MobileNet, (3, 8, 8), -9),
    "transformer": Example(TokenClassifier, (6,), -9, tokens=True),
    "transformer (GELU, norm first)": Example(lambda: TokenClassifier("gelu", True), (6,), -9, tokens=True),
    "causal attention": Example(CausalAttention, (5, 8), -10),
    "logistic regression": Example(LogisticRegression, (13,), -11),
    "LSTM": Example(lambda: SequenceClassifier(nn.LSTM), (4, 4), -10),
    "LSTM (bidirectional)": Example(lambda: SequenceClassifier(nn.LSTM, bidirectional=True), (3, 4), -10),
    "GRU": Example(lambda: SequenceClassifier(nn.GRU), (3, 4), -10),
}


def settled(example: Example) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """The model with statistics in its norms, in evaluation mode, and a source of batches."""
    torch.manual_seed(3)
    model = example.factory()
    generator = torch.Generator().manual_seed(4)

    def batch(count: int) -> Tensor:
        if example.tokens:
            return torch.randint(30, (count, *example.shape), generator=generator)
        return torch.randn(count, *example.shape, generator=generator)

    for _ in range(5):
        model(batch(16))
    return model.eval(), batch


@pytest.mark.parametrize("name", MODELS)
def test_a_model_runs_as_it_is_defined(name: str) -> None:
    model, batch = settled(MODELS[name])
    private = Cluster(prg()).encrypt(model, batch(2))
    for count in (2, 3):
        x = batch(count)
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(private(x), expected, atol=2.0 ** MODELS[name].bound, rtol=0)
        assert private.counted() == private.cost(x.shape)
    audit = private.audit(x)
    assert audit.within
    assert audit.error <= 2.0 ** MODELS[name].bound


@pytest.mark.slow
def test_resnet18_at_its_full_width() -> None:
    model, batch = settled(Example(ResNet18, (3, 32, 32), -8))
    private = Cluster(prg()).encrypt(model, batch(1))
    x = batch(1)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(private(x), expected, atol=2**-7, rtol=0)
    assert private.counted() == private.cost()
