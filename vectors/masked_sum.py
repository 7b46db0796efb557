"""Writes vectors/v1/masked_sum.json: a whole round of the masked sum, and frames that must be refused.

    python vectors/masked_sum.py

Every key and every random choice comes from the seeds in the file, in the order that docs/spec/masked-sum.md gives, so
an implementation in any language can follow the round frame by frame. A frame of ``refused`` is given to a client or to
the server in the state that it has just before the frame of that stage arrives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tacit import wire
from tacit.federated.secure_sum import agreement, messages
from tacit.federated.secure_sum.agreement import KeyPair, sign
from tacit.federated.secure_sum.client import MaskedClient, Policy, Task, vector_digest
from tacit.federated.secure_sum.messages import Confirmations, Inbox, Invite, Roster, Subject, Survivors
from tacit.federated.secure_sum.parameters import Assumption, choose
from tacit.federated.secure_sum.ring import Ring
from tacit.federated.secure_sum.server import MaskedServer, Stage
from tacit.identity import Identity
from tacit.ring import shamir
from tacit.ring.prg import Prg

PATH = Path(__file__).parent / "v1" / "masked_sum.json"
N, LENGTH, BITS, MINIMUM, LOST = 4, 5, 20, 3, 3
RING = Ring(BITS)
SUBJECT = Subject(LENGTH, BITS, bytes(range(32)))
POLICY = Policy(MINIMUM, Assumption(0.1, 0.1, True))
SUBJECTS = {
    "inbox: other length": Subject(LENGTH + 1, BITS, SUBJECT.application),
    "inbox: other ring": Subject(LENGTH, BITS - 1, SUBJECT.application),
    "inbox: other application": Subject(LENGTH, BITS, bytes(32)),
}
STAGES = tuple(Stage)[:5]
Frames = dict[tuple[str, Stage, int], bytes]


def identity_seed(number: int) -> bytes:
    """Of a client's long-term key."""
    return bytes([0x10 + number] * 32)


def client_seed(number: int, round: int = 1) -> bytes:
    """Of all that a client draws in a round."""
    return bytes([0x20 + number] * 15 + [round])


