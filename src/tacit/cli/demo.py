"""``tacit demo``: the whole path on one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tacit.demo import DATASETS, MODELS, SPLITS, Settings, Watcher, demonstrate
from tacit.errors import InputError
from tacit.federated.history import RoundRecord
from tacit.report import html
from tacit.report.data import DemoReport

_DEFAULTS = Settings()
_MNIST = {"clients": 100, "cohort": 10, "rounds": 50}


def demo(
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(DATASETS)}.")] = _DEFAULTS.dataset,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = _DEFAULTS.model,
    split: Annotated[str, typer.Option(help=f"One of {', '.join(SPLITS)}.")] = _DEFAULTS.split,
    clients: Annotated[int | None, typer.Option(help="How many clients; 10, for mnist 100.")] = None,
    cohort: Annotated[int | None, typer.Option(help="Clients that train in a round; 5, for mnist 10.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Communication rounds; 30, for mnist 50.")] = None,
    lr: Annotated[float, typer.Option(help="The clients' learning rate.")] = _DEFAULTS.lr,
    server_lr: Annotated[float, typer.Option(help="The server's, on the pseudo-gradient.")] = _DEFAULTS.server_lr,
    server_momentum: Annotated[float, typer.Option(help="Of the server's SGD.")] = _DEFAULTS.server_momentum,
    secure_sum: Annotated[bool, typer.Option(help="Have the server see sums of updates only.")] = _DEFAULTS.secure_sum,
    seed: Annotated[int, typer.Option(help="Of everything that is not secret.")] = _DEFAULTS.seed,
    data_dir: Annotated[Path | None, typer.Option(help="Where MNIST's files are; else TACIT_DATA.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Train a model federatedly, encrypt it and the whole test set, predict in secret, compare."""
    usual = _MNIST if dataset == "mnist" else {}
    given = {"clients": clients, "cohort": cohort, "rounds": rounds}
    counts = usual | {name: value for name, value in given.items() if value is not None}
    settings = Settings(
        dataset,
        model,
        split,
        lr=lr,
        server_lr=server_lr,
        server_momentum=server_momentum,
        secure_sum=secure_sum,
        seed=seed,
        data_dir=data_dir,
        **counts,
    )
    if report is not None and not report.absolute().parent.is_dir():
        raise InputError(f"the report's folder {report.absolute().parent} does not exist: create it first")
    console = Console(stderr=True)
    result = _watched(settings, console)
    _print_summary(result, console)
    if report is not None:
        html.write(result, report)
        console.print(f"The report is in [bold]{report.absolute()}[/]", soft_wrap=True)
    if as_json:
        print(json.dumps(summary(result)))


def summary(result: DemoReport) -> dict[str, str | int | float]:
    """The figures of ``--json``."""
    return {
        "dataset": result.dataset,
        "rounds": len(result.history),
        "federated_accuracy": result.federated_accuracy,
        "encrypted_accuracy": result.encrypted_accuracy,
        "agreement": result.agreement,
        "test_images": result.test_images,
        "rounds_per_batch": result.rounds_per_batch,
        "bytes_online_per_image": result.bytes_online_per_image,
        "bytes_dealt_per_image": result.bytes_dealt_per_image,
        "max_abs_error": result.max_abs_error,
        "seconds_federated": round(result.seconds_federated, 3),
        "seconds_encrypted": round(result.seconds_encrypted, 3),
    }


def _watched(settings: Settings, console: Console) -> DemoReport:
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[news]}"),
    )
    progress = Progress(*columns, console=console)
    bars: dict[str, TaskID] = {}

    def show(description: str, done: int, total: int, news: str) -> None:
        if description not in bars:
            progress.start()
            bars[description] = progress.add_task(description, total=total, news=news)
        progress.update(bars[description], completed=done, total=total, news=news)

    def on_download(name: str, done: int, total: int) -> None:
        show(f"download {name}", done, total, "bytes")

    def on_round(record: RoundRecord) -> None:
        news = "rounds" if record.accuracy is None else f"rounds, accuracy {record.accuracy:.2%}"
        show("federated training", record.round, settings.rounds, news)

    def on_predicted(done: int, total: int) -> None:
        show("encrypted test", done, total, "images")

    try:
        return demonstrate(settings, Watcher(on_download, on_round, on_predicted))
    finally:
        if bars:
            progress.stop()


def _print_summary(result: DemoReport, console: Console) -> None:
    console.print(
        f"{result.dataset}, {result.model}: accuracy {result.federated_accuracy:.2%} in the clear, "
        f"{result.encrypted_accuracy:.2%} encrypted; the two agree on {result.agreement:.2%} of "
        f"{result.test_images:,} images (largest difference of a logit {result.max_abs_error:.1e}).",
        highlight=False,
        soft_wrap=True,
    )
    if result.secure_sum:
        console.print(
            "The server saw sums of the clients' updates, and no single one.", highlight=False, soft_wrap=True
        )
    console.print(
        f"A batch of {result.batch} takes {result.rounds_per_batch} rounds; an image takes "
        f"{result.bytes_online_per_image / 1000:,.0f} kB from party to party and "
        f"{result.bytes_dealt_per_image / 1000:,.0f} kB from the crypto provider.",
        highlight=False,
        soft_wrap=True,
    )
