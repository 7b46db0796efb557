"""Jobs as their owners and contributors see them, from their own machines: submit, share rows, watch, cancel, result.

Everything secret is shared here and put together here: alice and bob are sent one share each, the provider none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from tacit.errors import CodecError, InputError, PeerError
from tacit.identity import Identity, key_text
from tacit.mpc.shares import Share, reconstruct
from tacit.mpc.steps import Role
from tacit.party import dialing
from tacit.party.cluster_file import ALICE, BOB, PARTIES, PROVIDER, ClusterFile
from tacit.party.jobs.description import Contributor, Job, pack
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
from tacit.party.jobs.states import ACTIVE, Checkpoint
from tacit.party.jobs.submission import UPLOAD_BYTES, Rows, Submission, Training, prepare, require_program, restore
from tacit.party.messages import Failed
from tacit.party.session import Caller
from tacit.party.session_messages import Purpose
from tacit.party.transport import Link
from tacit.ring.prg import Prg
from tacit.wire import Frame, Kind, parsed

PATIENCE_S = 660.0
"""How long a party may be silent: it answers who cancels a job once the step under way is finished."""
_BOTH = (ALICE, BOB)
_TRIES = 3
_POLL_S = 0.5
R = TypeVar("R", bound=JobReply)
_replies: msgspec.msgpack.Decoder[JobReply | Failed] = msgspec.msgpack.Decoder(JobReply | Failed)


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Args:
        status: what alice says.
        losses: those that came since the last time, by step, if the job reveals them.
    """

    status: JobStatus
    losses: Mapping[int, float]

    @property
    def seconds_left(self) -> float | None:
        """What the rest will take, at the pace so far; unknown before the first step."""
        one = self.status
        return one.seconds / one.step * (one.steps - one.step) if one.step else None


