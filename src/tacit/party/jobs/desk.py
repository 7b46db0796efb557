"""Jobs at alice or bob: a thread that carries out what the state machine decides, and tells it what comes of it.

It runs beside the serving of predictions and neither waits for the other. Events come in through a queue, from the
session with the other party, from the worker and from owners; the record is written in this thread alone, except for
what owners bring.
"""

from __future__ import annotations

import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tacit.errors import CorrelationError, InputError, TacitError, one_line
from tacit.identity import Identity
from tacit.party.cluster_file import ALICE, BOB, ClusterFile
from tacit.party.jobs import calls
from tacit.party.jobs.actions import Action, Agree, Claim, Discard, Halt, Launch, Rebase, Save, Settle, Take, Tell
from tacit.party.jobs.agreeing import JobFromAlice, JobFromBob
from tacit.party.jobs.following import Following
from tacit.party.jobs.leading import Leading
from tacit.party.jobs.planned import PlannedJob
from tacit.party.jobs.process import JobProcess
from tacit.party.jobs.states import RUN_BYTES, State
from tacit.party.jobs.store import JobStore
from tacit.party.metrics import Metrics
from tacit.party.pool import PoolStore
from tacit.party.tickets import Ticket

PATIENCE_S = 300.0
"""How long the other party's worker may be silent in a step."""
_IDLE_S = 0.2
"""How often it is looked whether something is due: tickets that have come, a run to be tried again."""
_TROUBLE_S = 1.0
_STOPPING_S = 20.0


@dataclass(frozen=True)
class Surroundings:
    """What a party's jobs need of the party.

    Args:
        role: ``"alice"`` or ``"bob"``.
        identity: the party's.
        cluster: who is who.
        number: of the job's worker among the party's workers.
        pool: the party's tickets.
        send: sends a message to the other party, if there is a session with it.
        want: bob: keep so many tickets of a job ahead; none, to stop.
        log: where events are written.
        metrics: where jobs and their steps are counted.
    """

    role: str
    identity: Identity
    cluster: ClusterFile
    number: int
    pool: PoolStore
    send: Callable[[JobFromAlice | JobFromBob], None]
    want: Callable[[PlannedJob, int], None] = lambda job, ahead: None
    log: Callable[..., None] = lambda event, **facts: None
    metrics: Metrics = field(default_factory=Metrics)


@dataclass
class _Live:
    """What is known of the run under way and not recorded yet."""

    planned: PlannedJob
    run: bytes
    step: int
    seconds: float
    wanted: int = 0
    losses: list[tuple[int, Tensor]] = field(default_factory=list)

    @property
    def job(self) -> str:
        return self.planned.digest


