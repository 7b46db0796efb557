"""``tacit train``, ``tacit resume`` and ``tacit runs``: federated training from a config file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tacit.errors import InputError
from tacit.federated.history import RoundRecord
from tacit.report import html
from tacit.runs import listing
from tacit.runs.experiment import Experiment
from tacit.runs.train import OnRound, Outcome, start
from tacit.runs.train import resume as resume_run

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; docs/training.md lists every key.")],
    run: Annotated[Path | None, typer.Option(help="The run's folder; else runs/NAME-DATE-TIME.")] = None,
    as_json: _Json = False,
) -> None:
    """Train federatedly as a config file says; the run's folder keeps everything."""
    folder = run or Path("runs") / f"{config.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    _watch(lambda on_round: start(config, folder, on_round), folder, as_json)


def resume(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    as_json: _Json = False,
) -> None:
    """Go on with a run that was interrupted, from its last snapshot, as if nothing had happened."""
    _watch(lambda on_round: resume_run(run, on_round), run, as_json)


def runs(
    folders: Annotated[list[Path] | None, typer.Argument(help="Runs, or folders of runs; else runs/.")] = None,
    as_json: _Json = False,
) -> None:
    """List runs beside one another, with the settings in which they differ."""
    found = listing.find(folders or [Path("runs")])
    if as_json:
        print(json.dumps([run.summary for run in found]))
        return
    console = Console()
    console.print(_table(listing.overview(found)))
    if differing := listing.differences(found):
        console.print(_table(differing))


def _table(rows: Sequence[Mapping[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    return table


def _watch(work: Callable[[OnRound], Outcome], folder: Path, as_json: bool) -> None:
    console = Console(stderr=True)
    with _bar(console) as on_round:
        outcome = work(on_round)
    summary = listing.summary(folder.name, outcome.history)
    ended = f" (it ended early: {outcome.reason})" if outcome.reason else ""
    console.print(f"{listing.sentence(summary)}{ended}", highlight=False, soft_wrap=True)
    for note in outcome.experiment.notes:
        console.print(note, style="yellow", highlight=False, soft_wrap=True)
    try:
        html.write(outcome.experiment.report(outcome.history), folder / "report.html")
        console.print(f"The run is in [bold]{folder.absolute()}[/]; look at report.html there", soft_wrap=True)
    except InputError as error:
        console.print(f"The run is in [bold]{folder.absolute()}[/], without a report: {error}", soft_wrap=True)
    if as_json:
        print(json.dumps(summary))


@contextmanager
def _bar(console: Console) -> Iterator[OnRound]:
    columns = (
        TextColumn("federated training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[news]}"),
    )
    progress = Progress(*columns, console=console)
    bar = progress.add_task("", total=None, news="")

    def on_round(record: RoundRecord, experiment: Experiment) -> None:
        progress.start()
        total = experiment.config.rounds.number
        progress.update(bar, completed=record.round, total=total, news=listing.news(record))

    try:
        yield on_round
    finally:
        if progress.live.is_started:
            progress.stop()
