"""Clients trained by several processes of this machine, one a core.

The processes are forked, so that model, clients' examples and algorithm are simply there, shared and read-only. What
changes from round to round goes through shared memory: the server's state down, updates up, with a short header for
each on a socket. Nothing is pickled.

Which process trains a client makes no difference to what comes of it, and outcomes are handed on in the order of the
jobs: a run gives the same bits for every number of processes, and the same as `InProcess`.

A process that dies (killed, out of memory) is replaced. The client that it was training is tried once more, then
reported as lost; those that waited for it are trained by others.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import struct
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import torch
from torch import Tensor

from tacit import errors
from tacit.data.examples import Examples
from tacit.errors import InputError, TacitError, TrainingError
from tacit.federated.algorithm import Algorithm, ServerState, Update
from tacit.federated.local.work import LocalSolver
from tacit.runtimes.executors import Executor, InProcess, Job, Outcome, train_client
from tacit.runtimes.shared_tensors import Place, SharedMemory, places, put, room, views

QUEUE = 2
"""Jobs that a process is given at a time: one that it does and one that waits, so that it need not wait itself."""
AHEAD = 4
"""Outcomes that are held while an earlier one is missing: so many for each process, and no more."""
SLOT = 8
"""What a client remembers, or sends, may be so many times as large as what it receives. Untouched memory is free."""
ATTEMPTS = 2
"""How many processes may die over a client."""

_LENGTH = struct.Struct("<I")
_PARAMETERS = "parameters"


class _Start(msgspec.Struct, array_like=True, tag=True):
    """A round begins; its state lies on the board."""

    round: int
    seed: int


class _Do(msgspec.Struct, array_like=True, tag=True):
    """Train a client; what it remembers is in the slot."""

    client: int
    slot: int
    memory: tuple[Place, ...]


class _Done(msgspec.Struct, array_like=True, tag=True):
    """What came of it; its tensors are in the slot."""

    client: int
    slot: int
    tensors: tuple[Place, ...]
    reason: str
    examples: int = 0
    loss: float = 0.0
    sent: int = 0
    weight: float = 0.0


class _Failed(msgspec.Struct, array_like=True, tag=True):
    """Training raised an error; the names of its class, and what it says."""

    client: int
    error: str
    text: str


_Message = _Start | _Do | _Done | _Failed
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Message).decode


class Forked:
    """Trains clients in processes forked from this one; see the module.

    Args:
        solver: trains the model; best one that has traced its step before, which the processes then need not.
        clients: the examples of each client.
        processes: how many; one for each core this process may use unless given.

    Raises:
        InputError: ``processes`` is below 1.
        NotImplementedError: the platform cannot fork; `forked` falls back.
    """

    def __init__(self, solver: LocalSolver, clients: Sequence[Examples], processes: int | None = None) -> None:
        if processes is not None and processes < 1:
            raise InputError(f"processes={processes}: train with 1 or more")
        if not hasattr(os, "fork") or sys.platform == "darwin":
            raise NotImplementedError(f"{sys.platform} has no fork that PyTorch survives")
        self._solver = solver
        self._clients = clients
        self._count = processes or available_cores()
        self._crew: _Crew | None = None

    def run(self, algorithm: Algorithm, state: ServerState, jobs: Sequence[Job], seed: int) -> Iterator[Outcome]:
        """See `Executor`.

        Raises:
            TacitError: training a client raised it.
            TrainingError: training a client raised another error.
        """
        if self._crew is None or not self._crew.fits(algorithm, state):
            self.close()
            self._crew = _Crew(self._solver, self._clients, algorithm, state, self._count)
        return self._crew.run(state, jobs, seed)

    def close(self) -> None:
        """End the processes."""
        if self._crew is not None:
            self._crew.close()
            self._crew = None

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes that are up."""
        return tuple(worker.pid for worker in self._crew.workers) if self._crew else ()


def forked(solver: LocalSolver, clients: Sequence[Examples], processes: int | None = None) -> tuple[Executor, str]:
    """`Forked`, or `InProcess` if one process is asked for or the platform cannot fork, with the reason; else empty."""
    if processes == 1:
        return InProcess(solver, clients), "one process was asked for"
    try:
        return Forked(solver, clients, processes), ""
    except NotImplementedError as error:
        return InProcess(solver, clients), str(error)


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(eq=False)
class _Worker:
    """A process, seen from here: its end of the socket, its slots, and the jobs that it has."""

    pid: int
    link: socket.socket
    slots: SharedMemory
    jobs: deque[int] = field(default_factory=deque)
    free: list[int] = field(default_factory=lambda: list(range(QUEUE)))


