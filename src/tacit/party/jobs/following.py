"""Bob's side of running jobs: he does what alice says, as far as it makes sense, and says when he cannot.

No clock, disk or link; see `tacit.party.jobs.leading`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tacit.errors import CodecError
from tacit.party.jobs.actions import Action, Agree, Claim, Discard, Halt, Launch, Rebase, Save, Settle, Take, Tell
from tacit.party.jobs.agreeing import (
    JobAgreed,
    JobBroke,
    JobClaim,
    JobClaimed,
    JobFromAlice,
    JobReady,
    JobSave,
    JobSaved,
    JobSettled,
    JobsHeld,
    JobsStop,
    JobStart,
    JobStep,
    JobStop,
)
from tacit.party.jobs.states import Checkpoint, Entry
from tacit.party.tickets import Ticket


@dataclass
class _Run:
    job: str
    id: bytes
    step: int
    asked: list[list[Ticket]] = field(default_factory=list)
    claimed: list[Ticket] = field(default_factory=list)


class Following:
    """Bob's side."""

    def __init__(self) -> None:
        self._here: dict[str, Entry] = {}
        self._connected = False
        self._run: _Run | None = None
        self._out: list[Action] = []

    def known(self, entries: Iterable[Entry]) -> None:
        """What bob has of all jobs: at the start, and whenever his record has changed."""
        before = {entry.digest: entry.held.uploads for entry in self._here.values()}
        self._here = {entry.digest: entry for entry in entries}
        if self._run and self._run.job not in self._here:
            self._give_up("the job was deleted", hopeless=False)
        if self._connected and before != {entry.digest: entry.held.uploads for entry in self._here.values()}:
            self._tell()

    def connected(self) -> None:
        """A session with alice has begun."""
        self._connected = True
        self._tell()

    def disconnected(self) -> None:
        """The session with alice is over."""
        self._connected = False
        self._end()

    def stop(self) -> None:
        """Bob is about to stop: alice brings the run under way to an end."""
        if self._connected:
            self._out.append(Tell(JobsStop()))

    @property
    def job(self) -> str | None:
        """The job that runs, if one does."""
        return self._run.job if self._run else None

    def ready(self) -> None:
        """Bob's worker is ready to take steps."""
        if self._run:
            self._out.append(Tell(JobReady(self._run.id)))

    def claimed(self, tickets: Sequence[Ticket]) -> None:
        """These are taken from bob's pool, of those that `Claim` asked for."""
        if self._run and self._run.asked:
            self._run.claimed += tickets
            self._out.append(Tell(JobClaimed(self._run.id, self._run.asked.pop(0), list(tickets))))

    def saved(self, checkpoint: Checkpoint) -> None:
        """Bob's worker has written a checkpoint, and it is recorded."""
        if self._run and checkpoint.run == self._run.id:
            self._out.append(Tell(JobSaved(self._run.id, checkpoint.step)))

    def broke(self, text: str, *, hopeless: bool) -> None:
        """Bob's worker has failed, or has ended."""
        self._give_up(text, hopeless=hopeless)

    def heard(self, message: JobFromAlice) -> None:
        """Alice has said something.

        Raises:
            CodecError: it makes no sense where the run is.
        """
        match message:
            case JobSettled(job, state, reason):
                if job in self._here:
                    self._out.append(Settle(job, state, reason))
            case JobAgreed(job, checkpoint):
                if job in self._here:
                    self._agreed(job, checkpoint)
            case JobStart(job, run, base):
                self._start(job, run, base)
            case _ if self._run is None or message.run != self._run.id:
                pass  # bob has given that run up, and alice will hear of it
            case JobClaim(_, tickets):
                self._claim(self._run, tickets)
            case JobStep(_, step, ticket):
                self._step(self._run, step, ticket)
            case JobSave(_, step):
                if step != self._run.step:
                    raise CodecError(f"alice wants a checkpoint after step {step}, where {self._run.step} was the last")
                self._out.append(Save(Checkpoint(step, self._run.id)))
            case JobStop():
                self._end()

    def pump(self) -> list[Action]:
        """What to do next, in this order; call it after every event."""
        out, self._out = self._out, []
        return out

    def _tell(self) -> None:
        self._out.append(Tell(JobsHeld([entry.held for entry in self._here.values()])))

    def _start(self, job: str, run: bytes, base: Checkpoint) -> None:
        self._end()
        if job not in self._here or base not in self._here[job].held.checkpoints:
            what = "the job" if job not in self._here else f"its checkpoint {base}"
            self._out.append(Tell(JobBroke(run, f"{what} is not here any more", False)))
            return
        self._run = _Run(job, run, base.step)
        self._out += [Rebase(job, base), Launch(job, run, base)]

    def _agreed(self, job: str, checkpoint: Checkpoint) -> None:
        if checkpoint not in self._here[job].held.checkpoints:
            raise CodecError(f"alice says that bob has the checkpoint {checkpoint} of a job, which he has not")
        self._out.append(Agree(job, checkpoint))

    def _claim(self, run: _Run, tickets: list[Ticket]) -> None:
        batch = self._here[run.job].job.batch
        if any((ticket.model, ticket.batch) != (run.job, batch) for ticket in tickets):
            raise CodecError("alice has taken tickets for a run that are not its job's")
        run.asked.append(tickets)
        self._out.append(Claim(tuple(tickets)))

    def _step(self, run: _Run, step: int, ticket: Ticket) -> None:
        if step != run.step + 1 or step > self._here[run.job].job.steps:
            raise CodecError(f"alice wants step {step}, where {run.step} was the last")
        if ticket not in run.claimed:
            raise CodecError(f"alice wants to use ticket {ticket}, which bob has not taken")
        run.claimed.remove(ticket)
        run.step = step
        self._out.append(Take(step, ticket))

    def _give_up(self, text: str, *, hopeless: bool) -> None:
        if self._run:
            run = self._run.id
            self._end()
            self._out.append(Tell(JobBroke(run, text, hopeless)))

    def _end(self) -> None:
        """End the run under way and let go of its worker and its tickets."""
        run, self._run = self._run, None
        if run:
            self._out.append(Halt())
            if run.claimed:
                self._out.append(Discard(tuple(run.claimed)))
