"""What the secure sums are made of: packing, encoding, Shamir's sharing, parameters."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from secure_sums import prg
from tacit.errors import CodecError, InputError, PeerError, RangeError
from tacit.federated.secure_sum import agreement
from tacit.federated.secure_sum.agreement import KeyPair
from tacit.federated.secure_sum.encoding import Encoding, Scalar
from tacit.federated.secure_sum.interface import PlainSum
from tacit.federated.secure_sum.masked import MaskedSum, Policy
from tacit.federated.secure_sum.parameters import Assumption, Sharing, choose, completion_bits, privacy_bits
from tacit.federated.secure_sum.ring import Ring, pack_plainly, unpack_plainly
from tacit.ring import shamir
from tacit.ring.field import PRIME_256, inverses
from tacit.ring.prg import Prg, add_streams

rings = st.integers(2, 32).map(Ring)


class TestRing:
    @given(rings, st.integers(0, 70), st.binary(min_size=3, max_size=3))
    def test_packed_residues_are_added_back(self, ring: Ring, length: int, seed: bytes) -> None:
        words = ring.residues(Prg(seed.ljust(16, b"\0")).array(8 * length).view(np.int64))
        packed = ring.pack(words)
        assert packed.nbytes == 4 * ring.packed_size(length) < ring.bits * length / 8 + 4
        assert np.array_equal(packed, pack_plainly(words, ring.bits))
        assert np.array_equal(unpack_plainly(packed, ring.bits, length), words)
        total = words.copy()
        ring.add_packed(packed, total)
        assert np.array_equal(ring.reduce_(total), ring.residues(2 * words.astype(np.int64)))

    @given(rings, st.integers(0, 70))
    def test_without_compiled_loops_too(self, ring: Ring, length: int) -> None:
        words = ring.residues(prg(length).array(8 * length).view(np.int64))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("tacit.federated.secure_sum.ring.load", lambda name: None)
            packed, total = ring.pack(words), ring.zeros(length)
            ring.add_packed(packed, total)
        assert np.array_equal(packed, ring.pack(words))
        assert np.array_equal(total, words)

    @given(rings)
    def test_signed_representatives(self, ring: Ring) -> None:
        half = 1 << (ring.bits - 1)
        integers = np.array([0, 1, -1, half - 1, -half])
        assert ring.signed(ring.residues(integers)).tolist() == integers.tolist()

    def test_lowest_bit_first(self) -> None:
        assert Ring(20).pack(np.array([0x12345, 0xABCDE], np.uint32)).tobytes().hex() == "4523e1cdab000000"

    @pytest.mark.parametrize("bits", [1, 0, 33, 64])
    def test_bits_out_of_range(self, bits: int) -> None:
        with pytest.raises(InputError, match="from 2 to 32"):
            Ring(bits)

    def test_packed_vectors_of_another_size_are_refused(self) -> None:
        ring = Ring(20)
        for size in (0, 1, 3):
            with pytest.raises(CodecError, match="2 were expected"):
                ring.add_packed(np.zeros(size, np.uint32), ring.zeros(3))

    def test_unused_bits_are_zero(self) -> None:
        ring = Ring(20)
        packed = np.zeros(2, np.uint32)
        packed[1] = 1 << 28
        total = ring.zeros(3)
        with pytest.raises(CodecError, match="unused bits"):
            ring.add_packed(packed, total)
        assert not total.any()


class TestPrgAddInto:
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
    @pytest.mark.parametrize("count", [0, 1, 5, 40_000])
    def test_adds_the_stream(self, dtype: type, count: int) -> None:
        stream = prg(1).array(count * np.dtype(dtype).itemsize).view(dtype)
        words = prg(2).array(count * np.dtype(dtype).itemsize).view(dtype)
        added, taken = words.copy(), words.copy()
        prg(1).add_into(added)
        prg(1).add_into(taken, subtract=True)
        assert np.array_equal(added, words + stream)
        assert np.array_equal(taken, words - stream)

    @pytest.mark.parametrize("count", [0, 3, 33_000, 70_001])
    def test_many_streams_are_added_as_one_after_another(self, count: int) -> None:
        together, single = prg(2).array(4 * count).view(np.uint32), prg(2).array(4 * count).view(np.uint32)
        signs = [bool(prg(9, i).below(2)) for i in range(70)]
        add_streams(together, ((prg(5, i), sign) for i, sign in enumerate(signs)))
        for i, sign in enumerate(signs):
            prg(5, i).add_into(single, subtract=sign)
        assert np.array_equal(together, single)

    def test_what_was_added_is_not_drawn_again(self) -> None:
        generator, words = prg(1), np.zeros(33_000, np.uint32)
        generator.add_into(words)
        assert words.tobytes() + generator.bytes(20) == prg(1).bytes(4 * 33_000 + 20)


elements = st.integers(0, PRIME_256 - 1) | st.sampled_from([0, 1, PRIME_256 - 1, 2**255 - 1])


class TestShamir:
    @given(elements, st.integers(1, 6), st.integers(0, 3), st.randoms(use_true_random=False))
    def test_any_t_shares_give_the_secret(self, secret: int, threshold: int, more: int, random) -> None:
        points = random.sample([1, 2, 3, 7, 100, 1000, 2**16, 2**32, 12, 13], threshold + more)
        shares = dict(zip(points, shamir.split(secret, threshold, points, prg(1)), strict=True))
        for chosen in combinations(points, threshold):
            assert shamir.reconstruct({point: shares[point] for point in chosen}) == secret

    def test_too_few_shares_give_something_else(self) -> None:
        shares = dict(zip((1, 2, 3), shamir.split(42, 3, (1, 2, 3), prg(1)), strict=True))
        assert shamir.reconstruct({1: shares[1], 2: shares[2]}) != 42

    def test_t_minus_1_shares_say_nothing(self) -> None:
        # With two of three shares fixed, every secret is explained by exactly one value of the third.
        shares = shamir.split(5, 3, (1, 2, 3), prg(1))
        weights = shamir.weights_at_zero((1, 2, 3))
        for secret in (0, 5, PRIME_256 - 1):
            rest = (secret - shamir.combine(weights[:2], shares[:2])) * pow(weights[2], -1, PRIME_256) % PRIME_256
            assert shamir.combine(weights, (*shares[:2], rest)) == secret

    def test_single_shares_are_uniform(self) -> None:
        generator = prg(9)
        top = np.bincount([shamir.split(7, 2, (1, 2), generator)[0] >> 252 for _ in range(8000)], minlength=16)
        assert ((top - 500) ** 2 / 500).sum() < 60  # chi-square, 15 degrees: p < 1e-6

    def test_the_prime_is_the_largest_below_2_256(self) -> None:
        def composite(n: int) -> bool:  # Miller and Rabin, to the first bases
            odd = (n - 1) >> (shift := ((n - 1) & -(n - 1)).bit_length() - 1)
            powers = ((pow(base, odd, n)) for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37))
            return any(x != 1 and all(pow(x, 1 << i, n) != n - 1 for i in range(shift)) for x in powers)

        assert not composite(PRIME_256)
        assert all(composite(n) for n in range(PRIME_256 + 2, 2**256, 2))

    @given(st.lists(st.integers(1, PRIME_256 - 1), max_size=8))
    def test_inverses(self, values: list[int]) -> None:
        found = inverses(values, PRIME_256)
        assert all(x * y % PRIME_256 == 1 for x, y in zip(values, found, strict=True))

    def test_zero_has_no_inverse(self) -> None:
        with pytest.raises(InputError, match="0 has no inverse"):
            inverses([3, PRIME_256, 5], PRIME_256)

    @pytest.mark.parametrize(
        ("secret", "threshold", "points"),
        [
            (-1, 2, (1, 2)),
            (PRIME_256, 2, (1, 2)),
            (1, 0, (1, 2)),
            (1, 3, (1, 2)),
            (1, 1, ()),
            (1, 2, (1, 1)),
            (1, 2, (0, 1)),
            (1, 2, (1, 2**32 + 1)),
        ],
    )
    def test_what_cannot_be_shared(self, secret: int, threshold: int, points: tuple[int, ...]) -> None:
        with pytest.raises(InputError):
            shamir.split(secret, threshold, points, prg(1))


class TestKeys:
    def test_both_agree_and_nothing_serves_twice(self) -> None:
        one, two, transcript = KeyPair(prg(1)), KeyPair(prg(2)), bytes(32)
        seed = agreement.pair_seed(one, two.public, transcript, 3, 8)
        assert seed == agreement.pair_seed(two, one.public, transcript, 8, 3)
        others = {
            agreement.pair_seed(one, two.public, transcript, 3, 9),
            agreement.pair_seed(one, two.public, b"\1" * 32, 3, 8),
            agreement.self_seed(bytes(16), transcript, 3),
            agreement.self_seed(bytes(16), transcript, 4),
            one.agree(two.public, 16, transcript, b"seal", 3, 8),
            one.agree(two.public, 16, transcript, b"seal", 8, 3),
        }
        assert len(others | {seed}) == 7

    def test_the_seed_of_a_pair_is_hkdf_of_x25519(self) -> None:
        one, two, transcript = KeyPair(prg(1)), KeyPair(prg(2)), bytes(range(32))
        secret = one._key.exchange(two._key.public_key())
        info = b"tacit/v1/masked-sum/mask\0" + (3).to_bytes(4, "little") + (8).to_bytes(4, "little")
        assert agreement.pair_seed(one, two.public, transcript, 8, 3) == HKDF(SHA256(), 16, transcript, info).derive(
            secret
        )

    def test_a_private_key_is_an_element_of_the_field_and_comes_back(self) -> None:
        for seed in range(20):
            pair = KeyPair(prg(seed))
            assert pair.number < 2**255 < PRIME_256
            assert KeyPair.of_number(pair.number).public == pair.public

    def test_a_number_beyond_32_bytes_is_no_key(self) -> None:
        with pytest.raises(PeerError, match="wrong one"):
            KeyPair.of_number(2**256)


SCALARS = (Scalar("weight", 10_000), Scalar("loss", 1e5, 2.0**-12))


class TestEncoding:
    @given(st.floats(-2, 2), st.integers(2, 24), st.integers(1, 200))
    def test_an_entry_is_rounded_up_or_down(self, value: float, bits: int, clients: int) -> None:
        encoding = Encoding(1, 1.5, clients, bits)
        if encoding.clients * 2**bits >= 2**32:
            return
        (integer,), clamped = encoding.integers(torch.tensor([value], dtype=torch.float64), (), Prg.fresh())
        exact = min(max(value, -1.5), 1.5) * encoding.scale
        assert math.floor(exact - 1e-6) <= integer <= math.ceil(exact + 1e-6)
        assert clamped == (abs(value) > 1.5)

    def test_rounding_is_right_in_expectation(self) -> None:
        for value in (0.3, -0.3, 0.004, 0.99):
            encoding = Encoding(100_000, 1.0, 1, bits=4)
            integers, _ = encoding.integers(torch.full((100_000,), value), (), prg(7))
            exact, spread = float(np.float32(value)) * encoding.scale, 0.5 / math.sqrt(100_000)
            assert len(set(integers.tolist())) == 2
            assert abs(integers.mean() - exact) < 5 * spread
            # Rounding to the nearest instead would be noticed.
            assert abs(round(exact) - exact) > 5 * spread

    def test_a_longer_vector_is_rounded_piece_by_piece(self) -> None:
        vector = torch.linspace(-1, 1, 100_001)
        encoding = Encoding(100_001, 1.0, 1)
        decoded, _ = encoding.decode(encoding.encode(vector, (), prg(1)).words)
        assert (decoded - vector).abs().max() <= 1.001 / encoding.scale

    @pytest.mark.parametrize(
        ("clients", "bits"), [(1, 16), (2, 16), (3, 2), (100, 16), (1000, 16), (65_537, 16), (255, 24)]
    )
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_the_ring_just_holds_the_extreme_sum(self, clients: int, bits: int, sign: float) -> None:
        encoding = Encoding(3, 0.7, clients, bits, SCALARS)
        words = encoding.encode(torch.full((3,), 0.7 * sign), (10_000 * sign, 1e5 * sign), prg(1)).words
        total = encoding.ring.residues(words.astype(np.int64) * clients)
        vector, scalars = encoding.decode(total)
        assert torch.allclose(vector, torch.full((3,), 0.7 * sign * clients), rtol=1e-6)
        assert scalars == (10_000 * sign * clients, 1e5 * sign * clients)
        # No smaller ring would do.
        assert clients * (2 ** (bits - 1) - 1) >= 2 ** (encoding.ring.bits - 2)

    @pytest.mark.parametrize(("clients", "bits"), [(1, 2), (1, 16), (100, 16), (1000, 16)])
    def test_a_vector_takes_log2_n_bits_more_than_an_entry(self, clients: int, bits: int) -> None:
        assert Encoding(1, 1.0, clients, bits).ring.bits == bits + math.ceil(math.log2(clients))

    @pytest.mark.parametrize("clients", [4, 5])
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_the_extreme_sum_survives_the_masked_protocol(self, clients: int, sign: float) -> None:
        encoding = Encoding(3, 2.0, clients, scalars=SCALARS)
        extreme = [encoding.encode(torch.full((3,), 9.0 * sign), (10_000, -1e5), prg(i)).words for i in range(clients)]
        arguments = (encoding.ring, encoding.length, range(clients), extreme.__getitem__)
        masked = MaskedSum.among(clients, Policy(3)).sum(*arguments)
        assert np.array_equal(masked.total, PlainSum().sum(*arguments).total)
        vector, scalars = encoding.decode(masked.total)
        assert vector.tolist() == [2.0 * sign * clients] * 3
        assert scalars == (10_000 * clients, -1e5 * clients)

    def test_headroom_for_noise_is_part_of_the_ring(self) -> None:
        quiet, noisy = Encoding(1, 1.0, 100), Encoding(1, 1.0, 100, headroom=2**17)
        assert noisy.ring.bits > quiet.ring.bits
        largest = 2**15 - 1 + 2**17
        extreme = noisy.ring.residues(np.array([100 * largest, -100 * largest]))
        assert noisy.ring.signed(extreme).tolist() == [100 * largest, -100 * largest]

    @pytest.mark.parametrize(
        "settings",
        [
            {"clients": 2**16, "bits": 18},
            {"clients": 1000, "bits": 24},
            {"clients": 256, "bits": 24, "headroom": 2**23},
            {"clients": 1000, "headroom": 2**22},
        ],
    )
    def test_sums_that_could_overflow_are_refused(self, settings: dict) -> None:
        with pytest.raises(InputError, match="could overflow"):
            Encoding(1, 1.0, **settings)

    def test_the_edge_of_32_bits(self) -> None:
        assert Encoding(1, 1.0, 256, bits=24).ring.bits == 32
        with pytest.raises(InputError, match="could overflow"):
            Encoding(1, 1.0, 257, bits=24)

    @pytest.mark.parametrize(
        "settings",
        [
            {"size": -1},
            {"clip": 0.0},
            {"clip": -1.0},
            {"clip": math.inf},
            {"clip": math.nan},
            {"clip": 5e-324},
            {"clients": 0},
            {"bits": 1},
            {"bits": 25},
            {"headroom": -1},
        ],
    )
    def test_settings_out_of_range(self, settings: dict) -> None:
        with pytest.raises(InputError):
            Encoding(**{"size": 1, "clip": 1.0, "clients": 2, **settings})

    @given(st.integers(-10_000, 10_000), st.floats(-1e5, 1e5))
    def test_scalars_are_exact_to_a_step(self, weight: int, loss: float) -> None:
        encoding = Encoding(2, 1.0, 3, scalars=SCALARS)
        words = encoding.encode(torch.zeros(2), (weight, loss), prg(1)).words
        _, (weights, losses) = encoding.decode(encoding.ring.residues(3 * words.astype(np.int64)))
        assert weights == 3 * weight
        assert abs(losses - 3 * loss) <= 3 * 2.0**-13

    @pytest.mark.parametrize("value", [math.nan, math.inf, 10_001.0, -10_001.0])
    def test_scalars_beyond_their_bound_are_refused_unnamed(self, value: float) -> None:
        with pytest.raises(RangeError, match="weight is not finite or beyond ±10000") as caught:
            Encoding(1, 1.0, 3, scalars=SCALARS).encode(torch.zeros(1), (value, 0.0), prg(1))
        assert "10001" not in str(caught.value)

    @pytest.mark.parametrize("settings", [(0.0, 1.0), (1.0, 0.0), (1.0, 2.0), (math.inf, 1.0), (2.0**63, 1.0)])
    def test_impossible_scalars(self, settings: tuple[float, float]) -> None:
        with pytest.raises(InputError, match="loss"):
            Scalar("loss", *settings)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_is_refused(self, value: float) -> None:
        with pytest.raises(RangeError, match="NaN or infinity"):
            Encoding(2, 1.0, 3).encode(torch.tensor([0.0, value]), (), prg(1))

    def test_other_shapes_are_refused(self) -> None:
        encoding = Encoding(2, 1.0, 3, scalars=SCALARS)
        for vector, scalars in ((torch.zeros(3), (1, 1)), (torch.zeros(1, 2), (1, 1)), (torch.zeros(2), (1,))):
            with pytest.raises(InputError, match="this round sums"):
                encoding.encode(vector, scalars, prg(1))
        with pytest.raises(InputError, match="expected"):
            encoding.decode(encoding.ring.zeros(2))

    def test_encoded_vectors_do_not_print(self) -> None:
        assert repr(Encoding(2, 1.0, 3).encode(torch.ones(2), (), prg(1))) == "Encoded(2 residues hidden)"


CURIOUS, LYING = Assumption(0.2, 0.1, False), Assumption(0.1, 0.1, True)


class TestParameters:
    @pytest.mark.parametrize(
        ("members", "assumption", "holders", "threshold"), [(1000, CURIOUS, 67, 43), (1000, LYING, 95, 66)]
    )
    def test_the_known_choices_for_a_thousand_clients(self, members, assumption, holders, threshold) -> None:
        chosen = choose(members, assumption)
        assert (chosen.holders, chosen.threshold) == (holders, threshold)
        assert chosen.partners == -(-holders // 2)

    @pytest.mark.parametrize(("members", "assumption"), [(300, CURIOUS), (300, LYING), (1000, LYING)])
    def test_bounds_against_the_hypergeometric_distribution(self, members: int, assumption: Assumption) -> None:
        sharing = choose(members, assumption)
        corrupt, dropped = int(assumption.corrupt * members), math.ceil(assumption.dropped * members)
        reach = 2 * sharing.threshold - sharing.holders if assumption.lying else sharing.threshold
        gathered = members * hypergeom(members - 1, corrupt, sharing.holders).sf(reach - 1)
        unfinished = members * hypergeom(members - 1, dropped, sharing.holders).sf(sharing.holders - sharing.threshold)
        assert 40 <= privacy_bits(members, sharing, assumption) <= -math.log2(gathered) + 1e-6
        assert completion_bits(members, sharing, assumption) == pytest.approx(-math.log2(unfinished), abs=1e-6)
        assert completion_bits(members, sharing, assumption) >= 20

    def test_fewer_holders_or_a_lower_threshold_are_not_private(self) -> None:
        chosen = choose(1000, LYING)
        fewer = Sharing(chosen.holders, chosen.partners, chosen.threshold - 1)
        assert privacy_bits(1000, fewer, LYING) < 40
        assert privacy_bits(1000, Sharing(chosen.holders, 6, chosen.threshold), LYING) < 40
        assert privacy_bits(1000, Sharing(chosen.holders, chosen.partners, 20), LYING) == 0

    @pytest.mark.parametrize("members", [4, 5, 10, 50])
    @pytest.mark.parametrize("assumption", [CURIOUS, LYING])
    def test_small_cohorts_share_with_everybody(self, members: int, assumption: Assumption) -> None:
        chosen = choose(members, assumption)
        assert chosen.holders == chosen.partners == members - 1
        assert privacy_bits(members, chosen, assumption) == math.inf

    @pytest.mark.parametrize("members", [51, 60, 100, 300])
    @pytest.mark.parametrize("assumption", [CURIOUS, LYING])
    def test_drop_outs_before_the_roster_cost_at_most_a_bit(self, members: int, assumption: Assumption) -> None:
        chosen = choose(members, assumption)
        for left in range(int(0.9 * members), members):
            assert privacy_bits(left, chosen.among(left), assumption) >= 39

    @pytest.mark.parametrize("members", [1, 2, 3])
    def test_cohorts_that_are_too_small(self, members: int) -> None:
        with pytest.raises(InputError, match="take more clients"):
            choose(members, LYING)

    def test_impossible_assumptions(self) -> None:
        for fractions in ((0.5, 0.1), (-0.1, 0.1), (0.1, 0.5), (math.nan, 0.1)):
            with pytest.raises(InputError, match="fraction"):
                Assumption(*fractions)
        with pytest.raises(InputError, match="49% are corrupt"):
            choose(20, Assumption(0.49, 0.4, True))
