"""Encrypted training by three processes, timed beside plaintext PyTorch.

For every batch the crypto provider deals what a step takes, the parties take the step on shares, a plaintext model
takes it on the same batch, and plaintext steps are timed on a second copy. Figures are medians over the steps after the
first, which warms up. A step's time is what the client waits for: from sending the first share of its batch until both
parties have the new weights. Everything computes with one thread a process.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tacit.bench.measuring import Profile, inputs_of, profile_of, require_planned, timed, versions
from tacit.bench.nets import build
from tacit.errors import InputError
from tacit.party.launch import Dealt, LocalProcesses, Outcome
from tacit.party.trainer import ProcessTrainer
from tacit.program.optimizers import Sgd
from tacit.ring.prg import Prg
from tacit.runtimes.executors import one_thread

NETS = ("mlp", "lenet")
_LR = 0.1
_CLASSES = 10


@dataclass(frozen=True)
class Training:
    """The figures of one benchmark; seconds are medians but for ``step_min_s``.

    Args:
        steps: measured, after one that warms up.
        step_s: of a step of SGD on shares, dealing apart.
        deal_s: seconds of one core in the provider's process, for a step.
        bytes_online_per_party: that each party sends the other in a step; counted on the link and equal to the plan.
        bytes_dealt: that the provider sends for a step; counted on the link and equal to the plan.
        rounds: openings each way in a step.
        max_abs_error_weights: largest difference of a weight from plaintext float32 after the same steps, the first
            included.
        peak_rss_mb: the larger party's.
    """

    net: str
    batch: int
    steps: int
    step_s: float
    step_min_s: float
    deal_s: float
    plaintext_step_s: float
    step_over_plaintext: float
    deal_over_plaintext: float
    bytes_online_per_party: int
    bytes_dealt: int
    rounds: int
    max_abs_error_weights: float
    peak_rss_mb: float
    threads: int
    versions: dict[str, str]
    profile: Profile

    def as_dict(self) -> dict[str, Any]:
        """The figures for ``--json``."""
        return asdict(self)


def measure_training(net: str, batch: int, steps: int, progress: Callable[[str], None] = lambda text: None) -> Training:
    """Run the benchmark.

    Args:
        net: one of `NETS`.
        batch: items in a batch.
        steps: measured steps, after one that warms up.
        progress: told what happens next.

    Raises:
        InputError: no such network, or a count below 1.
        PeerError: a process failed, or counted something else than was planned.
    """
    if batch < 1 or steps < 1:
        raise InputError(f"batch is {batch} and steps is {steps}: both must be at least 1")
    if net not in NETS:
        raise InputError(f"training is measured on {' and '.join(NETS)}, not on {net!r}")
    model, item_shape = build(net)
    with one_thread():
        return _measure(net, model.train(), (batch, *item_shape), steps, progress)


def _measure(
    net: str, model: nn.Module, shape: tuple[int, ...], steps: int, progress: Callable[[str], None]
) -> Training:
    plaintext, rehearsal = _Plaintext(model), _Plaintext(model)
    progress("start alice, bob and the provider")
    with LocalProcesses() as processes:
        trainer = ProcessTrainer(processes, model, cross_entropy, Sgd(_LR))
        progress(f"plan a step of {net} on a batch of {shape[0]}")
        planned = trainer.install(shape)

        def once(number: int, by_layer: bool = False) -> tuple[Dealt, Outcome, list[float]]:
            inputs, labels = inputs_of(shape, number), _labels(shape[0], number)
            dealt = trainer.deal(shape)
            outcome = trainer.step(inputs, labels, by_layer=by_layer)
            plaintext.step(inputs, labels)
            times, _ = timed(lambda: rehearsal.step(inputs, labels))
            require_planned(planned, dealt, outcome)
            return dealt, outcome, times

        once(0)
        runs = []
        for number in range(1, steps + 1):
            progress(f"step {number} of {steps}")
            runs.append(once(number))
        error = _difference(trainer.reveal(), plaintext.model)
        _, by_layer, _ = once(steps + 1, by_layer=True)
        peak = processes.peak_rss_mb()
    dealt, outcomes, times = zip(*runs, strict=True)
    step_s = statistics.median(outcome.seconds for outcome in outcomes)
    plaintext_s = statistics.median(seconds for one in times for seconds in one)
    deal_s = statistics.median(one.provider_s for one in dealt)
    typical = min(outcomes, key=lambda outcome: abs(outcome.seconds - step_s))
    return Training(
        net=net,
        batch=shape[0],
        steps=steps,
        step_s=step_s,
        step_min_s=min(outcome.seconds for outcome in outcomes),
        deal_s=deal_s,
        plaintext_step_s=plaintext_s,
        step_over_plaintext=step_s / plaintext_s,
        deal_over_plaintext=deal_s / plaintext_s,
        bytes_online_per_party=planned.bytes_online,
        bytes_dealt=planned.bytes_dealt,
        rounds=planned.rounds,
        max_abs_error_weights=error,
        peak_rss_mb=max(peak["alice"], peak["bob"]),
        threads=1,
        versions=versions(),
        profile=profile_of(typical, dealt, by_layer, trainer.operators(shape)),
    )


class _Plaintext:
    """A copy of the model and its plaintext training."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=_LR)

    def step(self, inputs: Tensor, labels: Tensor) -> None:
        """One step, as a training loop takes it."""
        self._optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(self.model(inputs), labels))
        self._optimizer.step()


def _labels(count: int, number: int) -> Tensor:
    return Prg((~number & ((1 << 128) - 1)).to_bytes(16, "big")).words((count,)).remainder(_CLASSES)


def _difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)
