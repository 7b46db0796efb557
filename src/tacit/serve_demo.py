"""The service on one machine: three processes, a model that was trained on digits, and clients that ask it at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import uvloop
from torch import nn

from tacit.data.digits import load_digits
from tacit.data.examples import Dataset
from tacit.data.mnist import load_mnist
from tacit.data.partition import iid
from tacit.errors import DataError, InputError, PeerError
from tacit.federated.fedavg import FedAvg
from tacit.federated.generators import generator_for
from tacit.federated.models import two_nn
from tacit.identity import Identity, key_text
from tacit.party import push
from tacit.party.client import Client
from tacit.party.closed_loop import Asked, ask_on, per_second, quantile
from tacit.party.cluster_file import ALICE, ClusterFile, Pools
from tacit.party.local import LocalService, prepare
from tacit.party.owning import Owner
from tacit.program.lowering import Context
from tacit.runtimes.simulation import federate

CLIENTS = 10
PREDICTIONS = 100
MODEL = "mnist"
_NAMES = tuple(f"client-{number}" for number in range(CLIENTS))
_TOLERANCE = 2e-3
_DEALING_S = 300.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """What one part of the demonstration gave.

    Args:
        what: who asked.
        requests: how many predictions were asked for.
        correct: how many of them are what the model gives in the clear.
        p50_s, p99_s: latencies.
        per_second: predictions a second.
    """

    what: str
    requests: int
    correct: int
    p50_s: float
    p99_s: float
    per_second: float


def serve_demo(folder: Path, say: Say = lambda text: None) -> tuple[list[Row], str]:
    """Train a model, start the three processes, push it, and have clients ask it.

    Args:
        folder: where keys, the cluster file and the processes' disks go; empty.
        say: told what is being done.

    Returns:
        A row for one client alone and one for all at once, and a title.

    Raises:
        PeerError: a process did not start, or a prediction is not what the model gives in the clear.
    """
    say("training a model federatedly, in the clear")
    data = _data()
    model = _trained(data)
    items = [data.test.inputs[number : number + 1] for number in range(PREDICTIONS)]
    with torch.inference_mode():
        expected = model(torch.cat(items))
    cluster = prepare(folder, clients=_NAMES, pools=Pools(disk_gb=2.0, ahead=512))
    say("starting alice, bob and the provider")
    with LocalService(folder) as service:
        service.wait_ready()
        say("pushing the model, and waiting until tickets are dealt")
        _push(cluster, service.key("owner"), model, data)
        say("asking")
        rows = [
            _row("one client", uvloop.run(_ask(cluster, service, _NAMES[:1], items, PREDICTIONS // 4)), expected),
            _row(
                f"{CLIENTS} clients at once", uvloop.run(_ask(cluster, service, _NAMES, items, PREDICTIONS)), expected
            ),
        ]
    if any(row.correct < row.requests for row in rows):
        raise PeerError(f"{sum(row.requests - row.correct for row in rows)} predictions were wrong or failed")
    accuracy = float((expected.argmax(1) == data.test.targets[:PREDICTIONS]).float().mean())
    return rows, f"{data.name}, 784-200-200-10, right about {accuracy:.0%} of these images, encrypted or not"


def _data() -> Dataset:
    try:
        return load_mnist(download=False)
    except (DataError, InputError):
        return load_digits()


def _trained(data: Dataset) -> nn.Module:
    parts = iid(data.train.targets, 20, generator=generator_for(0, "demo"))
    clients = [data.train.subset(part[:600]) for part in parts]
    algorithm = FedAvg(lr=0.1, batch_size=10)
    return federate(two_nn(), clients, algorithm=algorithm, rounds=5, cohort=10, test=None).model.eval()


def _push(cluster: ClusterFile, identity: Identity, model: nn.Module, data: Dataset) -> None:
    prepared = push.prepare(
        model, [data.test.inputs[:1]], name=MODEL, owner=key_text(identity.public),
        batch_sizes=cluster.serving.batch_sizes, context=Context(network=cluster.network.for_planning()),
    )  # fmt: skip
    deadline = time.monotonic() + _DEALING_S
    with Owner(cluster, identity) as owner:
        digest = owner.push(prepared)
        while not any(one.model == digest and _plenty(one.tickets) for one in owner.list()[ALICE]):
            if time.monotonic() > deadline:
                raise PeerError(f"no tickets were dealt in {_DEALING_S:g} seconds: see the logs")
            time.sleep(0.1)


def _plenty(tickets: dict[int, int]) -> bool:
    """Whether there are tickets for all that will be asked."""
    return all(tickets.values()) and sum(size * count for size, count in tickets.items()) >= 4 * PREDICTIONS


async def _ask(
    cluster: ClusterFile, service: LocalService, names: Sequence[str], items: Sequence[torch.Tensor], count: int
) -> list[Asked]:
    clients = [Client(cluster, service.key(name)) for name in names]
    try:
        await clients[0].ask(MODEL, items[0])  # a service that has just started has everything to do for the first time
        return await ask_on(clients, MODEL, items, lambda sent: sent < count)
    finally:
        for client in clients:
            await client.close()


def _row(what: str, asked: Sequence[Asked], expected: torch.Tensor) -> Row:
    correct = sum(
        one.output is not None
        and torch.allclose(one.output[0], expected[one.item], atol=_TOLERANCE, rtol=_TOLERANCE)
        and int(one.output[0].argmax()) == int(expected[one.item].argmax())
        for one in asked
    )
    return Row(what, len(asked), correct, quantile(asked, 0.5), quantile(asked, 0.99), per_second(asked))
