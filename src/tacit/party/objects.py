"""A worker that is a process of its own: `tacit.remote`'s pointers over a connection.

::

    python -m tacit.party.objects bob          # reads a token of 32 hex digits from standard input, prints its port

>>> bob = RemoteWorker("bob", port, token)
>>> pointer = PointerTensor(bob, bob.hold(torch.tensor([1.0, 2.0])))
>>> (pointer * 2).sum().get()

On another machine both sides have identities, and the connection is TLS between their pinned keys::

    python -m tacit.party.objects bob --listen 0.0.0.0:7500 --key bob.key --caller ed25519:…

>>> bob = RemoteWorker.dial("bob", "bob.example:7500", Identity.load(Path("me.key")), "ed25519:…")

What travels are names of PyTorch's functions, numbers of objects, settings, and the tensors of `hold` and `give`. The
process looks a name up in a table of the functions that PyTorch lets be overridden, and refuses every other; a result
that is no tensor comes back only where it tells a tensor's form. On one machine both sides show the token; that
connection is not encrypted, and keeps to the loopback interface.
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.overrides import get_overridable_functions, resolve_name

from tacit import errors
from tacit.errors import CodecError, InputError, PeerError, TacitError
from tacit.identity import Identity, parse_key
from tacit.party import dialing, tls
from tacit.party.address import parse_address
from tacit.party.transport import Link, accept, connect, listen
from tacit.remote import GetNotPermittedError, PointerTensor, VirtualWorker, cloned, pointer_to, run
from tacit.wire import Frame, Kind, parsed

_CALLER = "a program"
_AS_WORDS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.float16: torch.int16}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (*_AS_WORDS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
}
_SETTERS = ("grad", "data", "requires_grad")
_COPY = "tacit.cloned"
_ERRORS: dict[str, type[Exception]] = {
    **{name: one for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, TacitError)},
    GetNotPermittedError.__name__: GetNotPermittedError,
}
"""What another process may have this one raise."""
_answers = msgspec.msgpack.Decoder(Any)
_failures = msgspec.msgpack.Decoder(tuple[str, str])


@lru_cache(maxsize=1)
def functions() -> dict[str, Callable[..., Any]]:
    """What may be called at a worker, by name: PyTorch's overridable functions, and setting a gradient."""
    listed = (one for group in get_overridable_functions().values() for one in group)
    named = {name: one for one in listed if (name := resolve_name(one))}
    setters = {f"torch.Tensor.{name}.__set__": getattr(Tensor, name).__set__ for name in _SETTERS}
    return {**named, **setters, _COPY: cloned}


def name_of(function: Any) -> str:
    """The name by which a function is called elsewhere.

    Raises:
        InputError: it has none.
    """
    if function is cloned:
        return _COPY
    owner = getattr(getattr(function, "__self__", None), "__name__", "")
    setter = f"torch.Tensor.{owner}.__set__" if getattr(function, "__name__", "") == "__set__" else ""
    name = setter or resolve_name(function) or ""
    if name not in functions():
        raise InputError(
            f"{name or 'this'} cannot be sent to another process: .get() the tensor, or use a VirtualWorker"
        )
    return name


