"""A trained model, encrypted, classifies encrypted digits and counts its hits on shares.

TACIT_DATA=/path/to/data python examples/pysyft/secure_classification.py --train 20000 --batches 20
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
    """Train in the clear, then share model, images and labels; only the number of hits is opened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=1400)
    parser.add_argument("--batches", type=int, default=4, help="of 50 test images")
    parser.add_argument("--hidden", type=int, default=500)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hook = sy.TorchHook(torch)
    alice, bob, james = (sy.VirtualWorker(hook, id=name) for name in ("alice", "bob", "james"))
    train, test = load(args.train, 50 * args.batches)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, args.hidden), nn.ReLU(), nn.Linear(args.hidden, 10))
    optimizer = optim.Adam(model.parameters(), lr=0.001)
    for _ in range(3):
        for data, target in DataLoader(train, 64, shuffle=True):
            optimizer.zero_grad()
            functional.cross_entropy(model(data), target).backward()
            optimizer.step()
    clear = (model(test.tensors[0]).argmax(1) == test.tensors[1]).sum().item()

    private = [
        [value.fix_precision().share(alice, bob, crypto_provider=james) for value in pair]
        for pair in DataLoader(test, 50)
    ]
    model.fix_precision().share(alice, bob, crypto_provider=james)
    hits, spent = 0, []
    for data, target in private:
        start = time.perf_counter()
        hits += model(data).argmax(dim=1).eq(target).sum()
        spent.append(time.perf_counter() - start)
    found = hits.get().float_precision().long().item()
    print(f"hits on shares {found}, in the clear {clear}, of {len(test)}")
    print(f"{min(spent) / 50 * 1e3:.2f} ms an image, both parties and the dealing in one process")
    hook.unhook()


if __name__ == "__main__":
    main()
