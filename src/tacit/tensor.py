"""Tensors for learning and for anything that is not a network: plain, fixed-precision and private.

>>> x = tensor([0.123]).fix_prec(precision=2, base=10)      # holds 12
>>> private = x.share(alice, bob, crypto_provider=provider)  # alice and bob hold a share each
>>> (private + private).get().float_prec()                   # tensor([0.2400])

A `PrivateTensor` is a `torch.Tensor`: operators, functions and modules work on it, autograd and `torch.optim` too, and
what reaches it is the ATen operator, forward or backward, run on shares by the lowering table that also runs traced
models. Correlated randomness is dealt as it is needed.

>>> model = share_module(plain, alice, bob, crypto_provider=provider)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
>>> nn.functional.cross_entropy(model(private_images), private_targets).backward()
>>> optimizer.step()

`tacit.Cluster.trainer` takes the same steps traced and planned ahead, in about half of the rounds and bytes.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions, decomposition_table

from tacit.errors import InputError, RangeError, UnsupportedOperator
from tacit.mpc.correlation import Party, Provider
from tacit.mpc.lockstep import Trio
from tacit.mpc.shares import Share, reconstruct, share
from tacit.mpc.steps import Protocol, Task, dataflow
from tacit.program.lowering import LOWERINGS
from tacit.program.lowering.accumulating import lowering_for
from tacit.program.lowering.backward import PARAMETER_BITS
from tacit.program.lowering.gradients import BY_BITS, STEP_BY_STEP, WITH_BITS, Fine
from tacit.program.lowering.operands import MAX_SCALE
from tacit.ring.fixed_point import FRACTION_BITS, encode
from tacit.ring.prg import Prg
from tacit.trace import operator_of

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

    Operators that change a tensor in place write to its shares, at the scale that they have: views of it and tensors
    that it is a view of follow, as they do in PyTorch.
    """

    _shares: Pair
    _bits: Pair | None
    _trio: Trio
    _digits: Precision

    @staticmethod
    def __new__(  # noqa: D102
        cls, shares: Pair, trio: Trio, digits: Precision, dtype: torch.dtype = torch.float32
    ) -> PrivateTensor:
        self: PrivateTensor = Tensor._make_wrapper_subclass(cls, shares[0].shape, dtype=dtype)
        self._shares, self._trio, self._digits, self._bits = shares, trio, digits, None
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
        try:
            return _dispatched(func, list(args), dict(kwargs or {}))
        except _Refusal as refusal:
            raise refusal.kind(f"{func} at {_caller()}: {refusal}") from None

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Shares of the same value in memory of their own, as copying a module needs them."""
        twin = self.detach().clone()
        if isinstance(self, nn.Parameter):
            twin = nn.Parameter(twin)
        memo[id(self)] = twin.requires_grad_(self.requires_grad)
        return twin

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PrivateTensor(shape={tuple(self.shape)}, shared by alice and bob)"


def share_module(module: nn.Module, alice: Party, bob: Party, *, crypto_provider: Provider) -> nn.Module:
    """A copy of a module whose parameters are private, to run and to train as it stands.

    Args:
        module: any module; it is not changed. Its buffers of real numbers become private too.
        alice: the first computing party of a cluster.
        bob: the second.
        crypto_provider: the provider of the same cluster.

    Returns:
        A module of the same class. Its parameters hold 24 fractional bits, and `PrivateTensor.get` gives all of them.

    Raises:
        InputError: the three do not belong to one cluster.
        RangeError: a parameter is not finite, or of magnitude 64 or more.
    """
    trio, prg, whole = Trio.of(alice, bob, crypto_provider), Prg.fresh(), copy.deepcopy(module)
    digits, shared = Precision(PARAMETER_BITS, base=2), dict[int, Tensor]()

    def private(name: str, value: Tensor) -> PrivateTensor:
        words = encode(value, PARAMETER_BITS, what=name)
        return PrivateTensor(share(words, PARAMETER_BITS, prg), trio, digits)

    for prefix, part in whole.named_modules():
        for name, value in [*part.named_parameters(prefix, recurse=False), *part.named_buffers(prefix, recurse=False)]:
            if not value.is_floating_point():
                continue
            if id(value) not in shared:
                hidden = private(name, value)
                trained = isinstance(value, nn.Parameter)
                shared[id(value)] = nn.Parameter(hidden, value.requires_grad) if trained else hidden
            setattr(part, name.rpartition(".")[2], shared[id(value)])
    return whole


Pair = tuple[Share, Share]
_ENGINE = Fine()
_DEFINITIONS: dict[Any, Callable[..., Any]] = {
    **core_aten_decompositions(),
    **{operator: decomposition_table[operator] for operator in map(operator_of, STEP_BY_STEP)},  # type: ignore[index]
}
"""What operators without a lowering are defined by."""
_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class _Refusal(InputError):
    """Why an operator cannot run; where is added outside."""

    def __init__(self, kind: type[InputError], reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _dispatched(func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if func in _ALIASES:
        return _alias(args[0])
    if str(func).startswith("aten._foreach_"):
        # PyTorch's own definition: one tensor after the other.
        return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
    if func._schema.is_mutable:
        return _changed(func, args, kwargs)
    name = str(func)
    fine = lowering_for(name, args, _scale(args), in_place=False, trained=_trained(args))
    lowering, with_bits = (fine, False) if fine else _lowering(name, args)
    if lowering is None:
        result = _DEFINITIONS.get(func, func.decompose)(*args, **kwargs)
        if result is NotImplemented:
            raise _Refusal(UnsupportedOperator, "has no encrypted form")
        return result
    private = list(_private((args, kwargs)))
    shares = _run(lowering, args, kwargs, private, settled=not fine)
    bits: Any = None
    if with_bits:
        shares, bits = zip(*shares, strict=True)
    truths, digits = name.split(".")[1] in _TRUTHS, max((one._digits for one in private), key=lambda d: d.factor)
    trio = private[0]._trio
    result = _wrap(shares, trio, Precision(0) if truths else digits, torch.bool if truths else torch.float32)
    found = _private(result)
    if bits:
        found[-1]._bits = bits
    if not func.is_view:
        _own(found, private)
    return result


def _run(lowering: Any, args: list[Any], kwargs: dict[str, Any], private: list[PrivateTensor], settled: bool) -> Any:
    """Both parties' results of a lowering; if ``settled``, at scales that every operator takes."""
    if any(one._trio is not private[0]._trio for one in private):
        raise _Refusal(InputError, "the tensors are shared among different parties")
    try:
        alice, bob = (_apply(lowering, _of_party(args, i), _of_party(kwargs, i), settled) for i in range(2))
        return private[0]._trio.run(alice, bob)
    except UnsupportedOperator as error:
        raise _Refusal(UnsupportedOperator, str(error)) from None


