"""Frames: the only bytes that cross between processes.

::

    magic "tact" | version u8 | kind u8 | header length u32 | payload length u64 | header | payload

All integers are little-endian. The *header* is msgpack: the frame's number on its link and direction, then dtype and
shape of each tensor, then a body of opaque bytes. The *payload* is the tensors' elements, one tensor after another
without padding: integers raw, bits eight to a byte, lowest first, with zeros in the last byte's unused bits.

A process that passes tensors on, and computes nothing on them, takes them as numpy arrays (`Frame.arrays`): a call into
torch whose code has not run for some milliseconds takes 50 µs instead of 3, one into numpy a third of that.

A header has one encoding and no other is accepted, so a receiver that knows which tensors must come compares it with
the one it expects and parses nothing. An unknown version, kind or dtype, a size beyond the limit, a number out of
order, and a byte too few or too many raise `CodecError`. Nothing here touches a socket; `tacit.party.transport` does.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor

from tacit.errors import CodecError, InputError

MAGIC = b"tact"
VERSION = 1
MAX_HEADER_BYTES = 1 << 24
MAX_PAYLOAD_BYTES = 1 << 34
T = TypeVar("T")
Array = NDArray[Any]
_PREFIX = struct.Struct("<4sBBIQ")
PREFIX_BYTES = _PREFIX.size


class Kind(IntEnum):
    """What a frame is for."""

    HELLO = 1
    SEED = 2
    CALL = 3
    REPLY = 4
    ERROR = 5
    OPEN = 6
    CORRECTIONS = 7
    SECURE_SUM = 8
    SITE = 9


_DTYPES = {
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "bit": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_ARRAY_DTYPES = {dtype: np.dtype("?" if code == "bit" else code) for code, dtype in _DTYPES.items()}
_OF_ARRAYS = {ours: dtype for dtype, ours in _ARRAY_DTYPES.items()}
_KINDS = {int(kind): kind for kind in Kind}


@dataclass(frozen=True)
class Item:
    """What is announced of one tensor.

    Args:
        dtype: int8 to int64, uint8 or bool.
        shape: its shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the payload."""
        count = math.prod(self.shape)
        return -(-count // 8) if self.dtype == torch.bool else count * self.dtype.itemsize


@dataclass(frozen=True, repr=False, eq=False)
class Frame:
    """A frame that has arrived.

    Args:
        kind: what it is for.
        number: how many frames its sender sent on this link before.
        body: opaque bytes.
        arrays: its tensors, as numpy arrays.
    """

    kind: Kind
    number: int
    body: bytes
    arrays: tuple[Array, ...]

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors, in the arrays' memory."""
        return tuple(map(torch.from_numpy, self.arrays))

    def __repr__(self) -> str:
        return f"Frame({self.kind.name}, number {self.number}, {len(self.arrays)} tensors)"


@dataclass(frozen=True)
class Prefix:
    """The fixed part: the kind, and how many bytes follow."""

    kind: Kind
    header_bytes: int
    payload_bytes: int


@dataclass(frozen=True, repr=False)
class Head:
    """A parsed header: the frame's number, body, and the tensors to come."""

    number: int
    body: bytes
    items: tuple[Item, ...]


_Size = Annotated[int, Meta(ge=0, le=1 << 40)]


class _Header(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    number: Annotated[int, Meta(ge=0)]
    items: Annotated[list[tuple[str, Annotated[list[_Size], Meta(max_length=16)]]], Meta(max_length=1 << 16)]
    body: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Header)


def items_of(tensors: Iterable[Tensor | Array]) -> tuple[Item, ...]:
    """What a frame announces of these tensors."""
    return tuple(map(_item_of, tensors))


def _item_of(tensor: Tensor | Array) -> Item:
    if isinstance(tensor, Tensor):
        return Item(tensor.dtype, tuple(tensor.shape))
    if tensor.dtype not in _OF_ARRAYS:
        raise InputError(f"an array of dtype {tensor.dtype} does not travel: only integers and bits do")
    return Item(_OF_ARRAYS[tensor.dtype], tensor.shape)


def head_bytes(kind: Kind, number: int, items: Sequence[Item], body: bytes = b"") -> bytes:
    """Prefix and header of a frame.

    Raises:
        InputError: a tensor's dtype does not travel, or the frame is larger than `MAX_HEADER_BYTES` and
            `MAX_PAYLOAD_BYTES` allow.
    """
    for item in items:
        if item.dtype not in _CODES:
            raise InputError(f"a tensor of dtype {item.dtype} does not travel: only integers and bits do")
    header = _encoder.encode(_Header(number, [(_CODES[item.dtype], list(item.shape)) for item in items], body))
    payload = sum(item.nbytes for item in items)
    if len(header) > MAX_HEADER_BYTES or payload > MAX_PAYLOAD_BYTES:
        raise InputError(f"a frame of {len(header)} + {payload} bytes is too large: send it in parts")
    return _PREFIX.pack(MAGIC, VERSION, kind, len(header), payload) + header


