"""Inside a process of a service under test: it dies, or stops, where the test says.

Nothing of tacit knows of it: the test puts this folder on PYTHONPATH and names a folder in TACIT_CRASHES. A *point*
says who is at it and what he is about to do or has just done: ``alice sends Begin to bob``, ``bob got Begin from
alice``, ``alice's worker opens round 3``. The file ``armed`` holds lines of ``kill POINT`` or ``stop POINT``. The first
one is carried out when its process comes there, and is moved to the file ``hit`` before. Workers write into ``notes``
what they use, before they use it.
"""

import asyncio
import functools
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from torch import Tensor

from tacit.party import driver, session, vouchers, worker_calls, workers
from tacit.party.channel import Channel
from tacit.party.transport import Link
from tacit.wire import Frame, Kind

FOLDER = Path(os.environ["TACIT_CRASHES"])
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
CLIENTS = ("clinic", "lab")
PEERS = {"the front process": "the front", **dict.fromkeys(CLIENTS, "a client")}


def who() -> str:
    """The party that this process is, or whose worker it is."""
    arguments = sys.orig_argv
    if "tacit.party.service" not in arguments:
        return f"{os.environ['TACIT_CRASHES_PARTY']}'s worker"
    os.environ["TACIT_CRASHES_PARTY"] = party = arguments[arguments.index("tacit.party.service") + 1]
    return party


ME = who()
T = TypeVar("T")


def come_to(point: str) -> None:
    """Die here, if that is what the test wants."""
    armed = FOLDER / "armed"
    if wanted := armed.read_text():
        first, *rest = wanted.splitlines()
        verb, _, where = first.partition(" ")
        if where == point:
            left = armed.with_suffix(".left")
            left.write_text("\n".join(rest))
            append("hit", first)
            left.replace(armed)
            os.kill(os.getpid(), SIGNALS[verb])


def note(**facts: object) -> None:
    append("notes", json.dumps({"who": ME, **facts}))


def append(name: str, line: str) -> None:
    """Write a line that stays if the process is killed right afterwards."""
    descriptor = os.open(FOLDER / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def what(kind: Kind, body: bytes) -> str:
    """The name of a message, or of the kind of a frame that has none."""
    try:
        said = msgspec.msgpack.decode(body) if body else [kind.name]
        return str(said["type"] if isinstance(said, dict) else said[0])
    except (msgspec.MsgspecError, TypeError, LookupError):
        return "nonsense"


def peer(end: Link | Channel) -> str:
    return PEERS.get(end.peer, "the worker" if end.peer.startswith("worker ") else end.peer)


class Run:
    """What a worker has been told to run, and how far it has come."""

    called: worker_calls.Run
    requests: Sequence[str] = ()
    rounds = 0


def got(end: Link | Channel, frame: Frame) -> None:
    name = what(frame.kind, frame.body)
    if name == "Run":
        called = worker_calls.decode_call(frame.body)
        assert isinstance(called, worker_calls.Run)
        seeds = [hashlib.sha256(seed).hexdigest() for seed in called.seeds.values()]
        Run.called, Run.requests = called, [*seeds, *map(digest, frame.tensors)]
    come_to(f"{ME} got {name} from {peer(end)}")


def sending(send: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(send)
    def wrapped(self: Link | Channel, kind: Kind, tensors: Sequence[Tensor] = (), body: bytes = b"") -> T:
        come_to(f"{ME} sends {what(kind, body)} to {peer(self)}")
        result = send(self, kind, tensors, body)
        sent = functools.partial(come_to, f"{ME} sent {what(kind, body)} to {peer(self)}")
        if isinstance(self, Channel):
            asyncio.get_running_loop().call_soon(sent)  # the loop has written it by then
        else:
            sent()
        return result

    return wrapped


def installed(owner: Any, name: str) -> Callable[..., Any]:
    """Put a function into the place of another one, which it is given first."""

    def install(function: Callable[..., Any]) -> Callable[..., Any]:
        before = getattr(owner, name)
        setattr(owner, name, functools.wraps(before)(lambda *args, **named: function(before, *args, **named)))
        return function

    return install


def install() -> None:
    workers._AGAIN_S = (0.0, 0.5, 1.0)  # type: ignore[assignment]  # one that dies so often is not started for 15 s

    Channel._write, Link.send = sending(Channel._write), sending(Link.send)  # type: ignore[method-assign]
    receive = Channel.receive

    @functools.wraps(receive)
    async def received(self: Channel, *kinds: Kind, **limits: int) -> Frame:
        frame = await receive(self, *kinds, **limits)
        got(self, frame)
        return frame

    Channel.receive = received  # type: ignore[method-assign]

    @installed(Link, "receive")
    def from_link(receive: Callable[..., Frame], self: Link, *kinds: Kind, **limits: int) -> Frame:
        frame = receive(self, *kinds, **limits)
        got(self, frame)
        return frame

    @installed(Link, "receive_tensors")
    def tensors_from_link(receive: Callable[..., Any], self: Link, kind: Kind, items: Any) -> Any:
        tensors = receive(self, kind, items)
        come_to(f"{ME} got {kind.name} from {peer(self)}")
        return tensors

    @installed(session.Leg, "step")
    def step(before: Callable[..., None], self: session.Leg, event: session.Event) -> None:
        come_to(f"{ME} in a session that is {self.state}: {event}")
        before(self, event)

    @installed(Link, "exchange")
    def exchange(before: Callable[..., Any], self: Link, values: Sequence[Tensor]) -> Any:
        Run.rounds += 1
        if Run.rounds == 1:
            note(opens=msgspec.to_builtins(Run.called.ticket), masked=digest(*values))
        come_to(f"{ME} opens round {Run.rounds}")
        return before(self, values)

    @installed(driver, "drive")
    def drive(before: Callable[..., Any], protocol: Any, pool: Any, link: Link, meter: Any) -> Any:
        Run.rounds, ticket = 0, msgspec.to_builtins(Run.called.ticket)
        note(runs=ticket, batch=Run.called.batch, token=link.tag.hex(), requests=Run.requests)
        result = before(protocol, pool, link, meter)
        note(ran=ticket, rounds=Run.rounds)
        return result

    @installed(vouchers, "redeem")
    def redeem(before: Callable[..., Any], voucher: vouchers.Voucher) -> Any:
        seed, corrections = before(voucher)
        note(redeems=msgspec.to_builtins(voucher.ticket), seed=hashlib.sha256(seed).hexdigest())
        return seed, corrections

    @installed(session.Called, "__init__")
    def init(
        before: Callable[..., None], self: session.Called, party: str, caller: str, *rest: Any, **named: Any
    ) -> None:
        if caller in CLIENTS and "TACIT_CRASHES_LIFETIME_S" in os.environ:
            named["lifetime_s"] = int(os.environ["TACIT_CRASHES_LIFETIME_S"])
        before(self, party, caller, *rest, **named)
