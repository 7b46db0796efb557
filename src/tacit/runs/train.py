"""Train from a config, or go on with a run that was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tacit.errors import DataError
from tacit.federated.algorithm import ServerState
from tacit.federated.evaluation import best_round
from tacit.federated.history import RoundRecord
from tacit.runs import checkpoint, config
from tacit.runs.experiment import Experiment, prepare
from tacit.runs.folder import RunFolder
from tacit.runs.seat import NAME as SEAT
from tacit.runs.seat import Seat
from tacit.runs.tensorboard import Logs, NoLogs
from tacit.runtimes.federation import Federation

if TYPE_CHECKING:
    from tacit.runtimes.flower.board import Board


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        experiment: what was run.
        history: all its rounds.
        reason: why it ended before its last round; empty if it did not.
    """

    experiment: Experiment
    history: tuple[RoundRecord, ...]
    reason: str


OnRound = Callable[[RoundRecord, Experiment], None]
OnBoard = Callable[["Board"], None]


def unwatched(board: Board) -> None:
    """Nobody looks."""


def start(
    config_path: Path,
    path: Path,
    on_round: OnRound | None = None,
    seat: Path | None = None,
    on_board: OnBoard = unwatched,
) -> Outcome:
    """Begin a run.

    Args:
        config_path: a TOML file, see `tacit.runs.config`.
        path: the run's folder, which is made; paths in the config are relative to the config's own folder.
        on_round: called with each record as its round ends.
        seat: of a run over sites, the coordinator's file, see `tacit.runs.seat`; ``None``: beside the config.
        on_board: of a run over sites, told of what happens as it happens.

    Raises:
        InputError: the config is wrong, or the folder is not empty.
        TrainingError: training could not go on; the run is kept up to its last good round.
        BudgetExceeded: the next round would exceed the privacy budget; likewise.
    """
    settings, text = config.read(config_path)
    origin = config_path.resolve().parent
    experiment = _prepared(settings, origin, seat or origin / SEAT, on_board)
    return _continue(RunFolder.create(path, text, origin), experiment, on_round)


def resume(path: Path, on_round: OnRound | None = None, on_board: OnBoard = unwatched) -> Outcome:
    """Go on with a run from its last snapshot, whatever interrupted it: bit by bit as if nothing had.

    Raises:
        DataError: the folder is not a run's, or is damaged.
        TrainingError: see `start`.
        BudgetExceeded: see `start`.
    """
    folder = RunFolder.open(path)
    settings, _ = config.read(folder.config)
    return _continue(folder, _prepared(settings, folder.origin, path / SEAT, on_board), on_round)


def _prepared(settings: config.Config, origin: Path, seat: Path, on_board: OnBoard) -> Experiment:
    if settings.runtime == "simulation":
        return prepare(settings, origin)
    from tacit.runs import over_sites  # noqa: PLC0415 -- takes Flower, which may not be installed

    return over_sites.prepare(settings, origin, Seat.read(seat), on_board)


def _continue(folder: RunFolder, experiment: Experiment, on_round: OnRound | None) -> Outcome:
    with folder.locked(), experiment.running(folder) as federation, _logs(folder, experiment) as logs:
        if folder.snapshot.exists():
            federation.restore(checkpoint.load(folder.snapshot, federation.snapshot, folder.identity))
        folder.forget_after(federation.round)
        history = list(folder.history())
        if len(history) != federation.round:
            raise DataError(
                f"{folder.path} has a snapshot of round {federation.round} but a history of {len(history)} rounds"
            )
        best: list[ServerState] = []

        def keep(record: RoundRecord) -> None:
            folder.append(record)
            logs.add(record)
            if best_round(history) is record:
                best[:] = [federation.snapshot.state]
            if record.round % experiment.checkpoint_every == 0:
                _save(folder, federation, best)
            if on_round is not None:
                on_round(record, experiment)

        experiment.train(federation, history, keep)
        _save(folder, federation, best)
        folder.save_model(federation, federation.snapshot.state, "model")
    return Outcome(experiment, tuple(history), experiment.stop.reason(history))


def _save(folder: RunFolder, federation: Federation, best: list[ServerState]) -> None:
    """Write the snapshot, and the best model if it is one since the last; so a round that is forgotten leaves none."""
    while best:
        folder.save_model(federation, best.pop(), "best")
    checkpoint.save(folder.snapshot, federation.snapshot, folder.identity)


def _logs(folder: RunFolder, experiment: Experiment) -> Logs | NoLogs:
    return Logs(folder.path / "tensorboard") if experiment.config.execution.tensorboard else NoLogs()
