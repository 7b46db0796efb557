"""What runs next: requests of many clients become batches of the planned sizes. No clock, socket or thread of its own.

Alice's process asks `Scheduler.form` whenever a worker has nothing to do. A batch leaves at once if it is full or if
nobody else is expected; else its oldest request waits for company, at most the latency budget. Small batches cost
several times as much a row: where so much waits that a larger one would serve it with less, and the worker is making a
ticket for one ready, that ticket is waited for, at most as long as the larger batch will take. No wait goes on until
the oldest request cannot be answered within its deadline any more. Every request leaves exactly once: in a batch that
succeeds, or refused with a reason; one whose batch failed by no fault of its own goes into one more.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Container, Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tacit.errors import InputError
from tacit.party.limits import Limits, Rate
from tacit.party.queueing import FairQueue, Request, Waiting
from tacit.party.refusal import Reason, Refusal

Refused = list[tuple[Request, Refusal]]
TRIES = 2
"""Batches that a request may be part of."""


_REMINDERS = 4096
"""How many may be kept for requests that have left."""
_SECONDS_PER_WEIGHT = 0.001
_NOTHING: Mapping[str, Collection[int]] = MappingProxyType({})
_LATE = Refusal(Reason.DEADLINE, "the deadline has passed: give more time, or ask when less is waiting")
_MISSING = Refusal(Reason.MISSING, "the other party never had its share of this request: send one to each", 1.0)


@dataclass(frozen=True)
class Policy:
    """How to serve.

    Args:
        latency_s: how long a request may wait for company.
        queue: requests that may wait, of all clients together.
        missing_s: how long a request may wait until the other party has its share, too.
        fail_when_empty: refuse what there are no tickets for, instead of letting it wait for them.
    """

    latency_s: float = 0.004
    queue: int = 1024
    missing_s: float = 10.0
    fail_when_empty: bool = False


@dataclass(frozen=True)
class Batch:
    """Requests that run together.

    Args:
        number: of the batch; no two have the same.
        model: which.
        size: the planned batch size, at least as large as all rows; zero shares fill the rest.
        requests: whose rows follow one another in this order.
    """

    number: int
    model: str
    size: int
    requests: tuple[Request, ...]

    @property
    def rows(self) -> int:
        """Rows of all requests."""
        return sum(request.rows for request in self.requests)


class Scheduler:
    """What waits, at the party that leads.

    Args:
        policy: how to serve.
        limits: of each client that may ask, by name; the others are limited by the queue alone.
    """

    def __init__(self, policy: Policy, limits: Mapping[str, Limits] | None = None) -> None:
        self.policy = policy
        self._limits = dict(limits or {})
        self._rates = {client: Rate(limit.requests_per_minute) for client, limit in self._limits.items()}
        self._models: OrderedDict[str, _Model] = OrderedDict()
        self._waiting: dict[Hashable, Waiting] = {}
        self._held: Counter[str] = Counter()
        self._running: dict[int, tuple[_Model, list[Waiting]]] = {}
        self._reminders: list[tuple[float, int, Hashable, Refusal]] = []
        self._numbers, self._ties = itertools.count(1), itertools.count()

    def __len__(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def add_model(self, name: str, sizes: Collection[int], called: str = "") -> None:
        """Serve a model from now on.

        Args:
            name: its name, which is not served yet.
            sizes: the planned batch sizes.
            called: what refusals call it, if not by its name.
        """
        self._models[name] = _Model(called or name, sorted(sizes))

    def drop_model(self, now: float, name: str, refusal: Refusal) -> Refused:
        """Serve a model no longer; what waits for it is refused."""
        refused = self._refuse_all(now, self._models[name], refusal)
        del self._models[name]
        return refused

    def set_stock(self, name: str, size: int, tickets: int, per_minute: float) -> None:
        """Say how many tickets there are for a model that is served, and how fast they come."""
        model = self._models[name]
        model.stock[size], model.per_minute = tickets, per_minute

    def submit(self, now: float, request: Request, *, ready: bool = True) -> Refused:
        """A request has come.

        Args:
            now: the time.
            request: what it is.
            ready: whether the other party has its share, too; else `set_ready` says so later.

        Returns:
            What is refused: this request, or that of a client with more of them if the queue is full.

        Raises:
            InputError: a request with this id waits already.
        """
        if request.id in self._waiting:
            raise InputError("a request of this number is waiting already: numbers are used once in a session")
        if refusal := self._refusal(now, request):
            return [(request, refusal)]
        refused: Refused = []
        if len(self) >= self.policy.queue:
            most = max(self._held, key=self._held.__getitem__, default=request.client)
            if self._held[most] <= self._held[request.client] + 1:
                return [(request, self._busy())]
            refused.append(self._evicted(now, most))
        waiting = Waiting(request, now, ready)
        self._enter(waiting)
        self._models[request.model].queue.add(waiting)
        if request.deadline is not None:
            self._remind(request.deadline, request.id, _LATE)
        if not ready:
            self._remind(now + self.policy.missing_s, request.id, _MISSING)
        return refused

    def set_ready(self, id: Hashable) -> None:
        """The other party has its share of this request, too; nothing happens if it waits no more."""
        if waiting := self._waiting.get(id):
            self._models[waiting.request.model].queue.set_ready(id)

    def cancel(self, now: float, id: Hashable) -> bool:
        """Whether the request was still waiting; it does not any more."""
        waiting = self._waiting.get(id)
        if waiting:
            self._leave(now, waiting)
        return waiting is not None

    def form(
        self, now: float, tickets: Mapping[str, Collection[int]], coming: Mapping[str, Collection[int]] = _NOTHING
    ) -> Batch | None:
        """The batch that a free worker should run now.

        Args:
            now: the time.
            tickets: the batch sizes, by model, for which this worker has a ticket at hand.
            coming: those for which it makes one ready.

        Returns:
            ``None`` if nothing should run yet; `wake_at` says when to ask again at the latest.
        """
        for name, model in self._models.items():
            sizes = tickets.get(name)
            if sizes and (taken := self._taken(now, model, sizes, coming.get(name, ()))):
                size, waiting = taken
                self._models.move_to_end(name)
                batch = Batch(next(self._numbers), name, size, tuple(one.request for one in waiting))
                self._running[batch.number] = model, waiting
                return batch
        return None

    def done(self, now: float, batch: Batch, seconds: float) -> None:
        """A batch has succeeded.

        Args:
            now: the time.
            batch: which.
            seconds: how long the worker took.
        """
        model, waiting = self._running.pop(batch.number)
        model.took(batch.size, seconds)
        for one in waiting:
            model.queue.finished(now, one.request)

    def failed(self, now: float, batch: Batch, refusal: Refusal, blamed: Container[Hashable] = ()) -> Refused:
        """A batch has failed.

        Args:
            now: the time.
            batch: which.
            refusal: what to tell those that are given up.
            blamed: requests that it failed for. The others are tried once more, before what came after them.

        Returns:
            What is refused.
        """
        refused: Refused = []
        model, waiting = self._running.pop(batch.number)
        served = self._models.get(batch.model) is model
        for one in reversed(waiting):
            one.tries += 1
            late = one.request.deadline is not None and one.request.deadline <= now
            if served and one.tries < TRIES and one.request.id not in blamed and not late:
                self._enter(one)
                model.queue.put_back(one)
            else:
                model.queue.finished(now, one.request)
                refused.append((one.request, refusal))
        return refused

    def expire(self, now: float) -> Refused:
        """Refuse what has waited too long, or for what will not come; to be called whenever time has passed."""
        refused: Refused = []
        while self._reminders and self._reminders[0][0] <= now:
            _, _, id, refusal = heapq.heappop(self._reminders)
            waiting = self._waiting.get(id)
            if waiting and (refusal is _LATE or not waiting.ready):
                refused.append(self._refused(now, waiting, refusal))
        if self.policy.fail_when_empty:
            for model in self._models.values():
                short = [one for one in model.queue if not model.has_stock(one.request.rows)]
                refused += [self._refused(now, one, model.empty()) for one in short]
        return refused

    def drain(self, now: float, refusal: Refusal) -> Refused:
        """Refuse all that waits."""
        return [pair for model in self._models.values() for pair in self._refuse_all(now, model, refusal)]

    def wake_at(self, now: float) -> float | None:
        """When something is to be done even if nothing happens until then."""
        times = [self._reminders[0][0]] if self._reminders else []
        for model in self._models.values():
            oldest = model.queue.oldest()
            if oldest:
                ends = (oldest.arrived + self.policy.latency_s, model.patient_until or 0.0)
                times += [end for end in ends if end > now]
        return min(times, default=None)

    def _taken(
        self, now: float, model: _Model, sizes: Collection[int], coming: Collection[int]
    ) -> tuple[int, list[Waiting]] | None:
        queue, largest = model.queue, max(sizes)
        first = queue.next_rows(largest)
        if not first or (queue.rows < largest and not self._due(now, model)):
            return None
        size = model.best(queue.rows, [size for size in sizes if size >= first])
        if model.is_patient(now, size, coming):
            return None
        model.patient_until = None
        taken = queue.take(size)
        for one in taken:
            self._exit(one)
        return size, taken

    def _due(self, now: float, model: _Model) -> bool:
        """Whether to wait no longer for company."""
        oldest = model.queue.oldest()
        if oldest is None:
            return False
        until = min(oldest.arrived + self.policy.latency_s, model.latest(oldest))
        return until <= now or not model.queue.expects(now, until - now)

    def _refusal(self, now: float, request: Request) -> Refusal | None:
        """Why a request cannot be taken at all."""
        model = self._models.get(request.model)
        if model is None:
            return Refusal(Reason.GONE, f"model {request.model!r} is not served: ask its owner to load it")
        limits = self._limits.get(request.client, Limits())
        most = min(model.sizes[-1], limits.largest_batch or model.sizes[-1])
        if not 1 <= request.rows <= most:
            return Refusal(
                Reason.INVALID, f"a request has 1 to {most} inputs here, not {request.rows}: send it in parts"
            )
        if request.deadline is not None and request.deadline <= now:
            return _LATE
        if self.policy.fail_when_empty and not model.has_stock(request.rows):
            return model.empty()
        rate = self._rates.get(request.client)
        if rate and (seconds := rate.take(now)):
            text = f"{limits.requests_per_minute:g} requests a minute are allowed: retry after {seconds:.2g} s"
            return Refusal(Reason.BUSY, text, seconds)
        return None

    def _busy(self) -> Refusal:
        seconds = min(60.0, max(0.01, sum(model.backlog() for model in self._models.values())))
        return Refusal(Reason.BUSY, f"{len(self)} requests are waiting: retry after {seconds:.2g} s", seconds)

    def _evicted(self, now: float, client: str) -> tuple[Request, Refusal]:
        """Refuse the latest request of a client."""
        model = max(self._models.values(), key=lambda model: model.queue.waiting_of(client))
        return self._refused(now, model.queue.last_of(client), self._busy())

    def _refuse_all(self, now: float, model: _Model, refusal: Refusal) -> Refused:
        return [self._refused(now, waiting, refusal) for waiting in list(model.queue)]

    def _refused(self, now: float, waiting: Waiting, refusal: Refusal) -> tuple[Request, Refusal]:
        self._leave(now, waiting)
        return waiting.request, refusal

    def _leave(self, now: float, waiting: Waiting) -> None:
        self._exit(waiting)
        self._models[waiting.request.model].queue.remove(now, waiting.request.id)

    def _enter(self, waiting: Waiting) -> None:
        self._waiting[waiting.request.id] = waiting
        self._held[waiting.request.client] += 1

    def _exit(self, waiting: Waiting) -> None:
        del self._waiting[waiting.request.id]
        self._held[waiting.request.client] -= 1

    def _remind(self, when: float, id: Hashable, refusal: Refusal) -> None:
        if len(self._reminders) > 4 * len(self._waiting) + _REMINDERS:
            self._reminders = [reminder for reminder in self._reminders if reminder[2] in self._waiting]
            heapq.heapify(self._reminders)
        heapq.heappush(self._reminders, (when, next(self._ties), id, refusal))


class _Model:
    """A model that is served: its queue, its tickets, and what its batches take.

    Args:
        name: its name.
        sizes: the planned batch sizes, ascending.
    """

    def __init__(self, name: str, sizes: list[int]) -> None:
        self.name, self.sizes = name, sizes
        self.queue = FairQueue()
        self.stock: dict[int, int] = dict.fromkeys(sizes, 0)
        self.per_minute = 0.0
        self.patient_until: float | None = None
        self._seconds: dict[int, float] = {}

    def took(self, size: int, seconds: float) -> None:
        """A batch of this size took so long."""
        before = self._seconds.get(size, seconds)
        self._seconds[size] = before + (seconds - before) / 8

    def seconds(self, size: int) -> float:
        """What a batch of this size will take: as measured, or in proportion to what others took."""
        if size in self._seconds:
            return self._seconds[size]
        ratios = [seconds / _weight(known) for known, seconds in self._seconds.items()]
        return _weight(size) * (sum(ratios) / len(ratios) if ratios else _SECONDS_PER_WEIGHT)

    def best(self, rows: int, sizes: Collection[int]) -> int:
        """The size that serves so many waiting rows with the least time for each."""
        return min(sizes, key=lambda size: (self.seconds(size) / min(rows, size), size))

    def is_patient(self, now: float, size: int, coming: Collection[int]) -> bool:
        """Whether to wait for a ticket of a larger size that is coming, instead of using one of this size."""
        better = self.best(self.queue.rows, [size, *(one for one in coming if one > size)])
        if better == size:
            return False
        if self.patient_until is None:
            oldest = self.queue.oldest()
            self.patient_until = min(now + self.seconds(better), self.latest(oldest) if oldest else now)
        return now < self.patient_until

    def latest(self, waiting: Waiting) -> float:
        """When a request must be begun to be answered within its deadline, if in a batch of the smallest size."""
        deadline = waiting.request.deadline
        return math.inf if deadline is None else deadline - self.seconds(self.sizes[0])

    def backlog(self) -> float:
        """Seconds that one worker needs for what waits."""
        largest = self.sizes[-1]
        return self.seconds(largest) * self.queue.rows / largest

    def has_stock(self, rows: int) -> bool:
        """Whether there is a ticket for so many rows."""
        return any(count and size >= rows for size, count in self.stock.items())

    def empty(self) -> Refusal:
        """What to say when there is none."""
        after = 60 / self.per_minute if self.per_minute else None
        return Refusal(Reason.EMPTY, f"pool empty for model {self.name!r}, {self.per_minute:.3g} a minute", after)


def _weight(size: int) -> float:
    """Relative time of a batch before any was measured: a round trip's rounds weigh as much as some rows."""
    return 8.0 + size
