"""Submitting a job, and sharing rows into one: what the owner and the contributors do on their own machines.

Everything that can be wrong with a model, its settings or its rows is found here, in the clear, before anything is sent
or dealt: the parties see shares, and shares of NaN look like any others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tacit.errors import InputError, PeerError
from tacit.mpc.shares import Share, reconstruct, share
from tacit.mpc.steps import Role
from tacit.party.cluster_file import ALICE, BOB, PROVIDER, require_name
from tacit.party.jobs.description import (
    MAX_NUMBERS,
    MAX_STEPS,
    Contributor,
    Job,
    JobPart,
    Terms,
    describe,
    program_digest,
)
from tacit.party.training import encode_training_program, training_program
from tacit.program.lowering import Context
from tacit.program.lowering.backward import PARAMETER_BITS
from tacit.program.optimizers import Optimizer, Sgd
from tacit.program.recipe import Loss, Recipe, real_rows, targets
from tacit.ring.fixed_point import FRACTION_BITS, encode
from tacit.ring.prg import SEED_BYTES, Prg

PIECE_BYTES = 4 << 20
"""What is sent at once of somebody's rows."""
UPLOAD_BYTES = 16


@dataclass(frozen=True)
class Training:
    """What to train and how, as the owner of a job has it, and whoever wants to know what a job computes.

    Args:
        model: any module whose operators and their gradients have an encrypted form; trained in the mode that it is in,
            and not changed.
        loss: of the model's output and the labels, as a number.
        optimizer: SGD if not given.
        context: the engine's settings.
    """

    model: nn.Module
    loss: Loss = cross_entropy
    optimizer: Optimizer | None = None
    context: Context | None = None

    def recipe(self) -> Recipe:
        """The training, traced.

        Raises:
            InputError: the model has nothing to train, or the context asks for what training has not.
        """
        return Recipe(self.model, self.loss, self.optimizer or Sgd(), self.context or Context())

    def digest(self, batch_shape: Sequence[int]) -> str:
        """What the training step on batches of this shape is called; see `Job.program_digest`."""
        return program_digest(encode_training_program(training_program(self.recipe(), tuple(batch_shape))))


@dataclass(frozen=True, repr=False)
class Submission:
    """A job, ready to be sent.

    Args:
        job: what all three will know.
        parts: what each of them is to be sent, and nobody else, by name.
    """

    job: Job
    parts: Mapping[str, JobPart]

    def __repr__(self) -> str:
        return f"Submission({self.job})"


def prepare(
    training: Training,
    row_shape: Sequence[int],
    *,
    name: str,
    owner: str,
    data: Sequence[Contributor],
    steps: int,
    batch_size: int,
    checkpoint_every: int = 20,
    seed: bytes | None = None,
    reveal_loss: bool = False,
) -> Submission:
    """Make the three parts of a job.

    Args:
        training: what to train and how.
        row_shape: of one row of the inputs.
        name: what to call the job.
        owner: the owner's public key, as text.
        data: whose rows.
        steps: how many to take.
        batch_size: rows of a step.
        checkpoint_every: steps between checkpoints, which are what an interruption costs at most.
        seed: 16 public bytes that fix the order in which rows are taken; fresh ones if not given.
        reveal_loss: whether the owner may be shown the loss of every step.

    Raises:
        InputError: the model cannot be trained on such batches, or a setting cannot be.
        UnsupportedOperator: an operator has no encrypted form.
        RangeError: a weight is not finite, or of magnitude 64 or more.
    """
    require_name(name)
    rows = sum(one.rows for one in data)
    if min((one.rows for one in data), default=0) < 1:
        raise InputError("a job trains on somebody's rows: say whose and how many, at least one of each")
    if not 1 <= batch_size <= rows:
        raise InputError(f"batch_size is {batch_size}: give a number from 1 to the {rows} rows that there are")
    for what, value in (("steps", steps), ("checkpoint_every", checkpoint_every)):
        if not 1 <= value <= MAX_STEPS:
            raise InputError(f"{what} is {value}: give a number from 1 to {MAX_STEPS:,}")
    if seed is not None and len(seed) != SEED_BYTES:
        raise InputError(f"the seed of the rows' order is {len(seed)} bytes: give {SEED_BYTES}")
    recipe = training.recipe()
    shape = (batch_size, *row_shape)
    numbers = [recipe.optimizer.numbers(step) for step in range(1, steps + 1)] if recipe.optimizer.numbers(1) else []
    if sum(map(len, numbers)) > MAX_NUMBERS:
        raise InputError(f"{steps} steps of this optimizer take more than {MAX_NUMBERS:,} numbers: submit fewer steps")
    order = seed or Prg.fresh().bytes(SEED_BYTES)
    terms = Terms(name, steps, list(data), order, checkpoint_every, reveal_loss)
    program, whole = training_program(recipe, shape), not recipe.plan(shape).dtype.is_floating_point
    job = describe(owner, terms, program, recipe.parameters, numbers, whole=whole)
    pairs = recipe.share_state(Prg.fresh())
    parts = {
        role: JobPart(role, job, {key: pair[side].words for key, pair in pairs.items()})
        for side, role in enumerate((ALICE, BOB))
    }
    parts[PROVIDER] = JobPart(PROVIDER, job)
    for part in parts.values():
        part.check()
    return Submission(job, parts)


