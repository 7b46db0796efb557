"""The front process of alice or bob: one address, sessions of clients and owners, workers, and an end in good order.

What differs between the two is in `tacit.party.alice` and `tacit.party.bob`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from tacit.identity import key_text
from tacit.party import http
from tacit.party.channel import Channel
from tacit.party.clients import Clients
from tacit.party.cluster_file import ALICE, BOB
from tacit.party.crew import Crew
from tacit.party.entrance import Entrance, Handler
from tacit.party.house import House
from tacit.party.jobs.desk import JobDesk, Surroundings
from tacit.party.jobs.keeping import JobKeeper
from tacit.party.jobs.planned import PlannedJob
from tacit.party.keeping import MAX_MODEL_BYTES, Keeper
from tacit.party.meeting import route
from tacit.party.refill import Line
from tacit.party.refusal import Reason, Refusal
from tacit.party.session import Session
from tacit.party.session_messages import Purpose
from tacit.party.tasks import Tasks
from tacit.party.worker_calls import Setup
from tacit.wire import Kind

STARTING = Refusal(Reason.BUSY, "the service is starting: retry in a moment", 1.0)
STOPPING = Refusal(Reason.STOPPING, "the service is stopping: retry in a moment", 5.0)
PATIENCE_S = 10.0
"""How long a worker waits in a run for the other party's."""
FINISHING_S = PATIENCE_S + 5.0
"""How long what runs may take to end."""


