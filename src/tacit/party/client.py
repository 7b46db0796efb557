"""A client of the service, for asyncio: it shares its inputs between alice and bob, and alone sees the results.

`tacit.connect` gives a `tacit.party.connection.Connection`, which is the same for threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tacit.errors import CodecError, DeadlineExceeded, InputError, PeerError, TacitError
from tacit.identity import Identity, key_text
from tacit.party import calling, messages
from tacit.party.channel import Channel
from tacit.party.cluster_file import ALICE, BOB, ClusterFile
from tacit.party.messages import Answer, Ask, Cancel, ClientCall, Describe, Described
from tacit.party.refusal import Reason, Refusal
from tacit.party.session import Session
from tacit.party.session_messages import Purpose
from tacit.program.inputs import ModelInput, checked_inputs
from tacit.ring.fixed_point import encode
from tacit.ring.prg import SEED_BYTES, Prg
from tacit.wire import Array, Frame, Kind

TIMEOUT_S = 60.0
_GRACE_S = 2.0
"""How much longer than its deadline a request waits for the parties to say that it has passed."""
_BOTH = (ALICE, BOB)
Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Description:
    """What a model takes.

    Args:
        digest: the version that is served.
        inputs: the model's inputs.
        largest: rows that one request may have.
    """

    digest: str
    inputs: tuple[ModelInput, ...]
    largest: int


class _Refused(Exception):
    """A party's refusal, on its way to whoever asked."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text)
        self.refusal = refusal


@dataclass(eq=False)
class _Waiting:
    """A question on its way: what either party has answered."""

    future: asyncio.Future[None]
    answers: dict[int, dict[str, tuple[Described | Answer, Frame]]] = field(default_factory=dict)


class Client:
    """See the module. It calls the parties when it is first needed, and again when a session has ended.

    Args:
        cluster: where the parties are, and their keys.
        identity: the client's, whose name the cluster file knows.

    Raises:
        InputError: the cluster file knows no client with this key.
    """

    def __init__(self, cluster: ClusterFile, identity: Identity) -> None:
        names = [name for name, one in cluster.clients.items() if one.public == identity.public]
        if not names:
            raise InputError(f"cluster.toml has no client with the key {key_text(identity.public)}")
        self.name, self._cluster, self._identity = names[0], cluster, identity
        self._prg = Prg.fresh()
        self._session: _ClientSession | None = None
        self._opening = asyncio.Lock()
        self._descriptions: dict[str, Description] = {}

    async def describe(self, model: str) -> Description:
        """What a model takes.

        Raises:
            NotPermitted: this client may not ask it.
            Refused: it is not served, or the parties serve different versions just now.
            PeerError: a party is not there.
        """
        if model not in self._descriptions:
            session = await self._connected()
            try:
                self._descriptions[model] = await session.describe(model)
            except _Refused as error:
                raise error.refusal.error() from None
        return self._descriptions[model]

    async def ask(self, model: str, *inputs: Tensor, timeout: float = TIMEOUT_S) -> Tensor | Results:
        """Predict in secret. Cancelling this cancels the request.

        Args:
            model: the model's name.
            inputs: a batch for each of the model's inputs, of any size.
            timeout: seconds after which the answer is of no more use.

        Returns:
            The model's output as float32, a tuple where it has several, known to this client alone.

        Raises:
            InputError: the inputs are not what the model takes; RangeError: a number is out of range.
            Busy: too much is waiting, or this client asks too often; PoolEmpty: there is no correlated randomness. Both
                say when to retry.
            DeadlineExceeded: there was no answer in time.
            NotPermitted: this client may not ask this model.
            PeerError: a party is gone, or the batch failed twice.
        """
        if not 0 < timeout < float("inf"):
            raise InputError(f"a timeout of {timeout:g} seconds: give a positive number")
        try:
            async with asyncio.timeout(timeout + _GRACE_S):
                try:
                    return await self._ask(model, inputs, timeout)
                except _Refused as error:
                    if error.refusal.reason is not Reason.GONE:
                        raise
                # Another version is served now: ask what it takes, and ask it.
                self._descriptions.pop(model, None)
                return await self._ask(model, inputs, timeout)
        except _Refused as error:
            raise error.refusal.error() from None
        except TimeoutError:
            raise DeadlineExceeded(f"{model} has not answered within {timeout:g} seconds") from None

    async def close(self) -> None:
        """End the session; questions that are on their way fail."""
        if self._session:
            await self._session.close()
        self._session = None

    async def _ask(self, model: str, inputs: Sequence[Tensor], timeout: float) -> Tensor | Results:
        wanted = await self.describe(model)
        given = [encode(value).numpy() for value in checked_inputs(inputs, wanted.inputs, model)]
        rows, most = len(given[0]), wanted.largest
        if any(len(words) != rows for words in given):
            raise InputError("the inputs have different numbers of rows: give as many for each")
        session = await self._connected()
        if rows <= most:
            outputs = await session.ask(wanted.digest, given, timeout, self._prg)
        else:
            parts = [[words[start : start + most] for words in given] for start in range(0, rows, most)]
            answers = await _all([session.ask(wanted.digest, part, timeout, self._prg) for part in parts])
            outputs = tuple(torch.cat(columns) for columns in zip(*answers, strict=True))
        return outputs if len(outputs) > 1 else outputs[0]

    async def _connected(self) -> _ClientSession:
        if self._session and self._session.usable:
            return self._session
        async with self._opening:
            if self._session is None or not self._session.usable:
                if self._session:
                    await self._session.close()
                channels, session = await calling.call(self._cluster, self.name, self._identity, Purpose.CLIENT, _BOTH)
                self._session, self._descriptions = _ClientSession(channels, session), {}
            return self._session

    def __repr__(self) -> str:
        return f"Client({self.name})"


