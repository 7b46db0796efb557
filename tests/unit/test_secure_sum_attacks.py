"""The masked sum under interference: on the way, by other clients, and by a server that lies."""

from collections.abc import Callable, Container
from dataclasses import replace
from itertools import product

import msgspec
import numpy as np
import pytest

from secure_sums import STAGES, Ran, World, prg, require_exact, run
from tacit import wire
from tacit.errors import CodecError, InputError, PeerError
from tacit.federated.secure_sum import messages
from tacit.federated.secure_sum.agreement import sign
from tacit.federated.secure_sum.client import MaskedClient, State, Task
from tacit.federated.secure_sum.messages import Advert, Confirmations, Inbox, Invite, Roster, Subject, Survivors
from tacit.federated.secure_sum.parameters import Assumption
from tacit.federated.secure_sum.server import MaskedServer, Stage
from tacit.identity import Identity

VICTIM = 1
WORLD = World(4)
HONEST = run(WORLD)
OTHER_ROUND = run(World(4, round=9))
DIRECTIONS = ("up", "down")
everywhere = pytest.mark.parametrize("stage", STAGES)
both_ways = pytest.mark.parametrize("direction", DIRECTIONS)


def on_victim(direction: str, stage: Stage, change: Callable[[bytes], list[bytes]]):
    def tamper(to: str, at: Stage, number: int, frame: bytes) -> list[bytes]:
        return change(frame) if (to, at, number) == (direction, stage, VICTIM) else [frame]

    return tamper


def survivors_without(direction: str, stage: Stage) -> tuple[int, ...]:
    """A client that is lost before its vector arrived is not in the sum."""
    del direction
    return tuple(i for i in range(4) if i != VICTIM) if stage <= Stage.MASK else (0, 1, 2, 3)


def require_lost(ran: Ran, direction: str, stage: Stage) -> None:
    require_exact(WORLD, ran)
    assert ran.survivors == survivors_without(direction, stage)


