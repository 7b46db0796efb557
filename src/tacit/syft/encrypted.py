"""`fix_precision`, `share` and `get`: tacit's private tensors under the names that PySyft gave them.

Tensors shared between two workers with a crypto provider run on the two-party engine (`tacit.tensor.PrivateTensor`);
tensors shared among more workers, or without a provider, are added up (`tacit.additive.AdditiveTensor`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tacit.additive import AdditiveTensor, share_additively
from tacit.errors import InputError
from tacit.mpc.lockstep import Trio
from tacit.mpc.shares import share as split
from tacit.remote import VirtualWorker, new_id
from tacit.ring.fixed_point import encode
from tacit.ring.prg import Prg
from tacit.tensor import FixedPrecisionTensor, Precision, PrivateTensor, share_module, tensor

PROTOCOLS = ("snn", "fss", "mpc")
"""All of them name the one engine that there is."""
_WHOLE = Precision(0)
_WITH_NUMBERS = ("add", "sub", "rsub", "mul", "eq", "ne", "lt", "le", "gt", "ge")


class FixedTensor(Tensor):
    """A tensor of multiples of base^-precision, to be shared; functions of PyTorch run on the numbers."""

    digits: Precision

    @staticmethod
    def of(fixed: FixedPrecisionTensor) -> FixedTensor:
        """tacit's fixed-precision tensor as a `torch.Tensor`."""
        self = (fixed.units.to(torch.float64) / fixed.digits.factor).as_subclass(FixedTensor)
        self.digits = fixed.digits
        return self

    @property
    def fixed(self) -> FixedPrecisionTensor:
        """The same as tacit's own."""
        units = (self.as_subclass(Tensor).to(torch.float64) * self.digits.factor).round().to(torch.int64)
        return FixedPrecisionTensor(units, self.digits)

    @property
    def child(self) -> Tensor:
        """The multiples, int64."""
        return self.fixed.units

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run PyTorch's function on the numbers."""
        if any(isinstance(one, (PrivateTensor, AdditiveTensor)) for one in args):
            return func(
                *[one.fixed.float_prec() if isinstance(one, FixedTensor) else one for one in args], **kwargs or {}
            )
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if isinstance(result, FixedTensor) and not hasattr(result, "digits"):
            result.digits = next((one.digits for one in args if isinstance(one, FixedTensor)), _WHOLE)
        return result

    def fix_precision(self, *_: Any, **__: Any) -> FixedTensor:
        """The tensor itself."""
        return self

    def float_precision(self) -> Tensor:
        """The numbers as float32."""
        return self.fixed.float_prec()

    def share(self, *workers: VirtualWorker, **options: Any) -> Tensor:
        """Split the numbers among workers; see `share`."""
        return share(self, *workers, **options)

    def copy(self) -> FixedTensor:
        """The same numbers in memory of their own."""
        return FixedTensor.of(self.fixed)

    fix_prec, float_prec, decrypt = fix_precision, float_precision, float_precision

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"(Wrapper)>FixedPrecisionTensor>{self.child!r}"


class WorkerTrio(Trio):
    """alice, bob and the crypto provider of the engine, played by three workers."""

    def __init__(self, workers: Sequence[VirtualWorker], provider: VirtualWorker) -> None:
        super().__init__()
        self.workers, self.provider_worker = tuple(workers), provider

    @staticmethod
    def among(workers: Sequence[VirtualWorker], provider: VirtualWorker | None) -> WorkerTrio:
        """The trio of these workers, the same one whenever they work together.

        Raises:
            InputError: there is no provider, or the workers are not two and different from it.
            PeerError: one of them is gone.
        """
        if provider is None:
            raise InputError("this needs a crypto provider: .share(alice, bob, crypto_provider=james)")
        if len({*workers, provider}) != 3 or len(workers) != 2:
            raise InputError("share between two workers, with a crypto provider that is neither of them")
        for worker in (*workers, provider):
            worker.check()
        if frozenset(workers) not in provider.trios:
            provider.trios[frozenset(workers)] = WorkerTrio(workers, provider)
        trio: WorkerTrio = provider.trios[frozenset(workers)]
        return trio


