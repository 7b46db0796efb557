"""Operators that move elements, or combine them linearly with public coefficients: local, but for embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tacit.errors import UnsupportedOperator
from tacit.mpc import tables
from tacit.mpc.linear import MatMul
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol
from tacit.program.lowering.operands import Context, Operand, constant, fit, is_private, product, share_of
from tacit.ring.fixed_point import FRACTION_BITS, MAGNITUDE_BITS, encode
from tacit.trace import CONSTANT

MAX_VOCABULARY = 1 << (MAGNITUDE_BITS - FRACTION_BITS)


def public(context: Context, values: Any, shape: Sequence[int] | None = None) -> Tensor:
    """A public tensor, given as nested lists; or as one number and a shape that it fills."""
    tensor = torch.tensor(values, dtype=torch.float64 if _holds_floats(values) else None)
    return tensor if shape is None else tensor.expand(tuple(shape))


def _holds_floats(values: Any) -> bool:
    return any(map(_holds_floats, values)) if isinstance(values, (list, tuple)) else isinstance(values, float)


def cat(context: Context, values: Sequence[Any], dim: int = 0) -> Share:
    """``cat``; local."""
    like = next((share_of(value) for value in values if is_private(value)), None)
    if like is None:
        return share_of(None)
    parts = [share_of(value) if is_private(value) else constant(like, value) for value in values]
    scale = max(part.scale for part in parts)
    return parts[0].with_words(torch.cat([part.raised(scale).words for part in parts], dim), scale)


def stack(context: Context, values: Sequence[Any], dim: int = 0) -> Share:
    """``stack``; local."""
    return cat(context, [_structural(Tensor.unsqueeze)(context, value, dim) for value in values], dim)


def getitem(context: Context, values: Sequence[Any], index: int) -> Any:
    """One result of an operator that has several."""
    if values[index] is None:
        raise UnsupportedOperator(
            "this result has no encrypted form: of pooling the values do, not the indices; of a norm the output"
        )
    return values[index]


def identity(context: Context, x: Operand, **_: Any) -> Share:
    """``clone``, ``detach``, ``alias``: nothing to do."""
    return share_of(x)


def cast(context: Context, x: Operand, *, dtype: torch.dtype | None = None, **_: Any) -> Share:
    """``_to_copy``: nothing to do where the values stay as they are."""
    own = share_of(x)
    if dtype is not None and not dtype.is_floating_point and own.scale:
        raise UnsupportedOperator(f"rounding to {dtype} has no encrypted form")
    return own


def cast_to(context: Context, x: Operand, dtype: torch.dtype, *_: Any, **__: Any) -> Share:
    """``to`` a dtype, as `cast`."""
    return cast(context, x, dtype=dtype)


def full_like(context: Context, x: Operand, value: float, **_: Any) -> Share:
    """``full_like``: a public number at every place; local."""
    return constant(share_of(x), torch.full(share_of(x).shape, float(value)))


def _filled(value: float) -> Callable[..., Share]:
    def lowering(context: Context, x: Operand, **_: Any) -> Share:
        return full_like(context, x, value)

    return lowering


def _structural(operator: Callable[..., Any]) -> Callable[..., Any]:
    """An operator that only moves elements, done by each party on its own share; it may have several results."""

    def lowering(context: Context, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Tensor):
            return operator(x, *args, **kwargs)
        own = share_of(x)
        if any(is_private(value) for value in (*args, *kwargs.values())):
            raise UnsupportedOperator(
                "private positions have no encrypted form here: an embedding takes private indices"
            )
        result = operator(own.words, *args, **kwargs)
        return own.with_words(result) if isinstance(result, Tensor) else tuple(own.with_words(part) for part in result)

    return lowering


def pad(context: Context, x: Operand, edges: Sequence[int], value: float = 0.0) -> Share:
    """``constant_pad_nd``; local."""
    own = share_of(x).raised(max(share_of(x).scale, FRACTION_BITS))
    filler = int(encode(torch.tensor(float(value)), what="padding")) << (own.scale - FRACTION_BITS)
    outside = functional.pad(torch.zeros_like(own.words), tuple(edges), value=filler)
    return own.map(lambda words: functional.pad(words, tuple(edges))).plus_public(outside)


def index(context: Context, x: Operand, indices: Sequence[Any]) -> Share:
    """``x[i, j, …]`` with public integer tensors or None; local."""
    own = share_of(x)
    if any(is_private(value) for value in indices):
        raise UnsupportedOperator("private positions have no encrypted form here: an embedding takes private indices")
    device = own.words.device
    # A mask of truth values says which positions, and how many, only in the clear.
    known = [value if value is None else value.to(device) for value in indices]
    if any(value is not None and value.dtype in (torch.bool, torch.uint8) for value in known):
        raise UnsupportedOperator("selecting by a mask has no encrypted form: give integer positions")
    return own.map(lambda words: torch.ops.aten.index.Tensor(words, known))


def index_select(context: Context, x: Operand, dim: int, positions: Any) -> Share:
    """``index_select`` at public positions; local."""
    return _at_public(torch.index_select, x, dim, positions)


def gather(context: Context, x: Operand, dim: int, positions: Any, *, sparse_grad: bool = False) -> Share:
    """``gather`` at public positions; local."""
    return _at_public(torch.gather, x, dim, positions)


def _at_public(operator: Callable[..., Tensor], x: Operand, dim: int, positions: Any) -> Share:
    if is_private(positions):
        raise UnsupportedOperator("private positions have no encrypted form here: an embedding takes private indices")
    return share_of(x).map(lambda words: operator(words, dim, positions.to(torch.int64).to(words.device)))


def embedding(
    context: Context,
    weight: Any,
    indices: Any,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """``embedding`` at private indices: a one-hot vector from a table (`tables.indicator`), times the weights.

    Two rounds. An index that is not in the vocabulary gives zeros, or another index's row: check inputs before sharing.
    """
    if not is_private(indices):
        return _structural(lambda words: functional.embedding(indices.to(torch.int64).to(words.device), words))(
            context, weight
        )
    size = (share_of(weight).words if is_private(weight) else weight).shape[0]
    if size > MAX_VOCABULARY:
        raise UnsupportedOperator(f"{size} entries are too many for private indices: at most {MAX_VOCABULARY}")

    def protocol() -> Protocol[Share]:
        chosen = yield from tables.indicator(share_of(indices), size)
        return (yield from product(context, chosen, weight, MatMul()))

    return protocol()


def upsample_nearest(operator: Callable[..., Tensor]) -> Callable[..., Share]:
    """Nearest-neighbour upsampling: each party gathers from its own share, where torch's operator says; local."""

    def lowering(context: Context, x: Operand, *args: Any) -> Share:
        own = share_of(x)
        sizes = own.shape[2:]
        # Positions are found by upsampling the numbers of the elements, exact in float64.
        numbers = torch.arange(sizes.numel(), dtype=torch.float64).view(1, 1, *sizes)
        where = operator(numbers, *args).to(torch.int64)
        places = where.flatten().to(own.words.device)
        return own.map(lambda words: words.flatten(2).index_select(2, places).view(*own.shape[:2], *where.shape[2:]))

    return lowering