class TestOnTheWay:
    @everywhere
    @both_ways
    def test_a_dropped_message_loses_one_client(self, direction: str, stage: Stage) -> None:
        ran = run(WORLD, on_victim(direction, stage, lambda frame: []))
        require_lost(ran, direction, stage)
        assert not ran.refused

    @everywhere
    def test_a_message_that_arrives_twice_at_the_server_counts_once(self, stage: Stage) -> None:
        ran = run(WORLD, on_victim("up", stage, lambda frame: [frame, frame]))
        require_exact(WORLD, ran)
        assert ran.survivors == (0, 1, 2, 3)
        assert [text.startswith("server: client 1 has answered before") for text in ran.refused] == [True]

    @everywhere
    def test_a_message_that_arrives_twice_at_a_client_is_answered_once(self, stage: Stage) -> None:
        ran = run(WORLD, on_victim("down", stage, lambda frame: [frame, frame]))
        require_exact(WORLD, ran)
        assert any(text.startswith("client 1: ") for text in ran.refused)
        assert (VICTIM in ran.survivors) == (stage >= Stage.MASK)

    @pytest.mark.parametrize("seed", range(3))
    def test_the_order_of_answers_does_not_matter(self, seed: int) -> None:
        draw = prg(4, seed)
        ran = run(WORLD, order=lambda numbers: [numbers.pop(draw.below(len(numbers))) for _ in range(len(numbers))])
        require_exact(WORLD, ran)
        assert not ran.refused

    @everywhere
    @both_ways
    def test_messages_of_other_stages_are_refused_in_this_one(self, direction: str, stage: Stage) -> None:
        for other in STAGES:
            if other is not stage:
                strange = HONEST.frames[direction, other, VICTIM]
                ran = run(WORLD, on_victim(direction, stage, lambda frame, strange=strange: [strange]))
                require_lost(ran, direction, stage)
                assert len(ran.refused) >= 1

    @everywhere
    @both_ways
    def test_messages_of_another_round_are_refused(self, direction: str, stage: Stage) -> None:
        strange = OTHER_ROUND.frames[direction, stage, VICTIM]
        assert strange != HONEST.frames[direction, stage, VICTIM]
        ran = run(WORLD, on_victim(direction, stage, lambda frame: [strange]))
        require_lost(ran, direction, stage)
        assert len(ran.refused) >= 1

    @everywhere
    def test_the_server_takes_the_real_message_after_one_of_another_round(self, stage: Stage) -> None:
        strange = OTHER_ROUND.frames["up", stage, VICTIM]
        ran = run(WORLD, on_victim("up", stage, lambda frame: [strange, frame]))
        require_exact(WORLD, ran)
        assert ran.survivors == (0, 1, 2, 3)
        assert len(ran.refused) == 1

    @everywhere
    @both_ways
    def test_truncated_messages_are_refused(self, direction: str, stage: Stage) -> None:
        for kept in (0, 1, wire.PREFIX_BYTES, 0.5, 0.9, -1):
            cut = on_victim(direction, stage, lambda f, k=kept: [f[: int(k * len(f)) if isinstance(k, float) else k]])
            ran = run(WORLD, cut)
            require_lost(ran, direction, stage)
            assert len(ran.refused) == 1

    @everywhere
    def test_every_flipped_bit_of_an_answer_is_refused(self, stage: Stage) -> None:
        draw = prg(5, stage)

        def flips(frame: bytes) -> list[bytes]:
            return [*(flipped(frame, draw.below(8 * len(frame))) for _ in range(40)), frame]

        ran = run(WORLD, on_victim("up", stage, flips))
        require_exact(WORLD, ran)
        assert ran.survivors == (0, 1, 2, 3)
        assert len(ran.refused) == 40

    @everywhere
    def test_a_flipped_bit_to_a_client_never_changes_a_sum(self, stage: Stage) -> None:
        draw, refused = prg(6, stage), 0
        for _ in range(12):
            frame = HONEST.frames["down", stage, VICTIM]
            changed = flipped(frame, draw.below(8 * len(frame)))
            ran = run(WORLD, on_victim("down", stage, lambda frame, changed=changed: [changed]))
            require_exact(WORLD, ran)
            refused += bool(ran.refused)
        assert refused >= 11

    @everywhere
    def test_messages_signed_by_the_wrong_key_are_refused(self, stage: Stage) -> None:
        stranger = Identity(bytes(31) + b"\7")

        def resign(frame: bytes) -> list[bytes]:
            _, message, envelope, packed = messages.read_client_frame(frame, 1 << 20)
            content = messages.encode(message)
            signature = sign(stranger, WORLD.invite.context, content)
            forged = messages.client_frame(stage, content, signature, packed)
            assert forged != messages.client_frame(stage, content, envelope.signature, packed) == frame
            return [forged]

        ran = run(WORLD, on_victim("up", stage, resign))
        require_lost(ran, "up", stage)
        assert "not signed by client 1" in ran.refused[0]

    @everywhere
    def test_nobody_answers_in_anothers_name(self, stage: Stage) -> None:
        def rename(frame: bytes) -> list[bytes]:
            _, message, _, packed = messages.read_client_frame(frame, 1 << 20)
            content = messages.encode(msgspec.structs.replace(message, sender=2))
            own = sign(WORLD.identity(VICTIM), WORLD.invite.context, content)
            return [messages.client_frame(stage, content, own, packed)]

        ran = run(
            WORLD, on_victim("up", stage, rename), order=lambda numbers: sorted(numbers, key=lambda i: i != VICTIM)
        )
        require_lost(ran, "up", stage)
        assert "not signed by client 2" in ran.refused[0]


def flipped(frame: bytes, bit: int) -> bytes:
    changed = bytearray(frame)
    changed[bit >> 3] ^= 1 << (bit & 7)
    return bytes(changed)


def at(stage: Stage, number: int = 0, world: World = WORLD, ran: Ran = HONEST) -> MaskedClient:
    """A client that has answered everything before ``stage``."""
    client = world.client(number)
    for before in STAGES[:stage]:
        client.receive(ran.frames["down", before, number])
        if before is Stage.MASK:
            client.mask(world.vector(number))
    return client


def sent(stage: Stage, number: int = 0, ran: Ran = HONEST) -> messages.FromServer:
    return messages.read_server_frame(ran.frames["down", stage, number])[1]


def tell(client: MaskedClient, stage: Stage, message: messages.FromServer, reason: str) -> None:
    """The client refuses the message, and is done with the round."""
    with pytest.raises((PeerError, InputError), match=reason):
        client.receive(messages.server_frame(stage, message))
    assert client.state is State.FAILED
    assert client._secrets is None


CONTEXT = WORLD.invite.context


def mask(*clients: int, n: int = 4) -> bytes:
    return messages.bit_mask(clients, n)


