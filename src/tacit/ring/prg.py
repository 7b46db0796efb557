"""The one source of secret randomness: AES-128 in counter mode under seeds from the operating system.

A `Prg` is an endless stream of uniform bytes that only the holder of its seed can produce. It moves forward and never
back, so nothing drawn from it can be drawn again. `Prg.derive` opens an independent stream for a named purpose
(HKDF-Expand of RFC 5869 over SHA-256, then AES-CTR with a zero nonce: a key is used for one stream only).

Most of a stream is computed by way of AES-GCM, which encrypts in counter mode too and is the mode that OpenSSL has
its widest vector code for (1.7 times as fast as its CTR mode where there is VAES, about as fast elsewhere). Under a
nonce of zeros GCM begins at counter block 2 and its counter has 32 bits: the two blocks before, and those from 64 GiB
on, are computed otherwise. No tag is ever made.

Security: under the assumption that AES is a pseudo-random permutation, 2^64 bytes of one stream are far from
distinguishable; a seed is 128 bits.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from itertools import islice
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
_HEAD = bytes(_BLOCK) + (1).to_bytes(_BLOCK, "big")
"""The counter blocks before those of GCM."""

_GCM_BLOCKS = (1 << 32) - 2
_TOGETHER = 32
"""So many streams are added in one pass: few enough that the state of all ciphers stays in the cache."""

Words = np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]


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
        self._head: bytes | None = None
        self._stream: CipherContext | None = None
        self._left = 0

    @classmethod
    def fresh(cls) -> Prg:
        """A generator whose seed comes from the operating system."""
        return cls(secrets.token_bytes(SEED_BYTES))

    def derive(self, purpose: str, number: int = 0) -> Prg:
        """An independent generator for ``purpose`` and ``number``; the same two give the same generator."""
        info = b"tacit/v1/" + purpose.encode() + b"/" + number.to_bytes(8, "big")
        return Prg(HKDFExpand(SHA256(), SEED_BYTES, info).derive(self._seed))

    def prepared(self) -> Prg:
        """This generator, its ciphers made: what is drawn first takes no longer than what is drawn later."""
        if self._stream is None:
            self._head, self._stream = _head_of(self._seed) if self._head is None else self._head, self._following(None)
        return self

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

    def add_into(self, words: Words, *, subtract: bool = False) -> None:
        """Add the next ``words.nbytes`` bytes of the stream, as little-endian words, to ``words``; see `add_streams`.

        Args:
            words: flat, contiguous, uint8 to uint64; wraps around.
            subtract: take them away instead.
        """
        add_streams(words, [(self, subtract)])

    def _next(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        out = np.empty(count + _BLOCK, np.uint8)
        view = out.data
        for start in range(0, count, len(_CHUNK)):
            size = min(len(_CHUNK), count - start)
            self._update_into(size, view[start : start + size + _BLOCK])
        return out[:count]

    def _update_into(self, size: int, out: memoryview) -> None:
        """The next ``size`` bytes, at most a chunk, to ``out``, which has room for a block more."""
        if self._head is None:
            self._head = _head_of(self._seed)
        start = min(size, len(self._head))
        if start:
            out[:start], self._head = self._head[:start], self._head[start:]
        while start < size:
            if self._stream is None or not self._left:
                self._stream = self._following(self._stream)
            part = min(size - start, self._left)
            self._stream.update_into(_CHUNK if part == len(_CHUNK) else _CHUNK[:part], out[start:])
            start, self._left = start + part, self._left - part

    def _following(self, stream: CipherContext | None) -> CipherContext:
        """The cipher of what comes after the head, or after the blocks of GCM."""
        key = algorithms.AES(self._seed)
        if stream is None:
            self._left = _BLOCK * _GCM_BLOCKS
            return Cipher(key, modes.GCM(bytes(12))).encryptor()
        self._left = 1 << 127
        return Cipher(key, modes.CTR((2 + _GCM_BLOCKS).to_bytes(_BLOCK, "big"))).encryptor()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise InputError("a generator cannot be copied: its stream would be drawn twice; derive another one from it")

    def __repr__(self) -> str:
        return "Prg(seed hidden)"


def _head_of(seed: bytes) -> bytes:
    return Cipher(algorithms.AES(seed), modes.ECB()).encryptor().update(_HEAD)


def add_streams(words: Words, streams: Iterable[tuple[Prg, bool]]) -> None:
    """Add the next ``words.nbytes`` bytes of several streams, as little-endian words, to ``words``.

    The streams are made and added piece by piece, all of them to one piece of ``words`` while it is at hand: they take
    128 KiB beside it, however long it is.

    Args:
        words: flat, contiguous, uint8 to uint64; wraps around.
        streams: each with whether it is to be taken away instead.
    """
    piece = np.empty(len(_CHUNK) + _BLOCK, np.uint8)
    drawn, out = piece[: len(_CHUNK)].view(words.dtype), piece.data
    remaining = iter(streams)
    while batch := list(islice(remaining, _TOGETHER)):
        for start in range(0, len(words), len(drawn)):
            part = words[start : start + len(drawn)]
            stream = drawn[: len(part)]
            for prg, subtract in batch:
                prg._update_into(part.nbytes, out)
                (np.subtract if subtract else np.add)(part, stream, out=part)
