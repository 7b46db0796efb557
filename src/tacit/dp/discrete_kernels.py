"""The compiled loop behind `tacit.dp.discrete`; see `tacit.ring.kernels`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tacit.ring.kernels import compiled


@compiled
def invert(
    words: NDArray[np.uint64], high: NDArray[np.uint64], guide: NDArray[np.uint32], shift: int, drawn: NDArray[np.int64]
) -> int:
    """Fill ``drawn`` as `discrete.invert` does, and count the draws that more bits have to decide."""
    undecided = 0
    lead, one = np.uint64(shift), np.uint64(1)
    for i in range(words.size):
        fraction = words[i] >> one
        k = np.int64(guide[fraction >> lead])
        while high[k] <= fraction:
            k += 1
        if k > 0 and high[k - 1] == fraction:
            undecided += 1
        drawn[i] = -k if words[i] & one else k
    return undecided
