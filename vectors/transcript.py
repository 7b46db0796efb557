"""Writes vectors/v1/transcript.json: the transcript of a run, and transcripts that an auditor must refuse.

    python vectors/transcript.py

Every key and every random choice comes from seeds, as in the vectors of the sums. An item of ``entries`` of a refused
transcript is the place of an entry of the honest one, from 0, or an entry in hexadecimal; the last one, whose place
from 1 is ``wrong``, is the first that must be refused. ``by`` says who made it: whoever keeps a transcript has no key,
the coordinator has its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from tacit.federated.parties import Parties
from tacit.federated.secure_sum.agreement import KeyPair
from tacit.federated.secure_sum.attestation import Attestation
from tacit.federated.secure_sum.client import MaskedClient, Policy, Task
from tacit.federated.secure_sum.masked import run_round
from tacit.federated.secure_sum.messages import Invite
from tacit.federated.secure_sum.parameters import choose
from tacit.federated.secure_sum.ring import Ring, Words
from tacit.federated.secure_sum.server import MaskedServer, Stage
from tacit.federated.secure_sum.shared_attestation import SharedAttestation
from tacit.federated.secure_sum.shared_client import upload
from tacit.federated.secure_sum.shared_messages import Terms
from tacit.federated.secure_sum.shared_server import SharedServer
from tacit.federated.transcript import (
    BEGINNING,
    Charge,
    Entry,
    Purpose,
    Spent,
    entry_digest,
    run_digest,
    seal,
    tensors_digest,
    unseal,
)
from tacit.identity import Identity
from tacit.mpc.steps import Role
from tacit.ring.prg import Prg

PATH = Path(__file__).parent / "v1" / "transcript.json"
CONFIG = b"seed = 1\n[secure_sum]\n"
CLIENTS, LENGTH, BITS = 5, 3, 20
RING, POLICY = Ring(BITS), Policy(3)
AGREED = "3 entries clipped to 1.0 in 16 bits, 4 clients, headroom 0"
EVENT = '{"type":"sampled-gaussian","noise_multiplier":1.0,"sampling_rate":1.0,"times":1}'
LOST = 3


def seed(kind: int, number: int = 0) -> bytes:
    """16 bytes."""
    return bytes([kind, number]) * 8


PARTIES = Parties(
    Identity(seed(0x80) * 2),
    Identity(seed(0x81) * 2),
    Identity(seed(0x82) * 2),
    tuple(Identity(seed(0x83, i) * 2) for i in range(CLIENTS)),
)
RUN = run_digest(CONFIG, PARTIES.coordinator.public)


def model(version: int) -> dict[str, torch.Tensor]:
    """A model."""
    return {
        "weight": torch.tensor([[1.0, -2.0], [0.5, version]], dtype=torch.float32),
        "seen": torch.tensor(version, dtype=torch.int64),
    }


def vector(number: int) -> Words:
    """A client's."""
    return np.array([number, 1, (1 << BITS) - 1], np.uint32)


def masked(number: int, cohort: Sequence[int], application: bytes) -> bytes:
    """The attestation of a masked sum; client `LOST` is lost before its vector arrives."""
    identities = [PARTIES.clients[client] for client in cohort]
    sharing = choose(len(cohort), POLICY.assumption)
    invite = Invite(
        seed(0x84, number),
        tuple(identity.public for identity in identities),
        sharing.holders,
        sharing.partners,
        sharing.threshold,
        max(POLICY.minimum, sharing.threshold + 1),
    )
    pinned, task = frozenset(PARTIES.pins.clients), Task(RING, LENGTH, application)
    clients = [
        MaskedClient(identity, pinned, POLICY, task, Prg(seed(0x85 + number, at)))
        for at, identity in enumerate(identities)
    ]
    outcome = run_round(
        MaskedServer(invite, task.subject),
        clients,
        vector,
        lambda at, stage: stage is Stage.MASK and cohort[at] == LOST,
    )
    return outcome.attestation.encoded()