class TestLyingAboutSurvivors:
    WIDE = World(6)

    def test_different_survivor_sets_are_noticed_before_any_share_is_released(self) -> None:
        world = self.WIDE
        honest = run(world)
        sets = {number: frozenset(range(6)) - {5 if number < 3 else 4} for number in range(4)}
        clients, confirmed = {}, {}
        for number, claimed in sets.items():
            clients[number] = at(Stage.CONFIRM, number, world, honest)
            answer = clients[number].receive(
                messages.server_frame(3, Survivors(world.invite.context, mask(*claimed, n=6)))
            )
            confirmed[number] = messages.read_client_frame(answer, 0)[2].signature
        for number, client in clients.items():
            others = tuple((other, signature) for other, signature in confirmed.items() if other != number)
            with pytest.raises(PeerError, match=r"did not confirm these survivors|holders confirmed"):
                client.receive(messages.server_frame(4, Confirmations(world.invite.context, others)))

    def test_too_few_confirmations_of_ones_own_set(self) -> None:
        signatures = sent(Stage.UNMASK).signatures
        assert len(signatures) == WORLD.invite.threshold
        tell(at(Stage.UNMASK), Stage.UNMASK, Confirmations(CONTEXT, signatures[:1]), "1 holders confirmed")

    def test_a_confirmation_does_not_count_twice(self) -> None:
        signatures = sent(Stage.UNMASK).signatures
        tell(at(Stage.UNMASK), Stage.UNMASK, Confirmations(CONTEXT, signatures[:1] * 2), "came twice")

    def test_ones_own_confirmation_does_not_count(self) -> None:
        own = messages.read_client_frame(HONEST.frames["up", Stage.CONFIRM, 0], 0)[2].signature
        signatures = (sent(Stage.UNMASK).signatures[0], (0, own))
        tell(at(Stage.UNMASK), Stage.UNMASK, Confirmations(CONTEXT, signatures), "not one of the surviving holders")

    def test_a_server_that_asks_for_the_other_share_of_a_victim_gets_none(self) -> None:
        # First the victim is a survivor; then it is said to be lost, which would release its masking key.
        without = Survivors(CONTEXT, mask(0, 2, 3))
        tell(at(Stage.UNMASK), Stage.CONFIRM, without, "CONFIRMED")
        done = at(Stage.UNMASK)
        done.receive(HONEST.frames["down", Stage.UNMASK, 0])
        for stage, message in ((3, without), (3, sent(Stage.CONFIRM)), (4, sent(Stage.UNMASK))):
            with pytest.raises(PeerError, match=r"FAILED|DONE"):
                done.receive(messages.server_frame(stage, message))

    def test_no_order_of_true_and_false_messages_releases_both_shares_of_anyone(self) -> None:
        # Three rounds with the same keys and different survivors: what a server could have gathered to lie with.
        told = []
        for lost in (None, 3, 2):
            ran = run(
                WORLD, lambda direction, stage, i, frame, lost=lost: [] if (i, stage) == (lost, Stage.MASK) else [frame]
            )
            require_exact(WORLD, ran)
            assert ran.frames["down", Stage.MASK, 0] == HONEST.frames["down", Stage.MASK, 0]
            told += [ran.frames["down", stage, 0] for stage in (Stage.CONFIRM, Stage.UNMASK)]
        completed = 0
        for messages_sent in product(told, repeat=3):
            client, released = at(Stage.CONFIRM), []
            for frame in messages_sent:
                try:
                    answer = client.receive(frame)
                except PeerError:
                    continue
                _, message, *_ = messages.read_client_frame(answer, 0)
                released += getattr(message, "shares", ())
            assert len({owner for owner, _ in released}) == len(released)
            completed += bool(released)
        # Only a set and its own confirmations are answered to the end, whatever follows.
        assert completed == 3 * len(told)

    @pytest.mark.parametrize("lost", [None, 3])
    def test_one_kind_of_share_is_released_of_each_client(self, lost: int | None) -> None:
        ran = run(WORLD, lambda direction, stage, i, frame: [] if (i, stage) == (lost, Stage.MASK) else [frame])
        released: dict[int, set[bytes]] = {i: set() for i in range(4)}
        for number in ran.unmasked:
            _, message, *_ = messages.read_client_frame(ran.frames["up", Stage.UNMASK, number], 0)
            owners = [owner for owner, _ in message.shares]
            assert len(owners) == len(set(owners))
            for owner, share in message.shares:
                released[owner].add(share)
        assert all(len(shares) == len(ran.unmasked - {owner}) for owner, shares in released.items())

    @pytest.mark.parametrize(
        ("survivors", "reason"),
        [
            (mask(1, 2, 3), "this client is not among them"),
            (mask(0, 1), "below the minimum of 3"),
            (mask(), "not among them"),
            (b"", "mask of 4 bits"),
            (b"\x1f", "mask of 4 bits"),
            (b"\x0f\x00", "mask of 4 bits"),
        ],
    )
    def test_impossible_survivors(self, survivors: bytes, reason: str) -> None:
        tell(at(Stage.CONFIRM), Stage.CONFIRM, Survivors(CONTEXT, survivors), reason)

    def test_a_client_that_did_not_share_cannot_survive(self) -> None:
        ran = run(WORLD, lambda direction, stage, i, frame: [] if (i, stage) == (3, Stage.SHARE) else [frame])
        tell(at(Stage.CONFIRM, ran=ran), Stage.CONFIRM, Survivors(CONTEXT, mask(0, 1, 2, 3)), "not clients that shared")


