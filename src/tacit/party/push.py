"""Pushing a model: what its owner does, in the clear and on its own machine, before anything is sent; and pulling it.

`prepare` traces the model for every batch size, simplifies it, plans it, shares its weights, masks them, and gives the
three parts to send: one to alice, one to bob, one to the provider, and none of them to anybody else. `restore` puts
alice's and bob's parts together again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tacit.errors import InputError, PeerError
from tacit.mpc.shares import share
from tacit.mpc.steps import Role
from tacit.party.cluster_file import ALICE, BOB, PROVIDER, require_name
from tacit.party.models import (
    KEPT_BITS,
    KEPT_DTYPES,
    SALT_BYTES,
    Kept,
    ModelPart,
    Variant,
    commit,
    describe,
    weight_masks,
)
from tacit.party.programs import Program
from tacit.program.inputs import ModelInput
from tacit.program.lowering import Context
from tacit.program.rewrite import Model, simplify
from tacit.program.run import factors, plan_execution
from tacit.ring.fixed_point import FRACTION_BITS, decode, encode
from tacit.ring.prg import SEED_BYTES, Prg
from tacit.trace import trace

_APART = 1e-6
"""How far a row of the output may move, in float64, when other rows of the input change."""


@dataclass(frozen=True, repr=False)
class Push:
    """A model version, ready to be sent.

    Args:
        alice, bob, provider: what each of them is to be sent.
    """

    alice: ModelPart
    bob: ModelPart
    provider: ModelPart

    @property
    def digest(self) -> str:
        """The name of the model version."""
        return self.provider.digest

    def __repr__(self) -> str:
        return f"Push({self.provider.name}, {self.digest[:12]}…)"


def prepare(
    model: nn.Module,
    examples: Sequence[Tensor],
    *,
    name: str,
    owner: str,
    batch_sizes: Sequence[int],
    context: Context | None = None,
) -> Push:
    """Make the three parts of a model version.

    Args:
        model: any module whose operators have an encrypted form; it is copied, put in evaluation mode, not changed.
        examples: an input batch for each of the model's inputs: their shapes after the first dimension and whether they
            are whole numbers are those of every later input. Their values matter only where a whole number has to be
            below a bound, as an embedding's index.
        name: what to call the model.
        owner: the owner's public key, as text.
        batch_sizes: those to plan for.
        context: the engine's settings: the network to plan for, calibrated windows.

    Raises:
        InputError: the model cannot be traced, gives something else than one row an item, or gives rows that depend on
            each other; a name or size is wrong.
        UnsupportedOperator: an operator has no encrypted form.
        RangeError: a weight is not finite, or of magnitude 16,384 or more.
    """
    require_name(name)
    sizes = sorted(set(batch_sizes))
    if not sizes or sizes[0] < 1:
        raise InputError(f"batch sizes {list(batch_sizes)}: give at least one, all of them 1 or more")
    inputs = tuple(map(ModelInput.of, examples))
    for one, example in zip(inputs, examples, strict=True):
        one.checked(example)
    context, plaintext = context or Context(), copy.deepcopy(model).eval()
    original = plaintext.state_dict()
    for key, value in original.items():
        if value.is_floating_point():
            encode(value, what=f"{key} of {name}")
        elif str(value.dtype).removeprefix("torch.") not in KEPT_DTYPES:
            raise InputError(f"{key} of {name} has dtype {value.dtype}, which cannot be shared")
    if sizes[-1] > 1:
        require_rows_apart(plaintext, examples)
    models: list[Model] = []
    programs: dict[int, tuple[int, Program]] = {}
    for batch in sizes:
        simple = simplify(Model(*trace(plaintext, tuple(one.blank(batch) for one in inputs))))
        same = (number for number, known in enumerate(models) if known.same_state(simple))
        variant = next(same, len(models))
        if variant == len(models):
            models.append(simple)
        programs[batch] = variant, _planned(simple, batch, inputs, context)
    return _shared(models, original, name, owner, inputs, programs)


def require_rows_apart(model: nn.Module, examples: Sequence[Tensor]) -> None:
    """Refuse a model in which a row of a batch has an influence on the results of others.

    Rows of one batch belong to different clients. The model is run in the clear, in float64, on batches that differ
    in one row; what it gives for the other rows must not differ.

    Raises:
        InputError: it does, or it does not run on such a batch.
    """
    prg, count = Prg.fresh(), 3
    model = copy.deepcopy(model).double()
    batch = [_drawn(example, count, prg) for example in examples]
    with torch.inference_mode():
        try:
            before = _outputs(model(*batch))
        except Exception as error:  # whatever the owner's code raises
            shapes = ", ".join(str(tuple(value.shape)) for value in batch)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"the model does not take inputs of shape {shapes}: {reason}") from error
        for row in range(count):
            changed = [value.clone() for value in batch]
            for value, example in zip(changed, examples, strict=True):
                value[row] = _drawn(example, 1, prg)[0]
            others = [other for other in range(count) if other != row]
            for old, new in zip(before, _outputs(model(*changed)), strict=True):
                if old.shape[:1] != (count,) or new.shape != old.shape:
                    raise InputError("the model does not give one row of results for each row of its inputs")
                if not torch.allclose(old[others], new[others], rtol=_APART, atol=_APART, equal_nan=True):
                    raise InputError(
                        "the model's results for one row of a batch depend on the other rows, which belong to other "
                        "clients: push it for batches of 1, or change it"
                    )


def restore(alice: ModelPart, bob: ModelPart) -> dict[str, Tensor]:
    """The weights that were pushed, from both parties' parts: pulling a model.

    Returns:
        Parameters and buffers by their names in the module, real numbers to within 2^-33.

    Raises:
        PeerError: the parts are not those of one model version.
    """
    if (alice.role, bob.role, alice.digest) != (ALICE, BOB, bob.digest) or alice.kept.keys() != bob.kept.keys():
        raise PeerError("alice and bob sent parts of different models")
    state = {}
    for key, half in alice.kept.items():
        words, dtype = half.words + bob.kept[key].words, KEPT_DTYPES[half.dtype]
        state[key] = (decode(words, KEPT_BITS) if dtype.is_floating_point else words).to(dtype)
    return state


def _planned(simple: Model, batch: int, inputs: Sequence[ModelInput], context: Context) -> Program:
    """The program, planned once to see that it can run."""
    given = tuple((batch, *one.item_shape) for one in inputs)
    shapes = {node.name: node.shape for node in simple.graph.nodes} | dict(zip(simple.graph.inputs, given, strict=True))
    for name in simple.graph.outputs:
        if shapes.get(name, ())[:1] != (batch,):
            raise InputError(f"the model's result {name} is not one row for each of a batch's items")
    sizes = {name: value.shape for name, value in simple.state.items()}
    plan_execution(simple.graph, sizes, given, context)
    return Program(simple.graph, {name: tuple(shape) for name, shape in sizes.items()}, given, context)


def _shared(
    models: Sequence[Model],
    original: Mapping[str, Tensor],
    name: str,
    owner: str,
    inputs: Sequence[ModelInput],
    programs: Mapping[int, tuple[int, Program]],
) -> Push:
    prg, salt, seed = Prg.fresh(), Prg.fresh().bytes(SALT_BYTES), Prg.fresh().bytes(SEED_BYTES)
    variants: dict[Role, list[Variant]] = {role: [] for role in Role}
    for number, model in enumerate(models):
        words = {key: encode(value, what=f"{key} of {name}, folded") for key, value in model.state.items()}
        weights = factors(model.graph)
        masks = weight_masks(seed, number, [tuple(words[key].shape) for key in weights])
        differences = {key: words[key] - mask for key, mask in zip(weights, masks, strict=True)}
        for role, half in _halves(words, prg).items():
            variants[role].append(Variant(half, differences))
    kept = _halves({key: _kept_words(value) for key, value in original.items()}, prg)
    description = describe(name, owner, commit(salt, variants[Role.ALICE]), inputs, programs)

    def part(role: Role) -> ModelPart:
        named = {key: Kept(str(original[key].dtype).removeprefix("torch."), half) for key, half in kept[role].items()}
        return ModelPart(role.value, description, salt, tuple(variants[role]), named)

    return Push(part(Role.ALICE), part(Role.BOB), ModelPart(PROVIDER, description, seed))


def _halves(words: Mapping[str, Tensor], prg: Prg) -> dict[Role, dict[str, Tensor]]:
    """alice's and bob's shares of words, by name."""
    pairs = {key: share(value, FRACTION_BITS, prg) for key, value in words.items()}
    return {role: {key: pair[number].words for key, pair in pairs.items()} for number, role in enumerate(Role)}


def _kept_words(value: Tensor) -> Tensor:
    if value.is_floating_point():
        return (value.detach().to(torch.float64) * 2.0**KEPT_BITS).round().to(torch.int64)
    return value.detach().to(torch.int64)


def _drawn(example: Tensor, rows: int, prg: Prg) -> Tensor:
    """Rows like the example's: real numbers, or whole ones that do not exceed its largest."""
    shape = (rows, *example.shape[1:])
    if example.is_floating_point():
        return prg.words(shape).to(torch.float64) * 2.0**-61
    return prg.words(shape).remainder(int(example.max()) + 1)


def _outputs(result: Any) -> tuple[Tensor, ...]:
    if isinstance(result, Tensor):
        return (result,)
    nested = result.values() if isinstance(result, Mapping) else result
    return tuple(tensor for item in nested for tensor in _outputs(item))
