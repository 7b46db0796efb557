"""Audits a run's folder: its transcript, and whether history, ledger and models are what the transcript says."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from safetensors import SafetensorError, safe_open

from tacit.dp.accounting import Accountant, Event, privacy_spent
from tacit.dp.ledger import Ledger
from tacit.errors import DataError, InputError, PeerError
from tacit.federated.audit import Checked, verify
from tacit.federated.parties import Pins
from tacit.federated.transcript import BEGINNING, run_digest, tensors_digest
from tacit.runs import config
from tacit.runs.evidence import read_pins
from tacit.runs.folder import RunFolder

_CLOSE = 1e-9
"""How far a recomputed ε may be from the one that was written down, as a part of it."""


@dataclass(frozen=True)
class Audit:
    """What was found in order.

    Args:
        own_pins: whether the pins are those of the run's own folder, which whoever kept the folder could have made.
        rounds: how many rounds the run has had.
        ahead: how many of them do not stand in the history, since the run was interrupted and not resumed.
        head: the digest of the last entry.
        models: the files of models that are what the transcript says came of a round, with that round.
    """

    own_pins: bool
    rounds: int
    ahead: int
    head: bytes
    models: dict[str, int]


class Auditor:
    """Checks a run, from the first round on.

    Args:
        path: the run's folder.
        pinned: a file of pins; ``None``: those in the folder.
        head: the digest of the last entry, if it is known from elsewhere.

    Raises:
        DataError: the folder is not a run's.
        InputError: the pins cannot be read, or the run keeps no transcript.
    """

    def __init__(self, path: Path, pinned: Path | None = None, head: bytes | None = None) -> None:
        self._folder = RunFolder.open(path)
        self._evidence = self._folder.evidence
        if not self._evidence.transcript.exists():
            raise InputError(f"{path} has no transcript: only runs with [secure_sum] keep one")
        self._own_pins, self._known = pinned is None, head
        self._pins: Pins = read_pins(pinned or self._evidence.pins)
        self._rounds: dict[int, Checked] = {}
        self._models: dict[bytes, int] = {}
        self._charges: defaultdict[str, list[Event]] = defaultdict(list)
        self._rows: list[tuple[str, str, str]] = []
        settings, _ = config.read(self._folder.config)
        self._accountant: Accountant = "rdp" if settings.privacy is None else settings.privacy.accountant

    def rounds(self) -> Iterator[Checked]:
        """Each entry of the transcript that is in order.

        Raises:
            PeerError: the first that is not.
        """
        run = run_digest(self._folder.config.read_bytes(), self._pins.coordinator)
        for checked in verify(self._evidence.entries(), run, self._pins):
            self._charge(checked)
            if self._accountant == "rdp":
                self._check_epsilon(checked)
            for superseded in [number for number in self._rounds if number >= checked.round]:
                del self._rounds[superseded]
            self._rounds[checked.round] = checked
            self._models[checked.entry.after] = checked.round
            yield checked

    def finish(self) -> Audit:
        """Check what lies beside the transcript, once `rounds` has come to its end.

        Raises:
            PeerError: something is not what the transcript says.
        """
        last = max(self._rounds.values(), key=lambda checked: checked.place, default=None)
        head = BEGINNING if last is None else last.digest
        if self._known is not None and self._known != head:
            raise PeerError(
                f"the last entry is {head.hex()}, not the one that was given: entries are missing at the end"
            )
        if last is not None:
            self._check_epsilon(last)
        recorded = self._check_history()
        self._check_ledger()
        rounds = len(self._rounds)
        return Audit(self._own_pins, rounds, rounds - recorded, head, self._checked_models())

    def _charge(self, checked: Checked) -> None:
        for charge in checked.entry.charges:
            try:
                event = msgspec.json.decode(charge.event, type=Event)
            except (msgspec.MsgspecError, InputError) as error:
                raise PeerError(f"{_where(checked)}: it was charged for what is no known event: {error}") from error
            self._charges[charge.subject].append(event)
            self._rows.append((charge.subject, charge.label, charge.event))

    def _check_epsilon(self, checked: Checked) -> None:
        """Compute ε from what was charged, and compare."""
        said = checked.entry.spent
        if said is None:
            return
        spent = max(
            (privacy_spent(events, said.delta, self._accountant) for events in self._charges.values()), default=0.0
        )
        if spent != said.epsilon and not abs(spent - said.epsilon) <= _CLOSE * spent:
            raise PeerError(
                f"{_where(checked)}: it reports ε = {said.epsilon:.6g} at δ = {said.delta:g}, and what was charged "
                f"comes to ε = {spent:.6g}"
            )

    def _check_history(self) -> int:
        """Compare the history, which goes no further than the transcript; how far it goes."""
        history = self._folder.history()
        for expected, record in enumerate(history, 1):
            if record.round != expected:
                raise PeerError(f"round {expected} stands in the transcript and not in the history: it was removed")
            checked = self._rounds.get(record.round)
            if checked is None:
                raise PeerError(f"round {record.round} stands in the history and not in the transcript: it is missing")
            summed = checked.summed if checked.entry.attestation else record.cohort
            if record.cohort != summed:
                raise PeerError(f"round {record.round}: the history names other participants than those who signed")
            spent = None if checked.entry.spent is None else checked.entry.spent.epsilon
            if record.epsilon != spent:
                raise PeerError(f"round {record.round}: the history reports another ε than the transcript")
        return len(history)

    def _check_ledger(self) -> None:
        path = self._folder.path / "ledger.sqlite"
        if not path.exists():
            if self._rows:
                raise PeerError("privacy was charged for, and the run's ledger is missing")
            return
        with TemporaryDirectory() as folder:
            # Opening a ledger may write to it, and what is audited stays as it is.
            for part in path.parent.glob("ledger.sqlite*"):
                shutil.copy(part, folder)
            with closing(Ledger(Path(folder) / path.name)) as ledger:
                if ledger.rows()[: len(self._rows)] != self._rows:
                    raise PeerError("the privacy ledger holds other charges than the transcript")

    def _checked_models(self) -> dict[str, int]:
        came = self._models
        found = {}
        for name in ("model", "best"):
            path = self._folder.path / f"{name}.safetensors"
            if path.exists():
                digest = _digest_of(path)
                if digest not in came:
                    raise PeerError(f"{path.name} is not the model that came of any round of the transcript")
                found[path.name] = came[digest]
        return found


def _where(checked: Checked) -> str:
    return f"entry {checked.place} (round {checked.round})"


def _digest_of(path: Path) -> bytes:
    """Of the tensors of a model's file that rounds have trained."""
    try:
        with safe_open(path, framework="pt") as file:
            trained = msgspec.json.decode((file.metadata() or {})["trained"], type=list[str])
            return tensors_digest({name: file.get_tensor(name) for name in trained})
    except (SafetensorError, OSError, KeyError, msgspec.MsgspecError) as error:
        raise DataError(f"{path} is not the file of a model that a run wrote: {error!r}") from error
