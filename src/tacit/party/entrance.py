"""The one address of a party: whoever calls is sent to a worker, or authenticated and given a session.

Nothing of a caller is believed, kept or passed on before TLS has shown its key and the session is open, except the
route that it asks for (`tacit.party.client_hello`): a connection for a worker is handed over as it is, and the worker
authenticates it. How many callers may be on their way to a session, and how many sessions one of them may have, is
bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from weakref import WeakValueDictionary

from tacit.errors import CodecError, PeerError, TacitError, one_line
from tacit.identity import Identity
from tacit.party import dialing, tls
from tacit.party.calling import said
from tacit.party.channel import BUFFERED_BYTES, Channel
from tacit.party.client_hello import MAX_HELLO_BYTES, route_of
from tacit.party.cluster_file import ClusterFile
from tacit.party.logs import Log
from tacit.party.metrics import Metrics
from tacit.party.quota import Quota
from tacit.party.session import Called, Session, permitted
from tacit.party.session_messages import Purpose, refusal
from tacit.party.streams import tune
from tacit.wire import Kind

MAX_SESSIONS = 64
"""Sessions that one caller may have at a time."""
_MAX_STRANGERS = 256
"""Connections that have no session yet."""
_PEEK_S = 0.005
_LEAVING_S = 1.0

Handler = Callable[[Channel, Session], Awaitable[None]]
HandOver = Callable[[str, socket.socket], None]


class Entrance:
    """Accepts connections until it is closed.

    Args:
        party: this party's name.
        identity: its identity.
        cluster: who may call for what.
        handlers: what to do with a session, by its purpose; the channel is closed when they return or raise.
        hand_over: takes a connection that asks for a route.
        metrics: where sessions are counted.
        log: where refusals are written.
    """

    def __init__(
        self,
        party: str,
        identity: Identity,
        cluster: ClusterFile,
        handlers: Mapping[Purpose, Handler],
        hand_over: HandOver,
        metrics: Metrics,
        log: Log,
    ) -> None:
        self._party, self._identity, self._cluster = party, identity, cluster
        self._handlers, self._hand_over, self._metrics, self._log = handlers, hand_over, metrics, log
        self._pins = cluster.pins()
        self._context = tls.server_context(identity, self._pins)
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers = 0
        self._sessions: Counter[str] = Counter()
        self._quotas: WeakValueDictionary[str, Quota[Channel]] = WeakValueDictionary()

    async def run(self, listener: socket.socket) -> None:
        """Accept connections until cancelled.

        Args:
            listener: where they come.
        """
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(0.1)  # out of descriptors: some will be free again
                continue
            if self._strangers >= _MAX_STRANGERS:
                sock.close()
                continue
            task = loop.create_task(self._meet(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End all sessions."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _meet(self, sock: socket.socket) -> None:
        self._strangers += 1
        try:
            async with asyncio.timeout(dialing.HANDSHAKE_S):
                channel, caller = await self._authenticated(sock)
                if channel is None:
                    return
                session = await self._opened(channel, caller)
        except (PeerError, ssl.SSLError, OSError, TimeoutError) as error:
            sock.close()
            self._metrics.turned_away.inc()
            if isinstance(error, TacitError):
                self._log("turned_away", reason=one_line(error))
            return
        finally:
            self._strangers -= 1
        await self._serve(channel, session)

    async def _authenticated(self, sock: socket.socket) -> tuple[Channel | None, str]:
        """A channel to the caller, and its name; none if the connection was handed over."""
        sock.setblocking(False)
        if route := await _route(sock):
            self._hand_over(route, sock)
            return None, ""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=BUFFERED_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        tune(sock)
        try:
            transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock, ssl=self._context)
        except ssl.SSLError as error:
            raise tls.refusal(error, "a caller", self._identity) from None
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            caller = tls.authenticated(writer.get_extra_info("ssl_object"), self._pins)
        except PeerError:
            transport.abort()
            raise
        quota = self._quotas.setdefault(caller, Quota())
        return Channel(reader, writer, caller, quota), caller

    async def _opened(self, channel: Channel, caller: str) -> Session:
        called = Called(self._party, caller, self._pins[caller], permitted(self._cluster, self._party, caller))
        try:
            channel.send(Kind.HELLO, body=called.welcome())
            try:
                session, accepted = called.greeted(await said(channel), time.monotonic())
                if self._sessions[caller] >= MAX_SESSIONS:
                    raise PeerError(f"{caller} has {MAX_SESSIONS} sessions with {self._party} already: close some")
            except PeerError as error:
                channel.send(Kind.HELLO, body=refusal(error))
                await channel.close()
                raise
            channel.send(Kind.HELLO, body=accepted)
        except BaseException:
            channel.abort()
            raise
        return session

    async def _serve(self, channel: Channel, session: Session) -> None:
        sessions = self._metrics.sessions.labels(session.purpose)
        self._sessions[session.caller] += 1
        sessions.inc()
        try:
            await self._handlers[session.purpose](channel, session)
        except CodecError as error:
            self._metrics.turned_away.inc()
            self._log("session_broken", caller=session.caller, purpose=session.purpose, reason=one_line(error))
        except PeerError:
            pass  # it has left
        finally:
            self._sessions[session.caller] -= 1
            sessions.dec()
            # What has been answered is to arrive, if that takes no long time.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LEAVING_S):
                    await channel.close()
            channel.abort()


async def _route(sock: socket.socket) -> str:
    """The route that a caller asks for; empty for none. Nothing is taken from the socket."""
    loop, seen = asyncio.get_running_loop(), 0
    while True:
        await _readable(loop, sock)
        data = sock.recv(MAX_HELLO_BYTES + 5, socket.MSG_PEEK)
        if not data:
            raise PeerError("a caller closed the connection")
        route = route_of(data)
        if route is not None:
            return route
        # What has been seen stays readable: wait for more without asking all the time.
        await asyncio.sleep(_PEEK_S if len(data) > seen else 4 * _PEEK_S)
        seen = len(data)


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock)
