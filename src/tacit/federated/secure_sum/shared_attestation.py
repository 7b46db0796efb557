"""What a round of the shared sum leaves behind for an auditor: its terms, who took part, and everybody's signatures."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from tacit import wire
from tacit.errors import CodecError, PeerError
from tacit.federated.secure_sum.agreement import verify
from tacit.federated.secure_sum.messages import MAX_CLIENTS, Client, Key, Mask, Signature, bit_mask, members_of
from tacit.federated.secure_sum.shared_client import signed_content
from tacit.federated.secure_sum.shared_messages import Settled, Terms, check_terms, encode, number_of
from tacit.federated.secure_sum.shared_server import SharedServer
from tacit.mpc.steps import Role


class SharedAttestation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The clients' and the servers' word on a round.

    A client's signature says that it sent its vector to the two servers under these terms; a server's, that its share
    of the sum has the vectors of ``summed`` in it and no others. They do not say that the sum that was published is
    theirs; ``terms.application`` ties the round to what it was for.

    Args:
        terms: the settings, identities among them.
        summed: whose vectors are in the sum.
        excluded: whose vectors were beyond the bound.
        parts: of both, by number, ascending: the ephemeral key and the client's signature of it.
        alice, bob: the servers' signatures of `tacit.federated.secure_sum.shared_messages.Settled`.
    """

    terms: Terms
    summed: Mask
    excluded: Mask
    parts: Annotated[tuple[tuple[Client, Key, Signature], ...], Meta(max_length=MAX_CLIENTS)]
    alice: Signature
    bob: Signature

    @classmethod
    def of(cls, server: SharedServer, alice: bytes, bob: bytes) -> SharedAttestation:
        """From one server's record of a round, and what `SharedServer.attest` gave at both."""
        n, proofs = len(server.terms.identities), server.proofs
        return cls(
            server.terms,
            bit_mask(server.summed, n),
            bit_mask(proofs.keys() - set(server.summed), n),
            tuple((number, proof.key, proof.signature) for number, proof in proofs.items()),
            alice,
            bob,
        )

    def encoded(self) -> bytes:
        """Its one encoding."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def parse(cls, data: bytes) -> SharedAttestation:
        """Read what `encoded` wrote.

        Raises:
            CodecError: it is not one in its one encoding.
        """
        attestation = wire.parsed(_decoder, data, "an attestation of a shared sum")
        if attestation.encoded() != data:
            raise CodecError("an attestation of a shared sum is not in its one encoding")
        return attestation

    def verify(self, pinned: frozenset[bytes], alice: bytes, bob: bytes) -> tuple[bytes, ...]:
        """Check all of it, without trust in whoever kept it.

        Args:
            pinned: the identities that may take part.
            alice, bob: the servers' identities.

        Returns:
            The identities of the clients whose vectors are in the sum.

        Raises:
            InputError: the terms contradict each other.
            PeerError: an identity is not pinned, fewer vectors than the minimum are in the sum, or a signature is
                missing or does not verify.
        """
        terms, transcript = self.terms, self.terms.transcript
        check_terms(terms)
        n = len(terms.identities)
        summed, excluded = members_of(self.summed, n), members_of(self.excluded, n)
        if not pinned.issuperset(terms.identities):
            raise PeerError("the round's cohort holds an identity that is not pinned")
        if len(summed) < terms.minimum:
            raise PeerError(f"the sum is of {len(summed)} vectors, below the round's minimum of {terms.minimum}")
        if excluded and not terms.bound:
            raise PeerError("clients were excluded for the length of their vectors, which the round does not verify")
        if [number for number, _, _ in self.parts] != sorted([*summed, *excluded]):
            raise PeerError("the signatures of the round are not one of each client that was summed or excluded")
        for number, key, signature in self.parts:
            if not verify(terms.identities[number], transcript, signed_content(number, key), signature):
                raise PeerError(f"client {number} did not sign this round, or the terms were changed")
        for role, identity, signature in ((Role.ALICE, alice, self.alice), (Role.BOB, bob, self.bob)):
            content = encode(Settled(number_of(role), transcript, self.summed, self.excluded))
            if not verify(identity, transcript, content, signature):
                raise PeerError(f"{role.value} did not sign that these clients' vectors are in the sum")
        return tuple(terms.identities[number] for number in summed)


_decoder = msgspec.msgpack.Decoder(SharedAttestation)