def roster(change: Callable[[int, Advert, bytes], tuple[Advert, bytes]], members: range = range(4)) -> Roster:
    """The honest roster with changed entries."""
    listed = b""
    for i in members:
        _, advert, envelope, _ = messages.read_client_frame(HONEST.frames["up", Stage.ADVERTISE, i], 0)
        new, signature = change(i, advert, envelope.signature)
        listed += new.mask_key + new.seal_key + signature
    return Roster(CONTEXT, mask(*members), listed)


class TestLyingAboutKeys:
    STRANGE = Advert(VICTIM, b"\x09" + bytes(31), b"\x09" + bytes(31))

    def test_the_roster_without_changes_is_the_honest_one(self) -> None:
        assert roster(lambda i, advert, signature: (advert, signature)) == sent(Stage.SHARE)

    @pytest.mark.parametrize("which", ["mask_key", "seal_key"])
    def test_swapped_keys_of_another_client(self, which: str) -> None:
        def swap(i: int, advert: Advert, signature: bytes) -> tuple[Advert, bytes]:
            strange = msgspec.structs.replace(advert, **{which: self.STRANGE.mask_key})
            return (strange if i == VICTIM else advert), signature

        tell(at(Stage.SHARE), Stage.SHARE, roster(swap), "client 1 are not signed")

    def test_keys_signed_by_another_member(self) -> None:
        content = messages.encode(self.STRANGE)
        forged = sign(WORLD.identity(2), CONTEXT, content)
        lie = roster(lambda i, advert, signature: (self.STRANGE, forged) if i == VICTIM else (advert, signature))
        tell(at(Stage.SHARE), Stage.SHARE, lie, "client 1 are not signed")

    def test_two_members_keys_exchanged(self) -> None:
        entries = {i: messages.read_client_frame(HONEST.frames["up", Stage.ADVERTISE, i], 0) for i in (1, 2)}

        def exchange(i: int, advert: Advert, signature: bytes) -> tuple[Advert, bytes]:
            if i not in entries:
                return advert, signature
            return entries[3 - i][1], entries[3 - i][2].signature

        tell(at(Stage.SHARE), Stage.SHARE, roster(exchange), "are not signed")

    def test_other_keys_than_ones_own(self) -> None:
        lie = roster(lambda i, advert, signature: (self.STRANGE, signature) if i == 0 else (advert, signature))
        tell(at(Stage.SHARE), Stage.SHARE, lie, "other keys than this client's own")

    def test_keys_of_an_earlier_round(self) -> None:
        _, old, envelope, _ = messages.read_client_frame(OTHER_ROUND.frames["up", Stage.ADVERTISE, VICTIM], 0)
        lie = roster(lambda i, advert, signature: (old, envelope.signature) if i == VICTIM else (advert, signature))
        tell(at(Stage.SHARE), Stage.SHARE, lie, "client 1 are not signed")

    def test_a_key_of_low_order(self) -> None:
        weak = Advert(VICTIM, bytes(32), bytes(32))
        signature = sign(WORLD.identity(VICTIM), CONTEXT, messages.encode(weak))
        lie = roster(lambda i, advert, real: (weak, signature) if i == VICTIM else (advert, real))
        tell(at(Stage.SHARE), Stage.SHARE, lie, "low order")

    @pytest.mark.parametrize(
        ("members", "reason"), [(range(1, 4), "this client among them"), (range(2), "below the minimum of 3")]
    )
    def test_a_roster_that_leaves_clients_out(self, members: range, reason: str) -> None:
        kept = roster(lambda i, advert, signature: (advert, signature), members)
        tell(at(Stage.SHARE), Stage.SHARE, kept, reason)

    def test_a_roster_with_a_byte_too_many_or_too_few(self) -> None:
        honest = sent(Stage.SHARE)
        for adverts in (honest.adverts + b"\0", honest.adverts[:-1], b""):
            lie = msgspec.structs.replace(honest, adverts=adverts)
            tell(at(Stage.SHARE), Stage.SHARE, lie, "one advert for each member")

    def test_a_roster_too_small_for_the_clients_assumption(self) -> None:
        # Some numbers of members are worse than their fraction of corrupt ones says, since clients are whole.
        world = World(60, assumption=Assumption(0.2, 0.1, False), minimum=20)
        tell(advertised(world), Stage.SHARE, roster_of(world, range(31)), "31 give 37.5 bits of privacy")


