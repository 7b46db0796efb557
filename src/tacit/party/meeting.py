"""How a process of bob's meets the process of alice's that it works with: over a link of their own, at alice's address.

Alice's front process accepts the connection, reads which process it is for (`tacit.party.client_hello`), and hands the
socket over through a Unix socket, the *door*. The process itself authenticates the caller and opens a session with it,
in a thread, since somebody without a key may take his time. Both front processes have told their processes the same
fresh *token*, by which the two know that they are meant for each other.
"""

from __future__ import annotations

import socket
import threading
from collections import deque

from tacit.errors import PeerError
from tacit.identity import Identity
from tacit.party import dialing, tls
from tacit.party.address import Address
from tacit.party.cluster_file import ALICE, BOB
from tacit.party.session import Called, Caller, Session
from tacit.party.session_messages import Purpose
from tacit.party.transport import Link

_WAITING_S = 3.0
"""Bob's process may have been told before this one: how long it is let wait."""
_CALLERS = 4
"""Connections that may be authenticating themselves, or waiting to be wanted, at the same time."""


class Door:
    """Alice's side.

    Args:
        identity: alice's.
        bob: bob's public key.
        door: where the front process hands over connections.
    """

    def __init__(self, identity: Identity, bob: bytes, door: socket.socket) -> None:
        self._identity, self._pins, self._door = identity, {BOB: bob}, door
        self._context = tls.server_context(identity, self._pins)
        self._room = threading.Semaphore(_CALLERS)
        self._callers: deque[tuple[Link, Session]] = deque()
        self._bell, self._clapper = socket.socketpair()
        self._token, self._number = b"", -1
        self._expecting = threading.Event()

    def filenos(self) -> tuple[int, int]:
        """What to wait on; `open` is to be called when one of them is readable."""
        return self._door.fileno(), self._bell.fileno()

    def open(self, ready: set[int]) -> None:
        """Let callers in.

        Args:
            ready: the descriptors that are readable.
        """
        if self._bell.fileno() in ready:
            self._bell.recv(_CALLERS)
        if self._door.fileno() in ready:
            message, descriptors, _, _ = socket.recv_fds(self._door, 1, 1)
            if not message:
                raise PeerError("the front process is gone")
            for descriptor in descriptors:
                self._admit(socket.socket(fileno=descriptor))

    def expect(self, token: bytes, number: int) -> None:
        """Let in the process of bob's that knows the token.

        Args:
            token: what both front processes told.
            number: of this process.
        """
        self._token, self._number = token, number
        self._expecting.set()

    def meet(self) -> Link | None:
        """The link to the process that is expected, if it has called; nobody is expected any more then."""
        while self._callers:
            link, session = self._callers.popleft()
            self._room.release()
            if self._expecting.is_set() and (session.parent, session.worker) == (self._token, self._number):
                self._expecting.clear()
                return link
            link.close()
        return None

    def _admit(self, sock: socket.socket) -> None:
        if not self._room.acquire(blocking=False):
            sock.close()
            return
        threading.Thread(target=self._authenticate, args=(sock,), daemon=True).start()

    def _authenticate(self, sock: socket.socket) -> None:
        try:
            link = dialing.answer(sock, self._context, self._identity, self._pins, dialing.HANDSHAKE_S)
            if not self._expecting.wait(_WAITING_S):
                link.close()
                raise PeerError("nobody is expected")
            called = Called(ALICE, BOB, self._pins[BOB], {Purpose.DATA}, parent=self._token)
            self._callers.append((link, dialing.accept_session(link, called)))
            self._clapper.send(b"!")
        except PeerError:
            self._room.release()


def call(address: Address, identity: Identity, alice: bytes, token: bytes, number: int) -> Link:
    """Bob's side: call the process of alice's of the same number.

    Args:
        address: alice's.
        identity: bob's.
        alice: alice's public key.
        token: what both front processes told.
        number: of the processes.

    Raises:
        PeerError: it is not there, or is at another session.
    """
    link = dialing.dial(address, identity, ALICE, alice, route=route(number), patience=dialing.HANDSHAKE_S)
    caller = Caller(BOB, identity.public, Purpose.DATA, (ALICE,), parent=token, worker=number)
    dialing.open_session({ALICE: link}, caller)
    return link


def route(number: int) -> str:
    """What bob's process asks for when it calls alice's of this number."""
    return f"worker-{number}"
