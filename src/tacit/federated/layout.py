"""How the trainable parameters of a model lie in one flat vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from tacit.errors import InputError


@dataclass(frozen=True)
class Layout:
    """The order of a model's trainable parameters in a vector of ``size`` entries.

    What clients send, compress, clip, mask and average are such vectors: one tensor instead of many.

    Args:
        names: of the parameters, in the model's order, each shared one once.
        shapes: their shapes.
        dtype: of every one of them.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """The layout of the parameters of ``model`` that require gradients.

        Raises:
            InputError: there is none, or they are not of one floating-point dtype.
        """
        parameters = trainable_parameters(model)
        if not parameters:
            raise InputError("the model has no parameter that requires a gradient: there is nothing to train")
        dtypes = {parameter.dtype for parameter in parameters.values()}
        if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
            found = ", ".join(sorted(map(str, dtypes)))
            raise InputError(f"the model's trainable parameters are {found}: convert them to one floating-point dtype")
        return cls(tuple(parameters), tuple(p.shape for p in parameters.values()), dtypes.pop())

    @property
    def size(self) -> int:
        """D, the number of entries."""
        return sum(shape.numel() for shape in self.shapes)

    def slices(self) -> dict[str, slice]:
        """Where each parameter lies in the vector."""
        ends = list(accumulate(shape.numel() for shape in self.shapes))
        starts = [0, *ends[:-1]]
        return {name: slice(*span) for name, *span in zip(self.names, starts, ends, strict=True)}

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """The parameters in ``vector`` (shape ``(D,)``) by name, as views of its memory."""
        pieces = torch.split(vector, [shape.numel() for shape in self.shapes])
        return {name: p.view(shape) for name, shape, p in zip(self.names, self.shapes, pieces, strict=True)}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A new vector of shape ``(D,)`` with the values of ``tensors``, which has every name of the layout."""
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.names])


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that require gradients, by name, each shared one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