def _own(results: list[PrivateTensor], sources: list[PrivateTensor]) -> None:
    """Copy what lowerings passed on as it was: what is changed in place later must not be somebody else's."""
    taken = {share.words.untyped_storage().data_ptr() for one in sources for share in one._shares}
    for one in results:
        if any(share.words.untyped_storage().data_ptr() in taken for share in one._shares):
            one._shares = _copied(one._shares)


def _copied(shares: Pair) -> Pair:
    alice, bob = (share.map(lambda words: words.clone(memory_format=torch.contiguous_format)) for share in shares)
    return alice, bob


def _lowering(name: str, args: list[Any]) -> tuple[Any, bool]:
    """How the operator runs, if there is a way, and whether it gives bits for its gradient; they go into ``args``."""
    if (name in WITH_BITS or name in STEP_BY_STEP) and torch.is_grad_enabled() and _trained(args):
        return WITH_BITS.get(name), True
    if name in BY_BITS:
        position, lowering = BY_BITS[name]
        source = args[position]
        if isinstance(source, PrivateTensor) and source._bits:
            args[position] = PrivateTensor(source._bits, source._trio, source._digits)
            return lowering, False
    return LOWERINGS.get(name), False


def _scale(args: list[Any]) -> int:
    """The fractional bits of the first argument, if it is private."""
    return args[0]._shares[0].scale if args and isinstance(args[0], PrivateTensor) else 0


def _trained(args: list[Any]) -> bool:
    return any(isinstance(one, Tensor) and one.requires_grad for one in args)


def _alias(one: PrivateTensor) -> PrivateTensor:
    alias = PrivateTensor(one._shares, one._trio, one._digits, one.dtype)
    alias._bits = one._bits
    return alias


_AS_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "zero_": lambda target: target * 0,
    "fill_": lambda target, value: target * 0 + value,
    "copy_": lambda target, source, *_: source,
}


def _changed(func: Any, args: list[Any], kwargs: dict[str, Any]) -> PrivateTensor:
    """An operator that changes its first argument, run as the function that it is named after."""
    packet, overload = str(func).split(".")[1:]
    target, function = args[0], getattr(getattr(torch.ops.aten, packet[:-1], None), overload, None)
    function = _AS_FUNCTIONS.get(packet, function)
    if not packet.endswith("_") or function is None:
        raise _Refusal(UnsupportedOperator, "has no encrypted form")
    if not isinstance(target, PrivateTensor):
        raise _Refusal(InputError, "a plain tensor cannot take a private value: share it first")
    name, scale = f"aten.{packet[:-1]}.{overload}", target._shares[0].scale
    lowering = lowering_for(name, args, scale, in_place=True, trained=False)
    result: Any
    if lowering is not None:
        shares = _run(lowering, args, kwargs, _private((args, kwargs)), settled=False)
        result = PrivateTensor(shares, target._trio, target._digits, target.dtype)
    else:
        result = function(*args, **kwargs)
    if not isinstance(result, PrivateTensor):
        bits = min(scale, PARAMETER_BITS)
        result = PrivateTensor(share(encode(result, bits), bits, Prg.fresh()), target._trio, target._digits)
    if result._trio is not target._trio:
        raise _Refusal(InputError, "the tensors are shared among different parties")
    if result._shares[0].scale > scale and scale < FRACTION_BITS:
        raise _Refusal(UnsupportedOperator, f"the tensor holds {scale} fractional bits: make a new one instead")
    if any(size > 1 and not step for size, step in zip(target.shape, target._shares[0].words.stride(), strict=True)):
        target._shares = _copied(target._shares)  # elements of an expanded tensor are one in memory
    alice, bob = (_ENGINE.truncate(own, scale) for own in result._shares)
    fitting = target._trio.run(alice, bob)
    for held, new in zip(target._shares, fitting, strict=True):
        held.words.copy_(new.raised(scale).words)
    target._bits = result._bits
    return target


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


def _apply(lowering: Any, args: list[Any], kwargs: dict[str, Any], settled: bool) -> Protocol[Any]:
    task = Task("", (), lambda: lowering(_ENGINE, *args, **kwargs))
    result = (yield from dataflow([task], [""]))[""]
    return (yield from _settled(result)) if settled else result


def _settled(result: Any) -> Protocol[Any]:
    """Results at scales that every operator takes: what comes next is not known, as it is in a traced program."""
    if isinstance(result, tuple):
        parts = []
        for part in result:
            parts.append((yield from _settled(part)))
        return tuple(parts)
    beyond = isinstance(result, Share) and result.scale > MAX_SCALE
    return (yield from _ENGINE.truncate(result)) if beyond else result


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
