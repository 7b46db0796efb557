"""A run over sites as it goes on: who is there, which stage, metrics, ε, bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tacit.errors import DataError
from tacit.federated.history import RoundRecord
from tacit.report import units
from tacit.runs.folder import RunFolder
from tacit.runs.progress import Progress

EVERY = 0.5
"""Seconds between two looks."""
STALE = 120.0
"""A run that has not said anything for so long has probably died."""
LINES = 6


def watch(path: Path, once: bool = False) -> None:
    """Show a run until it ends.

    Args:
        path: of its folder.
        once: show it as it is now, and stop.

    Raises:
        DataError: it is no run over sites.
    """
    folder, console = RunFolder.open(path), Console()
    if once:
        console.print(view(path.name, Progress.read(path), folder.history(), time.time()))
        return
    with Live(console=console, refresh_per_second=4) as live:
        while True:
            progress = _patiently(path)
            live.update(view(path.name, progress, folder.history(), time.time()))
            if progress.ended:
                return
            time.sleep(EVERY)


def view(name: str, progress: Progress, history: Sequence[RoundRecord], now: float) -> RenderableType:
    """What is shown of a run.

    Args:
        name: of the run.
        progress, history: what its folder says.
        now: seconds since 1970.
    """
    last = history[-1] if history else None
    headline = f"{name}: {len(history)} of {progress.rounds} rounds"
    if progress.ended:
        headline += f"; {progress.ended}"
    elif now - progress.at > STALE and not progress.awaited:
        headline += f"; nothing heard of it for {units.duration(now - progress.at)}"
    pieces: list[RenderableType] = [
        Text(headline, style="bold"),
        Text(_figures(last, progress)),
        _sites(progress, last),
    ]
    pieces += [Text(note, style="dim") for note in progress.notes[-LINES:]]
    return Group(*pieces)


def _figures(last: RoundRecord | None, progress: Progress) -> str:
    parts = [f"round {progress.round}, {progress.stage}"] if progress.stage else []
    if last is not None:
        if last.train_loss is not None:
            parts.append(f"training loss {last.train_loss:.4f}")
        if last.accuracy is not None:
            parts.append(f"accuracy {last.accuracy:.2%}")
        if last.epsilon is not None:
            parts.append(f"ε {last.epsilon:.3g}")
        if last.secure_sum is not None:
            parts.append(f"a sum of {len(last.cohort)}, at least {last.secure_sum.minimum}")
        if last.note:
            parts.append(last.note)
    return "  ·  ".join(parts) or "not begun"


def _sites(progress: Progress, last: RoundRecord | None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("site", "now", "last round"):
        table.add_column(heading)
    for heading in ("received", "sent"):
        table.add_column(heading, justify="right")
    for index, name in enumerate(progress.names):
        state = "there" if index in progress.here else "not there"
        if index in progress.awaited:
            state = "at work" if index in progress.here else "awaited"
        elif index in progress.answered:
            state = "has answered"
        table.add_row(
            name,
            state,
            _of_last(index, last),
            units.size(progress.down.get(str(index), 0)),
            units.size(progress.up.get(str(index), 0)),
        )
    return table


def _of_last(index: int, last: RoundRecord | None) -> str:
    if last is None:
        return ""
    return "counted" if index in last.cohort else last.lost.get(index, "not invited")


def _patiently(path: Path) -> Progress:
    """What the folder says; a run that has just begun may not have said anything."""
    for _ in range(60):
        try:
            return Progress.read(path)
        except DataError:
            time.sleep(EVERY)
    return Progress.read(path)
