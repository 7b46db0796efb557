"""The parties' side of tickets: bob asks the provider for what his pool lacks, alice takes the seeds sent to her.

Each runs in a thread of its own beside the serving of requests, and neither is waited for by a request unless a pool is
empty. What to ask for is decided by `tacit.party.refill`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from tacit.errors import CodecError, CorrelationError, PeerError, StorageFull, one_line
from tacit.party.dealing_messages import Coming, Dealt, Refused, Seeds, Stored, Want, decode, encode
from tacit.party.planned import Planned, dealt_items
from tacit.party.pool import ROW_BYTES, PoolStore
from tacit.party.refill import Line, Rate, Refill, Trim, Wanted, next_step
from tacit.party.tickets import Ticket
from tacit.party.transport import Link
from tacit.wire import Kind, head_bytes

_IDLE_S = 1.0
"""How long a full pool is left alone, unless somebody says that it is not full any more."""
_AGAIN_S = (0.2, 0.5, 1.0, 2.0, 5.0)
"""How long to wait after the first failure to reach the provider, the second, and so on."""


def ticket_bytes(model: Planned, batch: int) -> int:
    """What a ticket takes on bob's disk, or a few bytes more: larger serials take more."""
    items = model.items(batch)
    return ROW_BYTES + len(head_bytes(Kind.CORRECTIONS, 1 << 62, items)) + sum(item.nbytes for item in items)


def fetch(link: Link, store: PoolStore, model: Planned, want: Want) -> Dealt:
    """Have tickets dealt and store them: one exchange of bob's with the provider.

    Args:
        link: to the provider.
        store: bob's pool.
        model: the model that is wanted.
        want: which tickets, and how many.

    Returns:
        Which tickets both parties have now; those that only bob has are thrown away already.

    Raises:
        PeerError: the provider is gone. What came of this is thrown away: it may never have come to alice.
        StorageFull: the disk is too full to throw away what alice has not; the pool does it as soon as it can.
        CodecError: it sent something else.
        DataError: the pool cannot be used.
    """
    stored: list[Ticket] = []
    try:
        return _fetched(link, store, model, want, stored)
    except BaseException:
        store.discard(stored)
        raise


def _fetched(link: Link, store: PoolStore, model: Planned, want: Want, stored: list[Ticket]) -> Dealt:
    link.send(Kind.CALL, body=encode(want))
    while True:
        frame = link.receive(Kind.SEED, Kind.REPLY)
        message = decode(frame.body)
        if isinstance(message, Dealt) and frame.kind is Kind.REPLY:
            stored.clear()
            store.discard(message.lost)
            return message
        if not isinstance(message, Coming) or frame.kind is not Kind.SEED:
            raise CodecError(f"{link.peer} sent something else than a ticket")
        if (message.ticket.model, message.ticket.batch) != (want.model, want.batch):
            raise CodecError(f"{link.peer} sent a ticket that was not asked for")
        answer = _stored(link, store, model, message)
        if isinstance(answer, Stored):
            stored.append(message.ticket)
        link.send(Kind.REPLY, body=encode(answer))


def take_seeds(link: Link, store: PoolStore) -> None:
    """Store alice's seeds as the provider sends them, until it is gone.

    Args:
        link: to the provider.
        store: alice's pool.

    Raises:
        PeerError: the provider is gone.
        CodecError: it sent something else.
        DataError: the pool cannot be used.
    """
    while True:
        message = decode(link.receive(Kind.SEED).body)
        if not isinstance(message, Seeds):
            raise CodecError(f"{link.peer} sent something else than seeds")
        answer: Stored | Refused = Stored()
        try:
            store.put_seeds(dict(message.tickets))
        except (StorageFull, CorrelationError) as error:
            answer = Refused(one_line(error))
        link.send(Kind.REPLY, body=encode(answer))


