"""What bob, alice and the provider say to each other about tickets.

::

    bob → provider     Want                                        have tickets dealt
    provider → bob     Coming, then the corrections' frames        one ticket, its seed first
    bob → provider     Stored or Refused                           it is on his disk, or is not
    provider → alice   Seeds                                       of tickets that bob has stored
    alice → provider   Stored or Refused                           they are on her disk, or none of them is
    provider → bob     Dealt                                       which tickets both have; he discards the rest

A seed is secret: no representation of a message shows it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from tacit.party.tickets import BatchSize, Digest, Ticket
from tacit.ring.prg import SEED_BYTES
from tacit.wire import parsed

MAX_TICKETS = 1024
"""As many as one message may name."""
Seed = Annotated[bytes, Meta(min_length=SEED_BYTES, max_length=SEED_BYTES)]
Tickets = Annotated[list[Ticket], Meta(max_length=MAX_TICKETS)]


class Want(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Deal tickets.

    Args:
        model: the digest of the model version.
        batch: the batch size.
        count: how many.
        above: the largest serial that alice or bob has seen.
    """

    model: Digest
    batch: BatchSize
    count: Annotated[int, Meta(ge=1, le=MAX_TICKETS)]
    above: Annotated[int, Meta(ge=-1, lt=1 << 61)] = -1


class Coming(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A ticket's corrections follow.

    Args:
        ticket: which.
        seed: bob's.
    """

    ticket: Ticket
    seed: Seed

    def __repr__(self) -> str:
        return f"Coming({self.ticket})"


class Seeds(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Tickets for alice, with her seeds."""

    tickets: Annotated[list[tuple[Ticket, Seed]], Meta(min_length=1, max_length=MAX_TICKETS)]

    def __repr__(self) -> str:
        return f"Seeds({len(self.tickets)} tickets)"


class Stored(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """What came last is on the disk."""


class Refused(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """What came last was not kept.

    Args:
        reason: one line, without secrets.
    """

    reason: str


class Dealt(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """The end of what was wanted.

    Args:
        complete: the tickets that both parties have.
        lost: those that bob has and alice has not.
        reason: why there are fewer than were wanted, if there are; one line.
    """

    complete: Tickets
    lost: Tickets
    reason: str = ""


Message = Want | Coming | Seeds | Stored | Refused | Dealt

_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The message as bytes."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes) -> Message:
    """Read a message.

    Raises:
        CodecError: it does not parse.
    """
    return parsed(_decoder, data, "a message about tickets")
