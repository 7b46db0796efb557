"""A training job: what its owner sends to alice, to bob and to the provider.

All three are sent the same *description*: the training step (`tacit.party.training`), how many steps to take, on whose
rows and in which order, and what may be revealed. Its SHA-256 is the job's name, also on the tickets that it uses.
alice and bob are also sent their shares of the state that training begins with: parameters, buffers, the optimizer's.
The provider is sent no share of anything.

A description is data: the step names operators of the lowering table and nothing else runs. The order of the rows
follows from a public seed in it, so that both parties take the same ones without talking about it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Annotated, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from tacit.errors import CodecError, InputError
from tacit.identity import parse_key
from tacit.mpc.correlation import Correlation
from tacit.party.cluster_file import ALICE, BOB, PARTIES, PROVIDER, require_name
from tacit.party.models import guarded
from tacit.party.training import TrainingProgram, decode_training_program, encode_training_program
from tacit.program.run import Cost
from tacit.ring.prg import SEED_BYTES, Prg
from tacit.wire import parsed

MAX_STEPS = 1 << 24
MAX_ROWS = 1 << 32
MAX_NUMBERS = 1 << 22
"""The most public numbers that an optimizer may take in all steps together."""
_NAME = b"tacit/v1/job/"
_Seed = Annotated[bytes, Meta(min_length=SEED_BYTES, max_length=SEED_BYTES)]
Step = Annotated[int, Meta(ge=0, le=MAX_STEPS)]


class Contributor(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Somebody whose rows a job trains on.

    Args:
        key: the public key, as text.
        rows: how many rows.
    """

    key: str
    rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)]