class JobDesk:
    """A party's jobs.

    Args:
        store: the party's record.
        around: what they need of the party.
    """

    def __init__(self, store: JobStore, around: Surroundings) -> None:
        self.store, self._around = store, around
        self._events: queue.Queue[Callable[[], None]] = queue.Queue()
        self._machine: Leading | Following = (
            Leading(lambda: secrets.token_bytes(RUN_BYTES)) if around.role == ALICE else Following()
        )
        self._process: JobProcess | None = None
        self._live: _Live | None = None
        self._cancelled: list[tuple[str, Future[None]]] = []
        self._guard = threading.Lock()
        self._waiting: dict[str, str] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the step under way and write a checkpoint, if that takes no long time."""
        self._events.put(self._wind_down)
        self._thread.join(_STOPPING_S)

    def close(self) -> None:
        """End at once, whatever the state is; what was not in a checkpoint is lost."""
        self._stopped.set()
        self._events.put(_nothing)
        if self._thread.ident is not None:
            self._thread.join()

    # From the session with the other party.

    def connected(self) -> None:
        """A session with the other party has begun, and the pools have been compared."""
        self._events.put(self._machine.connected)

    def disconnected(self) -> None:
        """The session with the other party is over."""
        self._events.put(self._machine.disconnected)

    def heard(self, message: Any) -> None:
        """The other party has said something about jobs."""
        if isinstance(self._machine, Leading):
            leading = self._machine
            self._events.put(lambda: leading.heard(time.monotonic(), message))
        else:
            following = self._machine
            self._events.put(lambda: following.heard(message))

    def hand_over(self, sock: socket.socket) -> None:
        """A connection has come for the job's worker."""
        process = self._process
        if process is None:
            sock.close()
        else:
            process.hand_over(sock)

    # From owners.

    def changed(self) -> None:
        """The record has changed: a job came, rows came, or a job is gone."""
        self._events.put(self._know)

    def cancel(self, digest: str) -> Future[None]:
        """Cancel a job; done when it is, which takes as long as the step under way.

        Its error is an `InputError` if the job cannot be cancelled.
        """
        done: Future[None] = Future()

        def cancel() -> None:
            try:
                self._leading().cancel(digest)
            except InputError as error:
                done.set_exception(error)
            else:
                self._cancelled.append((digest, done))

        self._events.put(cancel)
        return done

    def resume(self, digest: str) -> Future[None]:
        """Have a job go on; done when that is recorded. Its error is an `InputError` if the job cannot be resumed."""
        done: Future[None] = Future()

        def resume() -> None:
            try:
                self._leading().resume(digest)
                self._pump()
            except TacitError as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._events.put(resume)
        return done

    def progress(self, digest: str) -> tuple[int, float] | None:
        """The last step of the run under way and the seconds of all the job's steps, if it is this job's."""
        with self._guard:
            live = self._live
            return (live.step, live.seconds) if live and live.job == digest else None

    def live_losses(self, digest: str) -> list[tuple[int, bytes, Tensor]]:
        """Shares of the losses of the run under way that are not recorded yet: step, run, share."""
        with self._guard:
            live = self._live
            return [(step, live.run, words) for step, words in live.losses] if live and live.job == digest else []

    def waiting(self, digest: str) -> str:
        """What a job waits for, in words; alice knows."""
        with self._guard:
            return self._waiting.get(digest, "")

    # The thread.

    def _run(self) -> None:
        self._events.put(self._know)
        while not self._stopped.is_set():
            try:
                event = self._events.get(timeout=_IDLE_S)
            except queue.Empty:
                event = _nothing
            try:
                event()
                self._pump()
            except Exception as error:
                self._trouble(error)
        self._halt()

    def _pump(self) -> None:
        while True:
            actions = self._decided()
            if not actions:
                break
            changed = False
            for action in actions:
                changed |= self._carry_out(action)
            if changed:
                self._know()
        self._tell_owners()

    def _decided(self) -> list[Action]:
        if isinstance(self._machine, Following):
            return self._machine.pump()
        actions = self._machine.pump(time.monotonic())
        job, batch, count = self._machine.wanted
        if actions or not count:
            return actions
        if not (tickets := self._around.pool.lease(job, batch, count)):
            return []
        self._machine.leased(tickets)
        return self._machine.pump(time.monotonic())

    def _carry_out(self, action: Action) -> bool:
        """Carry an action out; whether the record has changed."""
        match action:
            case Tell(message):
                self._around.send(message)
            case Settle(job, state, reason):
                self._settle(job, state, reason)
            case Rebase(job, base):
                self.store.begin(job, base)
            case Agree(job, checkpoint):
                self.store.agree(job, checkpoint)
            case Launch():
                self._launch(action)
            case Take(step, ticket):
                if self._process:
                    self._process.call(calls.TakeStep(step, self._around.pool.voucher(ticket)))
                self._want(step)
            case Save():
                if self._process:
                    self._process.call(calls.WriteCheckpoint())
            case Halt():
                self._halt()
            case Claim(tickets):
                self._claim(tickets)
            case Discard(tickets):
                self._around.pool.discard(tickets)
        return isinstance(action, Settle | Rebase | Agree)

    def _settle(self, digest: str, state: State, reason: str) -> None:
        self.store.settle(digest, state, reason, told=self._around.role == BOB)
        facts = {"reason": reason} if reason else {}
        self._around.log("job_settled", job=digest[:12], name=self.store.job(digest).name, state=state.value, **facts)
        if state is State.DONE:
            self._around.pool.drop_model(digest)

    def _launch(self, action: Launch) -> None:
        around, job = self._around, self.store.job(action.job)
        entry = self.store.entry(action.job)
        other = BOB if around.role == ALICE else ALICE
        call = calls.Open(
            around.role,
            around.number,
            around.identity.private_key.private_bytes_raw(),
            around.cluster.party(other).public,
            str(around.cluster.party(ALICE).reached_at),
            PATIENCE_S,
            action.run,
            action.base,
            str(self.store.files_folder),
            self.store.key,
            [(one.contributor, one.upload, one.first, one.count) for one in self.store.pieces(action.job)],
        )
        description = torch.frombuffer(bytearray(job.description), dtype=torch.uint8)
        with self._guard:
            self._live = _Live(PlannedJob(job), action.run, action.base.step, entry.seconds)
        self._process = JobProcess(call, description, self._answered, self._ended)
        around.log("job_runs", job=job.digest[:12], name=job.name, step=action.base.step, pid=self._process.pid)
        self._want(action.base.step)

    def _want(self, step: int) -> None:
        """Bob: have as many tickets dealt ahead as are of use."""
        live = self._live
        if live and self._around.role == BOB:
            ahead = min(self._around.cluster.training.ahead, live.planned.job.steps - step)
            if ahead != live.wanted:
                live.wanted = ahead
                self._around.want(live.planned, ahead)

    def _halt(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
        with self._guard:
            live, self._live = self._live, None
        if live is None:
            return
        if live.wanted:
            self._around.want(live.planned, 0)
        if live.job not in {entry.digest for entry in self.store.entries()}:
            self.store.delete(live.job)

    def _claim(self, tickets: Sequence[Ticket]) -> None:
        taken = []
        for ticket in tickets:
            try:
                self._around.pool.claim([ticket])
            except CorrelationError as error:
                self._around.log("ticket_refused", reason=one_line(error))
            else:
                taken.append(ticket)
        if isinstance(self._machine, Following):
            self._machine.claimed(taken)

    def _answered(self, process: JobProcess, answer: calls.Answer, tensors: Sequence[Tensor]) -> None:
        self._events.put(lambda: self._take_answer(process, answer, tensors))

    def _ended(self, process: JobProcess) -> None:
        self._events.put(lambda: self._take_answer(process, calls.Broke("its worker has ended", False), ()))

    def _take_answer(self, process: JobProcess, answer: calls.Answer, tensors: Sequence[Tensor]) -> None:
        live = self._live
        if process is not self._process or live is None:
            return
        match answer:
            case calls.Ready():
                self._machine.ready()
            case calls.Stepped(step, ticket, seconds):
                with self._guard:
                    live.step, live.seconds = step, live.seconds + seconds
                    live.losses += [(step, words) for words in tensors]
                self._around.metrics.stepped(answer)
                self._around.log(
                    "job_step",
                    job=live.job[:12],
                    step=step,
                    ticket=ticket,
                    seconds=seconds,
                    waited_s=answer.waited_s,
                    rounds=answer.rounds,
                    bytes_online=answer.bytes_online,
                )
                if isinstance(self._machine, Leading):
                    self._machine.stepped(step)
            case calls.Wrote(checkpoint):
                self.store.saved(live.job, checkpoint, live.seconds, live.losses)
                with self._guard:
                    live.losses = [one for one in live.losses if one[0] > checkpoint.step]
                self._know()
                if isinstance(self._machine, Leading):
                    self._machine.saved()
                else:
                    self._machine.saved(checkpoint)
            case calls.Broke(text, hopeless):
                self._around.log("job_broke", job=live.job[:12], reason=text)
                self._broke(text, hopeless=hopeless)

    def _broke(self, text: str, *, hopeless: bool) -> None:
        if isinstance(self._machine, Leading):
            self._machine.broke(time.monotonic(), text, hopeless=hopeless)
        else:
            self._machine.broke(text, hopeless=hopeless)

    def _trouble(self, error: Exception) -> None:
        """Something went wrong here, as when the disk is full: the run under way is over, and the record holds."""
        text = (
            one_line(error) if isinstance(error, TacitError) else f"an error in its own code ({type(error).__name__})"
        )
        self._around.log("jobs_trouble", reason=text)
        self._halt()
        self._broke(text, hopeless=False)
        self._know()
        time.sleep(_TROUBLE_S)

    def _know(self) -> None:
        entries = self.store.entries()
        self._around.metrics.set_jobs(entry.state for entry in entries)
        self._machine.known(entries)

    def _wind_down(self) -> None:
        self._machine.stop()
        self._end_when_idle()

    def _end_when_idle(self) -> None:
        self._pump()
        if self._machine.job is None:
            self._stopped.set()
        else:
            time.sleep(_IDLE_S / 10)
            self._events.put(self._end_when_idle)

    def _tell_owners(self) -> None:
        """Answer those who cancelled jobs, and note what the others wait for."""
        if not isinstance(self._machine, Leading):
            return
        states, still = self._machine.states, []
        for digest, done in self._cancelled:
            match states.get(digest):
                case State.SUBMITTED | State.RUNNING:
                    still.append((digest, done))
                case State.CANCELLED:
                    done.set_result(None)
                case state:
                    what = state.value if state else "deleted"
                    done.set_exception(InputError(f"the job is {what}: it was too late to cancel it"))
        self._cancelled = still
        waiting = self._machine.waits(time.monotonic())
        with self._guard:
            self._waiting = waiting

    def _leading(self) -> Leading:
        if not isinstance(self._machine, Leading):
            raise InputError("bob does not decide on jobs: ask alice")
        return self._machine


def _nothing() -> None:
    """Nothing has happened but time."""
