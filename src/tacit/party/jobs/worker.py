"""The process of alice's or bob's that runs a job: it takes steps with its counterpart, and writes checkpoints.

``python -m tacit.party.jobs.worker`` is started for one run (`tacit.party.jobs.process`), with two sockets as the
workers of predictions have them (`tacit.party.worker`), and ends with it, whatever ends it: what it holds in memory
belongs to this run alone, and the next one begins from a checkpoint. Predictions come first where they want the
processor, too.
"""

from __future__ import annotations

import gc
import hashlib
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from tacit.errors import DataError, InputError, PeerError, TacitError, one_line
from tacit.identity import Identity
from tacit.mpc.shares import Share
from tacit.mpc.steps import Role
from tacit.party import meeting, sealed_frames
from tacit.party.address import Address, parse_address
from tacit.party.driver import LazyPool, Watch, drive
from tacit.party.jobs import files
from tacit.party.jobs.calls import (
    Answer,
    Broke,
    Open,
    Ready,
    Stepped,
    TakeStep,
    WriteCheckpoint,
    Wrote,
    decode_call,
    encode,
)
from tacit.party.jobs.description import Job, check_state
from tacit.party.jobs.states import Checkpoint
from tacit.party.lean import leave_compiler_out
from tacit.party.planned import expansion
from tacit.party.streams import Plain
from tacit.party.transport import Link
from tacit.party.vouchers import redeem
from tacit.program.lowering.backward import PARAMETER_BITS
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.wire import Kind

MEETING_S = 60.0
"""How long the other party's worker may take to be there: it loads its rows first, too."""
_AGAIN_S = 0.2
_NICE = 10


class Worker:
    """The state of a run at one party.

    Args:
        call: what to run.
        job: the job.

    Raises:
        DataError: the checkpoint, or a file of rows, is damaged.
    """

    def __init__(self, call: Open, job: Job) -> None:
        self._call, self._job, self._role, self._folder = call, job, Role(call.role), Path(call.folder)
        path, context = files.checkpoint_file(self._folder, job.digest, call.base)
        _, words = sealed_frames.read(path, call.key, context)
        state = dict(zip(job.program.state, words, strict=False))
        check_state(job, state)
        self._state = {name: Share(value, PARAMETER_BITS, self._role) for name, value in state.items()}
        self._rows = self._load_rows()
        self._step, self._correlations = call.base.step, job.correlations
        self._peer: Link | None = None

    def meet(self, door: socket.socket) -> None:
        """Meet the other party's worker.

        Args:
            door: where connections are handed over, at alice.

        Raises:
            PeerError: it does not come, or is at another run.
        """
        call, token = self._call, hashlib.sha256(self._call.run).digest()
        identity = Identity(call.seed)
        if self._role is Role.BOB:
            self._peer = _called(parse_address(call.address), identity, call.peer, token, call.number)
        else:
            self._peer = _met(meeting.Door(identity, call.peer, door), token, call.number)
        self._peer.patience = call.patience_s

    def step(self, call: TakeStep) -> tuple[Stepped, Tensor]:
        """Take a step.

        Returns:
            What it took, and this party's share of the loss.

        Raises:
            PeerError: the other worker is gone, or at another step.
            DataError, CorrelationError: the ticket is of no use.
            InputError: it is not the step that is next.
        """
        job, peer = self._job, self._peer
        if (
            peer is None
            or call.step != self._step + 1
            or (call.voucher.ticket.model, call.voucher.ticket.batch)
            != (
                job.digest,
                job.batch,
            )
        ):
            raise InputError(f"step {call.step} was asked for, with {call.voucher}, after step {self._step}")
        began, waited, sent, watch = time.perf_counter(), peer.waited_s, peer.bytes_opened, Watch()
        seed, corrections = redeem(call.voucher)
        pool = LazyPool(expansion(self._role, self._correlations, seed, corrections))
        rows = job.order(call.step)
        batch = [Share(words[rows], FRACTION_BITS, self._role) for words in self._rows]
        peer.tag = self._call.run + call.step.to_bytes(8, "little")
        *updated, loss = drive(job.program.run(self._state, batch, job.numbers(call.step)), pool, peer, watch)
        self._state |= dict(zip(job.program.updated, updated, strict=True))
        self._step = call.step
        seconds = time.perf_counter() - began
        serial, moved = call.voucher.ticket.serial, peer.bytes_opened - sent
        taken = Stepped(call.step, serial, seconds, peer.waited_s - waited, watch.rounds, moved)
        return taken, loss.words

    def save(self) -> Checkpoint:
        """Write a checkpoint; when this returns it is on the disk.

        Raises:
            StorageFull: the disk is full; nothing is left behind.
            DataError: the disk failed.
        """
        checkpoint = Checkpoint(self._step, self._call.run)
        path, context = files.checkpoint_file(self._folder, self._job.digest, checkpoint)
        words = tuple(self._state[name].words for name in self._job.program.state)
        sealed_frames.write(path, self._call.key, context, words)
        return checkpoint

    def _load_rows(self) -> list[Tensor]:
        job, first = self._job, 0
        whole = [torch.empty((job.rows, *shape), dtype=torch.int64) for shape in job.row_shapes]
        for piece in self._call.pieces:
            path, context = files.piece_file(self._folder, job.digest, files.Piece(*piece))
            _, tensors = sealed_frames.read(path, self._call.key, context)
            count = piece[-1]
            for target, words in zip(whole, tensors, strict=True):
                target[first : first + count] = words
            first += count
        if first != job.rows:
            raise DataError(f"{first} rows of the job {job.name} are here, not {job.rows}")
        return whole


