"""Writes vectors/v1/shared_sum.json: a whole round of the shared sum, and frames that must be refused.

    python vectors/shared_sum.py

Every key and every random choice comes from the seeds in the file, in the order that docs/spec/shared-sum.md gives. A
frame of ``refused`` is given to a server that holds no part yet, or, where ``after`` names a client, that client's own.
An attestation of ``refused_attestations`` is what an auditor must refuse who has pinned everybody's identity.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from tacit import wire
from tacit.federated.secure_sum.agreement import KeyPair
from tacit.federated.secure_sum.ring import Ring
from tacit.federated.secure_sum.shared_attestation import SharedAttestation
from tacit.federated.secure_sum.shared_bounds import project
from tacit.federated.secure_sum.shared_client import Parts, upload
from tacit.federated.secure_sum.shared_messages import Part, Terms, frame_of, read_frame
from tacit.federated.secure_sum.shared_server import SharedServer, total_of
from tacit.identity import Identity
from tacit.mpc.steps import Role
from tacit.ring.prg import Prg

PATH = Path(__file__).parent / "v1" / "shared_sum.json"
N, LENGTH, BITS, MINIMUM = 4, 5, 20, 3
SUMMED = (0, 2, 3)
RING = Ring(BITS)
LIMIT = 1 << 10


def identity_seed(number: int) -> bytes:
    """Of a client's long-term key."""
    return bytes([0x30 + number] * 32)


def client_seed(number: int, round: int = 1) -> bytes:
    """Of all that a client draws in a round."""
    return bytes([0x40 + number] * 15 + [round])


def server_seed(role: Role) -> bytes:
    """Of a server's key."""
    return bytes([0x50 + list(Role).index(role)] * 16)


def server_identity_seed(role: Role) -> bytes:
    """Of a server's long-term key."""
    return bytes([0x60 + list(Role).index(role)] * 32)


def server_identity(role: Role) -> Identity:
    """A server's long-term key."""
    return Identity(server_identity_seed(role))


