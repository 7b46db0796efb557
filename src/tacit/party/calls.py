"""What the launcher asks of a process, and what it is answered."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from tacit.wire import parsed

Port = Annotated[int, Meta(ge=1, le=65535)]


class Join(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Connect to the other processes, which listen on these ports."""

    ports: dict[str, Port]


class Install(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Check and plan a program; see `tacit.party.programs`."""

    program: bytes


class Load(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Load the model whose state shares come with this call (none of them to the provider).

    Args:
        names: of the state tensors.
        scales: their fractional bits.
    """

    names: list[str]
    scales: list[int]


class Deal(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Deal, or receive and prepare, what one run or step takes."""


class Run(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Run the program on the input shares that come with this call.

    Args:
        scales: their fractional bits.
        by_layer: whether to take the time of every layer.
    """

    scales: list[int]
    by_layer: bool = False


class InstallTraining(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Check and plan a training step; see `tacit.party.training`."""

    program: bytes


class Keep(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Keep the parameters and the optimizer's state whose shares come with this call, in the place of any others.

    Args:
        names: of the tensors.
    """

    names: list[str]


class Step(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Take a training step on the batch whose shares come with this call; what it leaves stays with the parties.

    Args:
        numbers: the optimizer's public numbers for this step.
        by_layer: whether to take the time of every operator.
    """

    numbers: list[float]
    by_layer: bool = False


class Reveal(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Give the owner this party's shares of what it keeps.

    Args:
        names: of the tensors.
    """

    names: list[str]


class RevealLoss(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Give the caller this party's share of the last step's loss."""


class Save(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Write this party's shares of the state it keeps to its own disk; see `tacit.program.checkpoint`.

    Args:
        folder: where to.
        program: what they belong to.
        step: how many steps led to them.
    """

    folder: str
    program: str
    step: Annotated[int, Meta(ge=0)]


class Restore(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Keep the shares that this party has on its disk, in the place of any others.

    Args:
        folder: where they lie.
        program: what they should belong to.
    """

    folder: str
    program: str


class Usage(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Say how much memory has been used."""


Call = Join | Install | Load | Deal | Run | InstallTraining | Keep | Step | Reveal | RevealLoss | Save | Restore | Usage


class Done(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A call was carried out.

    Args:
        wall_s: seconds it took.
        cpu_s: seconds of one core it took.
        nbytes: bytes of corrections that the provider sent for it.
    """

    wall_s: float
    cpu_s: float
    nbytes: int = 0


class Planned(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """What one run of the installed program takes; the same at all three."""

    rounds: int
    bytes_online: int
    bytes_dealt: int


class Ran(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A run has ended, and its output shares come with this answer; or a step, which leaves nothing to send.

    Args:
        scales: the outputs' fractional bits.
        rounds: openings sent.
        bytes_online: bytes of openings sent.
        wall_s: seconds from the first step to the last.
        waited_s: of these, waiting for the other party.
        moved_s: of these, sending, receiving and adding up openings.
        layers: computing seconds of every operator, if they were asked for.
    """

    scales: list[int]
    rounds: int
    bytes_online: int
    wall_s: float
    waited_s: float
    moved_s: float
    layers: dict[str, float] = {}


class Held(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Shares that were asked for come with this answer.

    Args:
        scales: their fractional bits.
    """

    scales: list[int]


class Restored(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Shares were read, which were written after this many steps."""

    step: int


class Used(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """The largest resident memory so far, in MB of 10^6 bytes."""

    peak_rss_mb: float


Answer = Done | Planned | Ran | Held | Restored | Used


class Failure(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """A call failed.

    Args:
        text: one line, without secrets.
        peer: whether another process is to blame, which may be one that has a failure of its own to report.
    """

    text: str
    peer: bool = False


_calls: msgspec.msgpack.Decoder[Call] = msgspec.msgpack.Decoder(Call)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_failures: msgspec.msgpack.Decoder[Failure] = msgspec.msgpack.Decoder(Failure)


def encode(message: Call | Answer | Failure) -> bytes:
    """The message as bytes."""
    return msgspec.msgpack.encode(message)


def decode_call(data: bytes) -> Call:
    """Read a call.

    Raises:
        CodecError: it does not parse.
    """
    return parsed(_calls, data, "a call")


def decode_answer(data: bytes) -> Answer:
    """Read an answer.

    Raises:
        CodecError: it does not parse.
    """
    return parsed(_answers, data, "an answer")


def decode_failure(data: bytes) -> Failure:
    """Read a failure.

    Raises:
        CodecError: it does not parse.
    """
    return parsed(_failures, data, "a failure")
