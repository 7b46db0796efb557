"""The control session between alice and bob: messages both ways, one every second at least, so that silence tells."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from tacit.errors import PeerError
from tacit.party import messages
from tacit.party.channel import Channel
from tacit.party.messages import FromAlice, FromBob
from tacit.wire import Kind

SILENT_S = 6.0
"""After so long without a message, the other side counts as gone."""
_FRAME_BYTES = 0
"""Bytes of tensors in a frame: there are none."""
Said = TypeVar("Said")


class Control(Generic[Said]):
    """One side of it.

    Args:
        decoder: of what the other side says.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[Said]) -> None:
        self._decoder = decoder
        self._channel: Channel | None = None

    @property
    def connected(self) -> bool:
        """Whether the other side is there."""
        return self._channel is not None

    def say(self, message: FromAlice | FromBob) -> None:
        """Tell the other side something; nothing happens if it is not there."""
        if self._channel:
            with contextlib.suppress(PeerError):
                self._channel.send(Kind.CALL, body=messages.encode(message))

    def attach(self, channel: Channel) -> None:
        """Talk over this channel from now on; any other is closed."""
        self.close()
        self._channel = channel

    def detach(self, channel: Channel) -> bool:
        """This channel is closed; whether it was the one in use."""
        current = self._channel is channel
        if current:
            self._channel = None
        return current

    async def hear(self, channel: Channel) -> Said:
        """The next message on a channel.

        Raises:
            PeerError: the other side is gone or silent, or `CodecError`: it does not keep to the protocol.
        """
        try:
            async with asyncio.timeout(SILENT_S):
                frame = await channel.receive(Kind.CALL, limit=_FRAME_BYTES)
        except TimeoutError:
            raise PeerError(f"{channel.peer} has said nothing for {SILENT_S:g} seconds") from None
        return messages.decode(self._decoder, frame.body, channel.peer)

    async def listen(self, channel: Channel, heard: Callable[[Said], None]) -> None:
        """Hear messages until the other side is gone.

        Raises:
            PeerError: as `hear` does.
        """
        while True:
            heard(await self.hear(channel))

    def close(self) -> None:
        """Close the channel in use, if there is one."""
        if self._channel:
            self._channel.abort()
        self._channel = None
