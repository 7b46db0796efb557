"""``tacit job``: encrypted training that alice and bob run by themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from tacit.errors import InputError
from tacit.identity import Identity
from tacit.party import cluster_file, sources
from tacit.party.jobs.client import Jobs, Progress
from tacit.party.jobs.requests import JobStatus
from tacit.party.jobs.states import State
from tacit.party.jobs.submission import Training
from tacit.program.lowering import Context
from tacit.program.optimizers import Adam, Optimizer, Sgd

app = typer.Typer(help="Encrypted training jobs at alice, bob and the provider.", no_args_is_help=True)
Config = Annotated[Path, typer.Option(help="Everybody's cluster.toml.")]
Key = Annotated[Path, typer.Option(help="The owner's key file.")]
Job = Annotated[str, typer.Argument(help="The job's name, its digest, or the first digits.")]
Model = Annotated[str, typer.Argument(help="FILE.py:FACTORY; the file is run on this machine, and nowhere else.")]
Inputs = Annotated[Path, typer.Option(help="A .npy file: one row an item.")]
Labels = Annotated[Path, typer.Option(help="A .npy file: class numbers, or real targets.")]
Lr = Annotated[float, typer.Option(help="Learning rate.")]
Momentum = Annotated[float, typer.Option(help="Of SGD.")]
Decay = Annotated[float, typer.Option(help="Weight decay.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
_CLUSTER = Path("cluster.toml")


class Losses(StrEnum):
    """The losses that have names."""

    CROSS_ENTROPY = "cross-entropy"
    MSE = "mse"


class Optimizers(StrEnum):
    """The optimizers."""

    SGD = "sgd"
    ADAM = "adam"


_LOSSES: dict[Losses, Callable[[Tensor, Tensor], Tensor]] = {
    Losses.CROSS_ENTROPY: functional.cross_entropy,
    Losses.MSE: functional.mse_loss,
}
LossOption = Annotated[Losses, typer.Option(help="Of the model's output and the labels.")]
OptimizerOption = Annotated[Optimizers, typer.Option(help="What updates the weights.")]


@app.command()
def submit(
    model: Model,
    key: Key,
    inputs: Inputs,
    labels: Labels,
    steps: Annotated[int, typer.Option(help="How many steps to take.")],
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")],
    weights: Annotated[Path | None, typer.Option(help="Begin from this safetensors file.")] = None,
    name: Annotated[str, typer.Option(help="What to call it; the factory's name if not given.")] = "",
    loss: LossOption = Losses.CROSS_ENTROPY,
    optimizer: OptimizerOption = Optimizers.SGD,
    lr: Lr = 0.1,
    momentum: Momentum = 0.0,
    weight_decay: Decay = 0.0,
    data: Annotated[list[str] | None, typer.Option(help="OWNER=ROWS: rows that another owner will contribute.")] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 20,
    reveal_loss: Annotated[bool, typer.Option(help="Let the owner see the loss of every step.")] = False,
    config: Config = _CLUSTER,
) -> None:
    """Share weights and rows on this machine, send each of the three its part, and print the job's digest."""
    with _jobs(config, key) as jobs:
        training = _training(model, weights, loss, optimizer, lr, momentum, weight_decay, config)
        digest = jobs.submit(
            training, _array(inputs), _array(labels), name=name or model.rpartition(":")[2], steps=steps,
            batch_size=batch_size, data=dict(map(_promised, data or [])), checkpoint_every=checkpoint_every,
            reveal_loss=reveal_loss,
        )  # fmt: skip
    typer.echo(digest)


@app.command()
def contribute(
    job: Job,
    model: Model,
    key: Key,
    inputs: Inputs,
    labels: Labels,
    loss: LossOption = Losses.CROSS_ENTROPY,
    optimizer: OptimizerOption = Optimizers.SGD,
    lr: Lr = 0.1,
    momentum: Momentum = 0.0,
    weight_decay: Decay = 0.0,
    config: Config = _CLUSTER,
) -> None:
    """Share rows into another owner's job, if it computes what these options say."""
    with _jobs(config, key) as jobs:
        computes = _training(model, None, loss, optimizer, lr, momentum, weight_decay, config)
        jobs.contribute(job, _array(inputs), _array(labels), computes=computes)


