"""What owners have a party or the provider do: take a model, list, load, hand back and delete."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tacit.errors import CodecError, InputError, NotPermitted, StorageFull, TacitError, one_line
from tacit.party import messages
from tacit.party.jobs.keeping import JobKeeper
from tacit.party.jobs.requests import FetchLosses, ListJobs
from tacit.party.logs import Log
from tacit.party.messages import (
    Delete,
    Done,
    Failed,
    List,
    Listed,
    Load,
    Models,
    OwnerCall,
    OwnerReply,
    Pull,
    Pulled,
    Push,
)
from tacit.party.models import ModelPart, pack, unpack
from tacit.party.refusal import Reason, Refusal
from tacit.party.vault import Entry, Vault, require_owner
from tacit.wire import Frame

MAX_MODEL_BYTES = 1 << 32
Reply = tuple[OwnerReply, Sequence[Tensor]]


@dataclass(frozen=True)
class Keeper:
    """See the module. Threads may share it; what it calls is called in the thread that calls it.

    Args:
        role: whose it is.
        vault: where models lie.
        log: where what happened is written.
        jobs: what is asked about training jobs.
        came: called with a model version that has been kept.
        gone: called with the digest of a model version that is being deleted.
        set_loaded: called with a model's name and whether it is to be served.
        served: gives the digests that are served.
        tickets: gives how many tickets are ready, by digest and batch size.
    """

    role: str
    vault: Vault
    log: Log
    jobs: JobKeeper
    came: Callable[[ModelPart], None] = lambda part: None
    gone: Callable[[str], None] = lambda digest: None
    set_loaded: Callable[[str, bool], None] = lambda name, loaded: None
    served: Callable[[], Collection[str]] = tuple
    tickets: Callable[[], Mapping[tuple[str, int], int]] = dict

    def handle(self, frame: Frame, owner: str, caller: str) -> tuple[bytes, Sequence[Tensor]]:
        """Do what an owner asks; the body and the tensors of the reply.

        Args:
            frame: what came.
            owner: the owner's public key, as text.
            caller: its name, for the log.

        Raises:
            CodecError: it is no such message.
        """
        message = messages.decode(messages.owner_calls, frame.body, caller)
        reply, tensors = self._answered(message, frame, owner)
        if not isinstance(message, List | ListJobs | FetchLosses):
            reason = {"reason": reply.refusal.text} if isinstance(reply, Failed) else {}
            named = getattr(message, "name", None)
            self.log(f"owner_{type(message).__name__.lower()}", owner=caller, model=named, **reason)
        return messages.encode(reply), tensors

    def _answered(self, message: OwnerCall, frame: Frame, owner: str) -> Reply:
        try:
            match message:
                case Push(body):
                    return self._push(body, frame, owner), ()
                case Pull(name, digest):
                    return self._pull(name, digest, owner)
                case List():
                    return self._list(owner), ()
                case Load(name, loaded):
                    self._owned(name, owner)
                    self.set_loaded(name, loaded)
                    return Done(), ()
                case Delete(name):
                    return self._delete(name, owner), ()
                case _:
                    return self.jobs.answer(message, frame.tensors, owner)
        except NotPermitted as error:
            return Failed(Refusal(Reason.FORBIDDEN, one_line(error))), ()
        except StorageFull as error:
            return Failed(Refusal(Reason.BUSY, one_line(error))), ()
        except (InputError, CodecError) as error:
            return Failed(Refusal(Reason.INVALID, one_line(error))), ()
        except TacitError as error:
            return Failed(Refusal(Reason.FAILED, one_line(error))), ()

    def _push(self, body: bytes, frame: Frame, owner: str) -> OwnerReply:
        part = unpack(body, frame.tensors, self.role)
        if part.owner != owner:
            return Failed(Refusal(Reason.FORBIDDEN, "a model is pushed by its owner: this one names another key"))
        self.vault.save(part)
        self.came(part)
        return Done(part.digest)

    def _pull(self, name: str, digest: str | None, owner: str) -> Reply:
        versions = [one for one in self._owned(name, owner) if digest in (None, one.digest)]
        if not versions:
            raise InputError(f"model {name!r} has no such version here")
        body, tensors = pack(self.vault.load(versions[-1].digest))
        return Pulled(body), tensors

    def _list(self, owner: str) -> OwnerReply:
        served, tickets = set(self.served()), self.tickets()
        return Models(
            [
                Listed(
                    one.name,
                    one.digest,
                    one.digest in served,
                    {size: tickets.get((one.digest, size), 0) for size in one.batch_sizes},
                )
                for one in self.vault.list()
                if one.owner == owner
            ]
        )

    def _delete(self, name: str, owner: str) -> OwnerReply:
        for one in self._owned(name, owner):
            self.gone(one.digest)
            self.vault.delete(one.digest)
        return Done()

    def _owned(self, name: str, owner: str) -> list[Entry]:
        """The versions of a model, the oldest first.

        Raises:
            InputError: there are none, or they are somebody else's.
        """
        versions = [one for one in self.vault.list() if one.name == name]
        if not versions:
            raise InputError(f"there is no model {name!r} here")
        for one in versions:
            require_owner(one, owner)
        return versions
