"""What differential privacy costs in accuracy: McMahan's 2NN on MNIST, split evenly over clients.

    export TACIT_DATA=/path/to/data
    python examples/private_training.py client --clients 1000 --rate 0.1 --rounds 30 --clip 0.5 --epsilon 8
    python examples/private_training.py record --clients 10 --batch 256 --lr 2 --rounds 8 --epsilon 4

``client`` hides whole clients: each takes part in a round with probability ``--rate``, the server clips and adds noise.
``record`` hides single images: all clients take part, each trains with DP-SGD. The noise is the least that keeps ε at
δ = 10⁻⁵ within ``--epsilon`` over all rounds; without ``--epsilon`` the same training runs clipped but without noise.
"""

import argparse
import os
import time

import torch

from tacit.data.mnist import load_mnist
from tacit.data.partition import iid
from tacit.federated.fedavg import FedAvg
from tacit.federated.models import two_nn
from tacit.federated.privacy import CentralDP, RecordDP
from tacit.federated.selection import Poisson
from tacit.runtimes.simulation import federate

DELTA = 1e-5


def main() -> None:
    """Train, printing ε and accuracy as they grow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("level", choices=["client", "record"])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0.1, help="of participation in a round (client level)")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--epsilon", type=float, default=None)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=10)
    args = parser.parse_args()

    data = load_mnist(os.environ["TACIT_DATA"])
    parts = iid(data.train.targets, args.clients, generator=torch.Generator().manual_seed(0))
    clients = [data.train.subset(part) for part in parts]
    noise = {"target_epsilon": args.epsilon} if args.epsilon else {"noise_multiplier": 0.0}
    kind = CentralDP if args.level == "client" else RecordDP
    started = time.process_time()
    run = federate(
        two_nn(),
        clients,
        algorithm=FedAvg(lr=args.lr, batch_size=args.batch),
        rounds=args.rounds,
        selection=Poisson(args.rate if args.level == "client" else 1.0),
        privacy=kind(clip=args.clip, delta=DELTA, **noise),
        test=data.test,
        evaluate_every=max(1, args.rounds // 6),
        on_round=lambda record: (
            record.accuracy is not None
            and print(f"round {record.round:4}  ε {record.epsilon:7.3f}  accuracy {record.accuracy:.2%}", flush=True)
        ),
    )
    print(f"{run.privacy_spent}; {time.process_time() - started:.0f} s of CPU time")


if __name__ == "__main__":
    main()
