"""The service on one machine under load: clients that ask, wait for the answer, and ask again, over TLS.

Before anything is measured, the parties' pools are filled; how fast that goes is the *refill rate*. Unless told
otherwise the provider then rests while clients ask, as if it had a machine of its own: what it takes to deal is
measured apart (`tacit bench inference`). It rests until tickets of some size have nearly run out, and deals from then
to the end of the level, whose figures say for how long: so a level may last longer than the pools.

The latency of a single request is that of one client, alone, while the workers have tickets ready, and is compared with
the engine's bare time: three processes over plain TCP, without a service around them, while the service has nothing to
do. The two take turns, so that both see the machine as fast as it is just then. Both are measured twice: at work, and
after rests, from which processors come back slowly and with cold caches. Memory is watched while many clients ask.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from torch import Tensor, nn

from tacit.bench.inference import measure_inference
from tacit.bench.measuring import inputs_of, versions
from tacit.bench.nets import build
from tacit.bench.processes import Growth, Watch, cpu_seconds, watching
from tacit.errors import InputError, PeerError
from tacit.identity import key_text
from tacit.party import push
from tacit.party.client import Client
from tacit.party.closed_loop import Asked, ask_on, per_second, quantile
from tacit.party.cluster_file import ALICE, BOB, PROVIDER, Pools, Serving
from tacit.party.local import LocalService, prepare
from tacit.party.owning import Owner
from tacit.party.stocking import TOGETHER
from tacit.program.lowering import Context
from tacit.program.network import Network

MODEL = "benched"
_TURNS = 3
_ALONE = 80
_BARE_REPEATS = 30
"""Requests of a client alone, and runs of the bare engine, a turn."""
_REST_S = 0.03
_STOCKED_S = 60.0
_RESTOCKING_S = 0.25
"""What workers need, with much to spare, to expand as many tickets as they take at once."""
_FILLING_S = 600.0
_FULL = 0.8
"""Of the disk that the pools may take, from which on they count as full."""
_LOW = 0.1
"""Of the tickets of some size that there were in full pools, from which on the provider does not rest any more."""
_TOLERANCE = 5e-3
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Level:
    """What so many clients at once get.

    Args:
        clients: each of them with an identity and a session of its own.
        requests_per_s: answers a second; each request has one input.
        p50_ms, p99_ms: latencies that half, and 99 in 100, of the requests did not exceed.
        batch_mean: requests in a batch, on average.
        errors: requests that failed, by what they failed with.
        wrong: answers that are not what the model gives in the clear.
        cpu_ms: milliseconds of one core that each process took for an answer.
        dealt_s: seconds during which the provider dealt, since the pools had run low or it was not to rest.
        memory_mb: the resident memory of each process of the service.
    """

    clients: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    batch_mean: float
    errors: dict[str, int]
    wrong: int
    cpu_ms: dict[str, float]
    dealt_s: float
    memory_mb: dict[str, Growth]


@dataclass(frozen=True)
class Alone:
    """What a single client gets, beside the engine without a service around it.

    Args:
        rest_ms: how long everything rests before each request, and each of the engine's runs.
        p50_ms, p99_ms: latencies that half, and 99 in 100, of the requests did not exceed.
        bare_ms: the engine's median online time for one input.
        over_bare: the median latency over the engine's.
    """

    rest_ms: float
    p50_ms: float
    p99_ms: float
    bare_ms: float
    over_bare: float


@dataclass(frozen=True)
class ServingResult:
    """The figures of one benchmark.

    Args:
        net: the network.
        batch_sizes: planned sizes.
        workers: worker processes at each party.
        alone: a single client at work, and one that rests.
        levels: by how many clients ask at once.
        refill_rows_per_s: inputs for which tickets were dealt in a second, while the pools were filled.
        pool_bytes: what bob's pool took once it was full.
        versions: of what computes.
    """

    net: str
    batch_sizes: tuple[int, ...]
    workers: int
    alone: tuple[Alone, ...]
    levels: tuple[Level, ...]
    refill_rows_per_s: float
    pool_bytes: int
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        net: one of `tacit.bench.nets.NETS`.
        clients: how many ask at once, one level after another.
        seconds: how long each level lasts.
        workers: worker processes at each party.
        batch_sizes: planned sizes.
        disk_gb: what bob's pool may take.
        refill: whether the provider deals all the time while clients ask.
        network: what to plan the model for; ``None`` for the fewest bytes, as the bare engine is.

    Raises:
        InputError: a number is out of range.
    """

    net: str = "lenet"
    clients: tuple[int, ...] = (1, 8, 64)
    seconds: float = 20.0
    workers: int = 1
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    disk_gb: float = 16.0
    refill: bool = False
    network: Network | None = None

    def __post_init__(self) -> None:
        if not self.clients or min(self.clients) < 1:
            raise InputError(f"clients {self.clients}: give one number or more, each of them 1 or more")
        if self.seconds <= 0 or self.disk_gb <= 0 or self.workers < 1:
            raise InputError("seconds, disk and workers must be above 0")


