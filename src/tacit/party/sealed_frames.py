"""A frame on a party's own disk: tensors and a body, encrypted, bound to what they are, whole or not there.

A file is 16 random bytes and the frame (`tacit.wire`) in sealed pieces (`tacit.party.sealing.seal_pieces`) under a key
that is derived with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from tacit import atomic
from tacit.errors import CodecError, DataError
from tacit.party.sealing import SALT_BYTES, Pieces, fresh_salt, seal_pieces, subkey
from tacit.wire import PREFIX_BYTES, Kind, Landing, head_bytes, items_of, parse_header, parse_prefix, payload_of

_PURPOSE = "frame"


def write(path: Path, key: bytes, context: bytes, tensors: Sequence[Tensor], body: bytes = b"") -> int:
    """Write a frame; when this returns, it is on the disk.

    Args:
        path: of the file; its folder exists.
        key: the party's, 32 bytes.
        context: what the frame is; it opens as nothing else.
        tensors: the frame's.
        body: the frame's.

    Returns:
        The bytes of the file.

    Raises:
        StorageFull: the disk is full; nothing is left behind.
        DataError: the disk failed.
    """
    salt, nbytes = fresh_salt(), 0

    def pieces() -> Iterator[bytes]:
        nonlocal nbytes
        frame: list[bytes | memoryview] = [head_bytes(Kind.CALL, 0, items_of(tensors), body), *payload_of(tensors)]
        for piece in itertools.chain([salt], seal_pieces(frame, subkey(key, salt, _PURPOSE), context)):
            nbytes += len(piece)
            yield piece

    atomic.write(path, pieces())
    return nbytes


def read(path: Path, key: bytes, context: bytes) -> tuple[bytes, tuple[Tensor, ...]]:
    """The body and the tensors of a frame that `write` wrote.

    Raises:
        DataError: the file is missing or damaged, was sealed under another key, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            pieces = Pieces(file, subkey(key, file.read(SALT_BYTES), _PURPOSE), context)
            prefix = parse_prefix(pieces.read(PREFIX_BYTES))
            head = parse_header(prefix, pieces.read(prefix.header_bytes))
            landing = Landing(head.items)
            for view in landing.views:
                pieces.read_into(view)
            pieces.end()
        return head.body, landing.tensors()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (CodecError, DataError) as error:
        raise DataError(f"{path} cannot be used: {error}") from error
