"""What a run keeps so that it can be audited: who takes part, and its transcript.

::

    RUN/
    ├── identity.pem          the coordinator's key: secret, and of no use to an auditor
    ├── pins.toml             everybody's public key
    └── transcript.sqlite     an entry a round, see `tacit.federated.transcript`; only ever added to
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tacit.dp.ledger import Ledger
from tacit.errors import DataError, InputError, StorageFull
from tacit.federated.parties import Parties, Pins
from tacit.federated.transcript import BEGINNING, Charge, Transcript, entry_digest, run_digest, unseal
from tacit.identity import Identity, key_text, parse_key

_TABLE = "CREATE TABLE IF NOT EXISTS transcript (place INTEGER PRIMARY KEY, entry BLOB NOT NULL) STRICT"
_PINS = """\
# The public keys of all who may sign in this run. An auditor should have them from the parties themselves.
coordinator = "{coordinator}"
{servers}clients = [
{clients}]
"""


class _Pinned(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    coordinator: str
    clients: tuple[str, ...]
    alice: str | None = None
    bob: str | None = None


@dataclass(frozen=True)
class Evidence:
    """The files of a run that an audit rests on.

    Args:
        path: the run's folder.
    """

    path: Path

    @property
    def pins(self) -> Path:
        """Everybody's public key."""
        return self.path / "pins.toml"

    @property
    def transcript(self) -> Path:
        """An entry a round."""
        return self.path / "transcript.sqlite"

    def parties(self, clients: int) -> Parties:
        """The simulated parties of the run: new ones at its first start, the same ones whenever it is resumed.

        Raises:
            InputError: the key file can be read by others, or nothing can be written.
            DataError: the pins in the folder are those of other parties.
        """
        parties = Parties.simulated(self._own(), clients)
        self._pin(parties.pins)
        return parties

    def coordinator(self, clients: Sequence[bytes]) -> Identity:
        """Who signs the transcript of a run among real clients; likewise new at the first start.

        Args:
            clients: their identities, by index.

        Raises:
            InputError: the key file can be read by others, or nothing can be written.
            DataError: the run began among other clients.
        """
        own = self._own()
        self._pin(Pins(own.public, tuple(clients)))
        return own

    def _own(self) -> Identity:
        key = self.path / "identity.pem"
        if not key.exists() and not self.transcript.exists():
            Identity.fresh().save(key)
        return Identity.load(key)

    def _pin(self, pins: Pins) -> None:
        if not self.pins.exists():
            _write(self.pins, text_of(pins))
        if read_pins(self.pins) != pins:
            raise DataError(f"{self.pins} does not hold the keys of those who take part now: one of them was exchanged")

    def writer(self, config: bytes, coordinator: Identity, ledger: Ledger | None) -> Transcript:
        """What the run's rounds are written down with from here on.

        Args:
            config: the run's configuration, byte for byte.
            coordinator: signs.
            ledger: of the run, whose new rows go into the entries.

        Raises:
            DataError: the transcript in the folder is damaged, or holds charges that the ledger does not.
        """
        kept = self.entries()
        charged = sum(len(unseal(entry)[0].charges) for entry in kept)
        if ledger is not None and len(ledger.rows()) < charged:
            raise DataError(f"the ledger beside {self.transcript} holds fewer charges than the transcript does")

        def charges() -> list[Charge]:
            nonlocal charged
            rows = [] if ledger is None else [Charge(*row) for row in ledger.rows(charged)]
            charged += len(rows)
            return rows

        head = entry_digest(kept[-1]) if kept else BEGINNING
        return Transcript(run_digest(config, coordinator.public), coordinator, self._append, head, charges)

    def entries(self) -> list[bytes]:
        """The transcript, from its first entry; none if it was not begun.

        Raises:
            DataError: the file is damaged.
        """
        if not self.transcript.exists():
            return []
        with self._database() as database:
            rows = database.execute("SELECT place, entry FROM transcript ORDER BY place").fetchall()
        for expected, (place, entry) in enumerate(rows, 1):
            if place != expected or not isinstance(entry, bytes):
                raise DataError(f"{self.transcript} has no entry {expected}: it was removed")
        return [entry for _, entry in rows]

    def _append(self, entry: bytes) -> None:
        with self._database() as database:
            database.execute(_TABLE)
            database.execute("INSERT INTO transcript (entry) VALUES (?)", (entry,))

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.transcript)) as database, database:
                database.execute("PRAGMA synchronous = FULL")
                yield database
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
                raise StorageFull(f"the disk that holds {self.transcript} is full: nothing was written") from error
            raise DataError(f"{self.transcript} is damaged: {error}") from error


def text_of(pins: Pins) -> str:
    """A file of pins."""
    servers = "".join(
        f'{name} = "{key_text(key)}"\n' for name, key in (("alice", pins.alice), ("bob", pins.bob)) if key
    )
    clients = "".join(f'    "{key_text(key)}",  # {client}\n' for client, key in enumerate(pins.clients))
    return _PINS.format(coordinator=key_text(pins.coordinator), servers=servers, clients=clients)


def read_pins(path: Path) -> Pins:
    """The pins in a file.

    Raises:
        InputError: it cannot be read, is not such a file, or pins what is nobody's key.
    """
    try:
        pinned = msgspec.toml.decode(path.read_text(encoding="utf-8"), type=_Pinned)
        servers = [b"" if name is None else parse_key(name) for name in (pinned.alice, pinned.bob)]
        return Pins(parse_key(pinned.coordinator), tuple(map(parse_key, pinned.clients)), *servers)
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError, InputError) as error:
        raise InputError(
            f'{path} is not a file of pins: {error}; it has coordinator = "ed25519:…", clients = ["ed25519:…", …], and '
            "for two servers alice and bob"
        ) from error


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
