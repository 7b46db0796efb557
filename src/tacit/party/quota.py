"""What all connections of one peer together may hold of this process's memory.

That is what arrives from the peer, and what the peer leaves unread. A peer that does not read loses the connection on
which most waits for it; one that sends much on many connections at once is read a frame after the other. One frame is
always let through, however large: the answer to a client's largest batch is, over any link.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Hashable
from typing import Generic, TypeVar

UNREAD_BYTES = 1 << 26
"""What may wait for a peer to read it, beside the largest frame that it was sent."""
ARRIVING_BYTES = 1 << 26
"""What may be arriving from it, if that is more than one frame."""
_FRAME_COST = 256
"""What a frame that waits takes besides its bytes, and more."""
End = TypeVar("End", bound=Hashable)


class Quota(Generic[End]):
    """Of one peer; its connections are this side's ends of them.

    Args:
        unread: bytes that may wait for the peer to read them.
        arriving: bytes that may be arriving from it.
    """

    def __init__(self, unread: int = UNREAD_BYTES, arriving: int = ARRIVING_BYTES) -> None:
        self._limit, self._arriving_limit = unread, arriving
        self._unread: Counter[End] = Counter()
        self._largest = 0
        self._arriving, self._freed = 0, asyncio.Event()

    @property
    def unread(self) -> int:
        """Bytes that wait, on all connections."""
        return self._unread.total()

    @property
    def arriving(self) -> int:
        """Bytes of frames that have begun to arrive and not ended."""
        return self._arriving

    def waits(self, end: End, count: int) -> None:
        """A frame of so many bytes waits for the peer to read it."""
        self._unread[end] += count + _FRAME_COST
        self._largest = max(self._largest, count + _FRAME_COST)

    def exceeded_by(self) -> End | None:
        """The connection on which most waits, if more waits on all of them than may."""
        if self.unread - self._largest <= self._limit:
            return None
        return max(self._unread, key=self._unread.__getitem__)

    def left(self, end: End, count: int) -> None:
        """A frame that waited has left."""
        self._unread[end] -= count + _FRAME_COST

    def closed(self, end: End) -> None:
        """Nothing waits any more on a connection."""
        del self._unread[end]

    async def arrives(self, count: int) -> None:
        """A frame of so many bytes is next: waits while others take the room. `arrived` has to follow."""
        while count and self._arriving and self._arriving + count > self._arriving_limit:
            self._freed.clear()
            await self._freed.wait()
        self._arriving += count

    def arrived(self, count: int) -> None:
        """It has arrived, or never will."""
        self._arriving -= count
        self._freed.set()
