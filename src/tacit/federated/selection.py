"""Which clients take part in a round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tacit.errors import InputError


class Selection(Protocol):
    """Draws the clients that are invited to a round."""

    def select(self, round: int, sizes: Tensor, eligible: Tensor, generator: torch.Generator) -> tuple[int, ...]:
        """The indices of the clients invited, ascending.

        Args:
            round: its number, from 1.
            sizes: how many examples each client has, int64 of shape ``(N,)``.
            eligible: which clients may be invited now, bool of shape ``(N,)``; a client without examples is not.
            generator: the source of every random choice.
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """``cohort`` of the eligible clients, uniformly without replacement; all of them if there are fewer.

    Raises:
        InputError: ``cohort`` is not positive, or, when selecting, more than there are clients.
    """

    cohort: int

    def select(self, round: int, sizes: Tensor, eligible: Tensor, generator: torch.Generator) -> tuple[int, ...]:
        """See `Selection`."""
        if not 1 <= self.cohort <= len(sizes):
            raise InputError(f"cohort={self.cohort}: choose between 1 and the number of clients, {len(sizes)}")
        order = torch.randperm(len(sizes), generator=generator)
        return tuple(sorted(order[eligible[order]][: self.cohort].tolist()))


def uniform_cohort(clients: int, cohort: int, generator: torch.Generator) -> tuple[int, ...]:
    """Draw ``cohort`` of ``clients`` uniformly without replacement; their indices, ascending.

    Raises:
        InputError: ``cohort`` is not between 1 and ``clients``.
    """
    if not 1 <= cohort <= clients:
        raise InputError(f"cohort={cohort}: choose between 1 and the number of clients, {clients}")
    return tuple(sorted(torch.randperm(clients, generator=generator)[:cohort].tolist()))
