"""The shared sum in one process: the real clients, servers and protocols, moved by hand.

`SharedSum` is a `tacit.federated.secure_sum.interface.SecureSum`; docs/spec/shared-sum.md says what crosses between
the parties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tacit.errors import InputError, PeerError, TooFewUpdates
from tacit.federated.secure_sum.agreement import KeyPair
from tacit.federated.secure_sum.client import Task
from tacit.federated.secure_sum.interface import (
    ABOUT_NOTHING,
    Opening,
    Safeguards,
    Summed,
    Traffic,
    VectorOf,
    unannounced,
)
from tacit.federated.secure_sum.masked import Meter
from tacit.federated.secure_sum.messages import ROUND_BYTES
from tacit.federated.secure_sum.ring import Ring, Words
from tacit.federated.secure_sum.shared_attestation import SharedAttestation
from tacit.federated.secure_sum.shared_client import Parts, SharedPolicy, upload
from tacit.federated.secure_sum.shared_messages import Terms, check_terms
from tacit.federated.secure_sum.shared_server import SharedServer, total_of
from tacit.identity import Identity
from tacit.mpc.lockstep import Trio
from tacit.mpc.steps import Role
from tacit.ring.prg import Prg

NoiseOf = Callable[[Role, int], NDArray[np.int64]]
TOO_LONG = "its vector is longer than the bound allows"
APART = "its two parts do not belong together, or one did not arrive"
BATCH = 32
"""Clients whose vectors are checked together: the rows of the projection are expanded once for all of them."""


def settle(alice: SharedServer, bob: SharedServer, trio: Trio) -> tuple[int, ...]:
    """Let the two servers finish what waits at both.

    Returns:
        The clients that were excluded, ascending.
    """
    common = alice.common(bob.claims)
    if not alice.terms.bound or not common:
        for server in (alice, bob):
            server.settle(common, [True] * len(common))
        return ()
    answers = trio.run(alice.check(common), bob.check(common))
    for server, accepted in zip((alice, bob), answers, strict=True):
        server.settle(common, accepted)
    return tuple(number for number, good in zip(common, answers[0], strict=True) if not good)


@dataclass(frozen=True)
class SharedSum:
    """Secure aggregation by two servers that do not collude; see docs/spec/shared-sum.md.

    Args:
        identities: of all the clients there are, by index.
        alice, bob: the servers' identities, which clients pin.
        minimum: the fewest vectors in a sum, at least 3.
        bound: B, the largest L2 norm of a client's vector of integers, verified on shares (see
            `tacit.federated.secure_sum.shared_bounds`, and `norm_bound` there); 0 to verify nothing.
        noise: what alice and bob each add to the sum, as integers, by their role and the vectors' length; drawn afresh
            at each call. The encoding's headroom, times its clients, must hold both.
        meter: what is told of times and bytes, by index of the client.
    """

    identities: tuple[Identity, ...] = field(repr=False)
    alice: Identity
    bob: Identity
    minimum: int
    bound: int = 0
    noise: NoiseOf | None = None
    meter: Meter = field(default_factory=Meter, repr=False, compare=False)

    @classmethod
    def among(cls, clients: int, minimum: int, bound: int = 0) -> SharedSum:
        """Clients and servers with new identities."""
        identities = tuple(Identity.fresh() for _ in range(clients))
        return cls(identities, Identity.fresh(), Identity.fresh(), minimum, bound)

    def sum(
        self,
        ring: Ring,
        length: int,
        cohort: Sequence[int],
        vector_of: VectorOf,
        application: bytes = ABOUT_NOTHING,
        opening: Opening = unannounced,
    ) -> Summed:
        """See `tacit.federated.secure_sum.interface.SecureSum.sum`.

        A client that is lost before it has a vector costs nothing. Those whose vectors are beyond the bound, or whose
        parts a server refuses, are among the lost; nobody has seen their vectors.
        """
        if len(set(cohort)) != len(cohort) or not all(0 <= client < len(self.identities) for client in cohort):
            raise InputError(f"the cohort names a client twice or one that is not among the {len(self.identities)}")
        if len(cohort) < self.minimum:
            raise TooFewUpdates(f"a cohort of {len(cohort)} clients, who ask for {self.minimum} vectors in a sum")
        pairs = {role: KeyPair(Prg.fresh()) for role in Role}
        terms = Terms(
            round=Prg.fresh().bytes(ROUND_BYTES),
            identities=tuple(self.identities[client].public for client in cohort),
            alice=pairs[Role.ALICE].public,
            bob=pairs[Role.BOB].public,
            length=length,
            bits=ring.bits,
            minimum=self.minimum,
            bound=self.bound,
            application=application,
        )
        check_terms(terms)
        alice, bob = (SharedServer(role, terms, pairs[role]) for role in Role)
        endorsements = {Role.ALICE: alice.endorse(self.alice), Role.BOB: bob.endorse(self.bob)}
        policy = SharedPolicy(self.minimum, self.alice.public, self.bob.public)
        policy.require(terms, Task(ring, length, application), endorsements)
        trio, up, lost = Trio(), dict[int, int](), dict[int, str]()
        for number, client in enumerate(cohort):
            words = vector_of(client)
            if words is None:
                lost[client] = "no vector"
                continue
            with self.meter.client(client):
                parts = self.parts_of(terms, number, client, words)
            up[client] = len(parts.alice) + len(parts.bob)
            with self.meter.server():
                for server, part in ((alice, parts.alice), (bob, parts.bob)):
                    try:
                        server.receive(part)
                    except PeerError as error:
                        lost[client] = f"{server.role.value} refused its part: {error}"
                if len(alice.common(bob.claims)) == BATCH:
                    lost |= {cohort[i]: TOO_LONG for i in settle(alice, bob, trio)}
        with self.meter.server():
            lost |= {cohort[i]: TOO_LONG for i in settle(alice, bob, trio)}
            lost |= {client: APART for i, client in enumerate(cohort) if i not in alice.summed and client not in lost}
            if len(alice.summed) >= terms.minimum:
                opening(tuple(sorted(cohort[i] for i in alice.summed)))
            total = total_of(terms, *(self._revealed(server) for server in (alice, bob)))
            attestation = SharedAttestation.of(alice, alice.attest(self.alice), bob.attest(self.bob))
        return Summed(
            total,
            tuple(sorted(cohort[i] for i in alice.summed)),
            lost,
            Traffic(up, {}),
            Safeguards("shared", len(cohort), self.minimum, 2, 2, verified=self.bound > 0),
            attestation.encoded(),
        )

    def parts_of(self, terms: Terms, number: int, client: int, words: Words) -> Parts:
        """What a client sends the two servers, by its number in the round and its index."""
        return upload(terms, number, self.identities[client], words, Prg.fresh())

    def _revealed(self, server: SharedServer) -> bytes:
        noise = self.noise
        return server.reveal(None if noise is None else lambda length: noise(server.role, length))
