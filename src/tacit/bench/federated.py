"""Simulated federated training, timed beside the loop that one writes by hand.

Rounds of tacit and of a plain PyTorch loop over as many clients take turns, and figures are medians over them, so that
whatever else the machine does meets both alike. The loop is `torch.optim.SGD` over a module and autograd, on one
thread, on examples that are in memory, with the same weighted mean at the end. CPU seconds count every process.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tacit.bench.measuring import versions
from tacit.data.examples import Examples
from tacit.data.mnist import load_mnist
from tacit.data.views import ClientViews
from tacit.errors import InputError
from tacit.federated.algorithm import Algorithm
from tacit.federated.central_privacy import CentralPrivacy
from tacit.federated.fedavg import FedAvg
from tacit.federated.generators import generator_for
from tacit.federated.local.dp_sgd import DpSgdSolver
from tacit.federated.local.traced import solver_for
from tacit.federated.local.work import LocalSolver
from tacit.federated.models import cnn, two_nn
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.selection import Uniform
from tacit.runtimes.executors import one_thread
from tacit.runtimes.federation import Federation
from tacit.runtimes.forked import Forked, forked
from tacit.runtimes.simulation import sum_protocol

MODELS: dict[str, Callable[[], nn.Sequential]] = {"2nn": two_nn, "cnn": cnn}
PRIVACY = ("none", "record", "client")
SUMS = ("none", "masked", "shared")
EXAMPLES_PER_CLIENT = 60
LR = 0.05
CENTRAL_BATCH = 600
_CLIP, _NOISE = 1.0, 1.0
_TRACING = ("torch._dynamo", "torch._inductor", "tacit.federated.local.kernels")
"""What the first trace imports, a second or two of it."""


@dataclass(frozen=True)
class Simulation:
    """The figures of one benchmark; times are medians over the rounds after the first.

    Args:
        cpu_s_per_round: of all processes, aggregation included.
        wall_s_per_round: of the same.
        clients_per_s: clients trained in a second of wall-clock time.
        plain_loop_cpu_s: of a round of the plain loop over as many clients.
        over_plain_loop: ``cpu_s_per_round / plain_loop_cpu_s``.
        central_limit_cpu_s: of one pass of plain SGD over as many examples, all in one place, in batches of
            `CENTRAL_BATCH`.
        startup_s: from having model and data to the end of the first round; imports are outside.
        peak_rss_mb: of this process before anything else was measured, and of the largest other one, together.
        solver: how clients trained: ``traced``, or why not.
        executor: ``forked``, or why not.
        secure_sum: how the updates of the same rounds were summed once more.
        secure_cpu_s_per_round: of a round with that sum, as ``cpu_s_per_round`` is of one without.
        secure_overhead: what the sum adds, over the round without it.
        secure_over_plain_loop: what the sum adds, over ``plain_loop_cpu_s``.
    """

    model: str
    clients: int
    cohort: int
    batch_size: int
    examples_per_client: int
    rounds: int
    dp: str
    processes: int
    cpu_s_per_round: float
    wall_s_per_round: float
    clients_per_s: float
    plain_loop_cpu_s: float
    over_plain_loop: float
    central_limit_cpu_s: float
    startup_s: float
    peak_rss_mb: float
    solver: str
    executor: str
    versions: dict[str, str]
    secure_sum: str = "none"
    secure_cpu_s_per_round: float | None = None
    secure_overhead: float | None = None
    secure_over_plain_loop: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The figures for ``--json``."""
        return asdict(self)


