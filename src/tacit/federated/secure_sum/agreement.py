"""What two clients agree on: keys, the seed of the mask they share, and sealed shares.

Every derived key is bound to the round's transcript, to its purpose and to the two clients in order, so no key serves
twice; that is why a sealing key may be used with a nonce of zeros.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tacit import identity
from tacit.errors import InputError, PeerError
from tacit.identity import KEY_BYTES, Identity
from tacit.ring.prg import SEED_BYTES, Prg

DIGEST_BYTES = 32
SHARES_BYTES = 64
SEALED_BYTES = SHARES_BYTES + 16
_NAME = b"tacit/v1/masked-sum/"
_SIGNED = "masked-sum/signed"


def digest(purpose: bytes, *parts: bytes | memoryview) -> bytes:
    """SHA-256 of parts of known lengths, for one purpose."""
    hasher = hashlib.sha256(_NAME + purpose + b"\0")
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def sign(signer: Identity, context: bytes, content: bytes) -> bytes:
    """A signature of a message of the round whose context is given."""
    return signer.sign(_SIGNED, context + content)


def verify(public: bytes, context: bytes, content: bytes, signature: bytes) -> bool:
    """Whether the owner of ``public`` signed a message of the round."""
    return identity.verify(public, _SIGNED, context + content, signature)


Verify = Callable[[bytes, bytes, bytes, bytes], bool]
"""What `verify` does."""


def verifying_once() -> Verify:
    """A `verify` that remembers what it found: simulated clients, in one process, all check the same signatures."""
    return lru_cache(maxsize=None)(verify)


class KeyPair:
    """An ephemeral X25519 key pair of one client and one round.

    Args:
        prg: where the private key comes from.
    """

    def __init__(self, prg: Prg) -> None:
        scalar = bytearray(prg.bytes(KEY_BYTES))
        # Clamped as X25519 would (RFC 7748, section 5), so that the number that is shared is below 2^255.
        scalar[0] &= 248
        scalar[31] = (scalar[31] & 127) | 64
        self._number = int.from_bytes(scalar, "little")
        self._key = X25519PrivateKey.from_private_bytes(bytes(scalar))
        self._agreed: dict[bytes, bytes] = {}
        self.public = self._key.public_key().public_bytes_raw()

    @classmethod
    def of_number(cls, number: int) -> KeyPair:
        """The pair of a private key that was shared and reconstructed.

        Raises:
            PeerError: the number is not that of a private key.
        """
        pair = cls.__new__(cls)
        try:
            pair._key = X25519PrivateKey.from_private_bytes(number.to_bytes(KEY_BYTES, "little"))
        except (OverflowError, ValueError):
            raise PeerError(
                "shares of a masking key reconstruct to something else: a holder sent a wrong one"
            ) from None
        pair._number, pair._agreed = number, {}
        pair.public = pair._key.public_key().public_bytes_raw()
        return pair

    @property
    def number(self) -> int:
        """The private key as a field element: secret."""
        return self._number

    def agree(self, other: bytes, size: int, transcript: bytes, purpose: bytes, first: int, second: int) -> bytes:
        """A key that the owners of both pairs, and nobody else, can compute (X25519, HKDF-SHA256).

        Args:
            other: the other's public key.
            size: bytes of the key.
            transcript: of the round.
            purpose: what the key is for.
            first, second: the two clients, in the order that both agree on.

        Raises:
            PeerError: the other's key is one with which there is no secret.
        """
        try:
            # Two clients that hold each other's shares seal in both directions under keys from one secret.
            secret = self._agreed.get(other) or self._key.exchange(X25519PublicKey.from_public_bytes(other))
        except ValueError:
            raise PeerError(f"client {first} or {second} advertised a key of low order") from None
        self._agreed[other] = secret
        return _hkdf(secret, size, transcript, purpose + b"\0" + struct.pack("<II", first, second))

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise InputError("a key of one round cannot be copied: it would be used in another")

    def __repr__(self) -> str:
        return "KeyPair(private key hidden)"


def _hkdf(secret: bytes, size: int, transcript: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), size, salt=transcript, info=_NAME + info).derive(secret)


def pair_seed(own: KeyPair, other: bytes, transcript: bytes, one: int, two: int) -> bytes:
    """The seed of the mask that two clients share; the one with the lower number adds it."""
    return own.agree(other, SEED_BYTES, transcript, b"mask", min(one, two), max(one, two))


def self_seed(secret: bytes, transcript: bytes, client: int) -> bytes:
    """The seed of a client's own mask, from the secret it shares among its holders."""
    return _hkdf(secret, SEED_BYTES, transcript, b"self\0" + struct.pack("<I", client))


def commitment(secret: bytes, transcript: bytes, client: int) -> bytes:
    """What lets the server tell the right secret of a client's own mask from a wrong one."""
    return digest(b"commitment", transcript, struct.pack("<I", client), secret)


def seal(
    own: KeyPair, other: bytes, transcript: bytes, sender: int, recipient: int, partner: bool, shares: bytes
) -> bytes:
    """Encrypt a client's two shares to the holder they are for (AES-256-GCM)."""
    key = own.agree(other, 32, transcript, b"seal", sender, recipient)
    return AESGCM(key).encrypt(bytes(12), shares, _bound(transcript, sender, recipient, partner))


def unseal(
    own: KeyPair, other: bytes, transcript: bytes, sender: int, recipient: int, partner: bool, sealed: bytes
) -> bytes:
    """Decrypt what `seal` made.

    Raises:
        PeerError: somebody changed it, or it belongs to other clients or another round.
    """
    key = own.agree(other, 32, transcript, b"seal", sender, recipient)
    try:
        return AESGCM(key).decrypt(bytes(12), sealed, _bound(transcript, sender, recipient, partner))
    except InvalidTag:
        raise PeerError(f"the shares that client {sender} sealed for client {recipient} do not open") from None


def _bound(transcript: bytes, sender: int, recipient: int, partner: bool) -> bytes:
    return transcript + struct.pack("<IIB", sender, recipient, partner)
