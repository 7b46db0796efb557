"""Numbers that nobody holds: sharing, arithmetic, comparison.

python examples/pysyft/encrypted_programs.py
"""

import torch

import tacit.syft as sy


def main() -> None:
    """Compute on shares, and look at what the workers see."""
    hook = sy.TorchHook(torch)
    alice, bob, bill, james = (sy.VirtualWorker(hook, id=name) for name in ("alice", "bob", "bill", "james"))

    secret = torch.tensor([25]).share(alice, bob, bill)
    shares = [next(iter(worker._objects.values())) for worker in (alice, bob, bill)]
    print(f"a share each, which alone is noise; their sum is {sum(shares).item()}")
    print(f"three workers add: 25 + 25 - 7 = {(secret + secret - 7).get().item()}")

    x, y = (torch.tensor([value]).share(alice, bob, crypto_provider=james) for value in (25, 5))
    results = {"x * y": x * y, "x > y": x > y, "x <= y": x <= y, "x == y + 20": x == y + 20}
    print(", ".join(f"{name} = {result.get().item()}" for name, result in results.items()))
    values, where = torch.tensor([[2, 3], [4, 1]]).share(alice, bob, crypto_provider=james).max(dim=0)
    print(f"the largest of each column {values.get().tolist()}, in rows {where.get().tolist()}")

    prices = torch.tensor([0.1, 0.25]).fix_precision(precision_fractional=2).share(alice, bob, crypto_provider=james)
    print(f"fixed precision: {(prices * 3).get().float_precision().tolist()}")
    hook.unhook()


if __name__ == "__main__":
    main()
