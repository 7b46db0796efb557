"""A party's pool: the tickets that were dealt to it and not used yet, on disk, each of them used at most once.

The ledger (SQLite) has one row for every ticket that may still be used, and for every model and batch size the largest
serial that ever came. A ticket is therefore in one of three states, and moves one way only:

    not seen (serial above the largest)  →  ready (a row)  →  gone (neither)

*Gone is on the disk before a ticket is handed out.* What a crash interrupts is gone as well. A row holds the ticket's
seed, sealed; bob's corrections lie in a file a ticket (`tacit.party.vouchers`). The folder belongs to one process at a
time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Connection

import msgspec
from torch import Tensor

from tacit import atomic
from tacit.database import Database
from tacit.errors import CorrelationError, DataError, InputError, StorageFull
from tacit.party.folder_lock import lock
from tacit.party.sealing import SALT_BYTES, Seal, check_key, fresh_salt, subkey
from tacit.party.tickets import BatchSize, Digest, Serial, Ticket, check_ticket
from tacit.party.vouchers import Voucher, context, covered, redeem
from tacit.ring.prg import SEED_BYTES
from tacit.wire import Item, Kind, head_bytes, items_of

_APPLICATION, _FORMAT = 0x7AC17D92, 1
_SCHEMA = (
    """
    CREATE TABLE ready (
        model TEXT NOT NULL, batch INTEGER NOT NULL, serial INTEGER NOT NULL, sealed BLOB NOT NULL,
        file_bytes INTEGER NOT NULL, PRIMARY KEY (model, batch, serial)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE seen (
        model TEXT NOT NULL, batch INTEGER NOT NULL, serial INTEGER NOT NULL, PRIMARY KEY (model, batch)
    ) STRICT, WITHOUT ROWID
    """,
    "CREATE TABLE owner (mark BLOB NOT NULL) STRICT",
)
_DELETE = "DELETE FROM ready WHERE model = ? AND batch = ? AND serial = ?"
ROW_BYTES = 256
"""What a ticket counts for besides its file."""


class Holding(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """What a party says of its pool, for one model and batch size.

    Args:
        model: the digest of the model version.
        batch: the batch size.
        seen: the largest serial that ever came.
        serials: of the tickets that are ready, ascending.
    """

    model: Digest
    batch: BatchSize
    seen: Serial
    serials: list[Serial]


class PoolStore:
    """A party's tickets on disk. Threads may share it.

    Args:
        folder: made if it is missing; private to the party.
        key: the party's storage key, 32 bytes.
        limit_bytes: what the pool may take of the disk.

    Raises:
        DataError: another process uses the folder, the ledger is damaged, or another key sealed it.
    """

    def __init__(self, folder: str | Path, key: bytes, limit_bytes: int) -> None:
        check_key(key)
        self._folder, self._key, self.limit_bytes = Path(folder), key, limit_bytes
        self._files = self._folder / "tickets"
        atomic.make_private(self._files)
        self._guard = threading.RLock()
        self._claimed: dict[Ticket, bytes] = {}
        self._file_bytes: dict[Ticket, int] = {}
        self._writing: set[Ticket] = set()
        self._unwanted: set[Ticket] = set()
        self._old: frozenset[Ticket] = frozenset()
        self._lock = lock(self._folder)
        try:
            path = self._folder / "ledger.sqlite"
            self._ledger = Database(path, _APPLICATION, _FORMAT, _SCHEMA, self._unusable, shared=True)
            try:
                self.lost = self._recover()
            except BaseException:
                self._ledger.close()
                raise
        except BaseException:
            os.close(self._lock)
            raise

    def put(
        self, ticket: Ticket, seed: bytes, corrections: Iterable[Tensor] = (), items: Sequence[Item] | None = None
    ) -> None:
        """Keep a ticket; when this returns it is on the disk.

        Args:
            ticket: its serial is above all that came before for its model and batch size.
            seed: 16 secret bytes.
            corrections: bob's tensors. They may be made while they are written, and what is raised meanwhile passes
                through.
            items: what they will be, if they are not a sequence.

        Raises:
            CorrelationError: the ticket, or a later one, came before: it is refused.
            StorageFull: it would exceed the limit, or the disk is full.
            InputError: this is not a ticket, a seed, or the corrections that were announced.
            DataError: the disk or the ledger failed. Whatever is raised, nothing is left behind.
        """
        announced = (
            items_of(corrections if isinstance(corrections, Sequence) else ()) if items is None else tuple(items)
        )
        head = head_bytes(Kind.CORRECTIONS, ticket.serial, announced) if announced else b""
        size = len(head) + sum(item.nbytes for item in announced)
        salt = fresh_salt()
        with self._reserved(ticket, seed, size):
            seal = Seal(subkey(self._key, salt, "ticket"), context(ticket))
            path = self._path(ticket)
            try:
                if announced:
                    atomic.write(path, covered(seal, head, announced, corrections))
                with self._guard, self._ledger.transaction() as ledger:
                    self._enter(ledger, ticket, salt + seal.close(seed), size)
            except BaseException:
                path.unlink(missing_ok=True)
                raise

    def put_seeds(self, tickets: Mapping[Ticket, bytes]) -> None:
        """Keep tickets without corrections, all of them or none: `put` for alice, syncing once.

        Raises:
            CorrelationError, StorageFull, InputError, DataError: as `put` does.
        """
        with self._guard:
            if len(tickets) * ROW_BYTES + self.nbytes > self.limit_bytes:
                raise self._over_the_limit(len(tickets) * ROW_BYTES)
            with self._ledger.transaction() as ledger:
                for ticket, seed in sorted(tickets.items()):
                    self._check_new(ledger, ticket, seed)
                    salt = fresh_salt()
                    sealed = Seal(subkey(self._key, salt, "ticket"), context(ticket)).close(seed)
                    self._enter(ledger, ticket, salt + sealed, 0)
            self._file_bytes |= dict.fromkeys(tickets, 0)

    def lease(self, model: str, batch: int, count: int = 1) -> list[Ticket]:
        """Take the tickets with the lowest serials: alice's way. They are gone, on the disk, before this returns.

        Args:
            model: the digest of the model version.
            batch: the batch size.
            count: how many, if there are as many.

        Raises:
            InputError: the count is below 1.
            StorageFull: the disk is full; nothing was taken.
            DataError: the ledger is damaged.
        """
        if count < 1:
            raise InputError(f"{count} tickets were asked for: 1 or more")
        with self._guard:
            with self._ledger.transaction() as ledger:
                rows = ledger.execute(
                    "SELECT serial FROM ready WHERE model = ? AND batch = ? ORDER BY serial LIMIT ?",
                    (model, batch, count),
                ).fetchall()
                tickets = [Ticket(model, batch, serial) for (serial,) in rows]
                taken = self._taken(ledger, tickets)
            self._claimed |= taken
        return tickets

    def claim(self, tickets: Sequence[Ticket]) -> None:
        """Take the tickets that alice named: bob's way. They are gone, on the disk, before this returns.

        Raises:
            CorrelationError: one of them never came, or was taken before; none was taken now.
            StorageFull: the disk is full; none was taken.
            DataError: the ledger is damaged.
        """
        with self._guard:
            with self._ledger.transaction() as ledger:
                taken = self._taken(ledger, tickets)
            self._claimed |= taken

    def voucher(self, ticket: Ticket) -> Voucher:
        """What a worker needs to use a ticket that was leased or claimed; once.

        Raises:
            CorrelationError: it was not, or somebody has its voucher.
        """
        with self._guard:
            sealed = self._claimed.pop(ticket, None)
            if sealed is None:
                raise CorrelationError(f"ticket {ticket} was not taken from the pool, or was given away before")
            path = str(self._path(ticket)) if self._file_bytes.pop(ticket, 0) else ""
        return Voucher(ticket, subkey(self._key, sealed[:SALT_BYTES], "ticket"), sealed[SALT_BYTES:], path)

    def read(self, ticket: Ticket) -> tuple[bytes, list[Tensor]]:
        """Seed and corrections of a ticket that was leased or claimed; once. See `redeem`.

        Raises:
            CorrelationError: it was not, or was read before.
            DataError: what lies on the disk is damaged: the ticket is lost.
        """
        return redeem(self.voucher(ticket))

    def discard(self, tickets: Iterable[Ticket]) -> None:
        """Throw tickets away, whether they are ready, taken, given to a worker that is no more, or not there at all.

        Raises:
            StorageFull: the disk is full; they are thrown away with the next ones, or by `tidy`.
        """
        with self._guard:
            self._unwanted.update(tickets)
            with self._ledger.transaction() as ledger:
                ledger.executemany(_DELETE, map(_row, self._unwanted))
            gone, self._unwanted = self._unwanted, set()
            for ticket in gone - self._writing:
                self._claimed.pop(ticket, None)
                self._file_bytes.pop(ticket, None)
                self._path(ticket).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Throw away what the disk was too full to throw away before.

        Raises:
            StorageFull: it still is.
        """
        if self._unwanted:
            self.discard(())

    def discard_ready(self, tickets: Iterable[Ticket]) -> list[Ticket]:
        """Throw tickets away that nobody has taken yet; which of these it was."""
        with self._guard:
            with self._ledger.transaction() as ledger:
                gone = [ticket for ticket in tickets if ledger.execute(_DELETE, _row(ticket)).rowcount]
            for ticket in gone:
                self._file_bytes.pop(ticket)
                self._path(ticket).unlink(missing_ok=True)
        return gone

    def drop_model(self, model: str) -> None:
        """Throw away every ticket of a model that is ready."""
        self.reconcile([one for one in self.holdings() if one.model != model])

    def holdings(self) -> list[Holding]:
        """What this pool holds, to be compared with the other party's."""
        with self._guard, self._ledger.transaction() as ledger:
            ready: dict[tuple[str, int], list[int]] = {}
            for model, batch, serial in ledger.execute("SELECT model, batch, serial FROM ready ORDER BY serial"):
                ready.setdefault((model, batch), []).append(serial)
            seen = ledger.execute("SELECT model, batch, serial FROM seen ORDER BY model, batch").fetchall()
        return [Holding(model, batch, serial, ready.get((model, batch), [])) for model, batch, serial in seen]

    def reconcile(self, others: Sequence[Holding], begun: bool = False) -> int:
        """Throw away the tickets that the other party does not have: it used or lost them, or never had them.

        Tickets that came since this pool was opened stay if they are above all that the other has seen of their model
        and batch size: they may be on their way to it. Both parties do this at the start of a session, before either
        takes a ticket: a ticket that one of them has used is then gone at both, even if the other's disk was put back
        to an earlier state. Alice, who has nothing that bob did not have before her, may do it again at any time.

        Args:
            others: the other party's `holdings`.
            begun: whether the session has begun: tickets of a model and batch size that the other says nothing of may
                then have come since it said so, and stay, too.

        Returns:
            How many were thrown away.
        """
        there = {(one.model, one.batch): one for one in others}
        gone = []
        with self._guard:
            for one in self.holdings():
                other = there.get((one.model, one.batch))
                seen, serials = (other.seen, {*other.serials}) if other else (-1 if begun else one.seen, set[int]())
                missing = (Ticket(one.model, one.batch, serial) for serial in one.serials if serial not in serials)
                gone += [ticket for ticket in missing if ticket.serial <= seen or ticket in self._old]
            self.discard(gone)
        return len(gone)

    def levels(self) -> dict[tuple[str, int], int]:
        """How many tickets are ready, by model and batch size, of those that have any."""
        with self._guard, self._ledger.transaction() as ledger:
            counted = ledger.execute("SELECT model, batch, count(*) FROM ready GROUP BY model, batch").fetchall()
        return {(model, batch): count for model, batch, count in counted}

    def serials(self, model: str, batch: int) -> list[int]:
        """The serials that are ready, ascending."""
        query = "SELECT serial FROM ready WHERE model = ? AND batch = ? ORDER BY serial"
        with self._guard, self._ledger.transaction() as ledger:
            return [serial for (serial,) in ledger.execute(query, (model, batch)).fetchall()]

    def seen(self, model: str, batch: int) -> int:
        """The largest serial that ever came, -1 if none did."""
        query = "SELECT serial FROM seen WHERE model = ? AND batch = ?"
        with self._guard, self._ledger.transaction() as ledger:
            row = ledger.execute(query, (model, batch)).fetchone()
        return int(row[0]) if row else -1

    @property
    def room(self) -> int:
        """How many bytes more the pool may take."""
        return max(0, self.limit_bytes - self.nbytes)

    @property
    def nbytes(self) -> int:
        """What the pool takes of its limit, what is being written included."""
        with self._guard:
            return sum(self._file_bytes.values()) + ROW_BYTES * len(self._file_bytes)

    def close(self) -> None:
        """Let another process have the folder; what was taken and not read is lost."""
        self._ledger.close()
        os.close(self._lock)

    def __repr__(self) -> str:
        return f"PoolStore({self._folder}, {len(self._file_bytes)} tickets)"

    @contextmanager
    def _reserved(self, ticket: Ticket, seed: bytes, size: int) -> Iterator[None]:
        """Room for a ticket while it is written, and afterwards if that succeeds."""
        with self._guard:
            if ticket in self._file_bytes:
                raise _came_before(ticket)
            with self._ledger.transaction() as ledger:
                self._check_new(ledger, ticket, seed)
            if self.nbytes + size + ROW_BYTES > self.limit_bytes:
                raise self._over_the_limit(size + ROW_BYTES)
            self._file_bytes[ticket] = size
            self._writing.add(ticket)
        try:
            yield
        except BaseException:
            del self._file_bytes[ticket]
            raise
        finally:
            self._writing.remove(ticket)

    def _check_new(self, ledger: Connection, ticket: Ticket, seed: bytes) -> None:
        check_ticket(ticket.model, ticket.batch, ticket.serial)
        if len(seed) != SEED_BYTES:
            raise InputError(f"a ticket's seed is {SEED_BYTES} bytes, not {len(seed)}")
        query = "SELECT serial FROM seen WHERE model = ? AND batch = ?"
        row = ledger.execute(query, (ticket.model, ticket.batch)).fetchone()
        if row and ticket.serial <= row[0]:
            raise _came_before(ticket)

    def _enter(self, ledger: Connection, ticket: Ticket, sealed: bytes, size: int) -> None:
        """Make a ticket ready, in a transaction of the ledger's."""
        highest = ledger.execute(
            "INSERT INTO seen VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET serial = excluded.serial "
            "WHERE serial < excluded.serial RETURNING serial",
            _row(ticket),
        ).fetchall()
        if not highest:
            raise _came_before(ticket)
        ledger.execute("INSERT INTO ready VALUES (?, ?, ?, ?, ?)", (*_row(ticket), sealed, size))

    def _taken(self, ledger: Connection, tickets: Sequence[Ticket]) -> dict[Ticket, bytes]:
        """Make tickets gone, in a transaction of the ledger's; their sealed seeds."""
        taken = {}
        for ticket in tickets:
            rows = ledger.execute(f"{_DELETE} RETURNING sealed", _row(ticket)).fetchall()
            if not rows:
                raise CorrelationError(f"ticket {ticket} is not in the pool: it was used before, or never came")
            ((taken[ticket],),) = rows
        return taken

    def _recover(self) -> int:
        """Drop what a crash left: files without a row, and rows without their file; how many of the latter."""
        mark = subkey(self._key, b"", "pool")[:SALT_BYTES]
        lost = []
        with self._ledger.transaction() as ledger:
            marks = [found for (found,) in ledger.execute("SELECT mark FROM owner").fetchall()]
            if not marks:
                ledger.execute("INSERT INTO owner VALUES (?)", (mark,))
            elif marks != [mark]:
                raise self._unusable("it was sealed under another key: is this the folder of another party?")
            there = {entry.name: entry.stat().st_size for entry in os.scandir(self._files)}
            for *row, size in ledger.execute("SELECT model, batch, serial, file_bytes FROM ready").fetchall():
                ticket = Ticket(*row)
                if _is_named(ticket) and size == there.get(self._path(ticket).name, 0):
                    self._file_bytes[ticket] = size
                else:
                    lost.append(ticket)
            ledger.executemany(_DELETE, map(_row, lost))
        self._old = frozenset(self._file_bytes)
        for name in there.keys() - {self._path(ticket).name for ticket in self._old}:
            (self._files / name).unlink(missing_ok=True)
        return len(lost)

    def _path(self, ticket: Ticket) -> Path:
        return self._files / f"{ticket.model}-{ticket.batch}-{ticket.serial}"

    def _over_the_limit(self, size: int) -> StorageFull:
        return StorageFull(
            f"{size:,} more bytes of tickets do not fit the pool: {self.nbytes:,} of {self.limit_bytes:,} are taken"
        )

    def _unusable(self, why: str) -> DataError:
        return DataError(
            f"the pool in {self._folder} cannot be used: {why}. If it cannot be put right, remove the folder: its "
            "tickets are lost then, and new ones are dealt; never put an older copy in its place"
        )


def _row(ticket: Ticket) -> tuple[str, int, int]:
    return ticket.model, ticket.batch, ticket.serial


def _is_named(ticket: Ticket) -> bool:
    """Whether these are the parts of a ticket's name, which a damaged disk may have changed."""
    try:
        return check_ticket(*_row(ticket)) == ticket
    except InputError:
        return False


def _came_before(ticket: Ticket) -> CorrelationError:
    return CorrelationError(f"ticket {ticket} came before, or a later one did: it is refused")