def parse_prefix(
    data: bytes | bytearray, limit: int = MAX_PAYLOAD_BYTES, header_limit: int = MAX_HEADER_BYTES
) -> Prefix:
    """Read the first `PREFIX_BYTES` of a frame.

    Args:
        data: those bytes.
        limit: the largest payload to accept.
        header_limit: the largest header to accept.

    Raises:
        CodecError: not a frame of this version, an unknown kind, or too large.
    """
    if len(data) != PREFIX_BYTES:
        raise CodecError(f"a frame starts with {PREFIX_BYTES} bytes, not {len(data)}")
    magic, version, kind, header, payload = _PREFIX.unpack(data)
    if magic != MAGIC:
        raise CodecError("these bytes are not a frame: they do not start with its magic")
    if version != VERSION:
        raise CodecError(f"the frame is of version {version}; this side speaks version {VERSION}")
    if kind not in _KINDS:
        raise CodecError(f"the frame is of unknown kind {kind}")
    if header > header_limit or payload > limit:
        raise CodecError(f"the frame announces {header} + {payload} bytes, over {header_limit} + {limit}")
    return Prefix(_KINDS[kind], header, payload)


def parse_header(prefix: Prefix, data: bytes | bytearray) -> Head:
    """Read the header that follows a prefix.

    Raises:
        CodecError: it does not parse, is not in its one encoding, or its tensors do not fill the payload.
    """
    header = parsed(_decoder, data, f"the header of a {prefix.kind.name} frame")
    for code, _ in header.items:
        if code not in _DTYPES:
            raise CodecError(f"a {prefix.kind.name} frame announces a tensor of unknown dtype")
    items = tuple(Item(_DTYPES[code], tuple(shape)) for code, shape in header.items)
    if len(data) != prefix.header_bytes or _encoder.encode(header) != data:
        raise CodecError(f"the header of a {prefix.kind.name} frame is not in its canonical encoding")
    if any(math.prod(filter(None, item.shape)) > MAX_PAYLOAD_BYTES for item in items):
        raise CodecError(f"a {prefix.kind.name} frame announces a tensor whose shape is too large")
    announced = sum(item.nbytes for item in items)
    if announced != prefix.payload_bytes:
        raise CodecError(f"a {prefix.kind.name} frame announces tensors of {announced} bytes in {prefix.payload_bytes}")
    return Head(header.number, header.body, items)


def parsed(decoder: msgspec.msgpack.Decoder[T], data: bytes | bytearray, what: str) -> T:
    """Decode msgpack from elsewhere.

    Args:
        decoder: says what to expect.
        data: the bytes.
        what: how the error calls them.

    Raises:
        CodecError: they do not parse.
    """
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise CodecError(f"{what} does not parse") from None


def payload_of(tensors: Sequence[Tensor | Array]) -> list[memoryview]:
    """The tensors' bytes as they travel; integers are views of the tensors' own memory, bits are packed."""
    _require_little_endian()
    arrays = (tensor.numpy() if isinstance(tensor, Tensor) else tensor for tensor in tensors)
    return [_bytes_of(array) for array in arrays if array.size]


def _bytes_of(array: Array) -> memoryview:
    flat = np.packbits(array, bitorder="little") if array.dtype == np.bool_ else np.ascontiguousarray(array)
    return flat.data.cast("B")


class Landing:
    """Memory for tensors to arrive in: `views` to fill, in order, then `arrays` or `tensors`.

    Args:
        items: what was announced.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        _require_little_endian()
        self._items = tuple(items)
        self._raw = [_blank(item) for item in items]
        self.views = [_bytes_of(raw) for raw in self._raw if raw.size]

    def arrays(self) -> tuple[Array, ...]:
        """What arrived; integers stay where they landed.

        Raises:
            CodecError: unused bits of a last byte are not zero.
        """
        return tuple(map(_unpacked, self._raw, self._items))

    def tensors(self) -> tuple[Tensor, ...]:
        """The same as tensors; see `arrays`."""
        return tuple(map(torch.from_numpy, self.arrays()))


def _blank(item: Item) -> Array:
    if item.dtype == torch.bool:
        return np.empty(item.nbytes, np.uint8)
    return np.empty(item.shape, _ARRAY_DTYPES[item.dtype])


def _unpacked(raw: Array, item: Item) -> Array:
    if item.dtype != torch.bool:
        return raw
    count = math.prod(item.shape)
    if count % 8 and raw[-1] >> count % 8:
        raise CodecError("the unused bits of a packed tensor are not zero")
    return np.unpackbits(raw, count=count, bitorder="little").view(np.bool_).reshape(item.shape)


def encode(kind: Kind, number: int, tensors: Sequence[Tensor | Array] = (), body: bytes = b"") -> bytes:
    """A whole frame in one piece; see `head_bytes` for what it refuses."""
    return b"".join((head_bytes(kind, number, items_of(tensors), body), *payload_of(tensors)))


def decode(data: bytes, limit: int = MAX_PAYLOAD_BYTES) -> Frame:
    """Read one frame that fills ``data``.

    Raises:
        CodecError: it is not exactly one well-formed frame.
    """
    prefix = parse_prefix(data[:PREFIX_BYTES], limit)
    start = PREFIX_BYTES + prefix.header_bytes
    if len(data) != start + prefix.payload_bytes:
        raise CodecError(f"a frame of {start + prefix.payload_bytes} bytes came in {len(data)}")
    head = parse_header(prefix, data[PREFIX_BYTES:start])
    landing = Landing(head.items)
    for view in landing.views:
        view[:] = data[start : start + len(view)]
        start += len(view)
    return Frame(prefix.kind, head.number, head.body, landing.arrays())


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise InputError("tensors travel as they lie in memory, little-endian: this machine is big-endian")
