"""Plans: computations that are traced once, and run at a worker as one call.

python examples/pyplans.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

import tacit.syft as sy


class Net(sy.Plan):
    """A network that is sent with its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2, 3), nn.Linear(3, 2)
        self.add_to_state("fc1", "fc2")

    def forward(self, x: Tensor) -> Tensor:
        """``(2,)`` to log-probabilities ``(2,)``."""
        return functional.log_softmax(self.fc2(functional.relu(self.fc1(x))), dim=0)


def main() -> None:
    """Build, send, run, switch workers, and chain plans into a protocol."""
    torch.manual_seed(0)
    hook = sy.TorchHook(torch)
    phones = [
        sy.VirtualWorker(hook, id=name, data=(torch.tensor([-1.0, 2.0]).tag("#steps"),))
        for name in ("phone1", "phone2")
    ]

    @sy.func2plan(args_shape=[(-1,)], state={"bias": torch.tensor([1.0])})
    def shifted(x: Tensor, state: sy.State) -> Tensor:
        return x.abs() + state.read("bias")

    print(f"built {shifted.is_built}:\n{shifted.code}")
    [steps] = phones[0].search("#steps")
    shifted.send(phones[0])
    print(f"at {phones[0].id}: {shifted(steps).get().tolist()}")

    net = Net()
    net.build(torch.zeros(2))
    for phone in phones:
        net.send(phone)
        [steps] = phone.search("#steps")
        print(f"{net.name} at {phone.id}: {[round(value, 3) for value in net(steps).get().tolist()]}")
        net.get()

    twice = sy.Protocol([("first", shifted), ("second", shifted)]).deploy(*phones)
    print(f"through both phones: {twice.run(torch.tensor([3.0])).get().tolist()}")
    hook.unhook()


if __name__ == "__main__":
    main()
