"""The masked sum: exact against the plain sum however clients drop out, and used once."""

import copy
from itertools import combinations_with_replacement, product
from math import comb

import msgspec
import numpy as np
import pytest

from secure_sums import STAGES, World, prg, require_exact, run
from tacit.errors import CodecError, InputError, PeerError
from tacit.federated.secure_sum.agreement import sign, verifying_once
from tacit.federated.secure_sum.attestation import Attestation
from tacit.federated.secure_sum.client import MaskedClient, Policy, State, Task
from tacit.federated.secure_sum.interface import PlainSum
from tacit.federated.secure_sum.masked import MaskedSum
from tacit.federated.secure_sum.parameters import Assumption
from tacit.federated.secure_sum.ring import Ring
from tacit.federated.secure_sum.server import MaskedServer, Stage
from tacit.identity import Identity, key_text

CURIOUS = Assumption(0.1, 0.1, False)
MOMENTS = (*STAGES, Stage.DONE)
"""When a client drops out: before its answer in a stage, or not at all."""


def check_drop_outs(world: World, moments: tuple[Stage, ...]) -> bool:
    """Run the round; whether it must end with a sum follows from who is left in each stage."""
    left = [{i for i, moment in enumerate(moments) if moment > stage} for stage in STAGES]
    advertised, shared, masked, confirmed, unmasked = left
    threshold, minimum = world.invite.threshold, world.invite.minimum
    succeeds = (
        all(len(clients) >= minimum for clients in (advertised, shared, masked))
        and len(confirmed) > threshold
        and all(len(unmasked - {owner}) >= threshold for owner in shared)
    )
    ran = run(world, lambda direction, stage, number, frame: [frame] if moments[number] > stage else [])
    if succeeds:
        require_exact(world, ran)
        assert ran.survivors == tuple(sorted(masked))
    else:
        assert ran.failure
        assert ran.total is None
    return succeeds


@pytest.mark.parametrize(("n", "assumption", "tolerated"), [(4, Assumption(), 1), (5, CURIOUS, 2)])
def test_every_drop_out_pattern_up_to_the_names_of_the_clients(n: int, assumption: Assumption, tolerated: int) -> None:
    world, order = World(n, assumption=assumption), prg(n)
    succeeded = 0
    for sorted_moments in combinations_with_replacement(MOMENTS, n):
        left = list(sorted_moments)
        moments = tuple(left.pop(order.below(len(left))) for _ in range(n))
        succeeded += check_drop_outs(world, moments)
    # Whoever is lost, and at whichever of five moments, as long as they are few.
    assert succeeded == comb(tolerated + len(STAGES), tolerated)


@pytest.mark.slow
def test_every_drop_out_pattern_of_four_clients() -> None:
    assert sum(check_drop_outs(World(4), moments) for moments in product(MOMENTS, repeat=4)) == 1 + 4 * len(STAGES)


@pytest.mark.parametrize("seed", [1, 2])
def test_random_drop_outs_of_a_large_cohort_on_a_sparse_graph(seed: int) -> None:
    world = World(64, length=40, minimum=20)
    assert world.invite.holders < world.n - 1
    draw = prg(3, seed)
    moments = [MOMENTS[draw.below(5)] if draw.below(10) == 0 else Stage.DONE for _ in range(world.n)]
    ran = run(world, lambda direction, stage, number, frame: [frame] if moments[number] > stage else [])
    require_exact(world, ran)
    assert ran.survivors == tuple(i for i, moment in enumerate(moments) if moment > Stage.MASK)
    assert not ran.refused
    assert len(set(moments)) > 2


@pytest.mark.parametrize("bits", [2, 15, 16, 17, 23, 31, 32])
def test_every_ring_is_summed_exactly(bits: int) -> None:
    world = World(4, length=70, bits=bits)
    require_exact(world, run(world))


def test_an_upload_is_as_tight_as_its_ring() -> None:
    world = World(4, length=10_000, bits=23)
    ran = run(world)
    assert len(ran.frames["up", Stage.MASK, 0]) <= 10_000 * 23 / 8 + 256


def test_the_same_input_is_masked_differently_by_every_client_and_round() -> None:
    first, second = World(4, round=1), World(4, round=2)
    seen = {run(world).frames["up", Stage.MASK, number][-12:] for world in (first, second) for number in range(4)}
    assert len(seen) == 8


def test_the_callers_vector_stays_as_it_is() -> None:
    world = World(4)
    vectors = [world.vector(i) for i in range(4)]
    before = [v.copy() for v in vectors]
    MaskedSum(world.identities, world.policy).sum(world.ring, world.length, range(4), vectors.__getitem__)
    assert all(map(np.array_equal, vectors, before))


