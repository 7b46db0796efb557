"""Runs beside one another: what came of each, and in which settings they differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tacit.errors import InputError
from tacit.federated.evaluation import best_round
from tacit.federated.history import RoundRecord
from tacit.runs import config
from tacit.runs.folder import RunFolder

_NOTHING = "–"
Summary = dict[str, str | int | float | None]


@dataclass(frozen=True)
class Run:
    """One run: its settings by dotted name, and what came of it."""

    settings: Mapping[str, Any]
    summary: Summary


def find(folders: Iterable[Path]) -> list[Run]:
    """Every run among ``folders`` and directly in them, by name.

    Raises:
        InputError: there is none.
        DataError: a run is damaged.
    """
    given = list(folders)
    candidates = [path for folder in given for path in (folder, *sorted(folder.glob("*/")))]
    paths = [path for path in dict.fromkeys(candidates) if (path / "history.sqlite").is_file()]
    if not paths:
        raise InputError(f"there is no run in {', '.join(map(str, given))}: `tacit train CONFIG.toml` makes one")
    return [_read(path) for path in paths]


def summary(name: str, history: Sequence[RoundRecord]) -> Summary:
    """What came of a run, in figures."""
    best, last = best_round(history), history[-1] if history else None
    evaluated = [record for record in history if record.accuracy is not None]
    return {
        "run": name,
        "rounds": len(history),
        "accuracy": evaluated[-1].accuracy if evaluated else None,
        "best_accuracy": best.accuracy if best else None,
        "best_round": best.round if best else None,
        "worst_decile": next((r.clients.worst_decile for r in reversed(history) if r.clients), None),
        "epsilon": last.epsilon if last else None,
        "bytes_up": sum(record.bytes_up for record in history),
        "bytes_down": sum(record.bytes_down for record in history),
        "secure_sum": next((r.secure_sum.protocol for r in reversed(history) if r.secure_sum), None),
        "clients_lost": sum(len(record.lost) for record in history),
        "simulated_seconds": last.simulated_seconds if last else None,
        "seconds": round(sum(record.seconds for record in history), 3),
    }


def sentence(figures: Summary) -> str:
    """The summary in words."""
    parts = [f"{figures['run']}: {figures['rounds']} rounds"]
    if figures["accuracy"] is not None:
        parts.append(f"accuracy {figures['accuracy']:.2%} (best {figures['best_accuracy']:.2%})")
    if figures["epsilon"] is not None:
        parts.append(f"ε = {figures['epsilon']:.3g} spent")
    if figures["clients_lost"]:
        parts.append(f"{figures['clients_lost']} clients lost on the way")
    return ", ".join(parts)


def news(record: RoundRecord) -> str:
    """A round in a few words, for a progress bar."""
    parts = [] if record.accuracy is None else [f"accuracy {record.accuracy:.2%}"]
    if record.epsilon is not None:
        parts.append(f"ε {record.epsilon:.2f}")
    if record.lost:
        parts.append(f"{len(record.lost)} lost")
    return ", ".join([*parts, record.note] if record.note else parts)


def overview(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row a run as text; figures that no run has are left out."""
    rows = [
        {
            "run": str(run.summary["run"]),
            "algorithm": str(run.settings["algorithm.name"]),
            "data": str(run.settings["data.dataset"]),
            "rounds": str(run.summary["rounds"]),
            "accuracy": _percent(run.summary["accuracy"]),
            "worst 10 %": _percent(run.summary["worst_decile"]),
            "ε": _number(run.summary["epsilon"], "{:.2f}"),
            "MB sent": _number(run.summary["bytes_up"], "{:,.1f}", 1e6),
            "sum": str(run.summary["secure_sum"] or _NOTHING),
            "lost": _number(run.summary["clients_lost"] or None, "{}"),
            "simulated": _number(run.summary["simulated_seconds"], "{:,.1f} h", 3600.0),
        }
        for run in runs
    ]
    return [{name: row[name] for name in row if any(other[name] != _NOTHING for other in rows)} for row in rows]


def differences(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row for each setting in which the runs differ, with what it is in each of them."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    labels = [str(run.summary["run"]) for run in runs]
    return [
        {"setting": name} | dict(zip(labels, (_NOTHING if v is None else str(v) for v in of_runs), strict=True))
        for name, of_runs in values.items()
        if len(set(map(str, of_runs))) > 1
    ]


def flat(settings: config.Config) -> dict[str, Any]:
    """Every setting by its dotted name."""
    flattened: dict[str, Any] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                visit(item, f"{name}.{key}" if name else key)
        else:
            flattened[name] = value

    visit(msgspec.to_builtins(settings), "")
    return flattened


def _read(path: Path) -> Run:
    folder = RunFolder.open(path)
    settings, _ = config.read(folder.config)
    return Run(flat(settings), summary(path.name, folder.history()))


def _percent(value: str | int | float | None) -> str:
    return _NOTHING if value is None else f"{value:.2%}"


def _number(value: str | int | float | None, form: str, unit: float = 1) -> str:
    return form.format(value / unit if unit != 1 else value) if isinstance(value, int | float) else _NOTHING