class Jobs:
    """The jobs of an owner, who may also be asked to contribute rows to others'. A context manager.

    Sessions are opened when they are first needed, and again when one has broken.

    Args:
        cluster: where alice, bob and the provider are.
        identity: of one of the owners in the cluster file.

    Raises:
        InputError: the cluster file knows no owner with this key.
    """

    def __init__(self, cluster: ClusterFile, identity: Identity) -> None:
        names = [name for name, one in cluster.owners.items() if one.public == identity.public]
        if not names:
            raise InputError(f"cluster.toml has no owner with the key {key_text(identity.public)}")
        self.name, self.key = names[0], key_text(identity.public)
        self._cluster, self._identity = cluster, identity
        self._links: dict[str, Link] = {}
        self._described: dict[str, Job] = {}

    def submit(
        self,
        training: Training,
        inputs: Tensor,
        labels: Tensor | None = None,
        *,
        name: str,
        steps: int,
        batch_size: int,
        data: Mapping[str, int] | None = None,
        checkpoint_every: int = 20,
        seed: bytes | None = None,
        reveal_loss: bool = False,
    ) -> str:
        """Submit a job, and share rows into it if it trains on the owner's own.

        Args:
            training: what to train and how.
            inputs: the owner's rows; without ``labels``, an example of a row of which nothing but the shape is used.
            labels: their labels: class numbers, or real targets of the model's output's shape.
            name: what to call the job.
            steps: how many to take.
            batch_size: rows of a step.
            data: other owners whose rows it trains on as well, by their names in the cluster file, and how many rows;
                each of them calls `contribute`. They should know what the job computes: see `require_program`.
            checkpoint_every: steps between checkpoints, which are what an interruption costs at most.
            seed: 16 public bytes that fix the order in which rows are taken; fresh ones if not given.
            reveal_loss: whether the owner may be shown the loss of every step.

        Returns:
            The job's digest, by which it is called.

        Raises:
            InputError: something does not fit; UnsupportedOperator: an operator has no encrypted form; RangeError: a
                number is not finite, or out of range. Nothing has been sent.
            PeerError: one of the three is not there or failed. Nothing runs before all three have taken their parts.
        """
        own = [Contributor(self.key, len(inputs))] if labels is not None else []
        others = [Contributor(self._key_of(other), rows) for other, rows in (data or {}).items()]
        submission = prepare(
            training, tuple(inputs.shape[1:]), name=name, owner=self.key, data=[*own, *others], steps=steps,
            batch_size=batch_size, checkpoint_every=checkpoint_every, seed=seed, reveal_loss=reveal_loss,
        )  # fmt: skip
        rows = Rows(submission.job, inputs, labels) if labels is not None else None
        self.send(submission)
        if rows:
            self._share(submission.job, rows)
        return submission.job.digest

    def send(self, submission: Submission) -> None:
        """Send each of the three its part of a job; sending the same again changes nothing.

        Raises:
            InputError: one of them did not take its part; PeerError: one of them failed.
        """
        for party in (PROVIDER, BOB, ALICE):
            body, tensors = pack(submission.parts[party])
            self._asked(party, SubmitJob(body), JobDone, tensors)

    def contribute(self, job: str, inputs: Tensor, labels: Tensor, *, computes: Training | str | None = None) -> None:
        """Share rows into a job. Sharing anew replaces what was shared before, until the job begins.

        Args:
            job: its digest, or the first digits.
            inputs: the rows.
            labels: see `submit`.
            computes: what the job is to compute, as its contributor has it, or the digest of that
                (`Training.digest`). It must be given for another owner's job, since what a job computes may copy rows
                into the weights that its owner is given.

        Raises:
            InputError: the job computes something else, or takes no such rows; nothing has been sent.
            RangeError: a number is not finite, or out of range; nothing has been sent.
            PeerError: a party is not there or failed; what was shared counts only when both have all of it.
        """
        described = self.describe(job)
        if computes is not None:
            require_program(described, computes)
        elif described.owner != self.key:
            raise InputError(f"say what the job {described.name} is to compute: it belongs to another owner")
        promised = {one.key: one.rows for one in described.terms.data}.get(self.key, 0)
        if promised != len(inputs):
            raise InputError(f"the job {described.name} takes {promised} rows of yours, not {len(inputs)}")
        self._share(described, Rows(described, inputs, labels))

    def describe(self, job: str) -> Job:
        """What a job computes, as alice and bob both have it.

        Raises:
            InputError: there is no such job of this owner, or with its rows.
            PeerError: the two have different ones.
        """
        digest, found = self._digest(job), []
        if digest in self._described:
            return self._described[digest]
        for party in _BOTH:
            _, frame = self._asked(party, DescribeJob(digest), DescribedJob)
            if len(frame.tensors) != 1 or frame.tensors[0].dtype != torch.uint8:
                raise CodecError(f"{party} sent something else than the description of a job")
            found.append(Job(frame.tensors[0].numpy().tobytes()))
        if any(one.digest != digest for one in found):
            raise PeerError("a party sent the description of another job")
        found[0].check()
        self._described[digest] = found[0]
        return found[0]

    def list(self) -> list[JobStatus]:
        """This owner's jobs, and those with its rows, the oldest first, as alice knows them."""
        return self._asked(ALICE, ListJobs(), JobList)[0].jobs

    def status(self, job: str) -> JobStatus:
        """How far a job is, as alice knows it.

        Raises:
            InputError: there is no such job of this owner, or with its rows.
        """
        return self._asked(ALICE, ListJobs(self._digest(job)), JobList)[0].jobs[0]

    def watch(self, job: str, *, losses: bool = False, again: Callable[[], None] | None = None) -> Iterator[Progress]:
        """How far a job is, whenever that has changed, until it is done, cancelled or has failed.

        While a party is not there, it is asked again and again.

        Args:
            job: its digest, or the first digits.
            losses: whether to ask for the losses.
            again: called before asking again; waits for half a second if not given.
        """
        digest, last, step = self._digest(job), None, 0
        while True:
            try:
                status = self.status(digest)
                new = self.losses(digest, after=step) if losses else {}
            except CodecError:
                raise
            except PeerError:
                (again or _wait)()
                continue
            step = max(new, default=step)
            if new or status != last:
                yield Progress(status, new)
            last = status
            if status.state not in ACTIVE:
                return
            (again or _wait)()

    def losses(self, job: str, after: int = 0) -> dict[int, float]:
        """The loss of each step after one of them, before its update; steps that only one party has yet are left out.

        Raises:
            InputError: there is no such job of this owner's, or it does not reveal its loss.
            NotPermitted: it is another owner's.
        """
        digest = self._digest(job)
        bits = self.describe(digest).loss_bits
        halves: list[dict[tuple[int, bytes], Tensor]] = []
        for party in _BOTH:
            reply, frame = self._asked(party, FetchLosses(digest, after), Losses)
            if [(one.dtype, tuple(one.shape)) for one in frame.tensors] != [(torch.int64, (len(reply.steps),))]:
                raise CodecError(f"{party} sent something else than shares of losses")
            halves.append(dict(zip(reply.steps, frame.tensors[0].reshape(-1, 1).unbind(), strict=True)))
        alice, bob = halves
        return {
            key[0]: float(reconstruct(Share(alice[key], bits, Role.ALICE), Share(bob[key], bits, Role.BOB)))
            for key in sorted(alice.keys() & bob.keys())
        }

    def cancel(self, job: str) -> None:
        """Have a job stop: the step under way is finished, and a checkpoint written.

        Raises:
            InputError: there is no such job of this owner's, or it has ended.
            NotPermitted: it is another owner's.
        """
        self._asked(ALICE, CancelJob(self._digest(job)), JobDone)

    def resume(self, job: str) -> None:
        """Have a job that was cancelled, or has failed, go on from its last checkpoint.

        Raises:
            InputError: there is no such job of this owner's, or it needs no resuming.
            NotPermitted: it is another owner's.
        """
        self._asked(ALICE, ResumeJob(self._digest(job)), JobDone)

    def result(self, job: str) -> dict[str, Tensor]:
        """The model as it is at the newest checkpoint that both parties have; of a job that is done, the trained model.

        Returns:
            Parameters and buffers by their names in the module, float32; for `torch.nn.Module.load_state_dict`.

        Raises:
            InputError: there is no such job of this owner's.
            PeerError: the parties sent shares of something else.
        """
        described = self.describe(job)
        for attempt in range(_TRIES):
            try:
                return self._result(described)
            except InputError:
                # A newer checkpoint has taken the place of the one that alice named.
                if attempt == _TRIES - 1:
                    raise
        raise AssertionError

    def delete(self, job: str) -> None:
        """Have all three forget a job, its rows and what it has trained.

        Raises:
            InputError: there is no such job of this owner's.
        """
        digest, failures = self._digest(job), []
        for party in PARTIES:
            try:
                self._asked(party, DeleteJob(digest), JobDone)
            except InputError as error:
                failures.append(error)
        if len(failures) == len(PARTIES):
            raise failures[0]

    def close(self) -> None:
        """End the sessions."""
        for link in self._links.values():
            link.close()
        self._links = {}

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Jobs({self.name})"

    def _share(self, job: Job, rows: Rows) -> None:
        upload = Prg.fresh().bytes(UPLOAD_BYTES)
        for first, halves in rows.pieces():
            for party in _BOTH:
                self._asked(party, ShareRows(job.digest, upload, first), RowsHere, halves[party])

    def _result(self, job: Job) -> dict[str, Tensor]:
        at: Checkpoint | None = None
        halves = []
        for party in _BOTH:
            reply, frame = self._asked(party, FetchModel(job.digest, at), JobModel)
            if at is not None and reply.checkpoint != at:
                raise PeerError(f"{party} sent shares of another checkpoint than was asked for")
            at = reply.checkpoint
            halves.append(frame.tensors)
        return restore(job, *halves)

    def _digest(self, job: str) -> str:
        """The digest that begins so, or of the newest job of this name."""
        if len(job) == 64:
            return job
        found = {one.job for one in self.list() if one.job.startswith(job)} if job else set()
        named = [one.job for one in self.list() if one.name == job]
        if named:
            return named[-1]
        if len(found) != 1:
            many = "several jobs begin" if found else "no job of yours is called or begins"
            raise InputError(f"{many} with {job!r}: give its name, or more digits of its digest")
        return found.pop()

    def _key_of(self, owner: str) -> str:
        if owner not in self._cluster.owners:
            raise InputError(f"cluster.toml has no owner {owner!r}: whoever contributes rows is one of [owners]")
        return key_text(self._cluster.owners[owner].public)

    def _asked(self, party: str, call: JobCall, kind: type[R], tensors: Sequence[Tensor] = ()) -> tuple[R, Frame]:
        """Ask a party; once more, in another session, if the one that there was has broken meanwhile."""
        again = party in self._links and not isinstance(call, ShareRows | CancelJob | ResumeJob)
        try:
            return self._asked_once(party, call, kind, tensors)
        except CodecError:
            raise
        except PeerError:
            if not again:
                raise
        return self._asked_once(party, call, kind, tensors)

    def _asked_once(self, party: str, call: JobCall, kind: type[R], tensors: Sequence[Tensor]) -> tuple[R, Frame]:
        link = self._link(party)
        try:
            link.send(Kind.CALL, tensors, msgspec.msgpack.encode(call))
            frame = link.receive(Kind.REPLY)
            reply = parsed(_replies, frame.body, f"what {party} answered")
        except PeerError:
            self.close()
            raise
        if isinstance(reply, Failed):
            error = reply.refusal.error()
            raise type(error)(f"{party}: {error}")
        if not isinstance(reply, kind):
            raise CodecError(f"{party} answered something else than was asked")
        return reply, frame

    def _link(self, party: str) -> Link:
        """A link of a session that the party is in: with the provider too only where it is needed."""
        if party not in self._links:
            self.close()
            parties = PARTIES if party == PROVIDER else _BOTH
            links: dict[str, Link] = {}
            try:
                for one in parties:
                    member = self._cluster.party(one)
                    links[one] = dialing.dial(
                        member.reached_at, self._identity, one, member.public, patience=PATIENCE_S
                    )
                dialing.open_session(links, Caller(self.name, self._identity.public, Purpose.OWNER, parties))
            except BaseException:
                for link in links.values():
                    link.close()
                raise
            self._links = links
        return self._links[party]


def _wait() -> None:
    time.sleep(_POLL_S)