class RemoteWorker(VirtualWorker):
    """A worker in another process; what moves from it to another worker passes through this program.

    One of this machine is reached by a port and a token, one of another by `dial`.

    Args:
        id: the name under which the process was started.
        port: that it printed.
        token: 16 secret bytes that it was given.

    Raises:
        PeerError: nobody listens there, or somebody without the token.
    """

    def __init__(self, id: str, port: int, token: bytes) -> None:
        self._begin(id, connect(port, _CALLER, id, token))

    @classmethod
    def dial(cls, id: str, address: str, identity: Identity, key: str) -> RemoteWorker:
        """A worker on another machine, over TLS 1.3.

        Args:
            id: its name.
            address: where it listens, as ``host:port``.
            identity: this program's; the worker has its key as ``--caller``.
            key: the worker's public key, as `tacit keys show` prints it.

        Raises:
            InputError: the address or the key is none.
            PeerError: nobody listens there, or somebody with another key.
        """
        link = dialing.dial(parse_address(address), identity, id, parse_key(key))
        worker = cls.__new__(cls)
        worker._begin(id, link)
        return worker

    def _begin(self, id: str, link: Link) -> None:
        super().__init__(id=id)
        self._link, self._forgotten = link, list[int]()

    def hold(self, value: Any) -> int:
        """Send a tensor; returns its number there."""
        if not isinstance(value, Tensor) or isinstance(value, PointerTensor):
            raise InputError(f"{self.id} is another process, which holds plain tensors: .get() this first")
        body, tensors = _packed(value)
        number: int = self._ask("hold", body, tensors=tensors)[0]
        return number

    def give(self, number: int, user: str | None = None) -> Any:
        """Take a tensor back; see `VirtualWorker.give`."""
        body, frame = self._ask("give", number, user)
        return _unpacked(body, frame)

    def call(self, function: Any, args: Any, kwargs: dict[str, Any], public: bool) -> Any:
        """Call one of PyTorch's functions there."""
        known = {one.id_at_location: one for one in _pointers((args, kwargs))}
        sent = (_encoded(list(args)), _encoded(kwargs), public, torch.is_grad_enabled())
        result = _decoded(self._ask("call", name_of(function), *sent)[0], self, known)
        return torch.Size(result) if public and isinstance(result, tuple) else result

    def forget(self, number: int) -> None:
        """Let an object go, with the next message: this may come at any moment, in the middle of another one."""
        self._forgotten.append(number)

    def search(self, *query: Any) -> list[Any]:
        """Pointers to the objects whose tags or description match."""
        return [PointerTensor(self, number, owned=False) for number in self._ask("search", _encoded(list(query)))[0]]

    def clear_objects(self) -> VirtualWorker:
        """Refuse: what is there belongs to the process."""
        raise InputError(f"{self.id} is another process: let go of the pointers, or .close() it")

    def close(self) -> None:
        """Close the connection: the process ends."""
        super().close()
        self._link.close()

    def _ask(self, *body: Any, tensors: Any = ()) -> tuple[Any, Frame]:
        self.check()
        gone = [self._forgotten.pop() for _ in range(len(self._forgotten))]
        self._link.send(Kind.CALL, tensors, msgspec.msgpack.encode((gone, *body)))
        frame = self._link.receive(Kind.REPLY, Kind.ERROR)
        if frame.kind is Kind.ERROR:
            name, text = parsed(_failures, frame.body, f"what {self.id} says of a failure")
            raise _ERRORS.get(name, InputError)(text)
        return parsed(_answers, frame.body, f"what {self.id} answered"), frame


class _Server:
    """The other end."""

    def __init__(self, worker: VirtualWorker) -> None:
        self.worker = worker

    def answer(self, frame: Frame) -> tuple[Any, list[Tensor]]:
        gone, kind, *body = msgspec.msgpack.decode(frame.body)
        for number in gone:
            self.worker.forget(number)
        if kind == "hold":
            return self.worker.hold(_unpacked(body[0], frame)), []
        if kind == "give":
            return _packed(self.worker.give(*body))
        if kind == "search":
            return [one.id_at_location for one in self.worker.search(*_decoded(body[0], self.worker, {}))], []
        if kind != "call" or body[0] not in functions():
            raise InputError("this worker knows no such call")
        name, args, kwargs, public, differentiable = body
        there = {number: pointer_to(None, self.worker, number) for number in _numbers((args, kwargs))}
        with torch.set_grad_enabled(differentiable):
            result = run(
                functions()[name], _decoded(args, self.worker, there), _decoded(kwargs, self.worker, there),
                public=public and name.split(".")[-2 if name.endswith("__get__") else -1] in PointerTensor.PUBLIC,
            )  # fmt: skip
        for pointer in _pointers(result):
            pointer.disown()
        return _encoded(result), []


def serve_objects(worker: VirtualWorker, token: bytes, announce: Callable[[int], None]) -> None:
    """Hold objects for one program, until it closes its connection.

    Args:
        worker: holds them; its policy decides what it hands out.
        token: 16 secret bytes that the program must show.
        announce: called with the port.
    """
    with listen() as listener:
        announce(listener.getsockname()[1])
        link = accept(listener, worker.id, {_CALLER}, token)
    _serve(worker, link)


def serve_objects_to(
    worker: VirtualWorker, listener: socket.socket, identity: Identity, pins: Mapping[str, bytes]
) -> None:
    """Hold objects for the first program with a pinned key that calls, until it closes its connection.

    Args:
        worker: holds them; its policy decides what it hands out.
        listener: where the program calls; whoever else does is refused, and waiting goes on.
        identity: the worker's.
        pins: the public keys of programs that may call, by name.
    """
    context = tls.server_context(identity, pins)
    while True:
        sock, _ = listener.accept()
        with suppress(PeerError):
            link = dialing.answer(sock, context, identity, pins)
            break
    _serve(worker, link)


def _serve(worker: VirtualWorker, link: Link) -> None:
    link.patience, server = None, _Server(worker)
    try:
        while True:
            _answer(link, server, worker.id)
    except PeerError:
        link.close()


