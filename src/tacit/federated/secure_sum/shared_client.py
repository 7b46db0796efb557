"""The client of the shared sum: one message to each of two servers, and it is done.

alice is sent a seed, bob the vector minus what the seed expands to, both sealed under keys agreed with one ephemeral
key. Either part alone is uniform; whoever relays them can read neither.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tacit.errors import InputError
from tacit.federated.secure_sum.agreement import KeyPair, sign, verify
from tacit.federated.secure_sum.client import Task
from tacit.federated.secure_sum.messages import MAX_CLIENTS
from tacit.federated.secure_sum.ring import Words
from tacit.federated.secure_sum.shared_messages import Part, Terms, check_terms, endorsed, frame_of, number_of
from tacit.identity import Identity
from tacit.mpc.steps import Role
from tacit.ring.prg import SEED_BYTES, Prg

PURPOSE = b"shared part"
NONCE = bytes(12)
"""A sealing key serves one box, so its nonce may be zero."""


@dataclass(frozen=True)
class SharedPolicy:
    """What a client of the shared sum insists on.

    Args:
        minimum: the fewest vectors in a sum, at least 3.
        alice, bob: the servers' identities, pinned.

    Raises:
        InputError: the minimum is below 3, where a client could take its own vector from the sum of two.
    """

    minimum: int
    alice: bytes
    bob: bytes

    def __post_init__(self) -> None:
        if not 3 <= self.minimum <= MAX_CLIENTS:
            raise InputError(f"minimum={self.minimum}: a sum of fewer than 3 vectors tells one client another's")
        if self.alice == self.bob:
            raise InputError("alice and bob are one and the same: whoever has both parts of a vector can read it")

    def require(self, terms: Terms, task: Task, endorsements: Mapping[Role, bytes]) -> None:
        """Check what a client is asked to take part in.

        Args:
            terms: of the round.
            task: what the client expects to be asked for.
            endorsements: what `tacit.federated.secure_sum.shared_server.SharedServer.endorse` gave at each server.

        Raises:
            InputError: the terms are not what the client pinned and expects; nothing has been sent.
        """
        check_terms(terms)
        for role, identity in ((Role.ALICE, self.alice), (Role.BOB, self.bob)):
            if not verify(identity, terms.transcript, endorsed(role), endorsements.get(role, b"")):
                raise InputError(
                    f"the terms, and the key of {role.value} in them, are not signed by the {role.value} that this "
                    "client has pinned: nothing is sent"
                )
        if terms.minimum < self.minimum:
            raise InputError(f"the round sums {terms.minimum} vectors or more; the policy asks for {self.minimum}")
        if (terms.ring, terms.length, terms.application) != (task.ring, task.length, task.application):
            raise InputError("the round is not about the ring, length and application that the client expects")


@dataclass(frozen=True, repr=False)
class Parts:
    """A client's two frames.

    Args:
        alice: with the sealed seed.
        bob: with the sealed difference.
    """

    alice: bytes
    bob: bytes

    def __repr__(self) -> str:
        return f"Parts(alice={len(self.alice)} bytes, bob={len(self.bob)} bytes)"


def upload(terms: Terms, number: int, identity: Identity, words: Words, prg: Prg) -> Parts:
    """Split a vector and seal its parts.

    1. seed, ephemeral key from the generator; 2. difference = vector - PRG(seed) in Z/2^b; 3. the seed sealed to alice,
    the packed difference to bob, both parts under one signature of the ephemeral key.

    Args:
        terms: what `SharedPolicy.require` let pass.
        number: the client's.
        identity: its long-term key.
        words: residues, of an L2 norm within the bound, or the vector will be left out.
        prg: fresh; nothing else is drawn from it.

    Guarantees: a second upload, from another generator, tells the servers nothing beyond the two vectors' shares.
    Cost: two X25519 agreements, one signature, AES over the vector twice; upload b/8 bytes an entry and about 400.
    Raises:
        InputError: the vector is not one of this round, or the identity not that of the client.
    """
    terms.ring.require(words, terms.length)
    if not 0 <= number < len(terms.identities) or terms.identities[number] != identity.public:
        raise InputError(f"the identity is not that of client {number} of this round")
    pair, seed, transcript = KeyPair(prg), prg.bytes(SEED_BYTES), terms.transcript
    difference = words.copy()
    Prg(seed).add_into(difference, subtract=True)
    packed = terms.ring.pack(terms.ring.reduce_(difference))
    signature = sign(identity, transcript, signed_content(number, pair.public))

    def frame(role: Role, content: bytes | memoryview) -> bytes:
        recipient = number_of(role)
        key = pair.agree(terms.key_of(role), 32, transcript, PURPOSE, number, recipient)
        box = AESGCM(key).encrypt(NONCE, content, None)
        return frame_of(Part(number, transcript, recipient, pair.public, signature), box)

    return Parts(frame(Role.ALICE, seed), frame(Role.BOB, packed.view("<u4").data.cast("B")))


def signed_content(number: int, key: bytes) -> bytes:
    """What a client signs: that this ephemeral key is its own in this round."""
    return PURPOSE + b"\0" + struct.pack("<I", number) + key