class _Crew:
    """The processes for one algorithm and one shape of state."""

    def __init__(
        self, solver: LocalSolver, clients: Sequence[Examples], algorithm: Algorithm, state: ServerState, count: int
    ) -> None:
        self._solver, self._clients, self._algorithm = solver, clients, algorithm
        self._template = replace(state, optimizer={})
        self._down = places(_down(state))
        self._board = SharedMemory(room(_down(state).values()))
        self._slot = SLOT * room(_down(state).values()) + (1 << 20)
        self._begun: _Start | None = None
        self.workers: list[_Worker] = []
        for _ in range(count):
            self.workers.append(self._fork())

    def fits(self, algorithm: Algorithm, state: ServerState) -> bool:
        """Whether these processes can train this."""
        same = bool(self.workers) and algorithm is self._algorithm and state.layout == self._template.layout
        return same and state.clients == self._template.clients and places(_down(state)) == self._down

    def run(self, state: ServerState, jobs: Sequence[Job], seed: int) -> Iterator[Outcome]:
        """The outcomes in the order of the jobs."""
        put(_down(state), self._board.view)
        self._begun = _Start(state.round, seed)
        for worker in list(self.workers):
            self._tell(worker, self._begun)
        round_of_jobs = _Round(jobs)
        try:
            for number in range(len(jobs)):
                while number not in round_of_jobs.outcomes:
                    self._hand_out(round_of_jobs, number)
                    self._collect(round_of_jobs)
                # Before the caller folds this one in, so that nobody waits meanwhile.
                self._hand_out(round_of_jobs, number + 1)
                yield round_of_jobs.outcomes.pop(number)
        except TacitError:
            self.close()
            raise
        finally:
            self._finish(round_of_jobs)

    def _finish(self, jobs: _Round) -> None:
        """Let every process come to the end of what it has, and take it away: the next round finds them idle."""
        jobs.waiting.clear()
        try:
            while any(worker.jobs for worker in self.workers):
                self._collect(jobs)
                jobs.waiting.clear()
        except TacitError:
            self.close()

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for worker in self.workers:
            worker.link.close()
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)
        self.workers = []

    def _fork(self) -> _Worker:
        here, there = socket.socketpair()
        slots = SharedMemory(QUEUE * self._slot)
        gc.freeze()  # What is here now is not looked at by the child's collector, which would copy its pages.
        with warnings.catch_warnings():
            # Python warns that other threads' locks stay as they are; the child takes none of them.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            self._serve(there, [here, *(worker.link for worker in self.workers)], slots)
        gc.unfreeze()
        there.close()
        return _Worker(pid, here, slots)

    def _serve(self, link: socket.socket, foreign: Sequence[socket.socket], slots: SharedMemory) -> None:
        """What the child does until its end; does not return."""
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            for other in foreign:
                other.close()
            # Threads of OpenMP do not survive a fork; one needs none.
            torch.set_num_threads(1)
            self._work(link, slots)
        finally:
            os._exit(0)

    def _work(self, link: socket.socket, slots: SharedMemory) -> None:
        state, seed = self._template, 0
        while True:
            message = _receive(link)
            if isinstance(message, _Start):
                seed = message.seed
                state = _state(self._template, views(self._board.view, self._down), message.round)
            elif isinstance(message, _Do):
                memory_of_slot = slots.view[message.slot * self._slot : (message.slot + 1) * self._slot]
                try:
                    _send(link, self._trained(message, memory_of_slot, state, seed))
                except Exception as error:
                    text = str(error) if isinstance(error, TacitError) else traceback.format_exc(limit=-3)
                    _send(link, _Failed(message.client, type(error).__name__, text))

    def _trained(self, do: _Do, slot: memoryview, state: ServerState, seed: int) -> _Done:
        """Do a job: what it takes is in the slot, and what comes of it will be."""
        memory = {name: view.clone() for name, view in views(slot, do.memory).items()}
        outcome = train_client(
            self._algorithm, state, Job(do.client, memory), self._solver, self._clients[do.client], seed
        )
        update = outcome.update
        tensors = {f"memory/{name}": tensor for name, tensor in outcome.memory.items()}
        if update is None:
            return _Done(do.client, do.slot, put(tensors, slot), outcome.reason)
        tensors["delta/"] = update.delta
        tensors |= {f"buffers/{name}": tensor for name, tensor in update.buffers.items()}
        tensors |= {f"extra/{name}": tensor for name, tensor in update.extra.items()}
        there = put(tensors, slot)
        return _Done(do.client, do.slot, there, "", update.examples, update.loss, update.nbytes, update.weight)

    def _hand_out(self, jobs: _Round, first: int) -> None:
        """Give jobs to processes that have room for some, but none too far beyond the first missing one."""
        while jobs.waiting and jobs.waiting[0] < first + AHEAD * len(self.workers):
            worker = min(self.workers, key=lambda one: len(one.jobs))
            if not worker.free:
                return
            number = jobs.waiting.popleft()
            job, slot = jobs.jobs[number], worker.free.pop(0)
            there = put(job.memory, self._memory_of(worker, slot))
            worker.jobs.append(number)
            self._tell(worker, _Do(job.client, slot, there))

    def _memory_of(self, worker: _Worker, slot: int) -> memoryview:
        return worker.slots.view[slot * self._slot : (slot + 1) * self._slot]

    def _tell(self, worker: _Worker, message: _Message) -> None:
        """Send; that a process with jobs is gone shows when its outcomes are collected."""
        try:
            _send(worker.link, message)
        except (BrokenPipeError, ConnectionResetError):
            if not worker.jobs:
                self._replace(worker)

    def _collect(self, jobs: _Round) -> None:
        """Wait until a process has something to say, and take what they all have."""
        busy = {worker.link: worker for worker in self.workers if worker.jobs}
        readable, _, _ = select.select(list(busy), [], [])
        for link in readable:
            worker = busy[link]
            try:
                message = _receive(link)
                if isinstance(message, _Done):
                    number = worker.jobs.popleft()
                    jobs.outcomes[number] = self._outcome(worker, jobs.jobs[number], message)
                    worker.free.append(message.slot)
                elif isinstance(message, _Failed):
                    worker.jobs.clear()
                    raise _error(message)
            except (EOFError, ConnectionResetError):
                self._bury(worker, jobs)

    def _outcome(self, worker: _Worker, job: Job, done: _Done) -> Outcome:
        parts: dict[str, dict[str, Tensor]] = {"delta": {}, "buffers": {}, "extra": {}, "memory": {}}
        for name, view in views(self._memory_of(worker, done.slot), done.tensors).items():
            part, _, rest = name.partition("/")
            parts[part][rest] = view.clone()
        if done.reason:
            return Outcome(job.client, None, parts["memory"], done.reason)
        update = Update(
            parts["delta"][""], parts["buffers"], done.examples, done.loss, done.sent, done.weight, parts["extra"]
        )
        return Outcome(job.client, update, parts["memory"])

    def _bury(self, worker: _Worker, jobs: _Round) -> None:
        """Put another process in the place of one that died, and see to its jobs."""
        unfinished = list(worker.jobs)
        how = self._replace(worker)
        jobs.attempts[unfinished[0]] = jobs.attempts.get(unfinished[0], 0) + 1
        if jobs.attempts[unfinished[0]] == ATTEMPTS:
            job = jobs.jobs[unfinished[0]]
            reason = f"lost: {ATTEMPTS} processes that trained it {how}"
            jobs.outcomes[unfinished.pop(0)] = Outcome(job.client, None, job.memory, reason)
        jobs.waiting.extendleft(reversed(unfinished))

    def _replace(self, worker: _Worker) -> str:
        """Fork a new process for one that is gone; how that one ended."""
        worker.link.close()
        _, status = os.waitpid(worker.pid, 0)
        place = self.workers.index(worker)
        del self.workers[place]
        following = self._fork()
        self.workers.insert(place, following)
        if self._begun is not None:
            _send(following.link, self._begun)
        if os.WIFSIGNALED(status):
            return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
        return f"ended with status {os.waitstatus_to_exitcode(status)}"


