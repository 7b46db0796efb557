"""``tacit audit``: verify what a run with secure sums left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tacit.errors import DataError, InputError, PeerError
from tacit.federated.audit import Checked
from tacit.runs.audit import Audit, Auditor

FAILED = 1
"""The exit code of an audit that found something wrong; a mistake of the caller's is 2."""

_NOTHING = "–"


def audit(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    pinned: Annotated[Path | None, typer.Option(help="A file of pins from elsewhere; else RUN/pins.toml.")] = None,
    head: Annotated[str | None, typer.Option(help="What an earlier audit printed as the last entry.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Verify the transcript of a run, without trust in whoever kept it; exit code 1 names the first thing wrong."""
    auditor = Auditor(run, pinned, _digest(head))
    console, checked = Console(soft_wrap=True), list[Checked]()
    result, wrong = None, ""
    try:
        for entry in auditor.rounds():
            checked.append(entry)
        result = auditor.finish()
    except (PeerError, DataError) as error:
        wrong = str(error)
    if checked:
        console.print(_table(checked))
    if result is not None:
        _print(result, len(checked), console)
    if as_json:
        print(json.dumps(_summary(run, checked, result, wrong)))
    if wrong:
        Console(stderr=True, soft_wrap=True).print("audit failed:", wrong, style="red", markup=False, highlight=False)
        raise typer.Exit(FAILED)


def _digest(text: str | None) -> bytes | None:
    try:
        digest = None if text is None else bytes.fromhex(text)
    except ValueError:
        digest = b""
    if digest is not None and len(digest) != 32:
        raise InputError(f"--head {text!r} is not the digest of an entry: 64 hexadecimal digits, as an audit prints")
    return digest


def _table(entries: list[Checked]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    private = any(entry.entry.spent for entry in entries)
    for name in ("entry", "round", "sum", "in the sum", "at least", "holders", "signed", *(["ε"] if private else [])):
        table.add_column(name, justify="left" if name == "sum" else "right")
    table.add_column("model after")
    table.add_column("")
    for entry in entries:
        spent = entry.entry.spent
        signed = entry.signatures > 0
        row = [
            str(entry.place),
            str(entry.round),
            entry.entry.protocol,
            f"{len(entry.summed)} of {entry.invited}" if signed else _NOTHING,
            str(entry.minimum) if signed else _NOTHING,
            f"{entry.threshold} of {entry.holders}" if signed else _NOTHING,
            str(entry.signatures) if signed else _NOTHING,
            *([f"{spent.epsilon:.3f}" if spent else _NOTHING] if private else []),
            entry.entry.after.hex()[:16],
            _remark(entry),
        ]
        table.add_row(*row)
    return table


def _remark(entry: Checked) -> str:
    remarks = ["run again after an interruption"] if entry.again else []
    if entry.excluded:
        remarks.append(f"{len(entry.excluded)} excluded by norm")
    return "; ".join([*remarks, entry.entry.note] if entry.entry.note else remarks)


def _print(result: Audit, entries: int, console: Console) -> None:
    models = "".join(f", {name} is the model after round {number}" for name, number in result.models.items())
    console.print(f"In order: {result.rounds} rounds in {entries} entries{models}.", highlight=False)
    if result.ahead:
        console.print(f"The history ends {result.ahead} rounds before the transcript: an interrupted run.")
    console.print(f"The last entry is {result.head.hex()}", highlight=False)
    if result.own_pins:
        console.print(
            "Signatures were compared with the pins in the run's own folder: this shows that nothing was changed since "
            "it was signed, and not by whom. Give --pinned with keys that you have from the parties themselves.",
            style="yellow",
            highlight=False,
        )


def _summary(run: Path, checked: list[Checked], result: Audit | None, wrong: str) -> dict[str, Any]:
    last = checked[-1] if checked else None
    return {
        "run": str(run),
        "in_order": result is not None,
        "wrong": wrong,
        "entries": len(checked),
        "rounds": result.rounds if result else None,
        "head": result.head.hex() if result else None,
        "own_pins": result.own_pins if result else None,
        "models": result.models if result else None,
        "epsilon": last.entry.spent.epsilon if last and last.entry.spent else None,
        "participants": sorted({client for entry in checked for client in entry.summed}),
    }
