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

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


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

    def prepare(self, part: Part, party: Party) -> Part:
        """What a party computes from its part before it is needed; nothing, unless a correlation says otherwise."""
        return part

    @property
    def nbytes(self) -> int:
        """Bytes that the provider sends for it: bob's corrections."""
        return sum(item.nbytes for item in self.fields.values() if item.dealt)

    def blank(self) -> Part:
        """A part on the ``meta`` device, for planning."""
        return Part(**{k: torch.empty(f.shape, dtype=f.dtype, device="meta") for k, f in self.fields.items()})


def expand(prg: Prg, fields: Mapping[str, Field]) -> Part:
    """Uniform tensors for all fields, cut from one block of the generator's stream."""
    sizes = {name: -(-item.nbytes // 8) * 8 for name, item in fields.items()}
    block = torch.from_numpy(prg.array(sum(sizes.values())))
    tensors, start = {}, 0
    for name, item in fields.items():
        tensors[name] = block[start : start + item.nbytes].view(item.dtype).reshape(item.shape)
        start += sizes[name]
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
        fields = correlation.fields
        prg = self.seed.derive("correlation", number)
        if self.role is Role.ALICE:
            return correlation.prepare(expand(prg, fields), self)
        part = expand(prg, {name: item for name, item in fields.items() if not item.dealt})
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
        self._next = 0

    def deal(self, correlation: Correlation) -> tuple[int, dict[str, Tensor]]:
        """Deal the next correlation.

        Returns:
            Its number, and the corrections to send to bob.
        """
        number, self._next = self._next, self._next + 1
        fields = correlation.fields
        uniform_fields = {name: item for name, item in fields.items() if not item.dealt}
        alice = vars(expand(self._alice.derive("correlation", number), fields))
        bob = vars(expand(self._bob.derive("correlation", number), uniform_fields))
        uniform = Part(
            **{k: alice[k] ^ bob[k] if item.xor else alice[k] + bob[k] for k, item in uniform_fields.items()}
        )
        dealt = correlation.derive(uniform, self)
        corrections = {k: v ^ alice[k] if fields[k].xor else v - alice[k] for k, v in dealt.items()}
        return number, corrections

    def __repr__(self) -> str:
        return f"Provider({self._next} correlations dealt)"
