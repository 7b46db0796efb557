"""What a party's front process has from its start on: who it is, everybody's file, and what lies on its disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tacit import atomic
from tacit.errors import CorrelationError, PeerError, StorageFull, one_line
from tacit.identity import Identity
from tacit.party import dialing
from tacit.party.cluster_file import PROVIDER, ClusterFile
from tacit.party.jobs.store import JobStore
from tacit.party.logs import Log
from tacit.party.metrics import Metrics
from tacit.party.pool import Holding, PoolStore
from tacit.party.session import Caller
from tacit.party.session_messages import Purpose
from tacit.party.tickets import Ticket
from tacit.party.transport import Link
from tacit.party.vault import Vault
from tacit.party.vouchers import Voucher


@dataclass(repr=False)
class House:
    """See the module.

    Args:
        name: ``alice`` or ``bob``.
        cluster: everybody's file.
        identity: this party's.
        folder: where its disk is.
        log: where events are written.

    Raises:
        DataError: another process uses the folder, or what lies there is damaged or sealed under another key.
    """

    name: str
    cluster: ClusterFile
    identity: Identity
    folder: Path
    log: Log
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        atomic.make_private(self.folder)
        self.vault = Vault(self.folder / "models", self.identity.storage_key("vault"), self.name)
        limit = int(self.cluster.pools.disk_gb * 1e9)
        self.pool = PoolStore(self.folder / "pool", self.identity.storage_key("pool"), limit)
        self.metrics.burned.inc(self.pool.lost)
        limit = int(self.cluster.training.disk_gb * 1e9)
        self.jobs = JobStore(self.folder / "jobs", self.identity.storage_key("jobs"), self.name, limit)

    # What a disk is too full to note does not happen: service goes on with what was taken before.

    def lease(self, model: str, batch: int, count: int) -> list[Ticket]:
        """Take tickets, at alice."""
        try:
            return self.pool.lease(model, batch, count)
        except StorageFull as error:
            return self._none(error)

    def claim(self, tickets: Sequence[Ticket]) -> tuple[list[Ticket], bool]:
        """Take tickets that alice named, at bob; those that he has, and whether the disk was too full for others."""
        try:
            self.pool.claim(tickets)
            return list(tickets), False
        except CorrelationError:
            each = [self.claim([ticket]) for ticket in tickets] if len(tickets) > 1 else []
            return [ticket for taken, _ in each for ticket in taken], any(full for _, full in each)
        except StorageFull as error:
            return self._none(error), True

    def discard(self, tickets: Iterable[Ticket]) -> None:
        """Throw tickets away; if the disk is too full for it, with the next that are, or by `tidy`."""
        try:
            self.pool.discard(tickets)
        except StorageFull as error:
            self._none(error)

    def tidy(self) -> None:
        """Throw away what there was no room to throw away before."""
        try:
            self.pool.tidy()
        except StorageFull as error:
            self._none(error)

    def discard_ready(self, tickets: Iterable[Ticket]) -> list[Ticket]:
        """Throw away those of these tickets that nobody has taken; which."""
        try:
            return self.pool.discard_ready(tickets)
        except StorageFull as error:
            return self._none(error)

    def reconcile(self, others: Sequence[Holding], begun: bool = False) -> int:
        """Throw away what the other party does not have; how many tickets. See `PoolStore.reconcile`.

        Raises:
            PeerError: this disk is too full for it, and the two cannot go on together.
        """
        try:
            gone = self.pool.reconcile(others, begun)
        except StorageFull as error:
            raise PeerError(one_line(error)) from error
        if gone:
            self.log("tickets_that_the_other_has_not", count=gone)
            self.metrics.burned.inc(gone)
        return gone

    def vouchers(self, tickets: Iterable[Ticket]) -> list[Voucher]:
        """The vouchers of tickets that were taken, but for those that have been thrown away since."""
        found = []
        for ticket in tickets:
            with contextlib.suppress(CorrelationError):
                found.append(self.pool.voucher(ticket))
        return found

    def dial_provider(self) -> Link:
        """A link to the provider, over which tickets come.

        Raises:
            PeerError: it is not there, or refuses.
        """
        member = self.cluster.parties.provider
        link = dialing.dial(member.reached_at, self.identity, PROVIDER, member.public, patience=None)
        caller = Caller(self.name, self.identity.public, Purpose.POOL, (PROVIDER,))
        dialing.open_session({PROVIDER: link}, caller)
        return link

    def _none(self, error: StorageFull) -> list[Ticket]:
        """No tickets, for this reason."""
        self.log("disk_full", reason=one_line(error))
        return []
