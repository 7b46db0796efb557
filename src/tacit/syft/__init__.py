"""PySyft 0.2's vocabulary over tacit: programs written for `import syft as sy` run with `import tacit.syft as sy`.

>>> hook = sy.TorchHook(torch)
>>> bob, alice, james = (sy.VirtualWorker(hook, id=name) for name in ("bob", "alice", "james"))
>>> pointer = torch.tensor([1.0, 2.0]).send(bob)
>>> (pointer + pointer).get()                                     # computed at bob
>>> x = torch.tensor([0.5]).fix_precision().share(bob, alice, crypto_provider=james)
>>> (x * x).get().float_precision()                               # computed on shares

It names what tacit has and holds no protocol of its own; `docs/from-pysyft.md` says what differs.
"""

from __future__ import annotations

from typing import Any

from tacit.errors import TacitError
from tacit.party.objects import RemoteWorker
from tacit.plans import Plan, PointerPlan, Protocol, State, func2plan
from tacit.remote import GetNotPermittedError, PointerTensor, VirtualWorker, local_worker
from tacit.remote_data import BaseDataset, FederatedDataLoader, FederatedDataset
from tacit.syft import serde
from tacit.syft.encrypted import FixedTensor, SharedTensor, SummedTensor
from tacit.syft.torch_hook import TorchHook


def __getattr__(name: str) -> Any:
    if name == "hook":
        return TorchHook.installed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BaseDataset",
    "FederatedDataLoader",
    "FederatedDataset",
    "FixedTensor",
    "GetNotPermittedError",
    "Plan",
    "PointerPlan",
    "PointerTensor",
    "Protocol",
    "RemoteWorker",
    "SharedTensor",
    "State",
    "SummedTensor",
    "TacitError",
    "TorchHook",
    "VirtualWorker",
    "func2plan",
    "local_worker",
    "serde",
]
