"""Frames over an asyncio connection: a `tacit.party.transport.Link` for a process that waits for many at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from tacit.errors import CodecError, PeerError
from tacit.party.quota import Quota
from tacit.wire import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    PREFIX_BYTES,
    Array,
    Frame,
    Kind,
    Landing,
    head_bytes,
    items_of,
    parse_header,
    parse_prefix,
    payload_of,
)

BUFFERED_BYTES = 1 << 18
"""What a channel reads ahead."""
_PIECE = 1 << 18
_IN_TRANSPORT = 1 << 17
"""What a transport is given before some of it has left: it keeps TLS records for much more than their bytes."""


class Channel:
    """A connection to one peer.

    Args:
        reader: of the connection.
        writer: likewise.
        peer: what errors call the other side.
        quota: what all connections of the peer may hold here together; by default this is its only one.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        peer: str,
        quota: Quota[Channel] | None = None,
    ) -> None:
        self._reader, self._writer, self.peer = reader, writer, peer
        self._quota: Quota[Channel] = Quota() if quota is None else quota
        self._sent = self._received = 0
        self._unsent: deque[bytes] = deque()
        self._sending: asyncio.Task[None] | None = None
        writer.transport.set_write_buffer_limits(high=_IN_TRANSPORT)

    def send(self, kind: Kind, tensors: Sequence[Tensor | Array] = (), body: bytes = b"") -> None:
        """Send one frame, without waiting for the peer to read it; what is sent is copied.

        Raises:
            PeerError: the peer is gone, or has not read for so long that too much waits for it: a slow reader.
        """
        if self._write(kind, tensors, body):
            return
        if slow := self._quota.exceeded_by():
            slow.abort()
        if self.closed:
            raise PeerError(f"{self.peer} does not read what it is sent: the connection was closed")

    async def deliver(self, kind: Kind, tensors: Sequence[Tensor | Array] = (), body: bytes = b"") -> None:
        """Send one frame, however much waits then, and wait until most of it has left.

        Raises:
            PeerError: the peer is gone.
        """
        self._write(kind, tensors, body)
        await self._flushed()
        if self.closed:
            raise PeerError(f"{self.peer} closed the connection")

    async def receive(
        self, *kinds: Kind, limit: int = MAX_PAYLOAD_BYTES, header_limit: int = MAX_HEADER_BYTES
    ) -> Frame:
        """Wait for one frame.

        Args:
            kinds: those to accept.
            limit: the largest payload to accept.
            header_limit: the largest header to accept.

        Raises:
            PeerError: the peer is gone, or `CodecError`: what it sent is not such a frame.
        """
        prefix = parse_prefix(await self._read(PREFIX_BYTES), limit, header_limit)
        if prefix.kind not in kinds:
            raise CodecError(f"{self.peer} sent a frame of kind {prefix.kind.name} out of turn")
        head = parse_header(prefix, await self._read(prefix.header_bytes))
        if head.number != self._received:
            raise CodecError(f"{self.peer} sent frame {head.number} where {self._received} is next")
        await self._quota.arrives(prefix.payload_bytes)
        try:
            landing = Landing(head.items)
            for view in landing.views:
                for start in range(0, len(view), _PIECE):
                    piece = view[start : start + _PIECE]
                    piece[:] = await self._read(len(piece))
        finally:
            self._quota.arrived(prefix.payload_bytes)
        self._received += 1
        return Frame(prefix.kind, head.number, head.body, landing.arrays())

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._writer.is_closing()

    def abort(self) -> None:
        """Close the connection at once; what was not sent yet is lost."""
        self._writer.transport.abort()
        if self._sending:
            self._sending.cancel()
            self._sending = None
        self._forget_unsent()

    async def close(self) -> None:
        """Close the connection once what was sent has left."""
        await self._flushed()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _write(self, kind: Kind, tensors: Sequence[Tensor | Array], body: bytes) -> bool:
        """Give the transport a frame, or have it wait its turn; whether the transport has it."""
        if self.closed:
            raise PeerError(f"{self.peer} closed the connection")
        frame = b"".join((head_bytes(kind, self._sent, items_of(tensors), body), *payload_of(tensors)))
        self._sent += 1
        if not self._sending and self._writer.transport.get_write_buffer_size() + len(frame) <= _IN_TRANSPORT:
            self._writer.write(frame)
            return True
        self._unsent.append(frame)
        self._quota.waits(self, len(frame))
        if not self._sending:
            self._sending = asyncio.get_running_loop().create_task(self._send_on())
        return False

    async def _send_on(self) -> None:
        """Give the transport what waits, as the peer reads it."""
        try:
            while self._unsent:
                frame = memoryview(self._unsent[0])
                for start in range(0, len(frame), _IN_TRANSPORT):
                    await self._writer.drain()
                    if self.closed:
                        raise ConnectionError
                    self._writer.write(frame[start : start + _IN_TRANSPORT])
                self._unsent.popleft()
                self._quota.left(self, len(frame))
        except OSError:
            self._forget_unsent()  # the peer is gone, as whoever reads finds out
        finally:
            self._sending = None

    async def _flushed(self) -> None:
        while self._sending:
            await asyncio.wait([self._sending])

    def _forget_unsent(self) -> None:
        self._unsent.clear()
        self._quota.closed(self)

    async def _read(self, count: int) -> bytes:
        try:
            return await self._reader.readexactly(count)
        except (asyncio.IncompleteReadError, OSError):
            raise PeerError(f"{self.peer} closed the connection") from None

    def __repr__(self) -> str:
        return f"Channel(to {self.peer})"
