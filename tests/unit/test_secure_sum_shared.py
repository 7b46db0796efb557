"""The shared sum: exactness against the plain one, what servers refuse, and norms verified on shares."""

import math
from itertools import product

import msgspec
import numpy as np
import pytest
import torch

from secure_sums import prg
from tacit.errors import CodecError, InputError, PeerError
from tacit.federated.secure_sum.agreement import KeyPair
from tacit.federated.secure_sum.client import Task
from tacit.federated.secure_sum.encoding import Encoding, Scalar
from tacit.federated.secure_sum.interface import PlainSum
from tacit.federated.secure_sum.ring import Ring, Words
from tacit.federated.secure_sum.shared import BATCH, TOO_LONG, SharedSum, settle
from tacit.federated.secure_sum.shared_attestation import SharedAttestation
from tacit.federated.secure_sum.shared_bounds import ROWS, SLACK, lift, norm_bound, project, threshold, within
from tacit.federated.secure_sum.shared_client import Parts, SharedPolicy, upload
from tacit.federated.secure_sum.shared_messages import Terms, check_terms
from tacit.federated.secure_sum.shared_server import SharedServer, total_of
from tacit.identity import Identity
from tacit.mpc.lockstep import Meter, Trio
from tacit.mpc.steps import Role

PAIRS = {role: KeyPair(prg(9, i)) for i, role in enumerate(Role)}
IDENTITIES = [Identity(bytes([i]) * 32) for i in range(6)]
SERVERS = Identity(bytes([70]) * 32), Identity(bytes([71]) * 32)


def terms_of(n: int = 4, length: int = 7, bits: int = 20, minimum: int = 3, bound: int = 0, number: int = 0) -> Terms:
    return Terms(
        round=bytes([number]) * 16,
        identities=tuple(identity.public for identity in IDENTITIES[:n]),
        alice=PAIRS[Role.ALICE].public,
        bob=PAIRS[Role.BOB].public,
        length=length,
        bits=bits,
        minimum=minimum,
        bound=bound,
        application=bytes(32),
    )


def servers_of(terms: Terms) -> tuple[SharedServer, SharedServer]:
    return SharedServer(Role.ALICE, terms, PAIRS[Role.ALICE]), SharedServer(Role.BOB, terms, PAIRS[Role.BOB])


def endorsements_of(terms: Terms) -> dict[Role, bytes]:
    servers = zip(servers_of(terms), SERVERS, strict=True)
    return {server.role: server.endorse(identity) for server, identity in servers}


def vector(terms: Terms, number: int) -> Words:
    return terms.ring.residues(prg(2, number).array(8 * terms.length).view(np.int64))


def parts_of(terms: Terms, number: int, words: Words | None = None, seed: int = 0) -> Parts:
    words = vector(terms, number) if words is None else words
    return upload(terms, number, IDENTITIES[number], words, prg(3, seed, number))


def finished(terms: Terms, alice: SharedServer, bob: SharedServer) -> Words:
    return total_of(terms, alice.reveal(), bob.reveal())


def plain(terms: Terms, numbers: list[int]) -> Words:
    return terms.ring.residues(sum(vector(terms, i).astype(np.int64) for i in numbers))