def measure_serving(settings: Settings, progress: Progress = lambda text: None) -> ServingResult:
    """Measure the service; see the module.

    Raises:
        InputError: there is no such network.
        PeerError: a process did not start, or failed.
    """
    model, item_shape = build(settings.net)
    items = [inputs_of((1, *item_shape), number) for number in range(32)]
    with tempfile.TemporaryDirectory(prefix="tacit-bench-") as place:
        folder = Path(place)
        names = [f"client-{number}" for number in range(max(settings.clients))]
        serving = Serving(batch_sizes=settings.batch_sizes, workers=settings.workers)
        # For as many inputs as the disk takes, with tickets of every size.
        prepare(folder, clients=names, serving=serving, pools=Pools(disk_gb=settings.disk_gb, ahead=1 << 20))
        progress("starting alice, bob and the provider")
        with LocalService(folder) as service:
            service.wait_ready()
            bench = _Bench(service, settings, model, items, progress)
            refill = bench.push()
            alone = bench.alone(0.0), bench.alone(_REST_S)
            levels, pool_bytes = tuple(bench.level(count) for count in settings.clients), bench.pool_bytes
    return ServingResult(
        settings.net,
        settings.batch_sizes,
        settings.workers,
        alone,
        levels,
        refill,
        pool_bytes,
        versions(),
    )


@dataclass
class _Supply:
    """The service while clients ask: its memory, and since when the provider deals, if it does."""

    watch: Watch = field(default_factory=Watch)
    since: float | None = None

    @property
    def dealt_s(self) -> float:
        return 0.0 if self.since is None else time.monotonic() - self.since


