"""Which clients are invited to a round.

A selection is settings and one pure function of what the server knows at the start of a round. Clients without
examples and clients that are not eligible are never selected. Every draw is over tensors: a population of a
million costs some tens of milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from tacit.errors import InputError


class Selection(Protocol):
    """Draws the clients of a round."""

    @property
    def sampling_rate(self) -> float | None:
        """The probability with which each client takes part, on its own, whatever the others do.

        It is what amplifies privacy by sampling; ``None`` where clients are not drawn independently.
        """
        ...

    def select(self, round: int, sizes: Tensor, eligible: Tensor, generator: torch.Generator) -> tuple[int, ...]:
        """The clients of round ``round``, ascending.

        Args:
            round: its number, from 1.
            sizes: how many examples each client has, int64 of shape ``(N,)``.
            eligible: which clients can be asked now, bool of shape ``(N,)``.
            generator: the source of the draw.

        Raises:
            InputError: the selection asks for no client, or for more than there are.
        """
        ...

    def expected(self, sizes: Tensor) -> float:
        """How many clients are drawn on average, all of them eligible; ``sizes`` as for `select`."""
        ...

    def scaled(self, factor: float, clients: int) -> Selection:
        """The same selection of ``factor`` times as many, at most all ``clients``: over-selection."""
        ...


@dataclass(frozen=True)
class Uniform:
    """``cohort`` clients, every set of so many as likely as any other; fewer if fewer can be asked."""

    cohort: int

    @property
    def sampling_rate(self) -> None:
        """None: a cohort of fixed size is not drawn client by client."""
        return None

    def select(self, round: int, sizes: Tensor, eligible: Tensor, generator: torch.Generator) -> tuple[int, ...]:
        """See `Selection`."""
        candidates = _candidates(self.cohort, sizes, eligible)
        order = torch.randperm(len(candidates), generator=generator)[: self.cohort]
        return _ascending(candidates[order])

    def expected(self, sizes: Tensor) -> float:
        """The cohort, or everyone with examples if they are fewer."""
        return float(min(self.cohort, int((sizes > 0).sum())))

    def scaled(self, factor: float, clients: int) -> Uniform:
        """See `Selection`."""
        return replace(self, cohort=_scaled(self.cohort, factor, clients))


@dataclass(frozen=True)
class Poisson:
    """Each client with probability ``q``, independently: a cohort of Binomial(N, q) clients, which may be empty.

    What privacy accounting with amplification by sampling assumes (Abadi et al. 2016; McMahan et al. 2018).

    Raises:
        InputError: ``q`` is not above 0 and at most 1.
    """

    q: float

    def __post_init__(self) -> None:
        if not 0 < self.q <= 1:
            raise InputError(f"q={self.q}: a client's probability to be drawn lies above 0 and is at most 1")

    @property
    def sampling_rate(self) -> float:
        """q."""
        return self.q

    def select(self, round: int, sizes: Tensor, eligible: Tensor, generator: torch.Generator) -> tuple[int, ...]:
        """See `Selection`. Every client draws, so that who is eligible does not change another's luck."""
        drawn = torch.rand(len(sizes), generator=generator, dtype=torch.float64) < self.q
        return _ascending((drawn & eligible & (sizes > 0)).nonzero().flatten())

    def expected(self, sizes: Tensor) -> float:
        """q times the number of clients with examples."""
        return self.q * int((sizes > 0).sum())

    def scaled(self, factor: float, clients: int) -> Poisson:
        """See `Selection`."""
        return replace(self, q=min(1.0, self.q * _factor(factor)))


