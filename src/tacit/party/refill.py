"""Which tickets to have dealt next: a decision from levels and sizes, without a clock, a disk or a link.

Every *line*, a model version and a batch size, wants a number of tickets ahead. Where all of them together do not fit
the pool, each gets the same fraction of what it wants. The line with the lowest fraction is refilled first, in
portions, and no line waits until another is full. Where a line below its share finds no room, because others were
filled before it came or before their share shrank, their surplus is thrown away: the newest tickets, at both parties.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tacit.errors import InputError

PORTION_BYTES = 64 << 20
PORTION = 16
"""What is asked for at once: so many bytes or tickets, but one ticket at least."""
Line = tuple[str, int]
"""A model version's digest and a batch size."""


@dataclass(frozen=True)
class Wanted:
    """A line that is to be kept filled.

    Args:
        line: which.
        ahead: how many tickets it wants.
        ticket_bytes: what one of them takes on the disk of the party that keeps most, bob.
    """

    line: Line
    ahead: int
    ticket_bytes: int

    def __post_init__(self) -> None:
        if self.ahead < 0 or self.ticket_bytes < 1:
            raise InputError(f"{self}: give 0 tickets or more, of 1 byte or more")


@dataclass(frozen=True)
class Refill:
    """Have ``count`` tickets dealt."""

    line: Line
    count: int


@dataclass(frozen=True)
class Trim:
    """Throw the newest ``count`` tickets away, at both parties."""

    line: Line
    count: int


def targets(wanted: Iterable[Wanted], limit_bytes: int) -> dict[Line, int]:
    """How many tickets each line shall have: all it wants, or the same fraction for all that fits the limit.

    What rounding down leaves goes, ticket by ticket, to the lines whose fraction is lowest.
    """
    lines = sorted(wanted, key=lambda one: one.line)
    total = sum(one.ahead * one.ticket_bytes for one in lines)
    counts = {one.line: one.ahead * min(limit_bytes, total) // max(1, total) for one in lines}
    left = limit_bytes - sum(counts[one.line] * one.ticket_bytes for one in lines)
    for one in sorted(lines, key=lambda one: (counts[one.line] / max(1, one.ahead), one.line)):
        if counts[one.line] < one.ahead and one.ticket_bytes <= left:
            counts[one.line] += 1
            left -= one.ticket_bytes
    return counts


def next_step(
    wanted: Sequence[Wanted], levels: Mapping[Line, int], limit_bytes: int, room: int
) -> Refill | Trim | None:
    """What to do next.

    Args:
        wanted: every line that is to be kept filled.
        levels: how many tickets there are that both parties have, by line; lines that are not wanted have surplus only.
        limit_bytes: what the pool may take.
        room: what of that is free.

    Returns:
        A refill, a trim to make room for one, or nothing.
    """
    shares = targets(wanted, limit_bytes)
    low = [one for one in wanted if levels.get(one.line, 0) < shares[one.line]]
    if not low:
        return None
    lowest = min(low, key=lambda one: (levels.get(one.line, 0) / one.ahead, one.line))
    missing = shares[lowest.line] - levels.get(lowest.line, 0)
    count = min(missing, PORTION, max(1, PORTION_BYTES // lowest.ticket_bytes), room // lowest.ticket_bytes)
    if count:
        return Refill(lowest.line, count)
    surplus = {line: level - shares.get(line, 0) for line, level in levels.items() if level > shares.get(line, 0)}
    if not surplus:
        return None
    sizes = {one.line: one.ticket_bytes for one in wanted}
    largest = max(surplus, key=lambda line: (surplus[line] * sizes.get(line, 1), line))
    enough = -(-(lowest.ticket_bytes - room) // sizes[largest]) if largest in sizes else surplus[largest]
    return Trim(largest, min(surplus[largest], enough))


class Rate:
    """How many tickets of each line come in a minute while it is being refilled; times are given by the caller.

    Args:
        window_s: how long what came counts.
    """

    def __init__(self, window_s: float = 120.0) -> None:
        self._window = window_s
        self._came: dict[Line, deque[tuple[float, float, int]]] = {}

    def came(self, line: Line, count: int, began: float, now: float) -> None:
        """``count`` tickets came, which were asked for at ``began``."""
        self._came.setdefault(line, deque()).append((began, now, count))

    def per_minute(self, line: Line, now: float) -> float:
        """Tickets a minute since the oldest that count were asked for; 0 if none came lately."""
        portions = self._came.get(line, deque())
        while portions and portions[0][1] < now - self._window:
            portions.popleft()
        if not portions:
            return 0.0
        return 60.0 * sum(count for _, _, count in portions) / max(1e-3, now - portions[0][0])
