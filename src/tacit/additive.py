"""Sums and public multiples of secrets shared among any number of parties.

A secret x in Z/2^64 is split into n words that add up to x; n - 1 of them are uniform, so that any n - 1 parties
together know nothing of x (perfect secrecy, against parties that follow the protocol). What is linear with whole
coefficients each party does on its own share: no message, no crypto provider, no error. Products of secrets,
comparisons and divisions need the two-party engine (`tacit.tensor`).

>>> total = sum(share_additively(value, ("alice", "bob", "carol"), precision) for value in values)
>>> total.get().float_prec()

Values wrap around at 2^63: sums whose units (value · base^precision) stay below that in magnitude are exact.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tacit.errors import InputError, UnsupportedOperator
from tacit.ring.prg import Prg
from tacit.tensor import FixedPrecisionTensor, Precision

_SHARE_BY_SHARE = frozenset(
    (
        *(
            "alias",
            "detach",
            "clone",
            "view",
            "_unsafe_view",
            "reshape",
            "t",
            "transpose",
            "permute",
            "expand",
            "slice",
        ),
        *("select", "unsqueeze", "squeeze", "index", "cat", "stack", "split", "split_with_sizes", "unbind", "flip"),
        *("roll", "repeat", "narrow", "neg", "sum", "diagonal", "unfold", "as_strided"),
    )
)
"""Operators that move elements or add them up."""
_PRODUCTS = ("mul", "mm", "bmm", "mv", "dot")


class AdditiveTensor(Tensor):
    """A tensor of which each of n parties holds one share.

    Args:
        shares: int64, one for each holder, all of the tensor's shape.
        holders: who holds them, in this order.
        digits: what a unit of their sum is.
    """

    _shares: tuple[Tensor, ...]
    holders: tuple[Hashable, ...]
    digits: Precision

    @staticmethod
    def __new__(  # noqa: D102
        cls, shares: Sequence[Tensor], holders: Sequence[Hashable], digits: Precision
    ) -> AdditiveTensor:
        dtype = torch.int64 if digits.factor == 1 else torch.float32
        self: AdditiveTensor = Tensor._make_wrapper_subclass(cls, shares[0].shape, dtype=dtype)
        self._shares, self.holders, self.digits = tuple(shares), tuple(holders), digits
        return self

    def get(self) -> FixedPrecisionTensor:
        """Add the shares up, as whoever may know the sum."""
        total = self._shares[0]
        for share in self._shares[1:]:
            total = total + share
        return FixedPrecisionTensor(total, self.digits)

    def refresh(self) -> AdditiveTensor:
        """The same secret in fresh shares, independent of these."""
        zero = split(torch.zeros(self.shape, dtype=torch.int64), len(self.holders), Prg.fresh())
        return type(self)(
            [share + new for share, new in zip(self._shares, zero, strict=True)], self.holders, self.digits
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one ATen operator, each party on its own share."""
        packet, first = func.overloadpacket.__name__, next(_additive(args))
        if any(one.holders != first.holders or one.digits != first.digits for one in _additive(args)):
            raise InputError("the tensors are shared among different parties, or to different precisions")
        if func._schema.is_mutable and packet.endswith("_"):
            plain = getattr(torch.ops.aten, packet[:-1], None)
            if plain is not None and isinstance(args[0], AdditiveTensor):
                result = getattr(plain, func._overloadname)(*args, **kwargs or {})
                for held, new in zip(args[0]._shares, result._shares, strict=True):
                    held.copy_(new)
                return args[0]
        if packet in ("add", "sub", "rsub"):
            left, right = (_operand(first, value) for value in args[:2])
            factor = _whole((kwargs or {}).get("alpha", 1), packet)
            operate = getattr(torch, packet)
            return first._like([operate(x, y, alpha=factor) for x, y in zip(left, right, strict=True)])
        if packet in _PRODUCTS and sum(1 for _ in _additive(args)) == 1:
            weights = [value if isinstance(value, AdditiveTensor) else _whole(value, packet) for value in args]
            return first._like([func(*_share_of(weights, party)) for party in range(len(first.holders))])
        if packet in _SHARE_BY_SHARE:
            if packet in ("view", "_unsafe_view"):  # a share may lie in memory as the tensor does not
                func = torch.ops.aten.reshape.default
            options = {key: value for key, value in (kwargs or {}).items() if key != "dtype"}
            return first._like([func(*_share_of(args, party), **options) for party in range(len(first.holders))])
        raise UnsupportedOperator(
            f"{func} has no form on {len(first.holders)} summed shares, which take additions and whole public factors: "
            "share between two parties with a crypto provider for the rest"
        )

    def _like(self, results: list[Any]) -> Any:
        """The tensor, or the tensors, of which these are the parties' results."""
        if isinstance(results[0], (list, tuple)):
            return [self._like(list(parts)) for parts in zip(*results, strict=True)]
        return type(self)(results, self.holders, self.digits)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"AdditiveTensor(shape={tuple(self.shape)}, shared by {', '.join(map(str, self.holders))})"


def share_additively(
    value: Tensor | FixedPrecisionTensor, holders: Sequence[Hashable], prg: Prg | None = None
) -> AdditiveTensor:
    """Split a secret among any number of parties.

    Args:
        value: whole numbers (an integer tensor), or numbers in fixed precision.
        holders: two or more, all different.
        prg: the owner's generator; the operating system's randomness if not given.

    Raises:
        InputError: fewer than two holders, one named twice, or numbers that are not whole and not in fixed precision.
    """
    if len(holders) < 2 or len(set(holders)) != len(holders):
        raise InputError(f"{len(holders)} holders: share among two or more different ones")
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            raise InputError(f"a tensor of {value.dtype} cannot be shared as it is: .fix_prec() it first")
        value = FixedPrecisionTensor(value.to(torch.int64), Precision(0))
    return AdditiveTensor(split(value.units, len(holders), prg or Prg.fresh()), holders, value.digits)


def split(words: Tensor, count: int, prg: Prg) -> list[Tensor]:
    """``count`` int64 tensors that add up to ``words`` in Z/2^64, any ``count`` - 1 of them uniform."""
    masks = [prg.words(tuple(words.shape)) for _ in range(count - 1)]
    last = words.clone()
    for mask in masks:
        last -= mask
    return [*masks, last]


def _additive(value: Any) -> Any:
    if isinstance(value, AdditiveTensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _additive(item)


def _share_of(value: Any, party: int) -> Any:
    if isinstance(value, AdditiveTensor):
        return value._shares[party]
    return type(value)(_share_of(item, party) for item in value) if isinstance(value, (list, tuple)) else value


def _operand(like: AdditiveTensor, value: Any) -> Sequence[Any]:
    """A summand's shares; a public one is the first party's to add."""
    if isinstance(value, AdditiveTensor):
        return value._shares
    units = (torch.as_tensor(value, dtype=torch.float64) * like.digits.factor).round().to(torch.int64)
    if like.digits.factor == 1:
        units = _whole(torch.as_tensor(value), "a sum of whole numbers")
    return [units, *[torch.zeros_like(units)] * (len(like.holders) - 1)]


def _whole(value: Any, where: str) -> Any:
    """A public factor, which has to be whole."""
    whole = value.round() == value if isinstance(value, Tensor) else torch.tensor(value == int(value))
    if not bool(whole.all()):
        raise UnsupportedOperator(f"{where} takes whole public numbers on these shares: .get() first, then scale")
    return value.to(torch.int64) if isinstance(value, Tensor) else int(value)
