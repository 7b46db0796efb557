"""Owners' models averaged on shares: nobody, the aggregators included, sees one owner's weights.

python examples/pysyft/secure_aggregation.py --rounds 20
"""

import argparse

import torch
from torch import nn, optim
from torch.nn import functional

import tacit.syft as sy


def main() -> None:
    """Train at three owners; share their weights among them, and open the sum alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()

    torch.manual_seed(0)
    hook = sy.TorchHook(torch)
    owners = [sy.VirtualWorker(hook, id=name) for name in ("bob", "alice", "carol")]
    inputs = torch.randn(90, 5)  # noqa: TID251
    targets = torch.relu(inputs.sum(1, keepdim=True)) + 1
    data = [(inputs[i::3].send(at), targets[i::3].send(at)) for i, at in enumerate(owners)]
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1))
    print(f"loss before {functional.mse_loss(model(inputs), targets).item():.3f}")

    for _ in range(args.rounds):
        shared = []
        for mine, wanted in data:
            own = model.copy().send(mine.location)
            opt = optim.SGD(own.parameters(), lr=0.05)
            for _ in range(3):
                opt.zero_grad()
                functional.mse_loss(own(mine), wanted).backward()
                opt.step()
            # Each parameter is rounded and shared where it is; what comes back are shares at the three owners.
            shared.append(
                [one.copy().fix_precision(precision_fractional=5).share(*owners).get() for one in own.parameters()]
            )
        with torch.no_grad():
            for ours, *theirs in zip(model.parameters(), *shared, strict=True):
                ours.set_(sum(theirs).get().float_precision() / len(theirs))
    print(f"loss after {args.rounds} rounds {functional.mse_loss(model(inputs), targets).item():.3f}")
    hook.unhook()


if __name__ == "__main__":
    main()
