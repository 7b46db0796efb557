"""Tensors that are elsewhere: send, compute there, differentiate there, take back.

python examples/pysyft/basic_tools.py
"""

import torch

import tacit.syft as sy


def main() -> None:
    """Walk through what a pointer does."""
    hook = sy.TorchHook(torch)
    bob, alice = (sy.VirtualWorker(hook, id=name) for name in ("bob", "alice"))

    heights = torch.tensor([1.62, 1.80, 1.75]).tag("#heights").describe("in metres").send(bob)
    print(f"we hold    {heights}")
    print(f"bob holds  {list(bob._objects.values())}")
    print(f"average    {heights.mean().get():.3f}, computed at bob")

    weights = torch.tensor([1.0, 2.0], requires_grad=True).send(bob)
    ((weights * 3) ** 2).sum().backward()
    print(f"gradient   {weights.get().grad.tolist()}")

    [found] = bob.search("#heights")
    at_alice = found.move(alice)
    print(f"moved      bob holds {len(bob._objects)}, alice holds {len(alice._objects)}")
    far = at_alice.send(bob)
    print(f"a pointer to a pointer gives {(far * 100).get().get().tolist()}")

    salaries = torch.tensor([3100.0, 2800.0]).private_tensor(allowed_users=["auditor"]).send(bob)
    try:
        salaries.sum().get()
    except sy.GetNotPermittedError as error:
        print(f"refused    {str(error).split(':')[0]}")
    print(f"allowed    {salaries.sum().get(user='auditor'):.0f}")
    hook.unhook()


if __name__ == "__main__":
    main()
