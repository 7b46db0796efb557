"""Train from a config, or go on with a run that was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tacit.errors import DataError
from tacit.federated.evaluation import best_round
from tacit.federated.history import RoundRecord
from tacit.runs import checkpoint, config
from tacit.runs.experiment import Experiment, prepare
from tacit.runs.folder import RunFolder
from tacit.runs.tensorboard import Logs, NoLogs
from tacit.runtimes.simulation import train as rounds_of


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


def start(config_path: Path, path: Path, on_round: OnRound | None = None) -> Outcome:
    """Begin a run.

    Args:
        config_path: a TOML file, see `tacit.runs.config`.
        path: the run's folder, which is made; paths in the config are relative to the config's own folder.
        on_round: called with each record as its round ends.

    Raises:
        InputError: the config is wrong, or the folder is not empty.
        TrainingError: training could not go on; the run is kept up to its last good round.
        BudgetExceeded: the next round would exceed the privacy budget; likewise.
    """
    settings, text = config.read(config_path)
    experiment = prepare(settings, config_path.resolve().parent)
    folder = RunFolder.create(path, text, config_path.resolve().parent)
    return _continue(folder, experiment, on_round)


def resume(path: Path, on_round: OnRound | None = None) -> Outcome:
    """Go on with a run from its last snapshot, whatever interrupted it: bit by bit as if nothing had.

    Raises:
        DataError: the folder is not a run's, or is damaged.
        TrainingError: see `start`.
        BudgetExceeded: see `start`.
    """
    folder = RunFolder.open(path)
    settings, _ = config.read(folder.config)
    return _continue(folder, prepare(settings, folder.origin), on_round)


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
        every = experiment.config.rounds.checkpoint_every
        for record in rounds_of(
            federation, experiment.config.rounds.number, experiment.evaluation, experiment.stop, history
        ):
            folder.append(record)
            logs.add(record)
            if best_round(history) is record:
                folder.save_model(federation, "best")
            if record.round % every == 0:
                checkpoint.save(folder.snapshot, federation.snapshot, folder.identity)
            if on_round is not None:
                on_round(record, experiment)
        checkpoint.save(folder.snapshot, federation.snapshot, folder.identity)
        folder.save_model(federation, "model")
    return Outcome(experiment, tuple(history), experiment.stop.reason(history))


def _logs(folder: RunFolder, experiment: Experiment) -> Logs | NoLogs:
    return Logs(folder.path / "tensorboard") if experiment.config.execution.tensorboard else NoLogs()
