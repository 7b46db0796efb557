"""The provider's side of tickets: it draws two seeds, works out bob's corrections, sends them, and forgets all of it.

A ticket's name is on the provider's disk before anything of it exists (`tacit.party.tickets.DealtLedger`). Its seeds
and corrections never are: they live in memory from the moment they are drawn until alice and bob have them. A provider
that is killed meanwhile has dealt what both acknowledged; the rest is of no use to anybody, and its names are not used
again.

bob stores a ticket before alice is sent her seed, so whatever alice holds, bob holds.
"""

from __future__ import annotations

import queue
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from torch import Tensor

from tacit.errors import CodecError, DataError, InputError, PeerError, TacitError, one_line
from tacit.mpc.correlation import Correlation, Provider, layout
from tacit.party.cluster_file import PROVIDER
from tacit.party.dealing_messages import (
    Coming,
    Dealt,
    Message,
    Refused,
    Seeds,
    Stored,
    Want,
    decode,
    encode,
)
from tacit.party.loaded import PlannedModel
from tacit.party.models import ModelPart, weight_masks
from tacit.party.planned import Planned
from tacit.party.tickets import DealtLedger, Ticket
from tacit.party.transport import Link
from tacit.party.vault import Vault
from tacit.program.run import factors
from tacit.ring.prg import SEED_BYTES, Prg
from tacit.wire import Kind

T = TypeVar("T")
_UNACKNOWLEDGED = 1
"""How many tickets bob may be storing while the next is dealt."""
_SEEDS = 16
"""How many of alice's seeds travel together: she syncs her disk once for them."""
_AHEAD = 4
"""How many corrections may wait for the link."""
_MODELS = 4
"""How many models' masks stay in memory."""


@dataclass(frozen=True, repr=False)
class Draw:
    """One ticket's randomness, which exists here only.

    Args:
        alice, bob: their seeds.
        corrections: bob's tensors, those of a correlation at a time, worked out as they are asked for.
    """

    alice: bytes
    bob: bytes
    corrections: Iterator[list[Tensor]]

    def __repr__(self) -> str:
        return "Draw(hidden)"


def draw(correlations: Sequence[Correlation], weight_masks: Mapping[int, Tensor] = MappingProxyType({})) -> Draw:
    """Draw a ticket.

    Args:
        correlations: what it holds, in order.
        weight_masks: those of the loaded weights that the correlations refer to, by number.
    """
    alice, bob = (Prg.fresh().bytes(SEED_BYTES) for _ in range(2))
    provider = Provider(Prg(alice), Prg(bob), Prg.fresh())
    provider.weight_masks = dict(weight_masks)

    def corrections() -> Iterator[list[Tensor]]:
        for correlation in correlations:
            _, dealt = provider.deal(correlation)
            if dealt:
                yield [dealt[name] for name in layout(correlation).dealt]

    return Draw(alice, bob, corrections())


class Dealable(Planned):
    """What the provider deals tickets for."""

    @abstractmethod
    def draw(self, batch: int) -> Draw:
        """Draw a ticket.

        Raises:
            InputError: it does not run on batches of this size.
        """


class DealtModel(PlannedModel, Dealable):
    """A model version as the provider knows it: its programs, and the masks of its weights.

    Args:
        part: the provider's.
    """

    def __init__(self, part: ModelPart) -> None:
        super().__init__(part)
        if part.role != PROVIDER:
            raise InputError(f"the provider deals from its own part of a model, not from {part.role}'s")
        self._masks: dict[int, dict[int, Tensor]] = {}

    def draw(self, batch: int) -> Draw:
        """Draw a ticket.

        Raises:
            InputError: the model was not pushed for this batch size.
        """
        return draw(self.cost(batch).correlations, self._weight_masks(batch))

    def _weight_masks(self, batch: int) -> dict[int, Tensor]:
        variant = self.part.variant_of[batch]
        if variant not in self._masks:
            program = self.program(batch)
            shapes = [program.state[name] for name in factors(program.graph)]
            self._masks[variant] = dict(enumerate(weight_masks(self.part.secret, variant, shapes)))
        return self._masks[variant]