def advertised(world: World) -> MaskedClient:
    """Client 0, which has answered the invitation."""
    client = world.client(0)
    client.receive(MaskedServer(world.invite).invite())
    return client


def roster_of(world: World, members: range) -> Roster:
    """The honest roster of some members."""
    listed = b""
    for number in members:
        frame = world.client(number).receive(MaskedServer(world.invite).invite())
        _, advert, envelope, _ = messages.read_client_frame(frame, 0)
        listed += advert.mask_key + advert.seal_key + envelope.signature
    return Roster(world.invite.context, mask(*members, n=world.n), listed)


class TestLyingAboutShares:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda box: (*box, box[0]), "came twice"),
            (lambda box: box[1:], "READY|none"),
            (lambda box: (*box[:2], (0, *box[2][1:])), "from this client itself"),
            (lambda box: ((2, *box[0][1:]), (1, *box[1][1:]), box[2]), "do not open"),
            (lambda box: (*box[:2], (3, not box[2][1], box[2][2])), "do not open"),
            (lambda box: (*box[:2], (3, True, bytes(80))), "do not open"),
        ],
        ids=["twice", "withheld", "own", "exchanged", "partner", "garbage"],
    )
    def test_a_changed_inbox(self, change, reason: str) -> None:
        honest = sent(Stage.MASK)
        client, lie = at(Stage.MASK), msgspec.structs.replace(honest, sealed=change(honest.sealed))
        if reason == "READY|none":
            # Shares that do not arrive are shares that are not held; the other holders have theirs.
            assert client.receive(messages.server_frame(2, lie)) is None
            assert client.state is State.READY
            return
        tell(client, Stage.MASK, lie, reason)

    def test_shares_sealed_for_another_holder(self) -> None:
        theirs = sent(Stage.MASK, 2).sealed
        honest = sent(Stage.MASK)
        lie = msgspec.structs.replace(honest, sealed=tuple(entry for entry in theirs if entry[0] != 0))
        tell(at(Stage.MASK), Stage.MASK, lie, "do not open")

    @pytest.mark.parametrize(
        ("sharers", "reason"),
        [
            (mask(0), "from a client that did not share"),
            (mask(1, 2, 3), "this client is not among them"),
            (b"\xff", "mask of 4 bits"),
        ],
    )
    def test_changed_sharers(self, sharers: bytes, reason: str) -> None:
        lie = msgspec.structs.replace(sent(Stage.MASK), sharers=sharers)
        tell(at(Stage.MASK), Stage.MASK, lie, reason)

    def test_too_few_holders_left(self) -> None:
        honest = sent(Stage.MASK)
        lie = Inbox(CONTEXT, mask(0, 1), tuple(entry for entry in honest.sealed if entry[0] == 1), WORLD.subject)
        tell(at(Stage.MASK), Stage.MASK, lie, "fewer than 2 of this client's holders")

    def test_too_few_partners_left(self) -> None:
        world = World(60)
        client = advertised(world)
        _, message, *_ = messages.read_client_frame(
            client.receive(messages.server_frame(1, roster_of(world, range(60)))), 0
        )
        partners = [holder for holder, partner, _ in message.sealed if partner]
        spared = world.invite.sharing.least_partners
        # Enough holders are left, and fewer partners than a client insists on.
        left = set(range(60)) - set(partners[: len(partners) - spared + 1])
        assert len(left & {holder for holder, *_ in message.sealed}) > world.invite.threshold
        alone = Inbox(world.invite.context, mask(*left, n=60), (), world.subject)
        tell(client, Stage.MASK, alone, f"only {spared - 1} of this client's partners are left, {spared} are needed")

    def test_more_clients_choose_one_holder_than_chance_allows(self) -> None:
        world = World(100, assumption=Assumption(0.0, 0.0))
        client, context = advertised(world), world.invite.context
        client.receive(messages.server_frame(1, roster_of(world, range(world.n))))
        everybody = mask(*range(world.n), n=world.n)
        boxes = tuple((number, False, bytes(80)) for number in range(1, world.n))
        flood = Inbox(context, everybody, boxes, world.subject)
        tell(client, Stage.MASK, flood, "99 clients chose this one as a holder")