def upsample_linear(operator: Callable[..., Tensor]) -> Callable[..., Protocol[Share]]:
    """Linear upsampling in one or two dimensions: a product with public weights for each; one round of truncation."""

    def lowering(context: Context, x: Operand, *args: Any) -> Protocol[Share]:
        own = yield from fit(context, share_of(x))
        sizes = own.shape[2:]
        unit = torch.eye(sizes.numel(), dtype=torch.float64).view(sizes.numel(), 1, *sizes)
        weights = operator(unit, *args)
        result = yield from product(context, own.map(lambda words: words.flatten(2)), weights.flatten(1), MatMul())
        return result.map(lambda words: words.view(*own.shape[:2], *weights.shape[2:]))

    return lowering


_aten = torch.ops.aten
_RESHAPES = ("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")
_VIEWS: dict[str, Callable[..., Any]] = {
    name: getattr(getattr(_aten, name.split(".")[1]), name.split(".")[2])
    for name in (
        "aten.expand.default",
        "aten.permute.default",
        "aten.t.default",
        "aten.transpose.int",
        "aten.squeeze.default",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
        "aten.unsqueeze.default",
        "aten.select.int",
        "aten.slice.Tensor",
        "aten.split.Tensor",
        "aten.unsafe_split.Tensor",
        "aten.split_with_sizes.default",
        "aten.unbind.int",
        "aten.flip.default",
        "aten.roll.default",
        "aten.repeat.default",
        "aten.unfold.default",
        "aten.diagonal.default",
        "aten.tril.default",
        "aten.triu.default",
        "aten.pixel_shuffle.default",
    )
}

LOWERINGS: dict[str, Callable[..., Any]] = {
    CONSTANT: public,
    "getitem": getitem,
    "aten.cat.default": cat,
    "aten.stack.default": stack,
    "aten.constant_pad_nd.default": pad,
    "aten.alias.default": identity,
    "aten.clone.default": identity,
    "aten.detach.default": identity,
    "aten.lift_fresh_copy.default": identity,
    "aten._to_copy.default": cast,
    "aten.to.dtype": cast_to,
    "aten.real.default": identity,
    "aten.full_like.default": full_like,
    "aten.zeros_like.default": _filled(0.0),
    "aten.ones_like.default": _filled(1.0),
    "aten.cumsum.default": _structural(lambda x, dim, dtype=None: x.cumsum(dim)),
    "aten.index.Tensor": index,
    "aten.index_select.default": index_select,
    "aten.gather.default": gather,
    "aten.embedding.default": embedding,
    "aten.upsample_nearest1d.vec": upsample_nearest(_aten.upsample_nearest1d.vec),
    "aten.upsample_nearest2d.vec": upsample_nearest(_aten.upsample_nearest2d.vec),
    "aten.upsample_nearest3d.vec": upsample_nearest(_aten.upsample_nearest3d.vec),
    "aten.upsample_nearest2d.default": upsample_nearest(_aten.upsample_nearest2d.default),
    "aten.upsample_linear1d.vec": upsample_linear(_aten.upsample_linear1d.vec),
    "aten.upsample_bilinear2d.vec": upsample_linear(_aten.upsample_bilinear2d.vec),
    "aten.upsample_bilinear2d.default": upsample_linear(_aten.upsample_bilinear2d.default),
    **{name: _structural(Tensor.reshape) for name in _RESHAPES},
    **{name: _structural(operator) for name, operator in _VIEWS.items()},
}

FACTOR_POSITIONS: dict[str, tuple[int, ...]] = {"aten.embedding.default": (0,)}
