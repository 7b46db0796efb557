"""What a party's front process says to the worker of a run, and what the worker answers; msgpack in a frame's body.

A worker carries calls out in the order in which they come. The description of the job comes with `Open`, and the share
of the loss with `Stepped`, if the job reveals it.
"""

from __future__ import annotations

import msgspec

from tacit.party.jobs.description import Step
from tacit.party.jobs.states import Checkpoint, RunId, UploadId
from tacit.party.tickets import Serial
from tacit.party.vouchers import Voucher
from tacit.wire import parsed


class Open(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Who the worker is and what it is to run; the first call.

    Args:
        role: ``alice`` or ``bob``.
        number: of the worker; it meets the other party's of the same number.
        seed: of the party's identity: secret.
        peer: the other party's public key.
        address: where bob reaches alice.
        patience_s: how long the other worker may be silent.
        run: the run.
        base: the checkpoint to begin from.
        folder: of the job's files.
        key: under which they are sealed: secret.
        pieces: the job's rows, in order: contributor, upload, first row, rows.
    """

    role: str
    number: int
    seed: bytes
    peer: bytes
    address: str
    patience_s: float
    run: RunId
    base: Checkpoint
    folder: str
    key: bytes
    pieces: list[tuple[str, UploadId, int, int]]

    def __repr__(self) -> str:
        return f"Open({self.role}, from {self.base})"


class TakeStep(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Take a step.

    Args:
        step: its number.
        voucher: of the ticket to use.
    """

    step: Step
    voucher: Voucher


class WriteCheckpoint(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Write a checkpoint after the last step."""


Call = Open | TakeStep | WriteCheckpoint


class Ready(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Everything is loaded, and the other party's worker has been met."""


class Stepped(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A step has been taken.

    Args:
        step: its number.
        ticket: the serial of the ticket that it used up.
        seconds: that it took.
        waited_s: of these, waiting for the other worker.
        rounds: messages sent.
        bytes_online: bytes of these.
    """

    step: Step
    ticket: Serial
    seconds: float
    waited_s: float
    rounds: int
    bytes_online: int


class Wrote(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A checkpoint is on the disk."""

    checkpoint: Checkpoint


class Broke(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """The run has failed; the worker ends.

    Args:
        text: why, in one line; no secrets.
        hopeless: whether it would fail again in the same way.
    """

    text: str
    hopeless: bool


Answer = Ready | Stepped | Wrote | Broke

_calls: msgspec.msgpack.Decoder[Call] = msgspec.msgpack.Decoder(Call)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Call | Answer) -> bytes:
    """The message as bytes."""
    return msgspec.msgpack.encode(message)


def decode_call(data: bytes) -> Call:
    """Read a call.

    Raises:
        CodecError: it does not parse.
    """
    return parsed(_calls, data, "a call to a job's worker")


def decode_answer(data: bytes) -> Answer:
    """Read an answer.

    Raises:
        CodecError: it does not parse.
    """
    return parsed(_answers, data, "an answer of a job's worker")