class TestLyingAboutTheRound:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"minimum": 2, "threshold": 2}, "threshold < survivors"),
            ({"threshold": 1}, "2 <= threshold"),
            ({"threshold": 4}, "threshold <= holders"),
            ({"holders": 4}, "holders < clients"),
            ({"partners": 4}, "partners <= holders"),
            ({"minimum": 5}, "survivors <= clients"),
            ({"identities": WORLD.invite.identities[1:]}, "holders < clients"),
            ({"identities": (*WORLD.invite.identities[1:], World(5).identity(4).public)}, "not pinned"),
            ({"identities": (*WORLD.invite.identities, World(5).identity(4).public)}, "not pinned"),
            ({"identities": (*WORLD.invite.identities, WORLD.invite.identities[1])}, "twice"),
        ],
    )
    def test_a_round_that_a_client_does_not_agree_to(self, changes: dict, reason: str) -> None:
        tell(at(Stage.ADVERTISE), Stage.ADVERTISE, msgspec.structs.replace(WORLD.invite, **changes), reason)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"length": 6}, "6 residues of 20 bits, this client has 5"),
            ({"bits": 19}, "of 19 bits"),
            ({"application": b"\1" * 32}, "different models or encodings"),
        ],
    )
    def test_a_sum_of_something_else_than_a_client_expects(self, changes: dict, reason: str) -> None:
        lie = msgspec.structs.replace(sent(Stage.MASK), subject=msgspec.structs.replace(WORLD.subject, **changes))
        tell(at(Stage.MASK), Stage.MASK, lie, reason)

    def test_a_sum_before_a_client_expects_any(self) -> None:
        tell(followed(unsettled(0)), Stage.MASK, sent(Stage.MASK), "this client has no")

    def test_clients_that_were_told_different_subjects_release_nothing_and_their_masks_stay(self) -> None:
        """A server that has keys and shares before it says what is summed, and then says two things."""
        world = World(6)
        honest = run(world)
        others = {number: Subject(5, 20, bytes([number % 2]) * 32) for number in range(6)}
        clients, vectors, confirmed = {}, {}, {}
        for number, subject in others.items():
            client = clients[number] = followed(unsettled(number, world), honest, number)
            client.expect(Task(world.ring, subject.length, subject.application))
            inbox = msgspec.structs.replace(sent(Stage.MASK, number, honest), subject=subject)
            client.receive(messages.server_frame(2, inbox))
            vectors[number] = messages.read_client_frame(client.mask(world.vector(number)), 1 << 20)[3]
            everybody = Survivors(world.invite.context, mask(*range(6), n=6))
            answer = client.receive(messages.server_frame(3, everybody))
            confirmed[number] = messages.read_client_frame(answer, 0)[2].signature
        for number, client in clients.items():
            signatures = tuple((other, signature) for other, signature in confirmed.items() if other != number)
            with pytest.raises(PeerError, match="did not confirm these survivors"):
                client.receive(messages.server_frame(4, Confirmations(world.invite.context, signatures)))
        # The masks of one subject are not those of another: nothing of an honest round fits.
        for number in (1, 3, 5):
            masked = messages.read_client_frame(honest.frames["up", Stage.MASK, number], 1 << 20)[3]
            assert not np.array_equal(vectors[number], masked)

    def test_what_a_sum_is_of_is_settled_once(self) -> None:
        with pytest.raises(InputError, match="settled once"):
            WORLD.client(0).expect(Task(WORLD.ring, 5))
        with pytest.raises(InputError, match="settled once"):
            WORLD.server.about(WORLD.subject)
        server = MaskedServer(WORLD.invite)
        for number in range(4):
            server.receive(HONEST.frames["up", Stage.ADVERTISE, number])
        server.close()
        for number in range(4):
            server.receive(HONEST.frames["up", Stage.SHARE, number])
        with pytest.raises(InputError, match="before it is settled"):
            server.close()
        server.about(WORLD.subject)
        assert server.close()[0] == HONEST.frames["down", Stage.MASK, 0]

    def test_a_cohort_below_the_clients_own_minimum(self) -> None:
        careful = replace(WORLD, minimum=4).client(0)
        tell(careful, Stage.ADVERTISE, WORLD.invite, "may end with 3 vectors, this client wants 4")

    @pytest.mark.parametrize(
        ("assumption", "threshold"), [(Assumption(0.1, 0.1, True), 12), (Assumption(0.2, 0.1, False), 4)]
    )
    def test_a_threshold_that_corrupt_holders_reach(self, assumption: Assumption, threshold: int) -> None:
        world = World(24, assumption=assumption)
        assert world.invite.threshold > threshold
        low = msgspec.structs.replace(world.invite, threshold=threshold)
        tell(world.client(0), Stage.ADVERTISE, low, "bits of privacy under this client's assumption")

    def test_so_few_partners_that_a_client_can_be_cut_off(self) -> None:
        world = World(100)
        few = msgspec.structs.replace(world.invite, partners=5)
        tell(world.client(0), Stage.ADVERTISE, few, "bits of privacy")

    def test_a_server_checks_its_settings_too(self) -> None:
        with pytest.raises(InputError, match="threshold"):
            MaskedServer(msgspec.structs.replace(WORLD.invite, threshold=9))

    def test_too_few_members_for_the_clients_assumption(self) -> None:
        world = World(20, minimum=3, assumption=Assumption(0.2, 0.1, True))
        invite = msgspec.structs.replace(world.invite, holders=15, partners=8)
        with pytest.raises(InputError, match="bits of privacy"):
            world.client(0).receive(messages.server_frame(0, invite))


