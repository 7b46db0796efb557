"""Frames: one encoding, exact sizes, and refusal of everything else."""

import contextlib
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tacit import wire
from tacit.errors import CodecError, InputError
from tacit.mpc.lockstep import wire_bytes
from tacit.ring.prg import Prg
from tacit.wire import Item, Kind, decode, encode

DTYPES = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool]


def tensor(seed: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    words = Prg(seed.to_bytes(16, "big")).words(shape)
    return words & 1 == 1 if dtype == torch.bool else words.to(dtype)


items = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4).map(tuple))


@given(
    st.sampled_from(Kind), st.integers(0, 2**40), st.lists(items, max_size=4), st.binary(max_size=20), st.integers(0)
)
def test_a_frame_decodes_to_what_was_encoded(kind, number, layout, body, seed) -> None:
    tensors = [tensor(seed % 2**64 + i, dtype, shape) for i, (dtype, shape) in enumerate(layout)]
    data = encode(kind, number, tensors, body)
    frame = decode(data)
    assert (frame.kind, frame.number, frame.body) == (kind, number, body)
    assert [(t.dtype, t.shape) for t in frame.tensors] == [(t.dtype, t.shape) for t in tensors]
    assert all(torch.equal(one, other) for one, other in zip(frame.tensors, tensors, strict=True))
    head = len(wire.head_bytes(kind, number, wire.items_of(tensors), body))
    assert len(data) - head == sum(map(wire_bytes, tensors)) == sum(item.nbytes for item in wire.items_of(tensors))


def test_tensors_that_are_views_travel_by_value() -> None:
    square = tensor(0, torch.int64, (6, 6))
    views = [square.T, square[::2, 1:4], square[0, 0], (square > 0).T]
    assert all(map(torch.equal, decode(encode(Kind.OPEN, 0, views)).tensors, views))


def test_payload_is_little_endian_words_and_packed_bits() -> None:
    words, bits = torch.tensor([1, -2]), torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    data = encode(Kind.OPEN, 0, [words, bits])
    assert data[-18:] == struct.pack("<qq", 1, -2) + bytes([0b00001001, 1])
    assert data[:6] == b"tact\x01\x06"


def test_sent_integers_are_not_copied() -> None:
    words = torch.zeros(1000, dtype=torch.int64)
    (view,) = wire.payload_of([words])
    words[0] = 7
    assert view[0] == 7


GOOD = encode(Kind.OPEN, 3, [torch.arange(5), torch.ones(3, dtype=torch.bool)], b"body")


def changed(position: int, value: bytes) -> bytes:
    return GOOD[:position] + value + GOOD[position + len(value) :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "starts with"),
        (GOOD[:10], "starts with"),
        (changed(0, b"nope"), "magic"),
        (changed(4, b"\x02"), "version 2"),
        (changed(5, b"\x00"), "unknown kind 0"),
        (changed(5, b"\x63"), "unknown kind 99"),
        (GOOD + b"\x00", "came in"),
        (GOOD[:-1], "came in"),
        (changed(6, struct.pack("<I", 2**31)), "announces"),
        (changed(10, struct.pack("<Q", 2**60)), "announces"),
        (GOOD[:-1] + b"\xff", "unused bits"),
    ],
)
def test_what_is_not_a_frame_is_refused(data: bytes, reason: str) -> None:
    assert decode(GOOD).number == 3
    with pytest.raises(CodecError, match=reason):
        decode(data)


def with_header(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("<4sBBIQ", b"tact", 1, 6, len(header), len(payload)) + header + payload


@pytest.mark.parametrize(
    ("header", "payload", "reason"),
    [
        (b"\x93\x00\x90\xc4\x00", b"", None),
        (b"\x93\x00\x90\xc4\x00", b"\x00", "in 1"),
        (b"\x94\x00\x90\xc4\x00\x00", b"", "does not parse"),
        (b"\x92\x00\x90", b"", "does not parse"),
        (b"\x93\xff\x90\xc4\x00", b"", "does not parse"),
        (b"\x93\x00\x90\xc4\x00\x00", b"", "does not parse"),
        (b"\x93\xcc\x00\x90\xc4\x00", b"", "canonical"),
        (b"\x93\x00\x91\x92\xa2f4\x90\xc4\x00", b"\x00" * 4, "unknown dtype"),
        (b"\x93\x00\x91\x92\xa2i8\x91\xff\xc4\x00", b"", "does not parse"),
        (b"\x93\x00\x91\x92\xa2i8\x91\x02\xc4\x00", b"\x00" * 8, "16 bytes in 8"),
        (b"\x93\x00\x91\x92\xa2i8\x93\x00" + b"\xce\xff\xff\xff\xff" * 2 + b"\xc4\x00", b"", "too large"),
    ],
)
def test_headers_have_one_encoding(header: bytes, payload: bytes, reason: str | None) -> None:
    data = with_header(header, payload)
    if reason is None:
        assert decode(data).tensors == ()
        return
    with pytest.raises(CodecError, match=reason):
        decode(data)


@given(st.data())
def test_no_changed_byte_of_the_head_goes_unnoticed(data: st.DataObject) -> None:
    head = len(wire.head_bytes(Kind.OPEN, 3, [Item(torch.int64, (5,)), Item(torch.bool, (3,))], b"body"))
    position = data.draw(st.integers(0, head - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != GOOD[position]))
    try:
        frame = decode(changed(position, bytes([value])))
    except CodecError:
        return
    # What still decodes says something else, and says it in its one encoding.
    assert encode(frame.kind, frame.number, frame.tensors, frame.body) == changed(position, bytes([value]))


@given(st.binary(max_size=80))
def test_arbitrary_bytes_raise_nothing_but_a_codec_error(data: bytes) -> None:
    for candidate in (data, with_header(data), GOOD[:18] + data):
        with contextlib.suppress(CodecError):
            decode(candidate)


def test_payload_limit() -> None:
    assert decode(GOOD, limit=41).number == 3
    with pytest.raises(CodecError, match="over"):
        decode(GOOD, limit=40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_reals_do_not_travel(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="only integers and bits"):
        encode(Kind.OPEN, 0, [torch.zeros(2, dtype=dtype)])


def test_frames_do_not_print_what_they_carry() -> None:
    assert repr(decode(GOOD)) == "Frame(OPEN, number 3, 2 tensors)"
