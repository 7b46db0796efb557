"""Asynchronous training by the virtual clock of simulated devices.

FedBuff's event loop (Nguyen et al. 2022, algorithm 1): clients start, finish and drop out one by one, and the server
steps whenever its buffer is full.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacit.errors import InputError
from tacit.federated.algorithm import Update
from tacit.federated.devices_schedule import DROPPED, FAILED, Schedule
from tacit.federated.fedbuff import FedBuff
from tacit.federated.generators import generator_for
from tacit.federated.history import RoundRecord
from tacit.federated.initial import Initial
from tacit.federated.local.work import Loss
from tacit.federated.selection import Uniform
from tacit.runtimes.executors import Executor, Job, Outcome
from tacit.runtimes.federation import Devices, Federation, Snapshot

LOOK = 64
"""So many clients at least are asked whether they may train, before all are."""


@dataclass(frozen=True)
class Flight:
    """A client at work.

    Args:
        end: when it finishes or drops out, by the virtual clock, in seconds.
        task: its number, in the order of starting, from 1.
        client: its index.
        version: how many steps the server had made when it started.
        reason: why it drops out; empty if it finishes.
        outcome: what it will deliver; ``None`` while not computed, and if it drops out.
    """

    end: float
    task: int
    client: int
    version: int
    reason: str = ""
    outcome: Outcome | None = None


@dataclass(frozen=True)
class AsynchronousSnapshot(Snapshot):
    """A `Snapshot` and, between two steps of the server, the clients at work.

    Args:
        tasks: how many have been started in all.
        flights: those that have not ended.
    """

    tasks: int = 0
    flights: tuple[Flight, ...] = ()


class AsynchronousFederation(Federation):
    """Training of one global model by clients that come and go; a round is one step of the server.

    Up to ``concurrency`` clients are at work. Whenever one ends, the next is drawn uniformly from those that have
    examples, are eligible, not at work, and have not started from the present model yet. It downloads the model of
    that moment. In a record, ``lost`` says who dropped out or diverged since the step before, ``cohort`` whose updates
    were in the buffer, and ``simulated_seconds`` when it was full. If no more clients come, the server steps with what
    is there, and says so in the record's ``note``.

    The updates are computed when the server is about to step, all that started from one model together, so that an
    executor of several processes is used well. As in `Federation`, equal arguments give bit-equal models.

    Args:
        model: the architecture; copied. Its initial weights are drawn according to ``initial``.
        executor: trains the clients; the caller closes it.
        sizes: how many examples each client has, int64 of shape ``(N,)``.
        algorithm: the buffer, and what clients and server do.
        concurrency: M, how many clients are at work at the same time, at most.
        devices: the clients' simulated devices; of the policy, only how long to wait for one that is eligible.
        seed: of the initial weights, the draws and the clients' shuffling.
        initial: see `tacit.federated.initial.initialise`.
        loss: mean loss of a batch, for evaluating.

    Raises:
        InputError: a setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        executor: Executor,
        sizes: Tensor,
        *,
        algorithm: FedBuff,
        concurrency: int,
        devices: Devices,
        seed: int = 0,
        initial: Initial = "he",
        loss: Loss = functional.cross_entropy,
    ) -> None:
        if not 1 <= concurrency <= len(sizes):
            raise InputError(f"concurrency={concurrency}: choose between 1 and the number of clients, {len(sizes)}")
        super().__init__(
            model,
            executor,
            sizes,
            algorithm=algorithm,
            selection=Uniform(1),
            devices=devices,
            seed=seed,
            initial=initial,
            loss=loss,
        )
        self._fedbuff = algorithm
        self._fleet = devices.fleet
        self._policy = devices.policy
        self._concurrency = concurrency
        self._snapshot: AsynchronousSnapshot = AsynchronousSnapshot(self._snapshot.state, {})

    @property
    def snapshot(self) -> AsynchronousSnapshot:
        """Where training is."""
        return self._snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from where a federation with the same arguments was.

        Raises:
            InputError: the snapshot is one of synchronous rounds.
        """
        if not isinstance(snapshot, AsynchronousSnapshot):
            raise InputError("the snapshot is of synchronous rounds: restore it into a Federation")
        self._snapshot = snapshot

    def advance(self) -> RoundRecord:
        """Go on until the buffer is full, and make one step of the server; the record is not yet evaluated.

        Raises:
            TrainingError: this is the third step in a row for which no update came.
        """
        started = time.perf_counter()
        before, wanted = self._snapshot, self._fedbuff.buffer
        interval = _Interval(before)
        while len(interval.delivered) < wanted and self._go_on(interval):
            pass
        self._compute(interval)
        delivered = sorted(interval.delivered, key=lambda arrival: (arrival[0].client, arrival[0].task))
        mean = self._fedbuff.combine(self._discounted(delivered)) if delivered else None
        note = "" if len(delivered) == wanted else f"{len(delivered)} of {wanted} updates came: no client was left"
        lost = dict(sorted(interval.lost.items()))
        self._snapshot = interval.snapshot(before)
        if mean is None:
            self._fail(before.state.round + 1, Schedule((), lost, before.clock, interval.clock), lost, note)
        else:
            self._snapshot = replace(self._snapshot, state=self._fedbuff.server_update(before.state, mean), failures=0)
        return RoundRecord(
            round=self.round,
            cohort=tuple(flight.client for flight, _ in delivered),
            examples=mean.examples if mean else 0,
            loss=None,
            accuracy=None,
            bytes_up=mean.nbytes if mean else 0,
            bytes_down=(interval.tasks - before.tasks) * before.state.nbytes,
            seconds=time.perf_counter() - started,
            train_loss=mean.loss if mean else None,
            lost=lost,
            simulated_seconds=interval.clock,
            note=note,
        )

    def _discounted(self, delivered: Iterable[tuple[Flight, Update]]) -> Iterator[Update]:
        for flight, update in delivered:
            yield self._fedbuff.discount(update, self.round - flight.version)

    def _go_on(self, interval: _Interval) -> bool:
        """Have clients start, then move the clock to when the next one ends; false if none will."""
        self._start(interval)
        for _ in range(self._policy.max_waits):
            if interval.flights or not self._idle(interval).any():
                break
            interval.clock += self._policy.wait
            self._start(interval)
        if not interval.flights:
            return False
        interval.clock, task = heapq.heappop(interval.ends)
        flight = interval.flights[task]
        if not flight.reason and flight.outcome is None:
            self._compute(interval)
            flight = interval.flights[task]
        del interval.flights[task]
        outcome = flight.outcome
        if outcome is None or outcome.update is None:
            interval.lost[flight.client] = flight.reason if outcome is None else outcome.reason
        else:
            interval.delivered.append((flight, outcome.update))
            interval.memories[flight.client] = outcome.memory
        return True

    def _start(self, interval: _Interval) -> None:
        """Fill the free places with clients drawn from those that may start now."""
        state, fleet = self._snapshot.state, self._fleet
        for client in self._drawn(interval, self._concurrency - len(interval.flights)):
            interval.tasks += 1
            chosen = torch.tensor([client])
            effort = self._fedbuff.effort(state, self._sizes[chosen])
            work = (chosen, effort.examples, state.nbytes, effort.bytes_up, interval.tasks)
            attempt = fleet.attempt(chosen, interval.clock, fleet.durations(*work), interval.tasks)
            reason = "" if attempt.finished.item() else FAILED if attempt.failed.item() else DROPPED
            interval.add(Flight(attempt.end.item(), interval.tasks, client, state.round, reason))

    def _drawn(self, interval: _Interval, places: int) -> tuple[int, ...]:
        """At most ``places`` clients, uniformly from those that may start now."""
        if places == 0:
            return ()
        generator = generator_for(self._seed, "task", interval.tasks + 1, repr(interval.clock))
        number, idle = interval.tasks + 1, self._idle(interval)
        few = Uniform(min(max(4 * places, LOOK), len(idle)))
        some = torch.tensor(few.select(number, self._sizes, idle, generator), dtype=torch.int64)
        eligible = torch.zeros_like(idle)
        eligible[some] = self._fleet.eligible(interval.clock, some)
        if int(eligible.sum()) < places:
            eligible = idle & self._fleet.eligible(interval.clock)
        return Uniform(places).select(number, self._sizes, eligible, generator)

    def _idle(self, interval: _Interval) -> Tensor:
        """Which clients have examples, are not at work and have not started from the present model: bool."""
        idle = self._sizes > 0
        taken = interval.begun | {flight.client for flight in interval.flights.values()}
        idle[list(taken)] = False
        return idle

    def _compute(self, interval: _Interval) -> None:
        """Have every client train that started from the present model, will finish and has not been computed."""
        waiting = [flight for flight in interval.flights.values() if not flight.reason and flight.outcome is None]
        jobs = [Job(flight.client, interval.memories.get(flight.client, {})) for flight in waiting]
        outcomes = self._executor.run(self._fedbuff, self._snapshot.state, jobs, self._seed)
        for flight, outcome in zip(waiting, outcomes, strict=True):
            interval.flights[flight.task] = replace(flight, outcome=outcome)


class _Interval:
    """What happens between two steps of the server."""

    def __init__(self, before: AsynchronousSnapshot) -> None:
        self.clock = before.clock
        self.tasks = before.tasks
        self.memories = dict(before.memories)
        self.flights = {flight.task: flight for flight in before.flights}
        self.ends = [(flight.end, flight.task) for flight in before.flights]
        heapq.heapify(self.ends)
        self.begun: set[int] = set()
        self.delivered: list[tuple[Flight, Update]] = []
        self.lost: dict[int, str] = {}

    def add(self, flight: Flight) -> None:
        """A client starts."""
        self.flights[flight.task] = flight
        self.begun.add(flight.client)
        heapq.heappush(self.ends, (flight.end, flight.task))

    def snapshot(self, before: AsynchronousSnapshot) -> AsynchronousSnapshot:
        """What ``before`` has become, but for the server's step."""
        flights = tuple(self.flights[task] for task in sorted(self.flights))
        return replace(before, memories=self.memories, clock=self.clock, tasks=self.tasks, flights=flights)
