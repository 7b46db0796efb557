"""Where the clients of a round train: the interface, and the one that uses this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from tacit.data.examples import Examples
from tacit.errors import TacitError
from tacit.federated.algorithm import Algorithm, Memory, ServerState, Update
from tacit.federated.generators import generator_for
from tacit.federated.local.work import LocalSolver


@dataclass(frozen=True)
class Job:
    """One client's part in a round, and what it remembers from earlier ones."""

    client: int
    memory: Memory


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Args:
        client: its index.
        update: what it sends; ``None`` if it has nothing to send.
        memory: what it remembers now.
        reason: why there is no update; empty if there is one.
    """

    client: int
    update: Update | None
    memory: Memory
    reason: str = ""


class Executor(Protocol):
    """Trains clients; holds their examples and a solver."""

    def run(self, algorithm: Algorithm, state: ServerState, jobs: Sequence[Job], seed: int) -> Iterator[Outcome]:
        """The outcomes in the order of the jobs, each made when it is asked for or not long before."""
        ...

    def close(self) -> None:
        """Give back what is held (processes, memory); the executor is of no use afterwards."""
        ...


class InProcess:
    """Trains one client after another here, on one thread."""

    def __init__(self, solver: LocalSolver, clients: Sequence[Examples]) -> None:
        self._solver = solver
        self._clients = clients

    def run(self, algorithm: Algorithm, state: ServerState, jobs: Sequence[Job], seed: int) -> Iterator[Outcome]:
        """See `Executor`."""
        for job in jobs:
            with one_thread():
                outcome = train_client(algorithm, state, job, self._solver, self._clients[job.client], seed)
            yield outcome

    def close(self) -> None:
        """Nothing to give back."""


def train_client(
    algorithm: Algorithm, state: ServerState, job: Job, solver: LocalSolver, examples: Examples, seed: int
) -> Outcome:
    """Do one job; a client that cannot train, or whose training diverged, keeps the memory that it had."""
    generator = generator_for(seed, "round", state.round + 1, "client", job.client)
    try:
        update, memory = algorithm.client_update(state, job.memory, solver, examples, generator)
    except TacitError:
        raise
    except ValueError as error:  # such as batch normalisation's, of a last batch of one example
        return Outcome(job.client, None, job.memory, f"could not train: {error}")
    if not update.is_finite():
        return Outcome(job.client, None, job.memory, "diverged: its update is not finite")
    return Outcome(job.client, update, memory)


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute with one thread; small batches take longer with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
