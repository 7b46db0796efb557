"""Two owners train apart; a worker whom both trust averages, and we see the average alone.

python examples/pysyft/trusted_aggregator.py --rounds 10
"""

import argparse

import torch
from torch import nn, optim

import tacit.syft as sy


def main() -> None:
    """Average the owners' models at the aggregator, round by round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="that each owner takes in a round")
    args = parser.parse_args()

    torch.manual_seed(0)
    hook = sy.TorchHook(torch)
    bob, alice, aggregator = (sy.VirtualWorker(hook, id=name) for name in ("bob", "alice", "aggregator"))
    inputs = torch.randn(40, 3)  # noqa: TID251
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.25
    owners = [(inputs[i::2].send(at), targets[i::2].send(at)) for i, at in enumerate((bob, alice))]
    model = nn.Linear(3, 1)

    for turn in range(args.rounds):
        trained = []
        for data, wanted in owners:
            own = model.copy().send(data.location)
            opt = optim.SGD(own.parameters(), lr=0.1)
            for _ in range(args.steps):
                opt.zero_grad()
                ((own(data) - wanted) ** 2).mean().backward()
                opt.step()
            trained.append(own.move(aggregator))
        with torch.no_grad():
            for ours, *theirs in zip(model.parameters(), *(one.parameters() for one in trained), strict=True):
                ours.set_((sum(one.data for one in theirs) / len(theirs)).get())
        if turn + 1 == args.rounds:
            print(f"loss after {args.rounds} rounds {((model(inputs) - targets) ** 2).mean().item():.5f}")
    print(f"bob holds {len(bob._objects)} objects, his data; alice {len(alice._objects)}, hers")
    hook.unhook()


if __name__ == "__main__":
    main()
