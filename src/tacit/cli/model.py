"""``tacit model``: what a model's owner does with the parties."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tacit.errors import InputError, PeerError
from tacit.identity import Identity, key_text
from tacit.party import cluster_file, push, sources
from tacit.party.cluster_file import ALICE, BOB, ClusterFile
from tacit.party.local import CLUSTER
from tacit.party.messages import Listed
from tacit.party.owning import Owner
from tacit.program.lowering import Context

app = typer.Typer(help="An owner's models at alice, bob and the provider.", no_args_is_help=True)
Config = Annotated[Path, typer.Option(help="Everybody's cluster.toml.")]
Key = Annotated[Path, typer.Option(help="The owner's key file.")]
_POLL_S = 0.2


@app.command("push")
def push_model(
    model: Annotated[str, typer.Argument(help="FILE.py:FACTORY; the file is run on this machine, and nowhere else.")],
    key: Key,
    example: Annotated[
        list[str], typer.Option(help="Shape of an input such as 1,28,28, or a .npy with a batch; once for each input.")
    ],
    weights: Annotated[
        Path | None, typer.Argument(help="A safetensors file; the factory's own weights if not given.")
    ] = None,
    name: Annotated[str, typer.Option(help="What to call it; the factory's name if not given.")] = "",
    wait: Annotated[float, typer.Option(help="Seconds to wait until it is served.")] = 300.0,
    config: Config = Path(CLUSTER),
) -> None:
    """Share a model's weights on this machine, and send alice, bob and the provider each its part."""
    cluster, identity = _opened(config, key)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    module = sources.module(model)
    calibration = sources.load_weights(module, weights) if weights else None
    base = Context(network=cluster.network.for_planning())
    with console.status("tracing, planning and sharing it"):
        prepared = push.prepare(
            module,
            [sources.example(one) for one in example],
            name=name or model.rpartition(":")[2],
            owner=key_text(identity.public),
            batch_sizes=cluster.serving.batch_sizes,
            context=calibration.context(module, base) if calibration else base,
        )
    with Owner(cluster, identity) as owner:
        with console.status("sending each its part"):
            digest = owner.push(prepared)
        console.print(f"pushed {prepared.provider.name}, version {digest[:12]}: {_plan(prepared, cluster)}")
        with console.status("waiting until it is served and the first tickets are dealt"):
            _wait_served(owner, digest, wait)
    console.print("it is served")


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    out: Annotated[Path, typer.Argument(help="Where its weights go, as safetensors.")],
    key: Key,
    config: Config = Path(CLUSTER),
) -> None:
    """Put the newest version's weights together again, for their owner."""
    if out.exists():
        raise InputError(f"{out} is there already: choose another name")
    with Owner(*_opened(config, key)) as owner:
        state = owner.pull(name)
    sources.save_weights(state, out)
    _say(f"wrote {out}")


@app.command("list")
def list_models(
    key: Key,
    config: Config = Path(CLUSTER),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: each party's models.")] = False,
) -> None:
    """Show this owner's models: which are served, and how many tickets are ready."""
    with Owner(*_opened(config, key)) as owner:
        found = owner.list()
    if as_json:
        print(json.dumps({party: [_plain(one) for one in models] for party, models in found.items()}))
        return
    table = Table()
    for heading in ("model", "version", "at", "served", "tickets ready"):
        table.add_column(heading)
    for model in sorted({(one.name, one.model) for models in found.values() for one in models}):
        there = {party: one for party, models in found.items() for one in models if (one.name, one.model) == model}
        tickets = there[BOB].tickets if BOB in there else {}
        ready = ", ".join(f"{count} of batch {size}" for size, count in tickets.items())
        served = all(party in there and there[party].loaded for party in (ALICE, BOB))
        table.add_row(model[0], model[1][:12], ", ".join(there), "yes" if served else "no", ready)
    Console(soft_wrap=True).print(table)


@app.command()
def load(
    name: Annotated[str, typer.Argument(help="The model's name.")], key: Key, config: Config = Path(CLUSTER)
) -> None:
    """Have a model served that was unloaded."""
    with Owner(*_opened(config, key)) as owner:
        owner.load(name)
    _say(f"{name} will be served as soon as the parties have it ready")


@app.command()
def unload(
    name: Annotated[str, typer.Argument(help="The model's name.")], key: Key, config: Config = Path(CLUSTER)
) -> None:
    """Have a model served no longer; the parties keep it, encrypted."""
    with Owner(*_opened(config, key)) as owner:
        owner.load(name, False)
    _say(f"{name} is served no longer; the parties keep it")


@app.command()
def delete(
    name: Annotated[str, typer.Argument(help="The model's name.")], key: Key, config: Config = Path(CLUSTER)
) -> None:
    """Have all three forget every version of a model, and what was dealt for it."""
    with Owner(*_opened(config, key)) as owner:
        owner.delete(name)
    _say(f"{name} is deleted at alice, bob and the provider")


def _plan(prepared: push.Push, cluster: ClusterFile) -> str:
    """What was planned for the smallest batch, and for which network."""
    batch, program = next(iter(prepared.provider.programs.items()))
    network, cost = cluster.network, program.cost()
    return (
        f"a batch of {batch} takes {cost.rounds} rounds, planned for round trips of {network.rtt_ms:g} ms and "
        f"{network.mbps:g} Mb/s"
    )


def _plain(one: Listed) -> dict[str, object]:
    return {"model": one.name, "version": one.model, "served": one.loaded, "tickets": one.tickets}


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def _opened(config: Path, key: Path) -> tuple[ClusterFile, Identity]:
    return cluster_file.read(config), Identity.load(key)


def _wait_served(owner: Owner, digest: str, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        found = owner.list()
        there = [one for party in (ALICE, BOB) for one in found[party] if one.model == digest]
        if len(there) == 2 and all(one.loaded for one in there) and any(there[0].tickets.values()):
            return
        if time.monotonic() > deadline:
            raise PeerError(f"it is not served after {patience:g} seconds: see the logs of alice, bob and the provider")
        time.sleep(_POLL_S)
