"""Simulated devices: when they are eligible, how fast they are, and whether they get to the end of their work.

Everything is a pure function of a seed, the device and the time in seconds since the simulation began (midnight
UTC of day 0), for any number of devices at once. Nobody's timeline is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tacit.errors import InputError
from tacit.federated.devices_draws import normal, uniform
from tacit.federated.devices_habits import Habits
from tacit.federated.eligibility import DAY, HOUR, Eligibility, FleetStatus

PIECE = 1 << 14
"""Devices looked at together, so that what is computed for them stays in a core's cache."""


class Timeline(Protocol):
    """What each device is like at each time: piecewise constant, but for the local time.

    `Habits` is a model, `tacit.federated.devices_trace.Trace` a record, `AlwaysOn` a machine room.
    """

    @property
    def clients(self) -> int:
        """N, how many devices."""
        ...

    def status(self, devices: Tensor, time: Tensor) -> FleetStatus:
        """The status of ``devices`` (int64, shape ``(M,)``) at ``time`` (seconds, float64, the same shape)."""
        ...

    def next_change(self, devices: Tensor, time: Tensor) -> Tensor:
        """Until when, at least, the status stays as it is at ``time``: later than that, maybe infinity."""
        ...


@dataclass(frozen=True)
class AlwaysOn:
    """``clients`` devices that are idle, charging and on an unmetered network at all times, in UTC."""

    clients: int

    def status(self, devices: Tensor, time: Tensor) -> FleetStatus:
        """See `Timeline`."""
        yes, full = torch.ones_like(devices, dtype=torch.bool), torch.ones_like(time)
        return FleetStatus(yes, yes, yes, (time / HOUR) % 24.0, full, yes)

    def next_change(self, devices: Tensor, time: Tensor) -> Tensor:
        """See `Timeline`."""
        return torch.full_like(time, torch.inf)


