"""Links between identities, over the network: who calls, who answers, and with whom."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Mapping

from tacit.errors import InputError, PeerError
from tacit.identity import Identity
from tacit.party import tls
from tacit.party.address import Address
from tacit.party.session import Called, Caller, Session
from tacit.party.session_messages import MAX_BODY_BYTES, refusal
from tacit.party.streams import Encrypted
from tacit.party.transport import PATIENCE_S, Link
from tacit.wire import Kind

HANDSHAKE_S = 10.0
"""How long the other side may take to connect and to authenticate itself."""
MAX_HEADER_BYTES = MAX_BODY_BYTES + 64
"""Of a frame that opens a session: all that somebody can have this side keep in memory before there is one."""
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


def open_session(links: Mapping[str, Link], caller: Caller) -> Session:
    """Open a session with every party that it is with, over links that `dial` gave.

    Raises:
        PeerError: one of them refused, or is gone; the links are closed.
    """
    try:
        for party in caller.legs:
            caller.welcomed(party, _said(links[party]))
        try:
            greeting = caller.greeting()
        except PeerError as error:
            _say(links, refusal(error))
            raise
        _say(links, greeting)
        *_, session = (caller.accepted(party, _said(links[party]), time.monotonic()) for party in caller.legs)
    except BaseException:
        for link in links.values():
            link.close()
        raise
    return session


def accept_session(link: Link, called: Called) -> Session:
    """Have the caller of a link that `answer` gave open a session.

    Raises:
        PeerError: it is refused, or gone; the link is closed.
    """
    try:
        link.send(Kind.HELLO, body=called.welcome())
        try:
            session, accepted = called.greeted(_said(link), time.monotonic())
        except PeerError as error:
            link.send(Kind.HELLO, body=refusal(error))
            raise
        link.send(Kind.HELLO, body=accepted)
    except BaseException:
        link.close()
        raise
    return session


def _say(links: Mapping[str, Link], body: bytes) -> None:
    for link in links.values():
        link.send(Kind.HELLO, body=body)


def _said(link: Link) -> bytes:
    return link.receive(Kind.HELLO, limit=0, header_limit=MAX_HEADER_BYTES).body


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