@app.command("list")
def list_jobs(key: Key, config: Config = _CLUSTER, as_json: Json = False) -> None:
    """List this owner's jobs, and those with its rows."""
    with _jobs(config, key) as jobs:
        found = jobs.list()
    if as_json:
        typer.echo(json.dumps([_plain(one) for one in found]))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("job", "name", "state", "step", "checkpoint", "seconds", ""):
        table.add_column(title)
    for one in found:
        step, why = f"{one.step} of {one.steps}", one.reason or (f"waits {one.waiting}" if one.waiting else "")
        table.add_row(
            one.job[:12], one.name, one.state.value, step, str(one.checkpoint.step), f"{one.seconds:.1f}", why
        )
    Console().print(table)


@app.command()
def watch(
    job: Job,
    key: Key,
    losses: Annotated[bool, typer.Option(help="Show the loss of every step, if the job reveals it.")] = False,
    config: Config = _CLUSTER,
    as_json: Json = False,
) -> None:
    """Follow a job until it is done, cancelled or has failed; exit code 1 if it has failed."""
    console, last = Console(stderr=True, highlight=False, soft_wrap=True), None
    with _jobs(config, key) as jobs:
        for last in jobs.watch(job, losses=losses):
            console.print(_sentence(last))
    if last is None:
        return
    if as_json:
        typer.echo(json.dumps(_plain(last.status)))
    if last.status.state is State.FAILED:
        raise typer.Exit(1)


@app.command()
def cancel(job: Job, key: Key, config: Config = _CLUSTER) -> None:
    """Have a job stop: the step under way is finished, and a checkpoint written."""
    with _jobs(config, key) as jobs:
        jobs.cancel(job)


@app.command()
def resume(job: Job, key: Key, config: Config = _CLUSTER) -> None:
    """Have a job that was cancelled, or has failed, go on from its last checkpoint."""
    with _jobs(config, key) as jobs:
        jobs.resume(job)


@app.command()
def result(
    job: Job,
    file: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    key: Key,
    config: Config = _CLUSTER,
) -> None:
    """Put together the model at the newest checkpoint; of a job that is done, the trained model."""
    with _jobs(config, key) as jobs:
        save_file({name: value.contiguous() for name, value in jobs.result(job).items()}, file)


@app.command()
def delete(job: Job, key: Key, config: Config = _CLUSTER) -> None:
    """Have all three forget a job, its rows and what it has trained."""
    with _jobs(config, key) as jobs:
        jobs.delete(job)


def _jobs(config: Path, key: Path) -> Jobs:
    return Jobs(cluster_file.read(config), Identity.load(key))


def _training(
    model: str, weights: Path | None, loss: Losses, optimizer: Optimizers, lr: float, momentum: float, decay: float,
    config: Path,
) -> Training:  # fmt: skip
    module = sources.module(model)
    if weights:
        sources.load_weights(module, weights)
    if optimizer is Optimizers.ADAM and momentum:
        raise InputError("momentum belongs to sgd: leave it out")
    updates: Optimizer = (
        Adam(lr, weight_decay=decay) if optimizer is Optimizers.ADAM else Sgd(lr, momentum, weight_decay=decay)
    )
    return Training(module, _LOSSES[loss], updates, Context(network=cluster_file.read(config).network.for_planning()))


def _array(path: Path) -> Tensor:
    values = sources.array(path)
    return values.float() if values.is_floating_point() else values.long()


def _promised(text: str) -> tuple[str, int]:
    owner, _, rows = text.partition("=")
    if not owner or not rows.isdecimal():
        raise InputError(f"--data {text!r}: give OWNER=ROWS, for example bank=1200")
    return owner, int(rows)


def _plain(status: JobStatus) -> dict[str, object]:
    """For JSON: by name, without what only the parties compare."""
    names = ("job", "name", "owner", "reason", "step", "steps", "seconds", "waiting", "mine")
    return {
        **{name: getattr(status, name) for name in names},
        "state": status.state.value,
        "checkpoint": status.checkpoint.step,
    }


def _sentence(progress: Progress) -> str:
    one = progress.status
    parts = [f"{one.name} is {one.state.value}, step {one.step} of {one.steps}"]
    if one.state is State.RUNNING and progress.seconds_left is not None:
        parts.append(f"about {progress.seconds_left:.0f} s of steps left")
    if progress.losses:
        parts.append(f"loss {progress.losses[max(progress.losses)]:.4f}")
    if one.waiting:
        parts.append(f"waits {one.waiting}")
    if one.reason:
        parts.append(one.reason)
    return "; ".join(parts)
