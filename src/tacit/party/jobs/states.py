"""The states of a job, and what is known of one.

::

    submitted ──► running ──► done
        ▲ │          │
        │ └──────────┼──► cancelled ──┐
        │            └──► failed ─────┤
        └─────────────────────────────┘   resume

alice decides and records first; bob records what she says. What interrupts a job without being its fault (a party, the
provider or a worker that is gone, a cut link, an empty pool) changes no state: a running job goes on by itself from
its last checkpoint when all are back. Only *done* is final.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta

from tacit.errors import InputError
from tacit.party.jobs.description import Job, Step
from tacit.party.tickets import Digest

RUN_BYTES = 16
RunId = Annotated[bytes, Meta(min_length=RUN_BYTES, max_length=RUN_BYTES)]
"""What alice draws for every run of a job, anew after every interruption."""
UploadId = Annotated[bytes, Meta(min_length=RUN_BYTES, max_length=RUN_BYTES)]
"""What a contributor draws for every sharing of its rows. Shares of different ones do not belong together."""


class State(Enum):
    """The states."""

    SUBMITTED = "submitted"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


_NEXT: Mapping[State, frozenset[State]] = {
    State.SUBMITTED: frozenset({State.RUNNING, State.CANCELLED, State.FAILED}),
    State.RUNNING: frozenset({State.DONE, State.CANCELLED, State.FAILED}),
    State.DONE: frozenset(),
    State.CANCELLED: frozenset({State.SUBMITTED}),
    State.FAILED: frozenset({State.SUBMITTED}),
}
ACTIVE = frozenset({State.SUBMITTED, State.RUNNING})
"""A job in one of these is run, or waits to be."""


def require_transition(name: str, before: State, after: State) -> None:
    """Refuse what cannot follow.

    Args:
        name: the job's.
        before: its state.
        after: the state that it is to have.

    Raises:
        InputError: the one does not follow on the other.
    """
    if after in _NEXT[before]:
        return
    what = {State.CANCELLED: "be cancelled", State.SUBMITTED: "be resumed"}.get(after, f"become {after.value}")
    raise InputError(f"the job {name} is {before.value}: it cannot {what}")


class Checkpoint(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True, order=True):
    """A checkpoint: both parties' shares of the state after a step.

    Steps that are taken again after an interruption give other shares, so a checkpoint is named by the step and by the
    run that took it. Shares of different runs do not belong together.

    Args:
        step: how many steps led to it.
        run: 16 bytes that alice drew when she started the run; for the initial state, the first of the job's digest.
    """

    step: Step
    run: RunId

    def __str__(self) -> str:
        return f"after step {self.step}"


def initial(digest: str) -> Checkpoint:
    """The state that a job begins with, as its first checkpoint."""
    return Checkpoint(0, bytes.fromhex(digest)[:RUN_BYTES])


class Held(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """What a party has of a job.

    Args:
        job: its digest.
        uploads: for each contributor whose rows are here in full, which upload they came with.
        checkpoints: whose files are here.
    """

    job: Digest
    uploads: dict[str, UploadId]
    checkpoints: list[Checkpoint]


@dataclass(frozen=True)
class Entry:
    """What a party knows of a job.

    Args:
        job: its description.
        number: counts the jobs in the order in which they came.
        state: its state.
        reason: why it failed.
        agreed: the newest checkpoint that both parties are known to have.
        seconds: that the steps up to there took.
        held: what is here.
    """

    job: Job
    number: int
    state: State
    reason: str
    agreed: Checkpoint
    seconds: float
    held: Held

    @property
    def digest(self) -> str:
        """The job's digest."""
        return self.held.job

    @property
    def name(self) -> str:
        """What the owner calls it."""
        return self.job.name

    @property
    def contributors(self) -> tuple[str, ...]:
        """Whose rows it takes."""
        return tuple(one.key for one in self.job.terms.data)

    @property
    def missing(self) -> tuple[str, ...]:
        """Contributors whose rows are not here in full."""
        return tuple(key for key in self.contributors if key not in self.held.uploads)

    def may_see(self, key: str) -> bool:
        """Whether somebody may know of the job: its owner and its contributors may."""
        return key == self.job.owner or key in self.contributors


def common(here: Held, there: Held) -> Checkpoint | None:
    """The newest checkpoint that both have."""
    return max(set(here.checkpoints) & set(there.checkpoints), default=None)
