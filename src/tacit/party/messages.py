"""What clients and owners say to a party, and what alice and bob say to each other; msgpack in the body of a frame.

A session has one purpose, and each purpose has its own messages: what does not belong to it does not parse. Tensors
travel with the frame: shares of inputs with `Ask`, of results with `Answer`, a part of a model with `Push` and
`Pulled`.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from tacit.party.jobs.agreeing import JobFromAlice, JobFromBob
from tacit.party.jobs.requests import JobCall, JobReply
from tacit.party.pool import Holding
from tacit.party.refusal import Refusal
from tacit.party.tickets import BatchSize, Digest, Ticket
from tacit.party.worker_calls import Seed, Token
from tacit.wire import parsed

Number = Annotated[int, Meta(ge=0, lt=1 << 62)]
Name = Annotated[str, Meta(min_length=1, max_length=63)]
SessionId = Annotated[bytes, Meta(min_length=32, max_length=32)]
RequestId = tuple[SessionId, Number]
"""A session and the request's number in it: the same at alice and at bob."""
_Size = Annotated[int, Meta(ge=0, le=1 << 32)]
_Count = Annotated[int, Meta(ge=0, lt=1 << 31)]


class Describe(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A client asks what a model takes."""

    number: Number
    model: Name


class Described(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """What a model takes.

    Args:
        number: of the question.
        model: the digest of the version that is served.
        inputs: for each input, the shape of an item and whether it is whole numbers.
        largest: rows that one request may have.
    """

    number: Number
    model: Digest
    inputs: list[tuple[list[_Size], bool]]
    largest: int


class Ask(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A client asks for a prediction; its shares of the inputs come with this, or are what a seed generates.

    Args:
        number: of the request, used once in the session, the same at alice and bob.
        model: the digest that `Described` gave.
        rows: inputs in the batch.
        deadline_ms: how long an answer is of use.
        seed: the shares of each input in turn are the next words of `tacit.ring.prg.Prg` under this seed, and none
            come with this. Secret.
    """

    number: Number
    model: Digest
    rows: BatchSize
    deadline_ms: Annotated[float, Meta(gt=0)]
    seed: Seed | None = None

    def __repr__(self) -> str:
        return f"Ask(number {self.number}, {self.rows} rows of {self.model[:12]})"


class Cancel(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A client does not want the answer any more."""

    number: Number


class Answer(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A prediction; shares of the results come with this.

    Args:
        number: of the request.
        run: which run gave it. Shares of different runs do not belong together.
        scales: the results' fractional bits.
    """

    number: Number
    run: Number
    scales: list[Annotated[int, Meta(ge=0, le=62)]]


class Refused(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A request gets no answer."""

    number: Number
    refusal: Refusal


ClientCall = Describe | Ask | Cancel
ClientReply = Described | Answer | Refused


class Push(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """An owner sends this party's part of a model, which comes with this.

    Args:
        part: the body that `tacit.party.models.pack` gave.
    """

    part: bytes

    def __repr__(self) -> str:
        return "Push()"


class Pull(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """An owner wants this party's part of a model of its own; of its newest version, if none is named."""

    name: Name
    model: Digest | None = None


class Pulled(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """This party's part of a model, which comes with this."""

    part: bytes

    def __repr__(self) -> str:
        return "Pulled()"


class List(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """An owner wants to know which models of its own are here."""


class Listed(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A model version.

    Args:
        name: what its owner calls it.
        model: its digest.
        loaded: whether it is served.
        tickets: how many are ready, by batch size.
    """

    name: Name
    model: Digest
    loaded: bool
    tickets: dict[int, int]


class Models(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """The models of an owner, the oldest version first."""

    models: list[Listed]


class Load(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """An owner has the newest version of a model served, or, if it is not ``loaded``, served no longer."""

    name: Name
    loaded: bool


class Delete(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """An owner has this party forget every version of a model, and its tickets."""

    name: Name


class Done(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """What the owner asked for has happened."""

    model: Digest | None = None


class Failed(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """What the owner asked for has not happened."""

    refusal: Refusal


OwnerCall = Push | Pull | List | Load | Delete | JobCall
OwnerReply = Done | Pulled | Models | Failed | JobReply


class Holdings(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """What is in the sender's pool: the first message of either side, before any ticket is taken; bob says it again
    every ten seconds."""

    holdings: list[Holding]


class Status(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Sent every second, so that silence means that the sender is gone.

    Args:
        stopping: whether the sender refuses new requests.
        per_minute: how many tickets come in a minute, by model and batch size; bob knows.
        has: the models that the sender keeps.
    """

    stopping: bool = False
    per_minute: list[tuple[Digest, BatchSize, float]] = []
    has: list[Digest] = []


class Serve(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Alice serves these models, and no others."""

    models: list[Digest]


class Up(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A worker of bob's has started, with no model and no link."""

    worker: _Count


class Down(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A worker of bob's has ended."""

    worker: _Count


class Installed(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A worker of bob's has a model ready."""

    worker: _Count
    model: Digest


class Pair(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Bob's worker is to call alice's of the same number."""

    worker: _Count
    token: Token


class Paired(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Bob's worker has."""

    worker: _Count
    token: Token


class Unpaired(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Bob's worker could not, or its link has broken; what it had stocked is thrown away."""

    worker: _Count
    token: Token


class Stock(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Alice has taken these tickets for a pair of workers: bob is to take them, too.

    Args:
        worker: of the pair.
        token: of the pair's link.
        tickets: of one model and batch size.
    """

    worker: _Count
    token: Token
    tickets: list[Ticket]


class Claimed(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Bob has taken tickets as he was asked to, and his worker expands them.

    Those that are missing he does not have; or, if his disk is ``full``, he may have them and cannot note that they are
    taken: he is to be asked for them again, and for no others until he has taken them.

    Args:
        worker: of the pair.
        token: of the pair's link.
        asked: those he was asked to take.
        tickets: those that he took.
        full: whether his disk was too full for the others.
    """

    worker: _Count
    token: Token
    asked: list[Ticket]
    tickets: list[Ticket]
    full: bool = False


class Stocked(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Bob's worker has a ticket ready; or, if it is not ``good``, never will."""

    worker: _Count
    token: Token
    ticket: Ticket
    good: bool


class Drop(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Alice will not use these tickets that bob's worker was given, or was to be given."""

    worker: _Count
    tickets: list[Ticket]


class Have(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Bob has his shares of these requests."""

    requests: list[RequestId]


class Begin(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Alice's worker runs a batch: bob's is to do so, too.

    Args:
        worker: of the pair.
        batch: the batch's number.
        ticket: what to use.
        requests: whose rows follow one another in this order.
        rows: of each.
        over: requests that are over, as `Over` says.
    """

    worker: _Count
    batch: Number
    ticket: Ticket
    requests: list[RequestId]
    rows: list[BatchSize]
    over: list[RequestId] = []


class Absent(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Bob ran a batch with zeros in the place of these requests, whose shares he does not have."""

    batch: Number
    requests: list[RequestId]


class Broke(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Bob's worker has not run a batch to its end: nobody gets his shares of its results."""

    batch: Number


class Over(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Alice is done with these requests: answered, refused or cancelled. Bob forgets their shares."""

    requests: list[RequestId]


class Sound(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Alice measures how far away bob is: he sends the number back at once."""

    number: Number


class Echo(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Bob sends a number back."""

    number: Number


class Trim(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Bob needs room: alice is to throw these tickets away, before he does."""

    tickets: list[Ticket]


class Trimmed(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Alice has, but for those that she had taken from her pool already: bob is to take them, too.

    Args:
        asked: those that she was to throw away.
        tickets: those that she threw away.
    """

    asked: list[Ticket]
    tickets: list[Ticket]


FromAlice = Holdings | Status | Serve | Pair | Stock | Drop | Begin | Over | Sound | Trimmed | JobFromAlice
FromBob = (
    Holdings
    | Status
    | Up
    | Down
    | Installed
    | Paired
    | Unpaired
    | Claimed
    | Stocked
    | Have
    | Absent
    | Broke
    | Echo
    | Trim
    | JobFromBob
)

client_calls: msgspec.msgpack.Decoder[ClientCall] = msgspec.msgpack.Decoder(ClientCall)
client_replies: msgspec.msgpack.Decoder[ClientReply] = msgspec.msgpack.Decoder(ClientReply)
owner_calls: msgspec.msgpack.Decoder[OwnerCall] = msgspec.msgpack.Decoder(OwnerCall)
owner_replies: msgspec.msgpack.Decoder[OwnerReply] = msgspec.msgpack.Decoder(OwnerReply)
from_alice: msgspec.msgpack.Decoder[FromAlice] = msgspec.msgpack.Decoder(FromAlice)
from_bob: msgspec.msgpack.Decoder[FromBob] = msgspec.msgpack.Decoder(FromBob)

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()


def encode(message: ClientCall | ClientReply | OwnerCall | OwnerReply | FromAlice | FromBob) -> bytes:
    """The message as bytes."""
    return _encoder.encode(message)


def decode(decoder: msgspec.msgpack.Decoder[T], data: bytes, peer: str) -> T:
    """Read a message of one of the decoders above.

    Raises:
        CodecError: it does not parse, or does not belong to such a session.
    """
    return parsed(decoder, data, f"what {peer} sent")
