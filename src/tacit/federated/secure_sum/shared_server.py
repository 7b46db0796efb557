"""One of the two servers of the shared sum: opens its part of each vector, adds, and reveals its share once.

alice and bob run the same code; what differs is how a part becomes residues. Vectors are handled in batches: the two
compare which clients' parts both have, check the norms if the terms ask for it, add those that pass, and forget them.

A round lives in memory and under a key of its own. A server that crashes has lost that key, so nobody can have it open
the parts again and reveal the sum a second time, under other noise.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from tacit.errors import CodecError, InputError, PeerError
from tacit.federated.secure_sum.agreement import KeyPair, digest, sign, verify
from tacit.federated.secure_sum.messages import bit_mask
from tacit.federated.secure_sum.ring import Words
from tacit.federated.secure_sum.shared_bounds import within
from tacit.federated.secure_sum.shared_client import NONCE, PURPOSE, signed_content
from tacit.federated.secure_sum.shared_messages import (
    Part,
    Revealed,
    Settled,
    Terms,
    check_terms,
    encode,
    endorsed,
    frame_of,
    number_of,
    read_frame,
)
from tacit.identity import Identity
from tacit.mpc.steps import Protocol, Role
from tacit.ring.prg import SEED_BYTES, Prg

_TAG_BYTES = 16
Noise = Callable[[int], NDArray[np.int64]]
"""Integers to add to the sum, by its length; drawn afresh at each call."""


@dataclass(frozen=True)
class Proof:
    """That a client took part: its ephemeral key in the round, signed."""

    key: bytes
    signature: bytes


@dataclass(frozen=True, repr=False)
class _Held:
    proof: Proof
    content: bytes = field(repr=False)


class SharedServer:
    """alice or bob in one round.

    Args:
        role: which of the two.
        terms: of the round.
        pair: the server's key of this round, drawn for it and kept nowhere, whose public half stands in the terms.

    Raises:
        InputError: the terms contradict each other, or name another key.
    """

    def __init__(self, role: Role, terms: Terms, pair: KeyPair) -> None:
        check_terms(terms)
        if terms.key_of(role) != pair.public:
            raise InputError(f"the terms name another key for {role.value} than the one it has")
        self.role, self.terms = role, terms
        self._pair, self._transcript = pair, terms.transcript
        self._waiting: dict[int, _Held] = {}
        self._settled: dict[int, Proof] = {}
        self._summed: list[int] = []
        self._total = terms.ring.zeros(terms.length)
        self._open = True

    def endorse(self, identity: Identity) -> bytes:
        """The server's signature of the terms, without which no client takes part."""
        return sign(identity, self._transcript, endorsed(self.role))

    def receive(self, frame: bytes) -> int:
        """Take a client's part.

        Returns:
            The client's number.

        Raises:
            PeerError: it is not a part of this round for this server, its signature or its seal is wrong, or the
                client has sent one before. The server's state is as it was.
        """
        size = self._content_bytes
        message, box = read_frame(frame, size + _TAG_BYTES)
        recipient, ring = number_of(self.role), self.terms.ring
        if not isinstance(message, Part) or message.transcript != self._transcript or message.recipient != recipient:
            raise PeerError(f"a message is not a client's part for {self.role.value} in this round")
        number = message.sender
        if number >= len(self.terms.identities) or not self._open:
            raise PeerError(f"client {number} is not in the cohort, or the sum has been revealed")
        if number in self._waiting or number in self._settled:
            raise PeerError(f"client {number} has sent its part before: the first one counts")
        identity = self.terms.identities[number]
        if not verify(identity, self._transcript, signed_content(number, message.key), message.signature):
            raise PeerError(f"the signature under client {number}'s part is not its own")
        key = self._pair.agree(message.key, 32, self._transcript, PURPOSE, number, recipient)
        try:
            content = AESGCM(key).decrypt(NONCE, box.data, None)
        except InvalidTag:
            raise PeerError(f"client {number}'s part does not open: somebody changed it") from None
        if len(content) != size:
            raise CodecError(f"client {number}'s part holds {len(content)} bytes, not {size}")
        if self.role is Role.BOB:
            ring.require_packed(np.frombuffer(content, "<u4"), self.terms.length)
        self._waiting[number] = _Held(Proof(message.key, message.signature), content)
        return number

    @property
    def claims(self) -> dict[int, bytes]:
        """Whose parts wait, and under which ephemeral keys; public, for the other server."""
        return {number: held.proof.key for number, held in sorted(self._waiting.items())}

    def common(self, other: Mapping[int, bytes]) -> tuple[int, ...]:
        """The clients whose two parts belong together, ascending, given the other server's `claims`."""
        return tuple(number for number, key in self.claims.items() if other.get(number) == key)

    def check(self, numbers: Sequence[int]) -> Protocol[tuple[bool, ...]]:
        """Whether each client's vector is within the bound; see `tacit.federated.secure_sum.shared_bounds.within`."""
        vectors = [self._words(self._waiting[number]) for number in numbers]
        return within(vectors, self.terms.bits, self.terms.bound, self.role)

    def settle(self, numbers: Sequence[int], accepted: Sequence[bool] | None = None) -> None:
        """Add the vectors of these clients that were accepted, and forget all of these.

        Args:
            numbers: what `common` gave.
            accepted: what `check` gave; it may be left out only where the terms ask for no verification.

        Raises:
            InputError: an unchecked vector would be added where norms are verified.
        """
        if accepted is None:
            if self.terms.bound:
                raise InputError("this round verifies norms: check the vectors before they are added")
            accepted = [True] * len(numbers)
        for number, good in zip(numbers, accepted, strict=True):
            held = self._waiting.pop(number)
            self._settled[number] = held.proof
            if not good:
                continue
            self._summed.append(number)
            if self.role is Role.ALICE:
                Prg(held.content).add_into(self._total)
            else:
                self.terms.ring.add_packed(np.frombuffer(held.content, "<u4"), self._total)

    def reveal(self, noise: Noise | None = None) -> bytes:
        """This server's share of the sum as a frame; once.

        Args:
            noise: what this server adds. bob knows his own noise and alice hers, so each must add as much as the
                sum needs.

        Raises:
            PeerError: fewer vectors than the minimum were accepted, or the sum was revealed before.
        """
        ring, terms = self.terms.ring, self.terms
        if not self._open:
            raise PeerError("the sum was revealed before: a share under other noise would tell the difference")
        if len(self._summed) < terms.minimum:
            raise PeerError(f"{len(self._summed)} vectors were accepted and {terms.minimum} are needed: no sum")
        self._open = False
        if noise is not None:
            self._total += ring.residues(noise(terms.length))
        packed = ring.pack(ring.reduce_(self._total))
        message = Revealed(number_of(self.role), self._transcript, _summed(self._summed))
        self._total = ring.zeros(0)
        return frame_of(message, packed.view("<u4").tobytes())

    def attest(self, identity: Identity) -> bytes:
        """The server's signature, once the sum is revealed, of whose vectors are in it and whose were excluded.

        Raises:
            PeerError: the sum has not been revealed.
        """
        if self._open:
            raise PeerError("the round is not over: more vectors may be added")
        n = len(self.terms.identities)
        summed, excluded = bit_mask(self._summed, n), bit_mask(self._settled.keys() - set(self._summed), n)
        return sign(
            identity, self._transcript, encode(Settled(number_of(self.role), self._transcript, summed, excluded))
        )

    @property
    def proofs(self) -> dict[int, Proof]:
        """The signatures of all the clients whose vectors were added or excluded, by number; public."""
        return dict(sorted(self._settled.items()))

    @property
    def summed(self) -> tuple[int, ...]:
        """Whose vectors are in the sum, ascending."""
        return tuple(sorted(self._summed))

    @property
    def _content_bytes(self) -> int:
        return SEED_BYTES if self.role is Role.ALICE else 4 * self.terms.ring.packed_size(self.terms.length)

    def _words(self, held: _Held) -> Words:
        words = self.terms.ring.zeros(self.terms.length)
        if self.role is Role.ALICE:
            Prg(held.content).add_into(words)
        else:
            self.terms.ring.add_packed(np.frombuffer(held.content, "<u4"), words)
        return words

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise InputError(
            "a server of a shared sum cannot be copied: the sum would be revealed twice, under other noise"
        )

    def __repr__(self) -> str:
        return f"SharedServer({self.role.value}, {len(self._summed)} vectors added, {len(self._waiting)} waiting)"


def _summed(numbers: Sequence[int]) -> bytes:
    return digest(b"summed", b"".join(struct.pack("<I", number) for number in sorted(numbers)))


def total_of(terms: Terms, alice: bytes, bob: bytes) -> Words:
    """The sum, from both servers' revealed shares.

    Raises:
        PeerError: they are not the two shares of one sum of this round.
    """
    total, digests = terms.ring.zeros(terms.length), set()
    for role, frame in ((Role.ALICE, alice), (Role.BOB, bob)):
        message, payload = read_frame(frame, 4 * terms.ring.packed_size(terms.length))
        if (
            not isinstance(message, Revealed)
            or message.transcript != terms.transcript
            or message.sender != number_of(role)
        ):
            raise PeerError(f"a message is not {role.value}'s share of this round's sum")
        if payload.nbytes != 4 * terms.ring.packed_size(terms.length):
            raise CodecError(f"{role.value}'s share is {payload.nbytes} bytes long")
        terms.ring.add_packed(payload.view("<u4"), total)
        digests.add(message.summed)
    if len(digests) != 1:
        raise PeerError("alice and bob summed different clients' vectors: their shares do not fit together")
    return terms.ring.reduce_(total)
