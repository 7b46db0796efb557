"""Products of operands that are masked once: every private tensor is opened one time, whatever it enters.

Training multiplies each tensor several times: a layer's weights with its input and, transposed, with the gradient of
its output; that gradient with the input as well. `mask` opens E = X - A once and leaves a `Masked` operand: the share
of X, the party's part of A, and the public E. For two of them and any bilinear map ∘ with a dealt C = A∘B,

    X∘Y = E∘Y + A∘F + A∘B,       that is, per party,       Z_p = E∘Y_p + A_p∘F + C_p,

without anything more to open. A view of a masked operand (a transpose, a slice) is masked by the same view of A, so
views are kept as data: parties apply them to X_p, A_p and E, and the provider applies them to A.

The provider keeps the masks from one `OperandMask` to the `Forget` that ends a step. A mask belongs to one value: after
an update, a weight is another value, and is masked anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tacit.errors import CorrelationError, UnsupportedOperator
from tacit.mpc.correlation import Correlation, Field, Part, Provider
from tacit.mpc.linear import Bilinear
from tacit.mpc.shares import Share
from tacit.mpc.steps import Open, Protocol, Take

VIEWS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "expand": Tensor.expand,
        "flip": Tensor.flip,
        "permute": Tensor.permute,
        "reshape": Tensor.reshape,
        "select": Tensor.select,
        "slice": torch.ops.aten.slice.Tensor,
        "squeeze": Tensor.squeeze,
        "transpose": Tensor.transpose,
        "unsqueeze": Tensor.unsqueeze,
    }
)
"""The views that a masked operand can take: maps that move, repeat or leave out elements and compute nothing."""


@dataclass(frozen=True)
class View:
    """One step of a view, as data that all three parties apply alike.

    Args:
        name: a key of `VIEWS`.
        args: its arguments after the tensor; numbers and tuples of numbers.

    Raises:
        UnsupportedOperator: there is no such view.
    """

    name: str
    args: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in VIEWS:
            raise UnsupportedOperator(f"{self.name!r} is not a view of a masked operand")

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor seen this way."""
        return VIEWS[self.name](tensor, *self.args)


def _seen(tensor: Tensor, views: tuple[View, ...]) -> Tensor:
    return reduce(lambda seen, view: view(seen), views, tensor)


@dataclass(frozen=True)
class OperandMask(Correlation):
    """The mask A of an operand: uniform, so nothing is sent; the provider keeps it until the next `Forget`.

    Args:
        name: what later products call it; the next step's operand in its place has the same one.
        shape: of the operand.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def fields(self) -> dict[str, Field]:
        """A."""
        return {"a": Field(self.shape)}

    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """Remember A, to derive A∘B for every product that it enters."""
        provider.step_masks[self.name] = uniform.a
        return {}


@dataclass(frozen=True)
class Operand:
    """What a product takes, in public: a masked operand's name and shape, and how it is viewed."""

    name: str
    shape: tuple[int, ...]
    views: tuple[View, ...] = ()

    def mask(self, provider: Provider) -> Tensor:
        """The provider's A, viewed."""
        if self.name not in provider.step_masks:
            raise CorrelationError(f"operand {self.name!r} has no mask: its step has ended, or never began")
        return _seen(provider.step_masks[self.name], self.views)

    def blank(self) -> Tensor:
        """A tensor of the viewed shape, without data."""
        return _seen(torch.empty(self.shape, dtype=torch.int64, device="meta"), self.views)


@dataclass(frozen=True)
class MaskedProduct(Correlation):
    """C = A∘B for two operands that have been masked."""

    op: Bilinear
    left: Operand
    right: Operand

    @property
    def fields(self) -> dict[str, Field]:
        """C."""
        return {"c": Field(tuple(self.op(self.left.blank(), self.right.blank()).shape), dealt=True)}

    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """C = A∘B."""
        return {"c": self.op(self.left.mask(provider), self.right.mask(provider))}


@dataclass(frozen=True)
class Forget(Correlation):
    """The end of a step: nothing is dealt, and the provider forgets the step's masks."""

    @property
    def fields(self) -> dict[str, Field]:
        """Nothing."""
        return {}

    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """Forget every mask."""
        provider.step_masks.clear()
        return {}


@dataclass(frozen=True, eq=False, repr=False)
class Masked:
    """A private operand as one party holds it, ready for any number of products.

    Args:
        share: the share of X.
        own: the party's part of A.
        opened: E = X - A, which both parties know.
        operand: its name, and the views that have been applied to the other three.
    """

    share: Share
    own: Tensor
    opened: Tensor
    operand: Operand

    def seen(self, *views: View) -> Masked:
        """The operand viewed; local."""
        return replace(
            self,
            share=self.share.map(lambda words: _seen(words, views)),
            own=_seen(self.own, views),
            opened=_seen(self.opened, views),
            operand=replace(self.operand, views=(*self.operand.views, *views)),
        )

    def __repr__(self) -> str:
        return f"Masked({self.operand.name}, {self.share})"


def mask(x: Share, name: str) -> Protocol[Masked]:
    """Open an operand under a mask of its own, for all the products that it will enter.

    1. take [A]; 2. open E = X - A.

    Args:
        x: a share of X, any shape and scale.
        name: unique among the operands and selectors (`tacit.mpc.gates`) of one step.

    Leakage: none; E is uniform and A is not used for another value.
    Cost: one round, 8 bytes an element each way; nothing dealt.
    """
    operand = Operand(name, tuple(x.shape))
    part = yield Take(OperandMask(name, operand.shape))
    (opened,) = yield Open(x.words - part.a)
    return Masked(x, part.a, opened, operand)


def times(x: Masked, y: Masked, op: Bilinear) -> Protocol[Share]:
    """[X]∘[Y] for two masked operands; they may be the same one, or views of it.

    1. take [C]; 2. Z_p = E∘Y_p + A_p∘F + C_p.

    Args:
        x: the left operand.
        y: the right operand.
        op: the bilinear map.

    Returns:
        A share of X∘Y, exact in the ring, at the sum of the two scales.

    Leakage: none; nothing is opened.
    Cost: no round; 8 bytes an element of the product dealt, to bob.
    Raises:
        CorrelationError: at the provider, when an operand's mask has been forgotten.
    Source: Beaver, CRYPTO 1991; reuse of openings within one computation as in SecureML (Mohassel and Zhang, S&P 2017).
    """
    part = yield Take(MaskedProduct(op, x.operand, y.operand))
    words = op(x.opened, y.share.words) + op(x.own, y.opened) + part.c
    return x.share.with_words(words, x.share.scale + y.share.scale)
