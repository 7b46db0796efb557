"""What differential privacy costs in accuracy: MNIST, split evenly over clients.

    export TACIT_DATA=/path/to/data
    python examples/private_training.py client --clients 1000 --rate 0.1 --rounds 30 --clip 0.5 --epsilon 8
    python examples/private_training.py distributed --rounds 20 --clip 0.4 --lr 0.2 --epochs 3 --epsilon 8
    python examples/private_training.py record --clients 10 --batch 256 --lr 2 --rounds 8 --epsilon 4

``client`` hides whole clients: each takes part in a round with probability ``--rate``, the server clips and adds noise.
``distributed`` hides whole clients from the server too: all of them take part in a masked secure sum, and each adds its
share of the noise before it masks. ``record`` hides single images: all clients take part, each trains with DP-SGD. The
noise is the least that keeps ε at δ = 10⁻⁵ within ``--epsilon`` over all rounds. Without ``--epsilon`` the same
training runs without noise, ``distributed`` also without clipping.

``client`` and ``record`` train McMahan's 2NN. ``distributed`` trains a network of 8,842 parameters: the norm of the
noise in a mean grows with the root of their number, and that of the mean does not.
"""

import argparse
import os
import time

import torch
from torch import nn

from tacit import CentralDP, DistributedDP, RecordDP, SumSettings
from tacit.data.mnist import load_mnist
from tacit.data.partition import iid
from tacit.federated.fedavg import FedAvg
from tacit.federated.fedopt import fed_avg_m
from tacit.federated.models import two_nn
from tacit.federated.selection import Poisson, Uniform
from tacit.runtimes.simulation import federate

DELTA = 1e-5
STAY = 0.95
"""The part of the clients that must stay to the end of a secure sum; noise is provisioned for them."""


def small_cnn() -> nn.Sequential:
    """Images at half their size, one convolution, one linear layer."""
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(1, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 5 * 5, 10),
    )


def settings(args: argparse.Namespace) -> dict[str, object]:
    """What differs between the levels."""
    averaging = FedAvg(lr=args.lr, batch_size=args.batch, epochs=args.epochs)
    if args.level != "distributed":
        kind = CentralDP if args.level == "client" else RecordDP
        noise = {"target_epsilon": args.epsilon} if args.epsilon else {"noise_multiplier": 0.0}
        return {
            "model": two_nn(),
            "algorithm": averaging,
            "selection": Poisson(args.rate if args.level == "client" else 1.0),
            "privacy": kind(clip=args.clip, delta=DELTA, **noise),
        }
    private = DistributedDP(clip=args.clip, delta=DELTA, target_epsilon=args.epsilon) if args.epsilon else None
    # Clipped updates are all of one length, whatever the clients' rate: the server's decides on how far a round goes.
    server_lr = 2.0 if private else 1.0
    return {
        "model": small_cnn(),
        "algorithm": fed_avg_m(averaging, server_lr=server_lr, momentum=0.8),
        "selection": Uniform(args.clients),
        "secure_sum": SumSettings("masked", minimum=int(STAY * args.clients)),
        "privacy": private,
    }


def main() -> None:
    """Train, printing ε and accuracy as they grow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("level", choices=["client", "distributed", "record"])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0.1, help="of participation in a round (client level)")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--epsilon", type=float, default=None)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()

    data = load_mnist(os.environ["TACIT_DATA"])
    parts = iid(data.train.targets, args.clients, generator=torch.Generator().manual_seed(0))
    started = time.process_time()
    run = federate(
        clients=[data.train.subset(part) for part in parts],
        rounds=args.rounds,
        test=data.test,
        evaluate_every=max(1, args.rounds // 6),
        on_round=lambda record: (
            record.accuracy is not None
            and print(
                f"round {record.round:4}  ε {record.epsilon or 0:7.3f}  accuracy {record.accuracy:.2%}", flush=True
            )
        ),
        **settings(args),
    )
    print(f"{run.privacy_spent}; {time.process_time() - started:.0f} s of CPU time")


if __name__ == "__main__":
    main()
