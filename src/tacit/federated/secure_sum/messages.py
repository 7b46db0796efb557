"""Messages of the masked sum, in frames of `tacit.wire`.

A frame's body is one message in msgpack, an array that starts with the message's name. It has one encoding: what does
not encode to the same bytes again is refused. A client's message stands in a `Signed` envelope; a vector travels as
the one tensor of its frame, and the message holds its digest. Sets of clients are bit masks, lowest bit first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, TypeAlias

import msgspec
import torch
from msgspec import Meta

from tacit import wire
from tacit.errors import CodecError, InputError
from tacit.federated.secure_sum.agreement import (
    DIGEST_BYTES,
    SEALED_BYTES,
    digest,
)
from tacit.federated.secure_sum.parameters import Sharing
from tacit.federated.secure_sum.ring import Packed, Ring
from tacit.identity import KEY_BYTES, SIGNATURE_BYTES

ROUND_BYTES = 16
MAX_CLIENTS = 1 << 16
MAX_LENGTH = 1 << 31
ADVERT_BYTES = 2 * KEY_BYTES + SIGNATURE_BYTES

Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Signature = Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
Share = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Sealed = Annotated[bytes, Meta(min_length=SEALED_BYTES, max_length=SEALED_BYTES)]
Client = Annotated[int, Meta(ge=0, lt=MAX_CLIENTS)]
Mask = Annotated[bytes, Meta(max_length=MAX_CLIENTS // 8)]
Count = Annotated[int, Meta(ge=1, le=MAX_CLIENTS)]


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    def __repr__(self) -> str:
        return f"{type(self).__name__}(hidden)"


class Subject(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is summed; settled when vectors are due, so that keys and shares can be exchanged before it is known.

    Args:
        length: residues in a vector.
        bits: b of the ring Z/2^b.
        application: a digest of what else the sum depends on, such as the model and the encoding.
    """

    length: Annotated[int, Meta(ge=1, le=MAX_LENGTH)]
    bits: Annotated[int, Meta(ge=2, le=32)]
    application: Digest

    @property
    def ring(self) -> Ring:
        """Z/2^b."""
        return Ring(self.bits)


class Invite(_Message, frozen=True):
    """Server to clients: who takes part, and how secrets are shared among them.

    Args:
        round: a number that no other round has.
        identities: the cohort's Ed25519 keys; a client's place in the list is its number.
        holders, partners, threshold: k, m and t of `tacit.federated.secure_sum.parameters`.
        minimum: the fewest vectors in a sum.
    """

    round: Annotated[bytes, Meta(min_length=ROUND_BYTES, max_length=ROUND_BYTES)]
    identities: Annotated[tuple[Key, ...], Meta(min_length=2, max_length=MAX_CLIENTS)]
    holders: Count
    partners: Count
    threshold: Count
    minimum: Count

    @property
    def sharing(self) -> Sharing:
        """k, m and t."""
        return Sharing(self.holders, self.partners, self.threshold)

    @property
    def context(self) -> bytes:
        """What every signature of the round covers."""
        return digest(b"context", encode(self))


class Roster(_Message, frozen=True):
    """Server to clients: who advertised which keys.

    Args:
        context: of the round.
        members: the clients that advertised.
        adverts: mask key, seal key and signature of each, in the order of their numbers.
    """

    context: Digest
    members: Mask
    adverts: Annotated[bytes, Meta(max_length=ADVERT_BYTES * MAX_CLIENTS)]


class Inbox(_Message, frozen=True):
    """Server to one client: the shares it is to hold, and what it is to send a vector for.

    Args:
        context: of the round.
        sharers: the clients whose shares arrived at the server.
        sealed: of each client that picked this one: its number, whether it is a partner, its sealed shares.
        subject: of the sum.
    """

    context: Digest
    sharers: Mask
    sealed: Annotated[tuple[tuple[Client, bool, Sealed], ...], Meta(max_length=MAX_CLIENTS)]
    subject: Subject


class Survivors(_Message, frozen=True):
    """Server to clients: whose vectors arrived."""

    context: Digest
    survivors: Mask


class Confirmations(_Message, frozen=True):
    """Server to one client: its holders' signatures of the set of survivors."""

    context: Digest
    signatures: Annotated[tuple[tuple[Client, Signature], ...], Meta(max_length=MAX_CLIENTS)]


class Advert(_Message, frozen=True):
    """A client's ephemeral keys."""

    sender: Client
    mask_key: Key
    seal_key: Key


class Shares(_Message, frozen=True):
    """A client's sealed shares.

    Args:
        sender: its number.
        transcript: of the round, roster included.
        commitment: to the secret of its own mask.
        sealed: for each holder: its number, whether it is a partner, the sealed shares.
    """

    sender: Client
    transcript: Digest
    commitment: Digest
    sealed: Annotated[tuple[tuple[Client, bool, Sealed], ...], Meta(max_length=MAX_CLIENTS)]


class Masked(_Message, frozen=True):
    """A client's masked vector, which travels packed in the frame's payload; from here on transcripts are the sum's."""

    sender: Client
    transcript: Digest
    digest: Digest


class Confirm(_Message, frozen=True):
    """A client's word on who the survivors are."""

    sender: Client
    transcript: Digest
    survivors: Mask


