"""A model that travels to the data, with SGD and with an Adam for each worker.

python examples/pysyft/federated_toy.py --rounds 60
"""

import argparse

import torch
from torch import nn, optim

import tacit.syft as sy
from tacit.syft.federated.floptimizer import Optims


def main() -> None:
    """Learn y = x0 from two workers, each of whom has half of the examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()

    torch.manual_seed(0)
    hook = sy.TorchHook(torch)
    bob, alice = (sy.VirtualWorker(hook, id=name) for name in ("bob", "alice"))
    data = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    datasets = [(data[i : i + 2].send(at), data[i : i + 2, :1].send(at)) for i, at in ((0, bob), (2, alice))]

    for name, make in (("SGD", lambda params: optim.SGD(params, lr=0.1)), ("Adam", lambda p: optim.Adam(p, lr=0.1))):
        model = nn.Linear(2, 1)
        optims = Optims(["bob", "alice"], optim=make(model.parameters()))
        for _ in range(args.rounds):
            total = 0.0
            for inputs, targets in datasets:
                model.send(inputs.location)
                opt = optims.get_optim(inputs.location.id)
                opt.zero_grad()
                loss = ((model(inputs) - targets) ** 2).sum()
                loss.backward()
                opt.step()
                model.get()
                total += loss.get().item()
        print(f"{name:4}  loss {total:.4f}  weights {model.weight.detach().flatten().round(decimals=2).tolist()}")
    hook.unhook()


if __name__ == "__main__":
    main()
