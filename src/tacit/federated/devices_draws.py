"""Random numbers as a function of what they are for, for many devices at once.

What a simulated device does at a time must not depend on what was asked before, and a million devices must not
each carry a timeline. So every number is a hash of the fleet's seed, a purpose, the device and, say, the day.
Statistical quality only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tacit.federated.generators import generator_for


def uniform(seed: int, purpose: str, *parts: Tensor) -> Tensor:
    """Numbers in (0, 1), float64, one for each tuple of entries of ``parts`` (int64, broadcast together).

    The finalizer of SplitMix64 (Steele, Lea and Flood 2014) over each part in turn.
    """
    state: Tensor = torch.tensor(_signed(generator_for(seed, purpose).initial_seed()))
    for part in parts:
        state = _mix(state + (part + 1) * _signed(0x9E3779B97F4A7C15))
    fraction: Tensor = ((state >> 11) & ((1 << 53) - 1)).double()
    return (fraction + 0.5) * math.ldexp(1.0, -53)


def normal(seed: int, purpose: str, *parts: Tensor) -> Tensor:
    """Standard normal numbers, float64; see `uniform`."""
    numbers: Tensor = torch.special.ndtri(uniform(seed, purpose, *parts))
    return numbers


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; int64's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """A 64-bit word as the int64 of the same bits."""
    return word - (1 << 64) if word >> 63 else word
