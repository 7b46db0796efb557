"""``tacit bench``: the figures that the README states, reproduced on the machine at hand."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from tacit.bench.inference import Inference, measure_inference
from tacit.bench.measuring import Profile
from tacit.bench.nets import NETS
from tacit.bench.training import NETS as TRAINED
from tacit.bench.training import Training, measure_training

app = typer.Typer(help="Measure tacit on this machine.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure tacit on this machine."""


@app.command()
def inference(
    net: Annotated[str, typer.Option(help=f"One of {', '.join(NETS)}.")] = "lenet",
    batch: Annotated[int, typer.Option(help="Inputs in a batch.")] = 1,
    repeat: Annotated[int, typer.Option(help="Measured repeats, after one that warms up.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Encrypted inference by three processes on this machine, beside plaintext PyTorch."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status("") as status:
        result = measure_inference(net, batch, repeat, lambda text: status.update(text))
    _print(result, console)
    if as_json:
        print(json.dumps(result.as_dict()))


@app.command()
def training(
    net: Annotated[str, typer.Option(help=f"One of {', '.join(TRAINED)}.")] = "lenet",
    batch: Annotated[int, typer.Option(help="Items in a batch.")] = 128,
    steps: Annotated[int, typer.Option(help="Measured steps, after one that warms up.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Encrypted SGD by three processes on this machine, beside plaintext PyTorch."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status("") as status:
        result = measure_training(net, batch, steps, lambda text: status.update(text))
    ms = _milliseconds(result)
    console.print(
        f"{result.net}, batch {result.batch}: a step {ms['step_s']} (best {ms['step_min_s']}), "
        f"plaintext {ms['plaintext_step_s']}: {result.step_over_plaintext:.1f} times; "
        f"dealing {ms['deal_s']} of one core, {result.deal_over_plaintext:.1f} times."
    )
    console.print(
        f"{result.rounds} rounds, {result.bytes_online_per_party:,} bytes from each party to the other, "
        f"{result.bytes_dealt:,} bytes dealt; after {result.steps + 1} steps weights differ by at most "
        f"{result.max_abs_error_weights:.1e}; {result.peak_rss_mb:,.0f} MB a party."
    )
    _print_profile(result.profile, console)
    if as_json:
        print(json.dumps(result.as_dict()))


def _milliseconds(result: Inference | Training) -> dict[str, str]:
    return {name: f"{1000 * seconds:,.3g} ms" for name, seconds in vars(result).items() if name.endswith("_s")}


def _print(result: Inference, console: Console) -> None:
    ms = _milliseconds(result)
    console.print(
        f"{result.net}, batch {result.batch}: online {ms['online_s']} (best {ms['online_min_s']}), "
        f"plaintext {ms['plaintext_s']}: {result.online_over_plaintext:.1f} times; "
        f"dealing {ms['deal_s']} of one core, {result.deal_over_plaintext:.1f} times."
    )
    console.print(
        f"{result.rounds} rounds, {result.bytes_online_per_party:,} bytes from each party to the other, "
        f"{result.bytes_dealt:,} bytes dealt; largest error {result.max_abs_error:.1e}; "
        f"{result.peak_rss_mb:,.0f} MB a party."
    )
    _print_profile(result.profile, console)


def _print_profile(profile: Profile, console: Console) -> None:
    console.print(
        f"A party's {1000 * profile.party_s:,.3g} ms: computing {1000 * profile.compute_s:,.3g}, waiting "
        f"{1000 * profile.waiting_s:,.3g}, moving bytes {1000 * profile.moving_s:,.3g}."
    )
