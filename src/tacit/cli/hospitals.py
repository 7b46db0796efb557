"""``tacit hospitals``: four hospitals train together on one machine, in real processes."""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tacit.cli.progress import bar
from tacit.report.hospitals import HospitalsReport, write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tacit.report.hospitals import Scores


def hospitals(
    folder: Annotated[Path | None, typer.Option(help="Keep keys, journals and runs here; else nothing.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where the hospitals' files are; else TACIT_DATA.")] = None,
    rounds: Annotated[int, typer.Option(help="Of each model.")] = 15,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Train heart disease models at four hospitals over Flower, privately, and compare with other ways."""
    from tacit.sites.hospitals import Progress, Setting, run  # noqa: PLC0415 -- takes Flower

    console = Console(stderr=True)
    temporary = tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder))
    with temporary as where, bar(console) as (on_round, on_board):
        progress = Progress(lambda text: console.print(text, highlight=False), on_round, on_board)
        found = run(Path(where), data_dir, Setting(rounds=rounds), progress)
    for trained in found.trained:
        console.print(_table(trained.model, trained.scores, found.hospitals))
    console.print(found.handed_over, highlight=False, soft_wrap=True)
    if report is not None:
        write(found, report)
        console.print(f"The report is in [bold]{report.absolute()}[/]", soft_wrap=True)
    if as_json:
        print(json.dumps(summary(found)))


def summary(report: HospitalsReport) -> dict[str, object]:
    """The figures of ``--json``."""
    return {
        "seconds": round(report.seconds, 1),
        "handed_over": report.handed_over,
        "models": {
            trained.model: {
                "rounds": len(trained.history),
                "seconds": round(trained.seconds, 1),
                "lost": sum(len(record.lost) for record in trained.history),
                "ways": {
                    way.way: {"accuracy": way.accuracy, "auc": way.auc, "pooled": way.pooled, "epsilon": way.epsilon}
                    for way in trained.scores
                    if not way.source
                },
            }
            for trained in report.trained
        },
    }


def _table(model: str, scores: Sequence[Scores], hospitals: Sequence[str]) -> Table:
    table = Table(title=f"{model}: accuracy on patients kept back (area under the ROC curve)", title_justify="left")
    table.add_column("trained", overflow="fold")
    for name in (*hospitals, "all", "ε"):
        table.add_column(name, justify="right")
    for way in scores:
        cells = [
            f"{accuracy:.1%}" + ("" if auc is None else f" ({auc:.2f})")
            for accuracy, auc in zip(way.accuracy, way.auc, strict=True)
        ]
        pooled = "–" if way.pooled != way.pooled else f"{way.pooled:.1%}"
        table.add_row(way.way, *cells, pooled, "–" if way.epsilon is None else f"{way.epsilon:.1f}")
    return table