class _Round:
    """The jobs of a round by number, and what is known of them."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.waiting = deque(range(len(jobs)))
        self.outcomes: dict[int, Outcome] = {}
        self.attempts: dict[int, int] = {}


def _down(state: ServerState) -> dict[str, Tensor]:
    """What clients take of the server's state."""
    buffers = {f"buffers/{name}": value for name, value in state.buffers.items()}
    return {_PARAMETERS: state.parameters, **buffers, **{f"shared/{name}": t for name, t in state.shared.items()}}


def _state(template: ServerState, tensors: Mapping[str, Tensor], number: int) -> ServerState:
    buffers = {name: tensors[f"buffers/{name}"] for name in template.buffers}
    shared = {name: tensors[f"shared/{name}"] for name in template.shared}
    return replace(template, parameters=tensors[_PARAMETERS], buffers=buffers, shared=shared, round=number)


def _error(failed: _Failed) -> TacitError:
    kind = getattr(errors, failed.error, None)
    if isinstance(kind, type) and issubclass(kind, TacitError):
        return kind(failed.text)
    return TrainingError(f"training client {failed.client} raised {failed.error}: {failed.text}")


def _send(link: socket.socket, message: _Message) -> None:
    encoded = _encode(message)
    link.sendall(_LENGTH.pack(len(encoded)) + encoded)


def _receive(link: socket.socket) -> _Message:
    (length,) = _LENGTH.unpack(_exactly(link, _LENGTH.size))
    message: _Message = _decode(_exactly(link, length))
    return message


def _exactly(link: socket.socket, count: int) -> bytearray:
    """So many bytes.

    Raises:
        EOFError: the other side is gone.
    """
    result = bytearray(count)
    rest = memoryview(result)
    while rest:
        received = link.recv_into(rest)
        if not received:
            raise EOFError
        rest = rest[received:]
    return result