def _met(door: meeting.Door, token: bytes, number: int) -> Link:
    door.expect(token, number)
    poll, until = select.poll(), time.monotonic() + MEETING_S
    for descriptor in door.filenos():
        poll.register(descriptor, select.POLLIN)
    while (left := until - time.monotonic()) > 0:
        door.open({descriptor for descriptor, _ in poll.poll(1000 * left)})
        if link := door.meet():
            return link
    raise PeerError(f"bob's worker did not come within {MEETING_S:g} seconds")


def _called(address: Address, identity: Identity, alice: bytes, token: bytes, number: int) -> Link:
    """Call alice's worker until it is there."""
    until = time.monotonic() + MEETING_S
    while True:
        try:
            return meeting.call(address, identity, alice, token, number)
        except PeerError:
            if time.monotonic() > until:
                raise
            time.sleep(_AGAIN_S)


def serve(front: Link, door: socket.socket) -> None:
    """Run what the front process says, until it is gone or the run has failed."""
    frame = front.receive(Kind.CALL)
    call = decode_call(frame.body)
    if not isinstance(call, Open) or not frame.tensors:
        raise PeerError("the front process did not say what to run")

    def answer(one: Answer, tensors: tuple[Tensor, ...] = ()) -> None:
        front.send(Kind.REPLY, tensors, encode(one))

    try:
        job = Job(frame.tensors[0].numpy().tobytes())
        worker = Worker(call, job)
        worker.meet(door)
    except TacitError as error:
        answer(_broke(error))
        return
    # What is there stays: a collection that looks through it takes time in every step.
    gc.collect()
    gc.freeze()
    answer(Ready())
    while True:
        frame = front.receive(Kind.CALL)
        try:
            match decode_call(frame.body):
                case TakeStep() as step:
                    taken, loss = worker.step(step)
                    answer(taken, (loss.reshape(1),) if job.terms.reveal_loss else ())
                case WriteCheckpoint():
                    answer(Wrote(worker.save()))
                case Open():
                    raise InputError("the front process said twice what to run")
        except TacitError as error:
            answer(_broke(error))
            return


def _broke(error: TacitError) -> Broke:
    """What may be said of an error, and whether the same would happen again."""
    return Broke(one_line(error), isinstance(error, InputError))


def main() -> None:
    """Run a worker on the descriptors that the front process gave."""
    calls, door = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    # A service manager may signal all processes at once; the front process decides when a worker ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    torch.set_num_threads(1)
    leave_compiler_out()
    front = Link(Plain(calls), "the front process", None)
    try:
        with torch.inference_mode():
            serve(front, door)
    except PeerError:
        os._exit(0)  # the front process is gone; threads that wait for callers do not matter any more
    os._exit(1)


if __name__ == "__main__":
    main()
