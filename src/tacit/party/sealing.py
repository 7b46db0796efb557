"""Encryption of what a party keeps on its own disk, under a key that only this party can derive.

Everything that is sealed has an AES-256-GCM key of its own, HKDF-SHA256 of the party's storage key under 16 fresh
random bytes that lie beside it, so no key and nonce serve twice. What it is (a ticket's name, a model's) is
authenticated with it: sealed bytes that are moved to another place do not open there.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tacit.errors import DataError, InputError

KEY_BYTES = 32
SALT_BYTES = 16
TAG_BYTES = 16
PIECE_BYTES = 1 << 20
_NONCE = bytes(12)
_CALL_BYTES = 1 << 28
"""OpenSSL counts the bytes of one call in 32 bits."""


def check_key(key: bytes) -> None:
    """Refuse what is no storage key.

    Raises:
        InputError: it is not 32 bytes long.
    """
    if len(key) != KEY_BYTES:
        raise InputError(f"a storage key is {KEY_BYTES} bytes, not {len(key)}: derive it from the party's identity")


def subkey(key: bytes, salt: bytes, purpose: str) -> bytes:
    """A key for one purpose; with a fresh ``salt``, for one thing that is sealed."""
    return HKDF(SHA256(), KEY_BYTES, salt=salt, info=b"tacit/v1/stored/" + purpose.encode()).derive(key)


def fresh_salt() -> bytes:
    """Random bytes that no key was derived with before."""
    return secrets.token_bytes(SALT_BYTES)


class Seal:
    """Encrypts one short secret, and vouches for bytes that lie elsewhere in the clear.

    Args:
        key: used for this alone; see `subkey`.
        context: what the secret is.
    """

    def __init__(self, key: bytes, context: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.GCM(_NONCE)).encryptor()
        self._cipher.authenticate_additional_data(context)

    def cover(self, piece: bytes | memoryview) -> None:
        """Vouch for the next bytes."""
        for part in _parts(piece):
            self._cipher.authenticate_additional_data(part)

    def close(self, secret: bytes) -> bytes:
        """The secret, encrypted, and the tag over all of it."""
        return self._cipher.update(secret) + self._cipher.finalize() + self._cipher.tag


class Unseal:
    """Decrypts what `Seal` made, and checks the bytes it vouches for.

    Args:
        key: as it was given to `Seal`.
        context: likewise.
    """

    def __init__(self, key: bytes, context: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.GCM(_NONCE)).decryptor()
        self._cipher.authenticate_additional_data(context)

    def cover(self, piece: bytes | memoryview) -> None:
        """Check the next bytes."""
        for part in _parts(piece):
            self._cipher.authenticate_additional_data(part)

    def open(self, sealed: bytes) -> bytes:
        """The secret.

        Raises:
            DataError: something was changed, or sealed as something else or under another key.
        """
        try:
            return self._cipher.update(sealed[:-TAG_BYTES]) + self._cipher.finalize_with_tag(sealed[-TAG_BYTES:])
        except (InvalidTag, ValueError):
            raise DataError(
                "it does not open: it was changed, or sealed under another key or for something else"
            ) from None


def seal_pieces(content: Iterable[bytes | memoryview], key: bytes, context: bytes) -> Iterator[bytes]:
    """Encrypt any number of bytes, in pieces that cannot be dropped, reordered or cut off unnoticed.

    Piece i is AES-256-GCM of 2^20 bytes, of the last one fewer, under the nonce u88(i) ‖ u8(last), big-endian; this is
    the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizár, CRYPTO 2015) as age and Tink use it.

    Args:
        content: what to encrypt.
        key: used for this alone; see `subkey`.
        context: what it is; authenticated with every piece.
    """
    cipher, number, waiting = AESGCM(key), 0, bytearray()
    for one in content:
        for part in _parts(one, PIECE_BYTES):
            waiting += part
            while len(waiting) > PIECE_BYTES:
                yield cipher.encrypt(_nonce(number, last=False), bytes(waiting[:PIECE_BYTES]), context)
                del waiting[:PIECE_BYTES]
                number += 1
    yield cipher.encrypt(_nonce(number, last=True), bytes(waiting), context)


class Pieces:
    """Reads what `seal_pieces` wrote.

    Args:
        file: where it lies, to its end.
        key: as it was given to `seal_pieces`.
        context: likewise.
    """

    def __init__(self, file: BinaryIO, key: bytes, context: bytes) -> None:
        self._file, self._cipher, self._context = file, AESGCM(key), context
        self._left = os.fstat(file.fileno()).st_size - file.tell()
        self._number, self._open = 0, memoryview(b"")

    def read_into(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes.

        Raises:
            DataError: there are not as many, or they were changed.
        """
        while view:
            if not self._open:
                self._next()
            count = min(len(view), len(self._open))
            view[:count], view, self._open = self._open[:count], view[count:], self._open[count:]

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes.

        Raises:
            DataError: there are not as many, or they were changed.
        """
        data = bytearray(count)
        self.read_into(memoryview(data))
        return bytes(data)

    def end(self) -> None:
        """Make sure that everything has been read.

        Raises:
            DataError: there is more, or the end is missing.
        """
        if self._open or self._left:
            raise DataError("it is longer than it should be")

    def _next(self) -> None:
        if not self._left:
            raise DataError("it is shorter than it should be")
        sealed = self._file.read(min(self._left, PIECE_BYTES + TAG_BYTES))
        self._left -= len(sealed)
        try:
            opened = self._cipher.decrypt(_nonce(self._number, last=not self._left), sealed, self._context)
        except (InvalidTag, ValueError):
            raise DataError("it does not open: it was cut off or changed, or sealed under another key") from None
        self._open, self._number = memoryview(opened), self._number + 1


def _nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


def _parts(data: bytes | memoryview, size: int = _CALL_BYTES) -> list[memoryview]:
    view = memoryview(data)
    return [view[start : start + size] for start in range(0, len(view), size)]
