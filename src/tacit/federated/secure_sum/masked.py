"""The masked sum in one process: the real clients, the real server and the real frames, without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tacit.errors import InputError, PeerError, TooFewUpdates
from tacit.federated.secure_sum.agreement import verifying_once
from tacit.federated.secure_sum.client import MaskedClient, Policy, Task
from tacit.federated.secure_sum.interface import (
    ABOUT_NOTHING,
    Opening,
    Safeguards,
    Summed,
    Traffic,
    VectorOf,
    unannounced,
)
from tacit.federated.secure_sum.messages import ROUND_BYTES, Invite
from tacit.federated.secure_sum.parameters import choose
from tacit.federated.secure_sum.ring import Ring
from tacit.federated.secure_sum.server import MaskedServer, Outcome, Stage
from tacit.identity import Identity
from tacit.ring.prg import Prg

Lost = Callable[[int, Stage], bool]
"""Whether a client of the cohort, by its number, is lost before its answer in a stage."""


def never(client: int, stage: Stage) -> bool:
    """No client is lost."""
    return False


@dataclass
class Meter:
    """Counts what a round costs each client and the server.

    Args:
        clock: seconds that only go up, such as ``time.process_time``.
        client_seconds: by the client's number.
        server_seconds: all stages together.
        up: bytes of frames from each client.
        down: bytes of frames to each client.
    """

    clock: Callable[[], float] = lambda: 0.0
    client_seconds: dict[int, float] = field(default_factory=dict)
    server_seconds: float = 0.0
    up: dict[int, int] = field(default_factory=dict)
    down: dict[int, int] = field(default_factory=dict)

    @contextmanager
    def client(self, number: int) -> Iterator[None]:
        """Time what a client does."""
        began = self.clock()
        yield
        self.client_seconds[number] = self.client_seconds.get(number, 0.0) + self.clock() - began

    @contextmanager
    def server(self) -> Iterator[None]:
        """Time what the server does."""
        began = self.clock()
        yield
        self.server_seconds += self.clock() - began

    def sent(self, counts: dict[int, int], number: int, frame: bytes) -> None:
        """Count a frame."""
        counts[number] = counts.get(number, 0) + len(frame)


def run_round(
    server: MaskedServer,
    clients: Sequence[MaskedClient],
    vector_of: VectorOf,
    lost: Lost = never,
    meter: Meter | None = None,
    opening: Opening = unannounced,
) -> Outcome:
    """Run one round to its end; keeps one masked vector at a time.

    Args:
        server: new.
        clients: the cohort in the order of the invitation, new.
        vector_of: the vector of a client, by its number; called when the client is ready to mask it.
        lost: which clients are lost, and when.
        meter: what is told of times and bytes.
        opening: see `tacit.federated.secure_sum.interface.SecureSum.sum`; told the clients' numbers.

    Raises:
        InputError: a client does not agree to the round, or its vector does not fit.
        PeerError: too few clients are left: no sum.
    """
    meter = meter or Meter()
    invite = server.invite()
    frames: Iterable[tuple[int, bytes]] = [(number, invite) for number in range(len(clients))]
    while server.stage is not Stage.DONE:
        for number, frame in frames:
            if lost(number, server.stage):
                continue
            meter.sent(meter.down, number, frame)
            with meter.client(number):
                try:
                    answer = clients[number].receive(frame)
                except PeerError:
                    # It goes on without a client that sees no way to: too few of its holders are left, say.
                    continue
            if server.stage is Stage.MASK:
                words = vector_of(number)
                if words is None:
                    continue
                with meter.client(number):
                    answer = clients[number].mask(words)
            if answer is not None:
                meter.sent(meter.up, number, answer)
                with meter.server():
                    server.receive(answer)
        with meter.server():
            frames = sorted(server.close().items())
        if server.stage is Stage.CONFIRM:
            opening(server.survivors)
    return server.outcome


@dataclass(frozen=True)
class MaskedSum:
    """Secure aggregation by one server that learns nothing but the sum; see docs/spec/masked-sum.md.

    Args:
        identities: of all the clients there are, by index.
        policy: what every client insists on.
        lost: which clients, by index, are lost and when; for rehearsals.
    """

    identities: tuple[Identity, ...] = field(repr=False)
    policy: Policy
    lost: Lost = never

    @classmethod
    def among(cls, clients: int, policy: Policy) -> MaskedSum:
        """Clients with new identities, all pinned by all."""
        return cls(tuple(Identity.fresh() for _ in range(clients)), policy)

    @property
    def minimum(self) -> int:
        """The fewest vectors that the clients let into a sum."""
        return self.policy.minimum

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

        A client's vector is asked for between the exchange of keys and the upload, so training may be done in it.
        """
        if len(set(cohort)) != len(cohort) or not all(0 <= client < len(self.identities) for client in cohort):
            raise InputError(f"the cohort names a client twice or one that is not among the {len(self.identities)}")
        invite = self.invitation(cohort)
        pinned = frozenset(identity.public for identity in self.identities)
        task = Task(ring, length, application)
        verify = verifying_once()
        clients = [MaskedClient(self.identities[c], pinned, self.policy, task, Prg.fresh(), verify) for c in cohort]
        meter = Meter()
        outcome = run_round(
            MaskedServer(invite, task.subject, verify),
            clients,
            lambda number: vector_of(cohort[number]),
            lambda number, stage: self.lost(cohort[number], stage),
            meter,
            lambda numbers: opening(tuple(sorted(cohort[number] for number in numbers))),
        )
        return Summed(
            outcome.total,
            tuple(sorted(cohort[number] for number in outcome.survivors)),
            {cohort[number]: why for number, why in outcome.lost.items()},
            Traffic(
                {cohort[number]: count for number, count in meter.up.items()},
                {cohort[number]: count for number, count in meter.down.items()},
            ),
            Safeguards("masked", len(cohort), invite.minimum, invite.holders, invite.threshold),
            outcome.attestation.encoded(),
        )

    def invitation(self, cohort: Sequence[int]) -> Invite:
        """The settings of a new round, see the function `invitation`."""
        return invitation([self.identities[client].public for client in cohort], self.policy)


def invitation(identities: Sequence[bytes], policy: Policy, minimum: int = 0) -> Invite:
    """The settings of a new round.

    Args:
        identities: of the cohort.
        policy: what its clients insist on.
        minimum: the fewest vectors in a sum, if it is more than the clients insist on.

    Raises:
        TooFewUpdates: the cohort is too small for the policy.
        InputError: it is too small for any.
    """
    least = max(policy.minimum, minimum)
    if len(identities) < least:
        raise TooFewUpdates(f"a cohort of {len(identities)} clients: their policy asks for {least} vectors in a sum")
    sharing = choose(len(identities), policy.assumption)
    return Invite(
        round=Prg.fresh().bytes(ROUND_BYTES),
        identities=tuple(identities),
        holders=sharing.holders,
        partners=sharing.partners,
        threshold=sharing.threshold,
        minimum=max(least, sharing.threshold + 1),
    )
