"""A pair of workers, one of alice's and one of bob's, as alice sees it: whether they are linked, and what they hold."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from tacit.party.batching import Batch
from tacit.party.messages import RequestId
from tacit.party.refill import Line
from tacit.party.tickets import Ticket
from tacit.party.workers import WorkerProcess


@dataclass(eq=False)
class Side:
    """One worker of a pair.

    Args:
        up: whether its process is there.
        linked: whether it has said that it is linked, under the pair's present token.
        models: those that it has ready.
    """

    up: bool = False
    linked: bool = False
    models: set[str] = field(default_factory=set)


@dataclass(repr=False)
class Running:
    """A batch that runs.

    Args:
        batch: which.
        ticket: what it uses.
        began: when it was begun.
        absent: the requests whose shares bob does not have.
    """

    batch: Batch
    ticket: Ticket
    began: float
    absent: set[RequestId] = field(default_factory=set)


class Pair:
    """See the module.

    Args:
        worker: alice's.
    """

    def __init__(self, worker: WorkerProcess) -> None:
        self.worker, self.number = worker, worker.number
        self.mine, self.bobs = Side(), Side()
        self.token = b""
        self.running: Running | None = None
        self.ready: dict[str, dict[int, deque[Ticket]]] = {}
        self._expanding: dict[Ticket, int] = {}
        self._held: Counter[Line] = Counter()

    @property
    def linked(self) -> bool:
        """Whether both say that they are."""
        return self.mine.linked and self.bobs.linked

    @property
    def idle(self) -> bool:
        """Whether a batch can be begun."""
        return self.linked and self.running is None

    @property
    def models(self) -> set[str]:
        """Those that both have ready."""
        return self.mine.models & self.bobs.models

    @property
    def held(self) -> Counter[Line]:
        """How many tickets are ready or being made so, by line."""
        return self._held

    @property
    def stocked(self) -> Counter[Line]:
        """How many tickets are ready, by line."""
        return Counter(
            {(model, size): len(queue) for model, sizes in self.ready.items() for size, queue in sizes.items()}
        )

    @property
    def coming(self) -> dict[str, set[int]]:
        """The batch sizes, by model, of the tickets that are being made ready."""
        sizes: dict[str, set[int]] = {}
        for ticket in self._expanding:
            sizes.setdefault(ticket.model, set()).add(ticket.batch)
        return sizes

    def has(self, ticket: Ticket) -> bool:
        """Whether a ticket is being expanded."""
        return ticket in self._expanding

    def give(self, ticket: Ticket) -> None:
        """A ticket is being expanded, by both workers."""
        self._expanding[ticket] = 2
        self._held[ticket.model, ticket.batch] += 1

    def expanded(self, ticket: Ticket) -> bool:
        """One of the workers has expanded a ticket; whether it can be used now."""
        left = self._expanding.get(ticket, 0) - 1
        if left > 0:
            self._expanding[ticket] = left
        elif not left:
            del self._expanding[ticket]
            self.ready.setdefault(ticket.model, {}).setdefault(ticket.batch, deque()).append(ticket)
        return not left

    def spoiled(self, ticket: Ticket) -> bool:
        """One of the workers cannot expand a ticket; whether it was expected to."""
        if not self._expanding.pop(ticket, 0):
            return False
        self._held[ticket.model, ticket.batch] -= 1
        return True

    def take(self, model: str, size: int) -> Ticket:
        """A ticket that is ready; it is so no longer."""
        sizes = self.ready[model]
        ticket = sizes[size].popleft()
        if not sizes[size]:
            del sizes[size]
        self._held[model, size] -= 1
        return ticket

    def part(self) -> list[Ticket]:
        """The link is no more; the tickets that are lost with it."""
        lost = [*self._expanding, *(one for sizes in self.ready.values() for queue in sizes.values() for one in queue)]
        self.mine.linked = self.bobs.linked = False
        self.token = b""
        self.ready.clear()
        self._expanding.clear()
        self._held.clear()
        return lost

    def forget(self, model: str) -> list[Ticket]:
        """A model is not served any more; the tickets that are lost with it."""
        sizes = self.ready.pop(model, {})
        lost = [
            *(one for one in self._expanding if one.model == model),
            *(one for queue in sizes.values() for one in queue),
        ]
        for ticket in lost:
            self._expanding.pop(ticket, None)
            self._held[ticket.model, ticket.batch] -= 1
        return lost
