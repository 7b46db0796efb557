"""The workers of a party together, and the models that they all hold."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from tacit.errors import TacitError, one_line
from tacit.party.logs import Log
from tacit.party.meeting import route
from tacit.party.metrics import Metrics
from tacit.party.models import ModelPart, pack
from tacit.party.vault import Vault
from tacit.party.worker_calls import Answer, Install, Installed, Plan, Remove, Setup
from tacit.party.workers import WorkerProcess
from tacit.wire import Array


@dataclass(frozen=True, repr=False)
class Served:
    """A model that is served.

    Args:
        part: the party's part, without the weights.
        plans: what batches take, by size; a worker says so once it has the model ready.
    """

    part: ModelPart
    plans: dict[int, Plan] = field(default_factory=dict)

    @cached_property
    def largest_request(self) -> int:
        """Bytes of the shares of as many rows as a batch may have."""
        return 8 * max(self.part.batch_sizes) * sum(math.prod(one.item_shape) for one in self.part.inputs)


class Watcher(Protocol):
    """Who is told what is served, and what workers do."""

    def model_served(self, model: str) -> None:
        """A model is served from this moment on."""

    def model_gone(self, model: str) -> None:
        """A model is served no longer from this moment on."""

    def worker_started(self, worker: WorkerProcess) -> None:
        """A worker is there, with no model and no link."""

    def worker_ended(self, worker: WorkerProcess) -> None:
        """A worker is gone; another process will take its place."""

    def worker_heard(self, worker: WorkerProcess, answer: Answer, outputs: Sequence[Array]) -> None:
        """A worker says something; outputs are its shares of a batch's results."""


class Crew:
    """See the module.

    Args:
        setups: who the workers are.
        vault: where models lie.
        watcher: who is told what they do.
        metrics: where they are counted.
        log: where their comings and goings are written.
    """

    def __init__(self, setups: Sequence[Setup], vault: Vault, watcher: Watcher, metrics: Metrics, log: Log) -> None:
        self._vault, self._watcher, self._metrics, self._log = vault, watcher, metrics, log
        self.workers = [WorkerProcess(setup, self._started, self._heard, self._ended) for setup in setups]
        self.served: dict[str, Served] = {}
        self._equipping: set[asyncio.Task[None]] = set()
        self._serving = asyncio.Lock()

    async def run(self) -> None:
        """Keep the workers running until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for worker in self.workers:
                    group.create_task(worker.run())
        finally:
            for task in self._equipping:
                task.cancel()

    async def serve(self, digests: Collection[str]) -> None:
        """Have the workers hold these model versions and no others, but for those that cannot be opened."""
        async with self._serving:
            for digest in self.served.keys() - set(digests):
                self._watcher.model_gone(digest)
                self._log("model_unloaded", model=self.served.pop(digest).part.name, version=digest[:12])
                for worker in self.workers:
                    worker.models.discard(digest)
                    worker.call(Remove(digest))
            for digest in digests:
                if digest not in self.served and (part := await self._opened(digest)):
                    self.served[digest] = Served(replace(part, variants=()))
                    self._watcher.model_served(digest)
                    self._log("model_loaded", model=part.name, version=digest[:12])
                    for worker in self.workers:
                        _install(worker, part)

    def ready(self) -> dict[str, bool]:
        """Whether a worker has them ready, of the models that are served, by name."""
        held = set().union(*(worker.models for worker in self.workers))
        return {served.part.name: digest in held for digest, served in self.served.items()}

    def name_of(self, digest: str) -> str:
        """What a model is called; its digest's first digits if it is not served."""
        return self.served[digest].part.name if digest in self.served else digest[:12]

    def hand_over(self, wanted: str, sock: socket.socket) -> None:
        """Give a connection to the worker whose route it asks for; close it if there is none."""
        for worker in self.workers:
            if route(worker.number) == wanted:
                worker.hand_over(sock)
                return
        sock.close()

    def _started(self, worker: WorkerProcess) -> None:
        self._metrics.worker_starts.inc()
        self._log("worker_started", worker=worker.number, pid=worker.pid)
        self._watcher.worker_started(worker)
        self._beside(self._equip(worker))

    def _ended(self, worker: WorkerProcess) -> None:
        self._log("worker_ended", worker=worker.number)
        self._watcher.worker_ended(worker)

    def _heard(self, worker: WorkerProcess, answer: Answer, outputs: Sequence[Array]) -> None:
        if isinstance(answer, Installed) and answer.model in self.served:
            worker.models.add(answer.model)
            self.served[answer.model].plans.update({plan.size: plan for plan in answer.plans})
        self._watcher.worker_heard(worker, answer, outputs)

    async def _equip(self, worker: WorkerProcess) -> None:
        """Give a worker that has just started the models that are served."""
        starts = worker.starts
        async with self._serving:
            for digest in list(self.served):
                part = await self._opened(digest)
                if part and worker.starts == starts:
                    _install(worker, part)

    async def _opened(self, digest: str) -> ModelPart | None:
        try:
            return await asyncio.to_thread(self._vault.load, digest)
        except TacitError as error:
            self._log("model_unusable", version=digest[:12], reason=one_line(error))
            return None

    def _beside(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._equipping.add(task)
        task.add_done_callback(self._equipping.discard)


def _install(worker: WorkerProcess, part: ModelPart) -> None:
    body, tensors = pack(part)
    worker.call(Install(body), tensors)
