"""The Gaussian mechanism: normal noise from the cryptographic generator, released on a grid.

The noise is drawn by the transform of Box and Muller 1958 in float64 from 128 bits a pair of numbers: 64 for the
radius, so that the largest deviation is 9.5 and what is cut off has probability 2^-65 a pair, and 64 for the angle.

Numbers computed in floating point betray their terms by which low-order bits can occur at all (Mironov 2012 for Laplace
noise; Jin et al. 2022 for the Gaussian). What is released here is therefore rounded to a grid of `GRID` to twice that
many steps a standard deviation, the same whatever was summed, so every point of the grid can come from every input.
That stops the known attacks; it is no proof that the rounded distribution has exactly the (ε, δ) of the continuous
one. Where such a proof is asked for, use noise that is discrete to begin with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tacit.errors import InputError
from tacit.ring.kernels import load
from tacit.ring.prg import Prg

GRID = 4096
"""At least so many grid steps make one standard deviation; rounding adds less than 10⁻⁸ of the variance."""

_BLOCK = 1 << 14


def add_gaussian_(values: Tensor, std: float, prg: Prg) -> None:
    """Add independent noise N(0, ``std``²) to every entry in place, and round to the grid of `grid`.

    Args:
        values: float32 or float64, contiguous. Sums of clipped vectors, whose noise it must be that covers them.
        std: standard deviation; 0 leaves the values as they are.
        prg: fresh for every release, or derived for it alone: noise that is drawn twice can be subtracted.

    Cost: 8 bytes of the generator and 2–3 ns an entry.

    Raises:
        InputError: ``std`` is negative or not finite, or the values are not such a tensor.
    """
    if not (std >= 0 and math.isfinite(std)):
        raise InputError(f"std={std}: the standard deviation of noise is a number of 0 or more")
    if values.dtype not in (torch.float32, torch.float64) or not values.is_contiguous():
        raise InputError(f"noise is added to contiguous float32 or float64 tensors, not to {values.dtype}: convert it")
    if std == 0:
        return
    step = grid(std)
    loops = load("tacit.dp.kernels") if values.is_cpu else None
    flat = values.view(-1)
    for start in range(0, len(flat), _BLOCK):
        block = flat[start : start + _BLOCK]
        words = prg.words((2 * ((len(block) + 1) // 2),))
        if loops is None:
            noise = standard_normal(words)[: len(block)].to(block.device)
            block.copy_(((block.double() / step + noise * (std / step)).round() * step).to(block.dtype))
        else:
            loops.add_gaussian(block.numpy(), words.numpy(), std / step, step)


def grid(std: float) -> float:
    """The distance between neighbouring values of a release with noise of that standard deviation: a power of two."""
    return 2.0 ** math.floor(math.log2(std)) / GRID


def standard_normal(words: Tensor) -> Tensor:
    """Independent standard normal numbers from uniform words, as many; what the compiled loop computes, in torch.

    Args:
        words: int64, an even number of them, in one dimension: radii, then angles. A radius is √(−2 ln u) with u the
            word as a fraction of 2^64. The upper 61 bits of an angle turn within ± 1/8 of the circle, and the lowest
            three mirror it at the diagonal and the two axes.

    Returns:
        float64 of the same length: all first numbers of the pairs, then all second.
    """
    chances, angles = words.view(2, -1)
    # torch has no unsigned words: the upper half of them counts from -2^63.
    unsigned = chances.double() + torch.where(chances < 0, 2.0**64, 0.0) + 0.5
    radius = (unsigned.log() - 64 * math.log(2)).mul(-2).clamp(min=0).sqrt()
    turn = (angles & ~7).double() * (math.pi / 4 * 2.0**-63)
    swap, first, second = (((angles & bit) != 0) for bit in (1, 2, 4))
    across, up = torch.where(swap, turn.sin(), turn.cos()), torch.where(swap, turn.cos(), turn.sin())
    signs = [1 - 2 * mirrored.double() for mirrored in (first, second)]
    return torch.cat([radius * across * signs[0], radius * up * signs[1]])
