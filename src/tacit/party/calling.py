"""Opening a session from an asyncio process, with one party or with several at once."""

from __future__ import annotations

import asyncio
import ssl
import time

from tacit.errors import PeerError
from tacit.identity import Identity
from tacit.party import dialing, tls
from tacit.party.channel import BUFFERED_BYTES, Channel
from tacit.party.cluster_file import ClusterFile
from tacit.party.session import Caller, Session
from tacit.party.session_messages import Purpose
from tacit.party.streams import tune
from tacit.wire import Kind


async def call(
    cluster: ClusterFile, name: str, identity: Identity, purpose: Purpose, parties: tuple[str, ...]
) -> tuple[dict[str, Channel], Session]:
    """Call parties and open one session with all of them.

    Args:
        cluster: where they are, and their keys.
        name: this side's name.
        identity: its identity.
        purpose: what for.
        parties: who, in the order alice, bob, provider.

    Raises:
        PeerError: one of them is not there, has another key, or refuses.
    """
    caller, channels = Caller(name, identity.public, purpose, parties), dict[str, Channel]()
    try:
        async with asyncio.timeout(dialing.HANDSHAKE_S):
            dialed = await asyncio.gather(
                *(_dial(cluster, party, identity) for party in parties), return_exceptions=True
            )
            channels = {one.peer: one for one in dialed if isinstance(one, Channel)}
            for failure in dialed:
                if isinstance(failure, BaseException):
                    raise failure
            for party, channel in channels.items():
                caller.welcomed(party, await said(channel))
            greeting = caller.greeting()
            for channel in channels.values():
                channel.send(Kind.HELLO, body=greeting)
            now = time.monotonic()
            *_, session = [caller.accepted(party, await said(channel), now) for party, channel in channels.items()]
            return channels, session
    except BaseException as error:
        for channel in channels.values():
            channel.abort()
        if isinstance(error, TimeoutError):
            who = " and ".join(parties)
            raise PeerError(f"{who} did not open a session within {dialing.HANDSHAKE_S:g} seconds") from None
        raise


async def said(channel: Channel) -> bytes:
    """The next message of those that open a session.

    Raises:
        PeerError: the other side is gone, or `CodecError`: it sent something else.
    """
    frame = await channel.receive(Kind.HELLO, limit=0, header_limit=dialing.MAX_HEADER_BYTES)
    return frame.body


async def _dial(cluster: ClusterFile, party: str, identity: Identity) -> Channel:
    member = cluster.party(party)
    address, where = member.reached_at, f"{party} at {member.address}"
    try:
        reader, writer = await asyncio.open_connection(
            address.host, address.port, ssl=tls.client_context(identity, member.public), server_hostname="",
            limit=BUFFERED_BYTES,
        )  # fmt: skip
    except ssl.SSLError as error:
        raise tls.refusal(error, where, identity) from None
    except OSError as error:
        raise PeerError(f"{where} cannot be reached: {error.strerror or 'no answer'}") from None
    tune(writer.get_extra_info("socket"))
    try:
        tls.authenticated(writer.get_extra_info("ssl_object"), {party: member.public})
    except PeerError:
        writer.transport.abort()
        raise
    return Channel(reader, writer, party)
