"""A bar for a training as it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tacit.federated.history import RoundRecord
from tacit.runs import listing
from tacit.runs.experiment import Experiment
from tacit.runs.train import OnBoard, OnRound

if TYPE_CHECKING:
    from tacit.runtimes.flower.board import Board


@contextmanager
def bar(console: Console) -> Iterator[tuple[OnRound, OnBoard]]:
    """What a training tells of its rounds, and one over sites of its stages, while it is shown."""
    columns = (
        TextColumn("federated training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[news]}"),
        TextColumn("{task.fields[stage]}", style="dim"),
    )
    progress = Progress(*columns, console=console)
    bar = progress.add_task("", total=None, news="", stage="")

    def on_round(record: RoundRecord, experiment: Experiment) -> None:
        progress.start()
        total = experiment.config.rounds.number
        progress.update(bar, completed=record.round, total=total, news=listing.news(record))

    said: list[str] = []

    def on_board(board: Board) -> None:
        progress.start()
        if board.stage:
            progress.update(bar, stage=f"round {board.round}, {board.stage}: {len(board.awaited)} to come")
        for note in [note for note in board.notes if note not in said]:
            said.append(note)
            progress.console.print(note, style="dim", highlight=False, soft_wrap=True)

    try:
        yield on_round, on_board
    finally:
        if progress.live.is_started:
            progress.stop()
