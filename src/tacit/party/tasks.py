"""Work that goes on beside other work in an asyncio process, and what comes of it when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Tasks:
    """Tasks of one owner. A failure that nobody foresaw ends the process, by way of `failed`."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failure: asyncio.Future[None] | None = None

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Have this done beside all else."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def failed(self) -> None:
        """Wait until a task fails.

        Raises:
            Exception: what it raised.
        """
        if self._failure is None:
            self._failure = asyncio.get_running_loop().create_future()
        await self._failure

    def fail(self, error: Exception) -> None:
        """Something that runs elsewhere, such as a thread, has failed as a task may."""
        if self._failure is None:
            self._failure = asyncio.get_running_loop().create_future()
        if not self._failure.done():
            self._failure.set_exception(error)

    async def close(self) -> None:
        """End all of them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self.fail(error)