class SharedTensor(PrivateTensor):
    """A private tensor of two workers and their crypto provider."""

    @staticmethod
    def of(one: PrivateTensor) -> SharedTensor:
        """The same shares under this name; the workers list them among their objects."""
        self: SharedTensor = SharedTensor(one._shares, one._trio, one._digits, one.dtype)
        self._bits = one._bits
        one._trio.provider_worker.check()  # type: ignore[attr-defined]
        _listed(self, self.workers)
        return self

    @property
    def workers(self) -> tuple[VirtualWorker, ...]:
        """Who holds the shares."""
        trio: Any = self._trio
        return (*trio.workers,)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one ATen operator on shares."""
        like = next((one for one in args if isinstance(one, SharedTensor)), None)
        if like is not None and like._digits == _WHOLE and func.overloadpacket.__name__ in _WITH_NUMBERS:
            args = tuple(_large(value, like) for value in args)
        return _named(super().__torch_dispatch__(func, types, args, kwargs))

    def get(self, *_: Any, **__: Any) -> Any:
        """Put the shares together: int64 where whole numbers were shared, else a fixed-precision tensor."""
        _unlisted(self, self.workers)
        fixed = super().get()
        return fixed.units if fixed.digits == _WHOLE else FixedTensor.of(fixed)

    def decrypt(self) -> Tensor:
        """The numbers themselves."""
        return decrypt(self)

    def copy(self) -> Tensor:
        """The same secret, apart from autograd and in memory of its own."""
        return self.detach().clone()

    def refresh(self) -> Tensor:
        """The same secret in fresh shares, independent of these."""
        shares = split(torch.zeros(self.shape, dtype=torch.int64), self._shares[0].scale, Prg.fresh())
        return self + SharedTensor.of(PrivateTensor(shares, self._trio, self._digits))

    def share_at(self, worker: VirtualWorker) -> Tensor:
        """The worker's share, int64."""
        return self._shares[self.workers.index(worker)].words

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        trio: Any = self._trio
        kind = "" if self._digits == _WHOLE else "FixedPrecisionTensor>"
        return _chain(("Parameter>" if isinstance(self, nn.Parameter) else "(Wrapper)>") + kind, self.workers) + (
            f"\n\t*crypto provider: {trio.provider_worker.id}*"
        )


class SummedTensor(AdditiveTensor):
    """A tensor of which any number of workers hold a share each."""

    holders: tuple[VirtualWorker, ...]

    def __init__(self, *_: Any) -> None:
        for worker in self.holders:
            worker.check()
        _listed(self, self.holders)

    def get(self, *_: Any, **__: Any) -> Any:
        """Put the shares together; see `SharedTensor.get`."""
        _unlisted(self, self.holders)
        fixed = super().get()
        return fixed.units if fixed.digits == _WHOLE else FixedTensor.of(fixed)

    decrypt = SharedTensor.decrypt

    def copy(self) -> Tensor:
        """The same secret in memory of its own."""
        return self.clone()

    def share_at(self, worker: VirtualWorker) -> Tensor:
        """The worker's share, int64."""
        return self._shares[self.holders.index(worker)]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return _chain("(Wrapper)>" + ("" if self.digits == _WHOLE else "FixedPrecisionTensor>"), self.holders)


def fix_precision(value: Tensor, precision_fractional: int = 3, base: int = 10, **_: Any) -> FixedTensor:
    """Round a tensor to multiples of base^-precision_fractional.

    Raises:
        RangeError: a value is not finite, or too large for 62 bits.
    """
    return FixedTensor.of(tensor(value.detach()).fix_prec(precision_fractional, base))


