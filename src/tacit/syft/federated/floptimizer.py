"""Optimizers with state of their own for each worker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from tacit.errors import InputError


class Optims:
    """One optimizer a worker, for parameters that travel.

    Args:
        workers: the workers' names.
        optim: made for the parameters; each worker's has its settings.
    """

    def __init__(self, workers: Iterable[str], optim: Optimizer) -> None:
        self.optimizers: dict[str, Optimizer] = {}
        for worker in workers:
            kind: Any = type(optim)
            self.optimizers[worker] = kind([{**group} for group in optim.param_groups], **optim.defaults)

    def get_optim(self, worker: str) -> Optimizer:
        """The worker's optimizer.

        Raises:
            InputError: there is none for it.
        """
        if worker not in self.optimizers:
            raise InputError(f"no optimizer for {worker!r}: there is one for each of {', '.join(self.optimizers)}")
        return self.optimizers[worker]

    def count(self) -> int:
        """How many there are."""
        return len(self.optimizers)
