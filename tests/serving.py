"""A service of three real processes, with a small model pushed, for tests."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tacit.identity import Identity, key_text
from tacit.party import push
from tacit.party.cluster_file import ClusterFile, Pools, Serving
from tacit.party.local import LocalService, prepare
from tacit.party.owning import Owner

SIZES = (1, 4)
POOLS = Pools(disk_gb=0.05, ahead=48)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def inputs(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


def cluster_of(
    folder: Path, clients: Sequence[str] = ("clinic", "lab"), pools: Pools = POOLS, **settings: Any
) -> ClusterFile:
    serving = Serving(batch_sizes=SIZES, memory_gb=0.05, **settings)
    return prepare(folder, clients=clients, serving=serving, pools=pools)


def prepared(owner: Identity, name: str = "small", seed: int = 0) -> push.Push:
    examples = [torch.zeros(1, 6)]
    return push.prepare(model(seed), examples, name=name, owner=key_text(owner.public), batch_sizes=SIZES)


def pushed(service: LocalService, name: str = "small", seed: int = 0, ready: push.Push | None = None) -> None:
    """Push a model and wait until it is served and tickets are there."""
    identity = service.key("owner")
    version = ready or prepared(identity, name, seed)
    with Owner(service.cluster, identity) as owner:
        digest = owner.push(version)
        until(lambda: any(one.model == digest and all(one.tickets.values()) for one in owner.list()["alice"]))


def until(happened: Callable[[], object], patience: float = 120.0) -> None:
    deadline = time.monotonic() + patience
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-3, rtol=0)