def share(
    value: Tensor,
    *workers: VirtualWorker,
    crypto_provider: VirtualWorker | None = None,
    protocol: str = "snn",
    requires_grad: bool = False,
    **_: Any,
) -> Tensor:
    """Split a tensor of whole or fixed-precision numbers among workers.

    Args:
        value: integers, or what `fix_precision` gave.
        workers: two, for everything that the engine does; more for sums and whole multiples.
        crypto_provider: deals randomness to the two; without one there are sums only.
        protocol: ``"snn"`` or ``"fss"``, which is the same here.
        requires_grad: whether autograd follows the tensor.

    Raises:
        InputError: floats that were not rounded before, or workers that do not go together.
        RangeError: a magnitude is 16,384 or more, or 2^30 or more of a whole number, with a crypto provider.
    """
    _check_protocol(protocol)
    if not isinstance(value, FixedTensor) and value.is_floating_point():
        raise InputError("floats cannot be shared as they are: write .fix_precision().share(…)")
    for worker in workers:
        worker.check()
    if crypto_provider is None or len(workers) != 2:
        summed = share_additively(value.fixed if isinstance(value, FixedTensor) else value, workers)
        return SummedTensor(summed._shares, workers, summed.digits)
    trio = WorkerTrio.among(workers, crypto_provider)
    if isinstance(value, FixedTensor):
        private = value.fixed.share(trio.alice, trio.bob, crypto_provider=trio.provider)
    else:
        private = PrivateTensor(split(encode(value, 0), 0, Prg.fresh()), trio, _WHOLE)
    return SharedTensor.of(private).requires_grad_(requires_grad)


def encrypt(
    value: Tensor,
    protocol: str = "mpc",
    workers: Sequence[VirtualWorker] = (),
    crypto_provider: VirtualWorker | None = None,
    precision_fractional: int = 3,
    **options: Any,
) -> Tensor:
    """`fix_precision` and `share` in one."""
    rounded = fix_precision(value, precision_fractional)
    return rounded.share(*workers, crypto_provider=crypto_provider, protocol=protocol, **options)


def decrypt(value: Any) -> Tensor:
    """`get` and `float_precision` in one."""
    return float_precision(value.get())


def float_precision(value: Tensor) -> Tensor:
    """The numbers of a plain tensor as they are, as floats."""
    return value.float_precision() if isinstance(value, FixedTensor) else value.to(torch.float32)


def share_in_place(
    module: nn.Module,
    *workers: VirtualWorker,
    crypto_provider: VirtualWorker | None = None,
    protocol: str = "snn",
    requires_grad: bool = False,
    **_: Any,
) -> nn.Module:
    """`tacit.share_module` in place: a module's parameters become private, at 24 fractional bits.

    Args:
        module: local.
        workers: two.
        crypto_provider: deals randomness to them.
        protocol: as in `share`.
        requires_grad: whether the module is to be trained; optimizers are made after this.
    """
    _check_protocol(protocol)
    trio = WorkerTrio.among(workers, crypto_provider)
    private = share_module(module, trio.alice, trio.bob, crypto_provider=trio.provider)
    for own, other in zip(module.modules(), private.modules(), strict=True):
        for table, shared in ((own._parameters, other._parameters), (own._buffers, other._buffers)):
            for name, value in cast(dict[str, Any], shared).items():
                if isinstance(value, PrivateTensor):
                    named = SharedTensor.of(value)
                    table[name] = nn.Parameter(named, requires_grad) if table is own._parameters else named  # type: ignore[assignment]
    return module


def _check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol={protocol!r}: tacit has one engine, under the names {', '.join(PROTOCOLS)}")


def _large(value: Any, like: SharedTensor) -> Any:
    """A whole public operand as a sum of shares, where the engine's 16 fractional bits leave no room for it."""
    if type(value) not in (int, Tensor) or (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    words = encode(torch.as_tensor(value), 0, what="a whole number")
    alice = like._shares[0].with_words(words, 0)
    return PrivateTensor((alice, like._shares[1].with_words(torch.zeros_like(words), 0)), like._trio, _WHOLE)


def _named(value: Any) -> Any:
    if type(value) is PrivateTensor:
        return SharedTensor.of(value)
    return type(value)(map(_named, value)) if isinstance(value, (list, tuple)) else value


def _listed(one: Any, workers: Sequence[VirtualWorker]) -> None:
    one._number = new_id()
    for worker in workers:
        worker.check()
        worker._shared[one._number] = one


def _unlisted(one: Any, workers: Sequence[VirtualWorker]) -> None:
    for worker in workers:
        worker.check()
        worker._shared.pop(one._number, None)


def _chain(start: str, workers: Sequence[VirtualWorker]) -> str:
    return f"{start}[AdditiveSharingTensor]" + "".join(f"\n\t-> {worker.id}" for worker in workers)
