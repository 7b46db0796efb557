"""Real vectors of bounded norm as integers of bounded norm, whatever the rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tacit.dp.clipping import clip
from tacit.dp.distributed import rounded_norm
from tacit.federated.secure_sum.encoding import Encoding
from tacit.federated.secure_sum.shared_messages import room_for
from tacit.ring.prg import Prg

_INWARD = 1 - 2.0**-32


@dataclass(frozen=True)
class BoundedEncoding:
    """Updates clipped to a norm, and rounded at random to the grid of an `Encoding` until they keep a bound there.

    Kairouz, Liu and Steinke 2021, algorithm 1, without the rotation, which only spreads large entries.

    *Guarantees*: the integers of any update have a Euclidean norm of at most `bound`. Their expectation is the clipped
    update's, but for what drawing again shortens it by.

    Args:
        size: D, entries of an update.
        clip: S, the greatest Euclidean norm of an update.
        clients: the most whose vectors are summed.
        bits: q, bits of one client's entry, sign included.
        verified: whether the ring has to have the room in which norms are verified on shares
            (`tacit.federated.secure_sum.shared_bounds`).

    Raises:
        InputError: a setting is out of range, or the sum would need more than 32 bits.
    """

    size: int
    clip: float
    clients: int
    bits: int = 16
    verified: bool = False

    def __post_init__(self) -> None:
        _ = self.encoding

    @cached_property
    def encoding(self) -> Encoding:
        """The grid, and a ring that holds the sum."""
        least = room_for(self.whole_bound) if self.verified else 2
        return replace(self._grid, least_bits=least)

    @property
    def norm(self) -> float:
        """S in steps of the grid."""
        return self.clip * self._grid.scale

    @cached_property
    def bound(self) -> float:
        """B, the greatest Euclidean norm of a client's integers."""
        return rounded_norm(self.norm, self.size)

    @property
    def whole_bound(self) -> int:
        """B, rounded up to what can be verified on shares."""
        return math.ceil(self.bound)

    def within(self, norm: float) -> BoundedEncoding:
        """The same, but clipping so that the rounded vectors are within ``norm``, too."""
        return replace(self, clip=norm * self.norm / self.bound * _INWARD)

    def integers(self, update: Tensor, prg: Prg) -> NDArray[np.int64]:
        """A client's clipped and rounded update, int64 of shape ``(size,)``.

        How many roundings it takes depends on the update, at most 2.6 on average: do not let anyone time a client.

        Raises:
            InputError: the shape does not fit.
            RangeError: an entry is not finite.
        """
        clipped = clip(update, self.clip)
        while True:
            integers, _ = self._grid.integers(clipped, (), prg)
            if int(np.dot(integers, integers)) <= self.bound**2:
                return integers

    @cached_property
    def _grid(self) -> Encoding:
        return Encoding(self.size, self.clip, self.clients, self.bits)
