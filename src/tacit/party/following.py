"""Bob: he holds his shares of clients' requests until alice says what to do with them.

Alice's `Begin` names the requests of a batch. If a share has not come yet it is waited for a moment; then zeros take
its place, and alice is told. What this party computed of such a request is not sent to anybody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tacit.party import messages, worker_calls
from tacit.party.clients import Clients, Held, run_of
from tacit.party.crew import Crew
from tacit.party.house import House
from tacit.party.messages import Absent, Begin, FromBob, Have, RequestId
from tacit.party.refusal import Reason, Refusal
from tacit.party.tasks import Tasks
from tacit.party.tickets import Ticket
from tacit.party.workers import NOTICING_S, WorkerProcess
from tacit.wire import Array

MISSING_S = 0.05
"""How long a batch, for which alice's worker waits already, waits for a share that has not come."""
_SLACK_S = 60.0
"""How much longer than its deadline a share is kept that alice never mentions."""
_NEVER = Refusal(Reason.MISSING, "alice never had her share of this request: send one to each party", 1.0)


@dataclass(repr=False)
class _Running:
    """A batch that runs, or waits for shares; no request of it is forgotten before it has ended."""

    begin: Begin
    held: list[Held | None]
    timer: asyncio.TimerHandle | None = None


class Follower:
    """See the module.

    Args:
        house: bob's.
        setups: his workers'.
        say: tells alice something; nothing happens if she is not there.
        tasks: where work beside goes.
    """

    def __init__(
        self, house: House, setups: Sequence[worker_calls.Setup], say: Callable[[FromBob], None], tasks: Tasks
    ) -> None:
        self._house, self._say, self._tasks = house, say, tasks
        self.crew = Crew(setups, house.vault, self, house.metrics, house.log)
        self.clients = Clients(house.cluster, self.crew.served, self._asked, self._given_up, house.metrics)
        self._running: dict[int, _Running] = {}
        self._missing: dict[RequestId, int] = {}
        self._tokens: dict[int, bytes] = {}
        self._linked: set[int] = set()
        self._given: dict[int, set[Ticket]] = {worker.number: set() for worker in self.crew.workers}
        self._have: list[RequestId] = []

    @property
    def running(self) -> int:
        """How many batches run."""
        return len(self._running)

    @property
    def linked(self) -> int:
        """How many workers are linked with alice's."""
        return len(self._linked)

    def introduce(self) -> None:
        """Tell alice, who has just come, of the workers, their models, and the shares that are here."""
        self._tokens.clear()
        for worker in self.crew.workers:
            if worker.up:
                self._say(messages.Up(worker.number))
                for model in worker.models:
                    self._say(messages.Installed(worker.number, model))
        if self.clients.requests:
            self._say(Have(list(self.clients.requests)))

    def alice_said(self, message: messages.FromAlice) -> None:
        """Do what she says about workers, tickets and requests."""
        match message:
            case messages.Pair(number, token) if number < len(self.crew.workers):
                self._tokens[number] = token
                self.crew.workers[number].call(worker_calls.Pair(token))
                if any(one.begin.worker == number for one in self._running.values()):
                    self.crew.workers[number].expect(NOTICING_S)
            case messages.Stock(number, token, tickets) if self._tokens.get(number) == token:
                self._tasks.start(self._claim(number, token, tickets))
            case messages.Drop(number, tickets) if number < len(self.crew.workers):
                self.crew.workers[number].call(worker_calls.Drop(tickets))
                self._tasks.start(asyncio.to_thread(self._house.discard, tickets))
            case Begin():
                self._begin(message)
            case messages.Over(requests):
                self._end(requests)
            case _:
                pass

    def expire(self) -> None:
        """Forget the shares that alice has not mentioned for too long."""
        now = time.monotonic()
        for id, held in list(self.clients.requests.items()):
            if now - held.arrived > held.ask.deadline_ms / 1000 + _SLACK_S:
                self.clients.forget(id)
                self.clients.refuse(held, _NEVER)

    async def _claim(self, number: int, token: bytes, tickets: list[Ticket]) -> None:
        """Take the tickets that alice took, and have the worker expand them."""
        taken, full = await asyncio.to_thread(self._house.claim, tickets)
        vouchers = await asyncio.to_thread(self._house.vouchers, taken)
        if self._tokens.get(number) != token:
            await asyncio.to_thread(self._house.discard, taken)
            return
        self._say(messages.Claimed(number, token, tickets, [voucher.ticket for voucher in vouchers], full))
        self._given[number].update(taken)
        for voucher in vouchers:
            self.crew.workers[number].call(worker_calls.Stock(voucher))

    def _begin(self, begin: Begin) -> None:
        self._end(begin.over)
        if begin.worker >= len(self.crew.workers) or len(begin.rows) != len(begin.requests):
            return
        held = [self.clients.requests.get(id) for id in begin.requests]
        running = self._running[begin.batch] = _Running(begin, held)
        missing = [id for id, one in zip(begin.requests, held, strict=True) if one is None]
        if not missing:
            self._run(running)
            return
        self._missing |= dict.fromkeys(missing, begin.batch)
        running.timer = asyncio.get_running_loop().call_later(MISSING_S, self._run, running)

    def _run(self, running: _Running) -> None:
        begin = running.begin
        if running.timer:
            running.timer.cancel()
        for id in begin.requests:
            self._missing.pop(id, None)
        # A share of another number of rows than alice's is none.
        for position, (held, rows) in enumerate(zip(running.held, begin.rows, strict=True)):
            if held and (held.ask.rows, held.ask.model) != (rows, begin.ticket.model):
                running.held[position] = None
        run, shares = run_of(begin.batch, begin.ticket, begin.rows, running.held)
        if run.absent:
            self._say(Absent(begin.batch, [begin.requests[position] for position in run.absent]))
        self.crew.workers[begin.worker].call(run, shares)

    def _ran(self, worker: WorkerProcess, ran: worker_calls.Ran, outputs: Sequence[Array]) -> None:
        running = self._ended(worker.number, ran.batch)
        if running is None:
            return
        begin, start = running.begin, 0
        for held, rows in zip(running.held, begin.rows, strict=True):
            if held:
                self.clients.answer(held, begin.batch, ran.scales, outputs, start)
            start += rows
        name = self.crew.name_of(begin.ticket.model)
        self._house.metrics.ran(name, begin.ticket.batch, sum(begin.rows), ran)

    def _ended(self, worker: int, batch: int) -> _Running | None:
        """A worker has ended a batch; what was known of it. (An alice who starts anew counts batches from 1 again.)"""
        running = self._running.get(batch)
        return self._running.pop(batch) if running and running.begin.worker == worker else None

    def _broke(self, worker: int, batch: int, why: str) -> None:
        # Alice decides what becomes of the requests, which stay here.
        running = self._ended(worker, batch)
        if running:
            self._say(messages.Broke(batch))
            if running.timer:
                running.timer.cancel()
            begin, name = running.begin, self.crew.name_of(running.begin.ticket.model)
            self._house.log("batch_failed", worker=begin.worker, model=name, rows=sum(begin.rows), reason=why)
            self._house.metrics.batches.labels(name, begin.ticket.batch, "failed").inc()

    def _asked(self, held: Held) -> None:
        if not self._have:
            asyncio.get_running_loop().call_soon(self._tell)
        self._have.append(held.id)
        batch = self._missing.pop(held.id, None)
        if batch is not None and (running := self._running.get(batch)):
            running.held[running.begin.requests.index(held.id)] = held
            if None not in running.held:
                self._run(running)

    def _tell(self) -> None:
        """Say, once for all that has come in together, which shares are here."""
        self._say(Have(self._have))
        self._have = []

    def _given_up(self, held: Held) -> None:
        """Forget it; if alice begins it all the same, it is missing, and nobody wants the answer."""
        self.clients.forget(held.id)

    def _end(self, requests: Sequence[RequestId]) -> None:
        for id in requests:
            self.clients.forget(id)

    # What the crew serves, and what its workers do.

    def model_served(self, model: str) -> None:
        """See `Watcher`; alice decides what becomes of requests."""

    def model_gone(self, model: str) -> None:
        """See `Watcher`; alice decides what becomes of requests."""

    def worker_started(self, worker: WorkerProcess) -> None:
        """See `Watcher`."""
        self._say(messages.Up(worker.number))

    def worker_ended(self, worker: WorkerProcess) -> None:
        """See `Watcher`."""
        self._tokens.pop(worker.number, None)
        self._linked.discard(worker.number)
        self._say(messages.Down(worker.number))
        given, self._given[worker.number] = self._given[worker.number], set()
        if given:  # what the worker did not come to lies on the disk yet
            self._tasks.start(asyncio.to_thread(self._house.discard, given))
        for batch in [batch for batch, one in self._running.items() if one.begin.worker == worker.number]:
            self._broke(worker.number, batch, "bob's worker ended in the middle of it")

    def worker_heard(self, worker: WorkerProcess, answer: worker_calls.Answer, outputs: Sequence[Array]) -> None:
        """See `Watcher`."""
        number = worker.number
        token = self._tokens.get(number, b"")
        match answer:
            case worker_calls.Ran():
                self._ran(worker, answer, outputs)
            case worker_calls.Broke(batch, why):
                self._broke(number, batch, why)
            case worker_calls.Installed(model):
                self._say(messages.Installed(number, model))
            case worker_calls.Paired(linked):
                self._linked.add(number)
                self._say(messages.Paired(number, linked))
            case worker_calls.Unpaired(parted, why):
                self._house.log("pair_broken", worker=number, reason=why)
                self._linked.discard(number)
                self._say(messages.Unpaired(number, parted))
            case worker_calls.Stocked(ticket):
                self._given[number].discard(ticket)
                self._say(messages.Stocked(number, token, ticket, True))
            case worker_calls.Spoiled(ticket, why):
                self._given[number].discard(ticket)
                self._house.log("ticket_spoiled", worker=number, reason=why)
                self._say(messages.Stocked(number, token, ticket, False))
            case _:
                pass
