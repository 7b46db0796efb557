"""Random generators that depend only on what they are for."""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator derived from the seed of a run and a purpose, such as ``("round", 3, "client", 17)``.

    Equal arguments give equal streams whatever was drawn before, so neither the order in which clients run
    nor the process they run in changes a result. Statistical quality only: nothing secret may be drawn from
    it.
    """
    return torch.Generator().manual_seed(int.from_bytes(seed_for(seed, *purpose)[:8], "big"))


def seed_for(seed: int, *purpose: str | int) -> bytes:
    """Sixteen bytes for a purpose, as `generator_for` derives them; whoever knows the run's seed knows them."""
    return hashlib.sha256(repr((seed, *purpose)).encode()).digest()[:16]
