"""What every federated peer trains and counts. It stands alone, in environments that hold a peer and no tacit.

McMahan's 2NN or CNN, noise of MNIST's shape, clients of 60 examples, one epoch of SGD.
"""

import json
import os
import sys
import time
import uuid
from functools import cache

import torch
from torch import Tensor, nn

EXAMPLES_PER_CLIENT = 60
LR = 0.05
MARK = "TACIT_PEER_RUN"
"""The environment variable that every process of a run inherits, so that its CPU time can be counted."""


def arguments() -> tuple[str, int, int, int, int]:
    """MODEL CLIENTS COHORT BATCH_SIZE ROUNDS from the command line."""
    if len(sys.argv) != 6 or sys.argv[1] not in ("2nn", "cnn"):
        sys.exit(f"usage: {sys.argv[0]} 2nn|cnn CLIENTS COHORT BATCH_SIZE ROUNDS")
    clients, cohort, batch_size, rounds = map(int, sys.argv[2:])
    return sys.argv[1], clients, cohort, batch_size, rounds


def build(model: str) -> nn.Sequential:
    """The network."""
    if model == "2nn":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
        )
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


@cache
def data(clients: int) -> tuple[Tensor, Tensor]:
    """Everyone's images and labels, made once in every process that needs them."""
    generator = torch.Generator().manual_seed(0)
    count = clients * EXAMPLES_PER_CLIENT
    images = torch.empty(count, 1, 28, 28).uniform_(generator=generator)
    return images, torch.empty(count, dtype=torch.int64).random_(10, generator=generator)


def examples_of(client: int, clients: int) -> tuple[Tensor, Tensor]:
    """One client's."""
    inputs, targets = data(clients)
    span = slice(client * EXAMPLES_PER_CLIENT, (client + 1) * EXAMPLES_PER_CLIENT)
    return inputs[span], targets[span]


def mark_run() -> None:
    """Make this process, and those that it will start, recognisable."""
    os.environ[MARK] = uuid.uuid4().hex


def cpu_seconds() -> float:
    """CPU seconds so far of all processes that carry this one's mark; of those that ended, by who waited for them."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    ticks = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as environment:
                # A process's own environment is read as it was when it started.
                ours = int(pid) == os.getpid() or mark in environment.read().split(b"\0")
            if ours:
                with open(f"/proc/{pid}/stat") as stat:
                    ticks += sum(map(int, stat.read().rsplit(")", 1)[1].split()[11:15]))
        except OSError:
            continue  # it has just ended, or is someone else's
    return ticks / os.sysconf("SC_CLK_TCK")


class Clock:
    """CPU and wall-clock time from one tick to the next."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self._cpu, self._wall = cpu_seconds(), self.began
        self.laps: list[tuple[float, float]] = []

    def tick(self) -> None:
        """A round has ended."""
        cpu, wall = cpu_seconds(), time.perf_counter()
        self.laps.append((cpu - self._cpu, wall - self._wall))
        self._cpu, self._wall = cpu, wall


def report(peer: str, clock: Clock, **figures: object) -> None:
    """Print the figures as one line of JSON; the first round, which warms up, is the start-up."""
    rounds = clock.laps[1:]
    row = {
        "peer": peer,
        "cpu_s_per_round": sum(cpu for cpu, _ in rounds) / len(rounds),
        "wall_s_per_round": sum(wall for _, wall in rounds) / len(rounds),
        "startup_s": clock.laps[0][1],
    }
    print(json.dumps(row | figures), flush=True)