def vector(number: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """What a client adds: the ends of the ring among it."""
    return np.array([number + 1, (1 << BITS) - 1, 0, 1 << (BITS - 1), 1000 * number + 17], np.uint32)


def invite(round: int = 1) -> Invite:
    """The settings."""
    sharing = choose(N, POLICY.assumption)
    return Invite(
        round=bytes(15) + bytes([round]),
        identities=tuple(Identity(identity_seed(i)).public for i in range(N)),
        holders=sharing.holders,
        partners=sharing.partners,
        threshold=sharing.threshold,
        minimum=MINIMUM,
    )


def client(number: int, round: int = 1) -> MaskedClient:
    """A client before its round."""
    identity = Identity(identity_seed(number))
    task = Task(RING, LENGTH, SUBJECT.application)
    return MaskedClient(identity, frozenset(invite().identities), POLICY, task, Prg(client_seed(number, round)))


def play(round: int = 1) -> tuple[Frames, MaskedServer]:
    """The round: client `LOST` shares its secrets and is lost before its vector arrives."""
    frames: Frames = {}
    server, clients = MaskedServer(invite(round), SUBJECT), [client(i, round) for i in range(N)]
    arriving = dict.fromkeys(range(N), server.invite())
    for stage in STAGES:
        for number, frame in arriving.items():
            frames["down", stage, number] = frame
            answer = clients[number].receive(frame)
            if stage is Stage.MASK:
                answer = clients[number].mask(vector(number))
            if answer is not None and (number, stage) != (LOST, Stage.MASK):
                frames["up", stage, number] = answer
                server.receive(answer)
        arriving = server.close()
    return frames, server


def refused(frames: Frames, other_round: Frames) -> Iterator[dict[str, Any]]:
    """Frames, each with who is to refuse it, when, and with which error."""

    def case(name: str, to: str, stage: Stage, frame: bytes, error: str) -> dict[str, Any]:
        return {"name": name, "to": to, "client": 0, "stage": int(stage), "frame": frame.hex(), "error": error}

    for direction, to in (("down", "client"), ("up", "server")):
        for stage in STAGES:
            good, what = frames[direction, stage, 0], f"{stage.name} {direction}"
            yield case(f"{what}: empty", to, stage, b"", "CodecError")
            yield case(f"{what}: last byte missing", to, stage, good[:-1], "CodecError")
            yield case(f"{what}: a byte too many", to, stage, good + b"\0", "CodecError")
            yield case(f"{what}: unknown version", to, stage, good[:4] + b"\2" + good[5:], "CodecError")
            yield case(f"{what}: frame of another kind", to, stage, good[:5] + b"\3" + good[6:], "CodecError")
            yield case(f"{what}: numbered for another stage", to, stage, renumbered(good, (stage + 1) % 5), "PeerError")
            another = frames[direction, Stage((stage + 1) % 5), 0]
            # A vector is not even read where none is due, nor a second invitation.
            unread = (direction, stage) in (("up", Stage.SHARE), ("down", Stage.UNMASK))
            error = "CodecError" if unread else "PeerError"
            yield case(f"{what}: the message of another stage", to, stage, another, error)
            if (direction, stage) != ("down", Stage.ADVERTISE):
                replayed = other_round[direction, stage, 0]
                error = "CodecError" if to == "client" else "PeerError"
                yield case(f"{what}: of another round", to, stage, replayed, error)
    for stage in STAGES:
        yield case(
            f"{stage.name} up: signature changed", "server", stage, resigned(frames["up", stage, 0], 1), "PeerError"
        )
    for name, stage, message in lies(frames):
        error = "InputError" if stage is Stage.ADVERTISE or name in SUBJECTS else "PeerError"
        yield case(name, "client", stage, messages.server_frame(stage, message), error)
    for name, stage, message, packed in breaches(frames):
        content = messages.encode(message)
        signature = sign(Identity(identity_seed(0)), invite().context, content)
        frame = messages.client_frame(stage, content, signature, packed)
        yield case(name, "server", stage, frame, "CodecError" if "unused bits" in name else "PeerError")


def renumbered(frame: bytes, stage: int) -> bytes:
    """The same frame with another stage number."""
    opened = wire.decode(frame)
    return wire.encode(opened.kind, stage, opened.tensors, opened.body)


def resigned(frame: bytes, signer: int) -> bytes:
    """The same message of client 0, signed by another."""
    stage, message, _, packed = messages.read_client_frame(frame, 1 << 20)
    content = messages.encode(message)
    return messages.client_frame(
        stage, content, sign(Identity(identity_seed(signer)), invite().context, content), packed
    )


def lies(frames: Frames) -> Iterator[tuple[str, Stage, messages.FromServer]]:
    """Messages that a server must not get away with."""
    settings: list[tuple[str, dict[str, Any]]] = [
        ("threshold of one", {"threshold": 1}),
        ("threshold above the holders", {"threshold": 4}),
        ("more holders than others", {"holders": 4}),
        ("minimum not above the threshold", {"minimum": 2}),
        ("minimum above the cohort", {"minimum": 5}),
        ("identity twice", {"identities": (*invite().identities, invite().identities[0])}),
        ("identity not pinned", {"identities": (*invite().identities, Identity(bytes(32)).public)}),
    ]
    for name, change in settings:
        yield f"invitation: {name}", Stage.ADVERTISE, msgspec.structs.replace(invite(), **change)
    roster = opened(Roster, frames["down", Stage.SHARE, 0])
    size = messages.ADVERT_BYTES
    entries = [roster.adverts[size * i : size * (i + 1)] for i in range(N)]
    strange = KeyPair(Prg(bytes(16))).public
    changes: list[tuple[str, list[bytes], list[int]]] = [
        ("masking key swapped", [entries[0], strange + entries[1][32:], *entries[2:]], [0, 1, 2, 3]),
        ("sealing key swapped", [entries[0], entries[1][:32] + strange + entries[1][64:], *entries[2:]], [0, 1, 2, 3]),
        ("two clients exchanged", [entries[0], entries[2], entries[1], entries[3]], [0, 1, 2, 3]),
        ("own key swapped", [strange + entries[0][32:], *entries[1:]], [0, 1, 2, 3]),
        ("own advert missing", entries[1:], [1, 2, 3]),
        ("below the minimum", entries[:2], [0, 1]),
        ("an advert too few", entries[:3], [0, 1, 2, 3]),
    ]
    for name, listed, members in changes:
        lie = Roster(roster.context, messages.bit_mask(members, N), b"".join(listed))
        yield f"roster: {name}", Stage.SHARE, lie
    inbox = opened(Inbox, frames["down", Stage.MASK, 0])
    first, second, third = inbox.sealed
    boxes: list[tuple[str, tuple[tuple[int, bool, bytes], ...]]] = [
        ("shares twice", (first, second, third, first)),
        ("shares of another sender", ((second[0], *first[1:]), (first[0], *second[1:]), third)),
        ("shares from itself", (first, second, (0, *third[1:]))),
        ("partner flag changed", ((first[0], not first[1], first[2]), second, third)),
        ("ciphertext changed", ((*first[:2], bytes([first[2][0] ^ 1]) + first[2][1:]), second, third)),
    ]
    for name, sealed in boxes:
        yield f"inbox: {name}", Stage.MASK, msgspec.structs.replace(inbox, sealed=sealed)
    few = Inbox(inbox.context, messages.bit_mask([0, 1], N), (first,), SUBJECT)
    yield "inbox: too few holders left", Stage.MASK, few
    for name, subject in SUBJECTS.items():
        yield name, Stage.MASK, msgspec.structs.replace(inbox, subject=subject)
    for name, survivors in (
        ("below the minimum", [0, 1]),
        ("without this client", [1, 2, 3]),
        ("none", []),
    ):
        yield f"survivors: {name}", Stage.CONFIRM, Survivors(inbox.context, messages.bit_mask(survivors, N))
    honest = opened(Confirmations, frames["down", Stage.UNMASK, 0]).signatures
    for name, signatures in (
        ("too few", honest[:1]),
        ("one twice", (honest[0], honest[0])),
        ("signatures exchanged", ((honest[0][0], honest[1][1]), (honest[1][0], honest[0][1]))),
        ("of a client that was lost", (honest[0], (LOST, honest[1][1]))),
        ("of this client", (honest[0], (0, honest[1][1]))),
    ):
        yield f"confirmations: {name}", Stage.UNMASK, Confirmations(inbox.context, signatures)
    yield "both kinds of share asked for", Stage.UNMASK, Survivors(inbox.context, messages.bit_mask([0, 2, 3], N))


def breaches(
    frames: Frames,
) -> Iterator[tuple[str, Stage, messages.FromClient, np.ndarray[tuple[int], np.dtype[np.uint32]] | None]]:
    """Messages, rightly signed, with which client 0 breaks the protocol."""

    def said(stage: Stage) -> Any:
        return messages.read_client_frame(frames["up", stage, 0], 1 << 20)[1]

    replace = msgspec.structs.replace
    shares = said(Stage.SHARE)
    yield "shares: under another roster", Stage.SHARE, replace(shares, transcript=bytes(32)), None
    yield "shares: a holder missing", Stage.SHARE, replace(shares, sealed=shares.sealed[:-1]), None
    yield "shares: a holder twice", Stage.SHARE, replace(shares, sealed=(*shares.sealed[:-1], shares.sealed[0])), None
    packed = messages.read_client_frame(frames["up", Stage.MASK, 0], 1 << 20)[3]
    if packed is None:
        raise ValueError("the masked vector's frame holds no vector")
    yield "vector: another digest", Stage.MASK, replace(said(Stage.MASK), digest=bytes(32)), packed
    short = packed[:-1].copy()
    yield "vector: another vector", Stage.MASK, said(Stage.MASK), short
    spare = packed.copy()
    spare[-1] |= 1 << 31
    marked = replace(said(Stage.MASK), digest=vector_digest(spare))
    yield "vector: unused bits set", Stage.MASK, marked, spare
    other = replace(said(Stage.CONFIRM), survivors=messages.bit_mask([0, 1], N))
    yield "confirmation: of other survivors", Stage.CONFIRM, other, None
    unmask = said(Stage.UNMASK)
    yield "unmasking: a share missing", Stage.UNMASK, replace(unmask, shares=unmask.shares[1:]), None
    yield "unmasking: a share twice", Stage.UNMASK, replace(unmask, shares=(*unmask.shares, unmask.shares[0])), None


def opened(kind: type[Any], frame: bytes) -> Any:
    """The server's message in a frame."""
    message = messages.read_server_frame(frame)[1]
    if not isinstance(message, kind):
        raise TypeError(f"the frame holds {message}, not {kind.__name__}")
    return message


def primitives() -> dict[str, Any]:
    """What the messages are made of."""
    one, two, transcript = KeyPair(Prg(bytes(16))), KeyPair(Prg(b"\1" * 16)), bytes(range(32))
    points, secret = [1, 3, 4, 1000], int.from_bytes(bytes(range(32)), "big")
    shared = shamir.split(secret, 3, points, Prg(bytes(16)))
    residues = [0, 1, (1 << 23) - 1, 1 << 22, 12345, 654321, 7]
    stream: Callable[[bytes], str] = lambda seed: Prg(seed).bytes(32).hex()  # noqa: E731
    return {
        "stream": {"seed": bytes(range(16)).hex(), "bytes": stream(bytes(range(16)))},
        "key_pair": {"prg_seed": bytes(16).hex(), "private_number": f"{one.number:064x}", "public": one.public.hex()},
        "pair_seed": {
            "transcript": transcript.hex(),
            "clients": [3, 8],
            "private_numbers": [f"{one.number:064x}", f"{two.number:064x}"],
            "seed": agreement.pair_seed(one, two.public, transcript, 3, 8).hex(),
        },
        "own_mask": {
            "transcript": transcript.hex(),
            "client": 3,
            "secret": bytes(range(16)).hex(),
            "seed": agreement.self_seed(bytes(range(16)), transcript, 3).hex(),
            "commitment": agreement.commitment(bytes(range(16)), transcript, 3).hex(),
        },
        "sealed": {
            "transcript": transcript.hex(),
            "sender": 3,
            "recipient": 8,
            "partner": True,
            "shares": bytes(range(64)).hex(),
            "box": agreement.seal(one, two.public, transcript, 3, 8, True, bytes(range(64))).hex(),
        },
        "shamir": {
            "prg_seed": bytes(16).hex(),
            "secret": f"{secret:064x}",
            "threshold": 3,
            "points": points,
            "shares": [f"{share:064x}" for share in shared],
        },
        "packed": {
            "bits": 23,
            "residues": residues,
            "bytes": Ring(23).pack(np.array(residues, np.uint32)).tobytes().hex(),
        },
    }


def build() -> dict[str, Any]:
    """The whole file."""
    frames, server = play()
    other_round, _ = play(2)
    settings = invite()
    return {
        "specification": "docs/spec/masked-sum.md",
        "primitives": primitives(),
        "round": {
            "invite": {
                "round": settings.round.hex(),
                "holders": settings.holders,
                "partners": settings.partners,
                "threshold": settings.threshold,
                "minimum": settings.minimum,
            },
            "subject": {"length": LENGTH, "bits": BITS, "application": SUBJECT.application.hex()},
            "policy": {"minimum": MINIMUM, "corrupt": 0.1, "dropped": 0.1, "lying": True},
            "clients": [
                {
                    "identity_seed": identity_seed(i).hex(),
                    "identity": settings.identities[i].hex(),
                    "prg_seed": client_seed(i).hex(),
                    "vector": vector(i).tolist(),
                }
                for i in range(N)
            ],
            "context": settings.context.hex(),
            "transcript": server.outcome.attestation.transcript.hex(),
            "sum_transcript": messages.sum_transcript(server.outcome.attestation.transcript, SUBJECT).hex(),
            "frames": [
                {"direction": direction, "stage": int(stage), "client": number, "frame": frame.hex()}
                for (direction, stage, number), frame in frames.items()
            ],
            "survivors": list(server.outcome.survivors),
            "attestation": server.outcome.attestation.encoded().hex(),
            "total": server.outcome.total.tolist(),
        },
        "refused": list(refused(frames, other_round)),
    }


def main() -> None:
    """Write the file."""
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(build(), indent=1) + "\n")


if __name__ == "__main__":
    main()