def shared(number: int, cohort: Sequence[int], application: bytes) -> bytes:
    """The attestation of a shared sum."""
    pairs = {role: KeyPair(Prg(seed(0x90 + number, at))) for at, role in enumerate(Role)}
    terms = Terms(
        seed(0x84, number),
        tuple(PARTIES.clients[client].public for client in cohort),
        pairs[Role.ALICE].public,
        pairs[Role.BOB].public,
        LENGTH,
        BITS,
        POLICY.minimum,
        0,
        application,
    )
    alice, bob = (SharedServer(role, terms, pairs[role]) for role in Role)
    for at, client in enumerate(cohort):
        parts = upload(terms, at, PARTIES.clients[client], vector(client), Prg(seed(0xA0 + number, at)))
        alice.receive(parts.alice)
        bob.receive(parts.bob)
    for server in (alice, bob):
        server.settle(range(len(cohort)))
        server.reveal()
    return SharedAttestation.of(alice, alice.attest(PARTIES.alice), bob.attest(PARTIES.bob)).encoded()


def honest(run: bytes = RUN) -> list[bytes]:
    """Rounds 1 to 4, the third of them twice."""
    entries: list[bytes] = []
    beside = tensors_digest({})

    def add(round: int, protocol: str, cohort: Sequence[int], before: int, after: int) -> None:
        previous = entry_digest(entries[-1]) if entries else BEGINNING
        agreed = AGREED if cohort else ""
        purpose = Purpose(run, round, previous, tensors_digest(model(before)), beside, agreed)
        attestation, note = b"", "2 clients are left: no sum"
        if cohort:
            attest, note = masked if protocol == "masked" else shared, ""
            attestation = attest(len(entries), cohort, purpose.application)
        spent = Spent(1.5 * (len(entries) + 1), 1e-5, "client")
        charges = (Charge("central", f"run, round {round}", EVENT),)
        entry = Entry(purpose, tensors_digest(model(after)), protocol, attestation, note, spent, charges)  # type: ignore[arg-type]
        entries.append(seal(entry, PARTIES.coordinator))

    add(1, "masked", (0, 1, 2, 3), 0, 1)
    add(2, "none", (), 1, 1)
    add(3, "shared", (4, 2, 0), 1, 2)
    add(3, "masked", (0, 1, 2, 4), 1, 3)
    add(4, "masked", (1, 2, 3, 4, 0), 3, 4)
    return entries


def refused() -> Iterator[dict[str, Any]]:
    """Transcripts that an auditor must refuse."""
    entries = honest()
    parsed = [unseal(data)[0] for data in entries]
    last = len(entries) - 1
    other_run = honest(run_digest(CONFIG + b"\n", PARTIES.coordinator.public))

    def case(name: str, by: str, items: Sequence[int | bytes], wrong: int) -> dict[str, Any]:
        shown = [item.hex() if isinstance(item, bytes) else item for item in items[:wrong]]
        return {"name": name, "by": by, "entries": shown, "wrong": wrong}

    def rechained(place: int, changed: Entry) -> list[int | bytes]:
        result: list[bytes] = [*entries[:place], seal(changed, PARTIES.coordinator)]
        for following in parsed[place + 1 :]:
            purpose = msgspec.structs.replace(following.purpose, previous=entry_digest(result[-1]))
            result.append(seal(msgspec.structs.replace(following, purpose=purpose), PARTIES.coordinator))
        return [*range(place), *result[place:]]

    for place, data in enumerate(entries):
        around = (range(place), range(place + 1, last + 1))
        for name, changed in (
            ("a byte too few", data[:-1]),
            ("a byte too many", data + b"\0"),
            ("a bit of the content changed", data[:60] + bytes([data[60] ^ 1]) + data[61:]),
            ("a bit of the signature changed", data[:-1] + bytes([data[-1] ^ 1])),
            ("of another run", other_run[place]),
            ("signed by a client", seal(parsed[place], PARTIES.clients[0])),
        ):
            yield case(f"entry {place + 1}: {name}", "keeper", [*around[0], changed, *around[1]], place + 1)
        yield case(f"entry {place + 1}: twice", "keeper", [*range(place + 1), *range(place, last + 1)], place + 2)
        if place < last:
            yield case(f"entry {place + 1}: missing", "keeper", [*around[0], *around[1]], place + 1)
            exchanged = [*range(place), place + 1, place, *range(place + 2, last + 1)]
            yield case(f"entries {place + 1} and {place + 2} exchanged", "keeper", exchanged, place + 1)
    digest = bytes([7]) * 32
    for place, entry in enumerate(parsed):
        for field in Purpose.__struct_fields__:
            value: Any = {"round": entry.purpose.round + 1, "agreed": "8 bits"}.get(field, digest)
            changed_entry = msgspec.structs.replace(
                entry, purpose=msgspec.structs.replace(entry.purpose, **{field: value})
            )
            # Without a sum, nobody but the coordinator has signed what the round was for, until the next one is.
            late = entry.protocol == "none" and field in ("beside", "agreed")
            wrong = place + 2 if late else place + 1
            yield case(f"entry {place + 1}: {field} changed", "coordinator", rechained(place, changed_entry), wrong)
        if entry.attestation:
            for name, attestation in attestations(entry):
                changed_entry = msgspec.structs.replace(entry, attestation=attestation)
                yield case(f"entry {place + 1}: {name}", "coordinator", rechained(place, changed_entry), place + 1)
    for name, changes in {
        "its model after": {"after": digest},
        "its note": {"note": "all is well"},
        "privacy spent": {"spent": Spent(1.4, 1e-5, "client")},
        "charges": {"charges": ()},
    }.items():
        changed_entry = msgspec.structs.replace(parsed[0], **changes)
        wrong = 2 if name == "its model after" else 3
        yield case(f"entry 1: {name} changed", "coordinator", rechained(0, changed_entry), wrong)
    for name, spent in {
        "ε falls": Spent(1.0, 1e-5, "client"),
        "another δ": Spent(9.0, 1e-6, "client"),
        "another unit": Spent(9.0, 1e-5, "example"),
        "no ε": None,
    }.items():
        changed_entry = msgspec.structs.replace(parsed[last], spent=spent)
        yield case(f"the last entry: {name}", "coordinator", rechained(last, changed_entry), last + 1)
    skipped = msgspec.structs.replace(
        parsed[last],
        purpose=msgspec.structs.replace(parsed[last].purpose, round=6, previous=entry_digest(entries[last])),
    )
    yield case("a skipped round", "coordinator", [*range(last + 1), seal(skipped, PARTIES.coordinator)], last + 2)


