"""A pushed model: what its owner sends to alice, to bob and to the provider, and what each of them keeps of it.

All three are sent the same *description*: who pushed it, under which name, and a program for every batch size. Its
SHA-256 is the model version's name. alice and bob are also sent their shares of the weights W and, for each weight that
enters products, F = W - B. The mask B comes from a seed that the owner draws anew for every push and sends to the
provider alone, who needs it to deal A∘B with every ticket (`tacit.mpc.linear`). So nothing runs between the parties to
load a model, and a restarted party goes on with the same F; other weights are another push, with another B. Since the
owner folds and transposes weights for the program, shares of them as they were go along, for pulling the model.

F is uniform to alice and bob. The provider must not see it: it knows B. The description therefore commits to F under a
salt that only alice and bob are sent, by which they know that they hold the same one.

A description is data: programs name operators of the lowering table and nothing else runs (`tacit.party.programs`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from tacit.errors import CodecError, InputError, TacitError
from tacit.identity import parse_key
from tacit.party.cluster_file import ALICE, BOB, PROVIDER, require_name
from tacit.party.programs import Program, decode_program, encode_program
from tacit.party.tickets import BatchSize
from tacit.program.inputs import ModelInput
from tacit.program.run import factors
from tacit.ring.prg import SEED_BYTES, Prg
from tacit.wire import parsed, payload_of

SALT_BYTES = 32
KEPT_BITS = 32
KEPT_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_NAME = b"tacit/v1/model/"
_Size = Annotated[int, Meta(ge=0, le=1 << 32)]


class _Planned(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    batch: BatchSize
    variant: Annotated[int, Meta(ge=0, lt=1 << 16)]
    program: bytes


class _Description(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """What all three are sent, in its one encoding."""

    version: Literal[1]
    name: str
    owner: str
    commitment: bytes
    inputs: list[tuple[list[_Size], bool]]
    programs: Annotated[list[_Planned], Meta(min_length=1, max_length=64)]


class _Body(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    role: str
    secret: bytes
    kept: list[tuple[str, str]]


_descriptions = msgspec.msgpack.Decoder(_Description)
_bodies = msgspec.msgpack.Decoder(_Body)


@dataclass(frozen=True, repr=False, eq=False)
class Variant:
    """The weights as one party holds them, for the batch sizes that take these weights.

    There is one variant, unless the owner's simplifications gave other constants for another batch size.

    Args:
        state: the party's shares of the state tensors, by name; empty at the provider.
        differences: F of every weight that enters products, by name; empty at the provider.
    """

    state: Mapping[str, Tensor]
    differences: Mapping[str, Tensor]


@dataclass(frozen=True, repr=False, eq=False)
class Kept:
    """A party's share of a parameter or buffer as it was before anything was folded.

    Args:
        dtype: of the tensor in the clear, one of `KEPT_DTYPES`.
        words: int64; real numbers have `KEPT_BITS` fractional bits.
    """

    dtype: str
    words: Tensor


@dataclass(frozen=True, repr=False, eq=False)
class ModelPart:
    """What one of the three holds of a model version.

    Args:
        role: ``"alice"``, ``"bob"`` or ``"provider"``.
        description: the bytes that all three hold.
        secret: the salt of the commitment at alice and bob, the seed of the masks at the provider.
        variants: the weights.
        kept: the weights as they were, by their names in the module; empty at the provider.
    """

    role: str
    description: bytes
    secret: bytes
    variants: tuple[Variant, ...] = ()
    kept: Mapping[str, Kept] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """The name of the model version."""
        return digest_of(self.description)

    @property
    def name(self) -> str:
        """What its owner calls it."""
        return self._described.name

    @property
    def owner(self) -> str:
        """The owner's public key, as text."""
        return self._described.owner

    @cached_property
    def inputs(self) -> tuple[ModelInput, ...]:
        """What the model takes."""
        return tuple(ModelInput(tuple(shape), whole) for shape, whole in self._described.inputs)

    @cached_property
    def programs(self) -> dict[int, Program]:
        """The program for every batch size, the smallest first."""
        return {one.batch: decode_program(one.program) for one in self._described.programs}

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The planned batch sizes, the smallest first."""
        return tuple(one.batch for one in self._described.programs)

    @cached_property
    def variant_of(self) -> dict[int, int]:
        """Which variant a batch size takes."""
        return {one.batch: one.variant for one in self._described.programs}

    @cached_property
    def _described(self) -> _Description:
        return parsed(_descriptions, self.description, "the description of a model")

    def check(self) -> None:
        """Refuse a part that does not hold together; whoever is sent one calls this before keeping it.

        Raises:
            CodecError: it is not what an owner would send.
        """
        described = self._described
        if msgspec.msgpack.encode(described) != self.description:
            raise CodecError("the description of a model is not in its canonical encoding")
        try:
            require_name(described.name)
            parse_key(described.owner)
        except InputError as error:
            raise CodecError(f"the description of a model is wrong: {error}") from None
        batches = [one.batch for one in described.programs]
        if batches != sorted(set(batches)) or len(described.commitment) != hashlib.sha256().digest_size:
            raise CodecError("the description of a model does not list its batch sizes in order, or commits to nothing")
        for batch, program in self.programs.items():
            _check_program(program, batch, self.inputs)
        self._check_weights()

    def _check_weights(self) -> None:
        used = {one.variant for one in self._described.programs}
        if self.role == PROVIDER:
            if self.variants or self.kept or len(self.secret) != SEED_BYTES:
                raise CodecError("the provider is sent a seed and no weights")
            return
        if used != set(range(len(self.variants))) or len(self.secret) != SALT_BYTES:
            raise CodecError("a part of a model holds other weights than its programs take")
        for batch, program in self.programs.items():
            variant = self.variants[self.variant_of[batch]]
            wanted = ({**program.state}, {name: program.state[name] for name in factors(program.graph)})
            for tensors, shapes in zip((variant.state, variant.differences), wanted, strict=True):
                found = {name: tuple(value.shape) for name, value in tensors.items()}
                if found != shapes or any(value.dtype != torch.int64 for value in tensors.values()):
                    raise CodecError("a part of a model holds weights of other names or shapes than its programs take")
        if any(one.dtype not in KEPT_DTYPES or one.words.dtype != torch.int64 for one in self.kept.values()):
            raise CodecError("a part of a model keeps something else than shares of its weights")
        if commit(self.secret, self.variants) != self._described.commitment:
            raise CodecError("a part of a model holds other masked weights than its description commits to")

    def __repr__(self) -> str:
        return f"ModelPart({self.name}, {self.digest[:12]}…, {self.role}'s)"


def digest_of(description: bytes) -> str:
    """The name of the model version that has this description."""
    return hashlib.sha256(_NAME + b"description\0" + description).hexdigest()


def commit(salt: bytes, variants: Sequence[Variant]) -> bytes:
    """A commitment to all F of a model, which hides them from whoever has no salt."""
    hasher = hashlib.sha256(_NAME + b"differences\0" + salt)
    for variant in variants:
        for difference in variant.differences.values():
            for piece in payload_of([difference]):
                hasher.update(piece)
    return hasher.digest()


def weight_masks(seed: bytes, variant: int, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The masks B of a variant's weights, in the order of `tacit.program.run.factors`."""
    prg = Prg(seed).derive("weight masks", variant)
    return [prg.derive("weight", number).words(shape) for number, shape in enumerate(shapes)]


