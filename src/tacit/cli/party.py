"""``tacit party``, ``tacit provider``, ``tacit up``: the service's processes."""

from __future__ import annotations

import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tacit.errors import InputError
from tacit.party import service
from tacit.party.cluster_file import ALICE, BOB, PARTIES, PROVIDER
from tacit.party.local import CLUSTER, LocalService, prepare
from tacit.serve_demo import Row, serve_demo

Config = Annotated[Path, typer.Option(help="Everybody's cluster.toml.")]
Key = Annotated[Path, typer.Option(help="This party's key file, made by `tacit keys new`.")]
Folder = Annotated[Path, typer.Option(help="Where this party keeps models, tickets and its ledger.")]


def party(
    name: Annotated[str, typer.Argument(help=f"{ALICE} or {BOB}.")],
    key: Key,
    folder: Folder,
    config: Config = Path(CLUSTER),
) -> None:
    """Be alice or bob: serve predictions until SIGTERM or Ctrl-C, which end it in good order."""
    if name not in (ALICE, BOB):
        raise InputError(f"{name!r} is no computing party: {ALICE} and {BOB} are")
    service.become(name, config, key, folder)


def provider(key: Key, folder: Folder, config: Config = Path(CLUSTER)) -> None:
    """Be the crypto provider: deal tickets to alice and bob until SIGTERM or Ctrl-C."""
    service.become(PROVIDER, config, key, folder)


def up(
    folder: Annotated[
        Path | None, typer.Option(help="Where keys, cluster.toml and disks go; a temporary one if not given.")
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Push a model, ask it by ten clients at once, and stop.")
    ] = False,
) -> None:
    """Start all three on this machine, with keys and a cluster.toml made for them: for trying, not for secrets."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tacit-")))
        if demo:
            with console.status("") as status:
                rows, title = serve_demo(place, lambda text: status.update(text))
            Console(soft_wrap=True).print(_table(rows, title))
            return
        prepare(place)
        with console.status("starting alice, bob and the provider"):
            running = stack.enter_context(LocalService(place))
            running.wait_ready()
        config = f"--config {place / CLUSTER}"
        console.print(
            f"alice, bob and the provider are up; keys, cluster.toml and logs are in {place}. Now, for example:"
        )
        console.print(f"  tacit model push FILE.py:FACTORY --example 1,28,28 {config} --key {place / 'owner.key'}")
        console.print(f"  tacit predict FACTORY input.npy {config} --key {place / 'client.key'}")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while all(running.readiness(name) for name in PARTIES):
                signal.sigtimedwait([], 5.0)
            console.print("one of them has ended: its log says why", style="red")
        except KeyboardInterrupt:
            console.print("stopping")


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=title)
    for heading in ("", "requests", "correct", "p50", "p99", "predictions a second"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.what, str(row.requests), str(row.correct), f"{1000 * row.p50_s:.1f} ms", f"{1000 * row.p99_s:.1f} ms",
            f"{row.per_second:.0f}",
        )  # fmt: skip
    return table
