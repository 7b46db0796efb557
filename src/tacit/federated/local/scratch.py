"""Memory that the programs of a solver take turns with."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 64
BLOCK_BYTES = 1 << 20


class Scratch:
    """Memory handed out from the start again for every program: one runs at a time, and each writes before it reads.

    So the memory of a solver is that of its largest program, however many sizes of batch there are.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._block = self._offset = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(block.nbytes for block in self._blocks)

    def restart(self) -> None:
        """Begin with the first byte again."""
        self._block = self._offset = 0

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor here, laid out as it is."""
        if not tensor.numel():
            return tensor
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        nbytes = (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()
        place = self._take(nbytes).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        return place.copy_(tensor)

    def _take(self, nbytes: int) -> Tensor:
        while self._block < len(self._blocks):
            block = self._blocks[self._block]
            if self._offset + nbytes <= len(block):
                start, self._offset = self._offset, -(-(self._offset + nbytes) // ALIGNMENT) * ALIGNMENT
                return block[start : start + nbytes]
            self._block, self._offset = self._block + 1, 0
        self._blocks.append(torch.empty(max(nbytes, BLOCK_BYTES), dtype=torch.uint8))
        return self._take(nbytes)
