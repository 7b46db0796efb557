"""Encrypted inference by three processes, timed beside plaintext PyTorch.

In every repeat the crypto provider deals what one batch takes, the parties run on the shares of the batch, and
plaintext float32 runs on the batch, in this order: neither side starts on caches that the other has just filled.
Figures are medians over the repeats. Online is what the client waits for: from sending the first share of its input
until it holds the last share of the result. Everything computes with one thread a process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tacit.bench.measuring import Profile, inputs_of, profile_of, require_planned, timed, versions
from tacit.bench.nets import build
from tacit.errors import InputError, PeerError
from tacit.mpc.shares import reconstruct, share
from tacit.party.calls import Planned
from tacit.party.launch import Dealt, LocalProcesses, Outcome
from tacit.party.programs import Program
from tacit.program.lowering import Context
from tacit.program.rewrite import Model, simplify
from tacit.ring.fixed_point import FRACTION_BITS, encode
from tacit.ring.prg import Prg
from tacit.runtimes.executors import one_thread
from tacit.trace import trace


@dataclass(frozen=True)
class Inference:
    """The figures of one benchmark; seconds are medians but for ``online_min_s``.

    Args:
        deal_s: seconds of one core in the provider's process.
        model_load_s: planning, sending, and loading the model, once.
        bytes_online_per_party: that each party sends the other in openings; counted on the link and equal to the plan.
        bytes_dealt: that the provider sends; counted on the link and equal to the plan.
        rounds: openings each way.
        max_abs_error: largest difference from plaintext float32 in any output.
        plaintext_s: of runs in a row, so with everything in the caches.
        plaintext_cold_s: of the first run after an encrypted one, which finds the caches as the encrypted one does.
        peak_rss_mb: the larger party's.
    """

    net: str
    batch: int
    online_s: float
    online_min_s: float
    deal_s: float
    model_load_s: float
    bytes_online_per_party: int
    bytes_dealt: int
    rounds: int
    max_abs_error: float
    plaintext_s: float
    plaintext_cold_s: float
    online_over_plaintext: float
    deal_over_plaintext: float
    peak_rss_mb: float
    threads: int
    versions: dict[str, str]
    profile: Profile

    def as_dict(self) -> dict[str, Any]:
        """The figures for ``--json``."""
        return asdict(self)


def measure_inference(
    net: str, batch: int, repeat: int, progress: Callable[[str], None] = lambda text: None, *, pause_s: float = 0.0
) -> Inference:
    """Run the benchmark.

    Args:
        net: a name in `tacit.bench.nets.NETS`.
        batch: inputs in a batch.
        repeat: measured repeats, after one that warms up.
        progress: told what happens next.
        pause_s: how long all processes rest between dealing and running.

    Raises:
        InputError: no such network, or a count below 1.
        UnsupportedOperator: the network uses an operator that has no encrypted form.
        PeerError: a process failed, or counted something else than was planned.
    """
    if batch < 1 or repeat < 1:
        raise InputError(f"batch is {batch} and repeat is {repeat}: both must be at least 1")
    model, item_shape = build(net)
    with one_thread(), torch.inference_mode():
        return _measure(net, model, inputs_of((batch, *item_shape)), repeat, progress, pause_s)


def _measure(
    net: str, model: nn.Module, inputs: Tensor, repeat: int, progress: Callable[[str], None], pause_s: float
) -> Inference:
    progress(f"plan {net} for a batch of {len(inputs)}")
    with torch.inference_mode(False):
        owned = simplify(Model(*trace(model, (inputs.clone(),))))
    owner, client = Prg.fresh(), Prg.fresh()
    shapes = {name: tuple(value.shape) for name, value in owned.state.items()}
    program = Program(owned.graph, shapes, (tuple(inputs.shape),), Context())
    state = {
        name: share(encode(value, what=f"weight {name}"), FRACTION_BITS, owner) for name, value in owned.state.items()
    }
    planned = program.cost()
    progress("start alice, bob and the provider")
    with LocalProcesses() as processes:
        began = time.perf_counter()
        everyone = processes.install(program)
        processes.load(state)
        model_load = time.perf_counter() - began
        if everyone != Planned(planned.rounds, planned.bytes_online, planned.bytes_dealt):
            raise PeerError("the processes plan another cost than this one: they do not run the same version")

        def once(by_layer: bool = False) -> tuple[Dealt, Outcome, list[float], float]:
            dealt = processes.deal()
            time.sleep(pause_s)
            outcome = processes.run([share(encode(inputs), FRACTION_BITS, client)], by_layer=by_layer)
            plaintext, expected = timed(lambda: model(inputs))
            require_planned(everyone, dealt, outcome)
            (pair,) = outcome.outputs
            return dealt, outcome, plaintext, float((reconstruct(*pair) - expected).abs().max())

        once()
        runs = []
        for number in range(repeat):
            progress(f"repeat {number + 1} of {repeat}")
            runs.append(once())
        _, by_layer, _, _ = once(by_layer=True)
        peak = processes.peak_rss_mb()
    dealt, outcomes, plaintexts, errors = zip(*runs, strict=True)
    online = [outcome.seconds for outcome in outcomes]
    plaintext_s = statistics.median(seconds for batch in plaintexts for seconds in batch)
    online_s = statistics.median(online)
    deal_s = statistics.median(one.provider_s for one in dealt)
    typical = min(outcomes, key=lambda outcome: abs(outcome.seconds - online_s))
    return Inference(
        net=net,
        batch=len(inputs),
        online_s=online_s,
        online_min_s=min(online),
        deal_s=deal_s,
        model_load_s=model_load,
        bytes_online_per_party=everyone.bytes_online,
        bytes_dealt=everyone.bytes_dealt,
        rounds=everyone.rounds,
        max_abs_error=max(errors),
        plaintext_s=plaintext_s,
        plaintext_cold_s=statistics.median(batch[0] for batch in plaintexts),
        online_over_plaintext=online_s / plaintext_s,
        deal_over_plaintext=deal_s / plaintext_s,
        peak_rss_mb=max(peak["alice"], peak["bob"]),
        threads=1,
        versions=versions(),
        profile=profile_of(typical, dealt, by_layer, {node.name: node.operator for node in owned.graph.nodes}),
    )
