import gzip
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tacit.data.idx import parse_idx
from tacit.errors import DataError

HERE = Path("made-up.gz")


def idx(*shape: int, content: bytes | None = None, magic: int | None = None) -> bytes:
    magic = 0x0800 | len(shape) if magic is None else magic
    content = bytes(range(256))[: math.prod(shape)] if content is None else content
    return gzip.compress(struct.pack(f">{1 + len(shape)}I", magic, *shape) + content)


def test_reads_the_entries_in_row_major_order() -> None:
    array = parse_idx(idx(2, 3, 4), 3, HERE)
    assert array.dtype == torch.uint8
    assert torch.equal(array, torch.arange(24, dtype=torch.uint8).view(2, 3, 4))


def test_reads_an_empty_array() -> None:
    assert parse_idx(idx(0), 1, HERE).shape == (0,)


@pytest.mark.parametrize(
    ("compressed", "complaint"),
    [
        (idx(5, content=bytes(4)), "states 5 entries but holds 4"),
        (idx(5, content=bytes(6)), "states 5 entries but holds 6"),
        (idx(5, magic=0x0803), "magic number 0x00000803, expected 0x00000801"),
        (idx(5, magic=0x0D01), "magic number 0x00000d01"),
        (gzip.compress(b"\0\0\x08\x01\0\0"), "ends within its header of 8 bytes"),
        (gzip.compress(b""), "ends within its header"),
        (idx(5)[:-9], "truncated or corrupt gzip"),
        (idx(5) + b"trailing", "truncated or corrupt gzip"),
        (b"not gzip at all", "truncated or corrupt gzip"),
    ],
)
def test_refuses_in_one_line_that_names_the_file(compressed: bytes, complaint: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_idx(compressed, 1, HERE)
    message = str(caught.value)
    assert message.startswith("made-up.gz ")
    assert complaint in message
    assert "\n" not in message


@given(st.integers(0, 8 * len(idx(7, 5)) - 1))
def test_a_flipped_bit_is_an_error_or_harmless(bit: int) -> None:
    """gzip's checksum protects the content; flips elsewhere (time, operating system) change nothing."""
    damaged = bytearray(idx(7, 5))
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        array = parse_idx(bytes(damaged), 2, HERE)
    except DataError:
        return
    assert torch.equal(array, parse_idx(idx(7, 5), 2, HERE))


@given(st.integers(0, len(idx(7, 5)) - 1))
def test_every_truncation_is_an_error(length: int) -> None:
    with pytest.raises(DataError):
        parse_idx(idx(7, 5)[:length], 2, HERE)
