"""Encrypted inference by three processes, timed beside plaintext PyTorch.

In every repeat the crypto provider deals what one batch takes, plaintext float32 runs on the batch, and the parties
run on its shares; figures are medians over the repeats. Online is what the client waits for: from sending the first
share of its input until it holds the last share of the result. Everything computes with one thread a process.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tacit.bench.nets import build
from tacit.errors import InputError, PeerError
from tacit.mpc.shares import reconstruct, share
from tacit.party.calls import Planned
from tacit.party.launch import Dealt, LocalProcesses, Outcome
from tacit.party.programs import Program
from tacit.program.lowering import Context
from tacit.program.rewrite import Model, simplify
from tacit.ring.fixed_point import FRACTION_BITS, decode, encode
from tacit.ring.prg import Prg
from tacit.trace import trace

_PLAINTEXT_S = 0.05
"""How long plaintext runs in each repeat, at least: one cold run of a small network would flatter us."""


@dataclass(frozen=True)
class Profile:
    """Where the slower party's time goes, for the run with the median time.

    Args:
        party_s: from its first step to its last; the client's sending and receiving come on top.
        compute_s: computing.
        waiting_s: waiting for the other party.
        moving_s: sending, receiving and adding up openings.
        preparing_s: the busier party's share of the dealing, in seconds of one core.
        deal_wall_s: the dealing of all three, on this machine's cores.
        layers: computing seconds of the operators that took most of an extra run.
    """

    party_s: float
    compute_s: float
    waiting_s: float
    moving_s: float
    preparing_s: float
    deal_wall_s: float
    layers: dict[str, float]


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
    net: str, batch: int, repeat: int, progress: Callable[[str], None] = lambda text: None
) -> Inference:
    """Run the benchmark.

    Args:
        net: a name in `tacit.bench.nets.NETS`.
        batch: inputs in a batch.
        repeat: measured repeats, after one that warms up.
        progress: told what happens next.

    Raises:
        InputError: no such network, or a count below 1.
        UnsupportedOperator: the network uses an operator that has no encrypted form.
        PeerError: a process failed, or counted something else than was planned.
    """
    if batch < 1 or repeat < 1:
        raise InputError(f"batch is {batch} and repeat is {repeat}: both must be at least 1")
    model, item_shape = build(net)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return _measure(net, model, _inputs((batch, *item_shape)), repeat, progress)
    finally:
        torch.set_num_threads(threads)


def _measure(net: str, model: nn.Module, inputs: Tensor, repeat: int, progress: Callable[[str], None]) -> Inference:
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
            plaintext, expected = _plaintext(model, inputs)
            outcome = processes.run([share(encode(inputs), FRACTION_BITS, client)], by_layer=by_layer)
            _require_planned(everyone, dealt, outcome)
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
        online_over_plaintext=online_s / plaintext_s,
        deal_over_plaintext=deal_s / plaintext_s,
        peak_rss_mb=max(peak["alice"], peak["bob"]),
        threads=1,
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        profile=_profile(typical, dealt, by_layer, {node.name: node.operator for node in owned.graph.nodes}),
    )


def _inputs(shape: tuple[int, ...]) -> Tensor:
    """Numbers in [0, 1) to 16 binary digits, the same every time; their values do not influence any time."""
    return decode(Prg(bytes(16)).words(shape) & 0xFFFF, FRACTION_BITS).to(torch.float32)


def _plaintext(model: nn.Module, inputs: Tensor) -> tuple[list[float], Tensor]:
    times: list[float] = []
    while len(times) < 3 or sum(times) < _PLAINTEXT_S:
        began = time.perf_counter()
        expected: Tensor = model(inputs)
        times.append(time.perf_counter() - began)
    return times, expected


def _require_planned(planned: Planned, dealt: Dealt, outcome: Outcome) -> None:
    """Hold what was counted against the plan.

    Raises:
        PeerError: they differ.
    """
    for name, party in (("alice", outcome.alice), ("bob", outcome.bob)):
        if (party.rounds, party.bytes_online) != (planned.rounds, planned.bytes_online):
            raise PeerError(
                f"{name} sent {party.bytes_online} bytes in {party.rounds} rounds; "
                f"{planned.bytes_online} in {planned.rounds} were planned"
            )
    if dealt.nbytes != planned.bytes_dealt:
        raise PeerError(f"the provider sent {dealt.nbytes} bytes; {planned.bytes_dealt} were planned")


def _profile(typical: Outcome, dealt: tuple[Dealt, ...], by_layer: Outcome, operators: dict[str, str]) -> Profile:
    party = max(typical.alice, typical.bob, key=lambda ran: ran.wall_s - ran.waited_s)
    slowest = sorted(by_layer.alice.layers.items(), key=lambda item: -item[1])[:8]
    return Profile(
        party_s=party.wall_s,
        compute_s=party.wall_s - party.waited_s - party.moved_s,
        waiting_s=party.waited_s,
        moving_s=party.moved_s,
        preparing_s=statistics.median(one.party_s for one in dealt),
        deal_wall_s=statistics.median(one.wall_s for one in dealt),
        layers={f"{name} ({operators[name]})": seconds for name, seconds in slowest if name in operators},
    )
