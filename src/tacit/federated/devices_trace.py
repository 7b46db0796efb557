"""When devices are available, read from a trace of real ones."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from tacit.errors import DataError, InputError
from tacit.federated.eligibility import FleetStatus

REQUIRED = ("device", "start", "end")
FLAGS = ("idle", "charging", "unmetered")
OPTIONAL = (*FLAGS, "battery", "offset")

MOST_DEVICES = 10**8
"""A larger device number is taken for a mistake."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Intervals in which devices were online, and what they were like; outside of them a device is offline.

    The rows of device i are those from ``first[i]`` up to ``first[i + 1]``, ordered by start, disjoint.

    Args:
        first: int64, shape ``(N + 1,)``.
        start: seconds, float64, shape ``(R,)``.
        end: seconds, beyond ``start``; a row holds from its start up to but not including its end.
        idle: bool, shape ``(R,)``.
        charging: likewise.
        unmetered: likewise.
        battery: float64 in [0, 1], shape ``(R,)``.
        offset: hours from UTC of the row's local time, float64, shape ``(R,)``.
        period: if not ``None``, the trace repeats after so many seconds.
    """

    first: Tensor
    start: Tensor
    end: Tensor
    idle: Tensor
    charging: Tensor
    unmetered: Tensor
    battery: Tensor
    offset: Tensor
    period: float | None = None

    @property
    def clients(self) -> int:
        """N, how many devices."""
        return len(self.first) - 1

    @classmethod
    def read(cls, path: Path, clients: int | None = None, period: float | None = None) -> Trace:
        """Read a trace from a CSV file (UTF-8, comma-separated, one header line).

        Columns, in any order: ``device`` (0 to N − 1), ``start`` and ``end`` (seconds since midnight UTC of the
        first day, start before end); and where wanted ``idle``, ``charging``, ``unmetered`` (0 or 1; 1 if the
        column is missing), ``battery`` (0 to 1; missing: 1), ``offset`` (local time's hours from UTC; missing: 0).
        Rows come in any order; those of one device do not overlap. Devices without a row are always offline.

        Args:
            path: the file.
            clients: N; ``None`` is one more than the greatest device.
            period: repeat the trace after so many seconds, such as a week's 604,800.

        Raises:
            DataError: the file cannot be read, or a line is not as described; the message names the line.
            InputError: ``clients`` or ``period`` is not positive.
        """
        if clients is not None and clients < 1:
            raise InputError(f"clients={clients}: a fleet has 1 device or more")
        if period is not None and not (period > 0 and math.isfinite(period)):
            raise InputError(f"period={period}: repeat the trace after a number of seconds above 0, or give None")
        rows = sorted(_rows(path, clients, period), key=lambda row: (row.device, row.start))
        for before, row in pairwise(rows):
            if before.device == row.device and row.start < before.end:
                both = f"overlaps line {before.line}, both of device {row.device}"
                _refuse(path, row.line, both)
        devices = torch.tensor([row.device for row in rows])
        count = clients or rows[-1].device + 1
        first = torch.zeros(count + 1, dtype=torch.int64)
        first[1:] = devices.bincount(minlength=count).cumsum(0)
        idle, charging, unmetered = (torch.tensor([row.flags[flag] for row in rows]) for flag in range(len(FLAGS)))
        return cls(
            first=first,
            start=torch.tensor([row.start for row in rows], dtype=torch.float64),
            end=torch.tensor([row.end for row in rows], dtype=torch.float64),
            idle=idle,
            charging=charging,
            unmetered=unmetered,
            battery=torch.tensor([row.battery for row in rows], dtype=torch.float64),
            offset=torch.tensor([row.offset for row in rows], dtype=torch.float64),
            period=period,
        )

    def status(self, devices: Tensor, time: Tensor) -> FleetStatus:
        """The status of ``devices`` (int64, shape ``(M,)``) at ``time`` (seconds, float64, the same shape)."""
        now = self._within_period(time)
        row = self._latest(devices, now)
        known = row >= self.first[devices]
        row = row.clamp(min=0)
        online = known & (now < self.end[row])
        hour = (time / 3600.0 + torch.where(known, self.offset[row], 0.0)) % 24.0
        return FleetStatus(
            idle=online & self.idle[row],
            charging=online & self.charging[row],
            unmetered=online & self.unmetered[row],
            hour=hour,
            battery=torch.where(online, self.battery[row], 0.0),
            online=online,
        )

    def next_change(self, devices: Tensor, time: Tensor) -> Tensor:
        """Until when, at least, the status of each of ``devices`` stays what it is at ``time``; maybe infinity."""
        now = self._within_period(time)
        row = self._latest(devices, now)
        ending = torch.where(row >= self.first[devices], self.end[row.clamp(min=0)], -torch.inf)
        following = row + 1
        exists = following < self.first[devices + 1]
        starting = torch.where(exists, self.start[following.clamp(max=len(self.start) - 1)], torch.inf)
        change = torch.where(ending > now, torch.minimum(ending, starting), starting)
        if self.period is not None:
            change = change.clamp(max=self.period)
        return torch.maximum(time + (change - now), torch.nextafter(time, torch.full_like(time, torch.inf)))

    def _within_period(self, time: Tensor) -> Tensor:
        return time if self.period is None else time % self.period

    def _latest(self, devices: Tensor, time: Tensor) -> Tensor:
        """The last row of each device that starts at or before ``time``; the one before its first if none does."""
        low, high = self.first[devices], self.first[devices + 1]
        # Bisection for all at once: rows below `low` start in time, rows from `high` on do not.
        while bool((low < high).any()):
            middle = (low + high) // 2
            in_time = (low < high) & (self.start[middle.clamp(max=len(self.start) - 1)] <= time)
            high = torch.where((low < high) & ~in_time, middle, high)
            low = torch.where(in_time, middle + 1, low)
        return low - 1


@dataclass(frozen=True)
class _Row:
    line: int
    device: int
    start: float
    end: float
    flags: tuple[bool, ...]
    battery: float
    offset: float


def _rows(path: Path, clients: int | None, period: float | None) -> list[_Row]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file, strict=True)
            columns = _columns(path, next(reader, []))
            rows = [_row(path, reader.line_num, columns, cells, clients, period) for cells in reader if cells]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): name the CSV file of a trace") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: a trace is a CSV file") from error
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file ({error}): see Trace.read for the format") from error
    if not rows:
        raise DataError(f"{path} has no row after its header: a trace needs at least one interval")
    return rows


def _columns(path: Path, header: list[str]) -> list[str]:
    columns = [cell.strip() for cell in header]
    missing = [name for name in REQUIRED if name not in columns]
    unknown = [name for name in columns if name not in (*REQUIRED, *OPTIONAL)]
    if missing or unknown or len(set(columns)) < len(columns):
        known = f"{', '.join(REQUIRED)}, and of {', '.join(OPTIONAL)} those wanted"
        _refuse(path, 1, f"has the columns {', '.join(columns) or 'none'}, expected {known}, each once")
    return columns


def _row(
    path: Path, line: int, columns: list[str], cells: list[str], clients: int | None, period: float | None
) -> _Row:
    if len(cells) != len(columns):
        _refuse(path, line, f"has {len(cells)} fields, expected {len(columns)}")
    values = {}
    for name, cell in zip(columns, cells, strict=True):
        try:
            values[name] = float(cell)
        except ValueError:
            _refuse(path, line, f"has {name} {cell!r}, expected a number")
    device, start, end = (values[name] for name in REQUIRED)
    battery, offset = values.get("battery", 1.0), values.get("offset", 0.0)
    count = MOST_DEVICES if clients is None else clients
    if not (0 <= device < count and device.is_integer()):
        _refuse(path, line, f"has device {device:g}, expected a whole number from 0 to {count - 1}")
    if not (0 <= start < end and math.isfinite(end)):
        _refuse(path, line, f"lasts from {start:g} to {end:g}, expected 0 or later and the start before the end")
    if period is not None and end > period:
        _refuse(path, line, f"ends at {end:g}, expected no later than the period, {period:g}")
    for name in FLAGS:
        if values.get(name, 1.0) not in (0.0, 1.0):
            _refuse(path, line, f"has {name} {values[name]:g}, expected 0 or 1")
    if not 0 <= battery <= 1:
        _refuse(path, line, f"has battery {battery:g}, expected 0 to 1")
    if not -12 <= offset <= 14:
        _refuse(path, line, f"has offset {offset:g}, expected -12 to 14 hours from UTC")
    flags = tuple(bool(values.get(name, 1.0)) for name in FLAGS)
    return _Row(line, int(device), start, end, flags, battery, offset)


def _refuse(path: Path, line: int, fault: str) -> NoReturn:
    raise DataError(f"{path}, line {line} {fault}: correct the trace")
