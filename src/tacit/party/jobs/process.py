"""The worker of a run as the party's front process sees it: started, called, heard and killed."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from torch import Tensor

from tacit.errors import PeerError
from tacit.party.children import ENVIRONMENT
from tacit.party.jobs.calls import Answer, Call, Open, decode_answer, encode
from tacit.party.streams import Plain
from tacit.party.transport import Link
from tacit.wire import Kind

_PATIENCE_S = 60.0
"""How long the worker may take to read what it is sent."""

Heard = Callable[["JobProcess", Answer, Sequence[Tensor]], None]
Ended = Callable[["JobProcess"], None]


class JobProcess:
    """A worker process of one run.

    Args:
        call: what to run.
        description: of the job, as a tensor.
        heard: called with each of its answers, in another thread.
        ended: called when it has ended, in another thread, unless `kill` ended it.
    """

    def __init__(self, call: Open, description: Tensor, heard: Heard, ended: Ended) -> None:
        self._heard, self._ended, self._killed = heard, ended, False
        calls, door = socket.socketpair(), socket.socketpair()
        try:
            arguments = [str(theirs.fileno()) for _, theirs in (calls, door)]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tacit.party.jobs.worker", *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[int(number) for number in arguments],
                env=os.environ | ENVIRONMENT,
                start_new_session=True,
            )
        finally:
            for _, theirs in (calls, door):
                theirs.close()
        self.pid = self._process.pid
        self._door = door[0]
        self._door.setblocking(False)
        # One link for each direction, since each is used by a thread of its own.
        self._listening = Link(Plain(calls[0].dup()), "the job's worker", None)
        self._calling = Link(Plain(calls[0]), "the job's worker", _PATIENCE_S)
        self.call(call, [description])
        self._thread = threading.Thread(target=self._listen, name="a job's worker", daemon=True)
        self._thread.start()

    def call(self, call: Call, tensors: Sequence[Tensor] = ()) -> None:
        """Tell the worker what to do; if it has ended, `ended` has said so or will say so."""
        with contextlib.suppress(PeerError):
            self._calling.send(Kind.CALL, tensors, encode(call))

    def hand_over(self, sock: socket.socket) -> None:
        """Give the worker a connection that has been accepted for it, and close it here."""
        with sock, contextlib.suppress(OSError):
            socket.send_fds(self._door, [b"!"], [sock.fileno()])

    def kill(self) -> None:
        """End the process at once; when this returns, it has ended, and nothing more is heard of it."""
        self._killed = True
        self._process.kill()
        self._process.wait()
        self._thread.join()
        self._close()

    def _listen(self) -> None:
        with contextlib.suppress(PeerError):
            while True:
                frame = self._listening.receive(Kind.REPLY)
                answer = decode_answer(frame.body)
                if not self._killed:
                    self._heard(self, answer, frame.tensors)
        if not self._killed:
            self._ended(self)

    def _close(self) -> None:
        self._calling.close()
        self._listening.close()
        self._door.close()

    def __repr__(self) -> str:
        return f"JobProcess({self.pid})"
