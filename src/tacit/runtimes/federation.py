"""A federated training and how it advances by one round, whatever trains the clients."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from tacit.errors import TrainingError
from tacit.federated.algorithm import Algorithm, Memory, ServerState, Update
from tacit.federated.generators import generator_for
from tacit.federated.history import RoundRecord
from tacit.federated.initial import Initial, initialise
from tacit.federated.selection import Selection
from tacit.runtimes.executors import Executor, Job, Outcome

FAILURES = 3
"""After so many rounds in a row without a usable update, training stops."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that changes from round to round; training restored from it goes on bit by bit the same.

    Args:
        state: of the server.
        memories: of the clients that have any, by client.
        failures: rounds without a usable update, in a row, up to here.
    """

    state: ServerState
    memories: Mapping[int, Memory]
    failures: int = 0


class Federation:
    """Training of one global model over clients, round by round.

    Every random choice depends on ``seed``, the round and the client alone, so equal arguments give bit-equal
    models on the same machine with the same number of torch threads.

    Args:
        model: the architecture; copied. Its initial weights are drawn according to ``initial``.
        executor: trains the clients; the caller closes it.
        sizes: how many examples each client has, int64 of shape ``(N,)``.
        algorithm: how clients train and how the server combines.
        selection: which clients are invited to a round.
        seed: of the initial weights, the selection and the clients' shuffling.
        initial: see `tacit.federated.initial.initialise`.

    Raises:
        InputError: a setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        executor: Executor,
        sizes: Tensor,
        *,
        algorithm: Algorithm,
        selection: Selection,
        seed: int = 0,
        initial: Initial = "he",
    ) -> None:
        self._model = copy.deepcopy(model)
        initialise(self._model, initial, generator_for(seed, "initial"))
        self._executor = executor
        self._sizes = sizes
        self._algorithm = algorithm
        self._selection = selection
        self._seed = seed
        self._snapshot = Snapshot(algorithm.init(self._model, len(sizes)), {})

    @property
    def snapshot(self) -> Snapshot:
        """Where training is."""
        return self._snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from where a federation with the same arguments was."""
        self._snapshot = snapshot

    @property
    def round(self) -> int:
        """How many rounds have been completed."""
        return self._snapshot.state.round

    def model(self) -> nn.Module:
        """A new copy of the global model as it is now."""
        model = copy.deepcopy(self._model)
        self._snapshot.state.load_into(model)
        return model

    def advance(self) -> RoundRecord:
        """Run one communication round; the record is not yet evaluated.

        A client whose training diverged is left out, and so is one that did not finish: the record's ``lost``
        says why. If nobody is left, the round fails: it counts, and the model stays as it was.

        Raises:
            TrainingError: this is the third round in a row that failed.
        """
        started = time.perf_counter()
        state, number = self._snapshot.state, self.round + 1
        invited = self._selection.select(
            number, self._sizes, self._sizes > 0, generator_for(self._seed, "round", number, "cohort")
        )
        jobs = [Job(client, self._snapshot.memories.get(client, {})) for client in invited]
        taken = _Cohort(self._executor.run(self._algorithm, state, jobs, self._seed))
        mean = self._algorithm.combine(taken) if taken else None
        if mean is None:
            self._fail(number, taken.lost)
        else:
            memories = {**self._snapshot.memories, **taken.memories}
            self._snapshot = Snapshot(self._algorithm.server_update(state, mean), memories)
        return RoundRecord(
            round=number,
            cohort=tuple(taken.clients),
            examples=mean.examples if mean else 0,
            loss=None,
            accuracy=None,
            bytes_up=mean.nbytes if mean else 0,
            bytes_down=len(invited) * state.nbytes,
            seconds=time.perf_counter() - started,
            train_loss=mean.loss if mean else None,
            lost=taken.lost,
        )

    def _fail(self, number: int, lost: Mapping[int, str]) -> None:
        failures = self._snapshot.failures + 1
        if failures == FAILURES:
            reasons = "; ".join(f"client {client} {reason}" for client, reason in list(lost.items())[:3])
            raise TrainingError(
                f"{FAILURES} rounds in a row, up to round {number}, had no update that could be used under "
                f"{self._algorithm}: {reasons or 'no client was selected'}. The model is as it was before them. "
                "If clients diverge, lower lr or look for inputs that are not finite or far outside [0, 1]"
            )
        snapshot = self._snapshot
        self._snapshot = replace(snapshot, state=replace(snapshot.state, round=number), failures=failures)


class _Cohort:
    """The updates of a round, one after another, and what became of each client meanwhile."""

    def __init__(self, outcomes: Iterator[Outcome]) -> None:
        self.clients: list[int] = []
        self.lost: dict[int, str] = {}
        self.memories: dict[int, Memory] = {}
        self._updates = self._usable(outcomes)
        self._first = next(self._updates, None)

    def __bool__(self) -> bool:
        """Whether there is an update at all."""
        return self._first is not None

    def __iter__(self) -> Iterator[Update]:
        if self._first is not None:
            yield self._first
            self._first = None
            yield from self._updates

    def _usable(self, outcomes: Iterator[Outcome]) -> Iterator[Update]:
        for outcome in outcomes:
            if outcome.update is None:
                self.lost[outcome.client] = outcome.reason
                continue
            self.clients.append(outcome.client)
            if outcome.memory:
                self.memories[outcome.client] = outcome.memory
            yield outcome.update
