"""Shared by the tests of the encrypted engine: seeded parties, chosen masks, and the plaintext to compare with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tacit.mpc.correlation import Correlation, Part, Provider
from tacit.mpc.lockstep import Trio
from tacit.mpc.shares import Share, share
from tacit.mpc.steps import Open, Protocol, Role, Take
from tacit.ring.prg import Prg

# These tensors are small: on a busy machine a barrier between threads costs a thousand times what it shares out.
torch.set_num_threads(1)

UNIT = 2.0**-16
LARGEST = 2**62 - 1
"""The largest magnitude that a masked opening takes."""

Pair = tuple[Share, Share]
seeds = st.integers(0, 2**32 - 1)


def prg(seed: int = 0) -> Prg:
    return Prg(seed.to_bytes(16, "big"))


def trio(seed: int = 0, tap: Callable[[Role, Open], None] | None = None) -> Trio:
    return Trio(prg(seed).derive("trio"), tap)


def shared(words: Tensor, scale: int = 16, seed: int = 0) -> Pair:
    """Shares of ring elements."""
    return share(words, scale, prg(seed).derive("inputs"))


def total(pair: Pair) -> Tensor:
    """The ring elements that two shares stand for."""
    assert (pair[0].holder, pair[1].holder) == (Role.ALICE, Role.BOB)
    assert pair[0].scale == pair[1].scale
    return pair[0].words + pair[1].words


def words(seed: int, shape: tuple[int, ...], magnitude: int | None = None) -> Tensor:
    """Ring elements: over the whole ring, or in [-magnitude, magnitude], both ends and zero included where they fit."""
    drawn = prg(seed).derive("words").words(shape)
    if magnitude is None:
        return drawn
    drawn = torch.from_numpy(np.asarray(np.mod(drawn.numpy(), np.int64(min(2 * magnitude + 1, 2**63 - 1))))) - magnitude
    edges = torch.tensor([magnitude, -magnitude, 0, 1, -1])[: drawn.numel()]
    drawn.view(-1)[: len(edges)] = edges
    return drawn


Dealer = Callable[[Correlation], tuple[Part, Part]]


def chosen(masks: Tensor, seed: int = 0) -> Dealer:
    """A dealer whose uniform field ``r`` has these true values; everything else follows from them as in `Provider`."""
    source = prg(seed).derive("chosen")
    provider = Provider(prg(1), prg(2), source.derive("provider"))

    def deal(correlation: Correlation) -> tuple[Part, Part]:
        fields = correlation.fields
        assert [name for name, field in fields.items() if not field.dealt] == ["r"]
        true = {"r": masks, **correlation.derive(Part(r=masks), provider)}
        assert true.keys() == fields.keys()
        alice, bob = {}, {}
        for name, value in true.items():
            assert (tuple(value.shape), value.dtype) == (fields[name].shape, fields[name].dtype)
            half = source.words(fields[name].shape).to(value.dtype)
            alice[name], bob[name] = half, value ^ half if fields[name].xor else value - half
        return Part(**alice), Part(**bob)

    return deal


def drive(alice: Protocol[Any], bob: Protocol[Any], dealer: Dealer) -> tuple[Any, Any]:
    """Run two parties in lockstep, as `Trio.run` does, with randomness that the test chooses."""
    answers: tuple[Any, Any] = (None, None)
    while True:
        steps, results = [], []
        for party, answer in zip((alice, bob), answers, strict=True):
            try:
                steps.append(party.send(answer))
            except StopIteration as stop:
                results.append(stop.value)
        if results:
            assert not steps, "one party ended before the other"
            return results[0], results[1]
        left, right = steps
        answers = (None, None)
        if isinstance(left, Take):
            assert left == right
            answers = dealer(left.correlation)
        elif isinstance(left, Open):
            opened = tuple(
                x + y if x.dtype == torch.int64 else x ^ y for x, y in zip(left.values, right.values, strict=True)
            )
            answers = (opened, opened)


class Recorder:
    """A tap that keeps what every party sends, and what the two messages of a round open to."""

    def __init__(self) -> None:
        self.sent: dict[Role, list[tuple[Tensor, ...]]] = {Role.ALICE: [], Role.BOB: []}
        self.labels: list[tuple[str, ...]] = []

    def __call__(self, role: Role, step: Open) -> None:
        self.sent[role].append(tuple(value.clone() for value in step.values))
        if role is Role.ALICE:
            self.labels.append(step.labels)

    def opened(self) -> list[tuple[Tensor, ...]]:
        """What both parties know after each round."""
        return [
            tuple(x + y if x.dtype == torch.int64 else x ^ y for x, y in zip(left, right, strict=True))
            for left, right in zip(self.sent[Role.ALICE], self.sent[Role.BOB], strict=True)
        ]
