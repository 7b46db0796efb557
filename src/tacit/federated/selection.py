"""Which clients take part in a round."""

from __future__ import annotations

import torch

from tacit.errors import InputError


def uniform_cohort(clients: int, cohort: int, generator: torch.Generator) -> tuple[int, ...]:
    """Draw ``cohort`` of ``clients`` uniformly without replacement; their indices, ascending.

    Raises:
        InputError: ``cohort`` is not between 1 and ``clients``.
    """
    if not 1 <= cohort <= clients:
        raise InputError(f"cohort={cohort}: choose between 1 and the number of clients, {clients}")
    return tuple(sorted(torch.randperm(clients, generator=generator)[:cohort].tolist()))
