"""ResNet-18 and an image, each encrypted where it lives, meet on shares.

python examples/pysyft/resnet18.py --size 224 --batch 2
"""

import argparse
import time

import torch
from torch import Tensor, nn

import tacit.syft as sy
from tacit.bench.nets import BasicBlock


def resnet18(classes: int) -> nn.Module:
    """He et al. 2016, with the stem for large images; 11.2 million parameters.

    ReLU comes after the pooling: the result is the same, and it compares a quarter as much.
    """
    stem = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, padding=1), nn.ReLU()]
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [block for i, o, stride in stages for block in (BasicBlock(i, o, stride), BasicBlock(o, o, 1))]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def calibrated(model: nn.Module, images: Tensor) -> nn.Module:
    """The model in evaluation mode, its norms set to the statistics of some images."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
    with torch.no_grad():
        model(images)
    return model.eval()


def main() -> None:
    """Encrypt both at their owners, classify, and compare with plaintext."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="rows and columns of an image")
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hook = sy.TorchHook(torch)
    data_owner, model_owner, james = (
        sy.VirtualWorker(hook, id=name) for name in ("data_owner", "model_owner", "james")
    )
    images = torch.randn(args.batch, 3, args.size, args.size)  # noqa: TID251
    model = calibrated(resnet18(2), torch.randn(16, 3, 64, 64))  # noqa: TID251
    with torch.no_grad():
        expected = model(images)

    settings = {"workers": (data_owner, model_owner), "crypto_provider": james, "protocol": "fss"}
    data = images.send(data_owner).encrypt(precision_fractional=4, **settings).get()
    private = model.send(model_owner).encrypt(**settings).get()
    start = time.perf_counter()
    prediction = private(data)
    labels = prediction.argmax(dim=1)
    spent = time.perf_counter() - start
    print(f"labels on shares {labels.decrypt().long().tolist()}, in the clear {expected.argmax(1).tolist()}")
    print(f"logits differ by at most {(prediction.decrypt() - expected).abs().max().item():.4f}")
    print(f"{spent:.1f} s for {args.batch} images of {args.size} × {args.size}, everything in one process")
    hook.unhook()


if __name__ == "__main__":
    main()
