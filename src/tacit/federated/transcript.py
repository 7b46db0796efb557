"""The transcript of a run: a signed entry a round, each holding the digest of the one before.

What a secure sum's clients sign covers the sum's ``application``, and that is the digest of the round's `Purpose`: the
run, the round, the entry before, the model that the clients were sent, and how their vectors are encoded. So the
clients of a round sign all the rounds before it, and what they trained on; whoever keeps the transcript can leave out
or change nothing but the last round without their help. `tacit.federated.audit` verifies it. The specification is
docs/spec/transcript.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from tacit import wire
from tacit.errors import CodecError
from tacit.federated.algorithm import ServerState
from tacit.federated.secure_sum.agreement import DIGEST_BYTES
from tacit.federated.secure_sum.interface import Summed
from tacit.federated.secure_sum.messages import Digest, Signature
from tacit.identity import Identity

BEGINNING = bytes(DIGEST_BYTES)
"""What the first entry holds in place of the digest of one before it."""

SIGNED = "transcript/entry"
_NAME = b"tacit/v1/transcript/"
_Text = Annotated[str, Meta(max_length=1 << 16)]


class Purpose(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """What the sum of a round is for.

    Args:
        run: of the run, see `run_digest`.
        round: its number, from 1.
        previous: the digest of the entry before, or `BEGINNING`.
        model: of the global model that the clients are sent, see `tensors_digest`.
        beside: of what the algorithm sends beside it, such as control variates.
        agreed: how vectors are encoded, and other settings of the sum, as text; empty if there is no sum.
    """

    run: Digest
    round: Annotated[int, Meta(ge=1, lt=1 << 32)]
    previous: Digest
    model: Digest
    beside: Digest
    agreed: _Text

    @property
    def application(self) -> bytes:
        """What a secure sum is told that it is for."""
        return _digest(b"purpose", msgspec.msgpack.encode(self))


class Spent(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The privacy spent up to here: (ε, δ) of each ``unit``."""

    epsilon: Annotated[float, Meta(ge=0)]
    delta: Annotated[float, Meta(gt=0, lt=1)]
    unit: _Text


class Charge(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A row of the privacy ledger: what happened to whom, and for what."""

    subject: _Text
    label: _Text
    event: _Text


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="Round"):
    """A round.

    Args:
        purpose: what it was for.
        after: of the global model that came of it.
        protocol: of the sum; ``"none"`` if there was none, as when too few clients were left; ``"plain"`` if it was
            taken in the clear.
        attestation: what its parties signed, see `tacit.federated.secure_sum.interface.Summed`.
        note: why there was no sum; empty if there was one.
        spent: the privacy spent by the run so far; ``None`` without differential privacy.
        charges: what was added to the privacy ledger since the entry before.
    """

    purpose: Purpose
    after: Digest
    protocol: Literal["masked", "shared", "plain", "none"]
    attestation: bytes
    note: _Text = ""
    spent: Spent | None = None
    charges: tuple[Charge, ...] = ()


class Sealed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An entry as it was encoded, and the coordinator's signature."""

    content: bytes
    signature: Signature


class Transcript:
    """Writes the transcript of a run, as rounds end.

    Args:
        run: of the run, see `run_digest`.
        coordinator: signs the entries.
        keep: puts an entry where it stays, before it returns.
        head: the digest of the last entry that is there already.
        charges: what was added to the privacy ledger since the last call.
    """

    def __init__(
        self,
        run: bytes,
        coordinator: Identity,
        keep: Callable[[bytes], None],
        head: bytes = BEGINNING,
        charges: Callable[[], Sequence[Charge]] = tuple,
    ) -> None:
        self._run, self._coordinator, self._keep, self._charges = run, coordinator, keep, charges
        self._head = head
        self._opened: Purpose | None = None

    @property
    def head(self) -> bytes:
        """The digest of the last entry: whoever knows it can tell that none is missing at the end."""
        return self._head

    def open(self, state: ServerState, agreed: str) -> bytes:
        """Begin a round that has a sum.

        Args:
            state: that the clients are sent.
            agreed: see `Purpose`.

        Returns:
            The ``application`` of the sum.
        """
        self._opened = self._purpose(state, agreed)
        return self._opened.application

    def close(
        self, before: ServerState, after: ServerState, summed: Summed | None, spent: Spent | None, note: str
    ) -> None:
        """Write down the round.

        Args:
            before: that the clients were sent.
            after: what came of it.
            summed: its sum; ``None`` if there was none.
            spent, note: see `Entry`.
        """
        purpose, self._opened = self._opened or self._purpose(before, ""), None
        attestation = b"" if summed is None else summed.attestation
        protocol = "none" if summed is None else summed.safeguards.protocol
        charges = tuple(self._charges())
        sealed = seal(
            Entry(purpose, model_digest(after), protocol, attestation, note, spent, charges), self._coordinator
        )
        self._keep(sealed)
        self._head = entry_digest(sealed)

    def _purpose(self, state: ServerState, agreed: str) -> Purpose:
        model, beside = model_digest(state), tensors_digest(state.shared)
        return Purpose(self._run, state.round + 1, self._head, model, beside, agreed)


def seal(entry: Entry, coordinator: Identity) -> bytes:
    """An entry as it is kept."""
    content = msgspec.msgpack.encode(entry)
    return msgspec.msgpack.encode(Sealed(content, coordinator.sign(SIGNED, content)))


def unseal(data: bytes) -> tuple[Entry, Sealed]:
    """Read what `seal` wrote; the signature is not verified.

    Raises:
        CodecError: it is not an entry in its one encoding.
    """
    sealed = wire.parsed(_sealed, data, "an entry of a transcript")
    entry = wire.parsed(_entry, sealed.content, "an entry of a transcript")
    if msgspec.msgpack.encode(sealed) != data or msgspec.msgpack.encode(entry) != sealed.content:
        raise CodecError("an entry of a transcript is not in its one encoding")
    return entry, sealed


def entry_digest(sealed: bytes) -> bytes:
    """What the next entry holds of this one."""
    return _digest(b"entry", sealed)


def run_digest(config: bytes, coordinator: bytes) -> bytes:
    """Of a run: its configuration, byte for byte, and the coordinator's key, which no other run has."""
    return _digest(b"run", hashlib.sha256(config).digest() + coordinator)


def model_digest(state: ServerState) -> bytes:
    """Of the global model as it is sent: its trainable parameters and its buffers."""
    return tensors_digest({**state.layout.views(state.parameters), **state.buffers})


def tensors_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """SHA-256 of named tensors, whatever their order: of each the name, dtype, shape and little-endian elements."""
    hasher = hashlib.sha256(_NAME + b"tensors\0")
    for name, tensor in sorted(tensors.items()):
        hasher.update(msgspec.msgpack.encode((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))))
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.digest()


def _digest(purpose: bytes, content: bytes) -> bytes:
    return hashlib.sha256(_NAME + purpose + b"\0" + content).digest()


_sealed = msgspec.msgpack.Decoder(Sealed)
_entry = msgspec.msgpack.Decoder(Entry)