class TestSum:
    @pytest.mark.parametrize("bits", [2, 16, 17, 26, 32])
    def test_equals_the_plain_sum(self, bits: int) -> None:
        ring, n, length = Ring(bits), 70, 33
        vectors = {i: ring.residues(prg(4, i).array(8 * length).view(np.int64)) for i in range(n) if i % 5}
        cohort = list(range(n))[::-1]
        found = SharedSum.among(n, 3).sum(ring, length, cohort, vectors.get)
        expected = PlainSum().sum(ring, length, cohort, vectors.get)
        assert np.array_equal(found.total, expected.total)
        assert found.survivors == expected.survivors
        assert found.lost == expected.lost
        assert set(found.traffic.up) == set(vectors)

    @pytest.mark.parametrize("arrived", list(product(("both", "alice", "bob", "none"), repeat=4)))
    def test_every_pattern_of_lost_parts(self, arrived: tuple[str, ...]) -> None:
        terms = terms_of()
        alice, bob = servers_of(terms)
        for number, which in enumerate(arrived):
            parts = parts_of(terms, number)
            if which in ("both", "alice"):
                alice.receive(parts.alice)
            if which in ("both", "bob"):
                bob.receive(parts.bob)
        settle(alice, bob, Trio())
        whole = [i for i, which in enumerate(arrived) if which == "both"]
        assert alice.summed == bob.summed == tuple(whole)
        if len(whole) < terms.minimum:
            for server in (alice, bob):
                with pytest.raises(PeerError, match="are needed: no sum"):
                    server.reveal()
        else:
            assert np.array_equal(finished(terms, alice, bob), plain(terms, whole))

    def test_the_upload_is_at_most_four_bytes_an_entry_and_a_header(self) -> None:
        terms = terms_of(length=100_000, bits=26)
        parts = parts_of(terms, 0)
        assert len(parts.alice) + len(parts.bob) <= 100_000 * 26 / 8 + 450 <= 4 * 100_000 + 64

    def test_noise_of_both_servers_is_in_the_sum_and_in_what_each_reveals(self) -> None:
        terms = terms_of(length=50)
        alice, bob = servers_of(terms)
        for number in range(4):
            parts = parts_of(terms, number)
            alice.receive(parts.alice)
            bob.receive(parts.bob)
        settle(alice, bob, Trio())
        noises = [prg(5, i).array(8 * 50).view(np.int64) % 100 - 50 for i in range(2)]
        total = total_of(terms, alice.reveal(lambda n: noises[0]), bob.reveal(lambda n: noises[1]))
        expected = terms.ring.residues(plain(terms, [0, 1, 2, 3]).astype(np.int64) + noises[0] + noises[1])
        assert np.array_equal(total, expected)
        assert all(np.any(noise) for noise in noises)

    def test_a_sum_is_revealed_once(self) -> None:
        terms = terms_of()
        alice, bob = servers_of(terms)
        for number in range(3):
            parts = parts_of(terms, number)
            alice.receive(parts.alice)
            bob.receive(parts.bob)
        settle(alice, bob, Trio())
        alice.reveal(lambda n: np.ones(n, np.int64))
        with pytest.raises(PeerError, match="revealed before"):
            alice.reveal()
        with pytest.raises(PeerError, match="has been revealed"):
            alice.receive(parts_of(terms, 3).alice)

    def test_shares_of_different_sets_do_not_add_up(self) -> None:
        terms = terms_of()
        alice, bob = servers_of(terms)
        for number in range(4):
            parts = parts_of(terms, number)
            alice.receive(parts.alice)
            bob.receive(parts.bob)
        alice.settle((0, 1, 2))
        bob.settle((1, 2, 3))
        with pytest.raises(PeerError, match="different clients"):
            finished(terms, alice, bob)

    def test_each_part_alone_is_uniform_whatever_the_vector(self) -> None:
        terms = terms_of(length=4000, bits=16)
        alice, bob = servers_of(terms)
        for number, words in enumerate((terms.ring.zeros(4000), vector(terms, 1))):
            parts = parts_of(terms, number, words)
            alice.receive(parts.alice)
            bob.receive(parts.bob)
        for server in (alice, bob):
            held = [server._words(server._waiting[number]) for number in range(2)]
            for words in held:
                counts = np.bincount(words >> 12, minlength=16)
                assert ((counts - 250) ** 2 / 250).sum() < 45
            assert np.count_nonzero(held[0] == held[1]) < 10
        # The same statistic rejects shares that were not masked.
        counts = np.bincount(terms.ring.zeros(4000) >> 12, minlength=16)
        assert ((counts - 250) ** 2 / 250).sum() > 45


