"""vectors/v1/session.json: followed message by message, and what must be refused is refused."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tacit.errors import CodecError, InputError, PeerError
from tacit.identity import Identity, key_text, parse_key, verify
from tacit.party.session import Called, Caller
from tacit.party.session_messages import Purpose, decode

FOLDER = Path(__file__).parents[2] / "vectors"
VECTORS: dict[str, Any] = json.loads((FOLDER / "v1" / "session.json").read_text())
SESSION, KEYS = VECTORS["session"], VECTORS["keys"]
PUBLIC = bytes.fromhex(KEYS["public"])


def called(party: str) -> Called:
    nonce = bytes.fromhex(SESSION["nonces"][party])
    return Called(party, SESSION["caller"], PUBLIC, {Purpose.CLIENT}, SESSION["lifetimes_s"][party], nonce=nonce)


def test_the_file_is_what_its_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("session_vectors", FOLDER / "session.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build() == VECTORS


def test_keys() -> None:
    identity, signed = Identity(bytes.fromhex(KEYS["seed"])), KEYS["signed"]
    assert (identity.public, key_text(PUBLIC), parse_key(KEYS["text"])) == (PUBLIC, KEYS["text"], PUBLIC)
    content, signature = bytes.fromhex(signed["content"]), bytes.fromhex(signed["by"])
    assert identity.sign(signed["purpose"], content) == signature
    assert verify(PUBLIC, signed["purpose"], content, signature)


@pytest.mark.parametrize("case", KEYS["refused"], ids=lambda case: case["name"])
def test_keys_that_are_nobodys(case: dict[str, str]) -> None:
    with pytest.raises(InputError):
        parse_key(case["text"])


def test_the_session_byte_for_byte() -> None:
    caller = Caller(
        SESSION["caller"],
        PUBLIC,
        Purpose(SESSION["purpose"]),
        ("alice", "bob"),
        nonce=bytes.fromhex(SESSION["nonces"]["clinic"]),
    )
    parties = {party: called(party) for party in ("alice", "bob")}
    for party, side in parties.items():
        assert side.welcome().hex() == SESSION["welcomes"][party]
        caller.welcomed(party, bytes.fromhex(SESSION["welcomes"][party]))
    assert caller.greeting().hex() == SESSION["greeting"]
    for party, side in parties.items():
        session, accepted = side.greeted(bytes.fromhex(SESSION["greeting"]), 0.0)
        assert (session.id.hex(), session.expires) == (SESSION["id"], SESSION["expires_after_s"])
        assert accepted.hex() == SESSION["accepted"][party]
        assert caller.accepted(party, accepted, 0.0) == session


@pytest.mark.parametrize("case", VECTORS["refused"], ids=lambda case: case["name"])
def test_refused(case: dict[str, str]) -> None:
    side = called(case["by"])
    side.welcome()
    decode(bytes.fromhex(case["body"]))
    with pytest.raises(PeerError):
        side.greeted(bytes.fromhex(case["body"]), 0.0)


@pytest.mark.parametrize("case", VECTORS["malformed"], ids=lambda case: case["name"])
def test_malformed(case: dict[str, str]) -> None:
    with pytest.raises(CodecError):
        decode(bytes.fromhex(case["body"]))
