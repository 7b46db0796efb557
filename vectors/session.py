"""Writes vectors/v1/session.json: a client's session with alice and bob, and messages that must be refused.

    python vectors/session.py

Keys and nonces come from the file. Each case of ``refused`` gives a party, in the state that it has after its Welcome,
a body that it must refuse as a Greeting; each of ``malformed`` is no message at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from tacit.identity import Identity, key_text
from tacit.party.session import Called, Caller
from tacit.party.session_messages import Accepted, Greeting, Purpose, Refused, decode, encode

PATH = Path(__file__).parent / "v1" / "session.json"
CLIENT_SEED = bytes([0x71]) * 32
NONCES = {"alice": bytes([0x72]) * 32, "bob": bytes([0x73]) * 32, "clinic": bytes([0x74]) * 32}
LIFETIMES = {"alice": 86400, "bob": 3600}
NOBODYS_KEYS = {
    "zeros": bytes(32),
    "the neutral element": (1).to_bytes(32, "little"),
    "of order 2": (2**255 - 20).to_bytes(32, "little"),
    "not below the prime": (2**255 - 16).to_bytes(32, "little"),
    "no point": (2).to_bytes(32, "little"),
}


def called(party: str) -> Called:
    """A party that is called by the client."""
    public = Identity(CLIENT_SEED).public
    return Called(party, "clinic", public, {Purpose.CLIENT}, LIFETIMES[party], nonce=NONCES[party])


def greeting_of(data: bytes) -> Greeting:
    """A Greeting's fields."""
    message = decode(data)
    if not isinstance(message, Greeting):
        raise TypeError
    return message


def opened() -> dict[str, Any]:
    """The session that opens."""
    caller = Caller("clinic", Identity(CLIENT_SEED).public, Purpose.CLIENT, ("alice", "bob"), nonce=NONCES["clinic"])
    parties = {party: called(party) for party in ("alice", "bob")}
    welcomes = {party: one.welcome() for party, one in parties.items()}
    for party, welcome in welcomes.items():
        caller.welcomed(party, welcome)
    greeting = caller.greeting()
    accepted = {party: one.greeted(greeting, 0.0)[1] for party, one in parties.items()}
    (session,) = {caller.accepted(party, body, 0.0) for party, body in accepted.items()}
    return {
        "welcomes": {party: body.hex() for party, body in welcomes.items()},
        "greeting": greeting.hex(),
        "accepted": {party: body.hex() for party, body in accepted.items()},
        "id": session.id.hex(),
        "expires_after_s": session.expires,
    }


def refused(greeting: bytes) -> Iterator[tuple[str, str, bytes]]:
    """Bodies that alice or bob must refuse, and why."""
    honest = greeting_of(greeting)
    alice, bob = honest.welcomes
    replace = msgspec.structs.replace
    changes: dict[str, dict[str, Any]] = {
        "another caller": {"caller": "lab"},
        "another purpose": {"purpose": Purpose.OWNER},
        "a worker's purpose": {"purpose": Purpose.DATA, "welcomes": (alice,), "parent": bytes(32)},
        "a version that is not the highest": {"version": 2},
        "a parent": {"parent": bytes(32)},
        "a worker": {"worker": 1},
        "bob missing": {"welcomes": (alice,)},
        "alice missing": {"welcomes": (bob,)},
        "another order": {"welcomes": (bob, alice)},
        "alice twice": {"welcomes": (alice, alice)},
        "alice's other connection": {"welcomes": (replace(alice, nonce=bytes(32)), bob)},
        "alice's lifetime changed": {"welcomes": (replace(alice, lifetime_s=86401), bob)},
        "alice's versions changed": {"welcomes": (replace(alice, versions=(1, 2)), bob)},
        "no version in common": {"welcomes": (alice, replace(bob, versions=(2,)))},
        "the provider instead of bob": {"welcomes": (alice, replace(bob, party="provider"))},
    }
    for name, change in changes.items():
        yield name, "alice", encode(replace(honest, **change))
    yield "bob's other connection", "bob", encode(replace(honest, welcomes=(alice, replace(bob, nonce=bytes(32)))))
    yield "a Welcome", "alice", encode(alice)
    yield "an Accepted", "alice", encode(Accepted(bytes(32)))
    yield "a Refused", "alice", encode(Refused("no"))


def malformed(greeting: bytes) -> Iterator[tuple[str, bytes]]:
    """Bodies that are no message."""
    yield "empty", b""
    yield "cut", greeting[:-1]
    yield "a byte too many", greeting + b"\0"
    yield "an integer in two bytes", greeting.replace(b"\x98\xa8Greeting\x01", b"\x98\xa8Greeting\xcc\x01")
    yield "an array header in three bytes", b"\xdc\x00\x08" + greeting[1:]
    yield "a text where bytes belong", greeting.replace(b"\xc4\x20" + NONCES["clinic"], b"\xd9\x20" + NONCES["clinic"])
    yield "a map", msgspec.msgpack.encode({"type": "Refused", "reason": "no"})
    yield "an unknown message", msgspec.msgpack.encode(["Hello", 1])
    yield "an unknown purpose", greeting.replace(b"\xa6client", b"\xa6kitten")
    yield "versions that do not ascend", msgspec.msgpack.encode(["Welcome", [2, 1], "alice", bytes(32), 60])
    yield "no versions", msgspec.msgpack.encode(["Welcome", [], "alice", bytes(32), 60])
    yield "a nonce of 31 bytes", msgspec.msgpack.encode(["Welcome", [1], "alice", bytes(31), 60])
    yield "no lifetime", msgspec.msgpack.encode(["Welcome", [1], "alice", bytes(32), 0])
    yield "an id of 33 bytes", msgspec.msgpack.encode(["Accepted", bytes(33)])
    yield "a reason of 501 characters", msgspec.msgpack.encode(["Refused", "x" * 501])


def build() -> dict[str, Any]:
    """The file's content."""
    identity, session = Identity(CLIENT_SEED), opened()
    greeting = bytes.fromhex(session["greeting"])
    return {
        "specification": "docs/spec/session.md",
        "keys": {
            "seed": CLIENT_SEED.hex(),
            "public": identity.public.hex(),
            "text": key_text(identity.public),
            "signed": {"purpose": "trial", "content": b"content".hex(), "by": identity.sign("trial", b"content").hex()},
            "refused": [{"name": name, "text": key_text(public)} for name, public in NOBODYS_KEYS.items()],
        },
        "session": {
            "purpose": "client",
            "caller": "clinic",
            "nonces": {name: nonce.hex() for name, nonce in NONCES.items()},
            "lifetimes_s": LIFETIMES,
            **session,
        },
        "refused": [{"name": n, "by": party, "body": body.hex()} for n, party, body in refused(greeting)],
        "malformed": [{"name": name, "body": body.hex()} for name, body in malformed(greeting)],
    }


def main() -> None:
    """Write the file."""
    PATH.write_text(json.dumps(build(), indent=1) + "\n")


if __name__ == "__main__":
    main()