class TestRefusals:
    def test_a_relay_cannot_read_change_swap_or_replay_parts(self) -> None:
        terms = terms_of()
        alice, bob = servers_of(terms)
        parts = parts_of(terms, 0)
        for server, frame, other in ((alice, parts.alice, parts.bob), (bob, parts.bob, parts.alice)):
            for at in range(len(frame)):
                changed = bytearray(frame)
                changed[at] ^= 1 << at % 8
                with pytest.raises(PeerError):
                    server.receive(bytes(changed))
            for wrong in (other, frame[:-1], frame + b"\0", parts_of(terms_of(number=1), 0).alice, b""):
                with pytest.raises(PeerError):
                    server.receive(wrong)
            assert server.claims == {}
            assert server.receive(frame) == 0
            for again in (
                frame,
                parts_of(terms, 0, seed=1).alice if server is alice else parts_of(terms, 0, seed=1).bob,
            ):
                with pytest.raises(PeerError, match="before"):
                    server.receive(again)

    def test_nobody_sends_in_another_clients_name(self) -> None:
        terms = terms_of()
        alice, _ = servers_of(terms)
        mine = parts_of(terms, 1)
        renamed = mine.alice.replace(b"\xa4Part\x01", b"\xa4Part\x00")
        assert renamed != mine.alice
        with pytest.raises(PeerError, match="signature"):
            alice.receive(renamed)
        with pytest.raises(InputError, match="identity"):
            upload(terms, 0, IDENTITIES[1], vector(terms, 1), prg(3))

    def test_parts_of_two_uploads_are_not_put_together(self) -> None:
        terms = terms_of()
        alice, bob = servers_of(terms)
        alice.receive(parts_of(terms, 0, seed=1).alice)
        bob.receive(parts_of(terms, 0, seed=2).bob)
        assert alice.common(bob.claims) == ()

    def test_a_malformed_vector_is_refused_when_it_arrives(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terms = terms_of(length=7, bits=20)
        pack = Ring.pack

        def with_surplus_bits(ring: Ring, words: Words) -> Words:
            packed = pack(ring, words)
            packed[-1] |= np.uint32(1 << 31)
            return packed

        monkeypatch.setattr(Ring, "pack", with_surplus_bits)
        parts = parts_of(terms, 0)
        _, bob = servers_of(terms)
        with pytest.raises(CodecError, match="unused bits"):
            bob.receive(parts.bob)
        monkeypatch.setattr(Ring, "pack", lambda ring, words: pack(ring, words)[:-1])
        with pytest.raises(PeerError, match="bytes"):
            bob.receive(parts_of(terms, 1).bob)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"minimum": 2}, "minimum"),
            ({"minimum": 5}, "minimum"),
            ({"bits": 27, "bound": 100}, "up to 26 bits"),
            ({"bits": 20, "bound": (1 << 15) + 1}, "32 times"),
        ],
    )
    def test_terms_that_cannot_be_safe(self, change: dict[str, int], reason: str) -> None:
        with pytest.raises(InputError, match=reason):
            check_terms(terms_of(**change))

    def test_a_client_insists_on_its_servers_minimum_and_task(self) -> None:
        terms, (alice, bob) = terms_of(), SERVERS
        task = Task(terms.ring, terms.length)
        endorsements = endorsements_of(terms)
        SharedPolicy(3, alice.public, bob.public).require(terms, task, endorsements)
        for policy, reason in (
            (SharedPolicy(4, alice.public, bob.public), "policy"),
            (SharedPolicy(3, bob.public, alice.public), "not signed by the alice"),
            (SharedPolicy(3, alice.public, IDENTITIES[0].public), "not signed by the bob"),
        ):
            with pytest.raises(InputError, match=reason):
                policy.require(terms, task, endorsements)
        other = Task(terms.ring, terms.length, bytes([1]) * 32)
        with pytest.raises(InputError, match="expects"):
            SharedPolicy(3, alice.public, bob.public).require(terms, other, endorsements)
        with pytest.raises(InputError, match="fewer than 3"):
            SharedPolicy(2, alice.public, bob.public)
        with pytest.raises(InputError, match="one and the same"):
            SharedPolicy(3, alice.public, alice.public)

    def test_a_relay_that_puts_its_own_key_in_a_servers_place(self) -> None:
        terms, policy = terms_of(), SharedPolicy(3, *(server.public for server in SERVERS))
        task, endorsements = Task(terms.ring, terms.length), endorsements_of(terms)
        for role in Role:
            swapped = msgspec.structs.replace(terms, **{role.value: KeyPair(prg(9, 9)).public})
            with pytest.raises(InputError, match="not signed by the alice"):
                policy.require(swapped, task, endorsements)
        exchanged = {Role.ALICE: endorsements[Role.BOB], Role.BOB: endorsements[Role.ALICE]}
        earlier = endorsements_of(terms_of(number=1))
        for wrong in (exchanged, earlier, {}, {Role.ALICE: endorsements[Role.ALICE]}):
            with pytest.raises(InputError, match="not signed by the"):
                policy.require(terms, task, wrong)

    def test_one_key_for_both_servers(self) -> None:
        terms = terms_of()
        same = Terms(**{f: getattr(terms, f) for f in terms.__struct_fields__} | {"bob": terms.alice})
        with pytest.raises(InputError, match="same key"):
            check_terms(same)

    def test_unchecked_vectors_are_not_added_where_norms_are_verified(self) -> None:
        terms = terms_of(bound=1000)
        alice, _ = servers_of(terms)
        alice.receive(parts_of(terms, 0).alice)
        with pytest.raises(InputError, match="check the vectors"):
            alice.settle((0,))

    def test_nothing_secret_is_printed(self) -> None:
        terms = terms_of()
        alice, _ = servers_of(terms)
        parts = parts_of(terms, 0)
        alice.receive(parts.alice)
        seed = alice._waiting[0].content
        for thing in (alice, parts, alice._waiting[0], SharedSum.among(3, 3), terms):
            assert seed.hex() not in repr(thing)
            assert repr(seed) not in repr(thing)


