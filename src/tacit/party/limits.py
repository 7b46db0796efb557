"""How much one client may ask: a rate and a size; time is passed in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one client may ask of the service.

    Args:
        requests_per_minute: on average; a minute's worth may come at once. ``None`` for any number.
        largest_batch: rows in one request; ``None`` for as many as the largest planned batch has.
    """

    requests_per_minute: float | None = None
    largest_batch: int | None = None


class Rate:
    """A token bucket that holds a minute's worth of requests.

    Args:
        per_minute: how many requests a minute; ``None`` for any number.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._per_minute = per_minute
        self._left = per_minute or 0.0
        self._since: float | None = None

    def take(self, now: float) -> float:
        """Take a token for a request that comes now.

        Returns:
            0 if there was one; else the seconds until there will be, and none was taken.
        """
        if self._per_minute is None:
            return 0.0
        since = now if self._since is None else self._since
        self._since = max(since, now)
        self._left = min(max(1.0, self._per_minute), self._left + (self._since - since) * self._per_minute / 60)
        if self._left >= 1:
            self._left -= 1
            return 0.0
        return (1 - self._left) * 60 / self._per_minute
