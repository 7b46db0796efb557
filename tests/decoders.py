"""Every function that reads bytes from elsewhere, with bytes that it accepts, for property tests and the fuzzer.

A new decoder is one more line of `DECODERS`. It must raise `CodecError` or give a result, whatever the bytes.
"""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from tacit import wire
from tacit.identity import Identity, key_text
from tacit.party import (
    calls,
    client_hello,
    dealing_messages,
    messages,
    models,
    push,
    session_messages,
    tls,
    worker_calls,
)
from tacit.party.programs import decode_program, encode_program
from tacit.party.session_messages import Purpose, Welcome
from tacit.party.streams import Plain
from tacit.party.tickets import Ticket
from tacit.party.training import decode_training_program, encode_training_program, training_program
from tacit.party.transport import Link
from tacit.program.lowering import Context
from tacit.program.optimizers import Sgd
from tacit.program.recipe import Recipe
from tacit.wire import Kind

NONCE = bytes(range(32))
TICKET = Ticket("ab" * 32, 8, 5)


@dataclass(frozen=True)
class Decoder:
    """One of them.

    Args:
        name: of the target.
        decode: what it does; raises `CodecError` or not.
        examples: gives bytes that it accepts.
        modules: whose code is watched for coverage.
        packed: whether the bytes are msgpack, and may be changed as such.
    """

    name: str
    decode: Callable[[bytes], object]
    examples: Callable[[], Sequence[bytes]]
    modules: tuple[str, ...]
    packed: bool = True


def frames(number: int = 1 << 40) -> list[bytes]:
    words, bits = torch.arange(-3, 3).reshape(2, 3), torch.arange(11) % 3 > 0
    return [
        wire.encode(Kind.HELLO, number, body=b"hello"),
        wire.encode(Kind.OPEN, number, [words, bits, torch.zeros(0, 4, dtype=torch.uint8)]),
        wire.encode(Kind.CALL, number, [words.to(torch.int16), words.to(torch.int8)], b"x" * 70),
    ]


def headers() -> list[bytes]:
    found = []
    for frame in frames():
        prefix = wire.parse_prefix(frame[: wire.PREFIX_BYTES])
        found.append(frame[: wire.PREFIX_BYTES + prefix.header_bytes])
    return found


def _header(data: bytes) -> object:
    return wire.parse_header(wire.parse_prefix(data[: wire.PREFIX_BYTES], 1 << 20), data[wire.PREFIX_BYTES :])


def _received(data: bytes) -> object:
    """What a link makes of the bytes, and of the connection's end after them."""
    ours, theirs = socket.socketpair()
    link = Link(Plain(ours), "bob", 10.0)
    writing = threading.Thread(target=_write, args=(theirs, data))
    writing.start()
    try:
        return link.receive(*Kind, limit=1 << 20)
    finally:
        link.close()
        writing.join()


def _write(sock: socket.socket, data: bytes) -> None:
    with sock, contextlib.suppress(OSError):
        sock.sendall(data)


def hellos() -> list[bytes]:
    context, found = tls.client_context(Identity(NONCE), Identity(NONCE).public), []
    for route in (None, "worker-12"):
        outgoing = ssl.MemoryBIO()
        client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=route)
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        found.append(outgoing.read())
    return found


def session_bodies() -> list[bytes]:
    welcomes = (Welcome((1, 2), "alice", NONCE, 60), Welcome((1,), "bob", NONCE, 86400))
    messages = (
        *welcomes,
        session_messages.Greeting(1, Purpose.CLIENT, "clinic", NONCE, welcomes, b"", 0),
        session_messages.Greeting(1, Purpose.DATA, "bob", NONCE, welcomes[:1], NONCE, 3),
        session_messages.Accepted(NONCE),
        session_messages.Refused("no"),
    )
    return [session_messages.encode(message) for message in messages]


@cache
def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))


@cache
def _pushed() -> push.Push:
    owner = key_text(Identity(NONCE).public)
    return push.prepare(_model(), [torch.zeros(1, 1, 6, 6)], name="small", owner=owner, batch_sizes=[1, 2])


def parts() -> list[bytes]:
    pushed = _pushed()
    packed = map(models.pack, (pushed.alice, pushed.bob, pushed.provider))
    return [wire.encode(Kind.CALL, 0, tensors, body) for body, tensors in packed]


def _part(data: bytes) -> object:
    frame = wire.decode(data, 1 << 20)
    return models.unpack(frame.body, frame.tensors, "alice")


@cache
def training_programs() -> list[bytes]:
    recipe = Recipe(nn.Sequential(nn.Linear(3, 2)), nn.functional.mse_loss, Sgd(0.1, momentum=0.9), Context())
    return [encode_training_program(training_program(recipe, (2, 3)))]


def _calls() -> list[bytes]:
    messages = (
        calls.Join({"alice": 1, "bob": 65535}), calls.Deal(), calls.Run([16], True), calls.Load(["w"], [16]),
        calls.Step([0.5]), calls.Keep(["w"]), calls.Save("folder", "program", 3), calls.Install(b"program"),
    )  # fmt: skip
    return [calls.encode(message) for message in messages]


def _answers() -> list[bytes]:
    messages = (
        calls.Done(0.1, 0.2, 3), calls.Planned(1, 2, 3), calls.Held([16, 16]), calls.Restored(4), calls.Used(1.5),
        calls.Ran([16], 25, 178595, 0.003, 0.001, 0.001, {"conv": 0.1}),
    )  # fmt: skip
    return [calls.encode(message) for message in messages]


