"""The sessions of clients at a party, and the requests whose shares it holds."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tacit.errors import CodecError, PeerError
from tacit.party import messages, worker_calls
from tacit.party.channel import Channel
from tacit.party.cluster_file import ClusterFile
from tacit.party.crew import Served
from tacit.party.messages import Answer, Ask, Cancel, ClientReply, Describe, Described, Refused, RequestId
from tacit.party.metrics import Metrics
from tacit.party.refusal import Reason, Refusal
from tacit.party.session import Session
from tacit.party.tickets import Ticket
from tacit.wire import Array, Kind

OUTSTANDING = 1024
OUTSTANDING_BYTES = 1 << 28
"""Requests of one client that may wait for their answers, and bytes of their shares."""
_SLACK_BYTES = 1 << 16
_WORD = np.dtype(np.int64)


@dataclass(repr=False, eq=False)
class Held:
    """A request whose shares this party holds.

    Args:
        id: the session and the request's number in it.
        channel: to the client.
        client: its name.
        ask: what it asked.
        shares: this party's, of the inputs; none where it was sent a seed.
        arrived: when it came.
        unwanted: whether the client does not want the answer any more.
    """

    id: RequestId
    channel: Channel
    client: str
    ask: Ask
    shares: Sequence[Array]
    arrived: float
    unwanted: bool = False

    @property
    def nbytes(self) -> int:
        """What its shares take."""
        return sum(one.nbytes for one in self.shares)


class Clients:
    """See the module.

    Args:
        cluster: who may ask what.
        served: the models that are served, by digest.
        asked: called with a request that is in order.
        given_up: called with a request whose client does not want the answer any more, or has left.
        metrics: where requests are counted.
    """

    def __init__(
        self,
        cluster: ClusterFile,
        served: Mapping[str, Served],
        asked: Callable[[Held], None],
        given_up: Callable[[Held], None],
        metrics: Metrics,
    ) -> None:
        self._cluster, self._served, self._metrics = cluster, served, metrics
        self._asked, self._given_up = asked, given_up
        self._outstanding: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self.requests: dict[RequestId, Held] = {}
        self.closed: Refusal | None = None
        """Why no request is taken any more, if that is so."""

    async def serve(self, channel: Channel, session: Session) -> None:
        """Answer a client until it leaves.

        Raises:
            PeerError: it has left, its session has expired, or `CodecError`: it does not keep to the protocol.
        """
        last = -1
        try:
            while True:
                frame = await channel.receive(Kind.CALL, limit=self._largest_frame())
                message = messages.decode(messages.client_calls, frame.body, session.caller)
                session.require_live(time.monotonic())
                match message:
                    case Describe(number, name):
                        self._say(channel, self._described(number, name, session.caller))
                    case Cancel(number):
                        self._give_up((session.id, number))
                    case Ask(number):
                        if number <= last:
                            raise CodecError(f"{session.caller} used a request's number twice")
                        last = number
                        id = (session.id, number)
                        self._take(Held(id, channel, session.caller, message, frame.arrays, time.monotonic()))
        finally:
            for id in [id for id in self.requests if id[0] == session.id]:
                self._give_up(id)

    def answer(self, held: Held, run: int, scales: list[int], outputs: Sequence[Array], start: int) -> None:
        """Send a client its rows of a batch's results."""
        if not held.unwanted:
            rows = [output[start : start + held.ask.rows] for output in outputs]
            self._say(held.channel, Answer(held.ask.number, run, scales), rows)
            self._count(held, "answered")
            seconds = time.monotonic() - held.arrived
            self._metrics.of(self._metrics.request_seconds, self._name(held)).observe(seconds)

    def refuse(self, held: Held, refusal: Refusal) -> None:
        """Tell a client that there will be no answer."""
        if not held.unwanted:
            self._say(held.channel, Refused(held.ask.number, refusal))
            self._count(held, refusal.reason.value)

    def forget(self, id: RequestId) -> Held | None:
        """A request is over; what was held of it."""
        held = self.requests.pop(id, None)
        if held:
            self._outstanding[held.client] -= 1
            self._bytes[held.client] -= held.nbytes
        return held

    def _take(self, held: Held) -> None:
        if refusal := self._refusal(held):
            self.refuse(held, refusal)
            return
        self.requests[held.id] = held
        self._outstanding[held.client] += 1
        self._bytes[held.client] += held.nbytes
        self._asked(held)

    def _refusal(self, held: Held) -> Refusal | None:
        """Why neither party could take such a request."""
        ask, served = held.ask, self._served.get(held.ask.model)
        if self.closed:
            return self.closed
        if served is None:
            return Refusal(Reason.GONE, "this version of the model is not served any more")
        name = served.part.name
        if not self._cluster.may_ask(held.client, name):
            return _forbidden(held.client, name)
        if self._outstanding[held.client] >= OUTSTANDING or self._bytes[held.client] > OUTSTANDING_BYTES:
            count = self._outstanding[held.client]
            return Refusal(Reason.BUSY, f"{count} requests of {held.client} wait for their answers: send fewer", 1.0)
        wanted = [] if ask.seed else [(_WORD, (ask.rows, *one.item_shape)) for one in served.part.inputs]
        if [(one.dtype, one.shape) for one in held.shares] != wanted:
            return Refusal(Reason.INVALID, f"these are not shares of {ask.rows} inputs of {name!r}")
        return None

    def _described(self, number: int, name: str, client: str) -> Described | Refused:
        if not self._cluster.may_ask(client, name):
            return Refused(number, _forbidden(client, name))
        parts = [one.part for one in self._served.values() if one.part.name == name]
        if not parts:
            gone = Refusal(Reason.GONE, f"model {name!r} is not loaded: ask its owner to load it")
            return Refused(number, self.closed or gone)
        part, largest = parts[-1], self._cluster.clients[client].largest_batch
        inputs = [(list(one.item_shape), one.whole) for one in part.inputs]
        return Described(number, part.digest, inputs, min(part.batch_sizes[-1], largest))

    def _give_up(self, id: RequestId) -> None:
        if held := self.requests.get(id):
            held.unwanted = True
            self._count(held, "cancelled")
            self._given_up(held)

    def _largest_frame(self) -> int:
        return _SLACK_BYTES + max((one.largest_request for one in self._served.values()), default=0)

    def _count(self, held: Held, outcome: str) -> None:
        self._metrics.of(self._metrics.requests, self._name(held), outcome).inc()

    def _name(self, held: Held) -> str:
        served = self._served.get(held.ask.model)
        return served.part.name if served else "unknown"

    def _say(self, channel: Channel, message: ClientReply, tensors: Sequence[Array] = ()) -> None:
        # Whether a client has left, or does not read what it is sent, is for its session to find out.
        with contextlib.suppress(PeerError):
            channel.send(Kind.REPLY, tensors, messages.encode(message))


def run_of(
    batch: int, ticket: Ticket, rows: list[int], requests: Sequence[Held | None]
) -> tuple[worker_calls.Run, list[Array]]:
    """What tells a worker to run a batch, and the shares that go with it.

    Args:
        batch: its number.
        ticket: what to use.
        rows: of each request.
        requests: those of the batch; ``None`` for one whose shares this party does not have.
    """
    absent = [position for position, held in enumerate(requests) if held is None]
    seeds = {position: held.ask.seed for position, held in enumerate(requests) if held and held.ask.seed}
    shares = [one for held in requests if held for one in held.shares]
    return worker_calls.Run(batch, ticket, rows, absent, seeds), shares


def _forbidden(client: str, name: str) -> Refusal:
    return Refusal(Reason.FORBIDDEN, f"cluster.toml does not let {client} ask model {name!r}")
