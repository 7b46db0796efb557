"""A pair of real worker processes, alice's and bob's, and a test in the place of both front processes."""

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tacit.identity import Identity
from tacit.mpc.shares import Share, reconstruct, share
from tacit.mpc.steps import Role
from tacit.party import push
from tacit.party.dealing import DealtModel
from tacit.party.models import pack
from tacit.party.pool import PoolStore
from tacit.party.tickets import Ticket
from tacit.party.worker_calls import (
    Answer,
    Broke,
    Install,
    Installed,
    Pair,
    Paired,
    Ran,
    Run,
    Setup,
    Stock,
    Stocked,
    Unpaired,
)
from tacit.party.workers import WorkerProcess
from tacit.ring.fixed_point import FRACTION_BITS, encode
from tacit.ring.prg import SEED_BYTES, Prg

OWNER = Identity(bytes(range(32)))
SIZES = (1, 4)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def pushed(name: str = "small", sizes: Sequence[int] = SIZES) -> push.Push:
    return push.prepare(model(), [torch.zeros(1, 6)], name=name, owner=f"{OWNER!r}"[9:-1], batch_sizes=sizes)


class Both:
    """alice's and bob's worker, and what they answered."""

    def __init__(self, folder: Path, numbers: Sequence[int] = (0,)) -> None:
        self.push, self.number = pushed(), 0
        self.dealt = DealtModel(self.push.provider)
        self.identities = {"alice": Identity(bytes(32)), "bob": Identity(bytes([1] * 32))}
        self.pools = {role: PoolStore(folder / role, secrets.token_bytes(32), 10**9) for role in self.identities}
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.workers: dict[str, WorkerProcess] = {}
        self.answers: dict[str, asyncio.Queue[tuple[Answer, Sequence[Tensor]]]] = {}
        self.ended: dict[str, asyncio.Event] = {}
        self.started: dict[str, asyncio.Event] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Both"]:
        tasks = [asyncio.create_task(self._run(role)) for role in self.identities]
        self.listener.setblocking(False)
        door = asyncio.create_task(self._door())
        try:
            for role in self.identities:
                await self.install(role)
            yield self
        finally:
            for task in (*tasks, door):
                task.cancel()
            await asyncio.gather(*tasks, door, return_exceptions=True)
            self.listener.close()
            for pool in self.pools.values():
                pool.close()

    async def install(self, role: str) -> None:
        await self.up(role)
        body, tensors = pack(getattr(self.push, role))
        self.workers[role].call(Install(body), tensors)
        assert isinstance((await self.heard(role))[0], Installed)

    async def up(self, role: str) -> None:
        while role not in self.started:
            await asyncio.sleep(0)
        await asyncio.wait_for(self.started[role].wait(), 300)

    async def heard(self, role: str) -> tuple[Any, Sequence[Tensor]]:
        return await asyncio.wait_for(self.answers[role].get(), 300)

    async def pair(self) -> bytes:
        token = secrets.token_bytes(32)
        for role in ("alice", "bob"):
            self.workers[role].call(Pair(token))
        for role in ("alice", "bob"):
            assert (await self.heard(role))[0] == Paired(token)
        return token

    async def stock(self, size: int) -> Ticket:
        """Deal a ticket, put it in both pools, take it out of them, and have it expanded."""
        ticket = Ticket(self.push.digest, size, self.number)
        self.number += 1
        draw = self.dealt.draw(size)
        corrections = [tensor for tensors in draw.corrections for tensor in tensors]
        self.pools["bob"].put(ticket, draw.bob, corrections)
        self.pools["alice"].put_seeds({ticket: draw.alice})
        assert self.pools["alice"].lease(ticket.model, size) == [ticket]
        self.pools["bob"].claim([ticket])
        for role in ("alice", "bob"):
            self.workers[role].call(Stock(self.pools[role].voucher(ticket)))
        for role in ("alice", "bob"):
            assert (await self.heard(role))[0] == Stocked(ticket)
        return ticket

    def begin(self, ticket: Ticket, requests: Sequence[Tensor], absent: Sequence[int] = (), batch: int = 0) -> None:
        """Alice has the seeds of every second request's shares, from the first on, and the shares of the others."""
        rows, seeds = [len(value) for value in requests], [secrets.token_bytes(SEED_BYTES) for _ in requests]
        pairs = [share(encode(value), FRACTION_BITS, Prg(seed)) for value, seed in zip(requests, seeds, strict=True)]
        seeded = {position: seeds[position] for position in range(0, len(requests), 2)}
        hers = [pair[0].words for position, pair in enumerate(pairs) if position not in seeded]
        his = [pair[1].words for position, pair in enumerate(pairs) if position not in absent]
        self.workers["alice"].call(Run(batch, ticket, rows, [], seeded), hers)
        self.workers["bob"].call(Run(batch, ticket, rows, list(absent)), his)

    async def results(self) -> Tensor:
        shares = []
        for role in Role:
            ran, (words,) = await self.heard(role.value)
            assert isinstance(ran, Ran), ran
            shares.append(Share(words, ran.scales[0], role))
        return reconstruct(*shares)

    async def broken(self, role: str) -> str:
        broke, _ = await self.heard(role)
        assert isinstance(broke, Broke)
        assert isinstance((await self.heard(role))[0], Unpaired)
        return broke.text

    async def _run(self, role: str) -> None:
        peer = self.identities["bob" if role == "alice" else "alice"].public
        address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        seed = bytes(32) if role == "alice" else bytes([1] * 32)
        self.answers[role], self.started[role], self.ended[role] = asyncio.Queue(), asyncio.Event(), asyncio.Event()
        self.workers[role] = WorkerProcess(
            Setup(role, 0, seed, peer, address, 20.0),
            lambda worker: self.started[role].set(),
            lambda worker, answer, outputs: self.answers[role].put_nowait((answer, [*map(torch.from_numpy, outputs)])),
            lambda worker: (self.started[role].clear(), self.ended[role].set()),  # type: ignore[func-returns-value]
        )
        await self.workers[role].run()

    async def _door(self) -> None:
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(self.listener)
            self.workers["alice"].hand_over(sock)
