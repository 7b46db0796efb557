"""FedAvg, FedProx and SCAFFOLD where clients are unlike: MNIST split so that most clients see two digits only.

    TACIT_DATA=/path/to/data python examples/heterogeneity.py --net softmax --epochs 5

20 clients of 300 images, a fifth of them a round, every method with the learning rate of the grid that reaches the
highest accuracy over its last ten rounds, mean over seeds. Printed for each method: that accuracy, the worst of those
rounds, and the round in which the mean over seeds first reaches the target.
"""

import argparse
import statistics
from collections.abc import Iterator
from itertools import product

import torch
from torch import nn

import tacit
from tacit.data.mnist import load_mnist
from tacit.data.partition import shards
from tacit.errors import TrainingError
from tacit.federated.algorithm import Algorithm
from tacit.federated.fedprox import FedProx
from tacit.federated.models import two_nn
from tacit.federated.scaffold import Scaffold

CLIENTS, EXAMPLES, COHORT, LAST = 20, 300, 4, 10


def softmax_regression() -> nn.Sequential:
    """784–10; 7,850 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


NETS = {"2nn": two_nn, "softmax": softmax_regression}


def methods(rates: list[float], epochs: int, batch: int) -> Iterator[tuple[str, float, Algorithm]]:
    """Each method's name, learning rate and settings."""
    for rate in rates:
        yield "FedAvg", rate, tacit.FedAvg(rate, batch, epochs)
        for mu in (0.1, 1.0):
            yield f"FedProx μ = {mu}", rate, FedProx(rate, batch, epochs, mu=mu)
        yield "SCAFFOLD", rate, Scaffold(rate, batch, epochs)


def main() -> None:
    """Run every method and print what is best of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, default="softmax")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--rate", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2])
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=0.8)
    args = parser.parse_args()

    torch.set_num_threads(1)
    data = load_mnist()
    curves: dict[tuple[str, float], list[list[float]]] = {}
    for seed, (name, rate, algorithm) in product(args.seed, methods(args.rate, args.epochs, args.batch)):
        generator = torch.Generator().manual_seed(seed)
        some = data.train.subset(torch.randperm(len(data.train), generator=generator)[: CLIENTS * EXAMPLES])  # noqa: TID251
        clients = [some.subset(part) for part in shards(some.targets, CLIENTS, generator)]
        accuracies = [0.0] * args.rounds
        try:
            run = tacit.federate(
                NETS[args.net](),
                clients,
                algorithm=algorithm,
                rounds=args.rounds,
                cohort=COHORT,
                seed=seed,
                test=data.test,
            )
            accuracies = [record.accuracy or 0.0 for record in run.history]
        except TrainingError:
            print(f"{name} at {rate} diverged")
        curves.setdefault((name, rate), []).append(accuracies)
        print(f"{name:16} rate {rate:<5} seed {seed}  {statistics.fmean(accuracies[-LAST:]):.3f}", flush=True)

    print(f"\n{args.net}, E = {args.epochs}, B = {args.batch}, {args.rounds} rounds, {len(args.seed)} seeds")
    print(f"| method | rate | last {LAST} rounds | worst of them | rounds to {args.target:.0%} |")
    print("|---|---|---|---|---|")
    for name in dict.fromkeys(name for name, _ in curves):
        rate = max((r for n, r in curves if n == name), key=lambda r, n=name: final(curves[n, r]))
        mean = [statistics.fmean(at) for at in zip(*curves[name, rate], strict=True)]
        reached = next((number for number, accuracy in enumerate(mean, 1) if accuracy >= args.target), None)
        worst = min(min(curve[-LAST:]) for curve in curves[name, rate])
        print(f"| {name} | {rate} | {final(curves[name, rate]):.1%} | {worst:.1%} | {reached or '—'} |")


def final(curves: list[list[float]]) -> float:
    """Mean accuracy of the last rounds over all seeds."""
    return statistics.fmean(accuracy for curve in curves for accuracy in curve[-LAST:])


if __name__ == "__main__":
    main()