def measure_federated(
    model: str,
    clients: int,
    cohort: int,
    batch_size: int,
    rounds: int,
    dp: str = "none",
    processes: int = 1,
    secure_sum: str = "none",
    examples: int = EXAMPLES_PER_CLIENT,
    progress: Callable[[str], None] = lambda text: None,
) -> Simulation:
    """Run the benchmark: FedAvg, one epoch.

    Args:
        model: one of `MODELS`.
        clients: in all. Beyond the data set's size they share examples.
        cohort: clients in a round.
        batch_size: of local training.
        rounds: measured, after one that warms up.
        dp: one of `PRIVACY`: DP-SGD at the clients, or clipping and noise over them.
        processes: that train clients.
        secure_sum: one of `SUMS`; other than ``"none"``, every round is run once more with that sum.
        examples: of each client.
        progress: told what happens next.

    Raises:
        InputError: no such model, privacy or sum, or a count is out of range.
    """
    if model not in MODELS:
        raise InputError(f"model {model!r}: choose one of {', '.join(MODELS)}")
    if dp not in PRIVACY:
        raise InputError(f"dp {dp!r}: choose one of {', '.join(PRIVACY)}")
    if secure_sum not in SUMS:
        raise InputError(f"secure_sum {secure_sum!r}: choose one of {', '.join(SUMS)}")
    for name, value in (
        ("batch_size", batch_size),
        ("rounds", rounds),
        ("processes", processes),
        ("examples", examples),
    ):
        if value < 1:
            raise InputError(f"{name} is {value}: it must be at least 1")
    if not 1 <= cohort <= clients:
        raise InputError(f"cohort is {cohort}: choose between 1 and the number of clients, {clients}")
    progress("lay out the clients' examples")
    views = views_of(clients, examples)
    with one_thread():
        return _measure(model, views, cohort, batch_size, rounds, dp, processes, secure_sum, progress)


def _measure(
    name: str,
    views: ClientViews,
    cohort: int,
    batch_size: int,
    rounds: int,
    dp: str,
    processes: int,
    secure_sum: str,
    progress: Callable[[str], None],
) -> Simulation:
    model = MODELS[name]()
    progress("import what tracing takes")
    for module in _TRACING:
        import_module(module)
    progress("start, and run a first round")
    began = time.perf_counter()
    algorithm: Algorithm = FedAvg(lr=LR, batch_size=batch_size)
    solver: LocalSolver
    if dp == "record":
        solver, plain_because = DpSgdSolver(model, cross_entropy, clip=_CLIP, noise_multiplier=_NOISE), "DP-SGD"
    else:
        solver, plain_because = solver_for(model, cross_entropy, first_batch(views[0], batch_size))
    if dp == "client":
        algorithm = CentralPrivacy(algorithm, _CLIP, _NOISE, cohort)
    executor, serial_because = forked(solver, views, processes)
    with closing(executor):
        selection, sizes = Uniform(cohort), views.sizes()
        federation = Federation(model, executor, sizes, algorithm=algorithm, selection=selection)
        federation.advance()
        startup_s = time.perf_counter() - began
        pids = executor.pids if isinstance(executor, Forked) else ()
        secure = None
        if secure_sum != "none":
            mean = SecureMean(sum_protocol("masked" if secure_sum == "masked" else "shared", sizes, selection))
            secure = Federation(model, executor, sizes, algorithm=algorithm, selection=selection, secure_mean=mean)
            secure.advance()
        loop, own, plain = PlainLoop(MODELS[name](), batch_size), list[tuple[float, float]](), list[float]()
        summed = list[float]()
        peak_rss_mb = peak_rss() / 2**20
        for number in range(rounds):
            progress(f"round {number + 1} of {rounds}")
            own.append(_timed(federation.advance, pids))
            if secure is not None:
                summed.append(_timed(secure.advance, pids)[0])
            some = [views[client] for client in range(cohort * number, cohort * (number + 1)) if client < len(views)]
            some = some if len(some) == cohort else [views[client] for client in range(cohort)]
            plain.append(_timed(lambda some=some: loop.round(some), ())[0])  # type: ignore[misc]
        # Pages that processes share with this one are counted once, in this one.
        peak_rss_mb += sum(private_bytes(pid) for pid in pids) / 2**20
    progress("central training")
    everything = views.examples.subset(torch.arange(cohort * len(views[0])) % len(views.examples))
    central = PlainLoop(MODELS[name](), CENTRAL_BATCH)
    limit = statistics.median(_timed(lambda: central.epoch(everything), ())[0] for _ in range(max(3, rounds)))
    cpu_s = statistics.median(cpu for cpu, _ in own)
    wall_s = statistics.median(wall for _, wall in own)
    plain_s = statistics.median(plain)
    return Simulation(
        model=name,
        clients=len(views),
        cohort=cohort,
        batch_size=batch_size,
        examples_per_client=len(views[0]),
        rounds=rounds,
        dp=dp,
        processes=max(1, len(pids)),
        cpu_s_per_round=cpu_s,
        wall_s_per_round=wall_s,
        clients_per_s=cohort / wall_s,
        plain_loop_cpu_s=plain_s,
        over_plain_loop=cpu_s / plain_s,
        central_limit_cpu_s=limit,
        startup_s=startup_s,
        peak_rss_mb=peak_rss_mb,
        solver=plain_because or "traced",
        executor=serial_because or "forked",
        versions=versions(),
        secure_sum=secure_sum,
        secure_cpu_s_per_round=statistics.median(summed) if summed else None,
        secure_overhead=statistics.median(summed) / cpu_s - 1 if summed else None,
        secure_over_plain_loop=(statistics.median(summed) - cpu_s) / plain_s if summed else None,
    )


