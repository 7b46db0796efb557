"""vectors/v1/transcript.json: the honest transcript passes, and every other one stops at the place that it says."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tacit.errors import PeerError
from tacit.federated.audit import verify
from tacit.federated.parties import Pins
from tacit.federated.transcript import run_digest, tensors_digest, unseal

FOLDER = Path(__file__).parents[2] / "vectors"
VECTORS: dict[str, Any] = json.loads((FOLDER / "v1" / "transcript.json").read_text())
HONEST = [bytes.fromhex(entry) for entry in VECTORS["entries"]]
KEYS = VECTORS["pins"]
PINS = Pins(
    bytes.fromhex(KEYS["coordinator"]),
    tuple(bytes.fromhex(key) for key in KEYS["clients"]),
    bytes.fromhex(KEYS["alice"]),
    bytes.fromhex(KEYS["bob"]),
)
RUN = bytes.fromhex(VECTORS["run"])


def test_the_file_is_what_its_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("transcript_vectors", FOLDER / "transcript.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build() == VECTORS


def test_most_vectors_are_negative() -> None:
    assert len(VECTORS["refused"]) > 15 * len(HONEST)
    assert len({case["name"] for case in VECTORS["refused"]}) == len(VECTORS["refused"])


def test_the_honest_transcript() -> None:
    assert run_digest(bytes.fromhex(VECTORS["config"]), PINS.coordinator) == RUN
    checked = list(verify(HONEST, RUN, PINS))
    assert [entry.digest.hex() for entry in checked] == VECTORS["digests"]
    assert [list(entry.summed) for entry in checked] == VECTORS["summed"]
    assert [unseal(data)[0].purpose.application.hex() for data in HONEST] == VECTORS["applications"]


@pytest.mark.parametrize("given", VECTORS["models"], ids=lambda given: given["digest"][:8])
def test_digests_of_models(given: dict[str, Any]) -> None:
    tensors = {
        tensor["name"]: torch.tensor(tensor["values"], dtype=getattr(torch, tensor["dtype"]))
        for tensor in given["tensors"]
    }
    assert tensors_digest(tensors).hex() == given["digest"]


@pytest.mark.parametrize("case", VECTORS["refused"], ids=lambda case: case["name"])
def test_what_must_be_refused_is_refused(case: dict[str, Any]) -> None:
    entries = [HONEST[item] if isinstance(item, int) else bytes.fromhex(item) for item in case["entries"]]
    audit = verify(entries, RUN, PINS)
    for _ in entries[:-1]:
        next(audit)
    with pytest.raises(PeerError, match=f"^entry {case['wrong']}[ :]"):
        next(audit)
    assert len(entries) == case["wrong"]