class TestInterface:
    def test_equals_the_plain_sum_of_any_cohort(self) -> None:
        world = World(6)
        masked = MaskedSum(
            world.identities, world.policy, lost=lambda client, stage: (client, stage) == (2, Stage.MASK)
        )
        cohort = [5, 2, 0, 3, 1]
        result = masked.sum(world.ring, world.length, cohort, world.vector)
        plain = PlainSum().sum(world.ring, world.length, [0, 1, 3, 5], world.vector)
        assert np.array_equal(result.total, plain.total)
        assert result.survivors == plain.survivors == (0, 1, 3, 5)
        assert result.lost == {2: "sent no vector"}
        assert set(result.traffic.up) == set(result.traffic.down) == set(cohort)
        identities = Attestation.parse(result.attestation).verify(frozenset(i.public for i in world.identities))
        assert set(identities) == {world.identity(i).public for i in plain.survivors}

    def test_a_client_without_a_vector_is_lost(self) -> None:
        world = World(5)
        for protocol in (PlainSum(), MaskedSum(world.identities, world.policy)):
            result = protocol.sum(world.ring, world.length, range(5), lambda i: None if i == 4 else world.vector(i))
            assert result.survivors == (0, 1, 2, 3)
            assert list(result.lost) == [4]
            assert np.array_equal(result.total, world.plain(range(4)))

    def test_rounds_differ_and_can_be_repeated(self) -> None:
        world = World(4)
        masked = MaskedSum(world.identities, world.policy)
        results = [masked.sum(world.ring, world.length, range(4), world.vector) for _ in range(2)]
        assert results[0].attestation != results[1].attestation
        assert np.array_equal(results[0].total, results[1].total)

    @pytest.mark.parametrize("cohort", [[0, 1], [0, 1, 2, 2], [0, 1, 2, 9], [], [0, 1, 2, -1]])
    def test_impossible_cohorts_are_refused(self, cohort: list[int]) -> None:
        world = World(4)
        with pytest.raises(InputError, match="cohort"):
            MaskedSum(world.identities, world.policy).sum(world.ring, world.length, cohort, world.vector)

    def test_too_many_lost_leave_no_sum(self) -> None:
        world = World(5)
        masked = MaskedSum(
            world.identities, world.policy, lost=lambda client, stage: client < 3 and stage >= Stage.MASK
        )
        with pytest.raises(PeerError, match="no sum"):
            masked.sum(world.ring, world.length, range(5), world.vector)

    @pytest.mark.parametrize("cohort", [[], [1, 1]])
    def test_the_plain_sum_has_a_cohort(self, cohort: list[int]) -> None:
        with pytest.raises(InputError, match="cohort"):
            PlainSum().sum(Ring(8), 1, cohort, World(4).vector)


def test_simulated_clients_check_each_signature_once_and_all_of_them() -> None:
    known = verifying_once()
    world = World(4)
    context, signer = world.invite.context, world.identity(0)
    signature = sign(signer, context, b"content")
    for _ in range(2):
        assert known(signer.public, context, b"content", signature)
        assert not known(signer.public, context, b"other", signature)
        assert not known(world.identity(1).public, context, b"content", signature)
        assert not known(signer.public, bytes(32), b"content", signature)
        assert not known(signer.public, context, b"content", bytes(64))


class TestOnce:
    def test_a_client_refuses_a_second_round(self) -> None:
        world, client = World(4), World(4).client(0)
        client.receive(MaskedServer(world.invite).invite())
        with pytest.raises(PeerError, match="another round"):
            client.receive(MaskedServer(World(4, round=2).invite).invite())
        assert client.state is State.FAILED
        with pytest.raises(PeerError, match="FAILED"):
            client.receive(MaskedServer(world.invite).invite())

    def ready(self) -> tuple[World, MaskedClient, dict]:
        world = World(4)
        ran, client = run(world), world.client(0)
        for stage in STAGES[:3]:
            client.receive(ran.frames["down", stage, 0])
        return world, client, ran.frames

    def test_a_vector_is_masked_once(self) -> None:
        world, client, frames = self.ready()
        assert client.mask(world.vector(0)) == frames["up", Stage.MASK, 0]
        with pytest.raises(InputError, match="once"):
            client.mask(world.vector(1))

    def test_no_vector_is_masked_before_its_time(self) -> None:
        with pytest.raises(InputError, match="NEW"):
            World(4).client(0).mask(World(4).vector(0))

    def test_a_vector_that_does_not_fit_can_be_given_again(self) -> None:
        world, client, _ = self.ready()
        for words in (world.vector(0)[:-1], world.vector(0).astype(np.uint64), world.vector(0) | np.uint32(1 << 20)):
            with pytest.raises(InputError, match="vector"):
                client.mask(words)
        client.mask(world.vector(0))

    def test_secrets_are_gone_at_the_end(self) -> None:
        world, client, frames = self.ready()
        assert vars(client)["_secrets"] is not None
        client.mask(world.vector(0))
        assert set(vars(client._secrets)) == {"held"}
        for stage in (Stage.CONFIRM, Stage.UNMASK):
            client.receive(frames["down", stage, 0])
        assert client.state is State.DONE
        assert client._secrets is None

    def test_a_client_cannot_be_copied(self) -> None:
        with pytest.raises(InputError, match="twice"):
            copy.copy(World(4).client(0))

    def test_nothing_secret_prints(self) -> None:
        world = World(4)
        client = world.client(0)
        client.receive(MaskedServer(world.invite).invite())
        assert repr(client) == "MaskedClient(ADVERTISED)"
        assert "hidden" in repr(client._secrets.mask_pair)
        assert repr(world.identity(1)) == f"Identity({key_text(world.identity(1).public)})"
        assert bytes(30).hex() not in repr(world.identity(1))
        assert repr(MaskedServer(world.invite)) == "MaskedServer(ADVERTISE, 4 clients)"
        assert repr(world.invite) == "Invite(hidden)"

    def test_a_server_without_a_sum_says_so(self) -> None:
        with pytest.raises(PeerError, match="no sum"):
            _ = MaskedServer(World(4).invite).outcome

    @pytest.mark.parametrize("stage", STAGES)
    def test_a_server_closes_no_stage_with_too_few_answers(self, stage: Stage) -> None:
        world = World(5)
        frames, invite, server = run(world).frames, world.invite, world.server
        fewest = invite.minimum if stage <= Stage.MASK else invite.threshold
        for at in STAGES[: stage + 1]:
            for number in range(fewest - 1 if at is stage else world.n):
                server.receive(frames["up", at, number])
            if at is not stage:
                server.close()
        with pytest.raises(
            PeerError, match=f"{fewest - 1} clients are left in stage {stage.name}, {fewest} are needed"
        ):
            server.close()
        assert server.stage is Stage.FAILED
        with pytest.raises(PeerError, match="no sum"):
            _ = server.outcome

    def test_a_server_that_is_done_closes_nothing(self) -> None:
        server = MaskedServer(World(4).invite)
        with pytest.raises(PeerError, match="no sum"):
            server.close()
        with pytest.raises(PeerError, match="FAILED"):
            server.close()


