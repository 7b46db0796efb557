"""The provider's process: it takes models from owners, and deals tickets to bob and alice, a thread a connection."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import threading
import time
from collections import Counter
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, generate_latest

from tacit import atomic
from tacit.errors import CodecError, PeerError, one_line
from tacit.identity import Identity, key_text
from tacit.party import dialing, http, tls
from tacit.party.cluster_file import ALICE, BOB, PROVIDER, ClusterFile
from tacit.party.dealing import Dealer
from tacit.party.jobs.keeping import JobKeeper
from tacit.party.jobs.planned import PlannedJob
from tacit.party.jobs.store import JobStore
from tacit.party.keeping import MAX_MODEL_BYTES, Keeper
from tacit.party.logs import Log
from tacit.party.session import Called, Session, permitted
from tacit.party.session_messages import Purpose
from tacit.party.tickets import DealtLedger
from tacit.party.transport import Link
from tacit.party.vault import Vault
from tacit.wire import Kind

_CONNECTIONS = 64
_FINISHING_S = 20.0


class ProviderProcess:
    """See the module.

    Args:
        cluster: everybody's file.
        identity: the provider's.
        folder: where its disk is.
        log: where events are written.

    Raises:
        DataError: another process uses the folder, or what lies there is damaged.
    """

    def __init__(self, cluster: ClusterFile, identity: Identity, folder: Path, log: Log) -> None:
        atomic.make_private(folder)
        self._cluster, self._identity, self._log = cluster, identity, log
        self._vault = Vault(folder / "models", identity.storage_key("vault"), PROVIDER)
        self._ledger = DealtLedger(folder / "dealt")
        limit = int(cluster.training.disk_gb * 1e9)
        self._jobs = JobStore(folder / "jobs", identity.storage_key("jobs"), PROVIDER, limit)
        self._dealer = Dealer(self._vault, self._ledger, lambda digest: PlannedJob(self._jobs.job(digest)))
        self._pins = cluster.pins()
        self._context = tls.server_context(identity, self._pins)
        jobs = JobKeeper(PROVIDER, self._jobs, gone=self._dealer.delete)
        self._keeper = Keeper(PROVIDER, self._vault, log, jobs, gone=self._dealer.delete)
        self._room, self._guard = threading.Semaphore(_CONNECTIONS), threading.Lock()
        self._links: dict[Link, Session] = {}

    async def run(self, listener: socket.socket, stop: asyncio.Event) -> None:
        """Deal until ``stop`` is set; then finish the tickets that are on their way, and leave."""
        member = self._cluster.parties.provider
        monitor = await http.serve(member.http_at, self._metrics, self.readiness) if member.http_at else None
        accepting = asyncio.ensure_future(self._accept(listener))
        self._log("started", address=member.address)
        try:
            await stop.wait()
            self._log("stopping")
            self._dealer.stop()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FINISHING_S):
                    await asyncio.to_thread(self._settled)
        finally:
            accepting.cancel()
            with self._guard:
                for link in self._links:
                    link.close()
            self._dealer.close()
            self._jobs.close()
            if monitor:
                monitor.close()
            self._log("stopped")

    def readiness(self) -> dict[str, object]:
        """Whether tickets can be dealt: ``ready``, and who is there."""
        there = self._there()
        return {"ready": bool(there[ALICE] and there[BOB]), ALICE: there[ALICE] > 0, BOB: there[BOB] > 0}

    def _there(self) -> Counter[str]:
        with self._guard:
            return Counter(session.caller for session in self._links.values() if session.purpose is Purpose.POOL)

    def _settled(self) -> None:
        """Wait until the last ticket that was begun is with both parties."""
        deadline = time.monotonic() + _FINISHING_S
        while self._dealer.dealing and time.monotonic() < deadline:
            time.sleep(0.02)

    async def _accept(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        while True:
            try:
                sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError:
                await asyncio.sleep(0.1)
                continue
            if not self._room.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._meet, args=(sock,), daemon=True).start()

    def _meet(self, sock: socket.socket) -> None:
        try:
            link = dialing.answer(sock, self._context, self._identity, self._pins, dialing.HANDSHAKE_S)
            caller = link.peer
            called = Called(PROVIDER, caller, self._pins[caller], permitted(self._cluster, PROVIDER, caller))
            session = dialing.accept_session(link, called)
        except PeerError as error:
            self._log("turned_away", reason=one_line(error))
            self._room.release()
            return
        with self._guard:
            self._links[link] = session
        self._log("connected", caller=caller, purpose=session.purpose)
        try:
            link.patience = None
            self._serve(link, session)
        except CodecError as error:
            self._log("session_broken", caller=caller, reason=one_line(error))
        except PeerError:
            pass  # it has left
        finally:
            link.close()
            with self._guard:
                del self._links[link]
            self._log("disconnected", caller=caller)
            self._room.release()

    def _serve(self, link: Link, session: Session) -> None:
        if session.purpose is Purpose.OWNER:
            owner = key_text(self._cluster.owners[session.caller].public)
            while True:
                frame = link.receive(Kind.CALL, limit=MAX_MODEL_BYTES)
                session.require_live(time.monotonic())
                body, tensors = self._keeper.handle(frame, owner, session.caller)
                link.send(Kind.REPLY, tensors, body)
        elif session.caller == BOB:
            self._dealer.serve_bob(link)
        else:
            self._dealer.attach_alice(link)
            _wait_until_closed(link)

    def _metrics(self) -> bytes:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        dealt = Gauge("tacit_dealt_tickets_total", "Tickets dealt", ["model", "batch"], registry=registry)
        names = {entry.digest: entry.name for entry in self._vault.list()}
        for (model, batch), count in self._ledger.dealt().items():
            dealt.labels(names.get(model, model[:12]), batch).inc(count)  # versions of one name add up
        connected = Gauge("tacit_connected", "Whether a party is connected", ["party"], registry=registry)
        there = self._there()
        for party in (ALICE, BOB):
            connected.labels(party).set(there[party] > 0)
        return generate_latest(registry)


def _wait_until_closed(link: Link) -> None:
    """Wait until the other side is gone, without reading what it says."""
    poll = select.poll()
    poll.register(link.fileno(), getattr(select, "POLLRDHUP", select.POLLHUP))
    while not poll.poll(1000):
        if link.fileno() < 0:
            return
