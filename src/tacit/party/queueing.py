"""What waits for one model: a line a client, served fairly; and whether others are about to come. Time is passed in.

Fair means by rows: of the clients that have something waiting, the one that was served least comes first (start-time
fair queueing, Goyal, Vin and Cheng, SIGCOMM 1996, with rows as lengths). A client that was away does not save up.
Within a client, requests leave in the order in which they came.

Many clients ask, wait for the answer, and ask again. How long each of them takes for that is remembered, so it is known
when it is worth waiting for one of them.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """A request as the scheduler sees it.

    Args:
        id: unique and hashable.
        client: whose.
        model: for which model.
        rows: how many inputs it has, at least 1.
        deadline: when it is of no more use; ``None`` for never.
    """

    id: Any
    client: str
    model: str
    rows: int
    deadline: float | None = None


class Waiting:
    """A request in a queue.

    Args:
        request: which.
        arrived: when.
        ready: whether both parties have their share of it.
    """

    __slots__ = ("arrived", "gone", "ready", "released", "request", "tries")

    def __init__(self, request: Request, arrived: float, ready: bool) -> None:
        self.request, self.arrived, self.ready = request, arrived, ready
        self.tries = 0
        self.released = self.gone = False


class _Line:
    """What one client has waiting, first come first: what may leave, then what is not ready or stands behind that."""

    __slots__ = ("answered", "blocked", "client", "outstanding", "pause", "released", "served", "waiting")

    def __init__(self, client: str) -> None:
        self.client = client
        self.released: deque[Waiting] = deque()
        self.blocked: deque[Waiting] = deque()
        self.waiting = self.outstanding = 0
        self.served = 0.0
        self.answered: float | None = None
        self.pause: float | None = None

    def came(self, now: float) -> None:
        """A request has come; how long after the last answer?"""
        if not self.outstanding and self.answered is not None:
            pause = now - self.answered
            self.pause = pause if self.pause is None else self.pause + (pause - self.pause) / 4
        self.outstanding += 1


class FairQueue:
    """What waits for one model."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._open: dict[str, _Line] = {}
        self._all: OrderedDict[Hashable, Waiting] = OrderedDict()
        self._served = 0.0
        self._idle: dict[str, _Line] = {}
        self._unready = 0
        self.rows = 0
        """Rows of all requests that may leave now."""

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Waiting]:
        """All that wait, in the order in which they came."""
        return iter(self._all.values())

    def get(self, id: Hashable) -> Waiting | None:
        """The request of this id, if it waits here."""
        return self._all.get(id)

    def add(self, waiting: Waiting) -> None:
        """A request has come."""
        now, client = waiting.arrived, waiting.request.client
        line = self._lines.setdefault(client, _Line(client))
        line.came(now)
        self._idle.pop(client, None)
        if not line.waiting:
            # What passed a larger request, because there was room for it, does not set back whoever comes now.
            least = min((one.served for one in self._open.values()), default=self._served)
            line.served = max(line.served, min(least, self._served))
        line.waiting += 1
        self._all[waiting.request.id] = waiting
        self._unready += not waiting.ready
        line.blocked.append(waiting)
        self._release(line)

    def put_back(self, waiting: Waiting) -> None:
        """A request that was taken did not get through: it is the first of its client's again."""
        line = self._lines[waiting.request.client]
        line.waiting += 1
        self._all[waiting.request.id] = waiting
        self._all.move_to_end(waiting.request.id, last=False)
        line.released.appendleft(waiting)
        self.rows += waiting.request.rows
        self._open[line.client] = line

    def set_ready(self, id: Hashable) -> None:
        """Both parties have their share of it now."""
        waiting = self._all[id]
        self._unready -= not waiting.ready
        waiting.ready = True
        self._release(self._lines[waiting.request.client])

    def remove(self, now: float, id: Hashable) -> Waiting:
        """A request leaves for good."""
        waiting = self._all.pop(id)
        line = self._lines[waiting.request.client]
        line.waiting -= 1
        self._unready -= not waiting.ready
        waiting.gone = True
        if waiting.released:
            self.rows -= waiting.request.rows
        self._release(line)
        self.finished(now, waiting.request)
        return waiting

    def finished(self, now: float, request: Request) -> None:
        """A request that was taken, or removed, is no longer of concern: its client may send another one."""
        line = self._lines[request.client]
        line.outstanding -= 1
        if not line.outstanding:
            line.answered = now
            self._idle[line.client] = line

    def next_rows(self, most: int) -> int:
        """Rows of the request that `take` would take first; 0 if there is none with at most ``most`` rows."""
        sizes = ((line.served, line.released[0].request.rows) for line in self._open.values())
        return min((pair for pair in sizes if pair[1] <= most), default=(0.0, 0))[1]

    def take(self, space: int) -> list[Waiting]:
        """The requests that leave together: fair, and of at most ``space`` rows.

        A request that is too large for the space that is left lets others pass this time; its client is still the one
        that was served least, and comes first the next time.
        """
        taken: list[Waiting] = []
        lines = [(line.served, number, line) for number, line in enumerate(self._open.values())]
        heapq.heapify(lines)
        while lines and space:
            served, number, line = lines[0]
            if not line.released or line.released[0].request.rows > space:
                heapq.heappop(lines)
                continue
            waiting = line.released.popleft()
            rows = waiting.request.rows
            del self._all[waiting.request.id]
            line.waiting -= 1
            space -= rows
            self.rows -= rows
            self._served = max(self._served, served)
            line.served += rows
            taken.append(waiting)
            self._release(line)
            heapq.heapreplace(lines, (line.served, number, line))
        return taken

    def longest(self) -> tuple[str, int]:
        """The client with the most requests waiting, and how many."""
        line = max(self._lines.values(), key=lambda line: line.waiting)
        return line.client, line.waiting

    def last_of(self, client: str) -> Waiting:
        """The latest request of a client that has some."""
        line = self._lines[client]
        return next(one for part in (line.blocked, line.released) for one in reversed(part) if not one.gone)

    def waiting_of(self, client: str) -> int:
        """How many requests of a client wait."""
        line = self._lines.get(client)
        return line.waiting if line else 0

    def oldest(self) -> Waiting | None:
        """Of the requests that may leave, the one that came first."""
        return next((waiting for waiting in self if waiting.released), None)

    def expects(self, now: float, seconds: float) -> bool:
        """Whether another request is to be expected within these seconds: one that is not ready yet, or one from a
        client that usually asks again about as long after an answer as has passed by now."""
        if self._unready:
            return True
        for client, line in list(self._idle.items()):
            due = None if line.answered is None or line.pause is None else line.answered + line.pause
            if due is not None and abs(due - now) <= seconds:
                return True
            if due is None or due < now:
                del self._idle[client]
        return False

    def _release(self, line: _Line) -> None:
        """Move what may leave to where it leaves from, and forget what is gone."""
        blocked, released = line.blocked, line.released
        while blocked and (blocked[0].gone or blocked[0].ready):
            waiting = blocked.popleft()
            if not waiting.gone:
                waiting.released = True
                released.append(waiting)
                self.rows += waiting.request.rows
        while released and released[0].gone:
            released.popleft()
        if released:
            self._open[line.client] = line
        else:
            self._open.pop(line.client, None)
