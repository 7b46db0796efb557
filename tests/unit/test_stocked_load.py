"""A pair of workers under load, without workers: scheduler and stocking in a simulation with a clock of its own."""

import heapq
from collections import Counter, deque
from collections.abc import Mapping

import pytest

from tacit.party.batching import Policy, Scheduler
from tacit.party.queueing import Request
from tacit.party.refill import Line
from tacit.party.stocking import Usage, next_lease

MODEL = "m" * 64
SIZES = (1, 8, 32)
MEMORY = 150
PLENTY = 10**6


def run_s(size: int) -> float:
    """Seconds that a batch takes: a network's rounds cost as much as some rows."""
    return 0.004 + 0.0004 * size


def expand_s(size: int) -> float:
    """Seconds until a ticket is ready."""
    return 0.001 + 0.0004 * size


class Simulation:
    """Clients that ask, wait for the answer, and ask again after a pause; a pair that runs batches and expands tickets.

    Args:
        clients: how many.
        pause_s: between an answer and the next request.
        tells: whether the scheduler is told which tickets are coming.
    """

    def __init__(self, clients: int, pause_s: float, *, tells: bool = True) -> None:
        self.scheduler, self.usage = Scheduler(Policy(latency_s=0.004)), Usage()
        self.scheduler.add_model(MODEL, SIZES)
        self.pause_s, self.tells = pause_s, tells
        self.ready: Counter[int] = Counter()
        self.expanding: deque[int] = deque()
        self.clients = range(clients)
        self.requests = [(0.001 * number, number) for number in self.clients]
        self.now, self.asked, self.waits = 0.0, 0, list[float]()
        self.sizes: Counter[int] = Counter()
        for size in SIZES:
            self.scheduler.set_stock(MODEL, size, PLENTY, 0.0)
        self.stock()
        while self.expanding:
            self.expand()

    def stock(self) -> None:
        lines: Mapping[Line, int] = {(MODEL, size): size for size in SIZES}
        used = {line: self.usage.of(line, self.now) for line in lines}
        held = {(MODEL, size): self.ready[size] + self.expanding.count(size) for size in SIZES}
        while lease := next_lease(lines, held, dict.fromkeys(lines, PLENTY), used, MEMORY):
            line, count = lease
            held[line] += count
            self.expanding += [line[1]] * count

    def expand(self) -> None:
        size = self.expanding.popleft()
        self.now += expand_s(size)
        self.ready[size] += 1

    def run(self, seconds: float) -> float:
        """Answers a second."""
        answered, until = 0, self.now + seconds
        while self.now < until:
            while self.requests and self.requests[0][0] <= self.now:
                when, client = heapq.heappop(self.requests)
                self.scheduler.submit(when, Request(self.asked, f"client {client}", MODEL, 1))
                self.waits.append(when)
                self.asked += 1
            coming = {MODEL: set(self.expanding)} if self.tells else {}
            ready = {MODEL: [size for size in SIZES if self.ready[size]]}
            batch = self.scheduler.form(self.now, ready, coming)
            if batch is None:
                if self.expanding:
                    self.expand()
                else:
                    wakes = [self.scheduler.wake_at(self.now), self.requests[0][0] if self.requests else None]
                    self.now = max(self.now + 1e-5, min((one for one in wakes if one is not None), default=until))
                continue
            self.ready[batch.size] -= 1
            self.sizes[batch.size] += 1
            self.usage.used((MODEL, batch.size), self.now)
            self.now += run_s(batch.size)
            self.scheduler.done(self.now, batch, run_s(batch.size))
            answered += batch.rows
            for request in batch.requests:
                self.waits[request.id] = self.now - self.waits[request.id]
                if (client := int(request.client.split()[1])) in self.clients:
                    heapq.heappush(self.requests, (self.now + self.pause_s, client))
            self.stock()
        return answered / seconds


def test_many_clients_are_served_in_large_batches() -> None:
    simulation = Simulation(64, 0.02)
    rate = simulation.run(10.0)
    ideal = 32 / (run_s(32) + expand_s(32))
    assert rate > 0.95 * ideal
    assert rate > 1.2 * Simulation(64, 0.02, tells=False).run(10.0)


@pytest.mark.parametrize("before", [0, 64])
def test_one_client_alone_waits_for_no_ticket(before: int) -> None:
    """Also right after many others have left."""
    simulation = Simulation(before, 0.02)
    simulation.run(10.0)
    simulation.clients = range(0)
    simulation.run(1.0)
    assert len(simulation.scheduler) == 0
    simulation.clients, simulation.requests = range(1), [(simulation.now, 0)]
    first = simulation.asked
    simulation.run(5.0)
    waits = sorted(simulation.waits[first:])
    assert len(waits) > 150
    assert waits[len(waits) // 2] < run_s(1) + 1e-4
