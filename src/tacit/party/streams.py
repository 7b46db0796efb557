"""Bytes both ways over a socket, without waiting: as they are, or encrypted.

Both kinds take from the front of a list of buffers what they send, and fill the front of another with what arrives, so
that one loop can do both (`tacit.party.transport.Link`).
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from typing import Protocol

_VECTOR = 256
"""Buffers handed to one system call; Linux takes 1024."""
_RECORD = 1 << 14
"""Bytes that one record of TLS can hold. Each costs a tag, and a call on either side."""
_PIECE = 1 << 17
"""Bytes encrypted before any of them is sent; received before any is decrypted."""

_KEEPALIVE = {
    getattr(socket, name): value
    for name, value in {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}.items()
    if hasattr(socket, name)
}
"""Where the system lets a socket choose: after a minute of silence, and given up after another."""


class Stream(Protocol):
    """A connected socket."""

    @property
    def unsent(self) -> bool:
        """Whether `push` holds bytes that it has taken and not sent."""

    @property
    def buffered(self) -> bool:
        """Whether bytes have come that `pull` has not handed on: the socket does not tell of them any more."""

    def push(self, outgoing: list[memoryview]) -> bool:
        """Send what can be sent without waiting, and drop it from the list; whether anything moved.

        Raises:
            OSError: the connection is broken; an `ssl.SSLError` where TLS says so.
        """

    def pull(self, incoming: list[memoryview]) -> bool:
        """Fill the buffers with what has come, and drop those that are full; whether anything moved.

        Raises:
            OSError: the connection is closed or broken; an `ssl.SSLError` where TLS says so.
        """

    def fileno(self) -> int:
        """The socket's, to wait on."""

    def close(self) -> None:
        """Close the connection."""


class Plain:
    """A stream that is not encrypted, for sockets that do not leave the machine.

    Args:
        sock: connected; the stream owns it from now on.
    """

    unsent = buffered = False

    def __init__(self, sock: socket.socket) -> None:
        self._sock = _prepared(sock)

    def push(self, outgoing: list[memoryview]) -> bool:
        """See `Stream.push`."""
        try:
            return advance(outgoing, self._sock.sendmsg(outgoing[:_VECTOR]))
        except BlockingIOError:
            return False

    def pull(self, incoming: list[memoryview]) -> bool:
        """See `Stream.pull`."""
        try:
            count = self._sock.recvmsg_into(incoming[:_VECTOR])[0]
        except BlockingIOError:
            return False
        return advance(incoming, _some(count))

    def fileno(self) -> int:
        """The socket's, to wait on."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection."""
        _close(self._sock)


class Encrypted:
    """A stream under TLS; `handshake` comes first.

    OpenSSL works on memory, not on the socket. A call then moves many records instead of one, and nothing that it has
    begun has to be called again with the same arguments, as ``SSL_write`` on a full non-blocking socket must.

    Args:
        sock: connected; the stream owns it from now on.
        context: of this side, from `tacit.party.tls`.
        server_side: whether this side was called.
        route: what the called side may read of the first message before it answers, for the side that calls.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, route: str = "") -> None:
        self._sock = _prepared(sock)
        self._received, self._encrypted = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self._received, self._encrypted, server_side=server_side, server_hostname=route or None
        )
        self._unsent = memoryview(b"")
        self._landing = memoryview(bytearray(_PIECE))

    @property
    def unsent(self) -> bool:
        """See `Stream.unsent`."""
        return bool(self._unsent) or self._encrypted.pending > 0

    @property
    def buffered(self) -> bool:
        """See `Stream.buffered`."""
        return self._received.pending > 0 or self.tls.pending() > 0

    def handshake(self, patience: float) -> None:
        """Agree on keys and authenticate; whoever calls this checks with whom.

        Raises:
            OSError: the other side does not do its part, or not within ``patience`` seconds; an `ssl.SSLError` where
                TLS says so.
        """
        deadline, poll = time.monotonic() + patience, select.poll()
        while not self._agreed() or self.unsent:
            if (self.unsent and self.push([])) or self._receive():
                continue
            poll.register(self._sock, select.POLLIN | (select.POLLOUT if self.unsent else 0))
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError

    def _agreed(self) -> bool:
        """Go on with the handshake; whether it is done."""
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError:
            self._send_alert()
            raise
        return True

    def push(self, outgoing: list[memoryview]) -> bool:
        """See `Stream.push`."""
        if not self._unsent:
            if outgoing:
                advance(outgoing, self.tls.write(_piece(outgoing)))
            self._unsent = memoryview(self._encrypted.read())
        try:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            return False
        return True

    def pull(self, incoming: list[memoryview]) -> bool:
        """See `Stream.pull`."""
        # What has come may hold half a record: that moved, though nothing can be decrypted yet.
        return self._decrypt(incoming) or (self._receive() and (self._decrypt(incoming) or True))

    def fileno(self) -> int:
        """The socket's, to wait on."""
        return self._sock.fileno()

    def close(self) -> None:
        """Tell the other side, if that takes no waiting, and close the connection."""
        with contextlib.suppress(ssl.SSLError, ValueError):
            self.tls.unwrap()
        self._send_alert()
        _close(self._sock)

    def _receive(self) -> bool:
        try:
            count = self._sock.recv_into(self._landing)
        except BlockingIOError:
            return False
        self._received.write(self._landing[: _some(count)])
        return True

    def _decrypt(self, incoming: list[memoryview]) -> bool:
        moved = False
        if not self.buffered:
            return False  # asking OpenSSL would cost an exception
        try:
            while incoming:
                count: int = self.tls.read(len(incoming[0]), incoming[0])  # type: ignore[assignment]
                moved = advance(incoming, _some(count))
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            self._send_alert()
            raise
        return moved

    def _send_alert(self) -> None:
        """What TLS has left to say, if it can be said without waiting: not in the middle of a record."""
        if not self._unsent:
            with contextlib.suppress(OSError):
                self._sock.send(self._encrypted.read())


def tune(sock: socket.socket) -> None:
    """Have a connection over TCP send at once, and notice that the other machine is gone.

    A peer that is silent for long may be idle, or cut off without a word: the kernel asks, and breaks the link.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _prepared(sock: socket.socket) -> socket.socket:
    sock.setblocking(False)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        tune(sock)
    return sock


def _close(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # wakes another thread that waits; closing alone does not
    sock.close()


def _some(count: int) -> int:
    """Nothing at all is how a socket, and TLS likewise, says that the other side has closed."""
    if not count:
        raise ConnectionResetError
    return count


def _piece(outgoing: list[memoryview]) -> memoryview | bytes:
    """What to encrypt next: small buffers together, a large one in pieces."""
    first = outgoing[0]
    if len(first) >= _RECORD or len(outgoing) == 1:
        return first[:_PIECE]
    together, size = [], 0
    for view in outgoing:
        together.append(view[: _RECORD - size])
        size += len(together[-1])
        if size == _RECORD:
            break
    return b"".join(together)


def advance(views: list[memoryview], count: int) -> bool:
    """Drop the first ``count`` bytes of a list of buffers."""
    done = 0
    while done < len(views) and count >= len(views[done]):
        count -= len(views[done])
        done += 1
    del views[:done]
    if count:
        views[0] = views[0][count:]
    return True
