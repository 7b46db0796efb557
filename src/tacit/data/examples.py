"""Labelled examples, and a data set of them: what a client holds and what a model is tested on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tacit.errors import InputError


@dataclass(frozen=True)
class Examples:
    """Inputs and their targets, row by row.

    Args:
        inputs: float tensor of shape ``(n, ...)``; for images ``(n, 1, 28, 28)`` in ``[0, 1]``.
        targets: int64 class indices of shape ``(n,)``.

    Raises:
        InputError: the two do not have the same length.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise InputError(f"{len(self.inputs)} inputs but {len(self.targets)} targets: one target an input")

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: Tensor) -> Examples:
        """The rows at ``indices`` (int64, shape ``(m,)``), copied."""
        return Examples(self.inputs[indices], self.targets[indices])


@dataclass(frozen=True)
class Dataset:
    """A named pair of training and test examples over ``classes`` classes."""

    name: str
    train: Examples
    test: Examples
    classes: int
