"""Small cohorts of the masked sum for tests: fixed seeds, and frames that a test can interfere with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tacit.errors import PeerError, TacitError
from tacit.federated.secure_sum.client import MaskedClient, Policy, Task
from tacit.federated.secure_sum.messages import Invite, Subject
from tacit.federated.secure_sum.parameters import Assumption, choose
from tacit.federated.secure_sum.ring import Ring, Words
from tacit.federated.secure_sum.server import MaskedServer, Stage
from tacit.identity import Identity
from tacit.ring.prg import Prg

STAGES = tuple(Stage)[:5]


def prg(*numbers: int) -> Prg:
    return Prg(bytes(numbers).ljust(16, b"\0"))


@dataclass(frozen=True)
class World:
    """A cohort of n clients and the settings of a round."""

    n: int
    length: int = 5
    bits: int = 20
    minimum: int = 3
    assumption: Assumption = field(default_factory=Assumption)
    round: int = 0

    @property
    def ring(self) -> Ring:
        return Ring(self.bits)

    @property
    def policy(self) -> Policy:
        return Policy(self.minimum, self.assumption)

    def identity(self, number: int) -> Identity:
        return Identity(number.to_bytes(2, "big") + bytes(30))

    @property
    def identities(self) -> tuple[Identity, ...]:
        return tuple(self.identity(number) for number in range(self.n))

    @property
    def invite(self) -> Invite:
        sharing = choose(self.n, self.assumption)
        return Invite(
            round=self.round.to_bytes(16, "big"),
            identities=tuple(identity.public for identity in self.identities),
            holders=sharing.holders,
            partners=sharing.partners,
            threshold=sharing.threshold,
            minimum=max(self.minimum, sharing.threshold + 1),
        )

    @property
    def subject(self) -> Subject:
        return Subject(self.length, self.bits, bytes(32))

    @property
    def server(self) -> MaskedServer:
        return MaskedServer(self.invite, self.subject)

    def client(self, number: int) -> MaskedClient:
        pinned = frozenset(identity.public for identity in self.identities)
        seed = prg(1, self.round, number >> 8, number & 255)
        return MaskedClient(self.identity(number), pinned, self.policy, Task(self.ring, self.length), seed)

    def clients(self) -> list[MaskedClient]:
        return [self.client(number) for number in range(self.n)]

    def vector(self, number: int) -> Words:
        words = prg(2, number >> 8, number & 255).array(8 * self.length).view(np.int64)
        return self.ring.residues(words)

    def plain(self, survivors: Sequence[int]) -> Words:
        total = sum(self.vector(number).astype(np.int64) for number in survivors)
        return self.ring.residues(np.asarray(total))


Tamper = Callable[[str, Stage, int, bytes], list[bytes]]
"""What arrives in place of a frame: ``"up"`` from or ``"down"`` to a client, in a stage, by its number."""


@dataclass
class Ran:
    """What came of a round under interference."""

    survivors: tuple[int, ...] = ()
    total: Words | None = None
    failure: str = ""
    refused: list[str] = field(default_factory=list)
    frames: dict[tuple[str, Stage, int], bytes] = field(default_factory=dict)
    unmasked: set[int] = field(default_factory=set)


def untouched(direction: str, stage: Stage, number: int, frame: bytes) -> list[bytes]:
    return [frame]


def run(world: World, tamper: Tamper = untouched, order: Callable[[list[int]], list[int]] = list) -> Ran:
    """Run a round whose frames go through ``tamper``; every refusal is noted, and a client that refuses is lost."""
    ran, server, clients = Ran(), world.server, world.clients()
    frames = dict.fromkeys(range(world.n), server.invite())
    while server.stage in STAGES:
        stage = server.stage
        answers = []
        for number, frame in frames.items():
            ran.frames["down", stage, number] = frame
            for arriving in tamper("down", stage, number, frame):
                try:
                    answer = clients[number].receive(arriving)
                    if stage is Stage.MASK:
                        answer = clients[number].mask(world.vector(number))
                except TacitError as error:
                    ran.refused.append(f"client {number}: {error}")
                    continue
                answers.append(number)
                ran.frames["up", stage, number] = answer
        for number in order(answers):
            for arriving in tamper("up", stage, number, ran.frames["up", stage, number]):
                try:
                    server.receive(arriving)
                except PeerError as error:
                    ran.refused.append(f"server: {error}")
            if stage is Stage.UNMASK:
                ran.unmasked.add(number)
        try:
            frames = server.close()
        except PeerError as error:
            ran.failure = str(error)
            return ran
    ran.survivors, ran.total = server.outcome.survivors, server.outcome.total
    return ran


def require_exact(world: World, ran: Ran) -> None:
    assert ran.failure == ""
    assert np.array_equal(ran.total, world.plain(ran.survivors))
