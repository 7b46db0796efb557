"""What a model's inputs have to be, found on an example and checked on everything that comes later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tacit.errors import InputError


@dataclass(frozen=True)
class ModelInput:
    """What one of a model's inputs has to be.

    Args:
        item_shape: of an item, without the batch.
        whole: whether it takes whole numbers, as embeddings do; torch tells them by their dtype.
    """

    item_shape: tuple[int, ...]
    whole: bool = False

    @classmethod
    def of(cls, example: Any) -> ModelInput:
        """The input of which this is an example batch."""
        whole = isinstance(example, Tensor) and example.dtype in (torch.int32, torch.int64)
        return cls(tuple(example.shape[1:]) if isinstance(example, Tensor) else (), whole)

    @property
    def dtype(self) -> torch.dtype:
        """What to trace a model for."""
        return torch.int64 if self.whole else torch.float32

    def blank(self, count: int) -> Tensor:
        """A batch of zeros."""
        return torch.zeros(count, *self.item_shape, dtype=self.dtype)

    def checked(self, values: Any) -> Tensor:
        """A batch that fits, without its gradient.

        Raises:
            InputError: it is no tensor, of another shape or dtype, or empty.
        """
        if not isinstance(values, Tensor):
            raise InputError(f"the input is a {type(values).__name__}: give a torch.Tensor")
        if values.dim() < 1 or tuple(values.shape[1:]) != self.item_shape:
            takes = ", ".join(map(str, self.item_shape))
            raise InputError(f"the input has shape {tuple(values.shape)}: the model takes (n, {takes})")
        if not len(values):
            raise InputError("the input is an empty batch: give at least one item")
        if values.is_complex() or values.dtype == torch.bool:
            raise InputError(f"the input has dtype {values.dtype}: give real numbers, for example float32")
        if values.is_floating_point() and self.whole:
            raise InputError(f"the input has dtype {values.dtype}: the model was encrypted for whole numbers")
        return values.detach()


def checked_inputs(inputs: Sequence[Any], wanted: Sequence[ModelInput], model: str) -> tuple[Tensor, ...]:
    """One batch for each of a model's inputs.

    Args:
        inputs: what was given.
        wanted: what has to be.
        model: how errors call it.

    Raises:
        InputError: too many or too few, or one of them does not fit.
    """
    if len(inputs) != len(wanted):
        raise InputError(f"{model} was encrypted for {len(wanted)} inputs: {len(inputs)} were given")
    return tuple(one.checked(value) for value, one in zip(inputs, wanted, strict=True))
