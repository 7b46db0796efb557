"""``tacit train``, ``tacit resume`` and ``tacit runs``: federated training from a config file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from tacit.cli import watch as watching
from tacit.cli.progress import bar
from tacit.errors import InputError
from tacit.report import html
from tacit.runs import listing
from tacit.runs.train import OnBoard, OnRound, Outcome, start
from tacit.runs.train import resume as resume_run

if TYPE_CHECKING:
    pass

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; docs/training.md lists every key.")],
    run: Annotated[Path | None, typer.Option(help="The run's folder; else runs/NAME-DATE-TIME.")] = None,
    coordinator: Annotated[
        Path | None, typer.Option(help="Of a run over sites: the coordinator's file; else coordinator.toml by CONFIG.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Train federatedly as a config file says, here or over sites; the run's folder keeps everything."""
    folder = run or Path("runs") / f"{config.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    _watch(lambda on_round, on_board: start(config, folder, on_round, coordinator, on_board), folder, as_json)


def resume(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    as_json: _Json = False,
) -> None:
    """Go on with a run that was interrupted, from its last snapshot, as if nothing had happened."""
    _watch(lambda on_round, on_board: resume_run(run, on_round, on_board), run, as_json)


class _ListedByDefault(TyperGroup):
    """A group whose first word may be a run's folder, where it is no command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """See click."""
        known = args and args[0] in self.commands
        return super().resolve_command(ctx, args if known else ["list", *args])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See click; no words at all list what is in runs/."""
        return super().parse_args(ctx, args if args[:1] and args != ["--json"] else ["list", *args])


runs = typer.Typer(cls=_ListedByDefault, help="Runs: list them, or watch one over sites as it goes on.")


@runs.command()
def watch(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    once: Annotated[bool, typer.Option(help="Show it as it is now, and stop.")] = False,
) -> None:
    """Show a run over sites as it goes on: sites, stage, metrics, ε, bytes."""
    watching.watch(run, once)


@runs.command("list")
def listed(
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


def _watch(work: Callable[[OnRound, OnBoard], Outcome], folder: Path, as_json: bool) -> None:
    console = Console(stderr=True)
    with bar(console) as (on_round, on_board):
        outcome = work(on_round, on_board)
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