class _ClientSession:
    """One session with alice and bob."""

    def __init__(self, channels: dict[str, Channel], session: Session) -> None:
        self._channels, self._session = channels, session
        self._numbers = itertools.count()
        self._waiting: dict[int, _Waiting] = {}
        self._masks: tuple[bytes, Prg] | None = None
        self._readers = [asyncio.ensure_future(self._read(party, channel)) for party, channel in channels.items()]

    @property
    def usable(self) -> bool:
        """Whether questions can be asked."""
        now = time.monotonic()
        return now < self._session.expires and not any(channel.closed for channel in self._channels.values())

    async def describe(self, model: str) -> Description:
        """Ask both what a model takes."""
        number = next(self._numbers)
        with self._question(number) as waiting:
            for party in _BOTH:
                self._say(party, Describe(number, model))
            await waiting.future
        (alice, _), (bob, _) = (waiting.answers[0][party] for party in _BOTH)
        if not isinstance(alice, Described) or alice != bob:
            refusal = Refusal(Reason.BUSY, f"alice and bob serve different versions of {model!r} just now", 1.0)
            raise _Refused(refusal)
        inputs = tuple(ModelInput(tuple(shape), whole) for shape, whole in alice.inputs)
        return Description(alice.model, inputs, max(1, alice.largest))

    async def ask(self, model: str, inputs: Sequence[Array], timeout: float, prg: Prg) -> Results:
        """Ask for one request's results: alice's shares come of a seed, bob's are what is left of the inputs."""
        number, rows, (seed, hers) = next(self._numbers), len(inputs[0]), self._masks or _masks(prg)
        self._masks = None
        with self._question(number) as waiting:
            self._say(ALICE, Ask(number, model, rows, 1000 * timeout, seed))
            his = [words - hers.words(words.shape).numpy() for words in inputs]
            self._say(BOB, Ask(number, model, rows, 1000 * timeout), his)
            self._masks = _masks(prg)  # for the next request, while there is time
            try:
                await waiting.future
            except (asyncio.CancelledError, _Refused):
                for party in _BOTH:
                    with contextlib.suppress(PeerError):
                        self._say(party, Cancel(number))
                raise
        return _results(waiting, rows)

    async def close(self) -> None:
        """End it."""
        for reader in self._readers:
            reader.cancel()
        self._fail(PeerError("the session was closed"))
        for channel in self._channels.values():
            channel.abort()
        await asyncio.gather(*self._readers, return_exceptions=True)

    @contextlib.contextmanager
    def _question(self, number: int) -> Iterator[_Waiting]:
        waiting = self._waiting[number] = _Waiting(asyncio.get_running_loop().create_future())
        try:
            yield waiting
        finally:
            del self._waiting[number]

    def _say(self, party: str, call: ClientCall, tensors: Sequence[Array] = ()) -> None:
        self._channels[party].send(Kind.CALL, tensors, messages.encode(call))

    async def _read(self, party: str, channel: Channel) -> None:
        try:
            while True:
                frame = await channel.receive(Kind.REPLY)
                self._heard(party, messages.decode(messages.client_replies, frame.body, party), frame)
        except TacitError as error:
            self._fail(error)
            for one in self._channels.values():
                one.abort()

    def _heard(self, party: str, reply: messages.ClientReply, frame: Frame) -> None:
        waiting = self._waiting.get(reply.number)
        if waiting is None or waiting.future.done():
            return
        if isinstance(reply, messages.Refused):
            waiting.future.set_exception(_Refused(reply.refusal))
            return
        # A request whose batch failed is run again, and one of the two may have answered the first run already.
        run = reply.run if isinstance(reply, Answer) else 0
        answers = waiting.answers.setdefault(run, {})
        answers[party] = reply, frame
        if len(answers) == len(_BOTH):
            waiting.answers = {run: answers}
            waiting.future.set_result(None)

    def _fail(self, error: TacitError) -> None:
        for waiting in self._waiting.values():
            if not waiting.future.done():
                waiting.future.set_exception(error)


def _masks(prg: Prg) -> tuple[bytes, Prg]:
    """A new seed, and what generates a request's masks from it."""
    seed = prg.bytes(SEED_BYTES)
    return seed, Prg(seed).prepared()


def _results(waiting: _Waiting, rows: int) -> Results:
    """Put the two parties' shares together.

    Raises:
        CodecError: they are not shares of the same results, for as many rows as were asked.
    """
    (answers,) = waiting.answers.values()
    (alice, one), (bob, other) = (answers[party] for party in _BOTH)
    if not isinstance(alice, Answer) or not isinstance(bob, Answer) or alice.scales != bob.scales:
        raise CodecError("alice's and bob's shares are not of one result")
    if not len(alice.scales) == len(one.arrays) == len(other.arrays) > 0:
        raise CodecError("alice and bob sent different numbers of results")
    results = []
    for scale, left, right in zip(alice.scales, one.arrays, other.arrays, strict=True):
        if not left.dtype == right.dtype == np.int64 or left.shape != right.shape or left.shape[:1] != (rows,):
            raise CodecError("alice's and bob's shares are not of the rows that were asked")
        results.append(torch.from_numpy(((left + right) * 2.0**-scale).astype(np.float32)))
    return tuple(results)


async def _all(asked: Sequence[Coroutine[None, None, Results]]) -> list[Results]:
    """The results of several requests; if one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
