"""The report's pictures: matplotlib figures as inline SVG in the page's colours, and PNGs of digits.

A figure is drawn in placeholder colours which become CSS variables, so one drawing serves light and dark.
matplotlib comes with the extra ``tacit[demo]`` and is imported when a figure is drawn, not before.
"""

from __future__ import annotations

import base64
import importlib
import io
import math
import re
import struct
import zlib
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tacit.errors import InputError
from tacit.federated.history import RoundRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that nobody would choose, one for each CSS variable that takes its place.
PAPER, INK, MUTED, RULE, CLEAR = "#fe0101", "#fe0102", "#fe0103", "#fe0104", "#fe0105"
_VARIABLES = {PAPER: "paper", INK: "ink", MUTED: "muted", RULE: "rule", CLEAR: "clear"}

FEW_CLIENTS = 12  # so few that each cell has room for its count
MOST_CLIENTS = 200  # beyond this, columns are thinner than a pixel
_POINT_MARKERS = 30  # rounds beyond which markers would hide the line
_SMALL, _LABEL = 8.8, 9.2  # points, in a figure 4.2 inches wide


def accuracy(history: Sequence[RoundRecord]) -> str | None:
    """Draw accuracy against round, as SVG; ``None`` if no round was evaluated."""
    points = [(r.round, 100 * r.accuracy) for r in history if r.accuracy is not None and math.isfinite(r.accuracy)]
    return _curve("accuracy", points, "accuracy, %", "{:.1f}%", 101) if points else None


def accuracy_in_time(history: Sequence[RoundRecord]) -> str | None:
    """Draw accuracy against the virtual clock in hours, as SVG; ``None`` without simulated devices."""
    points = [
        (r.simulated_seconds / 3600, 100 * r.accuracy)
        for r in history
        if r.accuracy is not None and math.isfinite(r.accuracy) and r.simulated_seconds is not None
    ]
    return _curve("clock", points, "accuracy, %", "{:.1f}%", 101, "simulated hours") if points else None


def worst_decile(history: Sequence[RoundRecord]) -> str | None:
    """Draw the accuracy at the clients, mean and worst decile, as SVG; ``None`` if it was never taken."""
    points = [(r.round, 100 * r.clients.worst_decile) for r in history if r.clients is not None]
    mean = [100 * r.clients.mean for r in history if r.clients is not None]
    return _curve("fairness", points, "accuracy, %", "{:.1f}%", 101, reference=mean) if points else None


def epsilon(history: Sequence[RoundRecord]) -> str | None:
    """Draw the privacy spent against round, as SVG; ``None`` without differential privacy."""
    points = [(r.round, r.epsilon) for r in history if r.epsilon is not None and math.isfinite(r.epsilon)]
    return _curve("epsilon", points, "ε spent", "{:.2f}", math.inf) if points else None


def sent(history: Sequence[RoundRecord]) -> str | None:
    """Draw megabytes sent to the server, added up over the rounds, as SVG; ``None`` without rounds."""
    totals = accumulate(r.bytes_up / 1e6 for r in history)
    points = [(r.round, total) for r, total in zip(history, totals, strict=True)]
    return _curve("sent", points, "MB sent to the server", "{:,.1f}", math.inf) if points else None


def participation(history: Sequence[RoundRecord]) -> str | None:
    """Draw how many clients were invited to each round and how many finished; ``None`` if all always did."""
    if not any(r.lost for r in history):
        return None
    rounds = [r.round for r in history]
    figure = _figure(4.2, 2.5)
    axes = figure.subplots()
    _bare(axes)
    axes.bar(rounds, [len(r.cohort) for r in history], width=0.9, color=CLEAR, linewidth=0)
    bottoms = [len(r.cohort) for r in history]
    axes.bar(rounds, [len(r.lost) for r in history], width=0.9, bottom=bottoms, color=RULE, linewidth=0)
    axes.set_xlabel("round", fontsize=_LABEL, color=MUTED)
    axes.set_ylabel("clients", fontsize=_LABEL, color=MUTED)
    axes.locator_params(axis="both", integer=True)
    lost = sum(len(r.lost) for r in history)
    return _svg(figure, "participation", f"clients that finished each round, and {lost} in all that did not")


def loss(history: Sequence[RoundRecord]) -> str | None:
    """Draw loss against round, as SVG; ``None`` if no round was evaluated."""
    points = [(r.round, r.loss) for r in history if r.loss is not None and math.isfinite(r.loss)]
    return _curve("loss", points, "cross-entropy", "{:.3g}", math.inf) if points else None


def partition(label_counts: Tensor) -> str:
    """Draw who holds which classes, as SVG: a column a client, a row a class, and the totals above.

    Args:
        label_counts: int64 tensor ``(clients, classes)``; clients beyond ``MOST_CLIENTS`` are left out.
    """
    counts = label_counts[:MOST_CLIENTS].tolist()
    clients, classes = len(counts), len(counts[0])
    few = clients <= FEW_CLIENTS
    figure = _figure(4.2 if few else 8.4, 1.15 + 0.22 * classes)
    totals, cells = figure.subplots(2, 1, sharex=True, height_ratios=[0.8, 0.22 * classes])
    _bare(totals, grid=False)
    totals.bar(range(clients), [sum(row) for row in counts], width=0.86, color=MUTED, linewidth=0)
    totals.set_ylabel("examples", fontsize=_SMALL, color=MUTED)
    totals.tick_params(axis="x", length=0, labelbottom=False)
    totals.locator_params(axis="y", nbins=3, integer=True)
    _bare(cells, grid=False)
    _squares(cells, counts, annotate=few)
    cells.set(xlim=(-0.6, clients - 0.4), ylim=(classes - 0.4, -0.6), yticks=range(classes))
    if few:
        cells.set_xticks(range(clients))
    else:
        cells.locator_params(axis="x", integer=True)
    cells.set_xlabel("client", fontsize=_LABEL, color=MUTED)
    cells.set_ylabel("class", fontsize=_LABEL, color=MUTED)
    figure.align_ylabels()
    return _svg(figure, "partition", f"examples of each of {classes} classes at each of {clients} clients")


