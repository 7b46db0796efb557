"""What travels in the shared sum: the round's terms, a client's two parts, a server's share of the sum.

Encoding and frames are as in `tacit.federated.secure_sum.messages`: msgpack arrays with one encoding, in frames of
`tacit.wire`; a sealed box, or packed residues, is the one tensor of its frame.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray

from tacit import wire
from tacit.errors import CodecError, InputError
from tacit.federated.secure_sum.agreement import digest
from tacit.federated.secure_sum.messages import MAX_CLIENTS, MAX_LENGTH, ROUND_BYTES, Client, Count, Digest, Key, Mask
from tacit.federated.secure_sum.messages import Signature as SignatureBytes
from tacit.federated.secure_sum.ring import Ring
from tacit.mpc.steps import Role

MAX_VERIFIED_BITS = 26
"""The largest ring in which norms are verified: the squares of 256 lifted projections then stay below 2^60."""

LEAST_ROOM = 32
"""A verified ring holds at least so many times the bound, see `tacit.federated.secure_sum.shared_bounds`."""


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    def __repr__(self) -> str:
        return f"{type(self).__name__}(hidden)"


class Terms(_Message, frozen=True):
    """A round's public settings, equal at the clients and at both servers.

    Args:
        round: a number that no other round has.
        identities: the cohort's Ed25519 keys; a client's place in the list is its number.
        alice, bob: the servers' X25519 keys, to which parts are sealed.
        length: residues in a vector.
        bits: b of the ring Z/2^b.
        minimum: the fewest vectors in a sum.
        bound: B, the largest L2 norm of a client's vector of integers; 0 if norms are not verified.
        application: a digest of what else the round depends on.
    """

    round: Annotated[bytes, Meta(min_length=ROUND_BYTES, max_length=ROUND_BYTES)]
    identities: Annotated[tuple[Key, ...], Meta(min_length=2, max_length=MAX_CLIENTS)]
    alice: Key
    bob: Key
    length: Annotated[int, Meta(ge=1, le=MAX_LENGTH)]
    bits: Annotated[int, Meta(ge=2, le=32)]
    minimum: Count
    bound: Annotated[int, Meta(ge=0, le=1 << 32)]
    application: Digest

    @property
    def ring(self) -> Ring:
        """Z/2^b."""
        return Ring(self.bits)

    @property
    def transcript(self) -> bytes:
        """What every key and signature of the round is bound to."""
        return digest(b"shared terms", _encoder.encode(self))

    def key_of(self, role: Role) -> bytes:
        """A server's key."""
        return self.alice if role is Role.ALICE else self.bob


class Part(_Message, frozen=True):
    """What a client sends to one of the two servers; the box travels in the payload.

    Args:
        sender: its number.
        transcript: of the round.
        recipient: 0 for alice, 1 for bob.
        key: the client's ephemeral X25519 key, the same in both parts.
        signature: of the sender's number and that key, by its identity.
    """

    sender: Client
    transcript: Digest
    recipient: Annotated[int, Meta(ge=0, le=1)]
    key: Key
    signature: SignatureBytes


class Settled(_Message, frozen=True):
    """A server's word on a round, which it signs for whoever audits it.

    Args:
        sender: 0 for alice, 1 for bob.
        transcript: of the round.
        summed: the clients whose vectors are in its share of the sum.
        excluded: those whose vectors were beyond the bound.
    """

    sender: Annotated[int, Meta(ge=0, le=1)]
    transcript: Digest
    summed: Mask
    excluded: Mask


class Revealed(_Message, frozen=True):
    """A server's share of the sum, noise included; the residues travel packed in the payload.

    Args:
        sender: 0 for alice, 1 for bob.
        transcript: of the round.
        summed: a digest of whose vectors are in it.
    """

    sender: Annotated[int, Meta(ge=0, le=1)]
    transcript: Digest
    summed: Digest


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Part | Revealed)
_NUMBERS = {Role.ALICE: 0, Role.BOB: 1}


def room_for(bound: int) -> int:
    """The least b of a ring in which vectors of norm ``bound`` can be verified."""
    return (LEAST_ROOM * bound - 1).bit_length()


def number_of(role: Role) -> int:
    """How messages name a server."""
    return _NUMBERS[role]


def encode(message: Settled) -> bytes:
    """A message's one encoding."""
    return _encoder.encode(message)


def endorsed(role: Role) -> bytes:
    """What a server signs of a round's terms: that they are its own, its key among them."""
    return b"terms\0" + bytes([number_of(role)])


def check_terms(terms: Terms) -> None:
    """What no round may do without, whoever asks for it.

    Raises:
        InputError: the settings contradict each other, or a sum could be of one client, or wrap.
    """
    n = len(terms.identities)
    if len(set(terms.identities)) != n:
        raise InputError("a client is in the cohort twice: each takes part once")
    if not 3 <= terms.minimum <= n:
        raise InputError(f"a sum of at least {terms.minimum} vectors of {n}: need 3 <= minimum <= clients")
    if terms.alice == terms.bob:
        raise InputError("alice and bob have the same key: whoever has both parts of a vector can read it")
    if not terms.bound:
        return
    if terms.bits > MAX_VERIFIED_BITS:
        raise InputError(
            f"norms are verified in rings of up to {MAX_VERIFIED_BITS} bits, not {terms.bits}: choose fewer bits an "
            f"entry, or fewer clients"
        )
    if LEAST_ROOM * terms.bound > 1 << terms.bits:
        raise InputError(
            f"a norm of {terms.bound} in a ring of {terms.bits} bits: the ring must hold {LEAST_ROOM} times the bound, "
            f"or projections could wrap: choose more bits of the ring, or a lower bound"
        )


def frame_of(message: Part | Revealed, payload: bytes) -> bytes:
    """A message and its payload as a frame."""
    tensor = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    return wire.encode(wire.Kind.SECURE_SUM, 0, (tensor,), _encoder.encode(message))


def read_frame(frame: bytes, limit: int) -> tuple[Part | Revealed, NDArray[np.uint8]]:
    """The message of a frame, and its payload.

    Args:
        frame: the bytes.
        limit: the most bytes of a payload.

    Raises:
        CodecError: it is not one in its one encoding.
    """
    opened = wire.decode(frame, limit)
    if opened.kind is not wire.Kind.SECURE_SUM or opened.number:
        raise CodecError("a frame of another kind or number is not part of a shared sum")
    if len(opened.tensors) != 1 or opened.tensors[0].dtype != torch.uint8 or opened.tensors[0].dim() != 1:
        raise CodecError("a part of a vector travels as one flat tensor of bytes")
    message = wire.parsed(_decoder, opened.body, "a message of the shared sum")
    if _encoder.encode(message) != opened.body:
        raise CodecError("a message of the shared sum is not in its one encoding")
    return message, opened.tensors[0].numpy()
