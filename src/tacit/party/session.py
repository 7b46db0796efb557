"""Sessions: what two sides agree on once TLS has shown each who the other is, before anything else is said.

::

    party → caller   Welcome    the versions it speaks, its name, a fresh nonce, how long a session lasts
    caller → party   Greeting   version, purpose, the caller's name and nonce, and the Welcome of every party it called
    party → caller   Accepted   the session's id                    (or Refused, and the connection is closed)

A client calls alice and bob, an owner the provider too. It waits for all of their Welcomes and sends all of them the
same Greeting. The session's id is a hash of the Greeting and of the key that the caller proved to hold, so it is the
same at all parties and at the caller, and covers everything that any of them said:

* a Greeting without the nonce that a party has just drawn is refused there, so none can be *replayed*;
* ids are equal at alice and bob only for one caller, one purpose and one pair of connections, so a client's session
  with alice cannot be *crossed* with another's, or another one of its own, at bob: alice calls a batch's requests by
  their sessions' ids, and bob has no such session.

Both sides of a leg walk through `TABLE`; whatever it does not list is out of turn. The frames are of kind ``HELLO``.
Nothing here touches a socket or a clock: `docs/spec/session.md` has every byte.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from tacit.errors import InputError, PeerError
from tacit.party.cluster_file import ALICE, BOB, PROVIDER, ClusterFile
from tacit.party.session_messages import (
    NONCE_BYTES,
    Accepted,
    Greeting,
    Message,
    Purpose,
    Refused,
    Welcome,
    decode,
    encode,
)

VERSIONS = (1,)
"""What this side speaks, ascending."""
LIFETIME_S = 24 * 3600
_NAME = b"tacit/v1/session\0"
M = TypeVar("M", bound=Message)


class State(StrEnum):
    """How far a leg has come."""

    NEW = "new"
    WELCOMED = "welcomed"
    GREETED = "greeted"
    OPEN = "open"
    REFUSED = "refused"


class Event(StrEnum):
    """A message that one side sends and the other receives."""

    WELCOME = "welcome"
    GREETING = "greeting"
    ACCEPTED = "accepted"
    REFUSED = "refused"


TABLE: Mapping[tuple[State, Event], State] = {
    (State.NEW, Event.WELCOME): State.WELCOMED,
    (State.WELCOMED, Event.GREETING): State.GREETED,
    (State.GREETED, Event.ACCEPTED): State.OPEN,
    (State.NEW, Event.REFUSED): State.REFUSED,
    (State.WELCOMED, Event.REFUSED): State.REFUSED,
    (State.GREETED, Event.REFUSED): State.REFUSED,
}
"""Where an event leads, at the side that sends and at the side that receives it."""


def permitted(cluster: ClusterFile, party: str, caller: str) -> frozenset[Purpose]:
    """What the cluster file lets a caller call a party for."""
    found = set()
    if caller in cluster.owners:
        found.add(Purpose.OWNER)
    if party == PROVIDER:
        return frozenset(found | {Purpose.POOL} if caller in (ALICE, BOB) else found)
    if caller in cluster.clients:
        found.add(Purpose.CLIENT)
    if (party, caller) == (ALICE, BOB):
        found |= {Purpose.CONTROL, Purpose.DATA}
    return frozenset(found)


@dataclass(frozen=True)
class Session:
    """An open session, at one of its sides.

    Args:
        id: the same at all sides, and of no other session.
        purpose: what it is for.
        caller: who called.
        version: that it speaks.
        expires: when it ends, on this side's clock.
        parent: see `Greeting`.
        worker: see `Greeting`.
    """

    id: bytes
    purpose: Purpose
    caller: str
    version: int
    expires: float
    parent: bytes = b""
    worker: int = 0

    def require_live(self, now: float) -> None:
        """Refuse what comes after the end.

        Args:
            now: by the clock that began the session; one that never jumps, such as `time.monotonic`.

        Raises:
            PeerError: the session has expired.
        """
        if now >= self.expires:
            raise PeerError(f"the session of {self.caller} has expired: connect again")

    def __repr__(self) -> str:
        return f"Session({self.purpose}, {self.caller}, {self.id.hex()[:8]}…)"


def session_id(caller_key: bytes, greeting: bytes) -> bytes:
    """SHA-256 over the caller's public key and the bytes of the Greeting."""
    return hashlib.sha256(_NAME + caller_key + greeting).digest()


@dataclass
class Leg:
    """One connection's way through `TABLE`."""

    state: State = State.NEW

    def step(self, event: Event) -> None:
        """Send or receive a message.

        Raises:
            PeerError: it is not its turn.
        """
        following = TABLE.get((self.state, event))
        if following is None:
            raise PeerError(f"{event} came out of turn: the session is {self.state}")
        self.state = following

    def received(self, data: bytes, kind: type[M], peer: str) -> M:
        """Parse what came, which must be such a message and in turn.

        Raises:
            PeerError: it is another one, or the other side refused; `CodecError`: it is none.
        """
        message = decode(data)
        self.step(Event(type(message).__name__.lower()))
        if isinstance(message, Refused):
            raise PeerError(f"{peer} refused the session: {message.reason}")
        if not isinstance(message, kind):
            raise PeerError(f"{peer} sent a {type(message).__name__} where a {kind.__name__} is due")
        return message

    def refuse(self) -> None:
        """Go no further."""
        if (self.state, Event.REFUSED) in TABLE:
            self.step(Event.REFUSED)


