"""A party's log: one JSON object a line, of names and counts; never a value that was computed on."""

from __future__ import annotations

import json
import sys
import time
from typing import TextIO

Fact = str | int | float | bool | None


class Log:
    """Writes events.

    Args:
        party: whose log it is.
        stream: where to; standard error if not given.
    """

    def __init__(self, party: str, stream: TextIO | None = None) -> None:
        self._party, self._stream = party, stream or sys.stderr

    def __call__(self, event: str, **facts: Fact) -> None:
        """Write one event.

        Args:
            event: what happened.
            facts: names, counts and seconds. Shares, seeds, weights, inputs and results have no place here, and have
                none of these types.
        """
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        rounded = {name: round(fact, 6) if isinstance(fact, float) else fact for name, fact in facts.items()}
        self._stream.write(json.dumps({"time": stamp, "party": self._party, "event": event, **rounded}) + "\n")
        self._stream.flush()
