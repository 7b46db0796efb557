"""The ring, its randomness, fixed point and the prime field, against plain Python integers."""

import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from tacit.errors import InputError, RangeError
from tacit.ring import prg as prg_module
from tacit.ring.field import PRIME, decrypt, encrypt
from tacit.ring.fixed_point import decode, encode
from tacit.ring.integers import (
    bits_at,
    lookup,
    low_byte_after_shift,
    parity,
    shift_right,
    thermometer,
    top_bit,
)
from tacit.ring.prg import Prg

WORD = 2**64
words = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 2**62])
shifts = st.integers(0, 63)
SEED = bytes(range(16))
SECRET = 424242.4242


def tensor(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


class TestIntegers:
    @given(st.lists(words, min_size=1), shifts)
    def test_a_shift_brings_in_zeros(self, values: list[int], count: int) -> None:
        expected = [value % WORD >> count for value in values]
        assert [value % WORD for value in shift_right(tensor(*values), count).tolist()] == expected

    @given(words)
    def test_top_bit(self, value: int) -> None:
        assert top_bit(tensor(value)).tolist() == [int(value < 0)]

    @given(words, st.integers(0, 62), st.integers(1, 62))
    def test_bits_at(self, value: int, lowest: int, count: int) -> None:
        count = min(count, 64 - lowest, 62)
        assert bits_at(tensor(value), lowest, count).tolist() == [(value % WORD >> lowest) % 2**count]

    @given(st.lists(st.tuples(words, shifts), min_size=1))
    def test_low_byte_after_a_shift_of_each_element(self, cases: list[tuple[int, int]]) -> None:
        result = low_byte_after_shift(*(tensor(*column) for column in zip(*cases, strict=True)))
        assert result.dtype == torch.uint8
        assert result.tolist() == [(value % WORD >> count) % 256 for value, count in cases]

    @pytest.mark.parametrize("value", [-1, -(2**63), 2**63 - 1])
    def test_a_shift_by_63_leaves_the_top_bit(self, value: int) -> None:
        assert low_byte_after_shift(tensor(value), tensor(63)).tolist() == [int(value < 0)]
        assert shift_right(tensor(value), 63).tolist() == [int(value < 0)]

    def test_every_thermometer_word(self) -> None:
        words = thermometer(torch.arange(64))
        assert [value % WORD for value in words.tolist()] == [2 ** (level + 1) - 1 for level in range(64)]

    def test_a_thermometer_compares(self) -> None:
        held, asked = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
        pair = low_byte_after_shift(thermometer(held.contiguous()), asked.contiguous())
        assert torch.equal(pair & 1, (held >= asked).to(torch.uint8))
        assert torch.equal(pair >> 1 & 1, (held > asked).to(torch.uint8))

    @given(st.lists(words, min_size=1))
    def test_parity(self, values: list[int]) -> None:
        assert parity(tensor(*values)).tolist() == [(value % WORD).bit_count() & 1 for value in values]

    def test_lookup(self) -> None:
        table, index = torch.arange(256) ** 2, torch.tensor([[0, 255], [7, 128]], dtype=torch.uint8)
        assert torch.equal(lookup(table, index), index.long() ** 2)

    @pytest.mark.parametrize("function", [thermometer, parity, top_bit])
    def test_a_number_without_dimensions_is_a_tensor_too(self, function) -> None:
        assert function(torch.tensor(5)).shape == ()

    def test_pairs_without_dimensions_are_tensors_too(self) -> None:
        assert low_byte_after_shift(torch.tensor(5), torch.tensor(1)).tolist() == 2
        assert lookup(torch.arange(256), torch.tensor(5, dtype=torch.uint8)).tolist() == 5

    @pytest.mark.parametrize(
        ("function", "dtype"),
        [
            (lambda x: shift_right(x, 3), torch.int64),
            (lambda x: bits_at(x, 3, 2), torch.int64),
            (top_bit, torch.int64),
            (thermometer, torch.int64),
            (parity, torch.uint8),
            (lambda x: low_byte_after_shift(x, x), torch.uint8),
            (lambda x: lookup(torch.zeros(256, dtype=torch.int64), x.to(torch.uint8)), torch.int64),
            (lambda x: lookup(torch.zeros(256, dtype=torch.uint8), x.to(torch.uint8)), torch.uint8),
        ],
    )
    def test_shapes_alone_are_enough_to_plan(self, function, dtype: torch.dtype) -> None:
        result = function(torch.empty((2, 3), dtype=torch.int64, device="meta"))
        assert (result.is_meta, tuple(result.shape), result.dtype) == (True, (2, 3), dtype)


def aes_ctr(seed: bytes, count: int) -> bytes:
    return Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(count))


