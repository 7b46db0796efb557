"""Verifies the transcript of a run, without trust in whoever kept it.

What it needs from elsewhere is who the parties are: their pinned public keys. docs/spec/transcript.md says what is
checked, and what a transcript that passes does not show.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tacit import identity
from tacit.errors import PeerError, TacitError
from tacit.federated.parties import Pins
from tacit.federated.secure_sum.attestation import Attestation
from tacit.federated.secure_sum.messages import members_of
from tacit.federated.secure_sum.shared_attestation import SharedAttestation
from tacit.federated.transcript import BEGINNING, SIGNED, Entry, Spent, entry_digest, unseal


@dataclass(frozen=True)
class Checked:
    """An entry of a transcript that was verified.

    Args:
        place: of the entry, from 1.
        digest: of the entry.
        entry: what it says.
        invited: clients of the round's cohort.
        summed: whose vectors are in the sum, ascending.
        excluded: whose vectors were beyond the bound.
        minimum: the fewest vectors that the clients let into the sum.
        holders, threshold: how many of how many hold what reveals a vector.
        signatures: how many clients signed the round.
        again: whether the round had been run before, and this one took its place.
    """

    place: int
    digest: bytes
    entry: Entry
    invited: int = 0
    summed: tuple[int, ...] = ()
    excluded: tuple[int, ...] = ()
    minimum: int = 0
    holders: int = 0
    threshold: int = 0
    signatures: int = 0
    again: bool = False

    @property
    def round(self) -> int:
        """Its number."""
        return self.entry.purpose.round


def verify(entries: Iterable[bytes], run: bytes, pins: Pins) -> Iterator[Checked]:
    """Check a transcript from its first entry on.

    Args:
        entries: as they were kept, all of them, in order.
        run: `tacit.federated.transcript.run_digest` of the configuration.
        pins: who may sign.

    Yields:
        Each entry that is in order, until the first that is not.

    Raises:
        PeerError: what is wrong with the first entry that is not in order, by its place and round.
    """
    chain = _Chain(run, pins)
    for place, data in enumerate(entries, 1):
        where = f"entry {place}"
        try:
            entry, sealed = unseal(data)
            where += f" (round {entry.purpose.round})"
            if not identity.verify(pins.coordinator, SIGNED, sealed.content, sealed.signature):
                raise PeerError("it is not signed by the coordinator that is pinned, or was changed")
            yield chain.follow(place, data, entry)
        except TacitError as error:
            raise PeerError(f"{where}: {error}") from error


class _Chain:
    """What the entries so far say that the next one has to go on from."""

    def __init__(self, run: bytes, pins: Pins) -> None:
        self._run, self._pins = run, pins
        self._head = BEGINNING
        self._models: list[bytes] = []
        self._latest = 0
        self._sums: set[bytes] = set()
        self._spent: Spent | None = None
        self._indices = pins.index_of()

    def follow(self, place: int, data: bytes, entry: Entry) -> Checked:
        """Check an entry whose signature is right."""
        purpose = entry.purpose
        if purpose.run != self._run:
            raise PeerError("it is of another run: of another configuration, or another coordinator")
        if purpose.previous != self._head:
            raise PeerError(
                "it does not follow the entry before it: one is missing between them, or was changed, moved or added"
            )
        if not self._models:
            self._models = [purpose.model]
        again = purpose.round <= self._latest
        if purpose.round > len(self._models):
            raise PeerError(f"round {len(self._models)} should follow")
        # What was run again takes the place of what came of it before.
        del self._models[purpose.round :]
        if purpose.model != self._models[-1]:
            raise PeerError("its clients were sent another model than the one that the round before left")
        checked = self._checked(place, entry_digest(data), entry, again)
        self._check_privacy(entry)
        self._head = checked.digest
        self._models.append(entry.after)
        self._latest = max(self._latest, purpose.round)
        return checked

    def _checked(self, place: int, digest: bytes, entry: Entry, again: bool) -> Checked:
        """Check what the parties of the sum signed."""
        purpose, pins = entry.purpose, self._pins
        if entry.protocol in ("none", "plain"):
            if entry.attestation:
                raise PeerError("it has signatures of a secure sum, and says that there was none")
            if entry.protocol == "none" and entry.after != purpose.model and entry.spent is None:
                raise PeerError("the model changed in a round without a sum")
            return Checked(place, digest, entry, again=again)
        if entry.protocol == "masked":
            masked = Attestation.parse(entry.attestation)
            invite = masked.invite
            self._check_purpose(entry, masked.subject.application, invite.round)
            survivors = masked.verify(frozenset(pins.clients))
            return Checked(
                place,
                digest,
                entry,
                invited=len(invite.identities),
                summed=self._named(survivors),
                minimum=invite.minimum,
                holders=invite.holders,
                threshold=invite.threshold,
                signatures=len(masked.signatures),
                again=again,
            )
        shared = SharedAttestation.parse(entry.attestation)
        terms = shared.terms
        self._check_purpose(entry, terms.application, terms.round)
        summed = shared.verify(frozenset(pins.clients), pins.alice, pins.bob)
        excluded = members_of(shared.excluded, len(terms.identities))
        return Checked(
            place,
            digest,
            entry,
            invited=len(terms.identities),
            summed=self._named(summed),
            excluded=self._named(terms.identities[client] for client in excluded),
            minimum=terms.minimum,
            holders=2,
            threshold=2,
            signatures=len(shared.parts),
            again=again,
        )

    def _check_purpose(self, entry: Entry, application: bytes, number: bytes) -> None:
        if application != entry.purpose.application:
            raise PeerError("its parties signed for something else than this run, round, model, encoding and history")
        if number in self._sums:
            raise PeerError("its sum is one that stands in the transcript already")
        self._sums.add(number)

    def _check_privacy(self, entry: Entry) -> None:
        before, after = self._spent, entry.spent
        if before is not None and (
            after is None or after.epsilon < before.epsilon or (after.delta, after.unit) != (before.delta, before.unit)
        ):
            raise PeerError("it reports less privacy spent than the entry before, or of something else")
        if after is None and entry.charges:
            raise PeerError("privacy was charged for, and none is reported as spent")
        self._spent = after

    def _named(self, keys: Iterable[bytes]) -> tuple[int, ...]:
        return tuple(sorted(self._indices[key] for key in keys))
