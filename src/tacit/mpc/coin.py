"""A coin that both parties see: a public random seed that neither of them chose.

Dropout draws its masks from such a seed. They depend on no data, and everything that they multiply is local.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tacit.mpc.correlation import Correlation, Field, Part, Provider
from tacit.mpc.steps import Open, Protocol, Take
from tacit.ring.prg import SEED_BYTES, Prg

_WORDS = SEED_BYTES // 8
_CHANCE_BITS = 32


@dataclass(frozen=True)
class Coin(Correlation):
    """A uniform seed, of which each party expands its part; nothing is sent."""

    @property
    def fields(self) -> dict[str, Field]:
        """r."""
        return {"r": Field((_WORDS,))}

    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """Nothing is dealt."""
        return {}


def toss() -> Protocol[Tensor]:
    """A fresh public seed.

    1. take [R]; 2. open R.

    Returns:
        Two int64 words, known to both parties; the provider, who dealt R, can know them as well.

    Guarantees: uniform, if the provider and one of the parties follow the protocol.
    Leakage: the seed, which is its purpose.
    Cost: one round, 16 bytes each way; nothing dealt.
    """
    part = yield Take(Coin())
    (seed,) = yield Open(part.r)
    opened: Tensor = seed
    return opened


def kept(seed: Tensor, name: str, shape: tuple[int, ...], chance: float) -> Tensor:
    """Independent ones, each with a chance to within 2^-33, and zeros elsewhere; local.

    Args:
        seed: what `toss` gave.
        name: what they are for; another name gives independent ones.
        shape: of the result.
        chance: of a one, from 0 to 1.

    Returns:
        float32, the same at both parties.
    """
    if seed.is_meta:
        return torch.empty(shape, device="meta")
    stream = Prg(seed.cpu().numpy().astype("<i8").tobytes()).derive(name)
    drawn = stream.array(torch.Size(shape).numel() * _CHANCE_BITS // 8).view(np.uint32)
    ones = drawn.astype(np.uint64) < round(chance * 2**_CHANCE_BITS)
    return torch.from_numpy(ones.astype(np.float32)).reshape(shape).to(seed.device)
