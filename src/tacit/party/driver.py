"""The driver of protocols that a party's process uses: openings cross a link, correlations come from a pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, TypeVar

from tacit.errors import CorrelationError
from tacit.mpc.correlation import Correlation, Part
from tacit.mpc.lockstep import Meter
from tacit.mpc.steps import Enter, Open, Protocol, Take
from tacit.party.transport import Link

T = TypeVar("T")


class Pool:
    """What was dealt to a party and not used yet, in the order of use."""

    def __init__(self) -> None:
        self._parts: deque[tuple[Correlation, Part]] = deque()

    def put(self, correlation: Correlation, part: Part) -> None:
        """Add the next part."""
        self._parts.append((correlation, part))

    def take(self, correlation: Correlation) -> Part:
        """This party's part of ``correlation``, which leaves the pool.

        Raises:
            CorrelationError: nothing is left, or another correlation is next, in which case the rest is thrown away.
        """
        if not self._parts:
            raise CorrelationError(f"no dealt correlation is left for {correlation}: deal first")
        dealt, part = self._parts.popleft()
        if dealt != correlation:
            self.discard()
            raise CorrelationError(
                f"the next dealt correlation is {dealt}, not {correlation}; the rest was thrown away"
            )
        return part

    def discard(self) -> None:
        """Throw everything away; what half a run used must not serve another."""
        self._parts.clear()

    def __len__(self) -> int:
        return len(self._parts)


class LazyPool(Pool):
    """The same, worked out as it is used, so that little of it is in memory at any time.

    Args:
        parts: what was dealt, in the order of use.
    """

    def __init__(self, parts: Iterator[tuple[Correlation, Part]]) -> None:
        super().__init__()
        self._rest = parts

    def take(self, correlation: Correlation) -> Part:
        """This party's part of ``correlation``; see `Pool.take`."""
        if (following := next(self._rest, None)) is not None:
            self.put(*following)
        return super().take(correlation)

    def discard(self) -> None:
        """Throw everything away."""
        super().discard()
        self._rest = iter(())


class Watch(Meter):
    """A meter that counts rounds alone and, given a clock, the layers' time: what else a run costs has been planned."""

    def enter(self, label: str) -> None:
        """What follows belongs to another layer."""
        if self.clock:
            super().enter(label)

    def took(self, correlation: Correlation) -> None:
        """Not counted: the pool hands out what was planned and nothing else."""

    def opened(self, step: Open) -> None:
        """A round."""
        self._stop_clock()
        self.rounds += 1


def drive(protocol: Protocol[T], pool: Pool, link: Link, meter: Meter) -> T:
    """Run one party's protocol, the other party's running at the other end of ``link``.

    Args:
        protocol: the generator on this party's shares.
        pool: where dealt correlations are taken from.
        link: to the other party.
        meter: counts the cost; its clock stands still while the link is at work.

    Raises:
        PeerError: the other party is gone or at another step.
        CorrelationError: the pool does not hold what the protocol takes; the rest of the pool is thrown away.
    """
    meter.start_clock()
    answer: Any = None
    try:
        while True:
            try:
                step = protocol.send(answer)
            except StopIteration as stop:
                meter.enter("")
                result: T = stop.value
                return result
            answer = None
            if isinstance(step, Open):
                meter.opened(step)
                answer = link.exchange(step.values)
                meter.start_clock()
            elif isinstance(step, Take):
                meter.took(step.correlation)
                answer = pool.take(step.correlation)
            elif isinstance(step, Enter):
                meter.enter(step.label)
    except BaseException:
        pool.discard()
        raise