def _answer(link: Link, server: _Server, name: str) -> None:
    frame = link.receive(Kind.CALL)
    try:
        body, tensors = server.answer(frame)
    except TacitError as error:
        _refuse(link, type(error).__name__, str(error))
    except Exception as error:  # what PyTorch says may quote values, which stay here
        _refuse(link, "InputError", f"{name} could not do this: {type(error).__name__}")
    else:
        link.send(Kind.REPLY, tensors, msgspec.msgpack.encode(body))


def _refuse(link: Link, kind: str, text: str) -> None:
    link.send(Kind.ERROR, body=msgspec.msgpack.encode((kind, text)))


def _packed(value: Tensor) -> tuple[list[Any], list[Tensor]]:
    """A tensor, and its gradient if it has one, as integers for the wire."""
    parts = [value, value.grad] if value.is_leaf and value.grad is not None else [value]
    words = [part.detach().contiguous() for part in parts]
    if value.dtype not in _DTYPES.values():
        raise InputError(f"a tensor of {value.dtype} does not travel: convert it to float32")
    allowed = getattr(value, "allowed_users", None)
    about = (sorted(getattr(value, "tags", ())), getattr(value, "description", None))
    body = [
        str(value.dtype).removeprefix("torch."),
        value.requires_grad,
        *about,
        None if allowed is None else sorted(allowed),
    ]
    return body, [part.view(_AS_WORDS[part.dtype]) if part.dtype in _AS_WORDS else part for part in words]


def _unpacked(body: list[Any], frame: Frame) -> Tensor:
    dtype, differentiable, tags, description, allowed = body
    if not 1 <= len(frame.tensors) <= 2 or dtype not in _DTYPES:
        raise CodecError(f"{len(frame.tensors)} tensors of {dtype} came where one and its gradient are next")
    kind = _DTYPES[dtype]
    value, *grad = (one.view(kind) if kind in _AS_WORDS else one for one in frame.tensors)
    result: Any = value.requires_grad_(differentiable)
    result.grad = grad[0] if grad else None
    result.tags, result.description = set(tags), description
    if allowed is not None:
        result.allowed_users = frozenset(allowed)
    return value


def _encoded(value: Any) -> Any:
    """Arguments and results as plain data: what is not a number, a text or a list is named."""
    if isinstance(value, PointerTensor):
        return {"pointer": value.id_at_location}
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return {"setting": str(value)}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if value is Ellipsis:
        return {"slice": []}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(item) for item in value]}
    if isinstance(value, dict):
        return {"named": {str(key): _encoded(item) for key, item in value.items()}}
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InputError(f"a {type(value).__name__} cannot be sent to another process")


def _decoded(value: Any, worker: VirtualWorker, known: dict[int, PointerTensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, worker, known) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, item)] = value.items()
    if kind == "pointer":
        return known[item] if item in known else PointerTensor(worker, item)
    if kind == "named":
        return {key: _decoded(one, worker, known) for key, one in item.items()}
    if kind == "tuple":
        return tuple(_decoded(one, worker, known) for one in item)
    if kind == "slice":
        return slice(*item) if item else Ellipsis
    name = str(item).removeprefix("torch.")
    found = getattr(torch, name, None) if isinstance(item, str) and item.startswith("torch.") else torch.device(name)
    if not isinstance(found, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        raise InputError(f"{name} is no setting of a tensor")
    return found


def _pointers(value: Any) -> list[PointerTensor]:
    if isinstance(value, PointerTensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [found for item in items for found in _pointers(item)]


def _numbers(value: Any) -> list[int]:
    if isinstance(value, dict) and "pointer" in value:
        return [value["pointer"]]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [found for item in items for found in _numbers(item)]


def main() -> None:
    """Be a worker, for a program on this machine or, with ``--listen``, on another."""
    parser = argparse.ArgumentParser(prog="python -m tacit.party.objects", description=main.__doc__)
    parser.add_argument("name")
    parser.add_argument("--listen", help="host:port, for a program on another machine")
    parser.add_argument("--key", type=Path, help="this worker's key file")
    parser.add_argument("--caller", help="the program's public key")
    chosen = parser.parse_args()
    worker = VirtualWorker(id=chosen.name)
    if chosen.listen is None:
        serve_objects(worker, bytes.fromhex(sys.stdin.readline()), lambda port: print(port, flush=True))
        return
    if chosen.key is None or chosen.caller is None:
        parser.error("--listen needs --key and --caller")
    pins = {_CALLER: parse_key(chosen.caller)}
    with dialing.listen(parse_address(chosen.listen)) as listener:
        print(listener.getsockname()[1], flush=True)
        serve_objects_to(worker, listener, Identity.load(chosen.key), pins)


if __name__ == "__main__":
    try:
        main()
    except TacitError as error:
        sys.exit(f"error: {error}")
