"""Who somebody is: a long-term Ed25519 key, which others pin, and the file that keeps it.

A party, the provider, an owner, a client of either kind has one identity. It signs messages (`Identity.sign`), it is
what the other end of a TLS connection checks (`tacit.party.tls`), and the key that encrypts what lies on its owner's
disk is derived from it (`Identity.storage_key`). Each use is separated from the others by name, so nothing signed or
derived for one can serve in another.

The file is an unencrypted PEM (PKCS #8, RFC 8410) that only its owner can read, as ``openssl genpkey -algorithm
ed25519`` would write it.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from tacit import atomic
from tacit.errors import DataError, InputError
from tacit.ring.prg import Prg

KEY_BYTES = 32
SIGNATURE_BYTES = 64
_NAME = b"tacit/v1/"
_PREFIX = "ed25519:"
_FILE_BYTES = 4096
"""Far more than a key file has."""
_P = 2**255 - 19
_D = -121665 * pow(121666, -1, _P) % _P


class Identity:
    """A long-term key pair; the others pin `public`.

    Args:
        seed: 32 secret bytes; `Identity.fresh` takes them from the operating system.

    Raises:
        InputError: the seed is not 32 bytes long.
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) != KEY_BYTES:
            raise InputError(f"an identity's seed is {KEY_BYTES} bytes, not {len(seed)}")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self._key.public_key().public_bytes_raw()

    @classmethod
    def fresh(cls) -> Identity:
        """A new identity."""
        return cls(Prg.fresh().bytes(KEY_BYTES))

    @classmethod
    def load(cls, path: Path) -> Identity:
        """The identity in a key file.

        Raises:
            InputError: the file cannot be read, or others than its owner can read it.
            DataError: it does not hold an Ed25519 private key.
        """
        return cls(_private_key(_own_file(path), path).private_bytes_raw())

    def save(self, path: Path) -> None:
        """Write a key file that only its owner can read: all of it or nothing, and never over another file.

        Raises:
            InputError: something is there already, or nothing can be written there.
        """
        pem = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            atomic.create(path, pem, 0o600)
        except FileExistsError:
            raise InputError(f"{path} is there already: keys are not overwritten; choose another name") from None
        except OSError as error:
            raise InputError(f"no key can be written to {path}: {error.strerror}") from error

    @property
    def private_key(self) -> Ed25519PrivateKey:
        """The private key, for a library that signs by itself: secret."""
        return self._key

    def sign(self, purpose: str, content: bytes) -> bytes:
        """A signature for ``purpose`` and no other."""
        return self._key.sign(_signed(purpose, content))

    def storage_key(self, purpose: str, size: int = 32) -> bytes:
        """A secret key for what this identity's owner keeps on its own disk (HKDF-SHA256).

        The same identity and purpose give the same key; without the identity it is uniform, also to whoever knows the
        keys of other purposes.

        Args:
            purpose: what is encrypted under it, such as ``"vault"``.
            size: bytes of the key.
        """
        info = _NAME + b"storage/" + purpose.encode()
        return HKDF(SHA256(), size, salt=None, info=info).derive(self._key.private_bytes_raw())

    def __repr__(self) -> str:
        return f"Identity({key_text(self.public)})"


def verify(public: bytes, purpose: str, content: bytes, signature: bytes) -> bool:
    """Whether the owner of ``public`` signed the content for this purpose."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _signed(purpose, content))
    except (InvalidSignature, ValueError):
        return False
    return True


def key_text(public: bytes) -> str:
    """A public key as configuration files and messages show it: ``ed25519:`` and base64."""
    return _PREFIX + base64.b64encode(public).decode()


def parse_key(text: str) -> bytes:
    """The public key that `key_text` wrote.

    Raises:
        InputError: it is none, or one under which anybody can sign.
    """
    try:
        public = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        public = b""
    if key_text(public) != text or len(public) != KEY_BYTES:
        raise InputError(
            f"{text!r} is not a public key: expected {_PREFIX} and 44 characters of base64, as `tacit keys show` prints"
        )
    if not _sound(public):
        raise InputError(
            f"{text} is not the public key of anybody: it is no point of the curve, or one of its eight points under "
            "which signatures can be made without a private key"
        )
    return public


def _sound(public: bytes) -> bool:
    """Whether a public key is a point of edwards25519 whose order is not 1, 2, 4 or 8 (RFC 8032, section 5.1).

    OpenSSL accepts points of low order, the key of 32 zero bytes among them, and with these a signature that is valid
    for any message is easily found. The point doubles to one with y = 0 where d·y⁴ + 2·y² = 1, and has order 8 then.
    """
    y = int.from_bytes(public, "little") & (2**255 - 1)
    square = y * y % _P
    low = y * (square - 1) * (_D * square * square + 2 * square - 1) % _P == 0
    on_curve = pow((square - 1) * (_D * square + 1), (_P - 1) // 2, _P) == 1
    return y < _P and on_curve and not low


def _signed(purpose: str, content: bytes) -> bytes:
    return _NAME + purpose.encode() + b"\0" + content


def _own_file(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            content = stream.read(_FILE_BYTES)
    except OSError as error:
        raise InputError(f"the key file {path} cannot be read: {error.strerror}") from error
    # Elsewhere than on POSIX systems, the bits say nothing.
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise InputError(
            f"the key file {path} can be read or changed by others (mode {stat.S_IMODE(mode):04o}): run `chmod 600 "
            f"{path}`, or make a new key if somebody may have read it"
        )
    return content


def _private_key(content: bytes, path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise DataError(f"{path} does not hold an unencrypted Ed25519 private key in PEM: make one by `tacit keys new`")
    return key
