"""What every secure sum offers, and the plain sum that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tacit.errors import InputError
from tacit.federated.secure_sum.ring import Ring, Words

VectorOf = Callable[[int], Words | None]
"""The vector of one client of the cohort; ``None`` if the client is lost before it has one."""


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
        attestation: what the survivors signed, for whoever audits the round; empty for a plain sum. Of a masked sum it
            is an encoded `tacit.federated.secure_sum.attestation.Attestation`.
    """

    total: Words
    survivors: tuple[int, ...]
    lost: Mapping[int, str]
    traffic: Traffic
    attestation: bytes = b""


class SecureSum(Protocol):
    """Sums the vectors of a cohort modulo 2^b; each call is one round, with keys and masks of its own."""

    def sum(self, ring: Ring, length: int, cohort: Sequence[int], vector_of: VectorOf) -> Summed:
        """Run one round.

        Args:
            ring: Z/2^b; `tacit.federated.secure_sum.encoding.Encoding` chooses b so that the sum cannot wrap.
            length: entries of a vector.
            cohort: the clients, distinct.
            vector_of: called at most once a client, when the protocol is ready for its vector.

        Raises:
            InputError: the settings do not allow a secure sum of this cohort; nothing has been sent.
            PeerError: too many clients were lost, or somebody did not keep to the protocol; nothing is revealed.
        """
        ...


@dataclass(frozen=True)
class PlainSum:
    """The sum in the clear: the server sees every vector. What a secure sum must equal, word for word."""

    def sum(self, ring: Ring, length: int, cohort: Sequence[int], vector_of: VectorOf) -> Summed:
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
        lost = dict.fromkeys(set(cohort) - set(survivors), "no vector")
        size = -(-ring.bits * length // 8)
        traffic = Traffic(dict.fromkeys(survivors, size), {})
        return Summed(ring.reduce_(total), tuple(sorted(survivors)), lost, traffic)
