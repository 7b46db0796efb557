"""Train a network on shares: alice and bob never see an image, a label, a weight or a gradient.

    python examples/encrypted_training.py --steps 200
    TACIT_DATA=/path/to/data python examples/encrypted_training.py --net lenet --steps 469 --processes

Takes MNIST from the folder that TACIT_DATA names, else scikit-learn's digits. The same steps are taken in plaintext, on
the same batches from the same initial weights, and both accuracies are printed. With --processes, alice, bob and the
provider are processes of their own on this machine, and a step's time is what its client waits for. Otherwise all three
run in this process, and the time is given a party: half of what the two take together. Each step's randomness is dealt
just before it and timed apart.
"""

import argparse
import copy
import os
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tacit
from tacit.data.digits import load_digits
from tacit.data.examples import Examples
from tacit.data.mnist import load_mnist
from tacit.federated.models import lenet, two_nn
from tacit.party.launch import LocalProcesses
from tacit.party.trainer import ProcessTrainer
from tacit.program.optimizers import Sgd
from tacit.program.training import SharedLoss

NETS = {"2nn": two_nn, "lenet": lenet}


def main() -> None:
    """Train both ways and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, default="2nn")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--processes", action="store_true", help="run the parties in processes of their own")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = os.environ.get("TACIT_DATA")
    data = load_mnist(folder) if folder else load_digits()
    model = NETS[args.net]()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=args.lr, momentum=args.momentum)
    spent = {"plaintext": 0.0, "dealing": 0.0, "shares": 0.0}

    sgd, side_by_side = Sgd(args.lr, args.momentum), 1 if args.processes else 2
    with LocalProcesses() if args.processes else tacit.cluster() as parties:
        if isinstance(parties, LocalProcesses):
            trainer = ProcessTrainer(parties, model, cross_entropy, sgd)
        else:
            trainer = parties.trainer(model, cross_entropy, optimizer=sgd)
        for step, rows in enumerate(batches(len(data.train), args.batch, args.steps), 1):
            images, labels = data.train.inputs[rows], data.train.targets[rows]
            start = time.perf_counter()
            plain_loss = plaintext_step(plain, optimizer, images, labels)
            stepped = time.perf_counter()
            trainer.deal(tuple(images.shape))
            dealt = time.perf_counter()
            outcome = trainer.step(images, labels)
            done = time.perf_counter()
            if step > 1:  # the first step compiles and plans
                for name, seconds in zip(
                    spent, (stepped - start, dealt - stepped, (done - dealt) / side_by_side), strict=True
                ):
                    spent[name] += seconds / max(1, args.steps - 1)
            if step % 20 == 0 or step == args.steps:
                loss = outcome.reveal() if isinstance(outcome, SharedLoss) else trainer.loss()
                print(f"step {step:4}   loss on shares {loss:.4f}   in plaintext {plain_loss:.4f}")
        cost = trainer.cost(tuple(images.shape))
        encrypted = trainer.reveal()

    print(f"\n{data.name}, {args.net}, {args.steps} steps of {args.batch} images")
    on_shares, in_plaintext = accuracy(encrypted, data.test), accuracy(plain, data.test)
    print(f"accuracy  trained on shares {on_shares:.2%}, in plaintext {in_plaintext:.2%}")
    difference = max((a - b).abs().max() for a, b in zip(encrypted.parameters(), plain.parameters(), strict=True))
    print(f"weights   differ by at most {difference:.1e}")
    if args.steps > 1:
        ratio = spent["shares"] / spent["plaintext"]
        print("a step    " + ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in spent.items()), end="")
        print(f": {ratio:.1f} × plaintext online")
    megabytes = f"{cost.bytes_online / 1e6:.1f} MB online a party, {cost.bytes_dealt / 1e6:.1f} MB dealt"
    print(f"          {cost.rounds} rounds, {megabytes}")


def batches(examples: int, size: int, steps: int) -> list[Tensor]:
    """The rows of each batch, in a new order for every pass over the examples; which ones they are is no secret."""
    order = [torch.randperm(examples).split(size) for _ in range(steps * size // examples + 2)]  # noqa: TID251
    return [rows for one_pass in order for rows in one_pass if len(rows) == size][:steps]


def plaintext_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """One step of the plaintext training, and the loss before it."""
    optimizer.zero_grad()
    loss = cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def accuracy(model: nn.Module, examples: Examples) -> float:
    """The fraction of examples that the model classifies rightly."""
    with torch.no_grad():
        return (model(examples.inputs).argmax(1) == examples.targets).float().mean().item()


if __name__ == "__main__":
    main()
