"""``tacit cost``: what encrypted inference with a model will cost, before it runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from tacit.bench.nets import NETS
from tacit.demo import MODELS
from tacit.errors import InputError
from tacit.party.sources import module
from tacit.program.lowering import Context
from tacit.program.network import Network, parse_network
from tacit.program.rewrite import Model, simplify
from tacit.program.run import Cost, plan_execution
from tacit.report import units
from tacit.trace import trace


def cost(
    model: Annotated[str, typer.Argument(help=f"{', '.join({**MODELS, **NETS})}, or FILE.py:FACTORY.")],
    network: Annotated[str, typer.Option(help="lan, wan, or RTT,MBPS in ms and Mb/s.")] = "lan",
    batch: Annotated[int, typer.Option(help="Inputs in a batch.")] = 1,
    item: Annotated[str, typer.Option(help="Shape of one input; needed with FILE.py:FACTORY.")] = "",
) -> None:
    """Plan encrypted inference with a model: rounds, bytes and time, operator by operator. Nothing is run."""
    link = parse_network(network)
    build, usual_item = _model(model)
    rows, built = _positive("batch", batch), build()
    item_shape = _item(item) if item else usual_item
    if item_shape is None:
        raise InputError(f"{model} may take anything: give --item, the shape of one input, such as 1,28,28")
    shape = (rows, *item_shape)
    simple = simplify(Model(*trace(built, (torch.zeros(shape),))))
    shapes = {name: value.shape for name, value in simple.state.items()}
    planned = plan_execution(simple.graph, shapes, [shape], Context(network=link))
    Console(soft_wrap=True).print(_table(planned, link, f"{model}, batch {batch}, {network}"))


def _model(name: str) -> tuple[Callable[[], Any], tuple[int, ...] | None]:
    if name in NETS:
        return NETS[name].build, NETS[name].item_shape
    if name in MODELS:
        return MODELS[name], (1, 28, 28)
    if ".py:" not in name:
        known = ", ".join({**MODELS, **NETS})
        raise InputError(f"model {name!r} is unknown: give one of {known}, or FILE.py:FACTORY")
    return partial(module, name), None


def _item(text: str) -> tuple[int, ...]:
    try:
        return tuple(_positive("item", int(size)) for size in text.split(","))
    except ValueError:
        raise InputError(f"item {text!r} is not a shape: give sizes such as 1,28,28") from None


def _positive(option: str, number: int) -> int:
    if number < 1:
        raise InputError(f"{option} is {number}: give 1 or more")
    return number


def _table(planned: Cost, link: Network, title: str) -> Table:
    table = Table(title=title, caption="times are estimates; rounds and bytes are exact")
    for heading in ("layer", "operator"):
        table.add_column(heading, overflow="fold")
    for heading in ("rounds", "online, each way", "dealt", "online time"):
        table.add_column(heading, justify="right")
    for layer in planned.layers:
        table.add_row(
            layer.layer or layer.name,
            layer.operator.removeprefix("aten.").removeprefix("tacit.").removesuffix(".default"),
            str(layer.rounds),
            units.size(layer.bytes_online),
            units.size(layer.bytes_dealt),
            units.duration(layer.estimate(link)),
        )
    table.add_section()
    totals = (planned.bytes_online, planned.bytes_dealt)
    table.add_row("in all", "", str(planned.rounds), *map(units.size, totals), units.duration(planned.estimate(link)))
    return table
