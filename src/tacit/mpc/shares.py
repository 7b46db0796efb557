"""What a party holds: its share of a private tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tacit.errors import InputError
from tacit.mpc.steps import Role
from tacit.ring.fixed_point import decode
from tacit.ring.prg import Prg


@dataclass(frozen=True, eq=False, repr=False)
class Share:
    """One party's additive share of a fixed-point tensor: x = (x_alice + x_bob) / 2^scale, sums in Z/2^64.

    A scale belongs to its value: an operation gives a new share with a scale of its own and changes none in place.

    Args:
        words: int64, the shape of the private tensor.
        scale: fractional bits.
        holder: whose share it is.
    """

    words: Tensor
    scale: int
    holder: Role

    @property
    def shape(self) -> torch.Size:
        """The private tensor's shape, which is public."""
        return self.words.shape

    def with_words(self, words: Tensor, scale: int | None = None) -> Share:
        """Another share of the same holder."""
        return Share(words, self.scale if scale is None else scale, self.holder)

    def map(self, function: Callable[[Tensor], Tensor]) -> Share:
        """Apply a linear map with integer coefficients (a view, a permutation, a sum) to the share, locally."""
        return self.with_words(function(self.words))

    def raised(self, scale: int) -> Share:
        """The same value with more fractional bits, exactly and locally (a shift to the left)."""
        if scale < self.scale:
            raise InputError(
                f"raising a share from {self.scale} to {scale} fractional bits would drop bits: truncate it"
            )
        return self.with_words(self.words << (scale - self.scale), scale) if scale > self.scale else self

    def plus_public(self, words: Tensor | int) -> Share:
        """The share after adding a public value, given at this scale: alice adds it, bob does nothing."""
        return self.with_words(self.words + words) if self.holder is Role.ALICE else self

    def __add__(self, other: Share) -> Share:
        scale = max(self.scale, other.scale)
        return self.with_words(self.raised(scale).words + other.raised(scale).words, scale)

    def __sub__(self, other: Share) -> Share:
        return self + -other

    def __neg__(self) -> Share:
        return self.with_words(-self.words)

    def __repr__(self) -> str:
        return f"Share(shape={tuple(self.shape)}, scale={self.scale}, holder={self.holder.value})"


@dataclass(frozen=True, eq=False, repr=False)
class Bits:
    """One party's XOR share of a tensor of bits.

    Args:
        bits: uint8 zeros and ones.
        holder: whose share it is.
    """

    bits: Tensor
    holder: Role

    def __invert__(self) -> Bits:
        return replace(self, bits=self.bits ^ 1) if self.holder is Role.ALICE else self

    def __repr__(self) -> str:
        return f"Bits(shape={tuple(self.bits.shape)}, holder={self.holder.value})"


def share(words: Tensor, scale: int, prg: Prg) -> tuple[Share, Share]:
    """Split ring elements into alice's and bob's shares: hers is uniform, his is the difference.

    Args:
        words: int64 ring elements, any shape.
        scale: their fractional bits.
        prg: the owner's generator.
    """
    mask = prg.words(tuple(words.shape))
    return Share(mask, scale, Role.ALICE), Share(words - mask, scale, Role.BOB)


def reconstruct(alice: Share, bob: Share) -> Tensor:
    """The private tensor as float64, from both shares; for whoever it is revealed to.

    Raises:
        InputError: the two are not an alice's and a bob's share of one shape and scale.
    """
    if (alice.holder, bob.holder) != (Role.ALICE, Role.BOB):
        raise InputError("reconstruct takes alice's share and bob's, in this order")
    if (alice.shape, alice.scale) != (bob.shape, bob.scale):
        raise InputError(f"{alice} and {bob} are not shares of one tensor")
    return decode(alice.words + bob.words, alice.scale)