PINNED = frozenset(identity.public for identity in IDENTITIES)


def attestation_of(bound: int = 0, number: int = 0) -> SharedAttestation:
    """A round of six clients, of whom the second is lost; where norms are verified, the third is excluded."""
    terms = terms_of(n=6, bits=24, bound=bound, number=number)
    alice, bob = servers_of(terms)
    for client in (0, 2, 3, 4, 5):
        words = terms.ring.residues(np.full(7, 400 * bound if client == 2 else bound // 3, np.int64))
        parts = parts_of(terms, client, words)
        alice.receive(parts.alice)
        bob.receive(parts.bob)
    settle(alice, bob, Trio(prg(7, 0)))
    alice.reveal()
    bob.reveal()
    return SharedAttestation.of(bob, alice.attest(SERVERS[0]), bob.attest(SERVERS[1]))


def verified(attestation: SharedAttestation) -> tuple[bytes, ...]:
    return attestation.verify(PINNED, SERVERS[0].public, SERVERS[1].public)


class TestAttestation:
    @pytest.mark.parametrize(("bound", "summed"), [(0, (0, 2, 3, 4, 5)), (5000, (0, 3, 4, 5))])
    def test_says_who_took_part(self, bound: int, summed: tuple[int, ...]) -> None:
        attestation = SharedAttestation.parse(attestation_of(bound).encoded())
        assert verified(attestation) == tuple(IDENTITIES[number].public for number in summed)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"round": b"\7" * 16}, "client 0 did not sign"),
            ({"identities": tuple(identity.public for identity in IDENTITIES[::-1])}, "client 0 did not sign"),
            ({"alice": KeyPair(prg(9, 9)).public}, "client 0 did not sign"),
            ({"bob": KeyPair(prg(9, 9)).public}, "client 0 did not sign"),
            ({"length": 8}, "client 0 did not sign"),
            ({"bits": 25}, "client 0 did not sign"),
            ({"minimum": 4}, "client 0 did not sign"),
            ({"minimum": 5}, "4 vectors, below the round's minimum of 5"),
            ({"bound": 4999}, "client 0 did not sign"),
            ({"bound": 0}, "excluded for the length"),
            ({"application": b"\1" * 32}, "client 0 did not sign"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_every_term_is_signed(self, change: dict, reason: str) -> None:
        honest = attestation_of(bound=5000)
        with pytest.raises(PeerError, match=reason):
            verified(msgspec.structs.replace(honest, terms=msgspec.structs.replace(honest.terms, **change)))
        assert set(Terms.__struct_fields__) == {
            *("round", "identities", "alice", "bob", "length", "bits", "minimum", "bound", "application")
        }

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda a: {"summed": b"\x39\x00"}, "mask of 6 bits"),
            (lambda a: {"summed": b"\x31"}, "not one of each client"),
            (lambda a: {"summed": b"\x3d", "excluded": b"\0"}, "alice did not sign"),
            (lambda a: {"summed": b"\x35", "excluded": b"\x08"}, "alice did not sign"),
            (lambda a: {"excluded": b"\x06"}, "not one of each client"),
            (lambda a: {"excluded": b"\0"}, "not one of each client"),
            (lambda a: {"excluded": b"\0", "parts": (a.parts[0], *a.parts[2:])}, "alice did not sign"),
            (lambda a: {"parts": a.parts[1:]}, "not one of each client"),
            (lambda a: {"parts": (a.parts[0], *a.parts)}, "not one of each client"),
            (lambda a: {"parts": a.parts[::-1]}, "not one of each client"),
            (lambda a: {"parts": ((0, *a.parts[1][1:]), *a.parts[1:])}, "client 0 did not sign"),
            (lambda a: {"parts": (*a.parts[:-1], (5, a.parts[0][1], a.parts[5 - 1][2]))}, "client 5 did not sign"),
            (lambda a: {"alice": a.bob}, "alice did not sign"),
            (lambda a: {"bob": a.alice}, "bob did not sign"),
            (lambda a: {"bob": attestation_of(5000, number=1).bob}, "bob did not sign"),
            (lambda a: {"bob": bytes(64)}, "bob did not sign"),
        ],
    )
    def test_every_claim_is_signed(self, change, reason: str) -> None:
        honest = attestation_of(bound=5000)
        assert verified(honest)
        with pytest.raises(PeerError, match=reason):
            verified(msgspec.structs.replace(honest, **change(honest)))

    def test_wrong_pins(self) -> None:
        honest = attestation_of()
        alice, bob = (server.public for server in SERVERS)
        for pins, reason in (
            ((PINNED - {IDENTITIES[1].public}, alice, bob), "not pinned"),
            ((PINNED, bob, alice), "alice did not sign"),
            ((PINNED, alice, alice), "bob did not sign"),
            ((frozenset(), alice, bob), "not pinned"),
        ):
            with pytest.raises(PeerError, match=reason):
                honest.verify(*pins)

    def test_it_has_one_encoding(self) -> None:
        data = attestation_of().encoded()
        for wrong in (data[:-1], data + b"\0", b"", b"\xdc\x00\x06" + data[1:]):
            with pytest.raises(CodecError):
                SharedAttestation.parse(wrong)

    def test_a_server_attests_only_what_it_has_revealed(self) -> None:
        alice, _ = servers_of(terms_of())
        with pytest.raises(PeerError, match="not over"):
            alice.attest(SERVERS[0])

    def test_a_round_in_one_process_leaves_one(self) -> None:
        protocol = SharedSum.among(5, 3)
        summed = protocol.sum(Ring(20), 4, [4, 1, 3, 0], lambda i: Ring(20).zeros(4) if i else None, b"\5" * 32)
        attestation = SharedAttestation.parse(summed.attestation)
        pinned = frozenset(identity.public for identity in protocol.identities)
        signed = attestation.verify(pinned, protocol.alice.public, protocol.bob.public)
        assert signed == tuple(protocol.identities[i].public for i in (4, 1, 3))
        assert attestation.terms.application == b"\5" * 32