def describe(
    name: str,
    owner: str,
    commitment: bytes,
    inputs: Sequence[ModelInput],
    programs: Mapping[int, tuple[int, Program]],
) -> bytes:
    """The description of a model.

    Args:
        name: what the owner calls it.
        owner: the owner's public key, as text.
        commitment: see `commit`.
        inputs: what it takes.
        programs: variant and program, by batch size.
    """
    planned = [_Planned(batch, variant, encode_program(one)) for batch, (variant, one) in sorted(programs.items())]
    taken = [(list(one.item_shape), one.whole) for one in inputs]
    return msgspec.msgpack.encode(_Description(1, name, owner, commitment, taken, planned))


def pack(part: ModelPart) -> tuple[bytes, tuple[Tensor, ...]]:
    """The body and the tensors of a frame that carries a part."""
    tensors = [torch.frombuffer(bytearray(part.description), dtype=torch.uint8)]
    for variant in part.variants:
        tensors += [value.contiguous() for value in (*variant.state.values(), *variant.differences.values())]
    tensors += [one.words.contiguous() for one in part.kept.values()]
    kept = [(key, one.dtype) for key, one in part.kept.items()]
    return msgspec.msgpack.encode(_Body(part.role, part.secret, kept)), tuple(tensors)


def unpack(body: bytes, tensors: Sequence[Tensor], role: str) -> ModelPart:
    """The part that a frame carries, checked.

    Args:
        body: the frame's.
        tensors: the frame's.
        role: of whoever received it.

    Raises:
        CodecError: it is not a part that this side can use, or it was meant for another.
    """
    packed = parsed(_bodies, body, "a part of a model")
    if packed.role != role:
        raise CodecError(f"a part of a model came that was meant for {packed.role}")
    if not tensors or tensors[0].dtype != torch.uint8 or tensors[0].dim() != 1:
        raise CodecError("a part of a model came without its description")
    bare = ModelPart(role, tensors[0].numpy().tobytes(), packed.secret)
    variants, rest = [], iter(tensors[1:])
    if role in (ALICE, BOB):
        by_variant = {bare.variant_of[batch]: program for batch, program in bare.programs.items()}
        for _, program in sorted(by_variant.items()):
            state, weights = dict(zip(program.state, rest, strict=False)), factors(program.graph)
            variants.append(Variant(state, dict(zip(weights, rest, strict=False))))
    kept = {key: Kept(dtype, words) for (key, dtype), words in zip(packed.kept, rest, strict=False)}
    if next(rest, None) is not None or len(kept) < len(packed.kept):
        raise CodecError("a part of a model came with tensors that do not belong to it, or without some that do")
    part = ModelPart(role, bare.description, packed.secret, tuple(variants), kept)
    part.check()
    return part


def _check_program(program: Program, batch: int, inputs: Sequence[ModelInput]) -> None:
    """Refuse a program that cannot be planned, or is for other inputs than the model's."""
    if program.inputs != tuple((batch, *one.item_shape) for one in inputs) or program.first_number:
        raise CodecError(f"the program for batches of {batch} takes other inputs than the model")
    shapes = {node.name: node.shape for node in program.graph.nodes} | dict(
        zip(program.graph.inputs, program.inputs, strict=False)
    )
    if any(shapes.get(name, ())[:1] != (batch,) for name in program.graph.outputs):
        raise CodecError(f"the program for batches of {batch} returns something that is not one row an item")
    guarded(program.cost)


def guarded(plan: Callable[[], object]) -> None:
    """Plan a program that came from elsewhere.

    Raises:
        CodecError: its operators do not take what it gives them.
    """
    try:
        plan()
    except TacitError as error:
        raise CodecError(f"a program that cannot run: {error}") from None
    except Exception as error:  # what torch and the lowerings make of arguments that nobody would write
        raise CodecError(f"a program that cannot run: {type(error).__name__}") from None
