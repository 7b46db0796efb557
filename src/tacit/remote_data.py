"""Datasets whose batches are at workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from tacit.errors import InputError
from tacit.remote import PointerTensor, VirtualWorker, cloned


class BaseDataset(Dataset[Any]):
    """Inputs and targets that are together, here or at one worker.

    Args:
        data: inputs, one in each row, or a pointer to them.
        targets: their targets, likewise.
        transform: applied to an input when it is read here.
    """

    def __init__(self, data: Any, targets: Any, transform: Any = None, **_: Any) -> None:
        if len(data) != len(targets):
            raise InputError(f"{len(data)} inputs and {len(targets)} targets: give one target for each input")
        self.data, self.targets, self.transform = data, targets, transform

    @property
    def location(self) -> VirtualWorker | None:
        """Where the data is; None if it is here."""
        return self.data.location if isinstance(self.data, PointerTensor) else None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        item = self.data[index]
        return (self.transform(item) if self.transform and not self.location else item), self.targets[index]

    def send(self, worker: VirtualWorker) -> BaseDataset:
        """Send inputs and targets to a worker."""
        self.data, self.targets = (
            PointerTensor(worker, worker.hold(cloned(value))) for value in (self.data, self.targets)
        )
        return self

    def get(self) -> BaseDataset:
        """Take them back."""
        self.data, self.targets = self.data.get(), self.targets.get()
        return self


class FederatedDataset(Dataset[Any]):
    """Datasets by the worker that they are at.

    Args:
        datasets: each at one worker.
    """

    def __init__(self, datasets: Iterable[BaseDataset]) -> None:
        self.datasets = {}
        for dataset in datasets:
            if dataset.location is None:
                raise InputError("a dataset is still here: .send(worker) it, or .federate((bob, alice)) the whole")
            self.datasets[dataset.location.id] = dataset

    @property
    def workers(self) -> list[str]:
        """The workers' names."""
        return list(self.datasets)

    def __getitem__(self, worker_id: str) -> BaseDataset:
        return self.datasets[worker_id]

    def __len__(self) -> int:
        return sum(map(len, self.datasets.values()))

    def __repr__(self) -> str:
        return (
            "FederatedDataset(\n"
            + "".join(f"    {name}: {len(one)} items\n" for name, one in self.datasets.items())
            + ")"
        )


class FederatedDataLoader:
    """Batches of a federated dataset, worker by worker: pairs of pointers.

    Args:
        federated_dataset: where the data is.
        batch_size: of each batch; a worker's last one may be smaller.
        shuffle: whether a worker's items come in a new order every time.
        drop_last: whether smaller batches are left out.
    """

    def __init__(
        self,
        federated_dataset: FederatedDataset,
        batch_size: int = 8,
        shuffle: bool = False,
        drop_last: bool = False,
        **_: Any,
    ) -> None:
        self.federated_dataset, self.batch_size = federated_dataset, batch_size
        self.shuffle, self.drop_last = shuffle, drop_last

    @property
    def dataset(self) -> FederatedDataset:
        """The federated dataset."""
        return self.federated_dataset

    def _batches(self) -> Iterator[tuple[BaseDataset, BatchSampler]]:
        for one in self.federated_dataset.datasets.values():
            order = RandomSampler(range(len(one))) if self.shuffle else SequentialSampler(range(len(one)))
            yield one, BatchSampler(order, self.batch_size, self.drop_last)

    def __iter__(self) -> Iterator[tuple[PointerTensor, PointerTensor]]:
        for one, batches in self._batches():
            for rows in batches:
                yield one[rows]

    def __len__(self) -> int:
        return sum(len(batches) for _, batches in self._batches())


def federate(dataset: Dataset[Any], workers: Sequence[VirtualWorker]) -> FederatedDataset:
    """Cut a dataset into parts of one size and send one to each worker.

    Args:
        dataset: of pairs (input, target).
        workers: as many as there shall be parts.
    """
    size = -(-len(dataset) // len(workers))  # type: ignore[arg-type]
    parts = DataLoader(dataset, batch_size=size)
    return FederatedDataset(
        BaseDataset(*(_tensor(part) for part in pair)).send(worker)
        for pair, worker in zip(parts, workers, strict=False)
    )


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value)
