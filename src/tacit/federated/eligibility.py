"""When a device may train: one policy, for simulated fleets and for real sites."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from tacit.errors import InputError

HOUR = 3600.0
DAY = 24 * HOUR


@dataclass(frozen=True)
class DeviceStatus:
    """What one device, or one site, says of itself at a moment.

    Args:
        idle: nobody is using it.
        charging: it draws power from the mains.
        unmetered: its network is not paid for by volume.
        hour: the local time, in hours from midnight, in [0, 24).
        battery: how full its battery is, in [0, 1]; 1 for a machine without one.
        online: it can be reached at all.

    Raises:
        InputError: ``hour`` or ``battery`` is out of range.
    """

    idle: bool
    charging: bool
    unmetered: bool
    hour: float
    battery: float = 1.0
    online: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.hour < 24:
            raise InputError(f"hour={self.hour}: give the local time in hours, from 0 and below 24")
        if not 0 <= self.battery <= 1:
            raise InputError(f"battery={self.battery}: give a fraction from 0 to 1")


@dataclass(frozen=True, eq=False)
class FleetStatus:
    """The fields of `DeviceStatus` for M devices: bool and float64 tensors of shape ``(M,)``."""

    idle: Tensor
    charging: Tensor
    unmetered: Tensor
    hour: Tensor
    battery: Tensor
    online: Tensor

    def __getitem__(self, device: int) -> DeviceStatus:
        """The status of one of them."""
        return DeviceStatus(
            idle=bool(self.idle[device]),
            charging=bool(self.charging[device]),
            unmetered=bool(self.unmetered[device]),
            hour=float(self.hour[device]),
            battery=float(self.battery[device]),
            online=bool(self.online[device]),
        )


@dataclass(frozen=True)
class Eligibility:
    """What a device must be for it to train: by default idle, charging and on an unmetered network.

    These are the conditions of the first large deployment (Bonawitz et al. 2019, *Towards Federated Learning at
    Scale: System Design*, section 3). A device that is offline is never eligible.

    Args:
        idle: it must not be in use.
        charging: it must be charging.
        unmetered: it must be on an unmetered network.
        hours: local hours (from, to) within which it may train, such as ``(22, 6)``, which passes midnight;
            ``None`` is at any time.
        battery: how full its battery must at least be, in [0, 1].

    Raises:
        InputError: ``hours`` or ``battery`` is out of range.
    """

    idle: bool = True
    charging: bool = True
    unmetered: bool = True
    hours: tuple[float, float] | None = None
    battery: float = 0.0

    def __post_init__(self) -> None:
        if self.hours is not None:
            start, end = self.hours
            if not (0 <= start < 24 and 0 <= end <= 24 and start != end):
                raise InputError(f"hours={self.hours}: give two different local hours from 0 to 24, such as (22, 6)")
        if not 0 <= self.battery <= 1:
            raise InputError(f"battery={self.battery}: give the least fraction of a full battery, from 0 to 1")

    def allows(self, status: DeviceStatus) -> bool:
        """Whether a device in this status may train."""
        return not self.refusals(status)

    def refusals(self, status: DeviceStatus) -> tuple[str, ...]:
        """Why a device in this status may not train, each reason in words; empty if it may."""
        return tuple(reason for reason, met in self._conditions(status) if not met)

    def mask(self, status: FleetStatus) -> Tensor:
        """Which devices may train: bool, shape ``(M,)``, the answer of `allows` for each."""
        allowed: Tensor = reduce(torch.logical_and, (met for _, met in self._conditions(status)))
        return allowed

    def next_boundary(self, hour: Tensor) -> Tensor:
        """Seconds from local times ``hour`` (hours, shape ``(M,)``) until the allowed hours begin or end next."""
        if self.hours is None:
            return torch.full_like(hour, torch.inf)
        ahead = [(boundary - hour) % 24 for boundary in self.hours]
        seconds = torch.minimum(*(torch.where(hours > 0, hours, 24.0) for hours in ahead)) * HOUR
        return seconds.clamp(min=1e-3)  # rounding must not stop a clock that moves from boundary to boundary

    def _conditions(self, status: DeviceStatus | FleetStatus) -> list[tuple[str, Any]]:
        """Every condition that this policy sets: the reason if it is not met, and whether it is."""
        conditions: list[tuple[str, Any]] = [("offline", status.online)]
        if self.idle:
            conditions.append(("in use", status.idle))
        if self.charging:
            conditions.append(("not charging", status.charging))
        if self.unmetered:
            conditions.append(("on a metered network", status.unmetered))
        if self.hours is not None:
            start, end = self.hours
            late, early = status.hour >= start, status.hour < end
            met = late & early if start < end else late | early
            conditions.append((f"outside the hours {start:g} to {end:g}", met))
        if self.battery > 0:
            conditions.append((f"battery below {self.battery:.0%}", status.battery >= self.battery))
        return conditions
