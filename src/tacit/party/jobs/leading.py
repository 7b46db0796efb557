"""Alice's side of running jobs: which one, from which checkpoint, which step with which ticket, and what if it breaks.

No clock, disk or link: events come in, `Leading.pump` says what to do next.

*Agreement on checkpoints.* Each party writes a checkpoint under its own name and records it. Alice, once she has hers
and has heard that bob has his, records that it is agreed and forgets those before it; then she tells bob, who does the
same. At every moment there is a checkpoint that both have: the agreed one is forgotten by nobody before both are known
to have a newer one. After an interruption alice compares what both have and goes on from the newest that is common; a
run's checkpoints carry the run's id, so shares of different runs are never put together.

*Tickets.* Alice takes them from her pool, then bob from his, and only what both have taken is used. Whatever breaks a
run costs the tickets that were taken for it; the next run takes others.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tacit.errors import CodecError, InputError
from tacit.party.jobs.actions import Action, Agree, Discard, Halt, Launch, Rebase, Save, Settle, Take, Tell
from tacit.party.jobs.agreeing import (
    JobAgreed,
    JobBroke,
    JobClaim,
    JobClaimed,
    JobFromBob,
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
from tacit.party.jobs.states import ACTIVE, Checkpoint, Entry, Held, State, common, require_transition
from tacit.party.tickets import Ticket

DEPTH = 2
"""How many steps may be under way: one is taken, one waits at both workers."""
TRIES = 5
"""How many runs may break without a checkpoint between them, by a fault of their own, before the job fails."""
_AGAIN_S = (1.0, 2.0, 5.0, 15.0)
"""How long to wait after the first of them, the second, and so on."""
_IDLE_S = 60.0
"""How long a run may wait for tickets while another job could run."""


@dataclass
class _Run:
    """A run under way.

    ``begun`` is the last step that both were told to take, ``done`` the last that alice's worker took, ``kept`` the
    last after which both were told to write a checkpoint. ``ending`` says why it is to end early, if it is.
    """

    entry: Entry
    id: bytes
    base: Checkpoint
    here: bool = False
    there: bool = False
    begun: int = 0
    done: int = 0
    kept: int = 0
    ending: str = ""
    asked: list[Ticket] = field(default_factory=list)
    ready: deque[Ticket] = field(default_factory=deque)
    under_way: deque[Ticket] = field(default_factory=deque)
    saving: Checkpoint | None = None
    saved_here: bool = False
    saved_there: bool = False
    idle_since: float | None = None

    def __post_init__(self) -> None:
        self.begun = self.done = self.kept = self.base.step

    @property
    def running(self) -> bool:
        return self.here and self.there

    @property
    def unused(self) -> tuple[Ticket, ...]:
        return (*self.under_way, *self.ready, *self.asked)


class Leading:
    """Alice's side.

    Args:
        draw: gives the id of a new run.
    """

    def __init__(self, draw: Callable[[], bytes]) -> None:
        self._draw = draw
        self._here: dict[str, Entry] = {}
        self._there: dict[str, Held] | None = None
        self._run: _Run | None = None
        self._strikes: Counter[str] = Counter()
        self._again: dict[str, float] = {}
        self._trouble: dict[str, str] = {}
        self._stopping = self._stopping_there = False
        self._out: list[Action] = []

    # What happens.

    def known(self, entries: Iterable[Entry]) -> None:
        """What alice has of all jobs: at the start, and whenever her record has changed."""
        self._here = {entry.digest: entry for entry in entries}
        if self._run and self._run.entry.digest not in self._here:
            self._end()

    def connected(self) -> None:
        """A session with bob has begun; he says next what he has."""
        self._there, self._stopping_there = None, False

    def disconnected(self) -> None:
        """The session with bob is over."""
        self._there = None
        if self._run:
            self._interrupted(tell=False)

    def leased(self, tickets: list[Ticket]) -> None:
        """Tickets were taken from alice's pool, as `wanted` asked for."""
        if self._run is None:
            self._out.append(Discard(tuple(tickets)))
        elif tickets:
            self._run.asked += tickets
            self._out.append(Tell(JobClaim(self._run.id, tickets)))

    def ready(self) -> None:
        """Alice's worker is ready to take steps."""
        if self._run:
            self._run.here = True

    def stepped(self, step: int) -> None:
        """Alice's worker has taken a step."""
        if self._run:
            self._run.done = step
            self._run.under_way.popleft()

    def saved(self) -> None:
        """Alice's worker has written the checkpoint that it was told to write, and it is recorded."""
        run = self._run
        if run and run.saving:
            run.saved_here = True
            held = self._here[run.entry.digest].held
            self._put(run.entry.digest, held=msgspec.structs.replace(held, checkpoints=[*held.checkpoints, run.saving]))

    def broke(self, now: float, text: str, *, hopeless: bool) -> None:
        """Alice's worker has failed, or has ended."""
        if self._run:
            self._failed(now, text, hopeless=hopeless)

    def cancel(self, digest: str) -> None:
        """The owner wants no more steps: the one under way is finished, and a checkpoint written.

        Raises:
            InputError: there is no such job, or it is neither submitted nor running.
        """
        entry = self._entry(digest)
        require_transition(entry.name, entry.state, State.CANCELLED)
        if self._run and self._run.entry.digest == digest:
            self._run.ending = "cancelled"
        else:
            self._settle(entry, State.CANCELLED)

    def resume(self, digest: str) -> None:
        """The owner wants a job that was cancelled, or has failed, to go on.

        Raises:
            InputError: there is no such job, or it was neither cancelled nor has it failed.
        """
        entry = self._entry(digest)
        require_transition(entry.name, entry.state, State.SUBMITTED)
        for kept in (self._strikes, self._again, self._trouble):
            kept.pop(digest, None)
        self._settle(entry, State.SUBMITTED)

    def stop(self) -> None:
        """Alice is about to stop: finish the step under way, write a checkpoint, and begin nothing new."""
        self._stopping = True
        self._wind_down()

    def heard(self, now: float, message: JobFromBob) -> None:
        """Bob has said something.

        Raises:
            CodecError: it makes no sense where the run is.
        """
        run = self._run
        if isinstance(message, JobsStop):
            self._stopping_there = True
            self._wind_down()
        elif isinstance(message, JobsHeld):
            first, self._there = self._there is None, {held.job: held for held in message.jobs}
            if first:
                self._compare()
            if run and run.entry.digest not in self._there:
                self._interrupted(tell=True)
        elif run and message.run == run.id:
            match message:
                case JobReady():
                    run.there = True
                case JobClaimed(_, asked, tickets):
                    self._claimed(run, asked, tickets)
                case JobSaved(_, step):
                    if run.saving is None or run.saving.step != step:
                        raise CodecError(f"bob wrote a checkpoint after step {step} that nobody asked for")
                    run.saved_there = True
                case JobBroke(_, text, hopeless):
                    self._failed(now, f"bob: {text}", hopeless=hopeless)

    # What is to be done.

    @property
    def wanted(self) -> tuple[str, int, int]:
        """Tickets that are to be taken from alice's pool: of which job, for which batch size, how many."""
        run = self._run
        if run is None or not run.running or run.ending:
            return "", 0, 0
        there = len(run.ready) + len(run.asked)
        return run.entry.digest, run.entry.job.batch, max(0, min(DEPTH, run.entry.job.steps - run.begun) - there)

    @property
    def job(self) -> str | None:
        """The job that runs, if one does."""
        return self._run.entry.digest if self._run else None

    @property
    def states(self) -> dict[str, State]:
        """The state of every job."""
        return {entry.digest: entry.state for entry in self._here.values()}

    def waits(self, now: float) -> dict[str, str]:
        """What each job that is to be run waits for, in words; empty where it does not wait."""
        return {entry.digest: self._waits(entry, now) for entry in self._here.values() if entry.state in ACTIVE}

    def pump(self, now: float) -> list[Action]:
        """What to do next, in this order; call it after every event, and every now and then."""
        if self._run is None:
            self._begin(now)
        elif self._run.running:
            self._go_on(self._run)
            self._yield_turn(now)
        out, self._out = self._out, []
        return out

    # How it is decided.

    def _wind_down(self) -> None:
        if self._run and not self._run.ending:
            self._run.ending = "stopped"

    def _claimed(self, run: _Run, asked: list[Ticket], tickets: list[Ticket]) -> None:
        if run.asked[: len(asked)] != asked or not set(tickets) <= set(asked):
            raise CodecError("bob took other tickets than he was asked to take")
        run.asked = run.asked[len(asked) :]
        taken = [ticket for ticket in asked if ticket in tickets]
        run.ready += taken
        if refused := tuple(ticket for ticket in asked if ticket not in tickets):
            self._out.append(Discard(refused))

    def _compare(self) -> None:
        """Say where each job is, now that it is known what bob has: he, or alice, may have missed the last of it."""
        for entry in list(self._here.values()):
            held = self._there.get(entry.digest) if self._there else None
            if held is None:
                continue
            newest = common(entry.held, held)
            if newest and not entry.held.checkpoints == held.checkpoints == [newest]:
                self._agree(entry.digest, newest)
            self._out.append(Tell(JobSettled(entry.digest, entry.state, entry.reason)))

    def _begin(self, now: float) -> None:
        """Begin a run of the job that came first, of those that can be run."""
        for entry, held in self._runnable(now):
            base = common(entry.held, held)
            if base is None:
                self._settle(entry, State.FAILED, "the parties have no checkpoint in common: submit the job again")
            elif base.step >= entry.job.steps:
                self._agree(entry.digest, base)
                self._finish(entry.digest, State.DONE)
            else:
                self._run = _Run(entry, self._draw(), base)
                self._put(entry.digest, agreed=base, held=msgspec.structs.replace(entry.held, checkpoints=[base]))
                self._out += [
                    Rebase(entry.digest, base),
                    Tell(JobStart(entry.digest, self._run.id, base)),
                    Launch(entry.digest, self._run.id, base),
                ]
                return

    def _runnable(self, now: float) -> list[tuple[Entry, Held]]:
        """Jobs that could run now, in the order in which they came, and what bob has of them."""
        there = self._there
        if there is None or self._stopping or self._stopping_there:
            return []
        found = []
        for entry in sorted(self._here.values(), key=lambda one: one.number):
            held = there.get(entry.digest)
            due = entry.state in ACTIVE and now >= self._again.get(entry.digest, now)
            if due and held and not self._missing(entry, held):
                found.append((entry, held))
        return found

    def _yield_turn(self, now: float) -> None:
        """Let another job run instead of one for which no tickets come."""
        run = self._run
        if run is None:
            return
        if run.ready or run.asked or run.under_way or run.saving or run.ending:
            run.idle_since = None
        elif run.idle_since is None:
            run.idle_since = now
        elif now - run.idle_since > _IDLE_S and any(one.digest != run.entry.digest for one, _ in self._runnable(now)):
            run.ending, self._again[run.entry.digest] = "stopped", now + _IDLE_S
            self._trouble[run.entry.digest] = "no tickets came"

    def _waits(self, entry: Entry, now: float) -> str:
        digest, there = entry.digest, self._there
        if self._run and self._run.entry.digest == digest:
            run = self._run
            if not run.running:
                return "for its workers to start"
            return "" if run.ending or run.under_way or run.saving or run.ready or run.asked else "for tickets"
        if there is None:
            return "for bob"
        if digest not in there:
            return "for bob to be sent his part: submit it again"
        if missing := self._missing(entry, there[digest]):
            return f"for the rows of {', '.join(missing)}"
        if now < self._again.get(digest, now):
            return f"to be tried again: {self._trouble[digest]}"
        if self._stopping or self._stopping_there:
            return "for the parties to be started again"
        return "for another job" if self._run else ""

    def _missing(self, entry: Entry, held: Held) -> list[str]:
        """Contributors whose rows are not at both parties, from one upload."""
        uploads = entry.held.uploads
        return [key for key in entry.contributors if key not in uploads or held.uploads.get(key) != uploads[key]]

    def _go_on(self, run: _Run) -> None:
        digest, job = run.entry.digest, run.entry.job
        if self._here[digest].state is State.SUBMITTED:
            self._settle(self._here[digest], State.RUNNING)
        while True:
            if run.saving and run.saved_here and run.saved_there:
                self._agree(digest, run.saving)
                run.saving = None
                self._strikes.pop(digest, None)
            over = bool(run.ending) or run.begun == job.steps
            if run.begun > run.kept and (over or run.begun % job.terms.checkpoint_every == 0):
                if run.saving:
                    return
                self._save(run)
            elif over:
                if run.saving is None and run.done == run.begun:
                    self._over(run)
                return
            elif run.ready and run.begun - run.done < DEPTH:
                self._step(run)
            else:
                return

    def _step(self, run: _Run) -> None:
        run.begun += 1
        ticket = run.ready.popleft()
        run.under_way.append(ticket)
        self._out += [Tell(JobStep(run.id, run.begun, ticket)), Take(run.begun, ticket)]

    def _save(self, run: _Run) -> None:
        run.kept, run.saving = run.begun, Checkpoint(run.begun, run.id)
        run.saved_here = run.saved_there = False
        self._out += [Tell(JobSave(run.id, run.begun)), Save(run.saving)]

    def _agree(self, digest: str, checkpoint: Checkpoint) -> None:
        held = msgspec.structs.replace(self._here[digest].held, checkpoints=[checkpoint])
        self._put(digest, agreed=checkpoint, held=held)
        if self._there and digest in self._there:
            self._there[digest] = msgspec.structs.replace(self._there[digest], checkpoints=[checkpoint])
        self._out += [Agree(digest, checkpoint), Tell(JobAgreed(digest, checkpoint))]

    def _over(self, run: _Run) -> None:
        """A run has come to its end, or to the end that it was told to come to; its last step is in a checkpoint."""
        digest, ending = run.entry.digest, run.ending
        self._end()
        if run.begun == run.entry.job.steps:
            self._finish(digest, State.DONE)
        elif ending == "cancelled":
            self._settle(self._here[digest], State.CANCELLED)

    def _end(self, *, tell: bool = True) -> None:
        """End the run under way and let go of its worker and its tickets."""
        run, self._run = self._run, None
        if run:
            self._out.append(Halt())
            if tell:
                self._out.append(Tell(JobStop(run.id)))
            if run.unused:
                self._out.append(Discard(run.unused))

    def _failed(self, now: float, text: str, *, hopeless: bool) -> None:
        """A run has broken by a fault of its own."""
        if self._run is None:
            return
        digest = self._run.entry.digest
        self._strikes[digest] += 1
        strikes, self._trouble[digest] = self._strikes[digest], text
        if hopeless or strikes >= TRIES:
            self._end()
            self._finish(digest, State.FAILED, text if hopeless else f"{text} ({strikes} times in a row)")
            return
        self._again[digest] = now + _AGAIN_S[min(strikes, len(_AGAIN_S)) - 1]
        self._interrupted(tell=True)

    def _interrupted(self, *, tell: bool) -> None:
        """A run has broken; if it was being cancelled, that is what it is now."""
        if self._run:
            digest, ending = self._run.entry.digest, self._run.ending
            self._end(tell=tell)
            if ending == "cancelled":
                self._settle(self._here[digest], State.CANCELLED)

    def _finish(self, digest: str, state: State, reason: str = "") -> None:
        """Settle a job that may not be recorded as running yet."""
        if self._here[digest].state is State.SUBMITTED:
            self._settle(self._here[digest], State.RUNNING)
        self._settle(self._here[digest], state, reason)

    def _settle(self, entry: Entry, state: State, reason: str = "") -> None:
        self._put(entry.digest, state=state, reason=reason)
        self._out.append(Settle(entry.digest, state, reason))
        if self._there is not None:
            self._out.append(Tell(JobSettled(entry.digest, state, reason)))

    def _put(self, digest: str, **changes: Any) -> None:
        """What alice's record will say once the actions that come next have been carried out."""
        self._here[digest] = dataclasses.replace(self._here[digest], **changes)

    def _entry(self, digest: str) -> Entry:
        if digest not in self._here:
            raise InputError(f"there is no job {digest[:12]}… here: was it submitted?")
        return self._here[digest]
