"""Whose requests may be begun before both parties are known to have their shares; time is passed in."""

from __future__ import annotations

_LATE_S = 1.0
_MOST_S = 10.0


class Promptness:
    """How much later than here a client's shares come to the other party.

    Args:
        limit_s: up to this, on average, a client is prompt.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit = limit_s
        self._lags: dict[str, float] = {}

    def came(self, client: str, lag_s: float) -> None:
        """The other party had a share so long after this one; 0 if before."""
        before = self._lags.get(client, lag_s)
        self._lags[client] = before + (min(lag_s, _MOST_S) - before) / 4

    def late(self, client: str) -> None:
        """A share did not come in time: it takes many that do until the client is prompt again."""
        self._lags[client] = self._lags.get(client, 0.0) + _LATE_S

    def is_prompt(self, client: str) -> bool:
        """Whether what it sends may be counted on; not before it has been seen once."""
        return self._lags.get(client, _LATE_S) <= self._limit
