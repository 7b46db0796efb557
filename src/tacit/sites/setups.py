"""Secure sums that a site takes part in, from the first frame on; also those that are set up ahead of their time.

A sum is set up ahead when keys and shares are exchanged while the one before it ends. What it will be of is not known
then: the site computes that for itself when it is asked for a vector, as in any other sum. Keys are in memory alone,
serve one sum, and go when another is set up in its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tacit.errors import CodecError, PeerError
from tacit.federated.secure_sum.client import MaskedClient, Policy
from tacit.federated.secure_sum.messages import Invite, Roster, read_server_frame
from tacit.identity import Identity
from tacit.ring.prg import Prg
from tacit.runtimes.flower.messages import Begin
from tacit.sites.memory import SiteMemory


@dataclass
class Setups:
    """The site's sums that have not begun, one a run.

    Args:
        identity: the site's.
        pinned: with whom it sums.
        memory: where it writes down which sums it was invited to.
        most: so many runs are kept; the oldest is given up for a new one.
    """

    identity: Identity
    pinned: frozenset[bytes]
    memory: SiteMemory
    most: int
    _clients: dict[bytes, MaskedClient] = field(default_factory=dict, init=False, repr=False)

    def client(self, begin: Begin, policy: Policy) -> MaskedClient:
        """The client for a sum that begins, whose task is still open: a new one, or the one that was set up.

        Raises:
            CodecError: the question holds a frame that begins no sum.
            PeerError: the site was invited to this sum before, or has nothing set up.
        """
        run, (_, message) = begin.terms.run, read_server_frame(begin.frame)
        if isinstance(message, Invite):
            return self._invited(message, run, begin.round, policy)
        client = self._clients.pop(run, None)
        if client is None:
            raise PeerError("this site has no part in that sum: it was restarted since the sum was set up")
        return client

    def ahead(self, run: bytes, round: int, policy: Policy, frame: bytes) -> bytes:
        """Take a step in setting up the next sum of a run.

        Args:
            run: of `Terms`.
            round: that is going on.
            policy: what the site insists on.
            frame: the server's: an invitation, or the roster.

        Returns:
            The frame to answer with.

        Raises:
            CodecError: it is another frame.
            PeerError: it does not check out, or the site was invited to this sum before.
            InputError: the sum is not one that the site agrees to.
        """
        _, message = read_server_frame(frame)
        if isinstance(message, Invite):
            self._clients.pop(run, None)
            client = self._invited(message, run, round, policy)
        elif isinstance(message, Roster) and run in self._clients:
            client = self._clients.pop(run)
        else:
            raise CodecError(f"a message {type(message).__name__} sets up no sum, or comes before the invitation to it")
        answer = client.receive(frame)
        if answer is None:
            raise CodecError("a frame that sets up a sum has no answer")
        self._clients[run] = client
        while len(self._clients) > self.most:
            self._clients.pop(next(iter(self._clients)))
        return answer

    def _invited(self, invite: Invite, run: bytes, round: int, policy: Policy) -> MaskedClient:
        """A client with new keys, once a sum: whoever repeats an invitation could pass off old keys for new ones."""
        self.memory.take(invite.round, run, round)
        return MaskedClient(self.identity, self.pinned, policy, None, Prg.fresh())
