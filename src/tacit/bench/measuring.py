"""What the benchmarks of the three processes share: inputs, timing plaintext, checking counts, where the time goes."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tacit.errors import PeerError
from tacit.party.calls import Planned
from tacit.party.launch import Dealt, Outcome
from tacit.ring.fixed_point import FRACTION_BITS, decode
from tacit.ring.prg import Prg

_PLAINTEXT_S = 0.05
"""How long plaintext runs in each repeat, at least: one cold run of a small network would flatter us."""
T = TypeVar("T")


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


def inputs_of(shape: tuple[int, ...], number: int = 0) -> Tensor:
    """Numbers in [0, 1) to 16 binary digits, the same every time; their values do not influence any time.

    Args:
        shape: of the float32 tensor.
        number: of the batch; different ones are different.
    """
    return decode(Prg(number.to_bytes(16, "big")).words(shape) & 0xFFFF, FRACTION_BITS).to(torch.float32)


def timed(work: Callable[[], T]) -> tuple[list[float], T]:
    """Seconds of each of several runs in a row, and what the last one gave."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < _PLAINTEXT_S:
        began = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - began)
    return times, result


def require_planned(planned: Planned, dealt: Dealt, outcome: Outcome) -> None:
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


def versions() -> dict[str, str]:
    """Of what computes."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def profile_of(typical: Outcome, dealt: tuple[Dealt, ...], by_layer: Outcome, operators: dict[str, str]) -> Profile:
    """The profile of several runs.

    Args:
        typical: the one to show.
        dealt: what dealing took for all of them.
        by_layer: an extra run that took the time of every operator.
        operators: their ATen operators, by name.
    """
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