BITS, BOUND, LENGTH = 26, 1 << 15, 3000


def verdicts(vectors: list[Words], bits: int = BITS, bound: int = BOUND, seed: int = 0) -> tuple[bool, ...]:
    """What alice and bob find out about vectors that one of them holds no part of alone."""
    ring = Ring(bits)
    trio, masks = Trio(prg(7, seed)), [prg(6, seed, i) for i in range(len(vectors))]
    left, right = [], []
    for words, mask in zip(vectors, masks, strict=True):
        share = ring.zeros(len(words))
        mask.add_into(share)
        left.append(share)
        right.append(ring.reduce_(words - share))
    answers = trio.run(within(left, bits, bound, Role.ALICE), within(right, bits, bound, Role.BOB))
    assert answers[0] == answers[1]
    return answers[0]


def residues(values: np.ndarray, bits: int = BITS) -> Words:
    return Ring(bits).residues(np.asarray(values, np.int64))


def of_norm(norm: float, length: int = LENGTH, entries: int | None = None, seed: int = 0) -> np.ndarray:
    """Integers of about this norm, on all or a few of the coordinates."""
    direction = torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
    if entries is not None:
        direction[entries:] = 0
    return np.trunc(direction * (norm / np.linalg.norm(direction)))


def wrapping(bits: int) -> dict[str, np.ndarray]:
    """Vectors whose squares, or whose sums of squares, or of entries, are nothing in the ring they are shared in."""
    half = 1 << (bits - 1)
    one = np.zeros(LENGTH)
    one[5] = half
    root = np.zeros(LENGTH)
    root[7] = 4 << -(-bits // 2)
    random = prg(8).array(8 * LENGTH).view(np.int64) % (1 << bits)
    return {
        "one entry at the far end of the ring": one,
        "one entry whose square is 0": root,
        "every entry's square is 0": np.full(LENGTH, root[7]),
        "every entry at the far end": np.full(LENGTH, half),
        "alternating ends": np.where(np.arange(LENGTH) % 2, half, -half + 1),
        "entries that cancel in sums": np.where(np.arange(LENGTH) % 2, 1 << (bits - 3), -(1 << (bits - 3))),
        "uniform over the ring": random,
    }


class TestNorms:
    @pytest.mark.parametrize("entries", [1, 2, 50, LENGTH])
    def test_a_vector_within_the_bound_passes(self, entries: int) -> None:
        vectors = [residues(of_norm(BOUND, entries=entries, seed=i)) for i in range(4)]
        assert verdicts([*vectors, residues(np.zeros(LENGTH)), residues(-of_norm(BOUND / 3))]) == (True,) * 6

    @pytest.mark.parametrize("factor", [SLACK, 3, 10, 100, 500])
    @pytest.mark.parametrize("entries", [1, 2, 50, LENGTH])
    def test_a_vector_beyond_the_bound_fails(self, factor: float, entries: int) -> None:
        vectors = [residues(of_norm(1.001 * factor * BOUND, entries=entries, seed=i)) for i in range(4)]
        assert not any(verdicts(vectors))

    @pytest.mark.parametrize("bits", [16, 20, 25, 26])
    @pytest.mark.parametrize("name", wrapping(BITS))
    def test_vectors_built_so_that_their_squares_wrap_are_excluded(self, bits: int, name: str) -> None:
        integers = wrapping(bits)[name]
        words = residues(integers, bits)
        bound = 1 << (bits // 2 - 1)
        true = math.sqrt((Ring(bits).signed(words).astype(object) ** 2).sum())
        assert true > SLACK * bound, "not a vector that should fail"
        assert verdicts([words, residues(np.zeros(LENGTH), bits)], bits, bound) == (False, True)

    def test_a_vector_made_for_an_earlier_coin_is_excluded(self) -> None:
        known = torch.zeros(2, dtype=torch.int64)
        rows = project([residues(one) for one in np.eye(LENGTH)], known).double().numpy()
        long = of_norm(100 * BOUND)
        # What is orthogonal to all the rows, to the nearest integers.
        made = np.round(long - rows @ np.linalg.solve(rows.T @ rows, rows.T @ long))
        assert np.linalg.norm(made) > 90 * BOUND
        projected = project([residues(made)], known).numpy()
        centred = (projected + (1 << BITS - 1)) % (1 << BITS) - (1 << BITS - 1)
        assert int((centred**2).sum()) < threshold(BOUND) // 1000
        assert not any(verdicts([residues(made)], seed=seed)[0] for seed in range(3))

    def test_the_squares_of_the_wrapping_vectors_do_wrap(self) -> None:
        for name in (
            "one entry at the far end of the ring",
            "one entry whose square is 0",
            "every entry's square is 0",
        ):
            words = residues(wrapping(BITS)[name]).astype(np.uint64)
            assert not np.any(words * words % (1 << BITS))

    @pytest.mark.parametrize("bits", [8, 26])
    def test_projections_are_those_of_the_vector(self, bits: int) -> None:
        length, seed = 2500, torch.tensor([3, 4])
        ring = Ring(bits)
        words = ring.residues(prg(1).array(8 * length).view(np.int64))
        eye = [ring.residues(np.eye(1, length, i, dtype=np.int64)[0]) for i in range(length)]
        rows = project(eye, seed)
        assert set(rows.unique().tolist()) == {-1, 0, 1}
        shares = rows.double().pow(2).mean(), rows.double().mean()
        assert abs(shares[0] - 0.5) < 0.005
        assert abs(shares[1]) < 0.005
        assert rows.shape == (length, ROWS)
        expected = torch.from_numpy(words.astype(np.int64)) @ rows
        assert torch.equal(project([words], seed)[0], expected)
        assert not torch.equal(project([words], torch.tensor([3, 5]))[0], expected)

    def test_the_stated_chances_follow_from_the_stated_bounds(self) -> None:
        t = threshold(BOUND) / (ROWS * BOUND**2 / 2)
        assert ROWS / 2 * math.log2(t * math.exp(1 - t)) < -23.9
        theta = t / SLACK**2
        u = 1 / theta - 1
        grid = np.linspace(-12, 12, 200_001)
        weights = np.exp(-(grid**2) / 2) * (grid[1] - grid[0]) / math.sqrt(2 * math.pi)
        for more in (1.0, 1.3, 2.0):
            most = max(
                (weights * np.abs(np.cos(grid * math.sqrt(more * u / (2 * n)))) ** (2 * n)).sum()
                for n in np.geomspace(1, 1e4, 60)
            )
            assert most <= (1 + u) ** -0.5 + 1e-4
        assert (1 + math.exp(-u)) / 2 <= (1 + u) ** -0.5
        assert ROWS * math.log2(math.exp(u * theta / 2) / math.sqrt(1 + u) + 1e-4) < -40

    @pytest.mark.parametrize("bits", [2, 5, 8])
    def test_a_lifted_residue_is_right_or_no_smaller(self, bits: int) -> None:
        every, masks = torch.arange(1 << bits), prg(bits).words((200, 1 << bits))
        trio = Trio(prg(1))
        shares = trio.run(lift(masks, bits, Role.ALICE), lift(every - masks, bits, Role.BOB))
        lifted = shares[0].words + shares[1].words
        centred = ((every + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)).expand_as(lifted)
        assert torch.equal((lifted - centred) % (1 << bits), torch.zeros_like(lifted))
        small = centred.abs() < 1 << (bits - 2)
        assert torch.equal(lifted[small], centred[small])
        assert (lifted.abs() >= centred.abs()).all()
        assert (lifted.abs() <= 3 << (bits - 2)).all()
        assert (lifted != centred).any(), "the range in which a wrap is missed was not tried"

    def test_what_is_opened_does_not_depend_on_the_length(self) -> None:
        costs = []
        for length in (10, 1000):
            meter, words = Meter(), [Ring(BITS).zeros(length)]
            Trio(prg(1)).run(within(words, BITS, 9, Role.ALICE), within(words, BITS, 9, Role.BOB), meter)
            costs.append((meter.rounds, meter.bytes_online, meter.bytes_dealt))
        assert costs[0] == costs[1]
        assert costs[0][0] == 8
        assert costs[0][1] < 6.2 * 1024
        assert costs[0][2] < 6.2 * 1024

    def test_bad_clients_are_excluded_and_the_rest_are_summed(self) -> None:
        encoding = Encoding(LENGTH, clip=1.0, clients=64, bits=16, scalars=(Scalar("weight", 1000),))
        bound = norm_bound(encoding, 1.0)
        n, bad = BATCH + 9, {3, 17, BATCH + 2}
        vectors, good = {}, []
        for client in range(n):
            real = torch.from_numpy(of_norm(1e6, seed=client) / 1e6).float()
            words = encoding.encode(real, [client], prg(client)).words
            if client in bad:
                words = residues(of_norm(BOUND * 40, len(words), seed=client), encoding.ring.bits)
            else:
                good.append(client)
            vectors[client] = words
        found = SharedSum.among(n, 3, bound).sum(encoding.ring, encoding.length, range(n), vectors.get)
        expected = PlainSum().sum(encoding.ring, encoding.length, good, vectors.get)
        assert np.array_equal(found.total, expected.total)
        assert found.survivors == tuple(good)
        assert found.lost == dict.fromkeys(bad, TOO_LONG)
        assert encoding.decode(found.total)[1] == (float(sum(good)),)

    @pytest.mark.parametrize("size", [1, 10, 100_000])
    def test_honest_vectors_are_within_the_bound_after_rounding(self, size: int) -> None:
        encoding = Encoding(size, clip=0.5, clients=100, bits=14, scalars=(Scalar("weight", 1e6),))
        bound = norm_bound(encoding, 0.5)
        for seed in range(5):
            real = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            integers, _ = encoding.integers((real / real.norm() * 0.5).float(), [1e6], prg(seed))
            assert np.linalg.norm(integers.astype(float)) <= bound
        slack = 2**13 * math.sqrt(1 + (encoding.length - size))
        assert bound < math.sqrt(slack**2 + size / 4 + 7 * (2**13 + math.sqrt(size))) + 1
