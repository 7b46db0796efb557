"""Links between identities, over the network: who calls, who answers, and with whom."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping

from tacit.errors import InputError, PeerError
from tacit.identity import Identity
from tacit.party import tls
from tacit.party.address import Address
from tacit.party.streams import Encrypted
from tacit.party.transport import PATIENCE_S, Link

HANDSHAKE_S = 10.0
"""How long the other side may take to connect and to authenticate itself."""
_BACKLOG = 128


def listen(address: Address) -> socket.socket:
    """A socket that listens at an address of this machine.

    Raises:
        InputError: nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise InputError(f"nothing can listen at {address}: {error.strerror}") from error


def dial(
    address: Address, identity: Identity, peer: str, pin: bytes, *, route: str = "", patience: float | None = PATIENCE_S
) -> Link:
    """Call the holder of a key.

    Args:
        address: where it listens.
        identity: this side's.
        peer: its name.
        pin: the public key that it must have.
        route: what it may read of the first message before it answers, unencrypted; see `tacit.party.tls.route_of`.
        patience: see `Link`.

    Raises:
        PeerError: nobody listens there, or somebody with another key.
    """
    where = f"{peer} at {address}"
    try:
        sock = socket.create_connection((address.host, address.port), timeout=HANDSHAKE_S)
    except OSError as error:
        raise PeerError(f"{where} cannot be reached: {error.strerror or 'no answer'}") from None
    stream = Encrypted(sock, tls.client_context(identity, pin), server_side=False, route=route)
    return _authenticated(stream, identity, {peer: pin}, where, patience)


def answer(
    sock: socket.socket, context: ssl.SSLContext, identity: Identity, pins: Mapping[str, bytes],
    patience: float | None = PATIENCE_S,
) -> Link:  # fmt: skip
    """Be called: authenticate whoever connected.

    Args:
        sock: an accepted connection; closed if the caller is nobody who is pinned.
        context: from `tacit.party.tls.server_context`, for the same identity and pins.
        identity: this side's.
        pins: the public keys that may call, by name.
        patience: see `Link`.

    Returns:
        A link whose `Link.peer` is the caller's name.

    Raises:
        PeerError: the caller holds none of the keys.
    """
    return _authenticated(Encrypted(sock, context, server_side=True), identity, pins, _caller(sock), patience)


def _authenticated(
    stream: Encrypted, identity: Identity, pins: Mapping[str, bytes], who: str, patience: float | None
) -> Link:
    try:
        stream.handshake(HANDSHAKE_S)
        return Link(stream, tls.authenticated(stream.tls, pins), patience)
    except ssl.SSLError as error:
        stream.close()
        raise tls.refusal(error, who, identity, pins) from None
    except TimeoutError:
        stream.close()
        raise PeerError(f"{who} has not authenticated itself within {HANDSHAKE_S:g} seconds") from None
    except OSError:
        stream.close()
        raise PeerError(f"{who} closed the connection before it authenticated itself") from None
    except BaseException:
        stream.close()
        raise


def _caller(sock: socket.socket) -> str:
    try:
        host, port = sock.getpeername()[:2]
    except (OSError, ValueError):
        return "a caller"
    return f"a caller from {Address(host, port)}"
