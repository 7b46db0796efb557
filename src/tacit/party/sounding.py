"""How far away the other party is, beside what the plans were made for; times are given by the caller."""

from __future__ import annotations

from collections import deque

WINDOW = 60
"""Of so many round trips, the quickest counts: the others waited for a busy process."""
_ENOUGH = 30
_TIMES = 2.0
_SLACK_S = 0.002
"""A difference that a busy process alone may make."""


class Sounding:
    """Round trips of small messages.

    Args:
        planned_s: the round trip that `cluster.toml` states.
    """

    def __init__(self, planned_s: float) -> None:
        self._planned, self._told = planned_s, False
        self._number, self._sent = 0, 0.0
        self._seconds: deque[float] = deque(maxlen=WINDOW)

    def send(self, now: float) -> int:
        """A message leaves, with this number; an earlier one that has not come back does not count."""
        self._number, self._sent = self._number + 1, now
        return self._number

    def returned(self, now: float, number: int) -> None:
        """A message with a number has come back."""
        if number == self._number:
            self._seconds.append(now - self._sent)

    @property
    def round_trip(self) -> float | None:
        """The quickest of the last, in seconds."""
        return min(self._seconds, default=None)

    def surprise(self) -> float | None:
        """The round trip if it is another than planned, once: half of it or less, or twice as much or more."""
        found = self.round_trip
        if self._told or found is None or len(self._seconds) < _ENOUGH:
            return None
        low, high = sorted((found, self._planned))
        self._told = high >= _TIMES * low and high - low > _SLACK_S
        return found if self._told else None
