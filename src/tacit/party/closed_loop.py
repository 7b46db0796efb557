"""Load for a service: clients that ask, wait for the answer, and ask again; what each of their requests took."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tacit.errors import Busy, TacitError
from tacit.party.client import Client

_BUSY_S = 0.05


@dataclass(frozen=True)
class Asked:
    """One request.

    Args:
        item: which of the items was asked.
        began: when, by `time.perf_counter`.
        seconds: until its answer was put together, or it failed.
        output: the answer; ``None`` if it failed.
        error: what it failed with.
    """

    item: int
    began: float
    seconds: float
    output: Tensor | None = None
    error: str = ""


async def ask_on(
    clients: Sequence[Client],
    model: str,
    items: Sequence[Tensor],
    go_on: Callable[[int], bool],
    rest: Callable[[int], float] = lambda sent: 0.0,
) -> list[Asked]:
    """Have clients ask, each one item at a time.

    Args:
        clients: connected or not; all are before the first asks.
        model: what they ask.
        items: batches, asked in turn.
        go_on: given how many requests have been sent, says whether to send another.
        rest: given how many requests have been sent, says how long a client rests after its answer, in seconds.
    """
    numbers, asked = itertools.count(), list[Asked]()

    async def ask(client: Client) -> None:
        while go_on(number := next(numbers)):
            item, began = number % len(items), time.perf_counter()
            try:
                output = await client.ask(model, items[item])
            except TacitError as error:
                asked.append(Asked(item, began, time.perf_counter() - began, error=type(error).__name__))
                await asyncio.sleep(min(1.0, error.retry_after or _BUSY_S) if isinstance(error, Busy) else _BUSY_S)
                continue
            asked.append(
                Asked(item, began, time.perf_counter() - began, output if isinstance(output, Tensor) else None)
            )
            if seconds := rest(number + 1):
                await asyncio.sleep(seconds)

    await asyncio.gather(*(client.describe(model) for client in clients))
    await asyncio.gather(*(ask(client) for client in clients))
    return asked


def quantile(asked: Sequence[Asked], share: float) -> float:
    """The latency that this share of the answered requests did not exceed; 0 if there were none."""
    times = sorted(one.seconds for one in asked if one.output is not None)
    if len(times) < 2:
        return times[0] if times else 0.0
    return statistics.quantiles(times, n=1000, method="inclusive")[round(share * 1000) - 1]


def per_second(asked: Sequence[Asked]) -> float:
    """Answered requests a second, from the first that was sent to the last answer."""
    answered = [one for one in asked if one.output is not None]
    if not answered:
        return 0.0
    return len(answered) / (max(one.began + one.seconds for one in answered) - min(one.began for one in asked))
