"""The one source of secret randomness: AES-128 in counter mode under seeds from the operating system.

A `Prg` is an endless stream of uniform bytes that only the holder of its seed can produce. It moves forward and never
back, so nothing drawn from it can be drawn again. `Prg.derive` opens an independent stream for a named purpose
(HKDF-Expand of RFC 5869 over SHA-256, then AES-CTR with a zero nonce: a key is used for one stream only).

Security: under the assumption that AES is a pseudo-random permutation, 2^64 bytes of one stream are far from
distinguishable; a seed is 128 bits.
"""

from __future__ import annotations

import math
import secrets
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from torch import Tensor

from tacit.errors import InputError

SEED_BYTES = 16
_BLOCK = 16
_CHUNK = bytes(1 << 17)


class Prg:
    """A stream of uniform bytes determined by a seed.

    Args:
        seed: 16 secret bytes. `Prg.fresh` takes them from the operating system; a fixed seed belongs in tests only.

    Raises:
        InputError: the seed is not 16 bytes long.
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise InputError(f"a seed is {SEED_BYTES} bytes, not {len(seed)}: take one from Prg.fresh().bytes(16)")
        self._seed = bytes(seed)
        self._stream: CipherContext | None = None

    @classmethod
    def fresh(cls) -> Prg:
        """A generator whose seed comes from the operating system."""
        return cls(secrets.token_bytes(SEED_BYTES))

    def derive(self, purpose: str, number: int = 0) -> Prg:
        """An independent generator for ``purpose`` and ``number``; the same two give the same generator."""
        info = b"tacit/v1/" + purpose.encode() + b"/" + number.to_bytes(8, "big")
        return Prg(HKDFExpand(SHA256(), SEED_BYTES, info).derive(self._seed))

    def bytes(self, count: int) -> bytes:
        """The next ``count`` bytes of the stream."""
        return self._next(count).tobytes()

    def array(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """The next ``count`` bytes of the stream as a writable uint8 array."""
        return self._next(count)

    def words(self, shape: tuple[int, ...]) -> Tensor:
        """Uniform elements of Z/2^64 as an int64 tensor of ``shape``."""
        raw = self._next(8 * math.prod(shape))
        return torch.from_numpy(raw.view(np.int64)).reshape(shape)

    def bits(self, shape: tuple[int, ...]) -> Tensor:
        """Uniform bits as a uint8 tensor of zeros and ones of ``shape``."""
        count = math.prod(shape)
        unpacked = np.unpackbits(self._next(-(-count // 8)), count=count)
        return torch.from_numpy(unpacked).reshape(shape)

    def below(self, bound: int) -> int:
        """A uniform integer in [0, ``bound``), by rejection."""
        size = -(-bound.bit_length() // 8)
        excess = 8 * size - bound.bit_length()
        while True:
            candidate = int.from_bytes(self.bytes(size), "big") >> excess
            if candidate < bound:
                return candidate

    def add_into(self, words: np.ndarray[tuple[int], np.dtype[np.unsignedinteger]], *, subtract: bool = False) -> None:
        """Add the next ``words.nbytes`` bytes of the stream, as little-endian words, to ``words``.

        The stream is made and added piece by piece: it takes 128 KiB beside ``words``, however long they are.

        Args:
            words: flat, contiguous, uint8 to uint64; wraps around.
            subtract: take them away instead.
        """
        combine = np.subtract if subtract else np.add
        piece = np.empty(len(_CHUNK) + _BLOCK, np.uint8)
        drawn = piece[: len(_CHUNK)].view(words.dtype)
        for start in range(0, len(words), len(drawn)):
            part = words[start : start + len(drawn)]
            self._update_into(part.nbytes, piece.data)
            combine(part, drawn[: len(part)], out=part)

    def _next(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        out = np.empty(count + _BLOCK, np.uint8)
        view = out.data
        for start in range(0, count, len(_CHUNK)):
            size = min(len(_CHUNK), count - start)
            self._update_into(size, view[start : start + size + _BLOCK])
        return out[:count]

    def _update_into(self, size: int, out: memoryview) -> None:
        if self._stream is None:
            self._stream = Cipher(algorithms.AES(self._seed), modes.CTR(bytes(_BLOCK))).encryptor()
        self._stream.update_into(_CHUNK if size == len(_CHUNK) else _CHUNK[:size], out)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise InputError("a generator cannot be copied: its stream would be drawn twice; derive another one from it")

    def __repr__(self) -> str:
        return "Prg(seed hidden)"