def picture(darkness: Tensor) -> str:
    """Encode a small image as a PNG data URI: black ink whose opacity is the darkness, on nothing.

    Args:
        darkness: uint8 tensor ``(height, width)``; 0 is blank, 255 is full ink.
    """
    height, width = darkness.shape
    pixels = torch.stack([torch.zeros_like(darkness), darkness], dim=-1).reshape(height, 2 * width)
    rows = b"".join(b"\0" + bytes(row) for row in pixels.tolist())  # 0: no filter
    header = struct.pack(">IIBBBBB", width, height, 8, 4, 0, 0, 0)  # 8 bits of grey and of opacity
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()


def ink(image: Tensor) -> Tensor:
    """Turn a float image in ``[0, 1]`` into uint8 darkness for :func:`picture`."""
    return (image.detach().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)


def share_ink(share: Tensor) -> Tensor:
    """Turn a share into uint8 darkness: the top 8 of its 64 bits."""
    return ((share >> 56) & 0xFF).to(torch.uint8)


def sum_ink(alice: Tensor, bob: Tensor) -> Tensor:
    """Turn two shares into uint8 darkness: their sum modulo 2^64, stretched from least to greatest."""
    total = (alice + bob).to(torch.float64)  # int64 addition wraps, which is the ring's
    low, high = total.min(), total.max()
    return ink((total - low) / (high - low).clamp(min=1))


def _curve(
    name: str,
    points: Sequence[tuple[float, float]],
    label: str,
    form: str,
    most: float,
    across: str = "round",
    reference: Sequence[float] | None = None,
) -> str:
    """Draw values against rounds, or against what ``across`` names; a reference is a thin line beside them."""
    rounds, values = [p[0] for p in points], [p[1] for p in points]
    figure = _figure(4.2, 2.5)
    axes = figure.subplots()
    _bare(axes)
    marker = "o" if len(points) <= _POINT_MARKERS else ""
    if reference is not None:
        axes.plot(rounds, reference, color=MUTED, linewidth=1.0)
    axes.plot(rounds, values, color=CLEAR, linewidth=1.6, marker=marker, markersize=3.2, solid_capstyle="round")
    axes.plot(rounds[-1:], values[-1:], color=CLEAR, marker="o", markersize=5.5, linewidth=0, clip_on=False)
    axes.annotate(
        form.format(values[-1]),
        (rounds[-1], values[-1]),
        (7, 0),
        textcoords="offset points",
        va="center",
        color=CLEAR,
        fontsize=10,
        fontweight="bold",
        annotation_clip=False,
    )
    axes.set_xlabel(across, fontsize=_LABEL, color=MUTED)
    axes.set_ylabel(label, fontsize=_LABEL, color=MUTED)
    axes.locator_params(axis="x", integer=across == "round", min_n_ticks=1)
    axes.locator_params(axis="y", nbins=6)
    axes.set_ylim(top=min(axes.get_ylim()[1], most))
    margin = 0.5 if across == "round" else 0.02 * (rounds[-1] - rounds[0]) or 0.5
    axes.set_xlim(rounds[0] - margin, rounds[-1] + margin)
    first, last = form.format(values[0]), form.format(values[-1])
    ends = (f"{across} {end:.4g}" for end in (rounds[0], rounds[-1]))
    return _svg(figure, name, f"{label} from {first} at {next(ends)} to {last} at {next(ends)}")


def _squares(axes: Axes, counts: list[list[int]], annotate: bool) -> None:
    most = max(1, max(map(max, counts)))
    cells = [
        (client, label, number, round(0.1 + 0.9 * number / most, 2))
        for client, row in enumerate(counts)
        for label, number in enumerate(row)
        if number
    ]
    axes.bar(
        [client for client, _, _, _ in cells],
        0.88,
        0.88,
        [label - 0.44 for _, label, _, _ in cells],
        color=[(CLEAR, opacity) for _, _, _, opacity in cells],
        linewidth=0,
    )
    if not annotate:
        return
    for client, label, number, opacity in cells:
        text = str(number) if number < 10_000 else f"{number / 1000:.0f}k"
        colour = PAPER if opacity > 0.55 else INK
        small = 6.5 if len(text) < 4 else 5.2
        axes.text(client, label, text, ha="center", va="center", fontsize=small, color=colour)


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if not (missing.name or "").startswith("matplotlib"):
            raise
        raise InputError("the report needs matplotlib; install it with: pip install 'tacit[demo]'") from missing


def _figure(width: float, height: float) -> Figure:
    figure: Figure = _matplotlib("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure


def _bare(axes: Axes, grid: bool = True) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=RULE, linewidth=0.8)
    axes.tick_params(colors=MUTED, labelsize=_SMALL, length=0)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis="y", color=RULE, linewidth=0.6)


def _svg(figure: Figure, name: str, description: str) -> str:
    """Write a figure as an inline ``<svg>``: text as text, ids under ``name``, colours as CSS variables."""
    stream = io.StringIO()
    with _matplotlib("matplotlib").rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # The style element would reach the whole page; the page's own style sheet says the same of its figures.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>",
        rf'<svg \1 role="img" aria-label="{description}">',
        text,
        count=1,
    )
    text = text.replace("xlink:href", "href").replace("\n", " ")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    text = re.sub(r"> +<", "><", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var(--{variable})")
    return text.strip()