class _Bench:
    """A service that runs, and the clients that ask it."""

    def __init__(
        self, service: LocalService, settings: Settings, model: nn.Module, items: Sequence[Tensor], progress: Progress
    ) -> None:
        self._service, self._settings, self._progress = service, settings, progress
        self._model, self._items = model, items
        self._expected = [model(item).detach() for item in items]
        self.pool_bytes = 0
        self._full: dict[int, int] = {}

    def push(self) -> float:
        """Push the model and fill the pools; inputs for which tickets were dealt in a second."""
        self._progress("pushing the model")
        cluster, identity = self._service.cluster, self._service.key("owner")
        prepared = push.prepare(
            self._model, [self._items[0]], name=MODEL, owner=key_text(identity.public),
            batch_sizes=self._settings.batch_sizes, context=Context(network=self._settings.network),
        )  # fmt: skip
        with Owner(cluster, identity) as owner:
            owner.push(prepared)
        return self._fill()

    def alone(self, rest_s: float) -> Alone:
        """One client, while nobody else wants anything, and the bare engine, by turns."""
        asked, bare = list[Asked](), list[float]()
        for _ in range(_TURNS):
            self._progress(f"the bare engine, and one client, that rest {1000 * rest_s:g} ms")
            self._wait_stocked()
            with self._resting_provider():
                bare.append(measure_inference(self._settings.net, 1, _BARE_REPEATS, pause_s=rest_s).online_s)
                asked += self._ask_alone(rest_s)
        p50, bare_s = quantile(asked, 0.5), statistics.median(bare)
        return Alone(1000 * rest_s, 1000 * p50, 1000 * quantile(asked, 0.99), 1000 * bare_s, p50 / bare_s)

    def _ask_alone(self, rest_s: float) -> list[Asked]:
        """It rests whenever workers take tickets."""
        return self._ask(
            1, lambda sent: sent < _ALONE, lambda sent: rest_s if sent % TOGETHER else max(rest_s, _RESTOCKING_S)
        )

    def level(self, count: int) -> Level:
        """So many clients that do not pause."""
        self._fill()
        self._progress(f"{count} clients for {self._settings.seconds:g} s")
        with self._watched() as supply:
            before, cpu = _counters(self._service), cpu_seconds(self._service)
            until = time.perf_counter() + self._settings.seconds
            asked = self._ask(count, lambda sent: time.perf_counter() < until)
            after, spent, dealt_s = _counters(self._service), cpu_seconds(self._service), supply.dealt_s
        answered = [one for one in asked if one.output is not None]
        batches = after["tacit_batches_total"] - before["tacit_batches_total"]
        rows = after["tacit_rows_total"] - before["tacit_rows_total"]
        errors: dict[str, int] = {}
        for one in asked:
            if one.error:
                errors[one.error] = errors.get(one.error, 0) + 1
        return Level(
            count,
            per_second(asked),
            1000 * quantile(asked, 0.5),
            1000 * quantile(asked, 0.99),
            rows / batches if batches else 0.0,
            errors,
            sum(not self._right(one) for one in answered),
            {name: 1000 * (spent[name] - cpu[name]) / max(1, len(answered)) for name in cpu.keys() & spent.keys()},
            dealt_s,
            supply.watch.growth(),
        )

    def _right(self, one: Asked) -> bool:
        return one.output is not None and bool(
            (one.output - self._expected[one.item]).abs().max()
            <= _TOLERANCE * (1 + self._expected[one.item].abs().max())
        )

    def _ask(
        self, count: int, go_on: Callable[[int], bool], rest: Callable[[int], float] = lambda sent: 0.0
    ) -> list[Asked]:
        async def asking() -> list[Asked]:
            keys = [self._service.key(f"client-{number}") for number in range(count)]
            clients = [Client(self._service.cluster, key) for key in keys]
            try:
                for client in clients:  # whoever is new is not counted upon, and not measured
                    await client.ask(MODEL, self._items[0])
                return await ask_on(clients, MODEL, self._items, go_on, rest)
            finally:
                for client in clients:
                    await client.close()

        return uvloop.run(asking())

    def _fill(self) -> float:
        """Wait until the pools are full; inputs for which tickets came in a second, 0 if they were full."""
        began, deadline = time.perf_counter(), time.monotonic() + _FILLING_S
        first = rows = self._rows()
        while (held := int(_counters(self._service, BOB)["tacit_pool_bytes"])) < _FULL * self._settings.disk_gb * 1e9:
            if time.monotonic() > deadline:
                raise PeerError("the pools were not filled in time: see the logs of bob and the provider")
            time.sleep(0.2)
            self._progress(f"filling the pools: tickets for {self._rows():,} inputs")
        self.pool_bytes, rows, seconds = max(self.pool_bytes, held), self._rows(), time.perf_counter() - began
        self._full = self._tickets()
        return (rows - first) / seconds if rows > first else 0.0

    def _wait_stocked(self) -> None:
        """Wait until the workers expand nothing any more."""
        deadline, last = time.monotonic() + _STOCKED_S, -1.0
        while (ready := _counters(self._service)["tacit_ready_tickets"]) != last and time.monotonic() < deadline:
            last = ready
            time.sleep(1.5)

    def _rows(self) -> int:
        """Inputs for which alice has tickets on her disk."""
        return sum(size * count for size, count in self._tickets().items())

    def _tickets(self) -> dict[int, int]:
        """How many tickets of every size alice has on her disk."""
        text = _metrics(self._service, ALICE)
        found = re.findall(r'tacit_pool_tickets\{batch="(\d+)",model="' + MODEL + r'"\} ([\d.e+]+)', text)
        return {int(size): int(float(count)) for size, count in found}

    @contextlib.contextmanager
    def _resting_provider(self) -> Iterator[None]:
        if self._settings.refill:
            yield
            return
        os.kill(self._service.pid(PROVIDER), signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._service.pid(PROVIDER), signal.SIGCONT)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[_Supply]:
        """Watch the service while clients ask, and end the provider's rest when tickets have nearly run out."""
        supply = _Supply(since=time.monotonic() if self._settings.refill else None)

        def look() -> None:
            there = self._tickets()
            low = any(there.get(size, 0) < _LOW * count for size, count in self._full.items())
            if low and supply.since is None:
                os.kill(self._service.pid(PROVIDER), signal.SIGCONT)
                supply.since = time.monotonic()

        with self._resting_provider(), watching(self._service, look) as supply.watch:
            yield supply


def _metrics(service: LocalService, party: str) -> str:
    address = service.cluster.party(party).http_at
    if address is None:
        raise InputError(f"{party} shows no metrics")
    connection = http.client.HTTPConnection(address.host, address.port, timeout=30.0)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise PeerError(f"{party} does not show its metrics: {error}") from None
    finally:
        connection.close()


def _counters(service: LocalService, party: str = ALICE) -> Mapping[str, float]:
    """The metrics, those of all labels added."""
    found: dict[str, float] = {}
    for line in _metrics(service, party).splitlines():
        name, _, value = line.rpartition(" ")
        if name and not line.startswith("#"):
            plain = name.partition("{")[0]
            found[plain] = found.get(plain, 0.0) + float(value)
    return found
