"""What the coordinator and the sites say to each other, signed end to end.

Flower authenticates who is connected; these signatures authenticate what is said, also to whoever must not trust the
SuperLink in between. A message is a frame of `tacit.wire` whose body is a `Letter` and its writer's signature; tensors
travel in the frame's payload, whose digest is in the letter. A letter names its reader, so it cannot be passed on to
another; an answer holds the digest of what it answers, so it cannot be kept for another question; and a `Begin` holds
a number that is used once, so a site trains at most once for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from tacit import wire
from tacit.errors import CodecError, PeerError
from tacit.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, key_text, verify

PROTOCOL = 2
"""What both ends must speak; counted up by changes that others would misunderstand."""

DIGEST_BYTES = 32
NONCE_BYTES = 16
MAX_PAYLOAD = 1 << 32
FIRST = bytes(DIGEST_BYTES)
"""What a letter is about that answers none."""

ANYBODY = bytes(KEY_BYTES)
"""The reader of a letter that asks who is there."""
T = TypeVar("T")
_PURPOSE = "sites/letter"
_FLOATS = {"f2": torch.float16, "bf2": torch.bfloat16, "f4": torch.float32, "f8": torch.float64}
_WIRED = {
    **{"i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64, "u1": torch.uint8},
    "bit": torch.bool,
}
_CODES = {dtype: code for code, dtype in {**_FLOATS, **_WIRED}.items()}
_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Nonce = Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Signature = Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
Text = Annotated[str, Meta(max_length=1 << 16)]
Count = Annotated[int, Meta(ge=0, lt=1 << 40)]
Work = Literal["train", "evaluate", "moments"]
Named = tuple[tuple[Annotated[str, Meta(max_length=1 << 10)], str], ...]
"""The names and element types of the tensors that travel with a message."""


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"


class Terms(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a whole run is under, equal for all its rounds and sites.

    Args:
        run: the key of the run's transcript, which no other run has.
        config: its configuration, as the coordinator was given it.
        sites: the identities of all that may take part; a site's place in the list is its index.
    """

    run: Key
    config: Text
    sites: Annotated[tuple[Key, ...], Meta(min_length=1, max_length=1 << 12)]


class Hello(_Message, frozen=True):
    """Coordinator to site: who is there?"""

    protocol: int
    nonce: Nonce


class Begin(_Message, frozen=True):
    """Coordinator to site: take part in this.

    Args:
        terms: of the run.
        round: the number of the round, from 1; of an evaluation, of the model's last round, which may be 0.
        attempt: a number that no other `Begin` has.
        work: what is asked for.
        previous: of the round's `tacit.federated.transcript.Purpose`; the site knows the rest of it.
        frame: the server's in a secure sum: one that invites to it, or what follows where it was set up ahead; empty
            to ask for the answer itself.
        counted: the last round whose update of this site was used; 0 for none.
        tensors: of the global model and what goes with it, see `pack`.
    """

    terms: Terms
    round: Count
    attempt: Nonce
    work: Work
    previous: Digest
    frame: Annotated[bytes, Meta(max_length=1 << 30)]
    counted: Count
    tensors: Named = ()


class Go(_Message, frozen=True):
    """Coordinator to site: the server's next frame in the secure sum that an attempt began.

    Args:
        attempt: that began it.
        frame: the server's.
        ahead: the server's frame in the next sum, which is set up meanwhile; empty for none.
    """

    attempt: Nonce
    frame: Annotated[bytes, Meta(max_length=1 << 30)]
    ahead: Annotated[bytes, Meta(max_length=1 << 30)] = b""


class Here(_Message, frozen=True):
    """Site to coordinator: this is who I am.

    Args:
        nonce: of the question.
        protocol: that the site speaks.
        version: of tacit.
        waiting: why it would refuse to take part now; empty if it would not.
    """

    nonce: Nonce
    protocol: int
    version: Text
    waiting: tuple[Text, ...] = ()


class Refusal(_Message, frozen=True):
    """Site to coordinator: not this, and why."""

    reason: Text


class Answer(_Message, frozen=True):
    """Site to coordinator: the client's frame in a secure sum, or the answer itself.

    Args:
        frame: of the secure sum; empty in an answer in the clear.
        ahead: of the next sum; empty if nothing was asked of it, or the site has no part in it.
        numbers: of an answer in the clear: counts and sums, by name.
        disclosed: what the site chooses to tell of itself, by name, such as the ε that it has spent.
        tensors: of an answer in the clear, see `pack`.
    """

    frame: Annotated[bytes, Meta(max_length=1 << 32)] = b""
    ahead: Annotated[bytes, Meta(max_length=1 << 30)] = b""
    numbers: Mapping[str, float] = msgspec.field(default_factory=dict)
    disclosed: Mapping[str, float] = msgspec.field(default_factory=dict)
    tensors: Named = ()


Request: TypeAlias = Hello | Begin | Go
Reply: TypeAlias = Here | Refusal | Answer


