"""Alice's keeping of her pairs of workers: linked with bob's, and stocked with tickets that both have made ready."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping

from tacit.party import messages, worker_calls
from tacit.party.crew import Crew
from tacit.party.house import House
from tacit.party.messages import FromAlice
from tacit.party.pairs import Pair, Side
from tacit.party.refill import Line
from tacit.party.stocking import Usage, next_lease
from tacit.party.tasks import Tasks
from tacit.party.tickets import Ticket
from tacit.party.workers import WorkerProcess

LINKING_S = 20.0
"""How long two workers may take to link."""


class Pairing:
    """See the module.

    Args:
        house: alice's.
        crew: her workers.
        tasks: where work beside goes.
        say: tells bob something; `connected` says whether he hears.
        changed: called when a pair can do more than before.
    """

    def __init__(
        self,
        house: House,
        crew: Crew,
        tasks: Tasks,
        say: Callable[[FromAlice], None],
        changed: Callable[[], None],
    ) -> None:
        self._house, self._crew, self._tasks = house, crew, tasks
        self._say, self._changed = say, changed
        self._memory = int(house.cluster.serving.memory_gb * 1e9)
        self._usage, self._stocking = Usage(), set[int]()
        self._linking: dict[int, float] = {}
        self._unclaimed: dict[int, list[list[Ticket]]] = {}
        self.pairs = [Pair(worker) for worker in crew.workers]
        self.levels: dict[Line, int] = {}
        self.connected = False

    def connect(self) -> None:
        """Bob is there; nothing is known of his workers yet."""
        self.connected = True

    def disconnect(self) -> None:
        """Bob is gone. A batch that runs may still end well: the workers' own link may be there yet."""
        self.connected = False
        for pair in self.pairs:
            pair.bobs = Side()
            self.part(pair, "bob is gone")

    def take(self, pair: Pair, model: str, size: int) -> Ticket:
        """A ticket that both workers of a pair have ready; whoever takes it calls `stock` when there is time."""
        self._usage.used((model, size), time.monotonic())
        return pair.take(model, size)

    def forget(self, model: str) -> None:
        """A model is not served any more."""
        for pair in self.pairs:
            pair.mine.models.discard(model)
            pair.bobs.models.discard(model)
            self._burn(pair, pair.forget(model))

    def usable(self) -> Counter[Line]:
        """How many tickets there are, by line, on the disk and with the pairs; where bob's is full, what is ready."""
        blocked = [pair for pair in self.pairs if pair.number in self._unclaimed]
        usable = sum((pair.stocked if pair in blocked else pair.held for pair in self.pairs), Counter[Line]())
        return usable if len(blocked) == len(self.pairs) else usable + Counter(self.levels)

    def coming(self, pair: Pair) -> dict[str, set[int]]:
        """The batch sizes, by model, of the tickets that a pair will soon have ready: none while bob's disk is full."""
        return {} if pair.number in self._unclaimed else pair.coming

    def stocked(self) -> Counter[Line]:
        """How many can be used at once."""
        return sum((pair.stocked for pair in self.pairs), Counter())

    def refresh(self, levels: Mapping[Line, int]) -> None:
        """Go on with what has come to a stop.

        Args:
            levels: how many tickets there are on the disk.
        """
        self.levels = dict(levels)
        now = time.monotonic()
        for pair in self.pairs:
            if pair.token and not pair.linked and now - self._linking[pair.number] > LINKING_S:
                self.part(pair, "the two workers did not find each other")
            self._link(pair)
            self._ask_again(pair)
            self.stock(pair)

    def part(self, pair: Pair, why: str) -> None:
        """A pair is not linked any more."""
        if pair.token:
            self._house.log("pair_broken", worker=pair.number, reason=why)
        self._unclaimed.pop(pair.number, None)
        self._burn(pair, pair.part())

    # What alice's workers do.

    def worker_started(self, worker: WorkerProcess) -> None:
        """Her worker is there."""
        pair = self.pairs[worker.number]
        pair.mine = Side(up=True)
        self._link(pair)

    def worker_ended(self, worker: WorkerProcess) -> None:
        """Her worker is gone, and the link with it."""
        pair = self.pairs[worker.number]
        pair.mine = Side()
        self.part(pair, "alice's worker has ended")

    def worker_heard(self, worker: WorkerProcess, answer: worker_calls.Answer) -> None:
        """Her worker says something."""
        pair = self.pairs[worker.number]
        match answer:
            case worker_calls.Installed(model):
                pair.mine.models.add(model)
                self.stock(pair)
            case worker_calls.Paired(token) if token == pair.token:
                pair.mine.linked = True
                self._linked(pair)
            case worker_calls.Unpaired(token, why) if token == pair.token:
                self.part(pair, why)
            case worker_calls.Stocked(ticket):
                self._expanded(pair, ticket)
            case worker_calls.Spoiled(ticket, why):
                self._house.log("ticket_spoiled", worker=worker.number, reason=why)
                self._spoiled(pair, ticket)

    # What bob says of his.

    def bob_said(self, message: messages.FromBob) -> None:
        """Something about a worker of bob's; of another pair, or one that has been parted since, it is passed over."""
        pair = self._of(message)
        if pair is None:
            return
        match message:
            case messages.Up():
                pair.bobs = Side(up=True)
                self.part(pair, "bob's worker has started anew")
                self._link(pair)
            case messages.Down():
                pair.bobs = Side()
                self.part(pair, "bob's worker has ended")
            case messages.Installed(_, model):
                pair.bobs.models.add(model)
                self.stock(pair)
            case messages.Paired(_, token) if token == pair.token:
                pair.bobs.linked = True
                self._linked(pair)
            case messages.Unpaired(_, token) if token == pair.token:
                self.part(pair, "bob's worker has lost the link")
            case messages.Claimed(_, token) if token == pair.token:
                self._wait_for_room(pair, message)
                self._tasks.start(self._claimed(pair, message))
            case messages.Stocked(_, token, ticket, good) if token == pair.token:
                if good:
                    self._expanded(pair, ticket)
                else:
                    self._spoiled(pair, ticket)

    def stock(self, pair: Pair) -> None:
        """Have the tickets made ready that a pair should have and has not."""
        if pair.number not in self._stocking and self._lease(pair):
            self._stocking.add(pair.number)
            self._tasks.start(self._stock(pair))

    def _of(self, message: messages.FromBob) -> Pair | None:
        number = getattr(message, "worker", -1)
        return self.pairs[number] if 0 <= number < len(self.pairs) else None

    def _link(self, pair: Pair) -> None:
        if self.connected and pair.mine.up and pair.bobs.up and not pair.token:
            pair.token = secrets.token_bytes(worker_calls.TOKEN_BYTES)
            self._linking[pair.number] = time.monotonic()
            pair.worker.call(worker_calls.Pair(pair.token))
            self._say(messages.Pair(pair.number, pair.token))

    def _linked(self, pair: Pair) -> None:
        if pair.linked:
            self._house.log("pair_linked", worker=pair.number)
            self.stock(pair)
            self._changed()

    def _lease(self, pair: Pair) -> tuple[Line, int] | None:
        """What to take from the pool for a pair next, if anything."""
        if not pair.linked or not self.connected or pair.number in self._unclaimed:
            return None
        now = time.monotonic()
        sizes = {
            (model, size): plan.bytes_stocked
            for model in sorted(pair.models & self._crew.served.keys())
            for size, plan in self._crew.served[model].plans.items()
        }
        used = {line: self._usage.of(line, now) for line in sizes}
        return next_lease(sizes, pair.held, self.levels, used, self._memory)

    async def _stock(self, pair: Pair) -> None:
        try:
            while lease := self._lease(pair):
                (line, count), token = lease, pair.token
                tickets = await asyncio.to_thread(self._house.lease, *line, count)
                self.levels[line] = self.levels.get(line, 0) - len(tickets) if tickets else 0
                if pair.token != token or not self.connected or line[0] not in self._crew.served:
                    self._burn(pair, tickets)
                elif tickets:
                    for ticket in tickets:
                        pair.give(ticket)
                    self._say(messages.Stock(pair.number, token, tickets))
        finally:
            self._stocking.discard(pair.number)

    def _wait_for_room(self, pair: Pair, said: messages.Claimed) -> None:
        """Where bob's disk is full no other tickets are taken, to be burned: he is asked for the same ones again."""
        if not said.full:
            if self._unclaimed.get(pair.number) == []:
                del self._unclaimed[pair.number]
                self.stock(pair)
            return
        if pair.number not in self._unclaimed:
            self._house.log("no_room_at_bob", worker=pair.number)
        missing = [ticket for ticket in said.asked if ticket not in said.tickets]
        self._unclaimed.setdefault(pair.number, []).append(missing)

    def _ask_again(self, pair: Pair) -> None:
        waiting = self._unclaimed.get(pair.number)
        if not waiting:
            return  # all is well, or he has been asked and has not answered yet
        self._unclaimed[pair.number] = []
        asked = [left for tickets in waiting if (left := [ticket for ticket in tickets if pair.has(ticket)])]
        for tickets in asked:
            self._say(messages.Stock(pair.number, pair.token, tickets))
        if not asked:  # their model has gone
            del self._unclaimed[pair.number]

    async def _claimed(self, pair: Pair, said: messages.Claimed) -> None:
        """Bob has taken tickets: only now may alice's worker have them."""
        taken = [ticket for ticket in said.tickets if pair.has(ticket)]
        vouchers = await asyncio.to_thread(self._house.vouchers, taken)
        if pair.token != said.token:
            return
        for voucher in vouchers:
            if pair.has(voucher.ticket):  # bob's worker may have found it spoiled meanwhile
                pair.worker.call(worker_calls.Stock(voucher))
        missing = [] if said.full else [ticket for ticket in said.asked if ticket not in said.tickets]
        if refused := [ticket for ticket in missing if pair.spoiled(ticket)]:
            self._house.log("tickets_unknown_to_bob", worker=pair.number, count=len(refused))
            self._burn(pair, refused)
            self.stock(pair)

    def _expanded(self, pair: Pair, ticket: Ticket) -> None:
        if pair.expanded(ticket):
            self._changed()

    def _spoiled(self, pair: Pair, ticket: Ticket) -> None:
        if pair.spoiled(ticket):
            pair.worker.call(worker_calls.Drop([ticket]))
            self._burn(pair, [ticket])
            self.stock(pair)

    def _burn(self, pair: Pair, tickets: list[Ticket]) -> None:
        """Tickets that were taken will not be used: bob, who may not have come to take them, does not keep them."""
        if tickets:
            self._say(messages.Drop(pair.number, tickets))
            self._house.metrics.burned.inc(len(tickets))
            self._tasks.start(asyncio.to_thread(self._house.discard, tickets))