@dataclass(frozen=True)
class ByExamples:
    """``cohort`` clients drawn one after another, each time in proportion to the examples of those left."""

    cohort: int

    @property
    def sampling_rate(self) -> None:
        """None: clients are not drawn independently."""
        return None

    def select(self, round: int, sizes: Tensor, eligible: Tensor, generator: torch.Generator) -> tuple[int, ...]:
        """See `Selection`."""
        candidates = _candidates(self.cohort, sizes, eligible)
        return _ascending(candidates[_weighted_draw(sizes[candidates].double(), self.cohort, generator)])

    def expected(self, sizes: Tensor) -> float:
        """The cohort, or everyone with examples if they are fewer."""
        return float(min(self.cohort, int((sizes > 0).sum())))

    def scaled(self, factor: float, clients: int) -> ByExamples:
        """See `Selection`."""
        return replace(self, cohort=_scaled(self.cohort, factor, clients))


@dataclass(frozen=True, eq=False)
class AvailabilityAware:
    """``cohort`` clients, those that are seldom available first in chance.

    Drawing uniformly among whoever is eligible gives most rounds to those who nearly always are, and the model
    leans towards their data. As REFL (Abdelmoniem et al. 2023, *REFL: Resource-Efficient Federated Learning*) gives
    priority to the least available, here clients are drawn one after another in proportion to 1 / availability:
    inverse propensity, so that in the long run all take part about equally often, as long as the cohort is a small
    part of those eligible.

    Args:
        cohort: how many.
        availability: the fraction of the time that each client is eligible, in [0, 1], shape ``(N,)``; from
            `tacit.federated.devices.Fleet.availability`, or from a server's own records.
        floor: lower values count as this, so that no client is preferred without limit.

    Raises:
        InputError: an availability or ``floor`` is out of range.
    """

    cohort: int
    availability: Tensor = field(repr=False)
    floor: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise InputError(f"floor={self.floor}: give the least availability that counts, above 0 and at most 1")
        if self.availability.dim() != 1 or not bool(((self.availability >= 0) & (self.availability <= 1)).all()):
            raise InputError("availability holds a fraction of the time, in [0, 1], for each client: shape (N,)")

    @property
    def sampling_rate(self) -> None:
        """None: clients are not drawn independently."""
        return None

    def select(self, round: int, sizes: Tensor, eligible: Tensor, generator: torch.Generator) -> tuple[int, ...]:
        """See `Selection`."""
        if len(self.availability) != len(sizes):
            raise InputError(f"availability of {len(self.availability)} clients was given, but there are {len(sizes)}")
        candidates = _candidates(self.cohort, sizes, eligible)
        weights = self.availability[candidates].double().clamp(min=self.floor).reciprocal()
        return _ascending(candidates[_weighted_draw(weights, self.cohort, generator)])

    def expected(self, sizes: Tensor) -> float:
        """The cohort, or everyone with examples if they are fewer."""
        return float(min(self.cohort, int((sizes > 0).sum())))

    def scaled(self, factor: float, clients: int) -> AvailabilityAware:
        """See `Selection`."""
        return replace(self, cohort=_scaled(self.cohort, factor, clients))


def _candidates(cohort: int, sizes: Tensor, eligible: Tensor) -> Tensor:
    """Indices of the clients that can be drawn."""
    if not 1 <= cohort <= len(sizes):
        raise InputError(f"cohort={cohort}: choose between 1 and the number of clients, {len(sizes)}")
    return (eligible & (sizes > 0)).nonzero().flatten()


def _weighted_draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Positions of ``count`` draws without replacement, each in proportion to the weights that are left.

    The largest of log(w) + Gumbel noise, which is the order of such draws (Efraimidis and Spirakis 2006).
    """
    uniform = torch.rand(len(weights), generator=generator, dtype=torch.float64)
    keys = weights.log() - (-uniform.clamp(min=torch.finfo(torch.float64).tiny).log()).log()
    return keys.topk(min(count, len(weights))).indices


def _ascending(clients: Tensor) -> tuple[int, ...]:
    return tuple(clients.sort().values.tolist())


def _factor(factor: float) -> float:
    if not (factor > 0 and math.isfinite(factor)):
        raise InputError(f"over-selection by {factor}: give a factor above 0, such as 1.3")
    return factor


def _scaled(cohort: int, factor: float, clients: int) -> int:
    return max(1, min(clients, math.ceil(cohort * _factor(factor))))
