"""What owners and contributors may have done about jobs at a party, and what they are refused."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tacit.errors import InputError, NotPermitted
from tacit.party.cluster_file import ALICE, PROVIDER
from tacit.party.jobs.description import unpack
from tacit.party.jobs.requests import (
    CancelJob,
    DeleteJob,
    DescribedJob,
    DescribeJob,
    FetchLosses,
    FetchModel,
    JobCall,
    JobDone,
    JobList,
    JobModel,
    JobReply,
    JobStatus,
    ListJobs,
    Losses,
    ResumeJob,
    RowsHere,
    ShareRows,
    SubmitJob,
)
from tacit.party.jobs.states import ACTIVE, Entry
from tacit.party.jobs.store import JobStore

CANCELLING_S = 600.0
"""How long a step may take to be finished before who cancels it is told to look again."""
Reply = tuple[JobReply, Sequence[Tensor]]


class Running(Protocol):
    """What is known of running jobs, and done with them; a `tacit.party.jobs.desk.JobDesk`."""

    def changed(self) -> None:
        """The record has changed."""

    def cancel(self, digest: str) -> Future[None]:
        """Cancel a job."""

    def resume(self, digest: str) -> Future[None]:
        """Have a job go on."""

    def progress(self, digest: str) -> tuple[int, float] | None:
        """The last step of the run under way, and seconds."""

    def live_losses(self, digest: str) -> list[tuple[int, bytes, Tensor]]:
        """Losses that are not recorded yet."""

    def waiting(self, digest: str) -> str:
        """What a job waits for."""


@dataclass(frozen=True)
class JobKeeper:
    """See the module. Threads may share it.

    Args:
        role: whose jobs these are.
        store: the record.
        running: what runs; nothing does at the provider.
        gone: called with the digest of a job that was deleted.
    """

    role: str
    store: JobStore
    running: Running | None = None
    gone: Callable[[str], None] = lambda digest: None

    def answer(self, call: JobCall, tensors: Sequence[Tensor], caller: str) -> Reply:
        """Do what somebody asks.

        Args:
            call: what.
            tensors: that came with it.
            caller: the public key of who asks, as text.

        Raises:
            InputError: it cannot be done.
            NotPermitted: it is not for this caller.
            TacitError: it failed.
        """
        match call:
            case SubmitJob(body):
                return self._submit(body, tensors, caller)
            case ShareRows(job, upload, first):
                self._here()
                self._seen(job, caller)
                count = self.store.add_rows(job, caller, upload, first, tensors)
                self._changed()
                return RowsHere(count), ()
            case DescribeJob(job):
                self._seen(job, caller)
                return DescribedJob(), (_bytes(self.store.job(job).description),)
            case ListJobs(job):
                return JobList([self._status(one, caller) for one in self._visible(job, caller)]), ()
            case CancelJob(job):
                self._owned(job, caller)
                _settled(self._deciding().cancel(job))
                return JobDone(), ()
            case ResumeJob(job):
                self._owned(job, caller)
                _settled(self._deciding().resume(job))
                return JobDone(), ()
            case DeleteJob(job):
                self._owned(job, caller)
                self.store.delete(job)
                self._changed()
                self.gone(job)
                return JobDone(), ()
            case FetchModel(job, checkpoint):
                self._here()
                at = checkpoint or self._owned(job, caller).agreed
                self._owned(job, caller)
                return JobModel(at), tuple(self.store.model_share(job, at))
            case FetchLosses(job, after):
                return self._losses(job, after, caller)

    def _submit(self, body: bytes, tensors: Sequence[Tensor], caller: str) -> Reply:
        part = unpack(body, tensors, self.role)
        if part.job.owner != caller:
            raise NotPermitted("a job is submitted by its owner: this one names another key")
        self.store.submit(part)
        self._changed()
        return JobDone(), ()

    def _losses(self, digest: str, after: int, caller: str) -> Reply:
        self._here()
        entry = self._owned(digest, caller)
        if not entry.job.terms.reveal_loss:
            raise InputError(f"the job {entry.name} does not reveal its loss: that is decided when a job is submitted")
        found = self.store.losses(digest, after)
        last = found[-1][0] if found else after
        if self.running:
            found += [one for one in self.running.live_losses(digest) if one[0] > last]
        words = torch.cat([one.reshape(1) for _, _, one in found]) if found else torch.zeros(0, dtype=torch.int64)
        return Losses([(step, run) for step, run, _ in found]), (words,)

    def _status(self, entry: Entry, caller: str) -> JobStatus:
        live = self.running.progress(entry.digest) if self.running else None
        step, seconds = live or (entry.agreed.step, entry.seconds)
        waiting = self.running.waiting(entry.digest) if self.running and entry.state in ACTIVE else ""
        return JobStatus(
            entry.digest,
            entry.name,
            entry.job.owner,
            entry.state,
            entry.reason,
            step,
            entry.job.steps,
            seconds,
            entry.agreed,
            waiting,
            caller == entry.job.owner,
        )

    def _visible(self, digest: str | None, caller: str) -> list[Entry]:
        found = [one for one in self.store.entries() if one.may_see(caller) and digest in (None, one.digest)]
        if digest and not found:
            raise _unknown(digest)
        return found

    def _seen(self, digest: str, caller: str) -> Entry:
        """A job that the caller may know of; who may not is not told that it exists."""
        return self._visible(digest, caller)[0]

    def _owned(self, digest: str, caller: str) -> Entry:
        entry = self._seen(digest, caller)
        if entry.job.owner != caller:
            raise NotPermitted(f"the job {entry.name} belongs to another owner: nobody else may do that")
        return entry

    def _deciding(self) -> Running:
        if self.role != ALICE or self.running is None:
            raise InputError(f"{self.role} does not decide on jobs: ask alice")
        return self.running

    def _here(self) -> None:
        if self.role == PROVIDER:
            raise InputError("the provider keeps no share of any job: ask alice and bob")

    def _changed(self) -> None:
        if self.running:
            self.running.changed()


def _settled(done: Future[None]) -> None:
    try:
        done.result(CANCELLING_S)
    except concurrent.futures.TimeoutError:
        raise InputError(
            f"the step under way has not ended within {CANCELLING_S:g} seconds: the job ends with it; look again later"
        ) from None


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _unknown(digest: str) -> InputError:
    return InputError(f"there is no job {digest[:12]}… of yours here")