class Dealer:
    """The provider: models, the record of what it dealt, and the links over which it deals.

    A link is served by the thread that calls `serve_bob`; alice's is used by that thread too. One connection of each of
    them is in use, the newest.

    Args:
        vault: the provider's models.
        ledger: its record.
        others: what else it deals for, by digest; raises `InputError` for what it does not know.
    """

    def __init__(self, vault: Vault, ledger: DealtLedger, others: Callable[[str], Dealable] | None = None) -> None:
        self._vault, self._ledger, self._others = vault, ledger, others
        self._models: dict[str, Dealable] = {}
        self._guard, self._with_alice = threading.Lock(), threading.Lock()
        self._alice: Link | None = None
        self._stopping = threading.Event()
        self.dealing = False
        """Whether tickets are on their way."""

    def push(self, part: ModelPart) -> None:
        """Keep a model that its owner pushed; see `Vault.save`."""
        self._vault.save(part)

    def delete(self, digest: str) -> None:
        """Forget a model: no more tickets of it are dealt."""
        self._vault.delete(digest)
        with self._guard:
            self._models.pop(digest, None)

    def model(self, digest: str) -> Dealable:
        """A model, or something else, to deal for.

        Raises:
            InputError: it is not here.
            DataError: its file is damaged.
        """
        with self._guard:
            model = self._models.pop(digest, None) or self._found(digest)
            self._models[digest] = model  # the newest last
            while len(self._models) > _MODELS:
                del self._models[next(iter(self._models))]
        return model

    def _found(self, digest: str) -> Dealable:
        try:
            return DealtModel(self._vault.load(digest))
        except DataError:
            raise
        except InputError:
            if self._others is None:
                raise
        return self._others(digest)

    def attach_alice(self, link: Link) -> None:
        """Deal to alice over this link from now on, in the place of any other."""
        with self._with_alice:
            if self._alice is not None:
                self._alice.close()
            self._alice = link

    def serve_bob(self, link: Link) -> None:
        """Deal what bob wants until he is gone or `stop` is called.

        Raises:
            CodecError: he sent something that is no such wish.
        """
        try:
            while not self._stopping.is_set():
                message = decode(link.receive(Kind.CALL).body)
                if not isinstance(message, Want):
                    raise CodecError("bob sent another message than what he wants")
                self.dealing = True
                link.send(Kind.REPLY, body=encode(self._deal(link, message)))
                self.dealing = False
        except CodecError:
            raise
        except PeerError:
            return
        finally:
            self.dealing = False
            link.close()

    def stop(self) -> None:
        """Finish the tickets that are on their way, and deal no more."""
        self._stopping.set()

    def close(self) -> None:
        """Close alice's link and the record."""
        with self._with_alice:
            if self._alice is not None:
                self._alice.close()
            self._alice = None
        self._ledger.close()

    def _deal(self, bob: Link, want: Want) -> Dealt:
        result = Dealt([], [])
        try:
            if self._alice is None:
                raise PeerError("alice is not connected to the provider")
            model = self.model(want.model)
            model.cost(want.batch)
            tickets = self._ledger.next(want.model, want.batch, want.count, want.above)
        except TacitError as error:
            result.reason = one_line(error)
            return result
        unacknowledged: deque[tuple[Ticket, bytes]] = deque()
        stored: dict[Ticket, bytes] = {}
        for ticket in tickets:
            if result.reason or self._stopping.is_set():
                break
            draw = model.draw(want.batch)
            bob.send(Kind.SEED, body=encode(Coming(ticket, draw.bob)))
            for tensors in ahead(draw.corrections, _AHEAD):
                bob.send(Kind.CORRECTIONS, tensors)
            unacknowledged.append((ticket, draw.alice))
            if len(unacknowledged) > _UNACKNOWLEDGED:
                self._acknowledged(bob, unacknowledged, stored, result)
            if len(stored) >= _SEEDS:
                self._to_alice(stored, result)
        while unacknowledged:
            self._acknowledged(bob, unacknowledged, stored, result)
        self._to_alice(stored, result)
        return result

    def _acknowledged(
        self, bob: Link, waiting: deque[tuple[Ticket, bytes]], stored: dict[Ticket, bytes], result: Dealt
    ) -> None:
        """Hear from bob about the oldest ticket that he has not answered for."""
        answer = decode(bob.receive(Kind.REPLY).body)
        ticket, seed = waiting.popleft()
        if isinstance(answer, Stored):
            stored[ticket] = seed
        elif isinstance(answer, Refused):
            result.reason = f"bob: {answer.reason}"
        else:
            raise CodecError("bob answered something else than whether he stored a ticket")

    def _to_alice(self, stored: dict[Ticket, bytes], result: Dealt) -> None:
        """Send alice the seeds of the tickets that bob has."""
        if not stored:
            return
        tickets = list(stored)
        try:
            with self._with_alice:
                answer = self._asked_alice(Seeds(list(stored.items())))
            if not isinstance(answer, Stored):
                raise PeerError(f"alice: {answer.reason}" if isinstance(answer, Refused) else "alice answered nonsense")
            result.complete += tickets
        except PeerError as error:
            result.lost += tickets
            result.reason = one_line(error)
        stored.clear()

    def _asked_alice(self, seeds: Seeds) -> Message:
        link = self._alice
        if link is None:
            raise PeerError("alice is not connected to the provider")
        try:
            link.send(Kind.SEED, body=encode(seeds))
            return decode(link.receive(Kind.REPLY).body)
        except PeerError:
            link.close()
            self._alice = None
            raise


def ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The items, of which up to ``count`` are made ahead by another thread; what making one raises is raised here."""
    done = object()
    made: queue.Queue[object] = queue.Queue(count)
    abandoned = threading.Event()
    failure: list[BaseException] = []

    def make() -> None:
        try:
            for item in items:
                if abandoned.is_set():
                    return
                made.put(item)
        except BaseException as error:
            failure.append(error)
        made.put(done)

    thread = threading.Thread(target=make, name="dealing", daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not done:
            yield item  # type: ignore[misc]
        if failure:
            raise failure[0]
    finally:
        abandoned.set()
        while thread.is_alive():
            try:
                made.get(timeout=0.01)
            except queue.Empty:
                continue