class TestPrg:
    def test_the_stream_is_aes_in_counter_mode(self) -> None:
        # FIPS 197, appendix C.1, encrypts 00112233…; the first block here is the encryption of counter zero.
        assert Prg(SEED).bytes(16).hex() == "c6a13b37878f5b826f4f8162a1c8d879"
        assert Prg(SEED).bytes(1000) == aes_ctr(SEED, 1000)

    @pytest.mark.parametrize("count", [2**17 - 1, 2**17, 2**17 + 1, 3 * 2**17 + 5])
    def test_long_draws_are_the_same_stream(self, count: int) -> None:
        assert Prg(SEED).bytes(count) == aes_ctr(SEED, count)

    def test_being_prepared_changes_nothing_that_is_drawn(self) -> None:
        generator = Prg(SEED).prepared()
        drawn = generator.bytes(5) + generator.prepared().bytes(90) + generator.prepared().bytes(905)
        assert drawn == aes_ctr(SEED, 1000)

    @given(st.lists(st.integers(0, 100), max_size=20))
    def test_draws_continue_the_stream_and_never_repeat(self, counts: list[int]) -> None:
        generator = Prg(SEED)
        assert b"".join(generator.bytes(count) for count in counts) == aes_ctr(SEED, sum(counts))

    @given(st.lists(st.integers(0, 70), max_size=20), st.integers(1, 9))
    def test_the_stream_goes_on_where_the_counter_of_gcm_ends(self, counts: list[int], blocks: int) -> None:
        # As if it ended not after 64 GiB, but after a few blocks.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prg_module, "_GCM_BLOCKS", blocks)
            generator = Prg(SEED)
            assert b"".join(generator.bytes(count) for count in counts) == aes_ctr(SEED, sum(counts))

    def test_gcm_ends_where_its_counter_does(self) -> None:
        assert 2 + prg_module._GCM_BLOCKS == 1 << 32

    def test_words_and_bits_are_the_bytes_of_the_stream(self) -> None:
        stream = aes_ctr(SEED, 49)
        generator = Prg(SEED)
        assert generator.words((2, 3)).numpy().tobytes() == stream[:48]
        assert generator.bits((7,)).tolist() == [stream[48] >> 7 - i & 1 for i in range(7)]

    def test_what_was_drawn_can_be_written_to(self) -> None:
        drawn = Prg(SEED).words((4,))
        drawn += 1
        assert drawn.numpy().tobytes() != aes_ctr(SEED, 32)

    def test_two_draws_do_not_share_memory(self) -> None:
        generator = Prg(SEED)
        first = generator.words((4,))
        before = first.clone()
        generator.words((4,)).zero_()
        assert torch.equal(first, before)

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1, 1)])
    def test_odd_shapes(self, shape: tuple[int, ...]) -> None:
        assert tuple(Prg(SEED).words(shape).shape) == tuple(Prg(SEED).bits(shape).shape) == shape

    def test_derive_is_hkdf_expand(self) -> None:
        mac = hmac.HMAC(SEED, hashes.SHA256())
        mac.update(b"tacit/v1/x/" + (5).to_bytes(8, "big") + b"\x01")
        assert Prg(SEED).derive("x", 5).bytes(40) == aes_ctr(mac.finalize()[:16], 40)

    def test_derive_separates_purposes_numbers_and_seeds(self) -> None:
        streams = [
            Prg(seed).derive(purpose, number).bytes(16)
            for seed in (SEED, bytes(16))
            for purpose in ("a", "b", "a/", "")
            for number in (0, 1, 256, 2**63)
        ]
        assert len(set(streams)) == len(streams)

    def test_derive_does_not_depend_on_what_was_drawn(self) -> None:
        drawn = Prg(SEED)
        drawn.bytes(100)
        assert drawn.derive("x").bytes(16) == Prg(SEED).derive("x").bytes(16)

    def test_derived_streams_differ_from_their_parent(self) -> None:
        assert Prg(SEED).derive("x").bytes(16) != Prg(SEED).bytes(16)

    def test_fresh_generators_differ(self) -> None:
        assert Prg.fresh().bytes(16) != Prg.fresh().bytes(16)

    @given(st.integers(1, 2**130))
    def test_below_stays_below(self, bound: int) -> None:
        generator = Prg(SEED)
        assert all(0 <= generator.below(bound) < bound for _ in range(5))

    def test_below_is_uniform(self) -> None:
        generator = Prg(SEED)
        counts = np.bincount([generator.below(5) for _ in range(10_000)], minlength=5)
        assert sum((count - 2000) ** 2 / 2000 for count in counts) < 33  # chi-square, 4 degrees: p = 1e-6

    @pytest.mark.parametrize("length", [0, 15, 17, 32])
    def test_a_seed_of_another_length_is_refused(self, length: int) -> None:
        with pytest.raises(InputError, match=f"16 bytes, not {length}"):
            Prg(bytes(length))

    def test_the_seed_does_not_print(self) -> None:
        assert repr(Prg(SEED)) == str(Prg(SEED)) == "Prg(seed hidden)"


