"""What the owner of a model does at the parties and the provider: push, pull, list, load, unload, delete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tacit.errors import CodecError, InputError
from tacit.identity import Identity, key_text
from tacit.party import dialing, messages
from tacit.party.cluster_file import ALICE, BOB, PARTIES, PROVIDER, ClusterFile
from tacit.party.messages import Delete, Done, Failed, List, Listed, Load, Models, OwnerCall, OwnerReply, Pull, Pulled
from tacit.party.models import ModelPart, pack, unpack
from tacit.party.push import Push, restore
from tacit.party.session import Caller
from tacit.party.session_messages import Purpose
from tacit.party.transport import Link
from tacit.wire import Frame, Kind

PATIENCE_S = 120.0


class Owner:
    """A session of an owner with alice, bob and the provider; a context manager.

    Args:
        cluster: where they are.
        identity: the owner's.

    Raises:
        InputError: the cluster file knows no owner with this key.
        PeerError: one of the three is not there, or refuses.
    """

    def __init__(self, cluster: ClusterFile, identity: Identity) -> None:
        names = [name for name, one in cluster.owners.items() if one.public == identity.public]
        if not names:
            raise InputError(f"cluster.toml has no owner with the key {key_text(identity.public)}")
        self.key, self._links = key_text(identity.public), dict[str, Link]()
        try:
            for party in PARTIES:
                member = cluster.party(party)
                self._links[party] = dialing.dial(
                    member.reached_at, identity, party, member.public, patience=PATIENCE_S
                )
            dialing.open_session(self._links, Caller(names[0], identity.public, Purpose.OWNER, PARTIES))
        except BaseException:
            self.close()
            raise

    def push(self, model: Push) -> str:
        """Send each of the three its part of a model version, the provider's first; the version's digest.

        It is served as soon as alice and bob have it and the provider has dealt for it. If one of the three does not
        take its part, the version is served by nobody, and pushing again repairs it.

        Raises:
            InputError: one of them refused its part; PeerError: one of them failed.
        """
        for party, part in ((PROVIDER, model.provider), (BOB, model.bob), (ALICE, model.alice)):
            body, tensors = pack(part)
            self._done(party, messages.Push(body), tensors)
        return model.digest

    def pull(self, name: str) -> Mapping[str, Tensor]:
        """The newest version of a model of this owner's, put together from alice's and bob's parts.

        Raises:
            InputError: there is no such model, or it is another owner's.
        """
        alice = self._pulled(ALICE, Pull(name))
        return restore(alice, self._pulled(BOB, Pull(name, alice.digest)))

    def list(self) -> dict[str, list[Listed]]:
        """This owner's models at each of the three."""
        found = {}
        for party in PARTIES:
            reply, _ = self._asked(party, List())
            if not isinstance(reply, Models):
                raise CodecError(f"{party} answered something else than a list of models")
            found[party] = reply.models
        return found

    def load(self, name: str, loaded: bool = True) -> None:
        """Have a model served, or served no longer.

        Raises:
            InputError: there is no such model, or it is another owner's.
        """
        self._done(ALICE, Load(name, loaded))

    def delete(self, name: str) -> None:
        """Have all three forget every version of a model, and what was dealt for it.

        Raises:
            InputError: none of them has it, or it is another owner's.
        """
        failures = []
        for party in PARTIES:
            try:
                self._done(party, Delete(name))
            except InputError as error:
                failures.append(error)
        if len(failures) == len(PARTIES):
            raise failures[0]

    def close(self) -> None:
        """End the session."""
        for link in self._links.values():
            link.close()

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pulled(self, party: str, call: Pull) -> ModelPart:
        reply, frame = self._asked(party, call)
        if not isinstance(reply, Pulled):
            raise CodecError(f"{party} answered something else than its part of the model")
        return unpack(reply.part, frame.tensors, party)

    def _done(self, party: str, call: OwnerCall, tensors: Sequence[Tensor] = ()) -> None:
        reply, _ = self._asked(party, call, tensors)
        if not isinstance(reply, Done):
            raise CodecError(f"{party} answered something else than that it is done")

    def _asked(self, party: str, call: OwnerCall, tensors: Sequence[Tensor] = ()) -> tuple[OwnerReply, Frame]:
        link = self._links[party]
        link.send(Kind.CALL, tensors, messages.encode(call))
        frame = link.receive(Kind.REPLY)
        reply = messages.decode(messages.owner_replies, frame.body, party)
        if isinstance(reply, Failed):
            error = reply.refusal.error()
            raise type(error)(f"{party}: {error}")
        return reply, frame