def unsettled(number: int, world: World = WORLD) -> MaskedClient:
    """A client that does not know yet what will be summed."""
    pinned = frozenset(identity.public for identity in world.identities)
    seed = prg(1, world.round, number >> 8, number & 255)
    return MaskedClient(world.identity(number), pinned, world.policy, None, seed)


def followed(client: MaskedClient, ran: Ran = HONEST, number: int = 0) -> MaskedClient:
    """The client, when it has shared its secrets in a round that was run."""
    for stage in (Stage.ADVERTISE, Stage.SHARE):
        assert client.receive(ran.frames["down", stage, number]) == ran.frames["up", stage, number]
    return client


def wrong_shares(holders: set[int], lost: int | None, owners: Container[int] = range(4)):
    """Some holders send wrong shares of these, rightly signed; one client may be lost before its vector arrives."""

    def tamper(direction: str, stage: Stage, number: int, frame: bytes) -> list[bytes]:
        if (number, stage) == (lost, Stage.MASK):
            return []
        if (direction, stage) != ("up", Stage.UNMASK) or number not in holders:
            return [frame]
        _, message, *_ = messages.read_client_frame(frame, 0)
        shares = tuple(
            (owner, flipped(share, 7 + number) if owner in owners else share) for owner, share in message.shares
        )
        content = messages.encode(msgspec.structs.replace(message, shares=shares))
        return [messages.client_frame(stage, content, sign(WORLD.identity(number), CONTEXT, content))]

    return tamper


class TestCorruptClients:
    def forge(self, stage: Stage, change: Callable[[messages.FromClient], messages.FromClient]) -> Ran:
        """The victim is corrupt: what it sends is changed and signed with its own key."""

        def resign(frame: bytes) -> list[bytes]:
            _, message, _, packed = messages.read_client_frame(frame, 1 << 20)
            content = messages.encode(change(message))
            return [messages.client_frame(stage, content, sign(WORLD.identity(VICTIM), CONTEXT, content), packed)]

        return run(WORLD, on_victim("up", stage, resign))

    @pytest.mark.parametrize("lost", [None, 3])
    @pytest.mark.parametrize("wrong", [{0}, {1}, {2}])
    def test_wrong_shares_of_one_holder_are_gone_round_if_there_are_more_than_t(
        self, wrong: set[int], lost: int | None
    ) -> None:
        ran = run(WORLD, wrong_shares(wrong, lost))
        if lost is None:
            require_exact(WORLD, ran)
            assert len(ran.survivors) == 4
        else:
            # Only t holders of each survivor are left.
            assert "reconstruct to something else" in ran.failure

    @pytest.mark.parametrize("lost", [None, 3])
    def test_wrong_shares_of_many_leave_no_sum_rather_than_a_wrong_one(self, lost: int | None) -> None:
        ran = run(WORLD, wrong_shares({0, 1}, lost))
        assert "reconstruct to something else" in ran.failure
        assert ran.total is None

    @pytest.mark.parametrize("wrong", [{0}, {2}, {0, 1}])
    def test_wrong_shares_of_a_lost_clients_key_leave_no_sum(self, wrong: set[int]) -> None:
        ran = run(WORLD, wrong_shares(wrong, lost=3, owners={3}))
        if len(wrong) == 1:
            # Two of three holders sent the right one.
            require_exact(WORLD, ran)
            assert ran.survivors == (0, 1, 2)
        else:
            assert "a secret of client 3 reconstruct to something else" in ran.failure
            assert ran.total is None

    def test_another_digest(self) -> None:
        ran = self.forge(Stage.MASK, lambda m: msgspec.structs.replace(m, digest=bytes(32)))
        require_lost(ran, "up", Stage.MASK)
        assert "not the one it signed" in ran.refused[0]

    @pytest.mark.parametrize(
        "change",
        [
            lambda sealed: sealed[:-1],
            lambda sealed: (*sealed[:-1], sealed[0]),
            lambda sealed: (*sealed[:-1], (VICTIM, *sealed[-1][1:])),
            lambda sealed: (*sealed[:-1], (9, *sealed[-1][1:])),
            lambda sealed: (*sealed[:-1], (sealed[-1][0], False, sealed[-1][2])),
        ],
        ids=["few", "twice", "itself", "stranger", "partner"],
    )
    def test_other_holders_than_the_settings_say(self, change) -> None:
        ran = self.forge(Stage.SHARE, lambda m: msgspec.structs.replace(m, sealed=change(m.sealed)))
        require_lost(ran, "up", Stage.SHARE)
        assert "did not choose 3 holders" in ran.refused[0]

    def test_another_set_of_survivors(self) -> None:
        ran = self.forge(Stage.CONFIRM, lambda m: msgspec.structs.replace(m, survivors=mask(0, 1, 2)))
        require_lost(ran, "up", Stage.CONFIRM)
        assert "another set of survivors" in ran.refused[0]

    @pytest.mark.parametrize("change", [lambda s: s[1:], lambda s: (*s, s[0]), lambda s: (*s[1:], (VICTIM, s[0][1]))])
    def test_other_shares_than_it_holds(self, change) -> None:
        ran = self.forge(Stage.UNMASK, lambda m: msgspec.structs.replace(m, shares=change(m.shares)))
        require_lost(ran, "up", Stage.UNMASK)
        assert "did not send one share" in ran.refused[0]

    def test_another_roster(self) -> None:
        ran = self.forge(Stage.SHARE, lambda m: msgspec.structs.replace(m, transcript=bytes(32)))
        require_lost(ran, "up", Stage.SHARE)
        assert "another roster" in ran.refused[0]

    def test_garbage_for_a_holder_loses_the_holder_and_no_more(self) -> None:
        garbage = lambda m: msgspec.structs.replace(m, sealed=(*m.sealed[:-1], (*m.sealed[-1][:2], bytes(80))))  # noqa: E731
        ran = self.forge(Stage.SHARE, garbage)
        require_exact(WORLD, ran)
        assert len(ran.survivors) == 3
        assert any("do not open" in text for text in ran.refused)