def vector(number: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """What a client adds: the ends of the ring among it."""
    return np.array([number + 1, (1 << BITS) - 1, 0, 1 << (BITS - 1), 1000 * number + 17], np.uint32)


def noise(role: Role) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """What a server adds."""
    return np.array([1, -2, 3, -4, 5], np.int64) * (1 if role is Role.ALICE else -10)


def pair(role: Role) -> KeyPair:
    """A server's key."""
    return KeyPair(Prg(server_seed(role)))


def terms(round: int = 1, length: int = LENGTH, bits: int = BITS) -> Terms:
    """The settings."""
    return Terms(
        round=bytes(15) + bytes([round]),
        identities=tuple(Identity(identity_seed(i)).public for i in range(N)),
        alice=pair(Role.ALICE).public,
        bob=pair(Role.BOB).public,
        length=length,
        bits=bits,
        minimum=MINIMUM,
        bound=0,
        application=bytes(range(32)),
    )


def parts(number: int, settings: Terms, round: int = 1) -> Parts:
    """A client's two frames."""
    words = vector(number)[: settings.length].astype(settings.ring.dtype)
    return upload(settings, number, Identity(identity_seed(number)), words, Prg(client_seed(number, round)))


def to(role: Role, both: Parts) -> bytes:
    """The frame for one server."""
    return both.alice if role is Role.ALICE else both.bob


def refused() -> Iterator[dict[str, Any]]:
    """Frames that a server must refuse."""
    settings = terms()
    own = parts(0, settings)
    for role in Role:
        good = to(role, own)
        message, payload = read_frame(good, LIMIT)
        if not isinstance(message, Part):
            raise TypeError("an upload is not made of parts")
        box = payload.tobytes()

        def altered(box: bytes = box, message: Part = message, **changes: Any) -> bytes:
            return frame_of(msgspec.structs.replace(message, **changes), box)

        spoiled = bytes([box[0] ^ 1]) + box[1:]
        head = wire.PREFIX_BYTES
        body = msgspec.msgpack.encode(message)
        longer = body.replace(b"\xc4\x20" + message.transcript, b"\xc5\x00\x20" + message.transcript)
        other = Role.BOB if role is Role.ALICE else Role.ALICE
        tensor = torch.frombuffer(bytearray(box), dtype=torch.uint8)
        cases: dict[str, tuple[bytes, str]] = {
            "an empty frame": (b"", "CodecError"),
            "one byte too few": (good[:-1], "CodecError"),
            "one byte too many": (good + b"\0", "CodecError"),
            "another magic": (b"tack" + good[4:], "CodecError"),
            "another version": (good[:4] + b"\x02" + good[5:], "CodecError"),
            "another kind": (wire.encode(wire.Kind.CALL, 0, (tensor,), body), "CodecError"),
            "another frame number": (wire.encode(wire.Kind.SECURE_SUM, 1, (tensor,), body), "CodecError"),
            "no tensor": (wire.encode(wire.Kind.SECURE_SUM, 0, (), body), "CodecError"),
            "two tensors": (wire.encode(wire.Kind.SECURE_SUM, 0, (tensor, tensor[:1]), body), "CodecError"),
            "a tensor of int8": (wire.encode(wire.Kind.SECURE_SUM, 0, (tensor.view(torch.int8),), body), "CodecError"),
            "a tensor that is not flat": (wire.encode(wire.Kind.SECURE_SUM, 0, (tensor[None],), body), "CodecError"),
            "a message in a longer encoding": (
                wire.encode(wire.Kind.SECURE_SUM, 0, (tensor,), longer),
                "CodecError",
            ),
            "a message of another name": (
                wire.encode(wire.Kind.SECURE_SUM, 0, (tensor,), body.replace(b"Part", b"Pass")),
                "CodecError",
            ),
            "a surplus field": (
                wire.encode(wire.Kind.SECURE_SUM, 0, (tensor,), bytes([body[0] + 1]) + body[1:] + b"\0"),
                "CodecError",
            ),
            "a header that does not parse": (good[:head] + b"\xc1" + good[head + 1 :], "CodecError"),
            "the part for the other server": (to(other, own), "PeerError"),
            "a recipient that was changed": (altered(recipient=1 - message.recipient), "PeerError"),
            "a recipient that there is not": (altered(recipient=2), "CodecError"),
            "a part of another round": (to(role, parts(0, terms(2), 2)), "PeerError"),
            "the box of another round": (
                altered(box=read_frame(to(role, parts(0, terms(2), 2)), LIMIT)[1].tobytes()),
                "PeerError",
            ),
            "a sender beyond the cohort": (altered(sender=N), "PeerError"),
            "another sender": (altered(sender=1), "PeerError"),
            "another client's signature": (
                altered(signature=read_frame(to(role, parts(1, settings)), LIMIT)[0].signature),  # type: ignore[union-attr]
                "PeerError",
            ),
            "a signature that was changed": (
                altered(signature=bytes([message.signature[0] ^ 1]) + message.signature[1:]),
                "PeerError",
            ),
            "another ephemeral key": (altered(key=KeyPair(Prg(bytes(16))).public), "PeerError"),
            "an ephemeral key of low order": (altered(key=bytes(32)), "PeerError"),
            "a box that was changed": (altered(box=spoiled), "PeerError"),
            "a box whose tag was changed": (altered(box=box[:-1] + bytes([box[-1] ^ 1])), "PeerError"),
            "a box that is too short": (altered(box=box[:-1]), "PeerError"),
            "a box of one byte": (altered(box=box[:1]), "PeerError"),
            "an empty box": (wire.encode(wire.Kind.SECURE_SUM, 0, (tensor[:0],), body), "PeerError"),
        }
        for name, (frame, error) in cases.items():
            yield {"name": f"{role.value}: {name}", "to": role.value, "frame": frame.hex(), "error": error}
        for name, again in (("the same part", good), ("a second part", to(role, parts(0, settings, 2)))):
            yield {
                "name": f"{role.value}: {name} again",
                "to": role.value,
                "after": 0,
                "frame": again.hex(),
                "error": "PeerError",
            }


def refused_attestations(honest: SharedAttestation) -> Iterator[dict[str, Any]]:
    """Attestations that an auditor must refuse."""
    data, parts, settings = honest.encoded(), honest.parts, honest.terms

    def altered(**changes: Any) -> bytes:
        return msgspec.structs.replace(honest, **changes).encoded()

    def under(**changes: Any) -> bytes:
        return altered(terms=msgspec.structs.replace(settings, **changes))

    cases: dict[str, tuple[bytes, str]] = {
        "one byte too few": (data[:-1], "CodecError"),
        "one byte too many": (data + b"\0", "CodecError"),
        "a longer encoding": (b"\xdc\x00\x06" + data[1:], "CodecError"),
        "another round": (under(round=bytes(16)), "PeerError"),
        "another application": (under(application=bytes(32)), "PeerError"),
        "another length": (under(length=LENGTH + 1), "PeerError"),
        "another ring": (under(bits=BITS + 1), "PeerError"),
        "another minimum": (under(minimum=MINIMUM + 1), "PeerError"),
        "another bound": (under(bound=1), "PeerError"),
        "alice's key changed": (under(alice=KeyPair(Prg(bytes(16))).public), "PeerError"),
        "one key for both servers": (under(bob=settings.alice), "InputError"),
        "clients exchanged": (under(identities=settings.identities[::-1]), "PeerError"),
        "a stranger in the cohort": (
            under(identities=(Identity(bytes(32)).public, *settings.identities[1:])),
            "PeerError",
        ),
        "a client too many": (altered(summed=b"\x0f"), "PeerError"),
        "a client too few": (altered(summed=b"\x0c", parts=parts[1:]), "PeerError"),
        "a client said to be excluded": (altered(summed=b"\x0d", excluded=b"\x02"), "PeerError"),
        "a set that is no mask of the cohort": (altered(summed=b"\x1d"), "CodecError"),
        "a client's signature missing": (altered(parts=parts[1:]), "PeerError"),
        "a client's signature twice": (altered(parts=(parts[0], *parts)), "PeerError"),
        "signatures out of order": (altered(parts=parts[::-1]), "PeerError"),
        "another client's signature": (altered(parts=((0, *parts[1][1:]), *parts[1:])), "PeerError"),
        "alice's signature for bob's": (altered(bob=honest.alice), "PeerError"),
        "bob's signature for alice's": (altered(alice=honest.bob), "PeerError"),
        "no signature of bob's": (altered(bob=bytes(64)), "PeerError"),
    }
    for name, (attestation, error) in cases.items():
        yield {"name": name, "attestation": attestation.hex(), "error": error}


def build() -> dict[str, Any]:
    """The whole file."""
    settings = terms()
    servers = {role: SharedServer(role, settings, pair(role)) for role in Role}
    frames = []
    for number in range(N):
        both = parts(number, settings)
        for role in Role:
            # Client 1's part for bob is lost.
            if (number, role) != (1, Role.BOB):
                servers[role].receive(to(role, both))
                frames.append({"to": role.value, "client": number, "frame": to(role, both).hex()})
    for server in servers.values():
        server.settle(SUMMED)
    revealed = {role: servers[role].reveal(lambda length, role=role: noise(role)) for role in Role}
    signed = {role: servers[role].attest(server_identity(role)) for role in Role}
    attestation = SharedAttestation.of(servers[Role.ALICE], signed[Role.ALICE], signed[Role.BOB])
    coin = torch.tensor([0x0123456789ABCDEF, -2])
    projected = project([vector(number) for number in range(2)], coin)
    return {
        "specification": "docs/spec/shared-sum.md",
        "round": {
            "terms": {
                "round": settings.round.hex(),
                "length": LENGTH,
                "bits": BITS,
                "minimum": MINIMUM,
                "bound": 0,
                "application": settings.application.hex(),
            },
            "servers": {
                role.value: {
                    "prg_seed": server_seed(role).hex(),
                    "public": settings.key_of(role).hex(),
                    "identity_seed": server_identity_seed(role).hex(),
                    "identity": server_identity(role).public.hex(),
                    "endorsement": servers[role].endorse(server_identity(role)).hex(),
                    "noise": noise(role).tolist(),
                    "revealed": revealed[role].hex(),
                }
                for role in Role
            },
            "clients": [
                {
                    "identity_seed": identity_seed(i).hex(),
                    "identity": settings.identities[i].hex(),
                    "prg_seed": client_seed(i).hex(),
                    "vector": vector(i).tolist(),
                }
                for i in range(N)
            ],
            "transcript": settings.transcript.hex(),
            "frames": frames,
            "summed": list(SUMMED),
            "total": total_of(settings, revealed[Role.ALICE], revealed[Role.BOB]).tolist(),
            "attestation": attestation.encoded().hex(),
        },
        "projections": [
            {"coin": coin.tolist(), "vector": vector(number).tolist(), "projections": projected[number].tolist()}
            for number in range(2)
        ],
        "refused": list(refused()),
        "refused_attestations": list(refused_attestations(attestation)),
    }


def main() -> None:
    """Write the file."""
    PATH.write_text(json.dumps(build(), indent=1) + "\n")


if __name__ == "__main__":
    main()
