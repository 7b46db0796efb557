"""A CNN trained on digits that lie at two workers, batch by batch.

TACIT_DATA=/path/to/data python examples/pysyft/federated_cnn.py --images 10000
"""

import argparse

import torch
from digits import load
from torch import Tensor, nn, optim
from torch.nn import functional

import tacit.syft as sy


class Net(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 5), nn.Conv2d(8, 16, 5)
        self.fc1, self.fc2 = nn.Linear(256, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, 1, 28, 28)`` to log-probabilities ``(n, 10)``."""
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        return functional.log_softmax(self.fc2(functional.relu(self.fc1(x.view(-1, 256)))), dim=1)


def main() -> None:
    """Train where the digits are; test here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1400)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hook = sy.TorchHook(torch)
    bob, alice = (sy.VirtualWorker(hook, id=name) for name in ("bob", "alice"))
    train, test = load(args.images, 300)
    loader = sy.FederatedDataLoader(train.federate((bob, alice)), batch_size=32, shuffle=True)

    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(args.epochs):
        for data, target in loader:
            model.send(data.location)
            optimizer.zero_grad()
            loss = functional.nll_loss(model(data), target)
            loss.backward()
            optimizer.step()
            model.get()
        print(f"epoch {epoch + 1}: {len(loader)} batches, the last at {data.location.id}, loss {loss.get().item():.3f}")
    inputs, labels = test.tensors
    print(f"accuracy on the test images {(model(inputs).argmax(1) == labels).float().mean().item():.1%}")
    hook.unhook()


if __name__ == "__main__":
    main()
