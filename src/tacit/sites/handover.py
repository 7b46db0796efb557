"""The hand-over: a trained model goes to alice and bob, and somebody outside of the federation asks it.

alice, bob and the provider are processes of their own, started here; the model's owner sends each its part, as
``tacit model push`` does, and the outside client connects as ``tacit.connect`` does: it never sees the model, and they
never its question.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tacit.data.examples import Examples
from tacit.errors import PeerError
from tacit.identity import key_text
from tacit.party import push
from tacit.party.cluster_file import ALICE, BOB
from tacit.party.connection import connect
from tacit.party.local import LocalService, prepare
from tacit.party.owning import Owner
from tacit.program.lowering import Context

OWNER, CLIENT = "hospitals", "outside-clinic"
NAME = "heart"
SERVED_SECONDS = 180.0
ASKED_SECONDS = 120.0
PATIENTS = 8
_LOOK_EVERY = 0.2


@dataclass(frozen=True)
class Handover:
    """What the outside client got.

    Args:
        patients: it asked about.
        agreeing: of them, those with the same diagnosis as the model gives in the clear.
        largest_error: of a logit.
        seconds: for all patients together, once the model was served.
    """

    patients: int
    agreeing: int
    largest_error: float
    seconds: float

    @property
    def words(self) -> str:
        """In a sentence."""
        return (
            f"The trained model was pushed to alice and bob, and a clinic outside of the federation asked them about "
            f"{self.patients} patients, encrypted: {self.agreeing} diagnoses are those of the model in the clear, "
            f"and no logit differs by more than {self.largest_error:.1e}. It took {self.seconds:.1f} s."
        )


def hand_over(model: nn.Module, patients: Examples, folder: Path) -> Handover:
    """Start alice, bob and the provider, push the model, ask it, and stop them.

    Args:
        model: trained.
        patients: standardised as the model was trained; the first `PATIENTS` are asked about.
        folder: for their keys and disks; made if it is missing.

    Raises:
        PeerError: a process did not start, or the model was not served in time.
    """
    questions = patients.inputs[:PATIENTS]
    model.eval()
    with torch.inference_mode():
        expected = model(questions)
    cluster = prepare(folder, owner=OWNER, clients=(CLIENT,))
    with LocalService(folder) as service:
        service.wait_ready()
        owner = service.key(OWNER)
        prepared = push.prepare(
            model, [questions[:1]], name=NAME, owner=key_text(owner.public), batch_sizes=cluster.serving.batch_sizes,
            context=Context(network=cluster.network.for_planning()),
        )  # fmt: skip
        with Owner(cluster, owner) as opened:
            _await_served(opened, opened.push(prepared))
        with connect(cluster, service.key(CLIENT)) as parties:
            served = parties.model(NAME)
            began = time.monotonic()
            answers = [served(patient.unsqueeze(0), timeout=ASKED_SECONDS) for patient in questions]
            seconds = time.monotonic() - began
    found = torch.cat([answer if isinstance(answer, torch.Tensor) else answer[0] for answer in answers])
    agreeing = int((found.argmax(1) == expected.argmax(1)).sum())
    return Handover(len(questions), agreeing, float((found - expected).abs().max()), seconds)


def _await_served(owner: Owner, model: str) -> None:
    """Wait until both parties serve it and tickets are dealt."""
    end = time.monotonic() + SERVED_SECONDS
    while True:
        found = owner.list()
        there = [one for party in (ALICE, BOB) for one in found[party] if one.model == model]
        if len(there) == 2 and all(one.loaded for one in there) and any(there[0].tickets.values()):
            return
        if time.monotonic() > end:
            raise PeerError(f"the model is not served after {SERVED_SECONDS:g} seconds: see the parties' logs")
        time.sleep(_LOOK_EVERY)
