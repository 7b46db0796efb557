"""What owners say to a party about jobs, and what it answers: a part of the messages of an owner's session.

Shares travel with the frame: a part of a job with `SubmitJob`, of rows with `ShareRows`, of the model with `JobModel`,
of losses with `Losses`; the description of a job with `DescribedJob`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from tacit.party.jobs.description import Step
from tacit.party.jobs.states import Checkpoint, RunId, State, UploadId
from tacit.party.tickets import Digest

_Row = Annotated[int, Meta(ge=0, le=1 << 32)]


class SubmitJob(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """An owner sends this party's part of a job, which comes with this.

    Args:
        part: the body that `tacit.party.jobs.description.pack` gave.
    """

    part: bytes

    def __repr__(self) -> str:
        return "SubmitJob()"


class ShareRows(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A contributor sends shares of some of its rows, which come with this; see `JobStore.add_rows`.

    Args:
        job: its digest.
        upload: drawn for this sharing.
        first: the number of the first row.
    """

    job: Digest
    upload: UploadId
    first: _Row


class DescribeJob(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """An owner or a contributor wants the description of a job."""

    job: Digest


class ListJobs(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """An owner or a contributor wants to know of its jobs; of one, if it is named."""

    job: Digest | None = None


class CancelJob(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """An owner wants a job to stop; answered when it has, which takes as long as the step under way."""

    job: Digest


class ResumeJob(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """An owner wants a job that was cancelled, or has failed, to go on."""

    job: Digest


class DeleteJob(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """An owner has this party forget a job and all that belongs to it."""

    job: Digest


class FetchModel(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """An owner wants this party's shares of the model.

    Args:
        job: its digest.
        checkpoint: at which; at the newest that both parties have, if none is named.
    """

    job: Digest
    checkpoint: Checkpoint | None = None


class FetchLosses(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """An owner wants this party's shares of the losses after a step."""

    job: Digest
    after: Step


JobCall = SubmitJob | ShareRows | DescribeJob | ListJobs | CancelJob | ResumeJob | DeleteJob | FetchModel | FetchLosses


class JobDone(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """What was asked for has happened."""


class RowsHere(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """How many of a contributor's rows are here."""

    count: _Row


class DescribedJob(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """The description of a job comes with this."""


class JobStatus(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """How far a job is.

    Args:
        job: its digest.
        name: what its owner calls it.
        owner: the owner's public key, as text.
        state: its state.
        reason: why it failed.
        step: the last step that was taken.
        steps: how many it takes.
        seconds: that the steps so far took.
        checkpoint: the newest that both parties have: what an interruption leaves.
        waiting: what it waits for, in words; empty if it does not wait. Alice knows.
        mine: whether it is the owner who asks, and not a contributor.
    """

    job: Digest
    name: str
    owner: str
    state: State
    reason: str
    step: Step
    steps: Step
    seconds: float
    checkpoint: Checkpoint
    waiting: str
    mine: bool


class JobList(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Jobs, the oldest first."""

    jobs: list[JobStatus]


class JobModel(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """This party's shares of the model come with this.

    Args:
        checkpoint: at which.
    """

    checkpoint: Checkpoint


class Losses(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """This party's shares of losses come with this, in one tensor.

    Args:
        steps: whose, and the run that took them: shares of different runs do not belong together.
    """

    steps: list[tuple[Step, RunId]]


JobReply = JobDone | RowsHere | DescribedJob | JobList | JobModel | Losses