class TestFixedPoint:
    @given(st.floats(-16383, 16383), st.integers(0, 16))
    def test_an_encoded_number_is_within_half_a_unit(self, value: float, bits: int) -> None:
        encoded = encode(torch.tensor([value], dtype=torch.float64), bits)
        assert encoded.dtype == torch.int64
        assert abs(encoded.item() - value * 2.0**bits) <= 0.5
        assert abs(decode(encoded, bits).item() - value) <= 2.0 ** -(bits + 1)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.bool])
    def test_real_dtypes_are_exact_where_the_number_is(self, dtype: torch.dtype) -> None:
        assert encode(torch.tensor([1, 0]).to(dtype)).tolist() == [65536, 0]

    def test_the_range_is_open_at_both_ends(self) -> None:
        edge = 2.0**14
        inside = math.nextafter(edge, 0) - 2.0**-16
        assert encode(torch.tensor([inside, -inside], dtype=torch.float64)).tolist() == [2**30 - 1, 1 - 2**30]
        for outside in (edge, -edge):
            with pytest.raises(RangeError, match="±16384"):
                encode(torch.tensor([outside]))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_is_refused(self, value: float) -> None:
        with pytest.raises(RangeError, match="the weight holds NaN or infinity"):
            encode(torch.tensor([1.0, value]), what="the weight")

    def test_complex_numbers_are_refused(self) -> None:
        with pytest.raises(InputError, match="complex64"):
            encode(torch.tensor([1j]))

    def test_an_error_does_not_tell_the_value(self) -> None:
        with pytest.raises(RangeError) as caught:
            encode(torch.tensor([SECRET]))
        assert "4242" not in str(caught.value)

    def test_shapes_alone_can_be_encoded(self) -> None:
        assert encode(torch.empty(2, 3, device="meta")).dtype == torch.int64


numbers = st.integers(-(PRIME // 2), PRIME // 2)


class TestField:
    @given(numbers, st.integers(2, 6))
    def test_what_is_encrypted_is_decrypted(self, number: int, parties: int) -> None:
        shared = encrypt(number, parties)
        assert len(shared.shares) == parties
        assert decrypt(shared) == number

    small = st.integers(-(2**60), 2**60)

    @given(small, small, small)
    def test_arithmetic_on_shares_is_arithmetic(self, x: int, y: int, factor: int) -> None:
        a, b = encrypt(x), encrypt(y)
        assert decrypt(a + b) == x + y
        assert decrypt(a - b) == x - y
        assert decrypt(-a) == -x
        assert decrypt(a * factor) == decrypt(factor * a) == x * factor

    @given(numbers, numbers)
    def test_sums_wrap_around_the_modulus(self, x: int, y: int) -> None:
        assert (decrypt(encrypt(x) + encrypt(y)) - (x + y)) % PRIME == 0

    def test_a_small_prime_shares_every_number(self) -> None:
        assert [decrypt(encrypt(x, modulus=23)) for x in range(-11, 12)] == list(range(-11, 12))

    def test_any_two_of_three_shares_are_uniform(self) -> None:
        generator = Prg(SEED)
        for left, right in ((0, 1), (0, 2), (1, 2)):
            counts = np.zeros((5, 5))
            for _ in range(5000):
                shares = encrypt(2, modulus=5, prg=generator).shares
                counts[shares[left], shares[right]] += 1
            assert ((counts - 200) ** 2 / 200).sum() < 83  # chi-square, 24 degrees: p < 1e-7

    @pytest.mark.parametrize("number", [PRIME // 2 + 1, -(PRIME // 2) - 1])
    def test_a_number_outside_the_field_is_refused_unnamed(self, number: int) -> None:
        with pytest.raises(InputError, match="does not fit") as caught:
            encrypt(number + (12345 if number > 0 else -12345))
        assert str(abs(number) + 12345) not in str(caught.value)

    @pytest.mark.parametrize("parties", [1, 0, -1])
    def test_sharing_takes_two(self, parties: int) -> None:
        with pytest.raises(InputError, match="at least 2"):
            encrypt(5, parties)

    def test_numbers_of_different_sharings_do_not_add(self) -> None:
        with pytest.raises(InputError, match="same parties"):
            encrypt(5, 3) + encrypt(5, 2)
        with pytest.raises(InputError, match="same modulus"):
            encrypt(5) + encrypt(5, modulus=101)
