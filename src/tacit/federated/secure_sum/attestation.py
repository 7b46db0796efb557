"""What a round leaves behind for an auditor: its settings, its survivors, and their signatures of both."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from tacit import wire
from tacit.errors import CodecError, PeerError
from tacit.federated.secure_sum import messages
from tacit.federated.secure_sum.agreement import verify
from tacit.federated.secure_sum.messages import (
    MAX_CLIENTS,
    Client,
    Confirm,
    Digest,
    Invite,
    Mask,
    Signature,
    Subject,
)


class Attestation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The survivors' word on a round.

    A signature says: this client took part under these settings, saw this roster, masked a vector for this subject, and
    was told of these survivors. It does not say that the sum that was published is theirs; ``subject.application`` ties
    the round to what it was for.

    Args:
        invite: the settings, identities among them.
        transcript: binds settings and roster.
        subject: what was summed.
        survivors: whose vectors are in the sum.
        signatures: of those who confirmed, by number, ascending.
    """

    invite: Invite
    transcript: Digest
    subject: Subject
    survivors: Mask
    signatures: Annotated[tuple[tuple[Client, Signature], ...], Meta(max_length=MAX_CLIENTS)]

    @classmethod
    def of(
        cls,
        invite: Invite,
        transcript: bytes,
        subject: Subject,
        survivors: Collection[int],
        signatures: Mapping[int, bytes],
    ) -> Attestation:
        """From the server's record of a round."""
        mask = messages.bit_mask(survivors, len(invite.identities))
        return cls(invite, transcript, subject, mask, tuple(sorted(signatures.items())))

    def encoded(self) -> bytes:
        """Its one encoding."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def parse(cls, data: bytes) -> Attestation:
        """Read what `encoded` wrote.

        Raises:
            CodecError: it is not one in its one encoding.
        """
        attestation = wire.parsed(_decoder, data, "an attestation of a secure sum")
        if attestation.encoded() != data:
            raise CodecError("an attestation of a secure sum is not in its one encoding")
        return attestation

    def verify(self, pinned: frozenset[bytes]) -> tuple[bytes, ...]:
        """Check all of it, without trust in whoever kept it.

        Args:
            pinned: the identities that may take part.

        Returns:
            The survivors' identities.

        Raises:
            InputError: the settings contradict each other.
            PeerError: an identity is not pinned, there are fewer survivors than the minimum, fewer signatures than the
                threshold, or one that does not verify.
        """
        invite = self.invite
        messages.check_invite(invite)
        survivors = messages.members_of(self.survivors, len(invite.identities))
        signers = [signer for signer, _ in self.signatures]
        if not pinned.issuperset(invite.identities):
            raise PeerError("the round's cohort holds an identity that is not pinned")
        if len(survivors) < invite.minimum:
            raise PeerError(f"the round has {len(survivors)} survivors, below its minimum of {invite.minimum}")
        if len(set(signers)) != len(signers) or not set(survivors).issuperset(signers):
            raise PeerError("a signature of the round comes twice, or from a client that did not survive")
        if len(signers) < invite.threshold:
            raise PeerError(f"{len(signers)} survivors signed the round, {invite.threshold} are needed")
        context, transcript = invite.context, messages.sum_transcript(self.transcript, self.subject)
        for signer, signature in self.signatures:
            content = messages.encode(Confirm(signer, transcript, self.survivors))
            if not verify(invite.identities[signer], context, content, signature):
                raise PeerError(f"client {signer} did not sign this round: settings, subject or survivors were changed")
        return tuple(invite.identities[client] for client in survivors)

    def __repr__(self) -> str:
        return f"Attestation({len(self.signatures)} signatures of {len(self.invite.identities)} clients)"


_decoder = msgspec.msgpack.Decoder(Attestation)