class Letter(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A message from one to another.

    Args:
        writer, reader: their identities.
        about: the digest of the frame that it answers, or `FIRST`.
        message: a `Request` or `Reply`, encoded.
        payload: SHA-256 of the tensors' bytes.
    """

    writer: Key
    reader: Key
    about: Digest
    message: bytes
    payload: Digest


class _Sealed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    letter: bytes
    signature: Signature


@dataclass(frozen=True, repr=False)
class Opened:
    """A letter whose signature has been verified.

    Args:
        letter: as it was signed.
        tensors: that came with it.
        digest: of the whole frame, for the answer to name.
    """

    letter: Letter
    tensors: tuple[Tensor, ...]
    digest: bytes

    def request(self) -> Request:
        """The question in it.

        Raises:
            CodecError: there is none.
        """
        message: Request = _strictly(_requests, self.letter.message, "a question to a site")
        return message

    def reply(self) -> Reply:
        """The answer in it.

        Raises:
            CodecError: there is none.
        """
        message: Reply = _strictly(_replies, self.letter.message, "a site's answer")
        return message

    def __repr__(self) -> str:
        return f"Opened({key_text(self.letter.writer)}, {len(self.tensors)} tensors)"


def seal(
    writer: Identity, reader: bytes, message: Request | Reply, tensors: tuple[Tensor, ...] = (), about: bytes = FIRST
) -> bytes:
    """A signed frame.

    Args:
        writer: signs.
        reader: whom it is for.
        message: what to say.
        tensors: as `pack` made them.
        about: the digest of the frame that it answers.
    """
    letter = _encoder.encode(Letter(writer.public, reader, about, _encoder.encode(message), _payload_digest(tensors)))
    body = _encoder.encode(_Sealed(letter, writer.sign(_PURPOSE, letter)))
    return wire.encode(wire.Kind.SITE, 0, tensors, body)


def unseal(frame: bytes, readers: frozenset[bytes], writers: frozenset[bytes], about: bytes = FIRST) -> Opened:
    """Read a signed frame.

    Args:
        frame: the bytes.
        readers: whose letters are read: one's own identity, and perhaps `ANYBODY`.
        writers: whose letters are accepted.
        about: what it must answer.

    Raises:
        CodecError: it does not parse.
        PeerError: it is from somebody else, to somebody else, about something else, or was changed on its way.
    """
    opened = wire.decode(frame, MAX_PAYLOAD)
    if opened.kind is not wire.Kind.SITE or opened.number:
        raise CodecError(f"a frame of kind {opened.kind.name} is not a letter between a coordinator and a site")
    sealed = _strictly(_sealed, opened.body, "a sealed letter")
    letter = _strictly(_letters, sealed.letter, "a letter")
    if letter.writer not in writers:
        raise PeerError(f"a letter is from {key_text(letter.writer)}, whose key is not pinned here")
    if not verify(letter.writer, _PURPOSE, sealed.letter, sealed.signature):
        raise PeerError(f"a letter is not signed by {key_text(letter.writer)}, or was changed on its way")
    if letter.payload != _payload_digest(opened.tensors):
        raise PeerError("the tensors that came with a letter are not those that its writer signed")
    if letter.reader not in readers:
        raise PeerError(f"a letter to {key_text(letter.reader)} came to somebody else")
    if letter.about != about:
        raise PeerError("a letter answers another question: the one asked was changed on its way, or the answer is old")
    return Opened(letter, opened.tensors, frame_digest(frame))


def frame_digest(frame: bytes) -> bytes:
    """What an answer to a frame is about."""
    return hashlib.sha256(frame).digest()


def pack(tensors: Mapping[str, Tensor]) -> tuple[Named, tuple[Tensor, ...]]:
    """Tensors as they travel, floats as the integers of the same bits; and what a message says of them."""
    named = tuple((name, _CODES[tensor.dtype]) for name, tensor in tensors.items())
    wired = (tensor.detach().contiguous() for tensor in tensors.values())
    return named, tuple(t.view(_SAME_SIZE[t.element_size()]) if t.is_floating_point() else t for t in wired)


def unpack(named: Named, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The tensors that `pack` packed, by name.

    Raises:
        CodecError: there are more or fewer than are named, two of one name, or of other types.
    """
    if len(named) != len(tensors) or len({name for name, _ in named}) != len(named):
        raise CodecError(f"{len(named)} names came for {len(tensors)} tensors, or one twice")
    unpacked = {}
    for (name, code), tensor in zip(named, tensors, strict=True):
        dtype = _FLOATS.get(code) or _WIRED.get(code)
        if dtype is None or tensor.dtype != (_SAME_SIZE[dtype.itemsize] if code in _FLOATS else dtype):
            raise CodecError(f"tensor {name!r} does not travel as the type {code!r} that is named")
        unpacked[name] = tensor.view(dtype) if code in _FLOATS else tensor
    return unpacked


def _payload_digest(tensors: tuple[Tensor, ...]) -> bytes:
    hasher = hashlib.sha256()
    for piece in wire.payload_of(tensors):
        hasher.update(piece)
    return hasher.digest()


def _strictly(decoder: msgspec.msgpack.Decoder[T], data: bytes, what: str) -> T:
    message = wire.parsed(decoder, data, what)
    if _encoder.encode(message) != data:
        raise CodecError(f"{what} is not in its one encoding")
    return message


_encoder = msgspec.msgpack.Encoder(order="deterministic")
_sealed = msgspec.msgpack.Decoder(_Sealed)
_letters = msgspec.msgpack.Decoder(Letter)
_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)