class TestAttestation:
    WORLD = World(4)
    PINNED = frozenset(identity.public for identity in WORLD.identities)

    def honest(self) -> Attestation:
        world = self.WORLD
        masked = MaskedSum(
            world.identities, world.policy, lost=lambda client, stage: (client, stage) == (3, Stage.MASK)
        )
        return Attestation.parse(masked.sum(world.ring, world.length, range(4), world.vector).attestation)

    def test_names_the_survivors(self) -> None:
        assert self.honest().verify(self.PINNED) == tuple(i.public for i in self.WORLD.identities[:3])
        assert repr(self.honest()) == "Attestation(3 signatures of 4 clients)"

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda a: {"survivors": b"\x0f"}, "did not sign"),
            (lambda a: {"survivors": b"\x03"}, "below its minimum"),
            (lambda a: {"transcript": bytes(32)}, "did not sign"),
            (lambda a: {"invite": msgspec.structs.replace(a.invite, round=b"\1" * 16)}, "did not sign"),
            (lambda a: {"subject": msgspec.structs.replace(a.subject, application=b"\1" * 32)}, "did not sign"),
            (lambda a: {"subject": msgspec.structs.replace(a.subject, length=9)}, "did not sign"),
            (lambda a: {"subject": msgspec.structs.replace(a.subject, bits=9)}, "did not sign"),
            (lambda a: {"signatures": a.signatures[:1]}, "1 survivors signed"),
            (lambda a: {"signatures": (*a.signatures, a.signatures[0])}, "comes twice"),
            (lambda a: {"signatures": (*a.signatures, (3, a.signatures[0][1]))}, "did not survive"),
            (lambda a: {"signatures": ((0, a.signatures[1][1]), *a.signatures[1:])}, "client 0 did not sign"),
        ],
    )
    def test_a_changed_one_is_noticed(self, change, reason: str) -> None:
        honest = self.honest()
        changed = Attestation.parse(msgspec.structs.replace(honest, **change(honest)).encoded())
        with pytest.raises(PeerError, match=reason):
            changed.verify(self.PINNED)

    def test_every_identity_is_pinned(self) -> None:
        with pytest.raises(PeerError, match="not pinned"):
            self.honest().verify(self.PINNED - {self.WORLD.identity(3).public})

    def test_contradictory_settings_are_refused(self) -> None:
        honest = self.honest()
        with pytest.raises(InputError, match="threshold"):
            msgspec.structs.replace(honest, invite=msgspec.structs.replace(honest.invite, threshold=9)).verify(
                self.PINNED
            )

    def test_it_has_one_encoding(self) -> None:
        data = self.honest().encoded()
        for changed in (data[:-1], data + b"\0", b"", b"\xdc\x00\x05" + data[1:]):
            with pytest.raises(CodecError):
                Attestation.parse(changed)


class TestSettings:
    def test_a_policy_wants_three_vectors(self) -> None:
        with pytest.raises(InputError, match="3 vectors"):
            Policy(2)

    def test_a_task_has_entries(self) -> None:
        with pytest.raises(InputError, match="entries"):
            Task(Ring(20), 0)
        with pytest.raises(InputError, match="digest"):
            Task(Ring(20), 1, b"short")

    def test_an_identity_has_a_seed_of_32_bytes(self) -> None:
        with pytest.raises(InputError, match="32 bytes"):
            Identity(bytes(31))
        assert Identity.fresh().public != Identity.fresh().public
