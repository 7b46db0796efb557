"""The IDX format of the MNIST files: unsigned bytes behind a big-endian header, compressed with gzip."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tacit.data.published import damaged

UNSIGNED_BYTE = 0x08


def parse_idx(compressed: bytes, dimensions: int, path: Path) -> Tensor:
    """The array in the bytes of a gzip-compressed IDX file.

    The header is the magic number ``00 00 08 d``, with 08 for unsigned bytes and d the number of dimensions,
    then d sizes as big-endian uint32; the entries follow in row-major order.

    Args:
        compressed: the whole file.
        dimensions: how many dimensions the array must have.
        path: where the bytes come from, for the error's message.

    Returns:
        uint8 tensor of the shape that the header states.

    Raises:
        DataError: the gzip stream is broken, the magic number is another one, or the header's sizes do not
            account for every byte.
    """
    try:
        content = gzip.decompress(compressed)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise damaged(path, f"is truncated or corrupt gzip ({error})") from None
    header = 4 * (1 + dimensions)
    if len(content) < header:
        raise damaged(path, f"ends within its header of {header} bytes")
    magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
    expected = UNSIGNED_BYTE << 8 | dimensions
    if magic != expected:
        raise damaged(path, f"has the magic number {magic:#010x}, expected {expected:#010x}")
    if len(content) - header != math.prod(shape):
        sizes = " × ".join(map(str, shape))
        raise damaged(path, f"states {sizes} entries but holds {len(content) - header}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy()).view(shape)