@dataclass
class Called:
    """A party's side of one connection.

    Args:
        party: this party's name.
        caller: whose key the other side proved to hold.
        caller_key: that key.
        allowed: what it may call for; see `permitted`.
        lifetime_s: how long a session lasts.
        parent: the id of the control session, if this party is a worker.
        nonce: 32 bytes that were never used before.
    """

    party: str
    caller: str
    caller_key: bytes
    allowed: Collection[Purpose]
    lifetime_s: int = LIFETIME_S
    parent: bytes = field(default=b"", repr=False)
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(NONCE_BYTES), repr=False)
    leg: Leg = field(default_factory=Leg)

    def welcome(self) -> bytes:
        """The Welcome, to be sent first."""
        self.leg.step(Event.WELCOME)
        return encode(self._welcome)

    def greeted(self, data: bytes, now: float) -> tuple[Session, bytes]:
        """Take the caller's Greeting.

        Args:
            data: what it sent.
            now: see `Session.require_live`.

        Returns:
            The session, and the Accepted to be sent.

        Raises:
            PeerError: it is refused; send the `refusal` and close the connection.
        """
        try:
            session = self._opened(data, now)
        except PeerError:
            self.leg.refuse()
            raise
        self.leg.step(Event.ACCEPTED)
        return session, encode(Accepted(session.id))

    @property
    def _welcome(self) -> Welcome:
        return Welcome(VERSIONS, self.party, self.nonce, self.lifetime_s)

    def _opened(self, data: bytes, now: float) -> Session:
        greeting = self.leg.received(data, Greeting, self.caller)
        if greeting.caller != self.caller:
            raise PeerError(f"this key is {self.caller}'s, not {greeting.caller}'s")
        if greeting.purpose not in self.allowed:
            raise PeerError(f"{self.party}'s cluster.toml does not let {self.caller} call as {greeting.purpose}")
        if tuple(one.party for one in greeting.welcomes) not in greeting.purpose.parties:
            raise PeerError(f"a session as {greeting.purpose} is not with these parties")
        if self._welcome not in greeting.welcomes:
            raise PeerError("the greeting answers another connection's welcome: it was replayed or crossed")
        if greeting.version != _common(greeting.welcomes):
            raise PeerError(f"the greeting is of version {greeting.version}, not the highest that all have in common")
        if greeting.purpose is not Purpose.DATA and (greeting.parent or greeting.worker):
            raise PeerError(f"a session as {greeting.purpose} has no parent and no worker")
        if not hmac.compare_digest(greeting.parent, self.parent if greeting.purpose is Purpose.DATA else b""):
            raise PeerError(f"{self.caller}'s worker belongs to another control session than {self.party}'s")
        return _session(greeting, self.caller_key, now)


class Caller:
    """The calling side of a session, with all the parties that it is with.

    Args:
        name: this side's name.
        key: its public key.
        purpose: what the session is for.
        parties: who is called, in the order alice, bob, provider.
        parent, worker: see `Greeting`.
        nonce: 32 bytes that were never used before.

    Raises:
        InputError: a session for this purpose is not with these parties.
    """

    def __init__(
        self,
        name: str,
        key: bytes,
        purpose: Purpose,
        parties: tuple[str, ...],
        *,
        parent: bytes = b"",
        worker: int = 0,
        nonce: bytes = b"",
    ) -> None:
        if parties not in purpose.parties:
            raise InputError(f"a session as {purpose} is not with {', '.join(parties)}")
        self.legs = {party: Leg() for party in parties}
        self._name, self._key, self._purpose, self._parent, self._worker = name, key, purpose, parent, worker
        self._nonce = nonce or secrets.token_bytes(NONCE_BYTES)
        self._welcomes: dict[str, Welcome] = {}
        self._greeting: Greeting

    def welcomed(self, party: str, data: bytes) -> None:
        """Take a party's Welcome.

        Raises:
            PeerError: it is none, or another party's.
        """
        welcome = self.legs[party].received(data, Welcome, party)
        if welcome.party != party:
            raise PeerError(f"{party} welcomes under another name")
        self._welcomes[party] = welcome

    def greeting(self) -> bytes:
        """The Greeting, to be sent to every party, once all have welcomed.

        Raises:
            PeerError: a party speaks no version that the others and this side do, or has not welcomed.
        """
        for leg in self.legs.values():
            leg.step(Event.GREETING)
        welcomes = tuple(self._welcomes[party] for party in self.legs)
        self._greeting = Greeting(
            _common(welcomes), self._purpose, self._name, self._nonce, welcomes, self._parent, self._worker
        )
        return encode(self._greeting)

    def accepted(self, party: str, data: bytes, now: float) -> Session:
        """Take a party's Accepted; the session is open with it.

        Args:
            party: whose.
            data: what it sent.
            now: see `Session.require_live`.

        Raises:
            PeerError: it refused, or is at another session.
        """
        accepted = self.legs[party].received(data, Accepted, party)
        session = _session(self._greeting, self._key, now)
        if not hmac.compare_digest(accepted.id, session.id):
            raise PeerError(f"{party} is at another session than this side")
        return session


def _common(welcomes: Collection[Welcome]) -> int:
    common = set(VERSIONS).intersection(*(welcome.versions for welcome in welcomes))
    if not common:
        spoken = "; ".join(f"{one.party} speaks {', '.join(map(str, one.versions))}" for one in welcomes)
        raise PeerError(f"no version in common: {spoken}; this side speaks {', '.join(map(str, VERSIONS))}")
    return max(common)


def _session(greeting: Greeting, key: bytes, now: float) -> Session:
    lifetime = min(welcome.lifetime_s for welcome in greeting.welcomes)
    return Session(
        session_id(key, encode(greeting)), greeting.purpose, greeting.caller, greeting.version, now + lifetime,
        greeting.parent, greeting.worker,
    )  # fmt: skip
