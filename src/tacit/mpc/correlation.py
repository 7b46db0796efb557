"""Correlated randomness: what the crypto provider deals, and how little of it has to be sent.

The provider deals input-independent random values to alice and bob ahead of time. Each party holds one seed of 16
bytes; for the correlation number *i* of a session it derives a fresh generator and expands its part locally. A
*uniform* field is the sum (or XOR) of two such expansions, so nobody is sent anything for it. A *dealt* field has a
prescribed true value: alice expands hers, and bob alone is sent the correction, true value minus her expansion.

Every protocol file defines its correlations next to the party's half of the protocol: a subclass of `Correlation` says
what the fields are and how the provider derives the dealt ones from the uniform ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tacit.errors import CorrelationError
from tacit.mpc.steps import Role
from tacit.ring.prg import Prg


@dataclass(frozen=True)
class Field:
    """One tensor of a correlation.

    Args:
        shape: its shape.
        dtype: int8 to int64; a narrower type is the ring Z/2^8 … Z/2^32.
        dealt: whether bob is sent a correction, so that the true value is the provider's to choose.
        xor: whether shares XOR instead of adding.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.int64
    dealt: bool = False
    xor: bool = False

    @cached_property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def stretch(self) -> int:
        """What it takes of a block: its bytes and what is left of the last word."""
        return -(-self.nbytes // 8) * 8

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Its strides as a contiguous tensor, in elements."""
        return tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))


class Part(SimpleNamespace):
    """A party's part of a correlation: its tensors by field name."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this correlation has no field {name!r}")

    def __repr__(self) -> str:
        return f"Part({', '.join(vars(self))})"


class Correlation(ABC):
    """The description of one piece of correlated randomness; public, and equal at all three parties."""

    @property
    @abstractmethod
    def fields(self) -> dict[str, Field]:
        """The tensors that make it up."""

    @abstractmethod
    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """The provider's half: the true values of the dealt fields, given those of the uniform ones."""

    def correct(self, alice: Part, bob: Part, provider: Provider) -> dict[str, Tensor]:
        """The corrections for bob: true values minus alice's expansions, or XOR; these may be overwritten.

        Args:
            alice: alice's expansions of all fields.
            bob: bob's, of the uniform ones.
            provider: whose generator and memory `derive` may use.
        """
        fields, halves = layout(self).fields, vars(bob).items()
        uniform = {k: vars(alice)[k] ^ half if fields[k].xor else vars(alice)[k] + half for k, half in halves}
        dealt = self.derive(Part(**uniform), provider)
        for name, value in dealt.items():
            own = vars(alice)[name]
            dealt[name] = torch.bitwise_xor(value, own, out=own) if fields[name].xor else torch.sub(value, own, out=own)
        return dealt

    def prepare(self, part: Part, party: Party) -> Part:
        """What a party computes from its part before it is needed; nothing, unless a correlation says otherwise."""
        return part

    @property
    def nbytes(self) -> int:
        """Bytes that the provider sends for it: bob's corrections."""
        return layout(self).nbytes

    @property
    def multiplications(self) -> int:
        """Words that each party multiplies online to use it, where that is what takes its time; for estimates."""
        return 0

    def blank(self) -> Part:
        """A part on the ``meta`` device, for planning."""
        return Part(**{k: torch.empty(f.shape, dtype=f.dtype, device="meta") for k, f in self.fields.items()})


@dataclass(frozen=True)
class Layout:
    """What dealing needs to know of a correlation, worked out once: its fields may take planning to find.

    Args:
        fields: all of them.
        uniform: those that are not dealt, which is all that bob expands.
        dealt: those that are, in the order in which the provider sends them.
        nbytes: size of the dealt ones.
    """

    fields: dict[str, Field]
    uniform: dict[str, Field]
    dealt: dict[str, Field]
    nbytes: int


@lru_cache(maxsize=4096)
def layout(correlation: Correlation) -> Layout:
    """The layout of a correlation; equal ones have the same."""
    fields = correlation.fields
    uniform = {name: item for name, item in fields.items() if not item.dealt}
    dealt = {name: item for name, item in fields.items() if item.dealt}
    return Layout(fields, uniform, dealt, sum(item.nbytes for item in dealt.values()))


def expand(prg: Prg, fields: Mapping[str, Field]) -> Part:
    """Uniform tensors for all fields, contiguous and cut from one block of the generator's stream."""
    block = torch.from_numpy(prg.array(sum(item.stretch for item in fields.values())))
    tensors, start = {}, 0
    for name, item in fields.items():
        # One call instead of a slice, a view and a reshape.
        tensors[name] = block.view(item.dtype).as_strided(item.shape, item.strides, start // item.dtype.itemsize)
        start += item.stretch
    return Part(**tensors)


@dataclass(repr=False, eq=False)
class Party:
    """A computing party's side of the dealing: its seed, and its state per loaded model.

    Args:
        role: alice or bob.
        seed: the generator that the provider also holds; the other party does not.
        weights: what `tacit.mpc.linear.load_weight` left here, by number.
        cluster: the driver that runs it, where one process runs all three parties.
    """

    role: Role
    seed: Prg
    weights: dict[int, Any] = field(default_factory=dict)
    cluster: Any = None
    _next: int = 0

    def receive(self, number: int, correlation: Correlation, corrections: Mapping[str, Tensor]) -> Part:
        """Expand this party's part of correlation ``number``, and add what the provider sent.

        Raises:
            CorrelationError: the number is not the next one, so the randomness was received before or skipped.
        """
        if number != self._next:
            raise CorrelationError(f"{self.role.value} expects correlation {self._next} next, not {number}")
        self._next += 1
        prg = self.seed.derive("correlation", number)
        if self.role is Role.ALICE:
            return correlation.prepare(expand(prg, layout(correlation).fields), self)
        part = expand(prg, layout(correlation).uniform)
        return correlation.prepare(Part(**vars(part), **corrections), self)

    def __repr__(self) -> str:
        return f"Party({self.role.value})"


class Provider:
    """The crypto provider's side: derives every correlation from the parties' seeds and keeps none.

    Args:
        alice: the seed shared with alice.
        bob: the seed shared with bob.
        own: where true values come from that neither party may know.
    """

    def __init__(self, alice: Prg, bob: Prg, own: Prg) -> None:
        self._alice, self._bob, self.prg = alice, bob, own
        self.weight_masks: dict[int, Tensor] = {}
        self.step_masks: dict[str, Tensor] = {}
        self._next = 0

    def deal(self, correlation: Correlation) -> tuple[int, dict[str, Tensor]]:
        """Deal the next correlation.

        Returns:
            Its number, and the corrections to send to bob.
        """
        number = self._next
        alice = expand(self._alice.derive("correlation", number), layout(correlation).fields)
        bob = expand(self._bob.derive("correlation", number), layout(correlation).uniform)
        corrections = correlation.correct(alice, bob, self)
        # A failure above has sent nothing to anyone, and the parties still expect this number.
        self._next += 1
        return number, corrections

    def __repr__(self) -> str:
        return f"Provider({self._next} correlations dealt)"