def _dealing() -> list[bytes]:
    messages = (
        dealing_messages.Want(TICKET.model, 8, 10, 3), dealing_messages.Coming(TICKET, bytes(16)),
        dealing_messages.Seeds([(TICKET, bytes(16))]), dealing_messages.Stored(), dealing_messages.Refused("full"),
        dealing_messages.Dealt([TICKET], [], "full"),
    )  # fmt: skip
    return [dealing_messages.encode(message) for message in messages]


def _worker_calls() -> list[bytes]:
    messages = (
        worker_calls.Setup("alice", 0, NONCE, NONCE, "127.0.0.1:7401", 1.0), worker_calls.Install(b"part"),
        worker_calls.Remove(TICKET.model), worker_calls.Pair(NONCE), worker_calls.Ping(),
        worker_calls.Run(1, TICKET, [1, 2], [0], {1: bytes(16)}),
    )  # fmt: skip
    return [worker_calls.encode(message) for message in messages]


def _worker_answers() -> list[bytes]:
    plan = worker_calls.Plan(8, 1, 2, 3, 4)
    return [
        worker_calls.encode(one)
        for one in (worker_calls.Installed(TICKET.model, [plan]), worker_calls.Paired(NONCE), worker_calls.Pong())
    ]


def _serving(decoder: Any, *examples: Any) -> tuple[Callable[[bytes], object], Callable[[], Sequence[bytes]]]:
    return lambda data: messages.decode(decoder, data, "bob"), lambda: [messages.encode(one) for one in examples]


_CLIENT = _serving(
    messages.client_calls,
    messages.Describe(1, "mnist"),
    messages.Ask(2, TICKET.model, 8, 50.0),
    messages.Ask(3, TICKET.model, 8, 50.0, bytes(16)),
    messages.Cancel(2),
)
_CLIENT_REPLY = _serving(
    messages.client_replies,
    messages.Described(1, TICKET.model, [([1, 28, 28], False)], 64),
    messages.Answer(2, 3, [16]),
)
_OWNER = _serving(
    messages.owner_calls, messages.Push(b"part"), messages.Pull("mnist"), messages.Pull("mnist", TICKET.model),
    messages.List(),
)  # fmt: skip
_OWNER_REPLY = _serving(messages.owner_replies, messages.Pulled(b"part"))
_FROM_ALICE = _serving(messages.from_alice, messages.Trimmed([TICKET], [TICKET]))
_FROM_BOB = _serving(messages.from_bob, messages.Trim([TICKET]))
_SERVING = ("tacit.party.messages", "tacit.wire")


def _programs() -> list[bytes]:
    return [encode_program(program) for program in _pushed().alice.programs.values()]


def _failures() -> list[bytes]:
    return [calls.encode(calls.Failure("it failed", True))]


_WIRE, _GRAPHS = "tacit.wire", "tacit.party.graphs"
_LINK = (_WIRE, "tacit.party.transport", "tacit.party.streams")

DECODERS = {
    one.name: one
    for one in (
        Decoder("frame", lambda data: wire.decode(data, 1 << 20), frames, (_WIRE,), False),
        Decoder("header", _header, headers, (_WIRE,), False),
        Decoder("link", _received, lambda: frames(0), _LINK, False),
        Decoder("route", client_hello.route_of, hellos, ("tacit.party.client_hello",), False),
        Decoder("session", session_messages.decode, session_bodies, ("tacit.party.session_messages",)),
        Decoder("program", decode_program, _programs, ("tacit.party.programs", _GRAPHS)),
        Decoder("training", decode_training_program, training_programs, ("tacit.party.training", _GRAPHS)),
        Decoder("part", _part, parts, ("tacit.party.models", "tacit.party.programs", _GRAPHS, _WIRE), False),
        Decoder("call", calls.decode_call, _calls, ("tacit.party.calls",)),
        Decoder("answer", calls.decode_answer, _answers, ("tacit.party.calls",)),
        Decoder("failure", calls.decode_failure, _failures, ("tacit.party.calls",)),
        Decoder("dealing", dealing_messages.decode, _dealing, ("tacit.party.dealing_messages",)),
        Decoder("worker-call", worker_calls.decode_call, _worker_calls, ("tacit.party.worker_calls",)),
        Decoder("client-call", *_CLIENT, _SERVING),
        Decoder("client-reply", *_CLIENT_REPLY, _SERVING),
        Decoder("owner-call", *_OWNER, _SERVING),
        Decoder("owner-reply", *_OWNER_REPLY, _SERVING),
        Decoder("from-alice", *_FROM_ALICE, _SERVING),
        Decoder("from-bob", *_FROM_BOB, _SERVING),
        Decoder("worker-answer", worker_calls.decode_answer, _worker_answers, ("tacit.party.worker_calls",)),
    )
}


def _planted(data: bytes) -> object:
    """Fails on input that chance alone would not find: it takes three right bytes, one after the other."""
    message = wire.parse_prefix(data[: wire.PREFIX_BYTES], 1 << 20)
    for position, byte in enumerate(b"bad"):
        if data[wire.PREFIX_BYTES + position : wire.PREFIX_BYTES + position + 1] != bytes([byte]):
            return message
    raise ValueError("the planted fault")


def planted() -> Decoder:
    """A decoder with a fault."""
    return Decoder("planted", _planted, frames, (_WIRE,), False)