class Refilling:
    """Keeps bob's pool filled.

    Args:
        dial: connects to the provider.
        store: bob's pool.
        trim: throws these tickets away at alice and gives those that she had not taken yet, before bob does the same
            with them.
        seen_by_alice: the largest serial that alice has seen of a line, -1 if none, as she said when the session began.
    """

    def __init__(
        self,
        dial: Callable[[], Link],
        store: PoolStore,
        trim: Callable[[list[Ticket]], list[Ticket]],
        seen_by_alice: Callable[[Line], int] = lambda line: -1,
    ) -> None:
        self._dial, self._store, self._trim, self._seen = dial, store, trim, seen_by_alice
        self._guard, self._rate = threading.Lock(), Rate()
        self._wanted: dict[Line, tuple[Wanted, Planned]] = {}
        self._woken, self._stopping = threading.Event(), threading.Event()
        self.trouble = ""

    def want(self, model: Planned, ahead: Mapping[int, int]) -> None:
        """Keep tickets of a model: so many ahead, by batch size. Planning it takes a moment, here and not later."""
        lines = {}
        for batch, count in ahead.items():
            line = (model.digest, batch)
            lines[line] = Wanted(line, count, ticket_bytes(model, batch)), model
        with self._guard:
            self._wanted |= lines
        self._woken.set()

    def forget(self, digest: str) -> None:
        """Keep no more tickets of a model."""
        with self._guard:
            self._wanted = {line: wanted for line, wanted in self._wanted.items() if line[0] != digest}

    def wake(self) -> None:
        """Look again at once: tickets were taken."""
        self._woken.set()

    def per_minute(self, model: str, batch: int) -> float:
        """How many tickets come in a minute; 0 if none came lately."""
        with self._guard:
            return self._rate.per_minute((model, batch), time.monotonic())

    def stop(self) -> None:
        """End `run` after the tickets that are on their way."""
        self._stopping.set()
        self._woken.set()

    def run(self) -> None:
        """Refill until `stop` is called; `trouble` says what is in the way, if something is.

        Raises:
            DataError: the pool cannot be used.
        """
        link, failures = None, 0
        try:
            while not self._stopping.is_set():
                self._woken.clear()
                try:
                    self._store.tidy()  # what alice has not is no part of what there is
                    link = link or self._dial()
                    busy, self.trouble = self._once(link)
                except (PeerError, StorageFull) as error:
                    if link is not None:
                        link.close()
                    link, busy, self.trouble = None, False, one_line(error)
                failures = failures + 1 if self.trouble else 0
                if not busy:
                    self._woken.wait(_AGAIN_S[min(failures, len(_AGAIN_S)) - 1] if failures else _IDLE_S)
        finally:
            if link is not None:
                link.close()

    def _once(self, link: Link) -> tuple[bool, str]:
        """Take one step; whether there may be another to take at once, and what is in the way of it."""
        with self._guard:
            wanted = dict(self._wanted)
        step = next_step(
            [one for one, _ in wanted.values()], self._store.levels(), self._store.limit_bytes, self._store.room
        )
        if isinstance(step, Trim):
            tickets = [Ticket(*step.line, serial) for serial in self._store.serials(*step.line)[-step.count :]]
            thrown = self._trim(tickets)
            self._store.discard(thrown)
            return bool(thrown), ""
        if not isinstance(step, Refill):
            return False, ""
        began = time.monotonic()
        want = Want(*step.line, step.count, max(self._seen(step.line), self._store.seen(*step.line)))
        dealt = fetch(link, self._store, wanted[step.line][1], want)
        with self._guard:
            self._rate.came(step.line, len(dealt.complete), began, time.monotonic())
        return not dealt.reason, dealt.reason


def _stored(link: Link, store: PoolStore, model: Planned, coming: Coming) -> Stored | Refused:
    """Store a ticket while it arrives."""
    corrections = _arriving(link, model, coming.ticket.batch)
    try:
        store.put(coming.ticket, coming.seed, corrections, model.items(coming.ticket.batch))
    except (StorageFull, CorrelationError) as error:
        deque(corrections, maxlen=0)  # what is on its way comes all the same
        return Refused(one_line(error))
    return Stored()


def _arriving(link: Link, model: Planned, batch: int) -> Iterator[Tensor]:
    for correlation in model.cost(batch).correlations:
        if items := dealt_items(correlation):
            yield from link.receive_tensors(Kind.CORRECTIONS, items)
