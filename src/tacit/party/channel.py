"""Frames over an asyncio connection: a `tacit.party.transport.Link` for a process that waits for many at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from torch import Tensor

from tacit.errors import CodecError, PeerError
from tacit.wire import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    PREFIX_BYTES,
    Frame,
    Kind,
    Landing,
    head_bytes,
    items_of,
    parse_header,
    parse_prefix,
    payload_of,
)

BUFFERED_BYTES = 1 << 20
"""What a channel reads ahead."""
_UNREAD_BYTES = 1 << 26
"""What may wait for a peer to read it, before the peer counts as gone."""
_PIECE = 1 << 18


class Channel:
    """A connection to one peer.

    Args:
        reader: of the connection.
        writer: likewise.
        peer: what errors call the other side.
        unread: bytes that may wait for the peer to read them.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str, unread: int = _UNREAD_BYTES
    ) -> None:
        self._reader, self._writer, self.peer, self._unread = reader, writer, peer, unread
        self._sent = self._received = 0

    def send(self, kind: Kind, tensors: Sequence[Tensor] = (), body: bytes = b"") -> None:
        """Send one frame, without waiting for the peer to read it; what is sent is copied.

        Raises:
            PeerError: the peer is gone, or has not read for so long that too much waits for it: a slow reader.
        """
        self._write(kind, tensors, body)
        if self._writer.transport.get_write_buffer_size() > self._unread:
            self.abort()
            raise PeerError(f"{self.peer} does not read what it is sent: the connection was closed")

    async def deliver(self, kind: Kind, tensors: Sequence[Tensor] = (), body: bytes = b"") -> None:
        """Send one frame, however large, and wait until most of it has left.

        Raises:
            PeerError: the peer is gone.
        """
        self._write(kind, tensors, body)
        try:
            await self._writer.drain()
        except OSError:
            raise PeerError(f"{self.peer} closed the connection") from None

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
        landing = Landing(head.items)
        for view in landing.views:
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                piece[:] = await self._read(len(piece))
        self._received += 1
        return Frame(prefix.kind, head.number, head.body, landing.tensors())

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._writer.is_closing()

    def abort(self) -> None:
        """Close the connection at once; what was not sent yet is lost."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close the connection once what was sent has left."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _write(self, kind: Kind, tensors: Sequence[Tensor], body: bytes) -> None:
        if self.closed:
            raise PeerError(f"{self.peer} closed the connection")
        self._writer.writelines([head_bytes(kind, self._sent, items_of(tensors), body), *payload_of(tensors)])
        self._sent += 1

    async def _read(self, count: int) -> bytes:
        try:
            return await self._reader.readexactly(count)
        except (asyncio.IncompleteReadError, OSError):
            raise PeerError(f"{self.peer} closed the connection") from None

    def __repr__(self) -> str:
        return f"Channel(to {self.peer})"
