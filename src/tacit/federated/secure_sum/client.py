"""A client of the masked sum: a state machine that is used for one round.

::

    NEW ─Invite→ ADVERTISED ─Roster→ SHARED ─Inbox→ READY ─mask()→ MASKED ─Survivors→ CONFIRMED ─Confirmations→ DONE
      any other message, or one that does not check out → FAILED

`MaskedClient.receive` takes a frame and gives the frame to answer with. In DONE and FAILED all secrets are gone and
nothing is answered any more. The specification is docs/spec/masked-sum.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NoReturn

from tacit.errors import InputError, PeerError
from tacit.federated.secure_sum import messages
from tacit.federated.secure_sum.agreement import (
    DIGEST_BYTES,
    KeyPair,
    Verify,
    commitment,
    digest,
    pair_seed,
    seal,
    self_seed,
    sign,
    unseal,
    verify,
)
from tacit.federated.secure_sum.messages import (
    ADVERT_BYTES,
    Advert,
    Confirm,
    Confirmations,
    Inbox,
    Invite,
    Masked,
    Roster,
    Shares,
    Subject,
    Survivors,
    Unmask,
)
from tacit.federated.secure_sum.parameters import PRIVACY_BITS, Assumption, privacy_bits
from tacit.federated.secure_sum.ring import Packed, Ring, Words
from tacit.identity import KEY_BYTES, SIGNATURE_BYTES, Identity
from tacit.ring.prg import SEED_BYTES, Prg, add_streams
from tacit.ring.shamir import ELEMENT_BYTES, split

_ROSTER_SLACK_BITS = 1.0
"""What drop-outs before the roster may cost: the fewer members, the coarser the whole numbers of corrupt clients."""


@dataclass(frozen=True)
class Policy:
    """What a client insists on, whatever the server asks.

    Args:
        minimum: the fewest vectors in a sum.
        assumption: about the other clients and the server.

    Raises:
        InputError: the minimum is below 3, where a client could take its own vector from the sum of two.
    """

    minimum: int
    assumption: Assumption = field(default_factory=Assumption)

    def __post_init__(self) -> None:
        if self.minimum < 3:
            raise InputError(f"minimum={self.minimum}: a sum of fewer than 3 vectors tells one client another's")


@dataclass(frozen=True)
class Task:
    """What a client expects to be asked for.

    Args:
        ring: Z/2^b.
        length: residues in its vector.
        application: a digest of what else the sum is about, such as the model and the encoding; 32 bytes.

    Raises:
        InputError: the length is below 1 or the digest not of 32 bytes.
    """

    ring: Ring
    length: int
    application: bytes = bytes(DIGEST_BYTES)

    def __post_init__(self) -> None:
        if self.length < 1 or len(self.application) != DIGEST_BYTES:
            raise InputError(f"a sum of {self.length} entries under a digest of {len(self.application)} bytes")

    @property
    def subject(self) -> Subject:
        """As the server must say it."""
        return Subject(self.length, self.ring.bits, self.application)


class State(Enum):
    """Where a client is in its round."""

    NEW = "new"
    ADVERTISED = "advertised"
    SHARED = "shared"
    READY = "ready"
    MASKED = "masked"
    CONFIRMED = "confirmed"
    DONE = "done"
    FAILED = "failed"


class _Secrets:
    """What a client must not keep beyond its use."""

    def __init__(self, prg: Prg) -> None:
        self.prg = prg
        self.mask_pair = KeyPair(prg)
        self.seal_pair = KeyPair(prg)
        self.own = prg.bytes(SEED_BYTES)
        self.held: dict[int, bytes] = {}


class MaskedClient:
    """One client in one round.

    Args:
        identity: its long-term key.
        pinned: the identities it accepts in a cohort, its own among them.
        policy: what it insists on.
        task: what it expects to be asked for; ``None`` while that is not known, see `expect`.
        prg: where its keys, polynomials and choices come from; used by nobody else.
        verify: checks signatures.
    """

    def __init__(
        self,
        identity: Identity,
        pinned: frozenset[bytes],
        policy: Policy,
        task: Task | None,
        prg: Prg,
        verify: Verify = verify,
    ) -> None:
        self._verify = verify
        self._identity, self._pinned, self._policy, self._task = identity, pinned, policy, task
        self._secrets: _Secrets | None = _Secrets(prg)
        self._invited = 0
        self._state = State.NEW

    @property
    def state(self) -> State:
        """Where it is in its round."""
        return self._state

    @property
    def invited(self) -> int:
        """How many clients the cohort has that it was invited to; 0 before that."""
        return self._invited

    def expect(self, task: Task) -> None:
        """Settle what the sum must be of and for, before `Inbox` comes.

        Raises:
            InputError: it is settled already.
        """
        if self._task is not None:
            raise InputError("what a client's sum is for is settled once")
        self._task = task

    def receive(self, frame: bytes) -> bytes | None:
        """Take a frame from the server.

        Returns:
            The frame to answer with; ``None`` after `Inbox`, which `mask` answers.

        Raises:
            CodecError: the frame does not parse, or belongs to another round.
            PeerError: it does not come now, or the server or another client did not keep to the protocol.
            InputError: the round asks for what this client does not agree to.
                After any of them the client is in FAILED and the round goes on without it.
        """
        try:
            return self._receive(frame)
        except BaseException:
            self._end(State.FAILED)
            raise

    def _receive(self, frame: bytes) -> bytes | None:
        stage, message = messages.read_server_frame(frame)
        if self._state is State.NEW and isinstance(message, Invite) and stage == 0:
            return self._advertise(message)
        if self._state in (State.NEW, State.READY, State.DONE, State.FAILED):
            raise PeerError(f"a message {type(message).__name__} came to a client in state {self._state.name}")
        messages.require_context(message, self._context)
        if self._state is State.ADVERTISED and isinstance(message, Roster) and stage == 1:
            return self._share(message)
        if self._state is State.SHARED and isinstance(message, Inbox) and stage == 2:
            self._hold(message)
            return None
        if self._state is State.MASKED and isinstance(message, Survivors) and stage == 3:
            return self._confirm(message)
        if self._state is State.CONFIRMED and isinstance(message, Confirmations) and stage == 4:
            return self._unmask(message)
        raise PeerError(f"a message {type(message).__name__} came to a client in state {self._state.name}")

    def _advertise(self, invite: Invite) -> bytes:
        messages.check_invite(invite)
        self._agree_to(invite)
        self._invite, self._context = invite, invite.context
        self._invited, self._number = len(invite.identities), invite.identities.index(self._identity.public)
        secrets = self._live()
        advert = Advert(self._number, secrets.mask_pair.public, secrets.seal_pair.public)
        return self._answer(State.ADVERTISED, 0, advert)

    def _agree_to(self, invite: Invite) -> None:
        n, policy = len(invite.identities), self._policy
        if self._identity.public not in invite.identities or not self._pinned.issuperset(invite.identities):
            raise InputError(
                "the cohort holds an identity that is not pinned, or not this client's own: nothing is sent"
            )
        if invite.minimum < policy.minimum:
            raise InputError(f"the round may end with {invite.minimum} vectors, this client wants {policy.minimum}")
        bits = privacy_bits(n, invite.sharing, policy.assumption)
        if bits < PRIVACY_BITS:
            raise InputError(
                f"{invite.holders} holders, {invite.partners} partners and a threshold of {invite.threshold} in a "
                f"cohort of {n} give {bits:.1f} bits of privacy under this client's assumption: "
                f"{PRIVACY_BITS:.0f} are needed"
            )

    def _share(self, roster: Roster) -> bytes:
        n = len(self._invite.identities)
        members = messages.members_of(roster.members, n)
        if len(roster.adverts) != ADVERT_BYTES * len(members) or self._number not in members:
            raise PeerError("the roster does not list one advert for each member, this client among them")
        if len(members) < self._invite.minimum:
            raise PeerError(f"the roster lists {len(members)} clients, below the minimum of {self._invite.minimum}")
        sharing = self._invite.sharing.among(len(members))
        bits = privacy_bits(len(members), sharing, self._policy.assumption)
        if bits < PRIVACY_BITS - _ROSTER_SLACK_BITS:
            raise PeerError(f"too few clients advertised: {len(members)} give {bits:.1f} bits of privacy")
        self._sharing, self._adverts = sharing, roster.adverts
        self._place = {client: at for at, client in enumerate(members)}
        self._verified: dict[int, Advert] = {}
        self._transcript = messages.transcript_of(self._context, roster)
        secrets = self._live()
        own = self._unchecked_advert(self._number)
        if (own.mask_key, own.seal_key) != (secrets.mask_pair.public, secrets.seal_pair.public):
            raise PeerError("the roster lists other keys than this client's own")
        self._holders = self._choose([client for client in members if client != self._number], secrets.prg)
        self._partners = frozenset(self._holders[: sharing.partners])
        shares = self._sealed_shares(secrets)
        # Nothing is drawn any more, and from its seed all the secrets could be had again.
        del secrets.prg
        return self._answer(State.SHARED, 1, shares)

    def _choose(self, others: list[int], prg: Prg) -> tuple[int, ...]:
        """The holders, drawn without replacement: nobody else has a say in who holds this client's shares."""
        for at in range(self._sharing.holders):
            chosen = at + prg.below(len(others) - at)
            others[at], others[chosen] = others[chosen], others[at]
        return tuple(others[: self._sharing.holders])

    def _sealed_shares(self, secrets: _Secrets) -> Shares:
        points = [holder + 1 for holder in self._holders]
        threshold = self._sharing.threshold
        of_key = split(secrets.mask_pair.number, threshold, points, secrets.prg)
        of_own = split(int.from_bytes(secrets.own, "big"), threshold, points, secrets.prg)
        sealed = []
        for holder, key_share, own_share in zip(self._holders, of_key, of_own, strict=True):
            partner = holder in self._partners
            both = key_share.to_bytes(ELEMENT_BYTES, "big") + own_share.to_bytes(ELEMENT_BYTES, "big")
            key = self._advert(holder).seal_key
            box = seal(secrets.seal_pair, key, self._transcript, self._number, holder, partner, both)
            sealed.append((holder, partner, box))
        promise = commitment(secrets.own, self._transcript, self._number)
        return Shares(self._number, self._transcript, promise, tuple(sealed))

    def _hold(self, inbox: Inbox) -> None:
        task, subject = self._task, inbox.subject
        if task is None or subject != task.subject:
            found = "no" if task is None else f"{task.length} of {task.ring.bits} bits"
            raise InputError(
                f"the round sums {subject.length} residues of {subject.bits} bits, this client has {found}, or they "
                "are of different models or encodings: no vector is sent"
            )
        self._subject, self._sum_transcript = subject, messages.sum_transcript(self._transcript, subject)
        sharers = frozenset(messages.members_of(inbox.sharers, len(self._invite.identities)))
        senders = [sender for sender, _, _ in inbox.sealed]
        if self._number not in sharers or not sharers <= self._place.keys():
            raise PeerError("the clients that shared are not members of the roster, or this client is not among them")
        if len(set(senders)) != len(senders) or self._number in senders or not sharers.issuperset(senders):
            raise PeerError("shares came twice, from this client itself, or from a client that did not share")
        most = self._sharing.holders + 10 * (math.isqrt(self._sharing.holders) + 1)
        if len(senders) > most:
            raise PeerError(f"{len(senders)} clients chose this one as a holder, more than chance allows ({most})")
        if len(sharers.intersection(self._holders)) < self._sharing.threshold:
            raise PeerError(f"fewer than {self._sharing.threshold} of this client's holders are left")
        live = self._partners & sharers
        if len(live) < self._sharing.least_partners:
            raise PeerError(
                f"only {len(live)} of this client's partners are left, {self._sharing.least_partners} are needed"
            )
        secrets, partners = self._live(), set(live)
        for sender, partner, box in inbox.sealed:
            key = self._advert(sender).seal_key
            secrets.held[sender] = unseal(secrets.seal_pair, key, self._transcript, sender, self._number, partner, box)
            if partner:
                partners.add(sender)
        self._sharers, self._masking = sharers, partners
        self._state = State.READY

    def mask(self, words: Words) -> bytes:
        """Answer `Inbox` with the masked vector; the caller's stays as it is.

        Args:
            words: residues modulo 2^b, shape ``(length,)``.

        Returns:
            The frame to send: b bits a residue.

        Raises:
            InputError: the vector is not one of this round, or none is due: before `Inbox`, or a second time.
        """
        if self._state is not State.READY:
            raise InputError(
                f"a client in state {self._state.name} has no vector to mask: one is due once, after Inbox"
            )
        ring, secrets = self._subject.ring, self._live()
        ring.require(words, self._subject.length)
        try:
            masked = words.copy()
            add_streams(masked, self._masks(secrets))
            packed = ring.pack(ring.reduce_(masked))
            # From here on the two secrets live in their shares only.
            del secrets.mask_pair, secrets.own, secrets.seal_pair
            message = Masked(self._number, self._sum_transcript, vector_digest(packed))
            return self._answer(State.MASKED, 2, message, packed)
        except BaseException:
            self._end(State.FAILED)
            raise

    def _masks(self, secrets: _Secrets) -> Iterator[tuple[Prg, bool]]:
        """The client's own mask, and those that it shares; the lower number of a pair adds, the other takes away."""
        yield Prg(self_seed(secrets.own, self._sum_transcript, self._number)), False
        for other in self._masking:
            key = self._advert(other).mask_key
            seed = pair_seed(secrets.mask_pair, key, self._sum_transcript, self._number, other)
            yield Prg(seed), self._number > other

    def _confirm(self, message: Survivors) -> bytes:
        survivors = frozenset(messages.members_of(message.survivors, len(self._invite.identities)))
        if self._number not in survivors or not survivors <= self._sharers:
            raise PeerError("the survivors are not clients that shared, or this client is not among them")
        if len(survivors) < self._invite.minimum:
            raise PeerError(f"{len(survivors)} vectors arrived, below the minimum of {self._invite.minimum}")
        self._survivors = survivors
        return self._answer(State.CONFIRMED, 3, Confirm(self._number, self._sum_transcript, message.survivors))

    def _unmask(self, message: Confirmations) -> bytes:
        signers = [signer for signer, _ in message.signatures]
        if len(set(signers)) != len(signers) or not self._survivors.intersection(self._holders).issuperset(signers):
            raise PeerError("a confirmation came twice, or from a client that is not one of the surviving holders")
        if len(signers) < self._sharing.threshold:
            raise PeerError(f"{len(signers)} holders confirmed the survivors, {self._sharing.threshold} are needed")
        mask = messages.bit_mask(self._survivors, len(self._invite.identities))
        for signer, signature in message.signatures:
            content = messages.encode(Confirm(signer, self._sum_transcript, mask))
            if not self._verify(self._invite.identities[signer], self._context, content, signature):
                raise PeerError(
                    f"client {signer} did not confirm these survivors: the server told it of others, or forged"
                )
        shares = tuple(
            (owner, both[ELEMENT_BYTES:] if owner in self._survivors else both[:ELEMENT_BYTES])
            for owner, both in sorted(self._live().held.items())
        )
        answer = self._answer(State.DONE, 4, Unmask(self._number, self._sum_transcript, shares))
        self._end(State.DONE)
        return answer

    def _advert(self, client: int) -> Advert:
        """A member's keys, once its signature has been checked.

        Raises:
            PeerError: it did not sign them.
        """
        if client not in self._verified:
            advert = self._unchecked_advert(client)
            start = self._place[client] * ADVERT_BYTES + 2 * KEY_BYTES
            signature = self._adverts[start : start + SIGNATURE_BYTES]
            if not self._verify(self._invite.identities[client], self._context, messages.encode(advert), signature):
                raise PeerError(f"the keys that the roster lists for client {client} are not signed by it")
            self._verified[client] = advert
        return self._verified[client]

    def _unchecked_advert(self, client: int) -> Advert:
        start = self._place[client] * ADVERT_BYTES
        keys = self._adverts[start : start + 2 * KEY_BYTES]
        return Advert(client, keys[:KEY_BYTES], keys[KEY_BYTES:])

    def _answer(self, state: State, stage: int, message: messages.FromClient, packed: Packed | None = None) -> bytes:
        content = messages.encode(message)
        frame = messages.client_frame(stage, content, sign(self._identity, self._context, content), packed)
        self._state = state
        return frame

    def _live(self) -> _Secrets:
        if self._secrets is None:
            raise PeerError("this client's round is over")
        return self._secrets

    def _end(self, state: State) -> None:
        self._state, self._secrets = state, None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise InputError("a client cannot be copied: its masks would be used twice")

    def __repr__(self) -> str:
        return f"MaskedClient({self._state.name})"


def vector_digest(packed: Packed) -> bytes:
    """What a client signs of its masked vector."""
    return digest(b"vector", packed.view("u1").data)
