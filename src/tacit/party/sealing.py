"""Encryption of what a party keeps on its own disk, under a key that only this party can derive.

Everything that is sealed has an AES-256-GCM key of its own, HKDF-SHA256 of the party's storage key under 16 fresh
random bytes that lie beside it, so no key and nonce serve twice. What it is (a ticket's name, a model's) is
authenticated with it: sealed bytes that are moved to another place do not open there.
"""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tacit.errors import DataError, InputError

KEY_BYTES = 32
SALT_BYTES = 16
TAG_BYTES = 16
_NONCE = bytes(12)
_PIECE = 1 << 28
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


def _parts(piece: bytes | memoryview) -> list[memoryview]:
    view = memoryview(piece)
    return [view[start : start + _PIECE] for start in range(0, len(view), _PIECE)]