def views_of(clients: int, examples_each: int = EXAMPLES_PER_CLIENT) -> ClientViews:
    """Clients of so many images each: MNIST's where ``TACIT_DATA`` says so, noise of its shape elsewhere."""
    count = min(60_000, clients * examples_each)
    generator = generator_for(0, "benchmark")
    if os.environ.get("TACIT_DATA"):
        examples = load_mnist().train
    else:
        images = torch.empty(count, 1, 28, 28).uniform_(generator=generator)
        examples = Examples(images, torch.empty(count, dtype=torch.int64).random_(10, generator=generator))
    total = clients * examples_each
    indices = torch.empty(total, dtype=torch.int32).random_(len(examples), generator=generator)
    if total <= len(examples):
        indices = torch.arange(total, dtype=torch.int32)
    return ClientViews.of_sizes(examples, indices, torch.full((clients,), examples_each))


def first_batch(examples: Examples, size: int) -> Examples:
    """The first ``size`` examples."""
    return replace(examples, inputs=examples.inputs[:size], targets=examples.targets[:size])


class PlainLoop:
    """Federated averaging as one writes it by hand."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        self._model = model.train()
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(0)

    def round(self, clients: Sequence[Examples]) -> None:
        """Train every client from the global model, and make the mean of theirs the next."""
        parameters = list(self._model.parameters())
        start = [parameter.detach().clone() for parameter in parameters]
        change = [torch.zeros_like(tensor) for tensor in start]
        total = sum(len(examples) for examples in clients)
        for examples in clients:
            _assign(parameters, start)
            self.epoch(examples)
            with torch.no_grad():
                for summed, parameter, before in zip(change, parameters, start, strict=True):
                    summed.add_(parameter - before, alpha=len(examples) / total)
        _assign(parameters, [before + mean for before, mean in zip(start, change, strict=True)])

    def epoch(self, examples: Examples) -> None:
        """One pass of SGD."""
        optimizer = torch.optim.SGD(self._model.parameters(), lr=LR)
        shuffled = torch.empty(len(examples)).uniform_(generator=self._generator).argsort()
        for batch in shuffled.split(self._batch_size):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            cross_entropy(self._model(examples.inputs[batch]), examples.targets[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


@torch.no_grad()
def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _timed(work: Callable[[], object], pids: Sequence[int]) -> tuple[float, float]:
    """CPU seconds of this process and of others, and wall-clock seconds."""
    cpu, wall = _cpu(pids), time.perf_counter()
    work()
    return _cpu(pids) - cpu, time.perf_counter() - wall


def _cpu(pids: Sequence[int]) -> float:
    """CPU seconds so far; another process's clock has a number that Linux makes of its own (clock_getcpuclockid)."""
    return time.process_time() + sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def peak_rss() -> int:
    """Bytes that this process has had in memory at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def private_bytes(pid: int) -> int:
    """Bytes in memory that only this process has, by Linux's count; 0 where there is none."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as rollup:
            lines = [line.split() for line in rollup]
    except OSError:
        return 0
    return sum(1024 * int(line[1]) for line in lines if line[0] in ("Private_Clean:", "Private_Dirty:"))
