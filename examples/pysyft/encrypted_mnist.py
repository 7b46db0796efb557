"""A network trained on encrypted digits by autograd and `torch.optim`, and tested on encrypted ones.

TACIT_DATA=/path/to/data python examples/pysyft/encrypted_mnist.py --images 640 --epochs 10
"""

import argparse
import time

import torch
from digits import load
from torch import nn, optim
from torch.nn import functional
from torch.utils.data import DataLoader

import tacit.syft as sy


def main() -> None:
    """Train and test on shares; the losses and the number of hits are opened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.05)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hook = sy.TorchHook(torch)
    workers = [sy.VirtualWorker(hook, id=name) for name in ("alice", "bob")]
    james = sy.VirtualWorker(hook, id="james")

    def hidden(value: torch.Tensor) -> torch.Tensor:
        return value.float().fix_precision(precision_fractional=3).share(*workers, crypto_provider=james)

    train, test = load(args.images, 5 * args.batch)
    batches = [
        (hidden(data), hidden(functional.one_hot(target, 10)), hidden(target))
        for data, target in DataLoader(train, args.batch)
    ]
    held_out = [(hidden(data), hidden(target)) for data, target in DataLoader(test, args.batch)]

    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    model = model.fix_precision().share(*workers, crypto_provider=james, requires_grad=True)
    optimizer = optim.SGD(model.parameters(), lr=args.lr).fix_precision()
    for epoch in range(args.epochs):
        start = time.perf_counter()
        for data, target, _ in batches:
            optimizer.zero_grad()
            loss = ((model(data) - target) ** 2).sum().refresh() / args.batch
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            correct = sum(model(data).argmax(dim=1).eq(target).sum() for data, target in held_out)
        print(
            f"epoch {epoch + 1}: loss {loss.get().float_precision().item():.3f}, "
            f"hits {correct.get().float_precision().long().item()} of {len(test)}, "
            f"{(time.perf_counter() - start) / len(batches) * 1e3:.0f} ms a batch"
        )
    hook.unhook()


if __name__ == "__main__":
    main()
