"""A party's workers as its front process sees them: started, started again when they end, called and heard."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from tacit.errors import PeerError
from tacit.party import worker_calls
from tacit.party.channel import Channel
from tacit.party.children import ENVIRONMENT
from tacit.party.quota import Quota
from tacit.party.worker_calls import Answer, Call, Ping, Pong, Setup
from tacit.wire import Array, Kind

_AGAIN_S = (0.0, 1.0, 2.0, 5.0, 15.0)
"""How long to wait before a worker is started again, by how many times it ended soon after its start."""
_SOON_S = 30.0
_STOPPING_S = 5.0
_PING_S = 5.0
_SILENT_S = 60.0
"""A worker that has said nothing for so long hangs; no step that it takes, such as planning a model, takes as long."""
NOTICING_S = 10.0
"""A worker whose counterpart has left a run says so within this time, unless it hangs."""
_UNREAD_BYTES = 1 << 34

Heard = Callable[["WorkerProcess", Answer, Sequence[Array]], None]
Changed = Callable[["WorkerProcess"], None]


class WorkerProcess:
    """One worker, whichever process it is at the moment.

    Args:
        setup: who it is.
        started: called when a process is there and knows who it is.
        heard: called with each of its answers.
        ended: called when a process has ended; another one will be started.
    """

    def __init__(self, setup: Setup, started: Changed, heard: Heard, ended: Changed) -> None:
        self.number = setup.number
        self._setup, self._started, self._heard, self._ended = setup, started, heard, ended
        self._channel: Channel | None = None
        self._door: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._silence: asyncio.Timeout | None = None
        self.starts = 0
        self.models: set[str] = set()
        """Those that it has said it has ready."""

    @property
    def up(self) -> bool:
        """Whether there is a process that can be called."""
        return self._channel is not None

    @property
    def pid(self) -> int | None:
        """The process id."""
        return self._process.pid if self._process and self._channel else None

    async def run(self) -> None:
        """Keep a process running until cancelled, which ends it."""
        soon = 0
        while True:
            began = time.monotonic()
            await self._run_once()
            soon = soon + 1 if time.monotonic() - began < _SOON_S else 0
            await asyncio.sleep(_AGAIN_S[min(soon, len(_AGAIN_S) - 1)])

    def call(self, call: Call, tensors: Sequence[Tensor | Array] = ()) -> None:
        """Tell the worker what to do; nothing happens if there is none, which `ended` has said or will say."""
        if self._channel:
            with contextlib.suppress(PeerError):
                self._channel.send(Kind.CALL, tensors, worker_calls.encode(call))

    def expect(self, seconds: float) -> None:
        """The worker has something to say within these seconds. If it says nothing, it hangs, and is started again."""
        if self._silence:
            due = asyncio.get_running_loop().time() + seconds
            self._silence.reschedule(min(due, self._silence.when() or due))

    def hand_over(self, sock: socket.socket) -> None:
        """Give the worker a connection that has been accepted for it, or close it if there is no worker."""
        with sock, contextlib.suppress(OSError):
            if self._door:
                socket.send_fds(self._door, [b"!"], [sock.fileno()])

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(_PING_S)
            self.call(Ping())

    async def _run_once(self) -> None:
        calls, door = socket.socketpair(), socket.socketpair()
        try:
            arguments = [str(theirs.fileno()) for _, theirs in (calls, door)]
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tacit.party.worker", *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[int(number) for number in arguments],
                env=os.environ | ENVIRONMENT,
                start_new_session=True,
            )
        finally:
            for _, theirs in (calls, door):
                theirs.close()
        self.starts += 1
        self.models.clear()
        door[0].setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=calls[0])
        self._channel = Channel(reader, writer, f"worker {self.number}", Quota(unread=_UNREAD_BYTES))
        self._door = door[0]
        pinging = asyncio.create_task(self._ping())
        try:
            self.call(self._setup)
            self._started(self)
            async with asyncio.timeout(None) as self._silence:
                while True:
                    self._silence.reschedule(asyncio.get_running_loop().time() + _SILENT_S)
                    frame = await self._channel.receive(Kind.REPLY)
                    answer = worker_calls.decode_answer(frame.body)
                    if not isinstance(answer, Pong):
                        self._heard(self, answer, frame.arrays)
        except PeerError:
            pass  # it has ended, or sent nonsense
        except TimeoutError:
            _kill(self._process)
        finally:
            self._silence = None
            pinging.cancel()
            self._channel.abort()
            self._channel, self._door = None, None
            door[0].close()
            self._ended(self)
            await asyncio.shield(asyncio.ensure_future(_gone(self._process)))


async def _gone(process: asyncio.subprocess.Process) -> None:
    """Wait until a process, whose connection is closed, has ended; end it if it does not by itself."""
    try:
        await asyncio.wait_for(process.wait(), _STOPPING_S)
    except TimeoutError:
        _kill(process)
        await process.wait()


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
