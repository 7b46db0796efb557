"""What a party's front process says to its workers, and what they answer; msgpack in the body of a frame.

A worker carries calls out in the order in which they come. `Run` comes with the shares of the inputs, request by
request, and `Ran` with those of the results of the whole batch.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from tacit.party.tickets import BatchSize, Digest, Ticket
from tacit.party.vouchers import Voucher
from tacit.ring.prg import SEED_BYTES
from tacit.wire import parsed

TOKEN_BYTES = 32
Token = Annotated[bytes, Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
Seed = Annotated[bytes, Meta(min_length=SEED_BYTES, max_length=SEED_BYTES)]


class Setup(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Who the worker is; the first call.

    Args:
        role: ``alice`` or ``bob``.
        number: of the worker; it pairs with the other party's of the same number.
        seed: of the party's identity: secret.
        peer: the other party's public key.
        address: where bob reaches alice.
        patience_s: how long the other worker may be silent in a run.
    """

    role: str
    number: int
    seed: bytes
    peer: bytes
    address: str
    patience_s: float

    def __repr__(self) -> str:
        return f"Setup({self.role}, worker {self.number})"


class Install(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Make a model ready to run; its part comes with this call.

    Args:
        part: the body that `tacit.party.models.pack` gave.
    """

    part: bytes

    def __repr__(self) -> str:
        return "Install()"


class Remove(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Forget a model, and the tickets for it."""

    model: Digest


class Pair(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Leave any link to the other worker, throw away what was stocked, and make a new link.

    Args:
        token: both sides of the link must know it.
    """

    token: Token


class Stock(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Expand a ticket, ahead of the run that it is for."""

    voucher: Voucher


class Drop(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Throw tickets away that are not to be used; what is not stocked, or not yet, is passed over."""

    tickets: list[Ticket]


class Run(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Run a batch.

    Args:
        batch: its number.
        ticket: what to use; it has been stocked.
        rows: of each request.
        absent: positions of requests whose shares this party does not have; zeros take their place.
        seeds: by position, what generates the shares of a request, in the place of shares that come with this. Secret.
    """

    batch: int
    ticket: Ticket
    rows: list[BatchSize]
    absent: list[int] = []
    seeds: dict[int, Seed] = {}

    def __repr__(self) -> str:
        return f"Run(batch {self.batch}, {self.ticket}, rows {self.rows})"


class Ping(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Say that you hear."""


Call = Setup | Install | Remove | Pair | Stock | Drop | Run | Ping


class Plan(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What a batch of one size takes.

    Args:
        size: the batch size.
        rounds: messages to the other worker.
        bytes_online: bytes of these.
        bytes_dealt: bytes of a ticket's corrections.
        bytes_stocked: memory that a ticket takes once it is expanded.
    """

    size: int
    rounds: int
    bytes_online: int
    bytes_dealt: int
    bytes_stocked: int


class Installed(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A model is ready."""

    model: Digest
    plans: list[Plan]


class Paired(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """The link is there."""

    token: Token


class Unpaired(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """There is no link; everything that was stocked is thrown away.

    Args:
        token: of the `Pair` that failed, or whose link broke.
        text: why; no secrets.
    """

    token: Token
    text: str


class Stocked(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A ticket is ready to be used."""

    ticket: Ticket


class Spoiled(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A ticket cannot be used, and never will be."""

    ticket: Ticket
    text: str


class Ran(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A batch has run; shares of its results come with this answer.

    Args:
        batch: its number.
        scales: the results' fractional bits.
        seconds: from the first step to the last.
        waited_s: of these, waiting for the other worker.
        rounds: messages sent.
        bytes_online: bytes of these.
    """

    batch: int
    scales: list[int]
    seconds: float
    waited_s: float
    rounds: int
    bytes_online: int


class Broke(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A batch has failed; its ticket is used up. `Unpaired` follows.

    Args:
        batch: its number.
        text: why; no secrets.
    """

    batch: int
    text: str


class Pong(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """The worker hears."""


Answer = Installed | Paired | Unpaired | Stocked | Spoiled | Ran | Broke | Pong

_calls: msgspec.msgpack.Decoder[Call] = msgspec.msgpack.Decoder(Call)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Call | Answer) -> bytes:
    """The message as bytes."""
    return msgspec.msgpack.encode(message)


def decode_call(data: bytes) -> Call:
    """Read a call.

    Raises:
        CodecError: it does not parse.
    """
    return parsed(_calls, data, "a call to a worker")


def decode_answer(data: bytes) -> Answer:
    """Read an answer.

    Raises:
        CodecError: it does not parse.
    """
    return parsed(_answers, data, "an answer of a worker")
