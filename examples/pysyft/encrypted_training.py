"""Gradient descent written out on shares: model, data, targets and learning rate are all secret.

python examples/pysyft/encrypted_training.py --steps 20
"""

import argparse

import torch

import tacit.syft as sy


def main() -> None:
    """Fit a line without seeing a number of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    hook = sy.TorchHook(torch)
    alice, bob, james = (sy.VirtualWorker(hook, id=name) for name in ("alice", "bob", "james"))
    inputs = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])

    def hidden(values: torch.Tensor) -> torch.Tensor:
        return values.fix_precision(precision_fractional=4).share(alice, bob, crypto_provider=james)

    data, target, model, rate = map(hidden, (inputs, inputs[:, :1], torch.zeros(2, 1), torch.tensor([0.1])))
    for step in range(args.steps):
        error = data.matmul(model) - target
        model = model - data.t().matmul(error) * rate
        if step in (0, args.steps - 1):
            print(f"step {step + 1:3}: absolute error {error.get().abs().sum().float_prec().item():.3f}")
    print(f"model {model.get().float_precision().flatten().tolist()}")
    hook.unhook()


if __name__ == "__main__":
    main()
