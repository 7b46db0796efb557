"""The server of the masked sum: a state machine that is used for one round.

::

    invite() → ADVERTISE ─close()→ SHARE ─close()→ MASK ─close()→ CONFIRM ─close()→ UNMASK ─close()→ DONE

In each stage `MaskedServer.receive` takes the clients' frames, in any order; `MaskedServer.close` ends the stage, when
all have answered or the runtime's patience is over, and gives the frames for those who go on. Who has not answered by
then is lost. A frame that does not check out is refused and changes nothing. The specification is
docs/spec/masked-sum.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from tacit.errors import InputError, PeerError
from tacit.federated.secure_sum import messages
from tacit.federated.secure_sum.agreement import KeyPair, Verify, commitment, pair_seed, self_seed, verify
from tacit.federated.secure_sum.attestation import Attestation
from tacit.federated.secure_sum.client import vector_digest
from tacit.federated.secure_sum.messages import (
    Advert,
    Confirm,
    Confirmations,
    FromClient,
    Inbox,
    Invite,
    Masked,
    Roster,
    Shares,
    Subject,
    Survivors,
    Unmask,
)
from tacit.federated.secure_sum.ring import Packed, Words
from tacit.ring.prg import SEED_BYTES, Prg, add_streams
from tacit.ring.shamir import ELEMENT_BYTES, combine, weights_at_zero

T = TypeVar("T")


class Stage(IntEnum):
    """What the server waits for; the first five are the stage numbers of frames."""

    ADVERTISE = 0
    SHARE = 1
    MASK = 2
    CONFIRM = 3
    UNMASK = 4
    DONE = 5
    FAILED = 6


_EXPECTED: Mapping[Stage, type] = {
    Stage.ADVERTISE: Advert,
    Stage.SHARE: Shares,
    Stage.MASK: Masked,
    Stage.CONFIRM: Confirm,
    Stage.UNMASK: Unmask,
}
_LOST = {
    Stage.ADVERTISE: "did not advertise keys",
    Stage.SHARE: "did not share its secrets",
    Stage.MASK: "sent no vector",
}


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a round ends with.

    Args:
        total: the sum of the survivors' vectors modulo 2^b.
        survivors: their numbers, ascending.
        lost: why each other client's vector is not in it.
        attestation: what the survivors signed, for whoever audits the round.
    """

    total: Words
    survivors: tuple[int, ...]
    lost: Mapping[int, str]
    attestation: Attestation


