"""Which tickets a pair of workers makes ready ahead of need: a decision from counts and sizes.

A *line* is a model version and a batch size. Every line has one ticket ready if there is one, so that nothing waits for
the first. Half of the memory is divided among lines: each may fill its part whether it is used or not, and no other
takes that from it. The other half goes to the lines that were used lately, so that what they have ready lasts equally
long. A line that lacks little is left alone: taking tickets costs both parties a write to their disks and messages to
and fro, as much for many as for one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tacit.party.refill import Line

MOST = 32
"""Tickets of one line."""
TOGETHER = 8
"""Tickets that are taken from the pool at once, and how many a line lacks before any are."""
_FORGETTING_S = 10.0
_UNUSED = 0.1
"""A line that was used less than that lately counts as not used."""


@dataclass
class Usage:
    """How often lines were used lately; times are given by the caller."""

    _counts: dict[Line, tuple[float, float]] = field(default_factory=dict)

    def used(self, line: Line, now: float) -> None:
        """A ticket was used."""
        self._counts[line] = self.of(line, now) + 1, now

    def of(self, line: Line, now: float) -> float:
        """Roughly, how many were used in the last ten seconds."""
        count, when = self._counts.get(line, (0.0, now))
        return count * math.exp(-max(0.0, now - when) / _FORGETTING_S)


def next_lease(
    sizes: Mapping[Line, int],
    held: Mapping[Line, int],
    levels: Mapping[Line, int],
    used: Mapping[Line, float],
    memory: int,
) -> tuple[Line, int] | None:
    """What to take from the pool next.

    Args:
        sizes: bytes that a ticket takes once it is expanded, of every line that is served.
        held: tickets that the pair has, or is being given.
        levels: tickets in the pool.
        used: how often each line was used lately.
        memory: bytes that all of the pair's tickets may take at a party.

    Returns:
        A line and a count; ``None`` if there is enough of everything, or no more to be had.
    """
    part = memory // (2 * max(1, len(sizes)))
    taken = {line: max(part, held.get(line, 0) * size) for line, size in sizes.items()}
    shared = memory - sum(taken.values())
    best: tuple[float, Line, int] | None = None
    for line, size in sizes.items():
        have, lately = held.get(line, 0), used.get(line, 0.0)
        room = taken[line] - have * size + (max(0, shared) if lately > _UNUSED else 0)
        if levels.get(line, 0) and have <= MOST - TOGETHER and (not have or size <= room):
            need = (have / (_UNUSED + lately), line, room)
            best = need if best is None else min(best, need)
    if best is None:
        return None
    _, line, room = best
    fitting = max(1, room // max(1, sizes[line]))
    # Half of what it has more: lines take turns while all of them fill up.
    return line, min(levels[line], fitting, TOGETHER, 1 + held.get(line, 0) // 2)
