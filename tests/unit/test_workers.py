"""Workers of alice's and bob's: real processes that pair, stock tickets, run batches, break and start again."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
import torch
import uvloop

from tacit.errors import PeerError
from tacit.party import meeting
from tacit.party.address import Address
from tacit.party.tickets import Ticket
from tacit.party.worker_calls import Run
from workers import Both, model

REQUESTS = [torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows)) for rows in (1, 2)]


def refused(both: Both, token: bytes) -> None:
    """Call alice's worker with another token than the two were told."""
    alice, bob = (both.identities[role] for role in ("alice", "bob"))
    with pytest.raises(PeerError):
        meeting.call(Address("127.0.0.1", both.listener.getsockname()[1]), bob, alice.public, token, 0)


def test_batches_run_and_a_broken_pair_starts_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        both, expected = Both(tmp_path), model()(torch.cat(REQUESTS))
        async with both.running():
            first = await both.pair()
            await asyncio.to_thread(refused, both, b"")
            tickets = [await both.stock(4), await both.stock(4), await both.stock(1)]
            both.begin(tickets[0], REQUESTS)
            results = await both.results()
            assert results.shape == (4, 3)
            torch.testing.assert_close(results[:3].float(), expected, atol=1e-3, rtol=0)

            # Where bob has no share of a request, its rows are noise, and the others' what they should be.
            both.begin(tickets[1], REQUESTS, absent=[0])
            results = await both.results()
            torch.testing.assert_close(results[1:3].float(), expected[1:], atol=1e-3, rtol=0)
            assert (results[0].float() - expected[0]).abs().max() > 0.01

            # A ticket is used once, and what was stocked for a link does not outlive it.
            both.begin(tickets[0], REQUESTS)
            for role in ("alice", "bob"):
                assert "was not stocked here" in await both.broken(role)
            assert await both.pair() != first
            both.begin(tickets[2], REQUESTS[:1])
            for role in ("alice", "bob"):
                assert "was not stocked here" in await both.broken(role)

            # Batches of different numbers do not meet.
            await both.pair()
            ticket = await both.stock(1)
            for role, batch in (("alice", 1), ("bob", 2)):
                both.workers[role].call(_run(ticket, batch), [torch.zeros(1, 6, dtype=torch.int64)])
            broken = [await both.broken(role) for role in ("alice", "bob")]
            assert any("something else than the frame that is due" in text for text in broken)

            # One of the two is killed while it runs: the other one says so, and both go on with another process.
            await both.pair()
            ticket = await both.stock(1)
            both.workers["alice"].call(_run(ticket, 3), [torch.zeros(1, 6, dtype=torch.int64)])
            pid = both.workers["bob"].pid
            assert pid
            os.kill(pid, signal.SIGKILL)
            assert "bob closed the connection" in await both.broken("alice")
            await asyncio.wait_for(both.ended["bob"].wait(), 300)
            await both.install("bob")
            assert both.workers["bob"].pid != pid
            await both.pair()
            both.begin(await both.stock(4), REQUESTS)
            torch.testing.assert_close((await both.results())[:3].float(), expected, atol=1e-3, rtol=0)

    uvloop.run(scenario())


def test_a_worker_that_hangs_where_something_is_due_is_started_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        both = Both(tmp_path)
        async with both.running():
            await both.pair()
            worker = both.workers["alice"]
            # One that is only slow to have something to say, as what is due is said, goes on.
            worker.expect(300.0)
            await both.stock(1)
            first = worker.pid
            assert first
            os.kill(first, signal.SIGSTOP)
            worker.expect(0.2)
            await asyncio.wait_for(both.ended["alice"].wait(), 30)
            await both.install("alice")
            assert worker.pid != first
            with pytest.raises(ProcessLookupError):
                os.kill(first, 0)
            await both.pair()
            both.begin(await both.stock(4), REQUESTS)
            expected = model()(torch.cat(REQUESTS))
            torch.testing.assert_close((await both.results())[:3].float(), expected, atol=1e-3, rtol=0)

    asyncio.run(scenario())


def _run(ticket: Ticket, batch: int) -> Run:
    return Run(batch, ticket, [1])