class MaskedServer:
    """The server in one round.

    Args:
        invite: who takes part, and how secrets are shared among them.
        subject: what is summed; ``None`` while that is not known, see `about`.
        verify: checks signatures.

    Raises:
        InputError: they contradict each other.
    """

    def __init__(self, invite: Invite, subject: Subject | None = None, verify: Verify = verify) -> None:
        self._verify = verify
        messages.check_invite(invite)
        self._invite, self._context = invite, invite.context
        self._stage = Stage.ADVERTISE
        self._awaited: frozenset[int] = frozenset(range(len(invite.identities)))
        self._arrived: dict[int, FromClient] = {}
        self._signatures: dict[int, bytes] = {}
        self._lost: dict[int, str] = {}
        self._subject = subject
        self._survivors: frozenset[int] = frozenset()
        self._weights: dict[tuple[int, ...], list[int]] = {}
        self._outcome: Outcome | None = None

    @property
    def stage(self) -> Stage:
        """What the server waits for."""
        return self._stage

    @property
    def settings(self) -> Invite:
        """Who takes part, and how secrets are shared among them."""
        return self._invite

    @property
    def awaited(self) -> frozenset[int]:
        """The clients that have not answered in this stage."""
        return self._awaited - self._arrived.keys()

    @property
    def survivors(self) -> tuple[int, ...]:
        """The clients whose vectors are in the sum, ascending.

        Raises:
            PeerError: vectors are still coming.
        """
        if self._stage <= Stage.MASK:
            raise PeerError(f"the round is in stage {self._stage.name}: whose vectors are in the sum is open")
        return tuple(sorted(self._survivors))

    @property
    def threshold(self) -> int:
        """How many answers the last two stages need at least; some client's holders may need others than the first."""
        return self._invite.threshold

    @property
    def outcome(self) -> Outcome:
        """The sum.

        Raises:
            PeerError: there is none.
        """
        if self._outcome is None:
            raise PeerError(f"the round is in stage {self._stage.name} and has no sum")
        return self._outcome

    def about(self, subject: Subject) -> None:
        """Settle what is summed, before the stage SHARE is closed.

        Raises:
            InputError: it is settled already.
        """
        if self._subject is not None:
            raise InputError("what a round sums is settled once")
        self._subject = subject

    def invite(self) -> bytes:
        """The frame that every client of the cohort is sent first."""
        return messages.server_frame(0, self._invite)

    def receive(self, frame: bytes) -> int:
        """Take a frame from a client.

        Returns:
            The client's number.

        Raises:
            CodecError: the frame does not parse.
            PeerError: it is not due, is not signed by its sender, belongs to another round or breaks the protocol.
                The round goes on as if it had not come.
        """
        subject = self._subject if self._stage is Stage.MASK else None
        limit = 4 * subject.ring.packed_size(subject.length) if subject else 0
        stage, message, envelope, packed = messages.read_client_frame(frame, limit)
        sender = message.sender
        if stage != self._stage or not isinstance(message, _EXPECTED.get(self._stage, ())):
            raise PeerError(f"a message {type(message).__name__} came in stage {self._stage.name}")
        if sender not in self._awaited or sender in self._arrived:
            raise PeerError(f"client {sender} has answered before, is lost, or is not of the cohort")
        if not self._verify(self._invite.identities[sender], self._context, envelope.content, envelope.signature):
            raise PeerError(
                f"a message {type(message).__name__} is not signed by client {sender}, or is of another round"
            )
        if not isinstance(message, Advert) and message.transcript != self._transcript:
            raise PeerError(f"client {sender} was shown another roster, or another subject")
        self._check(message, packed)
        self._arrived[sender] = message
        if isinstance(message, Advert | Confirm):
            self._signatures[sender] = envelope.signature
        return sender

    def _check(self, message: FromClient, packed: Packed | None) -> None:
        sender = message.sender
        match message:
            case Shares():
                chosen = [holder for holder, _, _ in message.sealed]
                partners = sum(partner for _, partner, _ in message.sealed)
                fits = (len(chosen), partners) == (self._sharing.holders, self._sharing.partners)
                if (
                    not fits
                    or len(set(chosen)) != len(chosen)
                    or not self._members.issuperset(chosen)
                    or sender in chosen
                ):
                    raise PeerError(f"client {sender} did not choose {self._sharing.holders} holders of the roster")
            case Masked():
                if packed is None or vector_digest(packed) != message.digest:
                    raise PeerError(f"the vector of client {sender} is not the one it signed")
                self._ring.add_packed(packed, self._total)
            case Confirm():
                if message.survivors != messages.bit_mask(self._survivors, len(self._invite.identities)):
                    raise PeerError(f"client {sender} confirms another set of survivors")
            case Unmask():
                if {owner for owner, _ in message.shares} != self._held[sender] or len(message.shares) != len(
                    self._held[sender]
                ):
                    raise PeerError(f"client {sender} did not send one share of each client that chose it")

    def close(self) -> dict[int, bytes]:
        """End the stage.

        Returns:
            The next frame for each client that goes on, by number; empty when the round is over.

        Raises:
            PeerError: too few clients are left, or shares are wrong: the round is over and there is no sum.
            InputError: vectors would be due, and what is summed is not settled.
        """
        if self._stage not in _EXPECTED:
            raise PeerError(f"the round is in stage {self._stage.name}: nothing is left to close")
        if self._stage is Stage.SHARE:
            self._settled()
        arrived, self._arrived = self._arrived, {}
        if self._stage in _LOST:
            self._lost |= dict.fromkeys(self._awaited - arrived.keys(), _LOST[self._stage])
        try:
            fewest = self._invite.minimum if self._stage <= Stage.MASK else self._invite.threshold
            if len(arrived) < fewest:
                raise PeerError(
                    f"{len(arrived)} clients are left in stage {self._stage.name}, {fewest} are needed: no sum"
                )
            frames = self._finish(arrived)
        except BaseException:
            self._stage = Stage.FAILED
            raise
        self._stage, self._awaited = Stage(self._stage + 1), frozenset(arrived)
        return frames

    def _settled(self) -> Subject:
        if self._subject is None:
            raise InputError("vectors cannot be asked for before it is settled what they are of")
        return self._subject

    def _finish(self, arrived: dict[int, FromClient]) -> dict[int, bytes]:
        if self._stage is Stage.ADVERTISE:
            return self._roster(_only(Advert, arrived))
        if self._stage is Stage.SHARE:
            return self._inboxes(_only(Shares, arrived), self._settled())
        if self._stage is Stage.MASK:
            self._survivors = frozenset(arrived)
            mask = messages.bit_mask(self._survivors, len(self._invite.identities))
            return dict.fromkeys(arrived, messages.server_frame(3, Survivors(self._context, mask)))
        if self._stage is Stage.CONFIRM:
            return self._confirmations(arrived)
        self._unmask(_only(Unmask, arrived))
        return {}

    def _roster(self, adverts: dict[int, Advert]) -> dict[int, bytes]:
        members = sorted(adverts)
        listed = b"".join(adverts[i].mask_key + adverts[i].seal_key + self._signatures[i] for i in members)
        roster = Roster(self._context, messages.bit_mask(members, len(self._invite.identities)), listed)
        self._transcript = messages.transcript_of(self._context, roster)
        self._members = frozenset(members)
        self._sharing = self._invite.sharing.among(len(members))
        self._mask_keys = {i: advert.mask_key for i, advert in adverts.items()}
        self._signatures = {}
        return dict.fromkeys(members, messages.server_frame(1, roster))

    def _inboxes(self, shares: dict[int, Shares], subject: Subject) -> dict[int, bytes]:
        self._ring, self._total = subject.ring, subject.ring.zeros(subject.length)
        self._roster_transcript = self._transcript
        self._transcript = messages.sum_transcript(self._roster_transcript, subject)
        boxes: dict[int, list[tuple[int, bool, bytes]]] = {client: [] for client in shares}
        self._holders: dict[int, tuple[int, ...]] = {}
        self._partners: dict[int, set[int]] = {client: set() for client in shares}
        self._commitments = {client: message.commitment for client, message in shares.items()}
        for client in sorted(shares):
            chosen = [entry for entry in shares[client].sealed if entry[0] in shares]
            self._holders[client] = tuple(holder for holder, _, _ in chosen)
            for holder, partner, sealed in chosen:
                boxes[holder].append((client, partner, sealed))
                if partner:
                    self._partners[client].add(holder)
                    self._partners[holder].add(client)
        self._held = {client: {owner for owner, _, _ in held} for client, held in boxes.items()}
        mask = messages.bit_mask(shares, len(self._invite.identities))
        return {
            client: messages.server_frame(2, Inbox(self._context, mask, tuple(held), subject))
            for client, held in boxes.items()
        }

    def _confirmations(self, arrived: Iterable[int]) -> dict[int, bytes]:
        confirmed, frames = frozenset(arrived), {}
        for client in confirmed:
            signers = [holder for holder in self._holders[client] if holder in confirmed][: self._sharing.threshold]
            signatures = tuple((signer, self._signatures[signer]) for signer in signers)
            frames[client] = messages.server_frame(4, Confirmations(self._context, signatures))
        return frames

    def _unmask(self, answers: dict[int, Unmask]) -> None:
        held: dict[int, dict[int, bytes]] = {client: {} for client in self._holders}
        for holder, answer in answers.items():
            for owner, share in answer.shares:
                held[owner][holder + 1] = share
        add_streams(self._total, self._left_masks(held))
        total = self._ring.reduce_(self._total)
        attestation = Attestation.of(
            self._invite, self._roster_transcript, self._settled(), self._survivors, self._signatures
        )
        self._outcome = Outcome(total, tuple(sorted(self._survivors)), dict(self._lost), attestation)

    def _left_masks(self, held: dict[int, dict[int, bytes]]) -> Iterator[tuple[Prg, bool]]:
        """The masks that are still in the sum, and whether each is to be taken away."""
        for client, shares in held.items():
            if client in self._survivors:
                yield self._own_mask(client, shares), True
            elif self._partners[client] & self._survivors:
                yield from self._shared_masks(client, shares)

    def _own_mask(self, client: int, shares: dict[int, bytes]) -> Prg:
        """A survivor's own."""

        def own_secret(element: int) -> bytes | None:
            own = element.to_bytes(ELEMENT_BYTES, "big")[-SEED_BYTES:]
            return own if commitment(own, self._roster_transcript, client) == self._commitments[client] else None

        own = self._reconstructed(client, shares, own_secret)
        return Prg(self_seed(own, self._transcript, client))

    def _shared_masks(self, client: int, shares: dict[int, bytes]) -> Iterator[tuple[Prg, bool]]:
        """Those that a lost client shares with survivors."""

        def mask_pair(element: int) -> KeyPair | None:
            pair = KeyPair.of_number(element)
            return pair if pair.public == self._mask_keys[client] else None

        pair = self._reconstructed(client, shares, mask_pair)
        for partner in self._partners[client] & self._survivors:
            seed = pair_seed(pair, self._mask_keys[partner], self._transcript, client, partner)
            # The survivor added it if its number is the lower one.
            yield Prg(seed), partner < client

    def _reconstructed(self, client: int, shares: dict[int, bytes], check: Callable[[int], T | None]) -> T:
        """What ``check`` makes of a client's secret, from the first t neighbouring shares that it takes.

        Where there are more than t, a wrong share is gone round.
        """
        threshold, points = self._sharing.threshold, sorted(shares)
        if len(points) < threshold:
            raise PeerError(f"{len(points)} of the holders of client {client} are left, {threshold} are needed: no sum")
        for start in range(len(points) if len(points) > threshold else 1):
            chosen = tuple(sorted((points[start:] + points[:start])[:threshold]))
            if chosen not in self._weights:
                self._weights[chosen] = weights_at_zero(chosen)
            element = combine(self._weights[chosen], (int.from_bytes(shares[point], "big") for point in chosen))
            found = check(element)
            if found is not None:
                return found
        raise PeerError(f"the shares of a secret of client {client} reconstruct to something else: no sum")

    def __repr__(self) -> str:
        return f"MaskedServer({self._stage.name}, {len(self._awaited)} clients)"


def _only(kind: type[T], arrived: Mapping[int, FromClient]) -> dict[int, T]:
    return {client: message for client, message in arrived.items() if isinstance(message, kind)}
