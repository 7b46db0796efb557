"""Alice: she decides what runs when, and tells bob.

Clients' requests go into the scheduler (`tacit.party.batching`). Whenever a pair of workers has nothing to do, a batch
is formed for which it holds a ticket; bob is told, and alice's worker begins at the same time. A client's request may
be begun before bob has said that he has his share of it, if that client's shares have usually come to him soon: then
nothing is waited for. If it does not come in time after all, bob takes zeros in its place, that request is refused, and
the others of the batch are answered.

Tickets are taken from the pool ahead of need and made ready by both workers (`tacit.party.pairing`), so that nothing is
written to a disk between a request and its answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from tacit.party import worker_calls
from tacit.party.batching import Batch, Policy, Scheduler
from tacit.party.clients import Clients, Held, run_of
from tacit.party.crew import Crew
from tacit.party.house import House
from tacit.party.limits import Limits
from tacit.party.messages import Begin, FromAlice, Over, RequestId
from tacit.party.pairing import Pairing
from tacit.party.pairs import Pair, Running
from tacit.party.promptness import Promptness
from tacit.party.queueing import Request
from tacit.party.refill import Line
from tacit.party.refusal import Reason, Refusal
from tacit.party.tasks import Tasks
from tacit.party.workers import NOTICING_S, WorkerProcess
from tacit.wire import Array

LONGEST_S = 600.0
"""A request waits no longer than that, whatever its client says."""
_EARLY = 8192
"""Requests that bob may have before alice has."""
_RECENT = 64
"""Batches that bob may still say something of after they have ended here."""
_OVER = 256
"""Requests that are over, before bob is told of them by themselves; else it is with the next batch."""
_HALF = Refusal(Reason.FAILED, "the batch failed: bob's worker ended before his shares of the results were sent")
_MISSING = Refusal(Reason.MISSING, "bob did not have his share of this request in time: ask again", 1.0)


class Leader:
    """See the module.

    Args:
        house: alice's.
        setups: her workers'.
        say: tells bob something; nothing happens if he is not there.
        tasks: where work beside goes.
    """

    def __init__(
        self, house: House, setups: Sequence[worker_calls.Setup], say: Callable[[FromAlice], None], tasks: Tasks
    ) -> None:
        serving = house.cluster.serving
        self._house, self._say = house, say
        self.crew = Crew(setups, house.vault, self, house.metrics, house.log)
        self.clients = Clients(house.cluster, self.crew.served, self._asked, self._given_up, house.metrics)
        self.pairing = Pairing(house, self.crew, tasks, say, self._pump)
        policy = Policy(serving.latency_ms / 1000, serving.queue, fail_when_empty=serving.when_empty == "fail")
        limits = {n: Limits(c.requests_per_minute, c.largest_batch) for n, c in house.cluster.clients.items()}
        # That bob has a share is heard of half a round trip after it came to him.
        heard_s = house.cluster.network.for_planning().round_trip / 2
        self._scheduler, self._promptness = Scheduler(policy, limits), Promptness(policy.latency_s + heard_s)
        self._early: OrderedDict[RequestId, None] = OrderedDict()
        self._recent: OrderedDict[int, dict[RequestId, Held]] = OrderedDict()
        self._over: list[RequestId] = []
        self._pumping = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> int:
        """How many batches run."""
        return sum(pair.running is not None for pair in self.pairing.pairs)

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._scheduler)

    def drain(self, refusal: Refusal) -> None:
        """Take no more requests, and refuse what waits; what runs will be answered."""
        self.clients.closed = refusal
        self._refuse(self._scheduler.drain(time.monotonic(), refusal))

    def set_stock(self, per_minute: Mapping[Line, float]) -> None:
        """Look how many tickets there are of everything, on disk and with the workers."""
        usable = self.pairing.usable()
        for model, served in self.crew.served.items():
            for size in served.part.batch_sizes:
                line = (model, size)
                self._scheduler.set_stock(*line, usable[line], per_minute.get(line, 0.0))
        self._pump()

    def flush(self) -> None:
        """Tell bob which requests are over."""
        if self._over:
            self._say(Over(self._over))
            self._over = []

    # What bob says of requests.

    def bob_has(self, requests: Sequence[RequestId]) -> None:
        """He has his shares of these."""
        for id in requests:
            if held := self.clients.requests.get(id):
                self._promptness.came(held.client, time.monotonic() - held.arrived)
                self._scheduler.set_ready(id)
            else:
                self._early[id] = None
        while len(self._early) > _EARLY:
            self._early.popitem(last=False)
        self._pump()

    def bob_broke(self, batch: int) -> None:
        """His worker has not run this batch to its end: her half of it is of no use."""
        if pair := self._runs(batch):
            # Hers is about to say the same, unless it hangs; the requests do not wait for that.
            self.pairing.part(pair, "bob's worker has left a run")
            pair.worker.expect(NOTICING_S)
            self._broke(pair, "bob's worker left it")
            return
        for held in self._recent.pop(batch, {}).values():
            self.clients.refuse(held, _HALF)

    def bob_lacks(self, batch: int, requests: Sequence[RequestId]) -> None:
        """He took zeros in the place of these."""
        pair = self._runs(batch)
        if pair and pair.running:
            pair.running.absent.update(requests)
            return
        for id in requests:
            if held := self._recent.get(batch, {}).get(id):
                self._promptness.late(held.client)
                self.clients.refuse(held, _MISSING)

    def _runs(self, batch: int) -> Pair | None:
        """The pair that runs this batch, if one does."""
        return next((one for one in self.pairing.pairs if one.running and one.running.batch.number == batch), None)

    # What clients do.

    def _asked(self, held: Held) -> None:
        ask, early = held.ask, held.id in self._early
        if early:
            del self._early[held.id]
            self._promptness.came(held.client, 0.0)
        deadline = held.arrived + min(ask.deadline_ms / 1000, LONGEST_S)
        request = Request(held.id, held.client, ask.model, ask.rows, deadline)
        ready = early or self._promptness.is_prompt(held.client)
        self._refuse(self._scheduler.submit(held.arrived, request, ready=ready))
        self._pump()

    def _given_up(self, held: Held) -> None:
        if self._scheduler.cancel(time.monotonic(), held.id):
            self._end(held.id)

    def _refuse(self, refused: Sequence[tuple[Request, Refusal]]) -> None:
        for request, refusal in refused:
            if held := self._end(request.id):
                self.clients.refuse(held, refusal)

    def _end(self, id: RequestId) -> Held | None:
        """A request is over, at bob too."""
        self._over.append(id)
        if len(self._over) >= _OVER:
            self.flush()
        return self.clients.forget(id)

    # What runs.

    def _pump(self) -> None:
        """See what can run, once everything that has come in by now is known."""
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump_now)

    def _pump_now(self) -> None:
        self._pumping, now = False, time.monotonic()
        self._refuse(self._scheduler.expire(now))
        for pair in self.pairing.pairs:
            if pair.idle and (batch := self._scheduler.form(now, pair.ready, self.pairing.coming(pair))):
                self._begin(now, pair, batch)
        if self._timer:
            self._timer.cancel()
        wake = self._scheduler.wake_at(now)
        self._timer = None if wake is None else asyncio.get_running_loop().call_later(wake - now, self._pump_now)

    def _begin(self, now: float, pair: Pair, batch: Batch) -> None:
        ticket = self.pairing.take(pair, batch.model, batch.size)
        ids, rows = [request.id for request in batch.requests], [request.rows for request in batch.requests]
        pair.running = Running(batch, ticket, now)
        self._say(Begin(pair.number, batch.number, ticket, ids, rows, self._over))
        pair.worker.call(*run_of(batch.number, ticket, rows, [self.clients.requests[id] for id in ids]))
        self._over = []

    def _ran(self, pair: Pair, ran: worker_calls.Ran, outputs: Sequence[Array]) -> None:
        running = pair.running
        if running is None or running.batch.number != ran.batch:
            return
        batch, pair.running, now = running.batch, None, time.monotonic()
        self._scheduler.done(now, batch, now - running.began)
        if self.waiting:
            self._pump_now()  # the workers go on while the answers are sent
        start, recent = 0, {}
        for request in batch.requests:
            if held := self._end(request.id):
                if request.id in running.absent:
                    self._promptness.late(held.client)
                    self.clients.refuse(held, _MISSING)
                else:
                    self.clients.answer(held, batch.number, ran.scales, outputs, start)
                    held.shares, held.ask.seed, recent[request.id] = (), None, held
            start += request.rows
        self._recent[batch.number] = recent
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        self._count(batch, ran)
        self.pairing.stock(pair)

    def _broke(self, pair: Pair, why: str) -> None:
        running, pair.running = pair.running, None
        if running is None:
            return
        batch, name = running.batch, self.crew.name_of(running.batch.model)
        self._house.log("batch_failed", worker=pair.number, model=name, rows=batch.rows, reason=why)
        self._house.metrics.batches.labels(name, batch.size, "failed").inc()
        self._house.metrics.burned.inc()
        for id in running.absent:
            if held := self.clients.requests.get(id):
                self._promptness.late(held.client)
        refusal = Refusal(Reason.FAILED, f"the batch failed: {why}")
        self._refuse(self._scheduler.failed(time.monotonic(), batch, refusal, running.absent))
        self.pairing.stock(pair)
        self._pump()

    def _count(self, batch: Batch, ran: worker_calls.Ran) -> None:
        name, metrics = self.crew.name_of(batch.model), self._house.metrics
        metrics.ran(name, batch.size, batch.rows, ran)

    # What the crew serves, and what its workers do.

    def model_served(self, model: str) -> None:
        """See `Watcher`."""
        part = self.crew.served[model].part
        self._scheduler.add_model(model, part.batch_sizes, part.name)

    def model_gone(self, model: str) -> None:
        """See `Watcher`; what waits for it is refused."""
        gone = Refusal(Reason.GONE, "this version of the model is not served any more")
        self._refuse(self._scheduler.drop_model(time.monotonic(), model, gone))
        self.pairing.forget(model)

    def worker_started(self, worker: WorkerProcess) -> None:
        """See `Watcher`."""
        self.pairing.worker_started(worker)

    def worker_ended(self, worker: WorkerProcess) -> None:
        """See `Watcher`."""
        self.pairing.worker_ended(worker)
        self._broke(self.pairing.pairs[worker.number], "alice's worker ended in the middle of it")

    def worker_heard(self, worker: WorkerProcess, answer: worker_calls.Answer, outputs: Sequence[Array]) -> None:
        """See `Watcher`."""
        pair = self.pairing.pairs[worker.number]
        match answer:
            case worker_calls.Ran():
                self._ran(pair, answer, outputs)
            case worker_calls.Broke(batch, why) if pair.running and pair.running.batch.number == batch:
                # It says next that it has left the link; nothing may begin there until then.
                self.pairing.part(pair, why)
                self._broke(pair, why)
            case _:
                self.pairing.worker_heard(worker, answer)