class TestFrames:
    def test_a_vector_travels_with_its_message_only(self) -> None:
        _, message, envelope, _ = messages.read_client_frame(HONEST.frames["up", Stage.ADVERTISE, 0], 0)
        with_vector = messages.client_frame(0, messages.encode(message), envelope.signature, np.zeros(1, np.uint32))
        with pytest.raises(CodecError, match="nothing else, travels as a tensor"):
            messages.read_client_frame(with_vector, 100)

    def test_a_vector_beyond_the_limit_is_not_read(self) -> None:
        with pytest.raises(CodecError, match="over"):
            messages.read_client_frame(HONEST.frames["up", Stage.MASK, 0], 4)

    def test_frames_of_other_kinds_are_refused(self) -> None:
        frame = wire.encode(wire.Kind.CALL, 0, (), messages.encode(WORLD.invite))
        with pytest.raises(CodecError, match="not part of a secure sum"):
            messages.read_server_frame(frame)

    def test_a_second_encoding_of_a_message_is_refused(self) -> None:
        body = messages.encode(Survivors(CONTEXT, mask(0)))
        longer = body.replace(b"\xa9Survivors", b"\xd9\x09Survivors")
        assert longer != body
        with pytest.raises(CodecError, match="one encoding"):
            messages.read_server_frame(wire.encode(wire.Kind.SECURE_SUM, 3, (), longer))

    @pytest.mark.parametrize("body", [b"", b"\xc0", b"\x91\xa7Unknown", b"\x93\xa9Survivors\xc4\x00\xc4\x00"])
    def test_bodies_that_are_no_message(self, body: bytes) -> None:
        with pytest.raises(CodecError, match="does not parse"):
            messages.read_server_frame(wire.encode(wire.Kind.SECURE_SUM, 3, (), body))

    def test_an_invite_has_no_context_of_its_own(self) -> None:
        with pytest.raises(CodecError, match="another round"):
            messages.require_context(WORLD.invite, CONTEXT)

    def test_the_context_covers_every_setting(self) -> None:
        invite = WORLD.invite
        others = [
            msgspec.structs.replace(invite, **change)
            for change in (
                {"round": bytes(15) + b"\1"},
                {"identities": invite.identities[::-1]},
                {"holders": 2},
                {"partners": 2},
                {"threshold": 3},
                {"minimum": 4},
            )
        ]
        assert len({one.context for one in (invite, *others)}) == len(Invite.__struct_fields__) + 1

    def test_the_sums_transcript_covers_the_roster_and_all_of_the_subject(self) -> None:
        subject = WORLD.subject
        others = [
            msgspec.structs.replace(subject, **change)
            for change in ({"length": 6}, {"bits": 21}, {"application": b"\1" * 32})
        ]
        found = {messages.sum_transcript(bytes(32), one) for one in (subject, *others)}
        found.add(messages.sum_transcript(b"\1" * 32, subject))
        assert len(found) == len(Subject.__struct_fields__) + 2
