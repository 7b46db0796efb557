"""Frames over a TCP connection, both ways at once.

An opening is full-duplex: each party sends its shares while it receives the other's. One loop over a non-blocking
socket does both, so two large messages that cross cannot fill both kernels' buffers and wait for each other. (A second
thread for sending was as fast for megabytes and cost 13 µs more a round for small messages.) Sent integers are read
from the tensors' own memory, and received ones are written to the memory of the result.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import ssl
import time
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from tacit.errors import CodecError, PeerError
from tacit.party.streams import Plain, Stream
from tacit.party.tls import refusal
from tacit.wire import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    PREFIX_BYTES,
    Frame,
    Item,
    Kind,
    Landing,
    Prefix,
    head_bytes,
    items_of,
    parse_header,
    parse_prefix,
    parsed,
    payload_of,
)

PATIENCE_S = 600.0
TOKEN_BYTES = 16
_HOST = "127.0.0.1"
_SPIN_S = 0.0001
"""How long a link asks again before it sleeps: waking up takes longer than the peer's part of a small round."""


class Link:
    """A connection to one peer.

    A round carries `tag`, which the two set to the same before it: they then know that they are at the same run.

    Args:
        stream: to the peer; the link owns it from now on.
        peer: what errors call the other side.
        patience: seconds without a byte after which the peer counts as gone; ``None`` to wait for ever.
    """

    def __init__(self, stream: Stream, peer: str, patience: float | None = PATIENCE_S) -> None:
        self._stream, self.peer, self.patience, self.tag = stream, peer, patience, b""
        self._poll = select.poll()
        self._sent = self._received = 0
        self.bytes_opened = self.bytes_corrections = 0
        self.waited_s = self.moved_s = 0.0

    def send(self, kind: Kind, tensors: Sequence[Tensor] = (), body: bytes = b"") -> None:
        """Send one frame.

        Raises:
            PeerError: the peer is gone.
        """
        self._drain(self._outgoing(kind, tensors, body))
        if kind is Kind.CORRECTIONS:
            self.bytes_corrections += sum(item.nbytes for item in items_of(tensors))

    def receive(self, *kinds: Kind, limit: int = MAX_PAYLOAD_BYTES, header_limit: int = MAX_HEADER_BYTES) -> Frame:
        """Wait for one frame, whatever its tensors.

        Args:
            kinds: those to accept.
            limit: the largest payload to accept.
            header_limit: the largest header to accept.

        Raises:
            PeerError: the peer is gone, or `CodecError`: what it sent is not such a frame.
        """
        prefix = parse_prefix(self._read(PREFIX_BYTES), limit, header_limit)
        if prefix.kind not in kinds:
            raise CodecError(f"{self.peer} sent a frame of kind {prefix.kind.name} out of turn")
        head = parse_header(prefix, self._read(prefix.header_bytes))
        if head.number != self._received:
            raise CodecError(f"{self.peer} sent frame {head.number} where {self._received} is next")
        landing = Landing(head.items)
        self._fill(landing.views)
        self._received += 1
        return Frame(prefix.kind, head.number, head.body, landing.arrays())

    def receive_tensors(self, kind: Kind, items: Sequence[Item]) -> tuple[Tensor, ...]:
        """Wait for a frame whose tensors are known beforehand; anything else is refused before its payload is read.

        Raises:
            PeerError: the peer is gone, or `CodecError`: it sent something else.
        """
        landing = self._arrive(head_bytes(kind, self._received, items), items, [])
        return landing.tensors()

    def exchange(self, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One round: send these shares, receive the peer's, and put them together.

        Args:
            values: int64 shares, which add, and uint8 or bool shares, which XOR.

        Returns:
            The reconstructed values, in memory of their own.

        Raises:
            PeerError: the peer is gone, or `CodecError`: it sent something else, such as the shares of another step.
        """
        began, waited = time.perf_counter(), self.waited_s
        items = items_of(values)
        head = head_bytes(Kind.OPEN, self._sent, items, self.tag)
        # Where both have sent as many frames, the peer's head is the same as ours.
        expected = head if self._sent == self._received else head_bytes(Kind.OPEN, self._received, items, self.tag)
        payload = payload_of(values)
        self._sent += 1
        self.bytes_opened += sum(map(len, payload))
        outgoing = [memoryview(head), *payload]
        landing = self._arrive(expected, items, outgoing)
        self._drain(outgoing)
        opened = tuple(map(_reconstruct, values, landing.tensors()))
        self.moved_s += time.perf_counter() - began - (self.waited_s - waited)
        return opened

    def fileno(self) -> int:
        """The socket's, to wait on, unless something is `buffered` already."""
        return self._stream.fileno()

    @property
    def buffered(self) -> bool:
        """Whether bytes of the next frame have been taken from the socket."""
        return self._stream.buffered

    def close(self) -> None:
        """Close the connection; the peer's next call fails, and so does another thread's that waits."""
        self._stream.close()

    def _outgoing(self, kind: Kind, tensors: Sequence[Tensor], body: bytes) -> list[memoryview]:
        head = head_bytes(kind, self._sent, items_of(tensors), body)
        self._sent += 1
        return [memoryview(head), *payload_of(tensors)]

    def _arrive(self, expected: bytes, items: Sequence[Item], outgoing: list[memoryview]) -> Landing:
        """Wait for the frame with this head, sending meanwhile; a head that differs is refused once it is there."""
        head, landing = bytearray(len(expected)), Landing(items)
        incoming = [memoryview(head), *landing.views]
        while len(incoming) > len(landing.views):
            self._pump(outgoing, incoming)
        if head != expected:
            raise CodecError(f"{self.peer} sent something else than the frame that is due: {_why(head)}")
        while incoming:
            self._pump(outgoing, incoming)
        self._received += 1
        return landing

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        self._fill([memoryview(data)] if count else [])
        return data

    def _fill(self, views: Sequence[memoryview]) -> None:
        incoming = list(views)
        while incoming:
            self._pump([], incoming)

    def _pump(self, outgoing: list[memoryview], incoming: list[memoryview]) -> None:
        """Move what can be moved without waiting, or else wait until something can."""
        moved, stream = False, self._stream
        try:
            if outgoing or stream.unsent:
                moved = stream.push(outgoing)
            if incoming:
                moved |= stream.pull(incoming)
        except ssl.SSLError as error:
            raise refusal(error, self.peer) from None
        except OSError:
            raise PeerError(f"{self.peer} closed the connection: its process has ended or failed") from None
        if not moved:
            self._wait(bool(outgoing) or stream.unsent, bool(incoming))

    def _drain(self, outgoing: list[memoryview]) -> None:
        while outgoing or self._stream.unsent:
            self._pump(outgoing, [])

    def _wait(self, sending: bool, receiving: bool) -> None:
        began = time.perf_counter()
        self._poll.register(self._stream, (select.POLLOUT if sending else 0) | (select.POLLIN if receiving else 0))
        while not (ready := self._poll.poll(0)) and time.perf_counter() - began < _SPIN_S:
            os.sched_yield()  # the peer may need this very core
        if not ready:
            ready = self._poll.poll(None if self.patience is None else self.patience * 1000)
        self.waited_s += time.perf_counter() - began
        if not ready:
            raise PeerError(f"{self.peer} has been silent for {self.patience:g} seconds: is it still running?")

    def __repr__(self) -> str:
        return f"Link(to {self.peer})"


def _reconstruct(own: Tensor, theirs: Tensor) -> Tensor:
    """The sum or XOR, in the memory in which the peer's share arrived."""
    if own.dtype == torch.int64:
        return theirs.add_(own)
    return theirs.logical_xor_(own) if own.dtype == torch.bool else theirs.bitwise_xor_(own)


def _why(head: bytearray) -> str:
    try:
        prefix: Prefix = parse_prefix(head[:PREFIX_BYTES])
    except CodecError as error:
        return str(error)
    return f"the two are at different steps ({prefix.kind.name} came)"


class _Hello(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    name: str
    token: bytes


_greeting = msgspec.msgpack.Decoder(_Hello)


def listen() -> socket.socket:
    """A socket that listens on a free port of the loopback interface."""
    return socket.create_server((_HOST, 0), backlog=8)


def connect(port: int, name: str, peer: str, token: bytes, patience: float = PATIENCE_S) -> Link:
    """Connect to ``peer``, say who we are, and hear the same.

    Args:
        port: where the peer listens on the loopback interface.
        name: this process's name.
        peer: the name it must answer with.
        token: 16 secret bytes that the processes of one session share.
        patience: see `Link`.

    Raises:
        PeerError: nobody listens there, or it is somebody else.
    """
    try:
        link = Link(Plain(socket.create_connection((_HOST, port), timeout=patience)), peer, patience)
    except OSError as error:
        raise PeerError(f"{peer} cannot be reached on port {port}: {error.strerror or 'no answer'}") from None
    return _greet(link, name, token, {peer}, first=True)


def accept(listener: socket.socket, name: str, peers: set[str], token: bytes, patience: float = PATIENCE_S) -> Link:
    """Wait for one of ``peers`` to `connect`; whoever cannot show the token is an error.

    Raises:
        PeerError: nobody came, or somebody else.
    """
    listener.settimeout(patience)
    try:
        sock, _ = listener.accept()
    except TimeoutError:
        raise PeerError(f"none of {', '.join(sorted(peers))} connected within {patience:g} seconds") from None
    return _greet(Link(Plain(sock), "a caller", patience), name, token, peers, first=False)


def _greet(link: Link, name: str, token: bytes, peers: set[str], *, first: bool) -> Link:
    """Exchange greetings, whoever called speaking first; a link to anybody else is closed."""
    own = msgspec.msgpack.encode(_Hello(name, token))
    try:
        if first:
            link.send(Kind.HELLO, body=own)
        link.peer = _check_hello(link, token, peers)
        if not first:
            link.send(Kind.HELLO, body=own)
    except BaseException:
        link.close()
        raise
    return link


def _check_hello(link: Link, token: bytes, peers: set[str]) -> str:
    hello = parsed(_greeting, link.receive(Kind.HELLO, limit=0).body, f"the greeting of {link.peer}")
    if not secrets.compare_digest(hello.token, token) or hello.name not in peers:
        raise PeerError(f"{link.peer} is not of this session: it was refused")
    return hello.name