class Unmask(_Message, frozen=True):
    """A holder's shares: of the own mask's secret of each survivor, of the masking key of each other sharer."""

    sender: Client
    transcript: Digest
    shares: Annotated[tuple[tuple[Client, Share], ...], Meta(max_length=MAX_CLIENTS)]


class Signed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A client's message as it encoded it, and its signature."""

    content: bytes
    signature: Signature


FromServer: TypeAlias = Invite | Roster | Inbox | Survivors | Confirmations
FromClient: TypeAlias = Advert | Shares | Masked | Confirm | Unmask

_encoder = msgspec.msgpack.Encoder()
_from_server = msgspec.msgpack.Decoder(FromServer)
_from_client = msgspec.msgpack.Decoder(FromClient)
_envelope = msgspec.msgpack.Decoder(Signed)


def encode(message: FromServer | FromClient | Signed | Subject) -> bytes:
    """A message's one encoding."""
    return _encoder.encode(message)


def transcript_of(context: bytes, roster: Roster) -> bytes:
    """What binds shares to the settings and to the keys that were advertised."""
    return digest(b"transcript", context, encode(roster))


def sum_transcript(transcript: bytes, subject: Subject) -> bytes:
    """What binds masks, and all that is signed from there on, to what is summed as well."""
    return digest(b"sum", transcript, encode(subject))


def bit_mask(clients: Iterable[int], cohort: int) -> bytes:
    """A set of clients, one bit for each of the cohort."""
    mask = bytearray(-(-cohort // 8))
    for client in clients:
        mask[client >> 3] |= 1 << (client & 7)
    return bytes(mask)


def members_of(mask: bytes, cohort: int) -> tuple[int, ...]:
    """The clients of a bit mask, ascending.

    Raises:
        CodecError: it is not one of this cohort.
    """
    if len(mask) != -(-cohort // 8) or int.from_bytes(mask, "little") >> cohort:
        raise CodecError(f"a set of clients is not a mask of {cohort} bits")
    return tuple(i for i in range(cohort) if mask[i >> 3] >> (i & 7) & 1)


def server_frame(stage: int, message: FromServer) -> bytes:
    """A message of the server's as a frame."""
    return wire.encode(wire.Kind.SECURE_SUM, stage, (), encode(message))


def client_frame(stage: int, content: bytes, signature: bytes, packed: Packed | None = None) -> bytes:
    """A client's message as a frame."""
    tensors = () if packed is None else (torch.from_numpy(packed.view("<i4")),)
    return wire.encode(wire.Kind.SECURE_SUM, stage, tensors, encode(Signed(content, signature)))


def read_server_frame(frame: bytes) -> tuple[int, FromServer]:
    """The stage and the message of a frame from the server.

    Raises:
        CodecError: it is not one in its one encoding.
    """
    stage, body, tensors = _open(frame, 0)
    message = wire.parsed(_from_server, body, "a message of the server's")
    if tensors or encode(message) != body:
        raise CodecError("a message of the server's is not in its one encoding")
    return stage, message


def read_client_frame(frame: bytes, limit: int) -> tuple[int, FromClient, Signed, Packed | None]:
    """The stage, the message, its envelope and the vector, if there is one, of a frame from a client.

    Args:
        frame: the bytes.
        limit: the most bytes of a vector.

    Raises:
        CodecError: it is not one in its one encoding.
    """
    stage, body, tensors = _open(frame, limit)
    envelope = wire.parsed(_envelope, body, "a client's envelope")
    message = wire.parsed(_from_client, envelope.content, "a client's message")
    if encode(envelope) != body or encode(message) != envelope.content:
        raise CodecError("a client's message is not in its one encoding")
    if isinstance(message, Masked) != bool(tensors):
        raise CodecError("a masked vector, and nothing else, travels as a tensor")
    packed = tensors[0].numpy().view("<u4") if tensors else None
    return stage, message, envelope, packed


def _open(frame: bytes, limit: int) -> tuple[int, bytes, Sequence[torch.Tensor]]:
    opened = wire.decode(frame, limit)
    if opened.kind is not wire.Kind.SECURE_SUM:
        raise CodecError(f"a frame of kind {opened.kind.name} is not part of a secure sum")
    if len(opened.tensors) > 1 or any(t.dtype != torch.int32 or t.dim() != 1 for t in opened.tensors):
        raise CodecError("a masked vector travels as one flat tensor of int32")
    return opened.number, opened.body, opened.tensors


def require_context(message: FromServer, context: bytes) -> None:
    """Check that a message belongs to the round.

    Raises:
        CodecError: it is of another one.
    """
    if isinstance(message, Invite) or message.context != context:
        raise CodecError(f"a message {type(message).__name__} belongs to another round")


def check_invite(invite: Invite) -> None:
    """What no round may do without, whoever asks for it.

    Raises:
        InputError: the settings contradict each other.
    """
    n, k, m, t = len(invite.identities), invite.holders, invite.partners, invite.threshold
    if len(set(invite.identities)) != n:
        raise InputError("a client is in the cohort twice: each takes part once")
    if not (1 <= m <= k <= n - 1 and 2 <= t <= k and t < invite.minimum <= n):
        raise InputError(
            f"{n} clients, {k} holders, {m} partners, threshold {t}, at least {invite.minimum} survivors: need "
            f"partners <= holders < clients, 2 <= threshold <= holders, threshold < survivors <= clients"
        )
