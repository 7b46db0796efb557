"""The encrypted tutorials of PySyft 0.2 under `tacit.syft`: seconds, beside those that the tutorials print.

    python benchmarks/pysyft.py classification training resnet18 --repeat 5

One line of JSON a task. All of a task's work is in its time, in one process and on one thread: both computing parties,
the crypto provider's dealing and autograd; the first run, which compiles kernels, is not. Inputs are noise: no time
depends on values. tacit_cpu_s is what one core computes, whatever else the machine does. The tutorials' times were
taken by their authors on their machines (OpenMined/PySyft, branch syft_0.2.x, examples/tutorials, parts 11, 12 bis and
11 bis), in one process too.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn, optim

import tacit.syft as sy
from tacit.bench.nets import BasicBlock

Task = Callable[[Callable[[Tensor], Tensor], dict[str, object]], Callable[[], object]]


def classification(hidden: Callable[[Tensor], Tensor], parties: dict[str, object]) -> Callable[[], object]:
    """784–500–10, 50 images: predicted, compared with private labels, counted."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 10)).encrypt(**parties)
    data, target = hidden(torch.randn(50, 1, 28, 28)), hidden(torch.randint(0, 10, (50,)))  # noqa: TID251
    return lambda: model(data).argmax(dim=1).eq(target).sum().get()


def training(hidden: Callable[[Tensor], Tensor], parties: dict[str, object]) -> Callable[[], object]:
    """784–128–64–10, a step of SGD on the squared error of 128 images."""
    layers = [nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
    model = nn.Sequential(nn.Flatten(), *layers).encrypt(requires_grad=True, **parties)
    data, target = hidden(torch.randn(128, 1, 28, 28)), hidden(torch.eye(10).repeat(13, 1)[:128])  # noqa: TID251
    optimizer = optim.SGD(model.parameters(), lr=0.02).fix_precision()

    def step() -> object:
        optimizer.zero_grad()
        loss = ((model(data) - target) ** 2).sum().refresh() / 128
        loss.backward()
        optimizer.step()
        return loss.get()

    return step


def resnet18(hidden: Callable[[Tensor], Tensor], parties: dict[str, object]) -> Callable[[], object]:
    """ResNet-18, two images of 224 × 224, two classes; ReLU after the stem's pooling, as in the tutorial."""
    stem = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, padding=1), nn.ReLU()]
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [block for i, o, stride in stages for block in (BasicBlock(i, o, stride), BasicBlock(o, o, 1))]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 2)).eval()
    private, images = model.encrypt(**parties), hidden(torch.randn(2, 3, 224, 224))  # noqa: TID251
    return lambda: private(images).argmax(dim=1).decrypt()


TASKS: dict[str, tuple[Task, float, int]] = {
    "classification": (classification, 0.033, 50),
    "training": (training, 4.3, 1),
    "resnet18": (resnet18, 313.0, 1),
}
"""How it is set up, the seconds that the tutorial prints, and the items that they are for one of."""


def main() -> None:
    """Time the tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hook = sy.TorchHook(torch)
    alice, bob, james = (sy.VirtualWorker(hook, id=name) for name in ("alice", "bob", "james"))
    parties = {"workers": (alice, bob), "crypto_provider": james}
    for task in args.tasks:
        prepare, theirs, items = TASKS[task]
        run = prepare(lambda value: value.encrypt(**parties), parties)
        run()
        wall, computed = [], []
        for _ in range(args.repeat):
            start, began = time.perf_counter(), time.process_time()
            run()
            wall.append((time.perf_counter() - start) / items)
            computed.append((time.process_time() - began) / items)
        ours = statistics.median(wall)
        row = {
            "task": task,
            "tutorial_s": theirs,
            "tacit_s": ours,
            "tacit_cpu_s": min(computed),
            "ratio": theirs / ours,
        }
        print(json.dumps(row | {"repeat": args.repeat, "machine": platform.machine()}), flush=True)
    hook.unhook()


if __name__ == "__main__":
    main()
