"""A small run's transcript for tests: masked and shared sums, a round without one, and one that was run again."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import torch
from torch import nn

from tacit.federated.algorithm import ServerState
from tacit.federated.fedavg import FedAvg
from tacit.federated.parties import Parties
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.interface import SecureSum, Summed
from tacit.federated.secure_sum.masked import MaskedSum
from tacit.federated.secure_sum.ring import Ring
from tacit.federated.secure_sum.shared import SharedSum
from tacit.federated.transcript import Charge, Entry, Spent, Transcript, entry_digest, run_digest, seal, unseal
from tacit.identity import Identity

CLIENTS, RING, LENGTH = 6, Ring(20), 4
PARTIES = Parties.simulated(Identity(bytes(31) + b"\1"), CLIENTS)
CONFIG = b"seed = 1\n"
RUN = run_digest(CONFIG, PARTIES.coordinator.public)
MASKED = MaskedSum(PARTIES.clients, Policy(3))
SHARED = SharedSum(PARTIES.clients, PARTIES.alice, PARTIES.bob, 3)
EVENT = '{"type":"sampled-gaussian","noise_multiplier":1.0,"sampling_rate":1.0,"times":1}'


def state(round: int, version: int = 0) -> ServerState:
    """The server's after a round."""
    fresh = FedAvg().init(nn.Linear(2, 1), CLIENTS)
    return replace(fresh, parameters=torch.full_like(fresh.parameters, round + version / 10), round=round)


def summed(protocol: SecureSum, cohort: Sequence[int], application: bytes, lost: int | None = None) -> Summed:
    """A sum of zeros."""
    return protocol.sum(RING, LENGTH, cohort, lambda i: None if i == lost else RING.zeros(LENGTH), application)


def written(parties: Parties = PARTIES, run: bytes = RUN) -> list[bytes]:
    """Rounds 1 to 4, the third of them twice: masked, none, shared, masked again, masked."""
    entries: list[bytes] = []
    charges: list[Charge] = []

    def charged() -> list[Charge]:
        taken = list(charges)
        charges.clear()
        return taken

    transcript = Transcript(run, parties.coordinator, entries.append, charges=charged)
    masked = MaskedSum(parties.clients, Policy(3))
    shared = SharedSum(parties.clients, parties.alice, parties.bob, 3)
    rounds: list[tuple[int, int, SecureSum | None, Sequence[int], int | None]] = [
        (1, 0, masked, (0, 1, 2, 3, 5), 3),
        (2, 0, None, (), None),
        (3, 0, shared, (5, 4, 2, 1), 4),
        (3, 1, masked, (0, 2, 4, 5), None),
        (4, 1, masked, (1, 2, 3, 4, 5), None),
    ]
    states = {0: state(0)}
    for number, version, protocol, cohort, lost in rounds:
        before = states[number - 1]
        after = replace(before, round=number) if protocol is None else state(number, version)
        states[number] = after
        charges.append(Charge("central", f"run, round {number}", EVENT))
        total = None
        if protocol is not None:
            total = summed(protocol, cohort, transcript.open(before, "how vectors are encoded"), lost)
        note = "" if total else "nobody was there"
        transcript.close(before, after, total, Spent(float(len(entries) + 1), 1e-5, "client"), note)
    return entries


def resealed(entries: Sequence[bytes], place: int, changed: Entry, parties: Parties = PARTIES) -> list[bytes]:
    """What a coordinator makes of a transcript in which it changes an entry: it signs it, and chains those after it."""
    result = [*entries[:place], seal(changed, parties.coordinator)]
    for data in entries[place + 1 :]:
        entry, _ = unseal(data)
        purpose = msgspec.structs.replace(entry.purpose, previous=entry_digest(result[-1]))
        result.append(seal(msgspec.structs.replace(entry, purpose=purpose), parties.coordinator))
    return result
