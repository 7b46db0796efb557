"""``tacit bench``: the figures that the README states, reproduced on the machine at hand."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from tacit.bench.federated import EXAMPLES_PER_CLIENT, MODELS, PRIVACY, SUMS, measure_federated
from tacit.bench.inference import Inference, measure_inference
from tacit.bench.measuring import Profile
from tacit.bench.nets import NETS
from tacit.bench.secure_sum import PROTOCOLS, measure_secure_sum
from tacit.bench.serving import Settings, measure_serving
from tacit.bench.training import NETS as TRAINED
from tacit.bench.training import Training, measure_training
from tacit.errors import InputError
from tacit.program.network import parse_network

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


@app.command("secure-sum")
def secure_sum(
    protocol: Annotated[str, typer.Option(help=f"One of {', '.join(PROTOCOLS)}.")] = "masked",
    clients: Annotated[int, typer.Option(help="Clients in the cohort.")] = 100,
    params: Annotated[int, typer.Option(help="Entries of each client's vector.")] = 199_210,
    dropout: Annotated[float, typer.Option(help="Fraction of the clients that is lost.")] = 0.1,
    lying: Annotated[
        bool, typer.Option("--lying/--curious", help="Withstand a server that lies, or one that only looks.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """A secure sum of real vectors in one process, client by client, in seconds of one core."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status("") as status:
        result = measure_secure_sum(protocol, clients, params, dropout, lying, lambda text: status.update(text))
    ms = {
        name: f"{1000 * getattr(result, name):,.3g} ms" for name in ("client_cpu_s", "client_max_cpu_s", "encode_cpu_s")
    }
    console.print(
        f"{result.protocol}, {result.clients} clients of {result.params:,} entries, {result.dropped} lost: "
        f"a client {ms['client_cpu_s']} (at most {ms['client_max_cpu_s']}) and {ms['encode_cpu_s']} to round, "
        f"the server {result.server_cpu_s:,.2f} s; the sum is {'exact' if result.exact else 'WRONG'}."
    )
    console.print(
        f"A client sends {result.upload_bytes_per_client:,.0f} bytes, {result.upload_bytes_per_param:.2f} a parameter "
        f"in a ring of {result.ring_bits} bits, and receives {result.download_bytes_per_client:,.0f}"
        + (f"; {result.holders} holders, threshold {result.threshold}." if result.holders else ".")
    )
    if as_json:
        print(json.dumps(result.as_dict()))


@app.command()
def federated(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "2nn",
    clients: Annotated[int, typer.Option(help="Clients in all.")] = 1000,
    examples: Annotated[int, typer.Option(help="Images of each client.")] = EXAMPLES_PER_CLIENT,
    cohort: Annotated[int, typer.Option(help="Clients in a round.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Examples in a batch.")] = 10,
    rounds: Annotated[int, typer.Option(help="Measured rounds, after one that warms up.")] = 10,
    dp: Annotated[str, typer.Option(help=f"Differential privacy, one of {', '.join(PRIVACY)}.")] = "none",
    processes: Annotated[int, typer.Option(help="Processes that train clients.")] = 1,
    secure_sum: Annotated[str, typer.Option(help=f"Take the sum securely too, one of {', '.join(SUMS)}.")] = "none",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Simulated federated averaging, beside a plain PyTorch loop."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status("") as status:
        result = measure_federated(
            model,
            clients,
            cohort,
            batch_size,
            rounds,
            dp,
            processes,
            secure_sum,
            examples,
            lambda text: status.update(text),
        )
    console.print(
        f"{result.model}, {result.cohort} of {result.clients:,} clients, batches of {result.batch_size}: a round takes "
        f"{result.cpu_s_per_round:.4f} s of CPU, {result.over_plain_loop:.2f} times the plain loop's "
        f"{result.plain_loop_cpu_s:.4f} s (central training {result.central_limit_cpu_s:.4f} s)."
    )
    console.print(
        f"{result.wall_s_per_round:.4f} s by the clock, {result.clients_per_s:,.0f} clients a second; "
        f"first round after {result.startup_s:.2f} s; {result.peak_rss_mb:,.0f} MB. "
        f"Solver: {result.solver}. Executor: {result.executor}."
    )
    if result.secure_cpu_s_per_round is not None:
        console.print(
            f"With a {result.secure_sum} sum a round takes {result.secure_cpu_s_per_round:.4f} s of CPU: "
            f"on top, {result.secure_overhead:.2f} times the training, or "
            f"{result.secure_over_plain_loop:.2f} times the plain loop."
        )
    if as_json:
        print(json.dumps(result.as_dict()))


@app.command()
def serving(
    net: Annotated[str, typer.Option(help=f"One of {', '.join(NETS)}.")] = "lenet",
    clients: Annotated[str, typer.Option(help="How many ask at once, one level after another.")] = "1,8,64",
    seconds: Annotated[float, typer.Option(help="How long each level lasts.")] = 20.0,
    workers: Annotated[int, typer.Option(help="Worker processes at each party.")] = 1,
    batch_sizes: Annotated[str, typer.Option(help="Planned batch sizes.")] = "1,8,32",
    disk_gb: Annotated[float, typer.Option(help="What bob's pool may take of the disk, in 10^9 bytes.")] = 16.0,
    refill: Annotated[
        bool, typer.Option("--refill", help="Have the provider deal all the time while clients ask.")
    ] = False,
    network: Annotated[
        str, typer.Option(help="Plan for lan, wan, or RTT,MBPS in ms and Mb/s; for the fewest bytes if not given.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """alice, bob and the provider as services over TLS, asked by many clients at once."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    planned_for = parse_network(network) if network else None
    settings = Settings(net, _numbers(clients), seconds, workers, _numbers(batch_sizes), disk_gb, refill, planned_for)
    with console.status("") as status:
        result = measure_serving(settings, lambda text: status.update(text))
    for one in result.alone:
        console.print(
            f"{result.net}, one client alone, {one.rest_ms:g} ms of rest before each: p50 {one.p50_ms:.3g} ms, p99 "
            f"{one.p99_ms:.3g} ms; the bare engine as rested {one.bare_ms:.3g} ms: {one.over_bare:.2f} times"
        )
    for level in result.levels:
        errors = ", ".join(f"{count} {name}" for name, count in level.errors.items()) or "no errors"
        dealt = f"; the provider dealt for {level.dealt_s:.0f} s of it" if level.dealt_s else ""
        console.print(
            f"{level.clients} clients: {level.requests_per_s:.0f} predictions a second, p50 {level.p50_ms:.3g} ms, p99 "
            f"{level.p99_ms:.3g} ms, {level.batch_mean:.1f} a batch, {errors}, {level.wrong} wrong; core ms each: "
            + ", ".join(f"{name} {value:.2g}" for name, value in sorted(level.cpu_ms.items()))
            + dealt
        )
        console.print(
            "    memory, and its growth in the second half: "
            + ", ".join(
                f"{name} {one.first:.0f} → {one.last:.0f} MB ({one.slope:+.1f} a minute)"
                for name, one in level.memory_mb.items()
            )
        )
    console.print(
        f"Pools: {result.pool_bytes / 1e9:.2f} GB, refilled at {result.refill_rows_per_s:.0f} inputs a second."
    )
    if as_json:
        print(json.dumps(result.as_dict()))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise InputError(f"{text!r}: give numbers such as 1,8,64") from None


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
