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


def compare(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row a run as text: the figures that any of them has, then the settings in which they differ."""
    figures = [name for name in runs[0].summary if any(run.summary[name] is not None for run in runs)]
    names = dict.fromkeys(name for run in runs for name in run.settings)
    differing = [name for name in names if len({str(run.settings.get(name)) for run in runs}) > 1]
    return [
        {name: _text(name, run.summary[name]) for name in figures}
        | {name: str(run.settings.get(name, "–")) for name in differing}
        for run in runs
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


def _text(name: str, value: str | int | float | None) -> str:
    if value is None:
        return "–"
    if name in ("accuracy", "best_accuracy", "worst_decile"):
        return f"{value:.2%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
