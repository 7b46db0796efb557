"""Frames over asyncio: what a peer may leave unread or half sent, on all its connections together."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
import torch

from tacit.errors import PeerError
from tacit.party.channel import Channel
from tacit.party.quota import Quota
from tacit.wire import Kind, head_bytes, items_of

MB = 1 << 20
FRAME = torch.arange(MB // 8)
"""A payload of a megabyte."""


async def opened(end: socket.socket, quota: Quota[Channel] | None = None) -> Channel:
    reader, writer = await asyncio.open_connection(sock=end)
    return Channel(reader, writer, "clinic", quota)


@contextlib.asynccontextmanager
async def connections(count: int, quota: Quota[Channel]) -> AsyncIterator[tuple[list[Channel], list[Channel]]]:
    """The ends of a party, under one quota, and those of the client."""
    pairs = [socket.socketpair() for _ in range(count)]
    ends = [await opened(ours, quota) for ours, _ in pairs], [await opened(theirs) for _, theirs in pairs]
    try:
        async with asyncio.timeout(30):
            yield ends
    finally:
        for channel in (*ends[0], *ends[1]):
            channel.abort()


def test_what_waits_for_a_client_counts_on_all_its_connections_together() -> None:
    async def scenario() -> None:
        quota: Quota[Channel] = Quota(unread=16 * MB)
        async with connections(8, quota) as (ours, theirs):
            # A client that reads on one connection only: the others lose what they leave unread, that one nothing.
            for number in range(10):
                for channel in ours:
                    with contextlib.suppress(PeerError):
                        channel.send(Kind.REPLY, [FRAME])
                assert quota.unread <= 18 * MB
                assert torch.equal((await theirs[0].receive(Kind.REPLY)).tensors[0], FRAME)
                assert not ours[0].closed, number
            left = [channel for channel in ours[1:] if not channel.closed]
            assert 0 < len(left) < 7
            for channel in ours:
                channel.abort()
            assert not quota.unread

    asyncio.run(scenario())


def test_a_client_that_reads_late_has_the_frame_however_large_and_small_ones_after_it() -> None:
    async def scenario() -> None:
        quota: Quota[Channel] = Quota(unread=2 * MB)
        async with connections(2, quota) as (ours, theirs):
            large = torch.arange(5 * MB // 8)
            ours[0].send(Kind.REPLY, [large])
            for channel in ours:
                channel.send(Kind.REPLY, [FRAME[:80_000]])
                channel.send(Kind.REPLY, body=b"refused")
            await asyncio.sleep(0.05)
            assert torch.equal((await theirs[0].receive(Kind.REPLY)).tensors[0], large)
            for channel in theirs:
                assert torch.equal((await channel.receive(Kind.REPLY)).tensors[0], FRAME[:80_000])
                assert (await channel.receive(Kind.REPLY)).body == b"refused"
            assert not quota.unread
            # Two that large are too many.
            ours[0].send(Kind.REPLY, [large])
            with pytest.raises(PeerError, match="does not read"):
                ours[0].send(Kind.REPLY, [large])

    asyncio.run(scenario())


def test_what_was_sent_arrives_before_the_end_and_nothing_waits_for_who_has_left() -> None:
    async def scenario() -> None:
        quota: Quota[Channel] = Quota()
        async with connections(2, quota) as (ours, theirs):
            ours[0].send(Kind.REPLY, [FRAME, FRAME])
            closing = asyncio.create_task(ours[0].close())
            assert len((await theirs[0].receive(Kind.REPLY)).tensors) == 2
            await closing
            ours[1].send(Kind.REPLY, [FRAME])
            theirs[1].abort()
            with pytest.raises(PeerError, match="closed the connection"):
                await ours[1].receive(Kind.CALL)
            while quota.unread:
                await asyncio.sleep(0.01)
            with pytest.raises(PeerError, match="closed the connection"):
                await ours[1].deliver(Kind.REPLY, [FRAME])

    asyncio.run(scenario())


def test_what_is_half_sent_counts_on_all_connections_together_and_is_read_in_the_end() -> None:
    async def scenario() -> None:
        quota: Quota[Channel] = Quota(arriving=3 * MB)
        async with connections(8, quota) as (ours, theirs):
            receiving = [asyncio.create_task(channel.receive(Kind.CALL)) for channel in ours]
            payload = FRAME.numpy().tobytes()
            for channel in theirs:
                channel._writer.write(head_bytes(Kind.CALL, 0, items_of([FRAME]), b""))
                channel._writer.write(payload[: MB // 2])
            await asyncio.sleep(0.1)
            assert quota.arriving == 3 * MB
            receiving[7].cancel()
            for channel in theirs[:7]:
                channel._writer.write(payload[MB // 2 :])
            frames = await asyncio.gather(*receiving[:7])
            assert all(torch.equal(frame.tensors[0], FRAME) for frame in frames)
            assert not quota.arriving

    asyncio.run(scenario())
