"""Tensors for learning and for anything that is not a network: plain, fixed-precision and private.

>>> x = tensor([0.123]).fix_prec(precision=2, base=10)      # holds 12
>>> private = x.share(alice, bob, crypto_provider=provider)  # alice and bob hold a share each
>>> (private + private).get().float_prec()                   # tensor([0.2400])

A `PrivateTensor` is a `torch.Tensor`: operators, functions and modules work on it, and what reaches it is the ATen
operator, run on shares by the lowering table that also runs traced models. Correlated randomness is dealt as it is
needed.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions

from tacit.errors import InputError, RangeError, UnsupportedOperator
from tacit.mpc.correlation import Party, Provider
from tacit.mpc.lockstep import Trio
from tacit.mpc.shares import Share, reconstruct, share
from tacit.mpc.steps import Protocol, Task, dataflow
from tacit.program.lowering import LOWERINGS, Context
from tacit.ring.fixed_point import FRACTION_BITS, encode
from tacit.ring.prg import Prg

_TRUTHS = (
    *("ge", "gt", "le", "lt", "eq", "ne", "any", "all"),
    *(f"{kind}_{name}" for kind in ("logical", "bitwise") for name in ("not", "and", "or", "xor")),
)
"""Operators whose results are true or false."""


@dataclass(frozen=True)
class Precision:
    """How many digits a fixed-precision number keeps: multiples of base^-precision."""

    precision: int = 3
    base: int = 10

    def __post_init__(self) -> None:
        if self.precision < 0 or self.base < 2:
            raise InputError(
                f"precision={self.precision}, base={self.base}: need precision of 0 or more, base of 2 or more"
            )

    @property
    def factor(self) -> int:
        """How many units make one."""
        return int(self.base**self.precision)


class PlainTensor(Tensor):
    """A `torch.Tensor` with `fix_prec`; made by `tensor`."""

    def fix_prec(self, precision: int = 3, base: int = 10) -> FixedPrecisionTensor:
        """Round to multiples of base^-precision.

        Args:
            precision: digits after the point.
            base: of the digits.

        Raises:
            RangeError: a value is not finite, or too large for 62 bits.
        """
        digits = Precision(precision, base)
        scaled = self.as_subclass(Tensor).detach().to(torch.float64) * digits.factor
        if not bool((scaled.abs() < 2.0**62).all()):
            raise RangeError("a value is not finite, or too large to be held with this precision: lower the precision")
        return FixedPrecisionTensor(scaled.round().to(torch.int64), digits)


def tensor(data: Any) -> PlainTensor:
    """A float32 tensor that can be turned into fixed precision and shared."""
    return torch.as_tensor(data, dtype=torch.float32).as_subclass(PlainTensor)


@dataclass(frozen=True, eq=False)
class FixedPrecisionTensor:
    """Numbers held as whole multiples of base^-precision: 0.123 at precision 2 in base 10 is 12.

    Args:
        units: int64, any shape.
        digits: what a unit is.
    """

    units: Tensor
    digits: Precision

    def float_prec(self) -> Tensor:
        """The numbers as float32."""
        return (self.units.to(torch.float64) / self.digits.factor).to(torch.float32)

    float_precision = float_prec

    def share(self, alice: Party, bob: Party, *, crypto_provider: Provider) -> PrivateTensor:
        """Split the numbers between alice and bob.

        The shares hold the same values in base 2, at 16 fractional bits.

        Args:
            alice: the first computing party of a cluster.
            bob: the second.
            crypto_provider: the provider of the same cluster.

        Raises:
            InputError: the three do not belong to one cluster.
            RangeError: a magnitude is 16,384 or more.
        """
        trio = Trio.of(alice, bob, crypto_provider)
        words = encode(self.units.to(torch.float64) / self.digits.factor)
        return PrivateTensor(share(words, FRACTION_BITS, Prg.fresh()), trio, self.digits)

    def __repr__(self) -> str:
        return (
            f"FixedPrecisionTensor({self.units.tolist()}, precision={self.digits.precision}, base={self.digits.base})"
        )


class PrivateTensor(Tensor):
    """A tensor of which alice and bob hold a share each.

    It has a shape and a dtype like any tensor; its values are nowhere. `get` puts the shares together.
    """

    _shares: tuple[Share, Share]
    _trio: Trio
    _digits: Precision

    @staticmethod
    def __new__(  # noqa: D102
        cls, shares: tuple[Share, Share], trio: Trio, digits: Precision, dtype: torch.dtype = torch.float32
    ) -> PrivateTensor:
        self: PrivateTensor = Tensor._make_wrapper_subclass(cls, shares[0].shape, dtype=dtype)
        self._shares, self._trio, self._digits = shares, trio, digits
        return self

    def get(self) -> FixedPrecisionTensor:
        """Put the shares together, as whoever owns the tensor may."""
        values = reconstruct(*self._shares)
        return FixedPrecisionTensor((values * self._digits.factor).round().to(torch.int64), self._digits)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one ATen operator on shares."""
        name, given = str(func), (list(args), dict(kwargs or {}))
        if name not in LOWERINGS and func in core_aten_decompositions():
            return core_aten_decompositions()[func](*args, **(kwargs or {}))
        if name not in LOWERINGS:
            raise UnsupportedOperator(f"{name} at {_caller()}: has no encrypted form")
        private = list(_private(given))
        if any(one._trio is not private[0]._trio for one in private):
            raise InputError(f"{name} at {_caller()}: the tensors are shared among different parties")
        trio, digits = private[0]._trio, max((one._digits for one in private), key=lambda d: d.factor)
        try:
            shares = trio.run(_apply(name, *_of_party(given, 0)), _apply(name, *_of_party(given, 1)))
        except UnsupportedOperator as error:
            raise UnsupportedOperator(f"{name} at {_caller()}: {error}") from None
        if name.split(".")[1] in _TRUTHS:
            return _wrap(shares, trio, Precision(0), torch.bool)
        return _wrap(shares, trio, digits, torch.float32)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PrivateTensor(shape={tuple(self.shape)}, shared by alice and bob)"


def _private(value: Any) -> list[PrivateTensor]:
    if isinstance(value, PrivateTensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [found for item in items for found in _private(item)]


def _of_party(value: Any, party: int) -> Any:
    """The arguments as one party holds them."""
    if isinstance(value, PrivateTensor):
        return value._shares[party]
    if isinstance(value, dict):
        return {key: _of_party(item, party) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_of_party(item, party) for item in value)
    return value


def _apply(name: str, args: list[Any], kwargs: dict[str, Any]) -> Protocol[Any]:
    task = Task(name, (), lambda: LOWERINGS[name](Context(), *args, **kwargs))
    return (yield from dataflow([task], [name]))[name]


def _wrap(shares: Any, trio: Trio, digits: Precision, dtype: torch.dtype) -> Any:
    alice, bob = shares
    if isinstance(alice, tuple):
        return tuple(_wrap(pair, trio, digits, dtype) for pair in zip(alice, bob, strict=True))
    return None if alice is None else PrivateTensor((alice, bob), trio, digits, dtype)


def _caller() -> str:
    """The line of the caller's code, outside torch and tacit."""
    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(inside)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown line"
