"""``tacit site``: take part in federated training as a site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tacit.identity import Identity

app = typer.Typer(help="A site's side of federated training between organisations.", no_args_is_help=True)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="The site's key file, NAME.key, made by `tacit keys new NAME`.")],
) -> None:
    """Print what federation.toml says of a site: its name and its two public keys."""
    from tacit.runtimes.flower.federation_file import entry  # noqa: PLC0415 -- takes Flower

    typer.echo(entry(file.stem, Identity.load(file)), nl=False)


@app.command()
def join(
    config: Annotated[Path, typer.Option(help="The site's file; docs/deploy/federation.md lists every key.")],
    preview: Annotated[
        Path | None, typer.Option(help="A run's configuration: say what it would have the site do, and stop.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the preview as one JSON object.")] = False,
) -> None:
    """Answer a coordinator's questions, as far as the site's file allows; Ctrl-C stops."""
    from tacit.sites import join as joining  # noqa: PLC0415 -- takes Flower
    from tacit.sites import preview as previewing  # noqa: PLC0415

    if preview is None:
        joining.join(config, lambda text: typer.echo(text, err=True))
        return
    shown = previewing.preview(config, preview)
    if as_json:
        print(json.dumps(dict(shown)))
        return
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for topic, words in shown.items():
        table.add_row(topic, words)
    Console().print(table)