def attestations(entry: Entry) -> Iterator[tuple[str, bytes]]:
    """Attestations of an entry that are not its own."""
    yield "no attestation", b""
    yield "an attestation that does not parse", entry.attestation[:-1]
    if entry.protocol == "masked":
        signed = Attestation.parse(entry.attestation)
        for field, value in {
            "round": bytes(16),
            "identities": signed.invite.identities[::-1],
            "minimum": 3 if len(signed.invite.identities) == 4 else 5,
            "threshold": 2 if signed.invite.threshold == 3 else 3,
        }.items():
            if getattr(signed.invite, field) != value:
                invite = msgspec.structs.replace(signed.invite, **{field: value})
                yield f"another {field} in what was signed", msgspec.structs.replace(signed, invite=invite).encoded()
        for field, value in {"length": LENGTH + 1, "bits": BITS + 1}.items():
            subject = msgspec.structs.replace(signed.subject, **{field: value})
            yield f"another {field} in what was signed", msgspec.structs.replace(signed, subject=subject).encoded()
        fewer = msgspec.structs.replace(signed, signatures=signed.signatures[: signed.invite.threshold - 1])
        yield "too few signatures", fewer.encoded()
    else:
        sent = SharedAttestation.parse(entry.attestation)
        yield "bob's signature missing", msgspec.structs.replace(sent, bob=bytes(64)).encoded()
        yield "a client's signature missing", msgspec.structs.replace(sent, parts=sent.parts[1:]).encoded()


def build() -> dict[str, Any]:
    """The whole file."""
    entries, pins = honest(), PARTIES.pins
    return {
        "specification": "docs/spec/transcript.md",
        "config": CONFIG.hex(),
        "run": RUN.hex(),
        "pins": {
            "coordinator": pins.coordinator.hex(),
            "alice": pins.alice.hex(),
            "bob": pins.bob.hex(),
            "clients": [key.hex() for key in pins.clients],
        },
        "models": [
            {
                "tensors": [
                    {
                        "name": name,
                        "dtype": str(tensor.dtype)[6:],
                        "shape": list(tensor.shape),
                        "values": tensor.tolist(),
                    }
                    for name, tensor in model(version).items()
                ],
                "digest": tensors_digest(model(version)).hex(),
            }
            for version in range(5)
        ],
        "applications": [unseal(data)[0].purpose.application.hex() for data in entries],
        "entries": [data.hex() for data in entries],
        "digests": [entry_digest(data).hex() for data in entries],
        "summed": [[0, 1, 2], [], [0, 2, 4], [0, 1, 2, 4], [0, 1, 2, 4]],
        "refused": list(refused()),
    }


def main() -> None:
    """Write the file."""
    PATH.write_text(json.dumps(build(), indent=1) + "\n")


if __name__ == "__main__":
    main()
