"""Workers, and pointers to what they hold.

A `PointerTensor` is a tensor whose operators run where the data is: what PyTorch would do with it, forward and
backward, its worker does with the tensor that it holds, and another pointer comes back. Only `get` brings values back.

>>> bob = VirtualWorker(id="bob")
>>> pointer = PointerTensor(bob, bob.hold(torch.tensor([1.0, 2.0])))
>>> (pointer * 2).get()                                  # computed at bob
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tacit.errors import InputError, PeerError


class GetNotPermittedError(InputError):
    """The owner of an object does not let this user have it."""


def new_id() -> int:
    """A number to call an object by."""
    return secrets.randbelow(10**11)


class VirtualWorker:
    """A worker in this process.

    Args:
        hook: the `TorchHook`; only the vocabulary asks for it.
        id: its name.
        data: objects that it holds from the start.
        policy: says of an object and a user's name whether `.get()` may hand it out; whoever asks may, if not given.
    """

    is_client_worker = False

    def __init__(
        self,
        hook: Any = None,
        id: str = "worker",
        data: Iterable[Any] = (),
        policy: Callable[[Any, str | None], bool] | None = None,
        **_: Any,
    ) -> None:
        self.id, self.hook, self.policy, self.closed = id, hook, policy, False
        self._held: dict[int, Any] = {}
        self._shared: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.trios: dict[frozenset[VirtualWorker], Any] = {}
        for value in data:
            self.hold(value)

    @property
    def _objects(self) -> dict[int, Any]:
        """What it holds, by number: tensors, pointers, plans, and its shares of private tensors."""
        return {**self._held, **{number: one.share_at(self) for number, one in list(self._shared.items())}}

    @property
    def _tensors(self) -> dict[int, Tensor]:
        return {number: value for number, value in self._objects.items() if isinstance(value, Tensor)}

    def hold(self, value: Any) -> int:
        """Store an object; returns the number to ask for it by."""
        self.check()
        number = new_id()
        self._held[number] = value
        return number

    def at(self, number: int) -> Any:
        """The object of this number.

        Raises:
            InputError: it is not here any more.
        """
        self.check()
        if number not in self._held:
            raise InputError(
                f"object {number} is not at {self.id} any more: .get() or .move() took it away. "
                "Keep what they returned, or take a .copy() before"
            )
        return self._held[number]

    def give(self, number: int, user: str | None = None) -> Any:
        """Hand an object out and hold it no longer.

        Raises:
            GetNotPermittedError: its owner's policy says no.
        """
        value = self.at(number)
        allowed = allowed_users(value)
        if (allowed is not None and user not in allowed) or (self.policy and not self.policy(value, user)):
            raise GetNotPermittedError(
                f"{self.id} does not hand object {number} to {user or 'an unnamed user'}: ask its owner, "
                "or compute there and .get() what may be known, as .get(user=…)"
            )
        return self._held.pop(number)

    def call(self, function: Any, args: Any, kwargs: dict[str, Any], public: bool) -> Any:
        """Call a function on objects that are here; see `run`."""
        pointers = [one for one in _tensors((args, kwargs)) if isinstance(one, PointerTensor)]
        here = {id(pointer): self.at(pointer.id_at_location) for pointer in pointers}
        result = function(*_resolved(args, here), **_resolved(kwargs, here))
        if public:
            return result
        name, known = getattr(function, "__name__", "this"), {id(here[id(pointer)]): pointer for pointer in pointers}
        users = [one for one in map(allowed_users, here.values()) if one is not None]
        if users and _mutates(name, kwargs):
            for value in here.values():
                value.allowed_users = frozenset.intersection(*users)
        return _pointed(result, self, known, users, name)

    def forget(self, number: int) -> None:
        """Drop an object nobody points to any more."""
        self._held.pop(number, None)

    def search(self, *query: Any) -> list[Any]:
        """Pointers to the objects whose tags or description match every word of the query."""
        words = [word for part in query for word in ([part] if isinstance(part, (str, int)) else part)]
        self.check()
        return [
            pointer_to(value, self, number) for number, value in self._held.items()
            if all(_matches(word, number, value) for word in words)
        ]  # fmt: skip

    def request_search(self, query: Sequence[str], location: VirtualWorker) -> list[Any]:
        """Search another worker."""
        return location.search(*query)

    def clear_objects(self) -> VirtualWorker:
        """Hold nothing any more."""
        self._held.clear()
        return self

    def close(self) -> None:
        """Leave: every later use of what it held is an error."""
        self.closed = True
        self._held.clear()

    def check(self) -> None:
        """Raise `PeerError` if the worker is gone."""
        if self.closed:
            raise PeerError(f"worker {self.id} is gone, and with it what it held: send the data to another worker")

    def __deepcopy__(self, memo: dict[int, Any]) -> VirtualWorker:
        return self  # whoever is pointed to stays the same

    def __repr__(self) -> str:
        return f"<{type(self).__name__} id:{self.id} #objects:{len(self._objects)}>"


def allowed_users(value: Any) -> frozenset[str] | None:
    """Who may get the object; None stands for everybody."""
    users: frozenset[str] | None = getattr(value, "allowed_users", None)
    return users


def _matches(word: str | int, number: int, value: Any) -> bool:
    return (
        word == number or word in getattr(value, "tags", ()) or str(word) in (getattr(value, "description", "") or "")
    )


local_worker = VirtualWorker(id="me")
"""The worker that owns the pointers of this program."""

_PUBLIC = frozenset(
    (
        *("shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "dtype", "device", "layout"),
        *("is_leaf", "requires_grad", "retains_grad", "is_complex", "is_floating_point", "is_sparse", "is_cuda"),
        *("is_contiguous", "is_signed", "itemsize", "element_size", "__len__", "is_inference", "is_quantized"),
        *("is_meta", "is_nested", "is_neg", "is_conj", "get_device", "output_nr", "names", "has_names", "_version"),
    )
)
"""What of a tensor its pointer tells: its form, and never its values."""
_GONE = "a pointer cannot be pickled, printed or turned into numbers: .get() it where its owner allows that"


class PointerTensor(Tensor):
    """A tensor that is elsewhere.

    Args:
        location: the worker that holds it.
        id_at_location: its number there.
        owned: whether the worker may forget the tensor when this pointer goes.
    """

    PUBLIC = _PUBLIC
    location: VirtualWorker
    id_at_location: int
    owner: VirtualWorker
    tags: set[str]
    description: str | None
    _owned: Any

    @staticmethod
    def __new__(cls, location: VirtualWorker, id_at_location: int, owned: bool = True) -> PointerTensor:  # noqa: D102
        self = Tensor._make_subclass(cls, torch.empty(0))
        self._point(location, id_at_location, owned)
        return self

    def _point(self, location: VirtualWorker, number: int, owned: bool = True) -> None:
        self.location, self.id_at_location, self.owner, self.id = location, number, local_worker, new_id()
        self.tags, self.description, self._owned = set(), None, None
        if owned:
            self._owned = weakref.finalize(self, location.forget, number)
            self._owned.atexit = False

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function of PyTorch at the worker that holds the arguments."""
        name = getattr(func, "__name__", "")
        if name == "__iter__":
            return iter(run(torch.unbind, args))
        if name == "__get__":
            name = func.__self__.__name__
        return run(func, args, kwargs or {}, public=name in _PUBLIC)

    def get(self, user: str | None = None, reason: str = "", **_: Any) -> Any:
        """Take the object from its worker, with its gradient.

        Args:
            user: who asks, for the owner's policy.
            reason: why; for whoever reads the program.

        Raises:
            GetNotPermittedError: the owner's policy says no.
            InputError: the object was taken before.
            PeerError: the worker is gone.
        """
        value = self._taken(user)
        return cloned(value) if type(value) in (Tensor, nn.Parameter) else value

    def copy(self) -> PointerTensor:
        """A copy of the object, at the same worker."""
        twin: PointerTensor = run(cloned, (self,))
        return twin

    def move(self, worker: VirtualWorker) -> PointerTensor:
        """Send the object from its worker straight to another one."""
        worker.check()
        return PointerTensor(worker, worker.hold(self._taken(None)))

    def send(self, worker: VirtualWorker) -> PointerTensor:
        """Send the pointer: what comes back points to it."""
        return PointerTensor(worker, worker.hold(self))

    def _taken(self, user: str | None) -> Any:
        value = self.location.give(self.id_at_location, user)
        self.disown()
        return value

    def disown(self) -> None:
        """Let the object stay at its worker when this pointer goes."""
        if self._owned is not None:
            self._owned.detach()

    def fix_precision(self, *args: Any, **options: Any) -> PointerTensor:
        """Round the object to a fixed precision, where it is."""
        return self._there("fix_precision", args, options)

    def float_precision(self) -> PointerTensor:
        """Give the object in floating point, where it is."""
        return self._there("float_precision", (), {})

    def share(self, *workers: VirtualWorker, **options: Any) -> PointerTensor:
        """Share the object among workers from where it is; `get` then gives the private tensor."""
        return self._there("share", workers, options)

    def encrypt(self, **options: Any) -> PointerTensor:
        """Round the object and share it, where it is; `get` then gives the private tensor."""
        return self._there("encrypt", (), options)

    fix_prec, float_prec = fix_precision, float_precision

    def _there(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> PointerTensor:
        pointer: PointerTensor = run(lambda value: getattr(value, method)(*args, **options), (self,))
        return pointer

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = twin = self.copy()
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise InputError(_GONE)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        tags = f"\n\tTags: {' '.join(sorted(self.tags))}" if self.tags else ""
        return (
            f"(Wrapper)>[PointerTensor | {self.owner.id}:{self.id} -> {self.location.id}:{self.id_at_location}]{tags}"
        )

    def __format__(self, spec: str) -> str:
        return repr(self)


class PointerParameter(PointerTensor, nn.Parameter):
    """A module's parameter while the module is elsewhere: the very object that optimizers hold, changed in kind."""

    @staticmethod
    def depart(parameter: nn.Parameter, worker: VirtualWorker) -> None:
        """Send a parameter's value and gradient to a worker, and make it a pointer to them."""
        number = worker.hold(cloned(parameter))
        parameter.grad, parameter.data = None, parameter.data.new_empty(0)
        parameter.__class__ = PointerParameter
        parameter._point(worker, number)  # type: ignore[attr-defined]

    def get(self, user: str | None = None, reason: str = "", **_: Any) -> Any:
        """Take the value and the gradient back; the parameter is local again."""
        value = super().get(user, reason)
        if type(value) is not Tensor:
            return value
        for name in ("location", "id_at_location", "owner", "id", "tags", "description", "_owned"):
            delattr(self, name)
        self.__class__ = nn.Parameter  # type: ignore[assignment]
        self.data, self.grad = value.detach(), value.grad
        return self.requires_grad_(value.requires_grad)

    def move(self, worker: VirtualWorker) -> PointerTensor:
        """Send the value from its worker straight to another one."""
        worker.check()
        self._point(worker, worker.hold(self._taken(None)))
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        twin, copied = nn.Parameter(torch.empty(0)), self.copy()
        twin.__class__ = PointerParameter
        twin._point(copied.location, copied.id_at_location)  # type: ignore[attr-defined]
        copied.disown()
        memo[id(self)] = twin
        return twin


def cloned(value: Any) -> Any:
    """A tensor's value and gradient in memory of their own, with its tags and what its owner allows."""
    if type(value) not in (Tensor, nn.Parameter):
        return value.copy()
    twin = value.detach().clone().requires_grad_(value.requires_grad)
    if value.is_leaf and value.grad is not None:
        twin.grad = value.grad.detach().clone()
    for name in ("tags", "description", "allowed_users"):
        if hasattr(value, name):
            setattr(twin, name, getattr(value, name))
    return twin


def run(function: Any, args: Any, kwargs: dict[str, Any] | None = None, public: bool = False) -> Any:
    """Call a function at the worker to whose objects its arguments point.

    Args:
        function: of PyTorch, or one that takes the objects themselves.
        args: pointers to objects of one worker, numbers, and nests of these.
        kwargs: likewise, by name.
        public: whether what is no tensor may come back.

    Returns:
        Pointers to its results; an argument that it changed and returned comes back as its own pointer.

    Raises:
        InputError: the arguments are not all at one worker, or the result would be a value.
    """
    found = list(_tensors((args, kwargs or {})))
    pointers = [one for one in found if isinstance(one, PointerTensor)]
    location = pointers[0].location
    for one in found:
        where = one.location if isinstance(one, PointerTensor) else local_worker
        if where is not location:
            raise InputError(
                f"one tensor is at {location.id} and another at {where.id}: bring them together first, with "
                f".{'move' if isinstance(one, PointerTensor) else 'send'}({location.id})"
            )
    return location.call(function, args, kwargs or {}, public)


def _pointed(
    value: Any, location: VirtualWorker, known: dict[int, PointerTensor], users: list[frozenset[str]], name: str
) -> Any:
    """What came out at the worker, as pointers to it; as restricted as what went in."""
    if value is None or id(value) in known:
        return known.get(id(value))
    if isinstance(value, Tensor):
        if users:
            value.allowed_users = frozenset.intersection(*users)  # type: ignore[attr-defined]
        return PointerTensor(location, location.hold(value))
    if isinstance(value, (tuple, list)):
        return type(value)([_pointed(one, location, known, users, name) for one in value])
    raise InputError(f"{name} would show a value that is at {location.id}: {_GONE}")


def _mutates(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function may write to its arguments."""
    return "out" in kwargs or name.startswith(("__i", "__set")) or (name[-1:] == "_" and name[:2] != "__")


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _resolved(value: Any, here: dict[int, Any]) -> Any:
    if isinstance(value, PointerTensor):
        return here[id(value)]
    if isinstance(value, dict):
        return {key: _resolved(item, here) for key, item in value.items()}
    return type(value)([_resolved(item, here) for item in value]) if isinstance(value, (list, tuple)) else value


def pointer_to(value: Any, location: VirtualWorker, number: int) -> Any:
    """What stands for an object of a worker elsewhere; it does not keep the object alive."""
    kind = getattr(value, "pointer", PointerTensor)
    pointer = kind(location, number, owned=False)
    pointer.tags, pointer.description = getattr(value, "tags", set()), getattr(value, "description", None)
    return pointer