class Terms(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """What the owner decides besides the training step.

    Args:
        name: what the owner calls the job.
        steps: how many to take.
        data: whose rows, in the order in which they are numbered.
        order: the public seed of the order in which rows are taken.
        checkpoint_every: steps between checkpoints.
        reveal_loss: whether the owner may be shown the loss of every step.
    """

    name: str
    steps: Annotated[int, Meta(ge=1, le=MAX_STEPS)]
    data: Annotated[list[Contributor], Meta(min_length=1, max_length=1024)]
    order: _Seed
    checkpoint_every: Annotated[int, Meta(ge=1, le=MAX_STEPS)]
    reveal_loss: bool = False


class _Description(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """What all three are sent, in its one encoding.

    ``nonce`` is new for every job: the same terms twice are two jobs. ``model`` names the state that makes up the
    model; the rest is the optimizer's. ``numbers`` are the optimizer's public ones, step by step.
    """

    version: Literal[1]
    owner: str
    nonce: _Seed
    terms: Terms
    program: bytes
    model: list[str]
    whole: bool
    numbers: Annotated[list[float], Meta(max_length=MAX_NUMBERS)]


_descriptions = msgspec.msgpack.Decoder(_Description)


@dataclass(frozen=True, repr=False, eq=False)
class Job:
    """A job as its description has it.

    Args:
        description: the bytes that all three hold.
    """

    description: bytes

    @cached_property
    def digest(self) -> str:
        """The name of the job."""
        return hashlib.sha256(_NAME + b"description\0" + self.description).hexdigest()

    @cached_property
    def program(self) -> TrainingProgram:
        """The training step."""
        return decode_training_program(self._described.program)

    @cached_property
    def program_digest(self) -> str:
        """What the training step is called: two jobs that compute the same on batches of one size have the same."""
        return program_digest(self._described.program)

    @property
    def terms(self) -> Terms:
        """What the owner decided."""
        return self._described.terms

    @property
    def name(self) -> str:
        """What the owner calls it."""
        return self._described.terms.name

    @property
    def owner(self) -> str:
        """The owner's public key, as text."""
        return self._described.owner

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return self._described.terms.steps

    @property
    def model(self) -> tuple[str, ...]:
        """Names of the state that makes up the model, which is what its owner is given."""
        return tuple(self._described.model)

    @property
    def whole(self) -> bool:
        """Whether the model's input is whole numbers."""
        return self._described.whole

    @property
    def batch(self) -> int:
        """Rows of a step."""
        return self.program.batch[0][0]

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The one batch size."""
        return (self.batch,)

    @cached_property
    def rows(self) -> int:
        """Rows of all contributors together."""
        return sum(one.rows for one in self.terms.data)

    @property
    def row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of one row of the inputs and of the labels."""
        return tuple(shape[1:] for shape in self.program.batch)

    def cost(self, batch: int) -> Cost:
        """What a step takes; its correlations are what a ticket holds, in order.

        Raises:
            InputError: the batch size is not the job's.
        """
        if batch != self.batch:
            raise InputError(f"the job {self.name} takes batches of {self.batch}, not of {batch}")
        return self._plan[0]

    @property
    def loss_bits(self) -> int:
        """Fractional bits of the loss of a step."""
        return self._plan[1]

    @property
    def correlations(self) -> tuple[Correlation, ...]:
        """What a ticket holds, in order."""
        return self._plan[0].correlations

    def numbers(self, step: int) -> list[float]:
        """The optimizer's public numbers at a step; the first step is 1."""
        count = self.program.numbers
        return self._described.numbers[(step - 1) * count : step * count]

    def order(self, step: int) -> Tensor:
        """Which rows a step takes, int64 (batch,).

        Every epoch takes the rows in a new order, ``rows // batch`` batches of them; what is left over is left out.
        """
        epoch, position = divmod(step - 1, self.rows // self.batch)
        order = _shuffled(self.terms.order, self.rows, epoch)
        return order[position * self.batch : (position + 1) * self.batch]

    def check(self) -> None:
        """Refuse a description that does not hold together; whoever is sent one calls this before keeping it.

        Raises:
            CodecError: it is not what an owner would send.
        """
        described = self._described
        if msgspec.msgpack.encode(described) != self.description:
            raise CodecError("the description of a job is not in its canonical encoding")
        try:
            require_name(self.name)
            for key in (self.owner, *(one.key for one in self.terms.data)):
                parse_key(key)
        except InputError as error:
            raise CodecError(f"the description of a job is wrong: {error}") from None
        if len({one.key for one in self.terms.data}) < len(self.terms.data):
            raise CodecError("the description of a job names a contributor twice")
        self._check_program()

    def _check_program(self) -> None:
        program, numbers = self.program, self._described.numbers
        batches = {shape[:1] for shape in program.batch}
        if len(program.batch) != 2 or len(batches) != 1 or not 1 <= sum(batches.pop()) <= 1 << 20:
            raise CodecError("the training step of a job does not take a batch of inputs and one of labels")
        if not self.batch <= self.rows <= MAX_ROWS:
            raise CodecError(f"a job of {self.rows} rows takes no batches of {self.batch}")
        if len(numbers) != self.steps * program.numbers or not all(0 <= number <= 1 for number in numbers):
            raise CodecError("a job does not have the numbers from 0 to 1 that its optimizer takes at every step")
        if not self.model or not set(self.model) <= program.state.keys():
            raise CodecError("the model of a job is not a part of the state that it trains")
        if len(program.step.graph.outputs) < 2:
            raise CodecError("the training step of a job changes nothing")
        guarded(lambda: self._plan)

    @cached_property
    def _described(self) -> _Description:
        return parsed(_descriptions, self.description, "the description of a job")

    @cached_property
    def _plan(self) -> tuple[Cost, int]:
        return self.program.plan()

    def __repr__(self) -> str:
        return f"Job({self.name}, {self.digest[:12]}…, {self.steps} steps)"


@lru_cache(maxsize=2)
def _shuffled(seed: bytes, rows: int, epoch: int) -> Tensor:
    """A uniform permutation, but for ties of 64-bit words."""
    return Prg(seed).derive("order of rows", epoch).words((rows,)).argsort(stable=True)


def program_digest(program: bytes) -> str:
    """SHA-256 of an encoded training step."""
    return hashlib.sha256(_NAME + b"program\0" + program).hexdigest()


def describe(
    owner: str,
    terms: Terms,
    program: TrainingProgram,
    model: Sequence[str],
    numbers: Sequence[Sequence[float]],
    *,
    whole: bool,
) -> Job:
    """A new job.

    Args:
        owner: the owner's public key, as text.
        terms: what the owner decides.
        program: the training step.
        model: names of the state that makes up the model.
        numbers: the optimizer's public numbers, step by step.
        whole: whether the model's input is whole numbers.
    """
    nonce = Prg.fresh().bytes(SEED_BYTES)
    flat = [float(number) for step in numbers for number in step]
    encoded = encode_training_program(program)
    return Job(msgspec.msgpack.encode(_Description(1, owner, nonce, terms, encoded, list(model), whole, flat)))


@dataclass(frozen=True, repr=False, eq=False)
class JobPart:
    """What one of the three is sent of a job.

    Args:
        role: ``"alice"``, ``"bob"`` or ``"provider"``.
        job: the job.
        state: the party's shares of the state that training begins with, by name; empty at the provider.
    """

    role: str
    job: Job
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse a part that does not hold together.

        Raises:
            CodecError: it is not what an owner would send.
        """
        if self.role not in PARTIES:
            raise CodecError("a part of a job was meant for somebody who keeps none")
        self.job.check()
        check_state(self.job, self.state if self.role in (ALICE, BOB) else None)
        if self.role == PROVIDER and self.state:
            raise CodecError("the provider is sent no share of what a job trains")

    def __repr__(self) -> str:
        return f"JobPart({self.job.name}, {self.job.digest[:12]}…, {self.role}'s)"


def check_state(job: Job, state: Mapping[str, Tensor] | None) -> None:
    """Refuse shares that are not those of a job's state, in its order.

    Raises:
        CodecError: they have other names, shapes or dtypes.
    """
    if state is None:
        return
    found = {name: tuple(words.shape) for name, words in state.items()}
    if list(found.items()) != list(job.program.state.items()) or any(w.dtype != torch.int64 for w in state.values()):
        raise CodecError("the shares of a job's state have other names or shapes than its training step takes")


class _Body(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    role: str


_bodies = msgspec.msgpack.Decoder(_Body)


def pack(part: JobPart) -> tuple[bytes, tuple[Tensor, ...]]:
    """The body and the tensors of a frame that carries a part."""
    description = torch.frombuffer(bytearray(part.job.description), dtype=torch.uint8)
    return msgspec.msgpack.encode(_Body(part.role)), (description, *(w.contiguous() for w in part.state.values()))


def unpack(body: bytes, tensors: Sequence[Tensor], role: str) -> JobPart:
    """The part that a frame carries, checked.

    Args:
        body: the frame's.
        tensors: the frame's.
        role: of whoever received it.

    Raises:
        CodecError: it is not a part that this side can use, or it was meant for another.
    """
    packed = parsed(_bodies, body, "a part of a job")
    if packed.role != role:
        raise CodecError(f"a part of a job came that was meant for {packed.role}")
    if not tensors or tensors[0].dtype != torch.uint8 or tensors[0].dim() != 1:
        raise CodecError("a part of a job came without its description")
    job = Job(tensors[0].numpy().tobytes())
    names = job.program.state if role in (ALICE, BOB) else {}
    if len(names) != len(tensors) - 1:
        raise CodecError("a part of a job came with more or fewer shares than its state has")
    part = JobPart(role, job, dict(zip(names, tensors[1:], strict=True)))
    part.check()
    return part
