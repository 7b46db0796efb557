"""When simulated phones are idle, charging and at home: people's habits, as a function of device and time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tacit.errors import InputError
from tacit.federated.devices_draws import normal, uniform
from tacit.federated.eligibility import DAY, HOUR, FleetStatus

SLOT = 600.0
"""Seconds for which a device's status stays the same."""

UNITED_STATES = {-5.0: 0.476, -6.0: 0.291, -7.0: 0.067, -8.0: 0.166}
"""The four time zones of the contiguous states, as hours from UTC, with about their share of the population."""

IN_USE_AT_NIGHT = (0.10, 0.05, 0.03, 0.02, 0.02, 0.04, 0.12, 0.22)
IN_USE_BY_DAY = (0.25, 0.25, 0.25, 0.27, 0.30, 0.28, 0.27, 0.28)
IN_USE_IN_THE_EVENING = (0.30, 0.33, 0.36, 0.38, 0.40, 0.38, 0.30, 0.20)
IN_USE = (*IN_USE_AT_NIGHT, *IN_USE_BY_DAY, *IN_USE_IN_THE_EVENING)
"""The average probability that a phone is in use, for each hour of the local day."""


@dataclass(frozen=True)
class Habits:
    """A generative model of availability; time 0 is midnight UTC.

    Everything is drawn by hashing ``seed`` with the device and, where it varies, the local day or the slot of
    ten minutes, so a status costs no memory and does not depend on earlier questions:

    - *time zone*: from ``zones``.
    - *charging*: 12 % of devices always. The others overnight on a device's own fraction of nights, U(0.56, 1),
      from 22:30 ± 1.2 h (a device's habit) ± 0.75 h (from day to day) for 7.5 ± 1.2 h; and on three of four days
      once more, from a time between 8:00 and 20:00 on, for half an hour to 4 hours.
    - *unmetered*: 5 % of devices never, 60 % always (Wi-Fi at home and at work); others at home, from
      18:00 ± 1.5 h (habit) ± 0.75 h (day) to 8:00 ± 1 h ± 0.5 h.
    - *in use*: in each slot with the probability `IN_USE` of the hour, times the device's own log-normal factor.
    - *battery*: 50 % when plugged in for the night and 50 % more an hour; 5 % an hour less from 8:00 on.

    The shape follows what large deployments report: devices are idle, charging and on Wi-Fi mostly at night, so
    that participation swings with the local day (in one country's population by about four times, Bonawitz et
    al. 2019, section 9; here by seven), and few devices do most of the work (Yang et al. 2021, *Characterizing
    Impacts of Heterogeneity in Federated Learning upon Large-Scale Smartphone Data*). The constants are round
    numbers chosen for that shape, not fitted to a trace; for results that hang on availability, use
    `tacit.federated.devices_trace.Trace`.

    Args:
        clients: N, how many devices.
        seed: of every draw.
        zones: hours from UTC of each time zone, and its share of the devices; the shares are normalised.

    Raises:
        InputError: ``clients`` is not positive, or ``zones`` has no positive share or an impossible offset.
    """

    clients: int
    seed: int = 0
    zones: Mapping[float, float] = field(default_factory=lambda: UNITED_STATES)

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise InputError(f"clients={self.clients}: a fleet has 1 device or more")
        shares = self.zones.values()
        if not (shares and all(share >= 0 and math.isfinite(share) for share in shares) and sum(shares) > 0):
            raise InputError(f"zones={dict(self.zones)}: give each time zone a share, such as {{-5.0: 0.5, -8.0: 0.5}}")
        if not all(-12 <= offset <= 14 for offset in self.zones):
            raise InputError(f"zones={dict(self.zones)}: time zones are from -12 to 14 hours from UTC")

    def status(self, devices: Tensor, time: Tensor) -> FleetStatus:
        """The status of ``devices`` (int64, shape ``(M,)``) at ``time`` (seconds, float64, the same shape)."""
        slot, phase = self._slot(devices, time)
        local = (slot - phase) * SLOT + self._offset(devices) * HOUR
        day = (local / DAY).floor().long()
        hour = local / HOUR - 24.0 * day
        since_plugged, charging = self._charging(devices, day, hour)
        charged = (0.5 + 0.5 * since_plugged).clamp(0.5, 1.0)
        drained = (1.0 - 0.05 * (hour - 8.0)).clamp(0.2, 1.0)
        return FleetStatus(
            idle=~self._in_use(devices, slot.long(), hour),
            charging=charging,
            unmetered=self._at_home(devices, day, hour),
            hour=hour,
            battery=torch.where(charging, charged, drained),
            online=torch.ones_like(charging),
        )

    def next_change(self, devices: Tensor, time: Tensor) -> Tensor:
        """Until when, at least, the status of each of ``devices`` stays what it is at ``time``."""
        slot, phase = self._slot(devices, time)
        return torch.maximum((slot + 1 - phase) * SLOT, torch.nextafter(time, torch.full_like(time, torch.inf)))

    def _slot(self, devices: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The number of each device's slot at ``time``, and where its slots begin, so that not all do at once."""
        phase = uniform(self.seed, "phase", devices)
        return (time / SLOT + phase).floor(), phase

    def _offset(self, devices: Tensor) -> Tensor:
        """Hours from UTC."""
        if len(self.zones) == 1:
            return torch.full(devices.shape, next(iter(self.zones)), dtype=torch.float64)
        shares = torch.tensor(list(self.zones.values()), dtype=torch.float64)
        ends = shares.cumsum(0)[:-1] / shares.sum()
        zone = torch.bucketize(uniform(self.seed, "zone", devices), ends)
        return torch.tensor(list(self.zones), dtype=torch.float64)[zone]

    def _charging(self, devices: Tensor, day: Tensor, hour: Tensor) -> tuple[Tensor, Tensor]:
        """Hours since the device was plugged in for the night, and whether it is charging now."""
        # Afternoons belong to the coming night, mornings to the night that began the day before.
        evening = hour >= 15
        night = torch.where(evening, day, day - 1)
        clock = torch.where(evening, hour, hour + 24.0)
        habit = 22.5 + 1.2 * normal(self.seed, "plug-in habit", devices)
        start = habit + 0.75 * normal(self.seed, "plug-in", devices, night)
        length = (7.5 + 1.2 * normal(self.seed, "charging length", devices, night)).clamp(2.0, 11.0)
        regular = uniform(self.seed, "charging nights", devices)
        since = clock - start
        plugged = (since >= 0) & (since < length) & (uniform(self.seed, "night", devices, night) < 0.5 + 0.5 * regular)
        top_up = 8.0 + 12.0 * uniform(self.seed, "top-up", devices, day)
        # One number says whether there is a top-up (below 0.75) and how long it lasts.
        luck = uniform(self.seed, "top-up length", devices, day)
        topping = (luck < 0.75) & (hour >= top_up) & (hour < top_up + 0.5 + luck * 14 / 3)
        return since, plugged | topping | (regular < 0.12)

    def _at_home(self, devices: Tensor, day: Tensor, hour: Tensor) -> Tensor:
        """Whether the device is on Wi-Fi."""
        kind = uniform(self.seed, "network", devices)
        home = 18.0 + 1.5 * normal(self.seed, "home habit", devices) + 0.75 * normal(self.seed, "home", devices, day)
        leave = 8.0 + normal(self.seed, "leave habit", devices) + 0.5 * normal(self.seed, "leave", devices, day)
        return (kind >= 0.05) & ((kind < 0.65) | (hour >= home) | (hour < leave))

    def _in_use(self, devices: Tensor, slot: Tensor, hour: Tensor) -> Tensor:
        average = torch.tensor(IN_USE, dtype=torch.float64)[hour.long()]
        activity = (0.5 * normal(self.seed, "activity", devices) - 0.125).exp()  # of mean 1
        return uniform(self.seed, "in use", devices, slot) < average * activity