@dataclass(frozen=True)
class Speeds:
    """How long work takes: every device has log-normal speeds of its own.

    A spread of 1, the standard deviation of the logarithm, puts two orders of magnitude between the slowest and
    the fastest hundredth, as in production (Huba et al. 2022, *Papaya: Practical, Private, and Scalable Federated
    Learning*, on the time that clients take). The medians are round numbers: set those of your model and network.

    Args:
        examples: median examples that a device trains on in a second, forward and backward.
        down: median bytes a second that it receives.
        up: median bytes a second that it sends.
        compute_spread: of ``examples``.
        link_spread: of ``down`` and ``up``, which a device has both good or both bad.
        jitter: standard deviation of the logarithm of a round's time, from round to round.
        overhead: seconds that each round takes beside these.
        failures: how often a device fails while it works (crash, lost connection), per hour.

    Raises:
        InputError: a speed is not positive, or another setting is negative.
    """

    examples: float = 100.0
    down: float = 2e6
    up: float = 5e5
    compute_spread: float = 1.0
    link_spread: float = 1.0
    jitter: float = 0.2
    overhead: float = 1.0
    failures: float = 0.2

    def __post_init__(self) -> None:
        for name in ("examples", "down", "up"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise InputError(f"{name}={getattr(self, name)}: give a median speed above 0")
        for name in ("compute_spread", "link_spread", "jitter", "overhead", "failures"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise InputError(f"{name}={getattr(self, name)}: give 0 or more")


@dataclass(frozen=True, eq=False)
class Attempts:
    """What became of work that devices began.

    Args:
        end: when each finished or dropped out, in seconds, float64 of shape ``(M,)``.
        finished: which ones finished, bool of shape ``(M,)``.
        failed: which of the others failed; the rest stopped being eligible.
    """

    end: Tensor
    finished: Tensor
    failed: Tensor


@dataclass(frozen=True, eq=False)
class Fleet:
    """N simulated devices.

    Args:
        timeline: what each device is like at each time.
        policy: which status a device must have to train; the same object gates real sites.
        speeds: how fast they are.
        seed: of the speeds and failures.
    """

    timeline: Timeline
    policy: Eligibility = field(default_factory=Eligibility)
    speeds: Speeds = field(default_factory=Speeds)
    seed: int = 0

    @classmethod
    def of_phones(
        cls, clients: int, seed: int = 0, policy: Eligibility | None = None, speeds: Speeds | None = None
    ) -> Fleet:
        """``clients`` phones in the United States with the model's `Habits`.

        Raises:
            InputError: ``clients`` is not positive.
        """
        return cls(Habits(clients, seed), policy or Eligibility(), speeds or Speeds(), seed)

    @property
    def clients(self) -> int:
        """N."""
        return self.timeline.clients

    def eligible(self, time: float, clients: Tensor | None = None) -> Tensor:
        """Which of ``clients`` (int64; ``None`` is all of them) may train at ``time``: bool, shape ``(M,)``."""
        devices = torch.arange(self.clients) if clients is None else clients
        return torch.cat([self._eligible(piece, _times(time, piece)) for piece in torch.split(devices, PIECE)])

    def availability(self, start: float = 0.0, span: float = 2 * DAY, samples: int = 24) -> Tensor:
        """The fraction of the time that each device is eligible, float64 of shape ``(N,)``.

        Estimated at ``samples`` times, evenly spread over ``span`` seconds from ``start`` on.
        """
        count = torch.zeros(self.clients, dtype=torch.float64)
        for sample in range(samples):
            count += self.eligible(start + span * sample / samples)
        return count / samples

    def eligible_until(self, clients: Tensor, start: float | Tensor, limit: float | Tensor) -> Tensor:
        """When each of ``clients`` stops being eligible if watched from ``start`` for at most ``limit`` seconds.

        ``start`` itself for one that is not eligible then; ``start + limit`` for one that stays so.
        """
        time = _times(start, clients)
        horizon = time + limit
        return torch.minimum(self._advance(clients, time, horizon, while_eligible=True), horizon)

    def next_eligible(self, clients: Tensor, start: float | Tensor, limit: float = 7 * DAY) -> Tensor:
        """When each of ``clients`` is eligible next, ``start`` included; infinity if not within ``limit`` seconds.

        Raises:
            InputError: ``limit`` is not finite.
        """
        if not math.isfinite(limit):
            raise InputError(f"limit={limit}: give a number of seconds, since some devices are never eligible")
        time = _times(start, clients)
        horizon = time + limit
        found = self._advance(clients, time, horizon, while_eligible=False)
        return torch.where(found < horizon, found, torch.inf)

    def durations(self, clients: Tensor, examples: Tensor, bytes_down: int, bytes_up: int, round: int) -> Tensor:
        """Seconds that each of ``clients`` takes for one round, from the invitation to the arrival of its update.

        Args:
            clients: int64, shape ``(M,)``.
            examples: how many examples each trains on, epochs counted, shape ``(M,)``.
            bytes_down: what each receives.
            bytes_up: what each sends.
            round: the round or, for asynchronous training, the device's task: its jitter depends on it.

        Returns:
            float64, shape ``(M,)``.
        """
        speeds = self.speeds
        compute = (speeds.compute_spread * normal(self.seed, "compute speed", clients)).exp()
        link = (speeds.link_spread * normal(self.seed, "link speed", clients)).exp()
        jitter = (speeds.jitter * normal(self.seed, "jitter", clients, torch.tensor(round))).exp()
        training = examples / (speeds.examples * compute)
        transfer = (bytes_down / speeds.down + bytes_up / speeds.up) / link
        return speeds.overhead + jitter * (training + transfer)

    def attempt(self, clients: Tensor, start: float | Tensor, durations: Tensor, round: int) -> Attempts:
        """Let ``clients`` work from ``start`` for ``durations`` seconds (float64, shape ``(M,)``).

        A device drops out when it stops being eligible, or fails, before it is done.
        """
        begin = _times(start, clients)
        done = begin + durations
        failure = torch.full_like(begin, torch.inf)
        if self.speeds.failures > 0:
            luck = uniform(self.seed, "failure", clients, torch.tensor(round))
            failure = begin - luck.log() * HOUR / self.speeds.failures
        stop = self.eligible_until(clients, begin, durations)
        finished = (done <= stop) & (done <= failure)
        return Attempts(
            torch.where(finished, done, torch.minimum(stop, failure)), finished, ~finished & (failure < stop)
        )

    def _eligible(self, devices: Tensor, time: Tensor) -> Tensor:
        return self.policy.mask(self.timeline.status(devices, time))

    def _advance(self, devices: Tensor, time: Tensor, horizon: Tensor, while_eligible: bool) -> Tensor:
        """Move each device's time from change to change for as long as its eligibility is ``while_eligible``."""
        time = time.clone()
        moving = torch.arange(len(devices))
        while len(moving):
            status = self.timeline.status(devices[moving], time[moving])
            goes_on = (self.policy.mask(status) == while_eligible) & (time[moving] < horizon[moving])
            moving = moving[goes_on]
            change = self.timeline.next_change(devices[moving], time[moving])
            boundary = time[moving] + self.policy.next_boundary(status.hour[goes_on])
            time[moving] = torch.minimum(change, boundary)
        return time


def _times(time: float | Tensor, devices: Tensor) -> Tensor:
    return torch.as_tensor(time, dtype=torch.float64).expand(devices.shape)
