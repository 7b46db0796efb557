"""TLS 1.3 between identities: both sides show their key, both compare it with the one that they pinned, no authority.

A connection authenticates in two independent steps.

1. *OpenSSL's.* Each side presents a certificate that its identity signed. The trust store of the verifier holds an
   anchor for each pinned key: a certificate that the verifier made up, of which OpenSSL uses the name and the key and
   never checks the signature (RFC 5280, section 6.1.1 (d): an anchor is a name and a key). So a chain ends in a pinned
   key, or the handshake fails. TLS itself has the other side prove that it holds the key of its certificate.
2. *Ours*, on the finished handshake (`authenticated`): version, and the certificate's own key against the pins. Which
   of the pinned names the other side has follows from this key alone; names within certificates mean nothing.

Certificates are valid from 1970 to 9999 (RFC 5280, section 4.1.2.5, for "no well-defined expiration"): a key is trusted
as long as it is pinned, and a clock that jumps must not lock the parties out of each other. Sessions are not resumed:
each connection authenticates anew.
"""

from __future__ import annotations

import secrets
import ssl
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.x509.oid import NameOID

from tacit.errors import PeerError
from tacit.identity import Identity, key_text

_FROM, _UNTIL = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


def server_context(identity: Identity, pins: Mapping[str, bytes]) -> ssl.SSLContext:
    """What the side that is called needs for connections from any of the pinned.

    `authenticated` must be called on each connection before anything is read from it.

    Args:
        identity: this side's.
        pins: the public keys that may connect, by name.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, identity, pins)
    context.num_tickets = 0
    return context


def client_context(identity: Identity, pin: bytes) -> ssl.SSLContext:
    """What the side that calls needs for a connection to the holder of one key.

    `authenticated` must be called on each connection before anything is sent or read on it.

    Args:
        identity: this side's.
        pin: the public key that the other side must have.
    """
    return _context(ssl.PROTOCOL_TLS_CLIENT, identity, {"": pin})


def authenticated(connection: ssl.SSLObject | ssl.SSLSocket, pins: Mapping[str, bytes]) -> str:
    """Who is at the other end of a connection whose handshake is done.

    Args:
        connection: of a context of this module; asyncio has it as ``get_extra_info("ssl_object")``.
        pins: the public keys to accept, by name.

    Returns:
        The name whose key the other side proved to hold; of several with the same key, the first.

    Raises:
        PeerError: it holds none of them.
    """
    shown = _key_of(connection)
    for name, public in pins.items():
        if secrets.compare_digest(shown, public):
            return name
    raise PeerError(
        f"the other side has the key {key_text(shown)}, which is not pinned for {' or '.join(pins) or 'anybody'}"
    )


def refusal(
    error: ssl.SSLError, peer: str, identity: Identity | None = None, pins: Mapping[str, bytes] = MappingProxyType({})
) -> PeerError:
    """What an error of OpenSSL's means, for whoever runs this side.

    Args:
        error: it.
        peer: what to call the other side.
        identity: this side's, which the other side may have refused.
        pins: what was expected of the other side.
    """
    reason = str(error.reason)
    own = f" {key_text(identity.public)}" if identity else ""
    if isinstance(error, ssl.SSLCertVerificationError):
        expected = f"the key {key_text(*pins.values())}" if len(pins) == 1 else "any key"
        return PeerError(f"{peer} does not hold {expected} that is pinned here: compare its cluster.toml with this one")
    if "RETURN_A_CERTIFICATE" in reason:
        return PeerError(f"{peer} showed no key")
    if "ALERT" in reason and any(word in reason for word in ("UNKNOWN_CA", "CERTIFICATE", "ACCESS_DENIED")):
        return PeerError(f"{peer} refused this side's key{own}: is it in {peer}'s cluster.toml?")
    if isinstance(error, (ssl.SSLZeroReturnError, ssl.SSLEOFError)):
        return PeerError(f"{peer} closed the connection: its process has ended or failed")
    if "MAC" in reason or "DECRYPT" in reason:
        return PeerError(f"what came from {peer}, or went to it, was changed on the way: the connection was closed")
    return PeerError(f"{peer} does not speak TLS 1.3 as it should ({reason.lower().replace('_', ' ')})")


def _key_of(connection: ssl.SSLObject | ssl.SSLSocket) -> bytes:
    encoded = connection.getpeercert(binary_form=True)
    if connection.version() != "TLSv1.3" or encoded is None:
        raise PeerError("the other side did not authenticate itself by TLS 1.3")
    key = x509.load_der_x509_certificate(encoded).public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise PeerError("the other side's certificate holds a key of another kind than Ed25519")
    return key.public_bytes_raw()


def _context(protocol: int, identity: Identity, pins: Mapping[str, bytes]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a name proves nothing here, the key does
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags = ssl.VERIFY_X509_TRUSTED_FIRST
    context.options |= ssl.OP_NO_TICKET
    context.load_verify_locations(cadata=b"".join(_anchor(public) for public in set(pins.values())))
    content, password = _presented(identity)
    # Python hands OpenSSL a key by way of a file only; what is in this one cannot be read without the password.
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        context.load_cert_chain(file.name, password=password)
    return context


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    subject: str, issuer: str, public: Ed25519PublicKey, signer: Ed25519PrivateKey, authority: bool
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(_named(subject))
        .issuer_name(_named(issuer))
        .public_key(public)
        .serial_number(1)
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
    )
    return builder.sign(signer, None)


def _anchor(public: bytes) -> bytes:
    """A trust anchor with a pinned key; the signature is anybody's, and never checked."""
    name, key = key_text(public), Ed25519PublicKey.from_public_bytes(public)
    anchor = _certificate(name, name, key, Ed25519PrivateKey.generate(), authority=True)
    return anchor.public_bytes(Encoding.DER)


def _presented(identity: Identity) -> tuple[bytes, bytes]:
    """The identity's certificate and key, as PEM encrypted under a password of its own."""
    key = identity.private_key
    # Subject and issuer differ: OpenSSL does not look for an anchor of a certificate that names itself as its issuer.
    certificate = _certificate("tacit", key_text(identity.public), key.public_key(), key, authority=False)
    password = secrets.token_hex(32).encode()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
    return certificate.public_bytes(Encoding.PEM) + pem, password
