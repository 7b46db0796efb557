"""Real vectors as residues whose sum cannot wrap around.

An entry x, clamped to [-c, c], becomes the integer floor(x·s + u) for u uniform in [0, 1) and s = (2^(q-1) - 1) / c:
rounded up or down at random so that its expectation is x·s (stochastic rounding). It has q bits with its sign, so the
sum over n clients has q + ceil(log2 n), give or take what noise adds: that is the ring.

Scalars (a client's weight, its loss times its weight) need more digits than a gradient does. Each is a whole number of
steps, cut into digits of q - 1 bits that take an entry each, so its sum is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tacit.errors import InputError, RangeError
from tacit.federated.secure_sum.ring import Ring, Words
from tacit.ring.prg import Prg

_PIECE = 1 << 15
_SPREAD = 2.0**-32


@dataclass(frozen=True)
class Scalar:
    """A number, or some numbers of one kind, that each client adds to its vector.

    Args:
        name: what an error calls it.
        bound: the largest magnitude a client may give.
        step: what it is rounded to a multiple of; 1 keeps counts exact.
        count: how many numbers.

    Raises:
        InputError: the bound is less than a step, or not finite, or more than 2^62 steps; or there is no number.
    """

    name: str
    bound: float
    step: float = 1.0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"{self.name}: {self.count} numbers: give 1 or more, or leave it out")
        if not (0 < self.step <= self.bound < math.inf and self.bound / self.step <= 2.0**62):
            raise InputError(f"{self.name}: a bound of {self.bound} in steps of {self.step}: give 0 < step <= bound")

    @property
    def most(self) -> int:
        """The largest number of steps."""
        return round(self.bound / self.step)

    def steps(self, values: Sequence[float]) -> NDArray[np.int64]:
        """``values`` in steps, to the nearest.

        Raises:
            RangeError: one is not finite or beyond the bound.
        """
        array = np.asarray(values, np.float64)
        if not (np.abs(array) <= self.bound).all():
            raise RangeError(f"{self.name} is not finite or beyond ±{self.bound:g}, its bound in this round")
        return np.rint(array / self.step).astype(np.int64)


@dataclass(frozen=True, repr=False, eq=False)
class Encoded:
    """A client's vector as residues.

    Args:
        words: shape ``(length,)``.
        clamped: how many entries lay beyond the clip.
    """

    words: Words
    clamped: int

    def __repr__(self) -> str:
        return f"Encoded({len(self.words)} residues hidden)"


@dataclass(frozen=True)
class Encoding:
    """How a round's vectors become residues.

    A weighted mean is two sums: clients give w·x as the vector, where w in [0, 1] is the weight over the largest one
    allowed, so that ``clip`` bounds it, and w as a scalar; the mean is the quotient of the decoded sums.

    Args:
        size: D, entries of the real vector.
        clip: c, the largest magnitude of an entry.
        clients: n, the most clients whose vectors are summed.
        bits: q, bits of one client's entry, sign included, from 2 to 24.
        scalars: what follows the vector.
        headroom: the largest magnitude of the noise in an entry of the sum, over ``clients``, in units of 1/s.
        least_bits: the least b of the ring, whatever the sum needs.

    Raises:
        InputError: a setting is out of range, or the sum would need more than 32 bits.
    """

    size: int
    clip: float
    clients: int
    bits: int = 16
    scalars: tuple[Scalar, ...] = ()
    headroom: int = 0
    least_bits: int = 2

    def __post_init__(self) -> None:
        if self.size < 0 or self.clients < 1 or self.headroom < 0:
            raise InputError(
                f"size={self.size}, clients={self.clients}, headroom={self.headroom}: give at least 0, 1 and 0"
            )
        if not (self.clip > 0 and math.isfinite(self.clip) and math.isfinite(self.scale)):
            raise InputError(f"clip={self.clip}: give the largest magnitude of an entry, above 0, such as 1.0")
        if not 2 <= self.bits <= 24:
            raise InputError(f"bits={self.bits}: one client's entry takes from 2 to 24 bits, such as 16")
        if self._ring_bits > 32:
            raise InputError(
                f"{self.clients} clients of {self.bits} bits with a headroom of {self.headroom} sum to up to "
                f"{self.clients * self._largest}, which takes {self._ring_bits} bits and could overflow the 32 "
                f"there are: choose fewer bits or clients"
            )

    @property
    def description(self) -> str:
        """All of it in a line, equal for equal encodings: what clients and server agree on before a round."""
        scalars = ", ".join(
            f"{scalar.count} × {scalar.name} to {scalar.bound!r} by {scalar.step!r}" for scalar in self.scalars
        )
        return (
            f"{self.size} entries clipped to {self.clip!r} in {self.bits} bits, {self.clients} clients, headroom "
            f"{self.headroom}, ring of {self.ring.bits} bits" + (f"; {scalars}" if scalars else "")
        )

    @property
    def scale(self) -> float:
        """s, units of an integer in 1."""
        return self._most / self.clip

    @property
    def ring(self) -> Ring:
        """The least ring in which no sum of ``clients`` vectors can wrap, or that of ``least_bits``."""
        return Ring(max(self.least_bits, self._ring_bits))

    @property
    def length(self) -> int:
        """Residues of a client's vector: the entries and the digits of the scalars."""
        return self.size + sum(scalar.count * self._digits(scalar) for scalar in self.scalars)

    @property
    def _most(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def _largest(self) -> int:
        return self._most + self.headroom

    @property
    def _ring_bits(self) -> int:
        # Both ±n·largest must lie in [-2^(b-1), 2^(b-1)).
        return (self.clients * self._largest).bit_length() + 1

    def _digits(self, scalar: Scalar) -> int:
        return -(-scalar.most.bit_length() // (self.bits - 1))

    def integers(self, vector: Tensor, scalars: Sequence[float], prg: Prg) -> tuple[NDArray[np.int64], int]:
        """A client's integers before they are reduced, where noise is added; and how many entries were clamped.

        Args:
            vector: real, finite, shape ``(size,)``.
            scalars: the numbers of each of ``self.scalars``, one after another.
            prg: where the rounding comes from.

        Returns:
            int64 of shape ``(length,)``, each of magnitude below 2^(q-1); their expectation is s times the vector.

        Raises:
            InputError: the shapes do not fit.
            RangeError: an entry is not finite, or a scalar is beyond its bound.
        """
        wanted = sum(scalar.count for scalar in self.scalars)
        if tuple(vector.shape) != (self.size,) or len(scalars) != wanted:
            raise InputError(
                f"a vector of shape {tuple(vector.shape)} and {len(scalars)} scalars: this round sums vectors of "
                f"({self.size},) and {wanted}"
            )
        values = vector.detach().numpy()
        result = np.empty(self.length, np.int64)
        clamped = sum(self._round(values, result, start, prg) for start in range(0, self.size, _PIECE))
        start, at = self.size, 0
        for scalar in self.scalars:
            digits = self._cut(scalar, scalars[at : (at := at + scalar.count)])
            result[start : (start := start + len(digits))] = digits
        return result, clamped

    def _round(self, values: NDArray[np.floating], result: NDArray[np.int64], start: int, prg: Prg) -> int:
        part = values[start : start + _PIECE].astype(np.float64)
        if not np.isfinite(part).all():
            raise RangeError("the vector holds NaN or infinity: a client whose training diverged has nothing to send")
        beyond = int(np.count_nonzero(np.abs(part) > self.clip))
        if beyond:
            np.clip(part, -self.clip, self.clip, out=part)
        part *= self.scale
        part += prg.array(4 * len(part)).view(np.uint32) * _SPREAD
        np.floor(part, out=part)
        # The scale itself is rounded, so an entry at the clip may come out one unit too high.
        np.clip(part, -self._most, self._most, out=part)
        result[start : start + len(part)] = part
        return beyond

    def _cut(self, scalar: Scalar, values: Sequence[float]) -> NDArray[np.int64]:
        steps = scalar.steps(values)[:, None]
        places = (self.bits - 1) * np.arange(self._digits(scalar))
        digits = np.sign(steps) * (np.abs(steps) >> places & self._most)
        return np.asarray(digits.reshape(-1), np.int64)

    def encode(self, vector: Tensor, scalars: Sequence[float], prg: Prg) -> Encoded:
        """A client's residues; see `integers`."""
        integers, clamped = self.integers(vector, scalars, prg)
        return Encoded(self.ring.residues(integers), clamped)

    def decode(self, total: Words) -> tuple[Tensor, tuple[float, ...]]:
        """The sum of the vectors, float32 of shape ``(size,)``, and the sums of the scalars, one after another.

        Guarantees: without noise, an entry of the sum of n vectors is within n / s of the sum of the clamped entries
        and right in expectation; a scalar is the sum of its multiples of a step.

        Raises:
            InputError: ``total`` is not a vector of this encoding.
        """
        self.ring.require(total, self.length)
        integers = self.ring.signed(total)
        vector = torch.from_numpy((integers[: self.size] / self.scale).astype(np.float32))
        sums, at = [], self.size
        for scalar in self.scalars:
            digits = integers[at : (at := at + scalar.count * self._digits(scalar))]
            for number in digits.reshape(scalar.count, -1).tolist():
                sums.append(scalar.step * sum(digit << (self.bits - 1) * i for i, digit in enumerate(number)))
        return vector, tuple(sums)
