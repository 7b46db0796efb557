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
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
