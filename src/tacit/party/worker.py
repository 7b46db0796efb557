"""A worker of alice's or bob's: it holds models, expands tickets ahead of need, and runs batches with its counterpart.

``python -m tacit.party.worker`` is started by the party's front process (`tacit.party.workers`), with two sockets: one
for calls and answers, and one through which alice's front hands over the connections of bob's worker. It does one thing
at a time. Runs come before expanding, which goes on between them in small steps; so while nothing is asked, everything
that a run needs is made ready.

A run that fails costs its ticket, and the link: the two workers may be at different steps. What was stocked for that
link is thrown away, and the front has a new one made. An error that nobody foresaw ends the process; the front starts
another one.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tacit.errors import CorrelationError, PeerError, TacitError, one_line
from tacit.identity import Identity
from tacit.mpc.correlation import Correlation, layout
from tacit.mpc.shares import Share
from tacit.mpc.steps import Role
from tacit.party import meeting, worker_calls
from tacit.party.address import parse_address
from tacit.party.cluster_file import ALICE
from tacit.party.driver import Pool, Watch, drive
from tacit.party.lean import leave_compiler_out
from tacit.party.loaded import LoadedModel
from tacit.party.models import unpack
from tacit.party.streams import Plain
from tacit.party.tickets import Ticket
from tacit.party.transport import Link
from tacit.party.vouchers import Voucher, redeem
from tacit.party.worker_calls import (
    Answer,
    Broke,
    Drop,
    Install,
    Installed,
    Pair,
    Paired,
    Ping,
    Plan,
    Pong,
    Ran,
    Remove,
    Run,
    Setup,
    Spoiled,
    Stock,
    Stocked,
    Unpaired,
)
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.ring.prg import Prg
from tacit.wire import Frame, Kind


class Worker:
    """The state of a worker.

    Args:
        front: to the front process.
        door: where connections of the other party's worker are handed over.
    """

    def __init__(self, front: Link, door: socket.socket) -> None:
        self._front = front
        self._models: dict[str, LoadedModel] = {}
        self._stock: dict[Ticket, Pool] = {}
        self._jobs: deque[Iterator[None]] = deque()
        self._peer: Link | None = None
        self._token = b""
        setup = worker_calls.decode_call(front.receive(Kind.CALL).body)
        if not isinstance(setup, Setup):
            raise PeerError("the front process did not say who this worker is")
        self._setup, self._identity = setup, Identity(setup.seed)
        self._door = meeting.Door(self._identity, setup.peer, door) if setup.role == ALICE else None

    def serve(self) -> None:
        """Carry out calls until the front process is gone."""
        poll = select.poll()
        for descriptor in (self._front.fileno(), *(self._door.filenos() if self._door else ())):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(0 if self._jobs else None)}
            if self._front.fileno() in ready:
                self._handle()
            elif ready and self._door:
                self._door.open(ready)
                if link := self._door.meet():
                    self._paired(link)
            elif self._jobs:
                self._work()

    def _handle(self) -> None:
        frame = self._front.receive(Kind.CALL)
        match worker_calls.decode_call(frame.body):
            case Run() as run:
                self._run(run, frame)
            case Stock(voucher):
                self._jobs.append(self._expand(voucher))
            case Install(part):
                self._jobs.append(self._install(part, frame))
            case Remove(model):
                self._models.pop(model, None)
                for ticket in [ticket for ticket in self._stock if ticket.model == model]:
                    del self._stock[ticket]
            case Drop(tickets):
                for ticket in tickets:
                    self._stock.pop(ticket, None)
            case Pair(token):
                self._pair(token)
            case Ping():
                self._answer(Pong())
            case Setup():
                raise PeerError("the front process said twice who this worker is")

    def _work(self) -> None:
        """Do a small part of what can be done ahead."""
        try:
            next(self._jobs[0])
        except StopIteration:
            self._jobs.popleft()

    def _install(self, body: bytes, frame: Frame) -> Iterator[None]:
        model = LoadedModel(unpack(body, frame.tensors, self._setup.role))
        plans = []
        for size in model.part.batch_sizes:
            yield
            cost = model.cost(size)
            stocked = sum(map(_stocked_bytes, cost.correlations))
            plans.append(Plan(size, cost.rounds, cost.bytes_online, cost.bytes_dealt, stocked))
        yield
        with contextlib.suppress(TacitError):  # if it cannot run, its requests say why
            model.rehearse(model.part.batch_sizes[0])
        self._models[model.part.digest] = model
        # What is there stays: a collection that looks through it takes 10 ms, and comes in the middle of a run.
        gc.collect()
        gc.freeze()
        self._answer(Installed(model.part.digest, plans))

    def _expand(self, voucher: Voucher) -> Iterator[None]:
        ticket, token = voucher.ticket, self._token
        try:
            seed, corrections = redeem(voucher)
            yield
            if ticket.model not in self._models:
                raise CorrelationError(f"the model of ticket {ticket} is not loaded")
            pool = yield from self._models[ticket.model].expanding(ticket.batch, seed, corrections)
        except TacitError as error:
            self._answer(Spoiled(ticket, one_line(error)))
            return
        if token == self._token:
            self._stock[ticket] = pool
            self._answer(Stocked(ticket))

    def _run(self, run: Run, frame: Frame) -> None:
        pool, model = self._stock.pop(run.ticket, None), self._models.get(run.ticket.model)
        try:
            if pool is None or model is None or self._peer is None:
                raise CorrelationError(f"ticket {run.ticket} was not stocked here")
            inputs = _batch(run, frame.tensors, model, Role(self._setup.role))
            self._peer.tag = self._token + run.batch.to_bytes(8, "little")
            waited, sent, watch = self._peer.waited_s, self._peer.bytes_opened, Watch()
            began = time.perf_counter()
            outputs = drive(model.run(run.ticket.batch, inputs), pool, self._peer, watch)
        except TacitError as error:
            self._answer(Broke(run.batch, one_line(error)))
            self._leave(one_line(error))
            return
        ran = Ran(
            run.batch,
            [output.scale for output in outputs],
            time.perf_counter() - began,
            self._peer.waited_s - waited,
            watch.rounds,
            self._peer.bytes_opened - sent,
        )
        self._answer(ran, [output.words for output in outputs])

    def _pair(self, token: bytes) -> None:
        if self._peer:
            self._peer.close()
        self._peer, self._token = None, token
        self._stock.clear()
        if self._door:
            self._door.expect(token, self._setup.number)
            return
        setup = self._setup
        try:
            self._paired(meeting.call(parse_address(setup.address), self._identity, setup.peer, token, setup.number))
        except PeerError as error:
            self._leave(one_line(error))

    def _paired(self, link: Link) -> None:
        link.patience = self._setup.patience_s
        self._peer = link
        self._answer(Paired(self._token))

    def _leave(self, why: str) -> None:
        if self._peer:
            self._peer.close()
        self._peer = None
        self._stock.clear()
        token, self._token = self._token, b""
        self._answer(Unpaired(token, why))

    def _answer(self, answer: Answer, tensors: list[Tensor] | None = None) -> None:
        self._front.send(Kind.REPLY, tensors or [], worker_calls.encode(answer))


def _batch(run: Run, tensors: tuple[Tensor, ...], model: LoadedModel, holder: Role) -> list[Share]:
    """This party's shares of a whole batch, from those of its requests; zeros where there are none."""
    shapes, rest = [item.item_shape for item in model.part.inputs], iter(tensors)
    parts: list[Sequence[Tensor]] = []
    for position, rows in enumerate(run.rows):
        if position in run.absent:
            parts.append([torch.zeros((rows, *shape), dtype=torch.int64) for shape in shapes])
        elif position in run.seeds:
            generator = Prg(run.seeds[position])
            parts.append([generator.words((rows, *shape)) for shape in shapes])
        else:
            parts.append([next(rest) for _ in shapes])
    if left := run.ticket.batch - sum(run.rows):
        parts.append([torch.zeros((left, *shape), dtype=torch.int64) for shape in shapes])
    wholes = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return [Share(whole, FRACTION_BITS, holder) for whole in wholes]


def _stocked_bytes(correlation: Correlation) -> int:
    return sum(field.nbytes for field in layout(correlation).fields.values())


def main() -> None:
    """Run a worker on the descriptors that the front process gave."""
    calls, door = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    # A service manager may signal all processes at once; the front process decides when a worker ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    leave_compiler_out()
    front = Link(Plain(calls), "the front process", None)
    try:
        with torch.inference_mode():
            Worker(front, door).serve()
    except PeerError:
        os._exit(0)  # the front process is gone; threads that wait for callers do not matter any more


if __name__ == "__main__":
    main()