class Rows:
    """Rows to be shared into a job, all of them checked.

    Args:
        job: what they are for.
        inputs: one row an item.
        labels: class numbers, or real targets of the model's output's shape.

    Raises:
        InputError: shapes, dtypes or labels are not those that the job takes.
        RangeError: a value is not finite, or of magnitude 16,384 or more.
    """

    def __init__(self, job: Job, inputs: Tensor, labels: Tensor) -> None:
        taken, target = job.row_shapes
        self._inputs = real_rows(inputs)
        if tuple(self._inputs.shape[1:]) != taken:
            raise InputError(f"the rows have shape {tuple(self._inputs.shape[1:])}; the job takes {taken}")
        if job.whole and self._inputs.is_floating_point():
            raise InputError(f"the job takes whole numbers, for example positions in a table, not {inputs.dtype}")
        self.count = len(self._inputs)
        sums = job.program.step.labels_sum_to_one
        self._labels = targets(labels, (self.count, *target), sum_to_one=sums)
        row_bytes = 8 * (self._inputs[0].numel() + self._labels[0].numel())
        self._step = max(1, PIECE_BYTES // max(1, row_bytes))
        for first in range(0, self.count, self._step):
            self._words(first)

    def pieces(self) -> Iterator[tuple[int, dict[str, list[Tensor]]]]:
        """Fresh shares of the rows, piece by piece: the number of the first row, and what each party is to be sent."""
        prg = Prg.fresh()
        for first in range(0, self.count, self._step):
            pairs = [share(words, FRACTION_BITS, prg) for words in self._words(first)]
            yield first, {role: [pair[side].words for pair in pairs] for side, role in enumerate((ALICE, BOB))}

    def _words(self, first: int) -> tuple[Tensor, Tensor]:
        part = slice(first, first + self._step)
        return encode(self._inputs[part], what="the inputs"), encode(self._labels[part], what="the labels")

    def __repr__(self) -> str:
        return f"Rows({self.count})"


def require_program(job: Job, expected: str | Training) -> None:
    """Refuse to share rows into a job that computes something else than its contributor agreed to.

    A training step can copy rows into the weights that the owner of the job is given; whoever shares rows into
    somebody else's job needs to know what it computes.

    Args:
        job: as the parties have it.
        expected: the training, or the digest of its step.

    Raises:
        InputError: the job computes something else.
    """
    digest = expected if isinstance(expected, str) else expected.digest(job.program.batch[0])
    if digest != job.program_digest:
        raise InputError(
            f"the job {job.name} computes something else ({job.program_digest[:12]}…) than what was agreed to "
            f"({digest[:12]}…): no rows were sent. Model, loss, optimizer and version of tacit must be the same"
        )


def restore(job: Job, alice: Sequence[Tensor], bob: Sequence[Tensor]) -> dict[str, Tensor]:
    """The model that a job trained, from both parties' shares of it.

    Returns:
        Parameters and buffers by their names in the module, float32.

    Raises:
        PeerError: these are not shares of the job's model.
    """
    for words in (alice, bob):
        if [tuple(one.shape) for one in words] != [job.program.state[name] for name in job.model]:
            raise PeerError("a party sent shares of something else than the job's model")
    halves = zip(job.model, alice, bob, strict=True)
    pairs = {name: (Share(a, PARAMETER_BITS, Role.ALICE), Share(b, PARAMETER_BITS, Role.BOB)) for name, a, b in halves}
    return {name: reconstruct(*pair).to(torch.float32) for name, pair in pairs.items()}
