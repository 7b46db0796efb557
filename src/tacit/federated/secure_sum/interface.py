"""What every secure sum offers, and the plain sum that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tacit.errors import InputError, PeerError
from tacit.federated.secure_sum.agreement import DIGEST_BYTES
from tacit.federated.secure_sum.ring import Ring, Words

VectorOf = Callable[[int], Words | None]
"""The vector of one client of the cohort; ``None`` if the client is lost before it has one."""


Opening = Callable[[tuple[int, ...]], None]
"""Told whose vectors a sum holds, ascending, before anybody can see it; an error keeps it closed."""


def unannounced(survivors: tuple[int, ...]) -> None:
    """Whoever opens the sum need not be asked."""


ABOUT_NOTHING = bytes(DIGEST_BYTES)
"""The ``application`` of a sum that is of use outside of any run, as in a benchmark."""


@dataclass(frozen=True)
class Safeguards:
    """What kept a sum from telling more than it should.

    Args:
        protocol: how the sum was taken; ``"plain"``: in the clear.
        invited: clients in the cohort.
        minimum: the fewest vectors that the clients let into a sum.
        holders: clients that hold shares of a client's secrets, or servers that hold shares of its vector.
        threshold: how many of those it takes to have it back.
        verified: whether norms of vectors were verified before they were added.
        noised_by: who added noise that was in the sum before anybody saw it; empty if nobody did.
    """

    protocol: Literal["masked", "shared", "plain"]
    invited: int
    minimum: int
    holders: int
    threshold: int
    verified: bool = False
    noised_by: Literal["", "clients", "servers"] = ""


@dataclass(frozen=True)
class Traffic:
    """Bytes of whole frames, by client."""

    up: Mapping[int, int] = field(default_factory=dict)
    down: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Summed:
    """What a secure sum ends with.

    Args:
        total: the sum of the survivors' vectors modulo 2^b.
        survivors: the clients whose vectors are in it, ascending.
        lost: why each other client of the cohort is not.
        traffic: bytes up and down, by client.
        safeguards: under which conditions.
        attestation: what clients (and servers) signed, for whoever audits the round; empty for a plain sum. An encoded
            `tacit.federated.secure_sum.attestation.Attestation` of a masked sum,
            `tacit.federated.secure_sum.shared_attestation.SharedAttestation` of a shared one.
    """

    total: Words
    survivors: tuple[int, ...]
    lost: Mapping[int, str]
    traffic: Traffic
    safeguards: Safeguards
    attestation: bytes = b""


class SecureSum(Protocol):
    """Sums the vectors of a cohort modulo 2^b; each call is one round, with keys and masks of its own."""

    @property
    def minimum(self) -> int:
        """The fewest vectors in a sum: of fewer, nothing is revealed."""
        ...

    def sum(
        self,
        ring: Ring,
        length: int,
        cohort: Sequence[int],
        vector_of: VectorOf,
        application: bytes = ABOUT_NOTHING,
        opening: Opening = unannounced,
    ) -> Summed:
        """Run one round.

        Args:
            ring: Z/2^b; `tacit.federated.secure_sum.encoding.Encoding` chooses b so that the sum cannot wrap.
            length: entries of a vector.
            cohort: the clients, distinct.
            vector_of: called at most once a client, when the protocol is ready for its vector.
            application: a digest, 32 bytes, of what the sum is for (`tacit.federated.transcript.Purpose`): all that
                clients sign in the round covers it, and they refuse a round for anything else.
            opening: called once whose vectors are summed is certain, and before anything is revealed.

        Raises:
            InputError: the settings do not allow a secure sum of this cohort; nothing has been sent.
            PeerError: too many clients were lost, or somebody did not keep to the protocol; nothing is revealed.
        """
        ...


@dataclass(frozen=True)
class PlainSum:
    """The sum in the clear: the server sees every vector. What a secure sum must equal, word for word.

    Args:
        minimum: the fewest vectors in a sum.
    """

    minimum: int = 1

    def sum(
        self,
        ring: Ring,
        length: int,
        cohort: Sequence[int],
        vector_of: VectorOf,
        application: bytes = ABOUT_NOTHING,
        opening: Opening = unannounced,
    ) -> Summed:
        """See `SecureSum.sum`."""
        if not cohort or len(set(cohort)) != len(cohort):
            raise InputError(f"a cohort of {len(cohort)} clients: give at least one, each once")
        total, survivors = ring.zeros(length), []
        for client in cohort:
            words = vector_of(client)
            if words is not None:
                ring.require(words, length)
                total += words
                survivors.append(client)
        if len(survivors) < self.minimum:
            raise PeerError(f"{len(survivors)} vectors came and {self.minimum} are needed: no sum")
        opening(tuple(sorted(survivors)))
        lost = dict.fromkeys(set(cohort) - set(survivors), "no vector")
        size = -(-ring.bits * length // 8)
        traffic = Traffic(dict.fromkeys(survivors, size), {})
        safeguards = Safeguards("plain", len(cohort), self.minimum, 0, 0)
        return Summed(ring.reduce_(total), tuple(sorted(survivors)), lost, traffic, safeguards)
