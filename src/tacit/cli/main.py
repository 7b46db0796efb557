"""``tacit``: the command line's entry point."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from tacit import __version__
from tacit.cli import bench, job, keys, model, site
from tacit.cli.audit import audit
from tacit.cli.cost import cost
from tacit.cli.demo import demo
from tacit.cli.hospitals import hospitals
from tacit.cli.party import party, provider, up
from tacit.cli.predict import predict
from tacit.cli.train import resume, runs, train
from tacit.errors import TacitError

app = typer.Typer(
    help="Train together, predict in secret: federated learning and encrypted inference for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(train)
app.command()(resume)
app.command()(hospitals)
app.command()(audit)
app.command()(cost)
app.command()(party)
app.command()(provider)
app.command()(up)
app.command()(predict)
app.add_typer(model.app, name="model")
app.add_typer(job.app, name="job")
app.add_typer(runs, name="runs")
app.add_typer(keys.app, name="keys")
app.add_typer(site.app, name="site")
app.add_typer(bench.app, name="bench")


@app.callback(invoke_without_command=True)
def tacit(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Train together, predict in secret: federated learning and encrypted inference for PyTorch."""
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run a command; a mistake of the caller's is one line on standard error and exit code 2."""
    try:
        app()
    except TacitError as error:
        Console(stderr=True, soft_wrap=True).print("error:", str(error), style="red", markup=False, highlight=False)
        sys.exit(2)
