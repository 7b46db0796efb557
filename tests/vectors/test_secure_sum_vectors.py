"""vectors/v1/masked_sum.json: followed frame by frame, and what must be refused is refused."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tacit import errors
from tacit.federated.secure_sum import agreement, messages
from tacit.federated.secure_sum.agreement import KeyPair
from tacit.federated.secure_sum.client import MaskedClient, Policy, State, Task
from tacit.federated.secure_sum.messages import Invite, Subject
from tacit.federated.secure_sum.parameters import Assumption
from tacit.federated.secure_sum.ring import Ring
from tacit.federated.secure_sum.server import MaskedServer, Stage
from tacit.identity import Identity
from tacit.ring import shamir
from tacit.ring.prg import Prg

FOLDER = Path(__file__).parents[2] / "vectors"
VECTORS: dict[str, Any] = json.loads((FOLDER / "v1" / "masked_sum.json").read_text())
ROUND, PRIMITIVES = VECTORS["round"], VECTORS["primitives"]
CLIENTS = ROUND["clients"]
FRAMES = {(f["direction"], f["stage"], f["client"]): bytes.fromhex(f["frame"]) for f in ROUND["frames"]}
RING = Ring(ROUND["subject"]["bits"])


def bytes_of(text: str) -> bytes:
    return bytes.fromhex(text)


def invite() -> Invite:
    settings = ROUND["invite"]
    return Invite(
        **{
            **settings,
            "round": bytes_of(settings["round"]),
            "identities": tuple(bytes_of(client["identity"]) for client in CLIENTS),
        }
    )


def subject() -> Subject:
    settings = ROUND["subject"]
    return Subject(settings["length"], settings["bits"], bytes_of(settings["application"]))


def server() -> MaskedServer:
    return MaskedServer(invite(), subject())


def client(number: int) -> MaskedClient:
    policy, mine = ROUND["policy"], CLIENTS[number]
    assumption = Assumption(policy["corrupt"], policy["dropped"], policy["lying"])
    task = Task(RING, subject().length, subject().application)
    identity = Identity(bytes_of(mine["identity_seed"]))
    assert identity.public == bytes_of(mine["identity"])
    pinned = frozenset(invite().identities)
    return MaskedClient(identity, pinned, Policy(policy["minimum"], assumption), task, Prg(bytes_of(mine["prg_seed"])))


def vector(number: int) -> np.ndarray:
    return np.array(CLIENTS[number]["vector"], RING.dtype)


def test_the_file_is_what_its_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("masked_sum_vectors", FOLDER / "masked_sum.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build() == VECTORS


def test_most_vectors_are_negative() -> None:
    assert len(VECTORS["refused"]) > 2 * len(FRAMES) > 60
    assert len({case["name"] for case in VECTORS["refused"]}) == len(VECTORS["refused"])


def test_context_and_transcript() -> None:
    assert invite().context == bytes_of(ROUND["context"])
    roster = messages.read_server_frame(FRAMES["down", 1, 0])[1]
    transcript = messages.transcript_of(invite().context, roster)
    assert transcript == bytes_of(ROUND["transcript"])
    assert messages.sum_transcript(transcript, subject()) == bytes_of(ROUND["sum_transcript"])


@pytest.mark.parametrize("number", range(len(CLIENTS)))
def test_a_client_follows_the_round_byte_for_byte(number: int) -> None:
    following = client(number)
    for stage in range(5):
        if ("down", stage, number) not in FRAMES:
            break
        answer = following.receive(FRAMES["down", stage, number])
        if stage == Stage.MASK:
            answer = following.mask(vector(number))
        assert answer == FRAMES.get(("up", stage, number), answer)


def test_the_server_follows_the_round_byte_for_byte() -> None:
    following = server()
    sending = dict.fromkeys(range(len(CLIENTS)), following.invite())
    for stage in range(5):
        assert sending == {
            n: frame for (direction, at, n), frame in FRAMES.items() if (direction, at) == ("down", stage)
        }
        for (direction, at, number), frame in FRAMES.items():
            if (direction, at) == ("up", stage):
                assert following.receive(frame) == number
        sending = following.close()
    assert list(following.outcome.survivors) == ROUND["survivors"]
    assert following.outcome.total.tolist() == ROUND["total"]
    assert following.outcome.attestation.encoded().hex() == ROUND["attestation"]
    assert len(following.outcome.attestation.verify(frozenset(invite().identities))) == len(ROUND["survivors"])
    plain = np.sum([CLIENTS[i]["vector"] for i in ROUND["survivors"]], axis=0) % 2**RING.bits
    assert plain.tolist() == ROUND["total"]


@pytest.mark.parametrize("case", VECTORS["refused"], ids=lambda case: case["name"])
def test_what_must_be_refused_is_refused(case: dict[str, Any]) -> None:
    error, frame, stage = getattr(errors, case["error"]), bytes_of(case["frame"]), case["stage"]
    if case["to"] == "client":
        refusing = client(case["client"])
        for before in range(stage):
            refusing.receive(FRAMES["down", before, case["client"]])
            if before == Stage.MASK:
                refusing.mask(vector(case["client"]))
        with pytest.raises(error) as caught:
            refusing.receive(frame)
        assert refusing.state is State.FAILED
    else:
        refusing = server()
        for before in range(stage):
            for (direction, at, _), good in FRAMES.items():
                if (direction, at) == ("up", before):
                    refusing.receive(good)
            refusing.close()
        with pytest.raises(error) as caught:
            refusing.receive(frame)
        # Nothing has changed: the real frame is still welcome.
        assert refusing.receive(FRAMES["up", stage, case["client"]]) == case["client"]
    assert type(caught.value) is error


class TestPrimitives:
    def test_stream(self) -> None:
        given = PRIMITIVES["stream"]
        assert Prg(bytes_of(given["seed"])).bytes(32).hex() == given["bytes"]

    def test_key_pair(self) -> None:
        given = PRIMITIVES["key_pair"]
        pair = KeyPair(Prg(bytes_of(given["prg_seed"])))
        assert (f"{pair.number:064x}", pair.public.hex()) == (given["private_number"], given["public"])

    def test_pair_seed(self) -> None:
        given = PRIMITIVES["pair_seed"]
        one, two = (KeyPair.of_number(int(number, 16)) for number in given["private_numbers"])
        for own, other in ((one, two), (two, one)):
            seed = agreement.pair_seed(own, other.public, bytes_of(given["transcript"]), *given["clients"])
            assert seed.hex() == given["seed"]

    def test_own_mask(self) -> None:
        given = PRIMITIVES["own_mask"]
        arguments = (bytes_of(given["secret"]), bytes_of(given["transcript"]), given["client"])
        assert agreement.self_seed(*arguments).hex() == given["seed"]
        assert agreement.commitment(*arguments).hex() == given["commitment"]

    def test_sealed_shares(self) -> None:
        given, numbers = PRIMITIVES["sealed"], PRIMITIVES["pair_seed"]["private_numbers"]
        sender, recipient = (KeyPair.of_number(int(number, 16)) for number in numbers)
        between = (bytes_of(given["transcript"]), given["sender"], given["recipient"], given["partner"])
        assert agreement.unseal(recipient, sender.public, *between, bytes_of(given["box"])).hex() == given["shares"]

    def test_shamir(self) -> None:
        given = PRIMITIVES["shamir"]
        shares = shamir.split(
            int(given["secret"], 16), given["threshold"], given["points"], Prg(bytes_of(given["prg_seed"]))
        )
        assert [f"{share:064x}" for share in shares] == given["shares"]

    def test_packed(self) -> None:
        given = PRIMITIVES["packed"]
        packed = Ring(given["bits"]).pack(np.array(given["residues"], np.uint32))
        assert packed.tobytes().hex() == given["bytes"]
