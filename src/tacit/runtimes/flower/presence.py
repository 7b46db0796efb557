"""Which sites are there: whose identity answers at which of Flower's nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tacit.errors import PeerError
from tacit.identity import Identity, key_text
from tacit.ring.prg import Prg
from tacit.runtimes.flower.client_app import HELLO
from tacit.runtimes.flower.courier import Courier, Question, Unanswered
from tacit.runtimes.flower.messages import (
    ANYBODY,
    NONCE_BYTES,
    PROTOCOL,
    Hello,
    Here,
    Refusal,
    frame_digest,
    seal,
    unseal,
)

HELLO_SECONDS = 60.0
"""How long a node that has connected may take to say who it is."""
LOOK_EVERY = 0.25


@dataclass
class Presence:
    """Who answers where.

    A node is asked who it is when it connects, and again when it has missed a question: until it answers, its site is
    not there. What it says is signed by the site's identity, so nobody can take a site's place.

    Args:
        courier: reaches the nodes.
        coordinator: asks.
        sites: the identities that may take part; a site's place is its index.
        tell: told in words who comes and goes.
    """

    courier: Courier
    coordinator: Identity
    sites: Sequence[bytes]
    tell: Callable[[str], None] = field(repr=False)
    _nodes: dict[int, int] = field(default_factory=dict, init=False)
    _asked: dict[str, tuple[int, bytes]] = field(default_factory=dict, init=False)
    _known: set[int] = field(default_factory=set, init=False)

    @property
    def here(self) -> dict[int, int]:
        """The node of each site that is there, by the site's index."""
        return dict(sorted(self._nodes.items()))

    def look(self) -> dict[int, int]:
        """See who has come and gone since the last look; does not wait.

        Returns:
            What `here` is now.
        """
        connected = self.courier.nodes()
        self._known &= connected
        for site, node in list(self._nodes.items()):
            if node not in connected:
                del self._nodes[site]
                self.tell(f"{self._name(site)} is gone")
        self._ask(connected - self._known)
        for number, answer in self.courier.fetch(self._asked).items():
            node, digest = self._asked.pop(number)
            if isinstance(answer, Unanswered):
                self._known.discard(node)
            else:
                self._hear(node, answer, digest)
        return self.here

    def await_some(self, wanted: int, seconds: float) -> dict[int, int]:
        """Look until ``wanted`` sites are there, or for so many seconds.

        Returns:
            What `here` is then.
        """
        end = self.courier.clock() + seconds
        while len(self.look()) < wanted and self.courier.clock() < end:
            self.courier.sleep(LOOK_EVERY)
        return self.here

    def missed(self, site: int) -> None:
        """A site that was there did not answer a question: it is not there until it says that it is."""
        node = self._nodes.pop(site, None)
        if node is not None:
            self._known.discard(node)

    def _ask(self, nodes: frozenset[int]) -> None:
        """Ask nodes who they are; the question is to anybody, for who they are is what the answer says."""
        frame = seal(self.coordinator, ANYBODY, Hello(PROTOCOL, Prg.fresh().bytes(NONCE_BYTES)))
        posted = self.courier.send(dict.fromkeys(nodes, Question(HELLO, frame)), HELLO_SECONDS)
        self._asked |= {number: (node, frame_digest(frame)) for number, node in posted.items()}
        self._known |= set(posted.values())

    def _hear(self, node: int, frame: bytes, digest: bytes) -> None:
        try:
            opened = unseal(frame, frozenset({self.coordinator.public}), frozenset(self.sites), digest)
            said = opened.reply()
        except PeerError as error:
            self.tell(f"node {node} cannot take part: {error}")
            return
        site = self.sites.index(opened.letter.writer)
        if not isinstance(said, Here):
            reason = said.reason if isinstance(said, Refusal) else "it answers something else"
            self.tell(f"{self._name(site)} does not take part: {reason}")
        elif said.protocol != PROTOCOL:
            self.tell(
                f"{self._name(site)} runs tacit {said.version}, which speaks version {said.protocol} of what sites and "
                f"coordinators say; this coordinator speaks version {PROTOCOL}: update the older of the two"
            )
        else:
            self._nodes[site] = node
            waiting = f", but would not take part now: {'; '.join(said.waiting)}" if said.waiting else ""
            self.tell(f"{self._name(site)} is there, with tacit {said.version}{waiting}")

    def _name(self, site: int) -> str:
        return f"site {site} ({key_text(self.sites[site])})"