class Front(ABC):
    """See the module.

    Args:
        house: the party's.
    """

    crew: Crew
    clients: Clients
    jobs: JobDesk

    def __init__(self, house: House) -> None:
        self.house, self.tasks = house, Tasks()
        self.stopping = False
        self.levels: Mapping[Line, int] = {}

    async def run(self, listener: socket.socket, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set; then refuse what waits, finish what runs, and leave.

        Raises:
            Exception: something failed that nobody foresaw, or a disk that must not fail.
        """
        house, member = self.house, self.house.cluster.party(self.house.name)
        handlers = {Purpose.CLIENT: self.clients.serve, Purpose.OWNER: self._owner, **self.handlers()}
        entrance = Entrance(
            house.name, house.identity, house.cluster, handlers, self._hand_over, house.metrics, house.log
        )
        monitor = await http.serve(member.http_at, house.metrics.text, self.readiness) if member.http_at else None
        for work in (entrance.run(listener), self.crew.run(), self._ticking()):
            self.tasks.start(work)
        self.begin()
        self.jobs.start()
        house.log("started", address=member.address, workers=len(self.crew.workers))
        # What has been imported stays: a collection that looks through it takes 10 ms.
        gc.freeze()
        try:
            await self._until(stop)
            self.stopping, self.clients.closed = True, STOPPING
            house.log("stopping", requests=len(self.clients.requests))
            jobs = asyncio.ensure_future(asyncio.to_thread(self.jobs.stop))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FINISHING_S):
                    await self.finish()
            await jobs
        finally:
            await entrance.close()
            await asyncio.to_thread(self.jobs.close)
            await self.leave()
            await self.tasks.close()
            if monitor:
                monitor.close()
            house.pool.close()
            house.jobs.close()
            house.log("stopped")

    @abstractmethod
    def handlers(self) -> dict[Purpose, Handler]:
        """Who takes sessions of other purposes than a client's and an owner's."""

    @abstractmethod
    def begin(self) -> None:
        """Start what is needed beside sessions and workers."""

    @abstractmethod
    async def tick(self) -> None:
        """Do what is to be done every second."""

    @abstractmethod
    async def finish(self) -> None:
        """Refuse what waits, and wait until nothing runs."""

    @abstractmethod
    async def leave(self) -> None:
        """End what `begin` started."""

    @abstractmethod
    def readiness(self) -> dict[str, object]:
        """Whether requests can be served, and what is in the way; ``ready`` is a key of it."""

    @abstractmethod
    def set_loaded(self, name: str, loaded: bool) -> None:
        """An owner wants a model served, or not."""

    @abstractmethod
    def vault_changed(self) -> None:
        """Models came or went."""

    def keeper(self) -> Keeper:
        """What owners may have done here; it works in other threads."""
        loop = asyncio.get_running_loop()

        def gone(digest: str) -> None:
            self.house.pool.drop_model(digest)
            loop.call_soon_threadsafe(self.vault_changed)

        return Keeper(
            self.house.name,
            self.house.vault,
            self.house.log,
            JobKeeper(self.house.name, self.house.jobs, self.jobs, gone=self.house.pool.drop_model),
            came=lambda part: _ignored(loop.call_soon_threadsafe(self.vault_changed)),
            gone=gone,
            set_loaded=lambda name, loaded: _ignored(loop.call_soon_threadsafe(self.set_loaded, name, loaded)),
            served=lambda: list(self.crew.served),
            tickets=self.house.pool.levels,
        )

    def thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Start a thread; if the disk fails it, or something that nobody foresaw, the process ends."""
        loop = asyncio.get_running_loop()

        def guarded() -> None:
            try:
                work()
            except Exception as error:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self.tasks.fail, error)

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def desk(
        self, say: Callable[[Any], None], want: Callable[[PlannedJob, int], None] = lambda job, ahead: None
    ) -> JobDesk:
        """The party's jobs; they work in a thread of their own.

        Args:
            say: sends the other party a message, in the loop's thread.
            want: see `Surroundings`.
        """
        loop, house = asyncio.get_running_loop(), self.house

        def send(message: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(say, message)

        number = house.cluster.serving.workers
        around = Surroundings(
            house.name, house.identity, house.cluster, number, house.pool, send, want, house.log, house.metrics
        )
        return JobDesk(house.jobs, around)

    def _hand_over(self, wanted: str, sock: socket.socket) -> None:
        """Give a connection to the worker that it is for."""
        if wanted == route(self.house.cluster.serving.workers):
            self.jobs.hand_over(sock)
        else:
            self.crew.hand_over(wanted, sock)

    async def _owner(self, channel: Channel, session: Session) -> None:
        owner, keeper = key_text(self.house.cluster.owners[session.caller].public), self.keeper()
        while True:
            frame = await channel.receive(Kind.CALL, limit=MAX_MODEL_BYTES)
            session.require_live(time.monotonic())
            body, tensors = await asyncio.to_thread(keeper.handle, frame, owner, session.caller)
            await channel.deliver(Kind.REPLY, tensors, body)

    async def _ticking(self) -> None:
        metrics = self.house.metrics
        while True:
            await asyncio.to_thread(self.house.tidy)
            self.levels = await asyncio.to_thread(self.house.pool.levels)
            await self.tick()
            named = {(self.crew.name_of(model), batch): count for (model, batch), count in self.levels.items()}
            metrics.set_pool(named, await asyncio.to_thread(lambda: self.house.pool.nbytes))
            metrics.workers.set(sum(worker.up for worker in self.crew.workers))
            metrics.ready.set(bool(self.readiness()["ready"]))
            await asyncio.sleep(1.0)

    async def _until(self, stop: asyncio.Event) -> None:
        stopped, failed = asyncio.ensure_future(stop.wait()), asyncio.ensure_future(self.tasks.failed())
        try:
            await asyncio.wait((stopped, failed), return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
        finally:
            for future in (stopped, failed):
                future.cancel()


def setups(house: House) -> list[Setup]:
    """Who the workers of a party are."""
    seed = house.identity.private_key.private_bytes_raw()
    peer = house.cluster.party(BOB if house.name == ALICE else ALICE).public
    address = house.cluster.parties.alice.address
    return [
        Setup(house.name, number, seed, peer, address, PATIENCE_S) for number in range(house.cluster.serving.workers)
    ]


def _ignored(result: Any) -> None:
    """Nothing: for callbacks that give something that nobody needs."""
