"""What alice and bob say to each other about jobs, on the link on which they also speak of requests.

Both name a run by the id that alice drew for it; what belongs to another run has been overtaken and is ignored.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from tacit.party.jobs.description import Step
from tacit.party.jobs.states import Checkpoint, Held, RunId, State
from tacit.party.tickets import Digest, Ticket

Tickets = Annotated[list[Ticket], Meta(max_length=64)]


class JobSettled(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """Alice has recorded the state of a job; bob is to do so, too."""

    job: Digest
    state: State
    reason: str = ""


class JobStart(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """A run begins, from a checkpoint that both have."""

    job: Digest
    run: RunId
    base: Checkpoint


class JobClaim(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """Alice has taken these tickets for a run: bob is to take them, too."""

    run: RunId
    tickets: Tickets


class JobStep(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """Take the next step, with a ticket that both have taken."""

    run: RunId
    step: Step
    ticket: Ticket


class JobSave(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """Write a checkpoint after the step that came last."""

    run: RunId
    step: Step


class JobAgreed(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """Both have this checkpoint on their disks: the others are of no use any more."""

    job: Digest
    checkpoint: Checkpoint


class JobStop(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """A run is over, whatever came of it."""

    run: RunId


class JobsHeld(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """What bob has, of all jobs: said when the session begins and whenever it changes, but for checkpoints."""

    jobs: list[Held]


class JobsStop(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """Bob is about to stop, once the step under way is taken and in a checkpoint."""


class JobReady(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """Bob's worker is ready to take steps."""

    run: RunId


class JobClaimed(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """Bob has taken some of the tickets that he was asked to take; the others he has not, and never will."""

    run: RunId
    asked: Tickets
    tickets: Tickets


class JobSaved(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """Bob has a checkpoint on his disk."""

    run: RunId
    step: Step


class JobBroke(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """Bob's side of a run has failed.

    Args:
        run: which.
        text: why, in one line; no secrets.
        hopeless: whether it would fail again in the same way.
    """

    run: RunId
    text: str
    hopeless: bool


JobFromAlice = JobSettled | JobStart | JobClaim | JobStep | JobSave | JobAgreed | JobStop
JobFromBob = JobsHeld | JobsStop | JobReady | JobClaimed | JobSaved | JobBroke
