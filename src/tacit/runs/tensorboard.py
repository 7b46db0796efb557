"""The history as TensorBoard event files, for whoever watches training there."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tacit.errors import InputError
from tacit.federated.history import RoundRecord


def writer() -> Any:
    """The class that writes event files.

    Raises:
        InputError: TensorBoard is not installed.
    """
    try:
        return import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise InputError(
            "execution.tensorboard needs TensorBoard: pip install 'tacit[tensorboard]', or set it to false"
        ) from error


class Logs:
    """Writes scalars round by round.

    Raises:
        InputError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self._writer = writer()(str(folder))

    def add(self, record: RoundRecord) -> None:
        """Write what the record has of a loss, accuracies, ε, bytes, clients and time."""
        values = {
            "loss/test": record.loss,
            "loss/training": record.train_loss,
            "accuracy/test": record.accuracy,
            "accuracy/clients_mean": record.clients.mean if record.clients else None,
            "accuracy/clients_worst_decile": record.clients.worst_decile if record.clients else None,
            "privacy/epsilon": record.epsilon,
            "bytes/up": record.bytes_up,
            "bytes/down": record.bytes_down,
            "clients/finished": len(record.cohort),
            "clients/lost": len(record.lost),
            "time/simulated_seconds": record.simulated_seconds,
        }
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(name, value, record.round)
        self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


class NoLogs:
    """Writes nothing."""

    def add(self, record: RoundRecord) -> None:
        """See `Logs`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See `Logs`."""
