"""The four messages that open a session, and their bytes; `tacit.party.session` says what they are for."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from tacit.errors import CodecError, InputError, PeerError
from tacit.party.cluster_file import ALICE, BOB, PROVIDER

NONCE_BYTES = ID_BYTES = 32
MAX_BODY_BYTES = 4096
_NAME_BYTES = 63
_REASON_BYTES = 500


class Purpose(StrEnum):
    """What a session is for; each has its own messages."""

    CLIENT = "client"
    OWNER = "owner"
    CONTROL = "control"
    DATA = "data"
    POOL = "pool"

    @property
    def parties(self) -> tuple[tuple[str, ...], ...]:
        """Which parties one session of this kind is with: one of these groups."""
        both, alice, all_three = (ALICE, BOB), (ALICE,), (ALICE, BOB, PROVIDER)
        return {
            Purpose.CLIENT: (both,),
            Purpose.OWNER: (all_three, both),
            Purpose.CONTROL: (alice,),
            Purpose.DATA: (alice,),
            Purpose.POOL: ((PROVIDER,),),
        }[self]


_Nonce = Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
_Label = Annotated[str, Meta(min_length=1, max_length=_NAME_BYTES)]
_Version = Annotated[int, Meta(ge=1, le=255)]


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """One message, as an array that starts with its name."""


class Welcome(_Message, frozen=True):
    """Party to caller, at once.

    Args:
        versions: that the party speaks, ascending.
        party: its name.
        nonce: drawn for this connection.
        lifetime_s: how long a session lasts.
    """

    versions: Annotated[tuple[_Version, ...], Meta(min_length=1, max_length=16)]
    party: _Label
    nonce: _Nonce
    lifetime_s: Annotated[int, Meta(ge=1, lt=1 << 32)]

    def __post_init__(self) -> None:
        if list(self.versions) != sorted(set(self.versions)):
            raise ValueError("versions do not ascend")


class Greeting(_Message, frozen=True):
    """Caller to every party of the session, the same bytes to each.

    Args:
        version: that the session speaks, the highest that all have in common.
        purpose: what it is for.
        caller: the caller's name.
        nonce: drawn for this session.
        welcomes: what the parties said, in the order alice, bob, provider.
        parent: the id of the control session that a worker's data session belongs to; else empty.
        worker: which worker a data session is with; else 0.
    """

    version: _Version
    purpose: Purpose
    caller: _Label
    nonce: _Nonce
    welcomes: Annotated[tuple[Welcome, ...], Meta(min_length=1, max_length=3)]
    parent: Annotated[bytes, Meta(max_length=ID_BYTES)]
    worker: Annotated[int, Meta(ge=0, lt=1 << 16)]

    def __post_init__(self) -> None:
        if len(self.parent) not in (0, ID_BYTES):
            raise ValueError("a parent is a session's id")


class Accepted(_Message, frozen=True):
    """Party to caller: the session is open.

    Args:
        id: the session's.
    """

    id: Annotated[bytes, Meta(min_length=ID_BYTES, max_length=ID_BYTES)]


class Refused(_Message, frozen=True):
    """Either side to the other, before it closes the connection.

    Args:
        reason: for whoever runs the other side.
    """

    reason: Annotated[str, Meta(max_length=_REASON_BYTES)]


Message: TypeAlias = Welcome | Greeting | Accepted | Refused
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The message's bytes."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """The message in some bytes.

    Raises:
        CodecError: they are no message of a session in its one encoding, or longer than `MAX_BODY_BYTES`.
    """
    try:
        message: Message | None = _decoder.decode(data) if len(data) <= MAX_BODY_BYTES else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        message = None
    if message is None or encode(message) != data:
        raise CodecError("a message of a session does not parse")
    return message


def refusal(error: Exception) -> bytes:
    """A `Refused` that gives tacit's own reasons, and no others."""
    reason = str(error) if isinstance(error, (PeerError, InputError)) else "it failed"
    return encode(Refused(reason.encode()[:_REASON_BYTES].decode(errors="ignore")))
