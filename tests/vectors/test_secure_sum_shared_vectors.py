"""vectors/v1/shared_sum.json: followed frame by frame, and what must be refused is refused."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tacit import errors
from tacit.federated.secure_sum.agreement import KeyPair
from tacit.federated.secure_sum.shared_attestation import SharedAttestation
from tacit.federated.secure_sum.shared_bounds import project
from tacit.federated.secure_sum.shared_client import upload
from tacit.federated.secure_sum.shared_messages import Terms
from tacit.federated.secure_sum.shared_server import SharedServer, total_of
from tacit.identity import Identity
from tacit.mpc.steps import Role
from tacit.ring.prg import Prg

FOLDER = Path(__file__).parents[2] / "vectors"
VECTORS: dict[str, Any] = json.loads((FOLDER / "v1" / "shared_sum.json").read_text())
ROUND = VECTORS["round"]
CLIENTS, SERVERS = ROUND["clients"], ROUND["servers"]
FRAMES = {(frame["to"], frame["client"]): bytes.fromhex(frame["frame"]) for frame in ROUND["frames"]}


def terms() -> Terms:
    settings = ROUND["terms"]
    return Terms(
        **{
            **settings,
            "round": bytes.fromhex(settings["round"]),
            "application": bytes.fromhex(settings["application"]),
            "identities": tuple(bytes.fromhex(client["identity"]) for client in CLIENTS),
            "alice": bytes.fromhex(SERVERS["alice"]["public"]),
            "bob": bytes.fromhex(SERVERS["bob"]["public"]),
        }
    )


def server(name: str) -> SharedServer:
    return SharedServer(Role(name), terms(), KeyPair(Prg(bytes.fromhex(SERVERS[name]["prg_seed"]))))


def test_the_file_is_what_its_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("shared_sum_vectors", FOLDER / "shared_sum.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build() == VECTORS


def test_most_vectors_are_negative() -> None:
    assert len(VECTORS["refused"]) > 8 * len(FRAMES) > 50
    assert len({case["name"] for case in VECTORS["refused"]}) == len(VECTORS["refused"])


def test_the_round_byte_for_byte() -> None:
    assert terms().transcript.hex() == ROUND["transcript"]
    servers = {name: server(name) for name in SERVERS}
    for number, client in enumerate(CLIENTS):
        identity, words = Identity(bytes.fromhex(client["identity_seed"])), np.array(client["vector"], np.uint32)
        parts = upload(terms(), number, identity, words, Prg(bytes.fromhex(client["prg_seed"])))
        for name, frame in (("alice", parts.alice), ("bob", parts.bob)):
            if (name, number) in FRAMES:
                assert frame == FRAMES[name, number]
                assert servers[name].receive(frame) == number
    common = servers["alice"].common(servers["bob"].claims)
    assert list(common) == servers_common() == ROUND["summed"]
    revealed = {}
    for name, each in servers.items():
        each.settle(common)
        revealed[name] = each.reveal(lambda length, name=name: np.array(SERVERS[name]["noise"], np.int64))
        assert revealed[name].hex() == SERVERS[name]["revealed"]
    assert total_of(terms(), revealed["alice"], revealed["bob"]).tolist() == ROUND["total"]
    noised = np.sum(
        [CLIENTS[i]["vector"] for i in common] + [SERVERS[name]["noise"] for name in SERVERS], axis=0, dtype=np.int64
    )
    assert (noised % 2 ** terms().bits).tolist() == ROUND["total"]
    signed = {}
    for name, each in servers.items():
        identity = Identity(bytes.fromhex(SERVERS[name]["identity_seed"]))
        assert identity.public.hex() == SERVERS[name]["identity"]
        assert each.endorse(identity).hex() == SERVERS[name]["endorsement"]
        signed[name] = each.attest(identity)
    attestation = SharedAttestation.of(servers["bob"], **signed)
    assert attestation.encoded().hex() == ROUND["attestation"]
    assert verified(attestation.encoded()) == tuple(bytes.fromhex(CLIENTS[i]["identity"]) for i in common)


def verified(attestation: bytes) -> tuple[bytes, ...]:
    pinned = frozenset(bytes.fromhex(client["identity"]) for client in CLIENTS)
    alice, bob = (bytes.fromhex(SERVERS[name]["identity"]) for name in ("alice", "bob"))
    return SharedAttestation.parse(attestation).verify(pinned, alice, bob)


@pytest.mark.parametrize("case", VECTORS["refused_attestations"], ids=lambda case: case["name"])
def test_attestations_that_an_auditor_refuses(case: dict[str, Any]) -> None:
    with pytest.raises(getattr(errors, case["error"])) as caught:
        verified(bytes.fromhex(case["attestation"]))
    assert type(caught.value) is getattr(errors, case["error"])


def servers_common() -> list[int]:
    return [i for i in range(len(CLIENTS)) if all((name, i) in FRAMES for name in SERVERS)]


@pytest.mark.parametrize("case", VECTORS["projections"], ids=lambda case: str(case["vector"][0]))
def test_projections(case: dict[str, Any]) -> None:
    found = project([np.array(case["vector"], np.uint32)], torch.tensor(case["coin"]))
    assert found[0].tolist() == case["projections"]


@pytest.mark.parametrize("case", VECTORS["refused"], ids=lambda case: case["name"])
def test_what_must_be_refused_is_refused(case: dict[str, Any]) -> None:
    refusing, error = server(case["to"]), getattr(errors, case["error"])
    if "after" in case:
        refusing.receive(FRAMES[case["to"], case["after"]])
    before = refusing.claims
    with pytest.raises(error) as caught:
        refusing.receive(bytes.fromhex(case["frame"]))
    assert type(caught.value) is error
    assert refusing.claims == before
    # Nothing has changed: a real frame is still welcome.
    assert refusing.receive(FRAMES[case["to"], 3]) == 3


def test_swapped_or_repeated_shares_are_not_a_sum() -> None:
    alice, bob = (bytes.fromhex(SERVERS[name]["revealed"]) for name in ("alice", "bob"))
    for first, second in ((bob, alice), (alice, alice), (alice, bob[:-1]), (alice, FRAMES["bob", 0])):
        with pytest.raises(errors.PeerError):
            total_of(terms(), first, second)
