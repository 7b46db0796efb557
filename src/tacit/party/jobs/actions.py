"""What the two sides of a run have done for them: decided without a clock, a disk or a link, carried out elsewhere.

Actions are carried out in order, and what is recorded is on the disk before the next one: so what is said to the other
party is true whatever happens afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from tacit.party.jobs.agreeing import JobFromAlice, JobFromBob
from tacit.party.jobs.states import Checkpoint, State
from tacit.party.tickets import Ticket


@dataclass(frozen=True)
class Tell:
    """Send the other party a message."""

    message: JobFromAlice | JobFromBob


@dataclass(frozen=True)
class Settle:
    """Record the state of a job."""

    job: str
    state: State
    reason: str = ""


@dataclass(frozen=True)
class Rebase:
    """Record that a run begins from a checkpoint; see `JobStore.begin`."""

    job: str
    base: Checkpoint


@dataclass(frozen=True)
class Agree:
    """Record that both parties have a checkpoint; see `JobStore.agree`."""

    job: str
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Launch:
    """Start a worker process for a run, which says when it is ready."""

    job: str
    run: bytes
    base: Checkpoint


@dataclass(frozen=True)
class Take:
    """Have the worker take a step with a ticket."""

    step: int
    ticket: Ticket


@dataclass(frozen=True)
class Save:
    """Have the worker write a checkpoint."""

    checkpoint: Checkpoint


@dataclass(frozen=True)
class Halt:
    """End the worker process at once."""


@dataclass(frozen=True)
class Claim:
    """Bob: take these tickets from the pool, those of them that are there, and say which."""

    tickets: tuple[Ticket, ...]


@dataclass(frozen=True)
class Discard:
    """Throw tickets away that were taken and not used up."""

    tickets: tuple[Ticket, ...]


Action = Tell | Settle | Rebase | Agree | Launch | Take | Save | Halt | Claim | Discard
